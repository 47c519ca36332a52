//! Keys, sealing, signing, hashing: the only user of the crypto crates.
//! Invariant: a secret is zeroed when it is dropped and never printed; every key has one purpose, named by the
//! BLAKE3 context it was derived under.

pub mod keyfile;
pub mod keys;
pub mod seal;
pub mod sign;
pub mod slots;

use crate::types::Hash;

/// BLAKE3 of `bytes`.
pub fn hash(bytes: &[u8]) -> Hash {
    Hash(*blake3::hash(bytes).as_bytes())
}

/// BLAKE3 of bytes that come in pieces.
#[derive(Default, Clone)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all pieces so far.
    pub fn finish(&self) -> Hash {
        Hash(*self.0.finalize().as_bytes())
    }
}
