//! The key of who runs drills: it signs their reports, and opens nothing.
//! Invariant: as for all key files. Bytes: `docs/format.md`, "Key files".

use super::{KeyFileError, Result, create_text, read};
use crate::clock::Env;
use crate::crypto::sign::{PublicKey, SecretKey};
use crate::types::{hex, unhex};
use serde::Deserialize;
use std::path::Path;
use zeroize::Zeroizing;

/// A key that signs the reports of drills.
#[derive(Clone)]
pub struct DrillKeyFile {
    /// The key.
    pub signing: SecretKey,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire<'a> {
    embassyfs_drill_key: u32,
    signing_key: &'a str,
    public: &'a str,
}

impl DrillKeyFile {
    /// Draws a new key.
    pub fn generate(env: &Env) -> DrillKeyFile {
        DrillKeyFile { signing: SecretKey::generate(env) }
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.signing.public()
    }

    /// Writes a new file that only its owner may read.
    pub fn save(&self, path: &Path) -> Result<()> {
        let secret = Zeroizing::new(hex(self.signing.expose()));
        let public = hex(&self.public().to_bytes());
        let text = Zeroizing::new(format!(
            "{{\n  \"embassyfs_drill_key\": 1,\n  \"signing_key\": \"{}\",\n  \"public\": \"{public}\"\n}}\n",
            *secret
        ));
        create_text(path, &text)
    }

    /// Reads such a file; refuses one that others than its owner can get at.
    pub fn load(path: &Path) -> Result<DrillKeyFile> {
        DrillKeyFile::parse(&read(path)?, &path.display().to_string())
    }

    /// Reads the text of such a file.
    pub fn parse(text: &[u8], origin: &str) -> Result<DrillKeyFile> {
        let damaged = |detail: String| KeyFileError::Damaged { origin: origin.to_owned(), detail };
        let wire: Wire<'_> =
            serde_json::from_slice(text).map_err(|e| damaged(format!("is no drill key: {e}")))?;
        if wire.embassyfs_drill_key != 1 {
            return Err(KeyFileError::Version { origin: origin.to_owned(), found: wire.embassyfs_drill_key });
        }
        let secret = Zeroizing::new(unhex(wire.signing_key).unwrap_or([0; 32]));
        let key = DrillKeyFile { signing: SecretKey::from_bytes(&secret) };
        match unhex(wire.public) == Some(key.public().to_bytes()) && unhex::<32>(wire.signing_key).is_some() {
            true => Ok(key),
            false => Err(damaged("its two halves do not fit".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drill_key_reads_as_it_was_written_and_not_when_it_is_bent() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, key) = (dir.path().join("drill.key"), DrillKeyFile::generate(&Env::system()));
        key.save(&path).expect("written");
        assert_eq!(DrillKeyFile::load(&path).expect("whole").public(), key.public());
        assert!(matches!(key.save(&path), Err(KeyFileError::Exists { .. })));
        let text = std::fs::read_to_string(&path).expect("text");
        for (at, c) in text.char_indices().filter(|(_, c)| c.is_ascii_hexdigit()) {
            let mut bent = text.clone();
            bent.replace_range(at..=at, if c == '0' { "1" } else { "0" });
            assert!(DrillKeyFile::parse(bent.as_bytes(), "bent").is_err(), "byte {at}");
        }
    }
}
