//! The volume key and the keys derived from it.
//! Invariant: the volume key itself seals nothing; each use has a key of its own, derived under its own context.

use super::seal::NotAuthentic;
use crate::clock::Env;
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of the code that [`DerivedKey::mac`] makes.
pub const MAC_LEN: usize = 32;

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
    /// The wrapping of the volume key in a passphrase slot; the secret is what Argon2id made of the passphrase,
    /// the material is what the slot binds.
    PassphraseSlot,
}

impl Purpose {
    fn context(self) -> &'static str {
        match self {
            Purpose::SegmentFrames => "embassyfs v1 segment frames",
            Purpose::SegmentIndex => "embassyfs v1 segment index",
            Purpose::Checkpoint => "embassyfs v1 checkpoint",
            Purpose::Superblock => "embassyfs v1 superblock",
            Purpose::PassphraseSlot => "embassyfs v1 passphrase slot",
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
        DerivedKey::from_secret(&self.0, purpose, material)
    }
}

impl DerivedKey {
    /// The key for `purpose` from a 256-bit secret; see [`VolumeKey::derive`].
    pub(super) fn from_secret(secret: &[u8; 32], purpose: Purpose, material: &[u8]) -> DerivedKey {
        let mut hasher = blake3::Hasher::new_derive_key(purpose.context());
        hasher.update(secret);
        hasher.update(material);
        let mut key = DerivedKey([0; 32]);
        let mut output = hasher.finalize_xof();
        output.fill(&mut key.0);
        output.zeroize();
        hasher.zeroize();
        key
    }

    /// Keyed BLAKE3 of `message`. Unlike sealing it takes no nonce, so the same key may authenticate any number of
    /// versions of one object.
    pub fn mac(&self, message: &[u8]) -> [u8; MAC_LEN] {
        *self.keyed_hash(message).as_bytes()
    }

    /// Accepts only what [`DerivedKey::mac`] made of the same message; takes the same time wherever they differ.
    pub fn verify_mac(&self, message: &[u8], mac: &[u8; MAC_LEN]) -> Result<(), NotAuthentic> {
        // `blake3::Hash` compares in constant time.
        if self.keyed_hash(message) == blake3::Hash::from(*mac) { Ok(()) } else { Err(NotAuthentic) }
    }

    fn keyed_hash(&self, message: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(message);
        let out = hasher.finalize();
        hasher.zeroize();
        out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_holds_for_one_key_purpose_and_message() {
        let volume = VolumeKey::from_bytes([3; 32]);
        let key = volume.derive(Purpose::Superblock, b"id");
        let mac = key.mac(b"message");
        assert_eq!(key.verify_mac(b"message", &mac), Ok(()));
        assert_eq!(key.verify_mac(b"messagf", &mac), Err(NotAuthentic));
        assert!(volume.derive(Purpose::Superblock, b"ie").verify_mac(b"message", &mac).is_err());
        assert!(volume.derive(Purpose::Checkpoint, b"id").verify_mac(b"message", &mac).is_err());
        let mut bent = mac;
        bent[31] ^= 1;
        assert!(key.verify_mac(b"message", &bent).is_err());
    }
}
