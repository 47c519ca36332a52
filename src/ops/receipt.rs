//! What the writer states about a volume, signed: that contents are durable abroad, and what a version holds.
//! Invariant: a statement is about a commit that the store holds, never about a file that somebody may be writing.

use super::signed::{Broken, Kind, claimed, open};
use super::status::{CommitPoint, rfc3339};
use crate::crypto::sign::PublicKey;
use crate::types::{Head, Timestamp};
use serde::{Deserialize, Serialize};

/// The version of the statements that are made and read here.
pub const FORMAT: u32 = 1;

/// What a daemon can be asked to sign.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// A receipt for this file, as the newest commit has it that the store holds.
    File {
        /// Path from the volume's root, bytes.
        path: Vec<u8>,
    },
    /// That a manifest is of this commit.
    Manifest {
        /// The commit.
        commit: u64,
        /// What the manifest holds.
        holds: Holds,
    },
}

/// Where in its history a volume stood, and since when that is known to be abroad.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stand {
    /// [`FORMAT`].
    pub format: u32,
    /// The volume's identity, hexadecimal.
    pub volume: String,
    /// Its name.
    pub name: String,
    /// The commit.
    pub commit: CommitPoint,
    /// The newest segment that the store held: number and hash of its trailer. The commit lies in it or before it.
    pub head: String,
    /// The epoch of that segment's writer.
    pub epoch: u32,
    /// When the store confirmed that segment, by home's clock.
    #[serde(with = "rfc3339")]
    pub durable: Timestamp,
}

/// That a file's contents are durable abroad.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Where in the volume's history.
    #[serde(flatten)]
    pub stand: Stand,
    /// The file's path from the volume's root, as [`super::names::shown`] writes it.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// BLAKE3 of its contents, holes being zeros; hexadecimal.
    pub blake3: String,
    /// When it was last modified.
    #[serde(with = "rfc3339")]
    pub mtime: Timestamp,
}

/// What a manifest holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// Where it was read: `version` or `live`.
    pub source: String,
    /// Lines.
    pub entries: u64,
    /// Regular files among them.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// BLAKE3 of all that stands before the signed end; hexadecimal.
    pub blake3: String,
}

/// The signed end of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Where in the volume's history.
    #[serde(flatten)]
    pub stand: Stand,
    /// What stands before it.
    #[serde(flatten)]
    pub holds: Holds,
}

/// Whether a statement is of a volume, as far as it is known which that is.
pub trait OfVolume {
    /// Where it says that the volume stood.
    fn stand(&self) -> &Stand;
}

impl OfVolume for Receipt {
    fn stand(&self) -> &Stand {
        &self.stand
    }
}

impl OfVolume for Manifest {
    fn stand(&self) -> &Stand {
        &self.stand
    }
}

/// Why a statement is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untrue {
    /// Its form or its signature.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// It is one of another volume.
    #[error("ANOTHER VOLUME: the {0} is of volume {1}, the key of volume {2}")]
    Volume(&'static str, String, String),
    /// Made by a newer program.
    #[error("the {0} has format {1}, and this program knows only {FORMAT}: use a newer embassyfs")]
    Format(&'static str, u32),
}

/// Believes a statement that the volume's writer signed; `volume` is the key's, where that says one.
pub fn believe<T: OfVolume + serde::de::DeserializeOwned>(
    kind: Kind,
    text: &[u8],
    key: &PublicKey,
    volume: Option<&str>,
) -> Result<T, Untrue> {
    let other = |found: &T| {
        let (found, volume) = (&found.stand().volume, volume?);
        (found != volume).then(|| Untrue::Volume(kind.word(), found.clone(), volume.into()))
    };
    let statement: T = match open(kind, text, key) {
        Ok(statement) => statement,
        // Another volume has another key: that is the plainer reason.
        Err(e @ Broken::Signature(..)) => {
            return Err(claimed(kind, text).as_ref().and_then(other).unwrap_or_else(|| e.into()));
        }
        Err(e) => return Err(e.into()),
    };
    match other(&statement) {
        Some(untrue) => Err(untrue),
        None if statement.stand().format != FORMAT => {
            Err(Untrue::Format(kind.word(), statement.stand().format))
        }
        None => Ok(statement),
    }
}

/// A head as it is written in statements, and as `--expect` takes it.
pub fn head_text(head: Head) -> String {
    format!("{}:{}", head.seq, head.hash)
}
