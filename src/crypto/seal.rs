//! Sealing with AES-256-GCM: [`Sealer`] for small objects, [`BulkSealer`] for the frames of segments.
//! Both make the same bytes from the same inputs; the second is AWS-LC's implementation, several times as fast on
//! wide registers, and a test holds it against the first.
//! Invariant: one sealer per derived key; its caller never seals twice under one nonce (segments use the
//! frame's offset, and an offset is sealed once; other objects draw a fresh salt, hence a fresh key, each time).

use super::keys::DerivedKey;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::fmt;

/// Bytes that sealing adds to the plain text.
pub const TAG_LEN: usize = 16;

/// The bytes are not what was sealed under this key, nonce and associated data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("authentication failed")]
pub struct NotAuthentic;

/// AES-256-GCM under one derived key.
#[derive(Clone)]
pub struct Sealer(Aes256Gcm);

impl Sealer {
    /// A sealer under `key`.
    pub fn new(key: &DerivedKey) -> Sealer {
        Sealer(Aes256Gcm::new((&key.0).into()))
    }

    /// Seals `buf` in place and returns the tag. `nonce` fills the low 64 bits (little endian) of the 96-bit nonce.
    pub fn seal(&self, nonce: u64, associated: &[u8], buf: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .0
            .encrypt_inout_detached(&nonce96(nonce).into(), associated, InOutBuf::from(buf))
            .expect("a frame is far below the 64 GiB limit of GCM");
        tag.into()
    }

    /// Opens `buf` in place. On failure `buf` holds nothing meaningful.
    pub fn open(
        &self,
        nonce: u64,
        associated: &[u8],
        buf: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), NotAuthentic> {
        self.0
            .decrypt_inout_detached(&nonce96(nonce).into(), associated, InOutBuf::from(buf), &(*tag).into())
            .map_err(|_| NotAuthentic)
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer(..)")
    }
}

/// AES-256-GCM under one derived key, for much data.
pub struct BulkSealer(LessSafeKey);

impl BulkSealer {
    /// A sealer under `key`.
    pub fn new(key: &DerivedKey) -> BulkSealer {
        let key = UnboundKey::new(&AES_256_GCM, &key.0).expect("the key has the algorithm's length");
        BulkSealer(LessSafeKey::new(key))
    }

    /// As [`Sealer::seal`].
    pub fn seal(&self, nonce: u64, associated: &[u8], buf: &mut [u8]) -> [u8; TAG_LEN] {
        let nonce = Nonce::assume_unique_for_key(nonce96(nonce));
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(associated), buf);
        let tag = tag.expect("a frame is far below the 64 GiB limit of GCM");
        tag.as_ref().try_into().expect("GCM's tag has 16 bytes")
    }

    /// Opens `buf`, which ends with the tag, in place. On failure `buf` holds nothing meaningful.
    pub fn open(&self, nonce: u64, associated: &[u8], buf: &mut [u8]) -> Result<(), NotAuthentic> {
        let nonce = Nonce::assume_unique_for_key(nonce96(nonce));
        match self.0.open_in_place(nonce, Aad::from(associated), buf) {
            Ok(_) => Ok(()),
            Err(_) => Err(NotAuthentic),
        }
    }

    /// Opens `sealed`, whose tag is `tag`, into `plain`, which must be as long. On failure `plain` holds nothing
    /// meaningful.
    pub fn open_onto(
        &self,
        nonce: u64,
        associated: &[u8],
        sealed: &[u8],
        tag: &[u8],
        plain: &mut [u8],
    ) -> Result<(), NotAuthentic> {
        let nonce = Nonce::assume_unique_for_key(nonce96(nonce));
        let opened = self.0.open_separate_gather(nonce, Aad::from(associated), sealed, tag, plain);
        opened.map_err(|_| NotAuthentic)
    }
}

impl fmt::Debug for BulkSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BulkSealer(..)")
    }
}

fn nonce96(nonce: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&nonce.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::keys::{Purpose, VolumeKey};

    #[test]
    fn opens_only_what_was_sealed_at_this_place() {
        let key = VolumeKey::from_bytes([7; 32]).derive(Purpose::SegmentFrames, b"m");
        let sealer = Sealer::new(&key);
        let mut buf = b"plain".to_vec();
        let tag = sealer.seal(9, b"ad", &mut buf);
        assert_ne!(buf, b"plain");
        let attempt = |nonce, ad: &[u8], mut bytes: Vec<u8>, tag| {
            sealer.open(nonce, ad, &mut bytes, &tag).map(|()| bytes)
        };
        assert_eq!(attempt(9, b"ad", buf.clone(), tag).unwrap(), b"plain");
        assert!(attempt(8, b"ad", buf.clone(), tag).is_err());
        assert!(attempt(9, b"ae", buf.clone(), tag).is_err());
        let mut torn = buf.clone();
        torn[0] ^= 1;
        assert!(attempt(9, b"ad", torn, tag).is_err());
    }

    #[test]
    fn both_implementations_make_and_open_the_same_bytes() {
        let key = VolumeKey::from_bytes([9; 32]).derive(Purpose::SegmentFrames, b"segment");
        let (small, bulk) = (Sealer::new(&key), BulkSealer::new(&key));
        for len in [0usize, 1, 15, 16, 17, 4095, 131_072] {
            let plain: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
            let (mut a, mut b) = (plain.clone(), plain.clone());
            let nonce = u64::MAX - len as u64;
            let tag = small.seal(nonce, b"place", &mut a);
            assert_eq!(bulk.seal(nonce, b"place", &mut b), tag);
            assert_eq!(a, b);
            let mut sealed = [a, tag.to_vec()].concat();
            assert!(bulk.open(nonce, b"elsewhere", &mut sealed.clone()).is_err());
            let mut apart = vec![0; len];
            assert!(bulk.open_onto(nonce, b"elsewhere", &sealed[..len], &tag, &mut apart).is_err());
            bulk.open_onto(nonce, b"place", &sealed[..len], &tag, &mut apart).unwrap();
            bulk.open(nonce, b"place", &mut sealed).unwrap();
            assert_eq!((&sealed[..len], &apart[..]), (&plain[..], &plain[..]));
            assert!(bulk.open_onto(nonce, b"place", &plain, &tag[1..], &mut apart).is_err());
        }
    }
}
