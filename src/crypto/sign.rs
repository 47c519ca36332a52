//! Ed25519 signatures over what the writer publishes.
//! Invariant: only a holder of the writer's key file can make a signature that [`PublicKey::verify`] accepts.

use crate::clock::Env;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use std::fmt;
use zeroize::Zeroizing;

/// Length of a signature in bytes.
pub const SIGNATURE_LEN: usize = 64;

/// A signing key, zeroed on drop (by `ed25519-dalek`).
#[derive(Clone)]
pub struct SecretKey(SigningKey);

/// The public half, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

/// A signature does not fit the key and the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

impl SecretKey {
    /// Draws a new key.
    pub fn generate(env: &Env) -> SecretKey {
        let bytes = Zeroizing::new(env.random_bytes());
        SecretKey(SigningKey::from_bytes(&bytes))
    }

    /// Takes the 32 secret bytes of a key file.
    pub fn from_bytes(bytes: &[u8; 32]) -> SecretKey {
        SecretKey(SigningKey::from_bytes(bytes))
    }

    /// The secret itself, for writing it to a key file.
    pub fn expose(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        self.0.sign(message).to_bytes()
    }
}

impl PublicKey {
    /// Takes 32 bytes; refuses what is no point of the curve or is of small order.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<PublicKey, BadSignature> {
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| BadSignature)?;
        if key.is_weak() { Err(BadSignature) } else { Ok(PublicKey(key)) }
    }

    /// The 32 bytes.
    pub fn to_bytes(self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// Accepts only a signature of `message` by the secret half (strict: no malleable forms).
    pub fn verify(&self, message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> Result<(), BadSignature> {
        self.0.verify_strict(message, &Signature::from_bytes(signature)).map_err(|_| BadSignature)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", crate::types::hex(&self.to_bytes()))
    }
}
