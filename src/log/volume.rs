//! The superblock, `volume.json`: what a volume is, who may write it, how its key can be recovered.
//! Invariant: a [`Superblock`] in hand was authenticated, by the writer's signature with the public key pinned in a
//! key file and, where the volume key is known, by a code under it; exactly the bytes that were signed are parsed.
//! Bytes: `docs/format.md`, "volume.json".

use super::{Error, Result};
use crate::crypto::keyfile::{KeyFile, Role, check_name};
use crate::crypto::keys::{MAC_LEN, Purpose, VolumeKey};
use crate::crypto::sign::{PublicKey, SIGNATURE_LEN, SecretKey};
use crate::crypto::slots::{Slot, SlotError, unwrap_passphrase};
use crate::types::{Timestamp, VolumeId, hex, unhex};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Name of the object, and of its pinned copy at home.
pub const NAME: &str = "volume.json";
/// A larger object is no superblock.
pub const LEN_MAX: u64 = 1024 * 1024;
/// Most slots a volume may have; it bounds the guesses that [`open_with_passphrase`] makes.
pub const SLOTS_MAX: usize = 16;

const FORMAT: u64 = 1;
const SUITE: &str = "aes-256-gcm+blake3+ed25519";
const SIGNATURE_CONTEXT: &[u8] = b"embassyfs v1 superblock signature\0";

// The file is these three pieces around the signed bytes and the two codes. They stand at fixed distances from the
// ends, so that what was signed can be cut out without a parser; as a whole they are plain JSON.
const OPENING: &str = "{\n\"superblock\": ";
const BEFORE_TAG: &str = ",\n\"tag\": \"";
const BEFORE_SIGNATURE: &str = "\",\n\"signature\": \"";
const CLOSING: &str = "\"\n}\n";
const TAIL_LEN: usize =
    BEFORE_TAG.len() + 2 * MAC_LEN + BEFORE_SIGNATURE.len() + 2 * SIGNATURE_LEN + CLOSING.len();

/// Sizes that hold for the whole volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// Most file bytes in one DATA frame: a power of two, 4 KiB to 1 MiB.
    pub record_size: u32,
    /// Size at which a segment is closed: 1 MiB to 256 MiB, at least four records.
    pub segment_size: u32,
    /// Target size of a tree page: 4 KiB to 128 KiB.
    pub page_size: u32,
}

impl Default for Parameters {
    fn default() -> Parameters {
        Parameters { record_size: 128 << 10, segment_size: 16 << 20, page_size: 16 << 10 }
    }
}

impl Parameters {
    /// What is wrong with these sizes, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Parameters { record_size, segment_size, page_size } = *self;
        if !record_size.is_power_of_two() || !(4 << 10..=1 << 20).contains(&record_size) {
            Err(format!("record_size {record_size} is no power of two from 4096 to 1048576"))
        } else if !(1 << 20..=256 << 20).contains(&segment_size) {
            Err(format!("segment_size {segment_size} is not from 1048576 to 268435456"))
        } else if segment_size / 4 < record_size {
            Err(format!("segment_size {segment_size} holds less than four records of {record_size}"))
        } else if !(4 << 10..=128 << 10).contains(&page_size) {
            Err(format!("page_size {page_size} is not from 4096 to 131072"))
        } else {
            Ok(())
        }
    }
}

/// What a volume is. Authenticated, unless it was just put together by `init`.
#[derive(Clone, Debug, PartialEq)]
pub struct Superblock {
    /// Identity of the volume.
    pub volume: VolumeId,
    /// Its name, for people.
    pub name: String,
    /// Number of the volume key in use.
    pub key_id: u32,
    /// Checks what the writer signs.
    pub writer_public: PublicKey,
    /// Checks what the steward signs.
    pub steward_public: PublicKey,
    /// Ways to the volume key besides the key files.
    pub slots: Vec<Slot>,
    /// When the volume was made, by the clock of the host that made it.
    pub created: Timestamp,
    /// Sizes that hold for the whole volume.
    pub parameters: Parameters,
}

/// A `volume.json` that was taken apart and not yet authenticated: only what is needed to authenticate it can be
/// got from it.
pub struct UnverifiedSuperblock {
    signed: Vec<u8>,
    claims: Superblock,
    tag: [u8; MAC_LEN],
    signature: [u8; SIGNATURE_LEN],
}

/// The signed part as it stands in the file.
#[derive(Serialize, Deserialize)]
struct Wire {
    format: u64,
    volume: String,
    name: String,
    suite: String,
    /// Names of what a program must know to use the volume at all. Other fields it may pass over.
    required_features: Vec<String>,
    key_id: u32,
    writer_public: String,
    steward_public: String,
    created: CreatedWire,
    parameters: Parameters,
    slots: Vec<Slot>,
}

#[derive(Serialize, Deserialize)]
struct CreatedWire {
    /// For people; the numbers count.
    time: String,
    secs: i64,
    nanos: u32,
}

/// As much as must be understood to refuse a version that is not known.
#[derive(Deserialize)]
struct AnyVersion {
    superblock: AnyVersionBody,
}

#[derive(Deserialize)]
struct AnyVersionBody {
    format: u64,
    #[serde(default)]
    suite: Option<String>,
    #[serde(default)]
    required_features: Vec<String>,
}

fn corrupt(detail: impl ToString) -> Error {
    Error::corrupt(NAME, detail)
}

impl Superblock {
    /// The bytes of `volume.json`: authenticated under `key`, signed by `writer`. They were read back and verified.
    pub fn encode(&self, key: &VolumeKey, writer: &SecretKey) -> Result<Vec<u8>> {
        let signed = serde_json::to_vec_pretty(&self.to_wire()?).map_err(corrupt)?;
        let tag = tag_key(key, &self.volume).mac(&signed);
        let signature = writer.sign(&signature_message(&signed, &tag));
        let bytes = [OPENING.as_bytes(), &signed, tail(&tag, &signature).as_bytes()].concat();
        let back = UnverifiedSuperblock::parse(&bytes)?.authenticate(&self.writer_public, Some(key))?;
        if back != *self {
            return Err(corrupt("reads back differently from what was meant; nothing was written"));
        }
        Ok(bytes)
    }

    fn to_wire(&self) -> Result<Wire> {
        // Times outside jiff's years -9999..=9999 come only from a broken clock.
        let nanos = i32::try_from(self.created.nanos).unwrap_or(i32::MAX);
        let time = jiff::Timestamp::new(self.created.secs, nanos)
            .map_err(|_| Error::Refused("this host's clock is far off: set it first".into()))?;
        Ok(Wire {
            format: FORMAT,
            volume: self.volume.to_string(),
            name: self.name.clone(),
            suite: SUITE.into(),
            required_features: Vec::new(),
            key_id: self.key_id,
            writer_public: hex(&self.writer_public.to_bytes()),
            steward_public: hex(&self.steward_public.to_bytes()),
            created: CreatedWire {
                time: time.to_string(),
                secs: self.created.secs,
                nanos: self.created.nanos,
            },
            parameters: self.parameters,
            slots: self.slots.clone(),
        })
    }

    fn from_wire(wire: Wire) -> Result<Superblock> {
        let bad = |field: &str| corrupt(format!("{field} is damaged"));
        let public = |field: &str, text: &str| {
            let bytes = unhex(text).ok_or_else(|| bad(field))?;
            PublicKey::from_bytes(&bytes).map_err(|_| bad(field))
        };
        if wire.created.nanos >= 1_000_000_000 {
            return Err(bad("created"));
        }
        if wire.slots.len() > SLOTS_MAX {
            return Err(corrupt(format!("{} slots; at most {SLOTS_MAX} are accepted", wire.slots.len())));
        }
        check_name(&wire.name).map_err(corrupt)?;
        wire.parameters.check().map_err(corrupt)?;
        Ok(Superblock {
            volume: VolumeId(unhex(&wire.volume).ok_or_else(|| bad("volume"))?),
            name: wire.name,
            key_id: wire.key_id,
            writer_public: public("writer_public", &wire.writer_public)?,
            steward_public: public("steward_public", &wire.steward_public)?,
            slots: wire.slots,
            created: Timestamp { secs: wire.created.secs, nanos: wire.created.nanos },
            parameters: wire.parameters,
        })
    }
}

impl UnverifiedSuperblock {
    /// Takes `bytes` apart; refuses versions, suites and features that are not known, and values out of bounds.
    /// What it accepts may still be anybody's work.
    pub fn parse(bytes: &[u8]) -> Result<UnverifiedSuperblock> {
        if bytes.len() as u64 > LEN_MAX {
            return Err(corrupt("is too large for a superblock"));
        }
        let any: AnyVersion = serde_json::from_slice(bytes)
            .map_err(|e| corrupt(format!("is damaged or was not written by embassyfs ({e})")))?;
        any.superblock.check_known()?;
        let (signed, tag, signature) = split(bytes).ok_or_else(|| {
            corrupt(
                "is not byte for byte as it was written (reformatted or altered): put back an exact copy, such as \
                 the one in home's state directory",
            )
        })?;
        let wire: Wire = serde_json::from_slice(signed)
            .map_err(|e| corrupt(format!("the signed part cannot be read: {e}")))?;
        if wire.format != FORMAT || wire.suite != SUITE || !wire.required_features.is_empty() {
            return Err(corrupt("says two things about its version"));
        }
        let claims = Superblock::from_wire(wire)?;
        Ok(UnverifiedSuperblock { signed: signed.to_vec(), claims, tag, signature })
    }

    /// The volume it claims to be.
    pub fn volume(&self) -> VolumeId {
        self.claims.volume
    }

    /// The kinds of slots it claims to have.
    pub fn slot_kinds(&self) -> Vec<&str> {
        self.claims.slots.iter().map(Slot::kind).collect()
    }

    /// Authenticates it with what the key file pins: volume, public keys and, where the key file has the volume key,
    /// the code under it.
    pub fn verify(self, key: &KeyFile) -> Result<Superblock> {
        let foreign = |what: String| {
            Err(Error::Refused(format!(
                "{NAME}: {what}: use this volume's own key file, or look whether the store is the right one"
            )))
        };
        let claims = &self.claims;
        if claims.volume != key.volume {
            return foreign(format!(
                "is of volume {} (\"{}\"), and the key file is of volume {} (\"{}\")",
                claims.volume, claims.name, key.volume, key.name
            ));
        }
        if claims.writer_public != key.writer_public {
            return foreign("names another writer key than the one pinned in the key file".into());
        }
        if claims.steward_public != key.steward_public {
            return foreign("names another steward key than the one pinned in the key file".into());
        }
        if claims.key_id != key.key_id {
            return foreign(format!(
                "the volume is under key {}, and the key file holds key {}",
                claims.key_id, key.key_id
            ));
        }
        self.authenticate(&key.writer_public, key.volume_key.as_ref())
    }

    fn authenticate(self, writer: &PublicKey, key: Option<&VolumeKey>) -> Result<Superblock> {
        let unfit = |what: &str| {
            corrupt(format!(
                "{what}: it was altered after it was written, or is not this volume's; do not use this store before \
                 it is known why"
            ))
        };
        if let Some(key) = key {
            tag_key(key, &self.claims.volume)
                .verify_mac(&self.signed, &self.tag)
                .map_err(|_| unfit("its tag does not fit the volume key"))?;
        }
        writer
            .verify(&signature_message(&self.signed, &self.tag), &self.signature)
            .map_err(|_| unfit("the writer's signature does not fit"))?;
        Ok(self.claims)
    }
}

impl AnyVersionBody {
    fn check_known(&self) -> Result<()> {
        let refused = |what: String| {
            Err(corrupt(format!(
                "{what}: use the version of embassyfs that wrote this volume, or a newer one; nothing was changed"
            )))
        };
        if self.format != FORMAT {
            return refused(format!("format version {}, and this program knows only {FORMAT}", self.format));
        }
        if self.suite.as_deref().is_some_and(|suite| suite != SUITE) {
            let suite = self.suite.as_deref().unwrap_or_default();
            return refused(format!("suite {suite:?}, and this program knows only {SUITE:?}"));
        }
        match self.required_features.first() {
            Some(feature) => refused(format!("needs the feature {feature:?}, unknown to this program")),
            None => Ok(()),
        }
    }
}

/// When the key files are lost: opens the volume key with `passphrase` and makes a reader's key file. The code under
/// the volume key then proves the public keys, for whoever could forge it would know the passphrase.
///
/// Takes as long as Argon2id takes, for each passphrase slot that does not open.
pub fn open_with_passphrase(volume_json: &[u8], passphrase: &[u8]) -> Result<(Superblock, KeyFile)> {
    let unverified = UnverifiedSuperblock::parse(volume_json)?;
    let claims = &unverified.claims;
    let refused = |e: SlotError| Error::Refused(format!("{NAME}: {e}"));
    let mut opened = None;
    let mut failure = None;
    for slot in &claims.slots {
        match unwrap_passphrase(slot, &claims.volume, claims.key_id, passphrase) {
            Ok(key) => {
                opened = Some(key);
                break;
            }
            Err(SlotError::UnknownKind(_)) => {}
            Err(e) => failure = Some(e),
        }
    }
    let Some(key) = opened else {
        return Err(failure.map(refused).unwrap_or_else(|| {
            let kinds = unverified.slot_kinds().join(", ");
            Error::Refused(format!(
                "{NAME}: has no passphrase slot (it has: {}): a key file is needed",
                if kinds.is_empty() { "none" } else { &kinds }
            ))
        }));
    };
    let writer_public = claims.writer_public;
    let superblock = unverified.authenticate(&writer_public, Some(&key))?;
    let file = KeyFile {
        role: Role::Reader,
        volume: superblock.volume,
        name: superblock.name.clone(),
        key_id: superblock.key_id,
        volume_key: Some(key),
        signing: None,
        writer_public,
        steward_public: superblock.steward_public,
    };
    Ok((superblock, file))
}

impl fmt::Debug for UnverifiedSuperblock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UnverifiedSuperblock").field(&self.claims).finish()
    }
}

fn tag_key(key: &VolumeKey, volume: &VolumeId) -> crate::crypto::keys::DerivedKey {
    key.derive(Purpose::Superblock, &volume.0)
}

/// The signature covers the tag too, so that an auditor sees every altered byte of the file.
fn signature_message(signed: &[u8], tag: &[u8; MAC_LEN]) -> Vec<u8> {
    [SIGNATURE_CONTEXT, tag, signed].concat()
}

fn tail(tag: &[u8; MAC_LEN], signature: &[u8; SIGNATURE_LEN]) -> String {
    [BEFORE_TAG, &hex(tag), BEFORE_SIGNATURE, &hex(signature), CLOSING].concat()
}

/// The signed bytes, the tag and the signature; `None` unless the rest is exactly as [`Superblock::encode`] writes it.
fn split(bytes: &[u8]) -> Option<(&[u8], [u8; MAC_LEN], [u8; SIGNATURE_LEN])> {
    let rest = bytes.strip_prefix(OPENING.as_bytes())?;
    let (signed, end) = rest.split_at_checked(rest.len().checked_sub(TAIL_LEN)?)?;
    let text = std::str::from_utf8(end).ok()?;
    let (tag, signature) =
        text.strip_prefix(BEFORE_TAG)?.strip_suffix(CLOSING)?.split_once(BEFORE_SIGNATURE)?;
    let (tag, signature) = (unhex(tag)?, unhex(signature)?);
    // One spelling only: no upper-case digits.
    (tail(&tag, &signature) == text).then_some((signed, tag, signature))
}

#[cfg(test)]
mod tests;
