//! The text of a key file, and what the four kinds of it have in common.
//! Invariant: what is parsed has the secrets that its role has and no others, and fits its check value; the text
//! and the secrets in it are zeroed when they are dropped.

use super::super::keys::VolumeKey;
use super::super::sign::{PublicKey, SecretKey};
use super::{KeyFile, KeyFileError, Result, Role, StewardKeyFile, check_name};
use crate::types::{VolumeId, hex, unhex};
use serde::Deserialize;
use std::borrow::Cow;
use zeroize::Zeroizing;

/// The version of the text that is written here.
pub(super) const VERSION: u32 = 1;

const CHECK_CONTEXT: &str = "embassyfs v1 key file check";
const CHECK_LEN: usize = 16;

const STEWARD: &str = "steward";

/// The fields of any key file. The two secrets are there or not as the role says.
pub(super) struct Contents {
    role: &'static str,
    volume: VolumeId,
    name: String,
    key_id: u32,
    volume_key: Option<Secret>,
    signing: Option<Secret>,
    writer_public: PublicKey,
    steward_public: PublicKey,
}

type Secret = Zeroizing<[u8; 32]>;

/// Borrows from the text: a secret is in memory once as text and once as bytes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire<'a> {
    #[serde(rename = "embassyfs_key")]
    _version: u32,
    role: &'a str,
    volume: &'a str,
    #[serde(borrow)]
    name: Cow<'a, str>,
    key_id: u32,
    volume_key: Option<&'a str>,
    signing_key: Option<&'a str>,
    writer_public: &'a str,
    steward_public: &'a str,
    check: &'a str,
}

#[derive(Deserialize)]
struct VersionOnly {
    embassyfs_key: u32,
}

impl Contents {
    pub(super) fn of_key(key: &KeyFile, origin: &str) -> Result<Contents> {
        let contents = Contents {
            role: match key.role {
                Role::Auditor => "auditor",
                Role::Reader => "reader",
                Role::Writer => "writer",
            },
            volume: key.volume,
            name: key.name.clone(),
            key_id: key.key_id,
            volume_key: key.volume_key.as_ref().map(|k| Zeroizing::new(*k.expose())),
            signing: key.signing.as_ref().map(|k| Zeroizing::new(*k.expose())),
            writer_public: key.writer_public,
            steward_public: key.steward_public,
        };
        contents.check_whole().map_err(|detail| damaged(origin, detail))?;
        Ok(contents)
    }

    pub(super) fn of_steward(key: &StewardKeyFile, origin: &str) -> Result<Contents> {
        let contents = Contents {
            role: STEWARD,
            volume: key.volume,
            name: key.name.clone(),
            key_id: key.key_id,
            volume_key: None,
            signing: Some(Zeroizing::new(*key.signing.expose())),
            writer_public: key.writer_public,
            steward_public: key.signing.public(),
        };
        contents.check_whole().map_err(|detail| damaged(origin, detail))?;
        Ok(contents)
    }

    pub(super) fn into_key(self) -> Result<KeyFile> {
        let role = match self.role {
            "auditor" => Role::Auditor,
            "reader" => Role::Reader,
            "writer" => Role::Writer,
            _ => return Err(self.wrong_role("writer, reader or auditor")),
        };
        Ok(KeyFile {
            role,
            volume: self.volume,
            name: self.name,
            key_id: self.key_id,
            volume_key: self.volume_key.map(|secret| VolumeKey::from_bytes(*secret)),
            signing: self.signing.map(|secret| SecretKey::from_bytes(&secret)),
            writer_public: self.writer_public,
            steward_public: self.steward_public,
        })
    }

    pub(super) fn into_steward(self) -> Result<StewardKeyFile> {
        match (self.role, &self.signing) {
            (STEWARD, Some(secret)) => Ok(StewardKeyFile {
                volume: self.volume,
                name: self.name,
                key_id: self.key_id,
                signing: SecretKey::from_bytes(secret),
                writer_public: self.writer_public,
            }),
            _ => Err(self.wrong_role(STEWARD)),
        }
    }

    fn wrong_role(&self, needed: &str) -> KeyFileError {
        let (name, found) = (self.name.clone(), self.role.to_owned());
        KeyFileError::WrongRole { name, found, needed: needed.to_owned() }
    }

    /// The name is one; the secrets are those of the role, and the signing key is the one whose public half is named.
    fn check_whole(&self) -> std::result::Result<(), String> {
        check_name(&self.name)?;
        let (opens, signs) = match self.role {
            "writer" => (true, true),
            "reader" => (true, false),
            "auditor" => (false, false),
            STEWARD => (false, true),
            _ => return Err("names a role that this program does not know: use a newer embassyfs".into()),
        };
        if self.volume_key.is_some() != opens || self.signing.is_some() != signs {
            return Err("does not hold the keys of its role".into());
        }
        let public = if self.role == STEWARD { self.steward_public } else { self.writer_public };
        match &self.signing {
            Some(secret) if SecretKey::from_bytes(secret).public() != public => {
                Err("holds a signing key that does not fit its public key".into())
            }
            _ => Ok(()),
        }
    }

    /// Reads the text and checks it; `origin` names the text in errors.
    pub(super) fn parse(text: &[u8], origin: &str) -> Result<Contents> {
        // serde_json's own messages may quote what they found, which may be a secret: only the place is told.
        let unreadable = |e: serde_json::Error| {
            let what =
                if e.is_eof() { "the key file is truncated" } else { "this is no key file, or damaged" };
            damaged(origin, format!("{what} (line {}, column {})", e.line(), e.column()))
        };
        let version: VersionOnly = serde_json::from_slice(text).map_err(unreadable)?;
        if version.embassyfs_key != VERSION {
            return Err(KeyFileError::Version { origin: origin.to_owned(), found: version.embassyfs_key });
        }
        let wire: Wire = serde_json::from_slice(text).map_err(unreadable)?;
        let no_hex = |field: &str| damaged(origin, format!("{field} is mistyped or truncated"));
        let secret = |field: &str, value: Option<&str>| match value {
            None => Ok(None),
            Some(value) => {
                unhex::<32>(value).map(|bytes| Some(Zeroizing::new(bytes))).ok_or_else(|| no_hex(field))
            }
        };
        let public = |field: &str, value: &str| {
            let bytes = unhex::<32>(value).ok_or_else(|| no_hex(field))?;
            PublicKey::from_bytes(&bytes).map_err(|_| no_hex(field))
        };
        let roles = ["writer", "reader", "auditor", STEWARD];
        let contents = Contents {
            role: roles.into_iter().find(|role| *role == wire.role).unwrap_or("unknown"),
            volume: VolumeId(unhex(wire.volume).ok_or_else(|| no_hex("volume"))?),
            name: wire.name.into_owned(),
            key_id: wire.key_id,
            volume_key: secret("volume_key", wire.volume_key)?,
            signing: secret("signing_key", wire.signing_key)?,
            writer_public: public("writer_public", wire.writer_public)?,
            steward_public: public("steward_public", wire.steward_public)?,
        };
        contents.check_whole().map_err(|detail| damaged(origin, detail))?;
        if unhex::<CHECK_LEN>(wire.check) != Some(contents.check()) {
            return Err(damaged(
                origin,
                "the check value does not fit: a field was mistyped or altered; use another copy of the key file",
            ));
        }
        Ok(contents)
    }

    /// Against typing errors and cut-off copies: over the values, so that a key file typed in from paper fits
    /// however its lines are broken.
    fn check(&self) -> [u8; CHECK_LEN] {
        let mut hasher = blake3::Hasher::new_derive_key(CHECK_CONTEXT);
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u32).to_le_bytes());
            hasher.update(bytes);
        };
        field(self.role.as_bytes());
        field(&self.volume.0);
        field(self.name.as_bytes());
        field(&self.key_id.to_le_bytes());
        for secret in [&self.volume_key, &self.signing] {
            field(secret.as_ref().map_or(&[], |secret| secret.as_slice()));
        }
        field(&self.writer_public.to_bytes());
        field(&self.steward_public.to_bytes());
        let mut out = [0; CHECK_LEN];
        hasher.finalize_xof().fill(&mut out);
        zeroize::Zeroize::zeroize(&mut hasher);
        out
    }

    pub(super) fn to_text(&self) -> Zeroizing<String> {
        let name = serde_json::Value::from(self.name.as_str()).to_string();
        // Never grows beyond what is reserved: a string that grows leaves copies of the secrets behind.
        let mut out = Zeroizing::new(String::with_capacity(1024 + name.len()));
        let room = out.capacity();
        out.push_str(&format!("{{\n  \"embassyfs_key\": {VERSION},\n  \"role\": \"{}\",\n", self.role));
        out.push_str(&format!("  \"volume\": \"{}\",\n  \"name\": {name},\n", self.volume));
        out.push_str(&format!("  \"key_id\": {},\n", self.key_id));
        for (field, secret) in [("volume_key", &self.volume_key), ("signing_key", &self.signing)] {
            if let Some(secret) = secret {
                out.push_str("  \"");
                out.push_str(field);
                out.push_str("\": \"");
                push_hex(&mut out, secret.as_slice());
                out.push_str("\",\n");
            }
        }
        out.push_str(&format!("  \"writer_public\": \"{}\",\n", hex(&self.writer_public.to_bytes())));
        out.push_str(&format!("  \"steward_public\": \"{}\",\n", hex(&self.steward_public.to_bytes())));
        out.push_str(&format!("  \"check\": \"{}\"\n}}\n", hex(&self.check())));
        debug_assert_eq!(out.capacity(), room, "the text of a key file outgrew its buffer");
        out
    }
}

fn damaged(origin: &str, detail: impl Into<String>) -> KeyFileError {
    KeyFileError::Damaged { origin: origin.to_owned(), detail: detail.into() }
}

/// [`hex`] without the little strings it makes and leaves behind.
fn push_hex(out: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(digit), 16).expect("four bits are a hexadecimal digit"));
        }
    }
}
