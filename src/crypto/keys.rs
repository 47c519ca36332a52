//! The volume key and the keys derived from it.
//! Invariant: the volume key itself seals nothing; each use has a key of its own, derived under its own context.

use crate::clock::Env;
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// What a derived key is for. The strings are part of the format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Frames of one segment; material: the segment's header.
    SegmentFrames,
    /// The index frame of one segment; material: header and index salt.
    SegmentIndex,
    /// One checkpoint object; material: its header.
    Checkpoint,
    /// The authentication of the superblock; material: volume id.
    Superblock,
}

impl Purpose {
    fn context(self) -> &'static str {
        match self {
            Purpose::SegmentFrames => "embassyfs v1 segment frames",
            Purpose::SegmentIndex => "embassyfs v1 segment index",
            Purpose::Checkpoint => "embassyfs v1 checkpoint",
            Purpose::Superblock => "embassyfs v1 superblock",
        }
    }
}

/// A derived 256-bit key, zeroed on drop.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct DerivedKey(pub(super) [u8; 32]);

/// The 256-bit key of a volume from which all others are derived, zeroed on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct VolumeKey([u8; 32]);

impl VolumeKey {
    /// Draws a new key.
    pub fn generate(env: &Env) -> VolumeKey {
        VolumeKey(env.random_bytes())
    }

    /// Takes a key that was unwrapped from a slot or read from a key file.
    pub fn from_bytes(bytes: [u8; 32]) -> VolumeKey {
        VolumeKey(bytes)
    }

    /// The secret itself, for wrapping it in a slot or writing it to a key file.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key for `purpose`, bound to `material` (public bytes that name the object): BLAKE3 `derive_key` over
    /// the volume key followed by the material.
    pub fn derive(&self, purpose: Purpose, material: &[u8]) -> DerivedKey {
        let mut hasher = blake3::Hasher::new_derive_key(purpose.context());
        hasher.update(&self.0);
        hasher.update(material);
        let mut out = [0; 32];
        hasher.finalize_xof().fill(&mut out);
        hasher.zeroize();
        DerivedKey(out)
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey(..)")
    }
}

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DerivedKey(..)")
    }
}
