//! Key files: who may do what with a volume. The writer reads and signs, the reader reads, the auditor checks
//! signatures; the steward's file holds the collector's own signing key and nothing that opens a frame.
//! Invariant: a key file is whole or not there, readable by its owner only, never overwritten, and never loaded
//! when its check value does not fit; no secret is printed, and none stays in memory after it is dropped.
//! Bytes: `docs/format.md`, "Key files".

mod drill;
mod text;

pub use drill::DrillKeyFile;

use super::keys::VolumeKey;
use super::sign::{PublicKey, SecretKey};
use crate::clock::Env;
use crate::types::VolumeId;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use text::Contents;
use zeroize::Zeroizing;

/// Longest name of a volume, in bytes.
pub const NAME_LEN_MAX: usize = 128;

/// Larger files are no key files; the bound keeps a mistaken path from filling memory.
const FILE_LEN_MAX: u64 = 64 * 1024;

/// What the holder of a key file may do. Ordered: each role may do all that the ones before it may.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Verifies signatures, presence and freshness; reads nothing.
    Auditor,
    /// Reads; cannot forge a commit.
    Reader,
    /// Reads and signs.
    Writer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Auditor => "auditor",
            Role::Reader => "reader",
            Role::Writer => "writer",
        })
    }
}

/// What is wrong with a key file.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A file is there already; a key file is never overwritten.
    #[error(
        "{path}: exists already, and a key file is never overwritten: move it away or choose another place"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others than the owner can get at the file.
    #[error(
        "{path}: is open to others than its owner (mode {mode:03o}): run `chmod 600 {path}`, and if others could \
         read it, consider the key known"
    )]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file was made by a version of the program that this one does not know.
    #[error(
        "{origin}: key file version {found}, and this program knows only version {known}: use a newer embassyfs",
        known = text::VERSION
    )]
    Version {
        /// File name.
        origin: String,
        /// Version in the file.
        found: u32,
    },
    /// The file is truncated, mistyped, or no key file.
    #[error("{origin}: {detail}")]
    Damaged {
        /// File name.
        origin: String,
        /// What is wrong.
        detail: String,
    },
    /// The key file is good, but its holder may not do this.
    #[error("this is the {found} key file of volume \"{name}\"; this needs the {needed} key file")]
    WrongRole {
        /// Volume name.
        name: String,
        /// Role of the file.
        found: String,
        /// Role that is needed.
        needed: String,
    },
}

type Result<T> = std::result::Result<T, KeyFileError>;

/// A key file of the writer, a reader or an auditor.
#[derive(Clone)]
pub struct KeyFile {
    /// What its holder may do.
    pub role: Role,
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// The volume's name, for people.
    pub name: String,
    /// Number of the volume key.
    pub key_id: u32,
    /// The volume key; the writer and readers have it.
    pub volume_key: Option<VolumeKey>,
    /// The signing key; only the writer has it, and its public half is `writer_public`.
    pub signing: Option<SecretKey>,
    /// Checks what the writer signs. Pinned: the store cannot put another in its place.
    pub writer_public: PublicKey,
    /// Checks what the steward signs.
    pub steward_public: PublicKey,
}

/// The key file of the steward (the garbage collector): signs packs, opens nothing.
#[derive(Clone)]
pub struct StewardKeyFile {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// The volume's name, for people.
    pub name: String,
    /// Number of the volume key at the time the file was made.
    pub key_id: u32,
    /// The steward's signing key; its public half is `steward_public` in the other files.
    pub signing: SecretKey,
    /// Checks what the writer signs.
    pub writer_public: PublicKey,
}

/// The four key files of a new volume.
pub struct KeySet {
    /// For the host at home.
    pub writer: KeyFile,
    /// For the embassy and the standby.
    pub reader: KeyFile,
    /// For who checks the archive without reading it.
    pub auditor: KeyFile,
    /// For the garbage collector.
    pub steward: StewardKeyFile,
}

impl KeyFile {
    /// Writes a new file that only its owner may read, durable when this returns. Leaves nothing behind when it
    /// fails.
    pub fn save(&self, path: &Path) -> Result<()> {
        create(path, &Contents::of_key(self, &path.display().to_string())?)
    }

    /// Reads a key file; refuses one that others than its owner can get at.
    pub fn load(path: &Path) -> Result<KeyFile> {
        KeyFile::parse(&read(path)?, &path.display().to_string())
    }

    /// Reads the text of a key file; `origin` names it in errors. Prefer [`KeyFile::load`], which looks after the
    /// file's permissions.
    pub fn parse(text: &[u8], origin: &str) -> Result<KeyFile> {
        Contents::parse(text, origin)?.into_key()
    }

    /// Fails unless the holder may do what `role` may: a writer may also do what a reader may.
    pub fn require(&self, role: Role) -> Result<()> {
        if self.role >= role { Ok(()) } else { Err(self.wrong_role(role)) }
    }

    /// The volume key, for a role that has it.
    pub fn volume_key(&self) -> Result<&VolumeKey> {
        self.volume_key.as_ref().ok_or_else(|| self.wrong_role(Role::Reader))
    }

    /// The signing key, for the role that has it.
    pub fn signing_key(&self) -> Result<&SecretKey> {
        self.signing.as_ref().ok_or_else(|| self.wrong_role(Role::Writer))
    }

    fn wrong_role(&self, needed: Role) -> KeyFileError {
        KeyFileError::WrongRole {
            name: self.name.clone(),
            found: self.role.to_string(),
            needed: needed.to_string(),
        }
    }
}

impl StewardKeyFile {
    /// Writes a new file; see [`KeyFile::save`].
    pub fn save(&self, path: &Path) -> Result<()> {
        create(path, &Contents::of_steward(self, &path.display().to_string())?)
    }

    /// Reads the steward's key file; see [`KeyFile::load`].
    pub fn load(path: &Path) -> Result<StewardKeyFile> {
        StewardKeyFile::parse(&read(path)?, &path.display().to_string())
    }

    /// Reads the text of the steward's key file; see [`KeyFile::parse`].
    pub fn parse(text: &[u8], origin: &str) -> Result<StewardKeyFile> {
        Contents::parse(text, origin)?.into_steward()
    }
}

impl KeySet {
    /// The key files of a new volume, with keys and an identity drawn for it; the key id is 1.
    pub fn generate(env: &Env, name: &str) -> KeySet {
        let volume = VolumeId(env.random_bytes());
        let key = VolumeKey::generate(env);
        KeySet::assemble(volume, name, key, SecretKey::generate(env), SecretKey::generate(env))
    }

    /// The key files that hold these keys.
    pub fn assemble(
        volume: VolumeId,
        name: &str,
        key: VolumeKey,
        writer: SecretKey,
        steward: SecretKey,
    ) -> KeySet {
        let file = |role: Role| KeyFile {
            role,
            volume,
            name: name.to_owned(),
            key_id: 1,
            volume_key: (role >= Role::Reader).then(|| key.clone()),
            signing: (role >= Role::Writer).then(|| writer.clone()),
            writer_public: writer.public(),
            steward_public: steward.public(),
        };
        let (writer_public, name) = (writer.public(), name.to_owned());
        KeySet {
            writer: file(Role::Writer),
            reader: file(Role::Reader),
            auditor: file(Role::Auditor),
            steward: StewardKeyFile { volume, name, key_id: 1, signing: steward, writer_public },
        }
    }
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyFile")
            .field("role", &self.role)
            .field("volume", &self.volume)
            .field("name", &self.name)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for StewardKeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StewardKeyFile")
            .field("volume", &self.volume)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What is wrong with `name` as the name of a volume, if anything.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() || name.len() > NAME_LEN_MAX {
        Err(format!("a volume's name has 1 to {NAME_LEN_MAX} bytes, this one has {}", name.len()))
    } else if name.chars().any(char::is_control) {
        Err("a volume's name has no control characters".into())
    } else {
        Ok(())
    }
}

/// Makes the names in directory `dir` durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

fn create(path: &Path, contents: &Contents) -> Result<()> {
    create_text(path, &contents.to_text())
}

fn create_text(path: &Path, text: &str) -> Result<()> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(KeyFileError::Exists { path: path.to_owned() });
        }
        Err(e) => return Err(failed(e)),
    };
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_dir(path.parent().unwrap_or(Path::new("."))));
    written.map_err(|e| {
        // The file is ours and half-written: the error that stopped us is the one to report.
        let _ = std::fs::remove_file(path);
        failed(e)
    })
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    // The file is looked at through the handle it is read from, so that it cannot be exchanged in between; without
    // O_NONBLOCK a path that names a pipe would wait for ever.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let damaged = |detail: &str| KeyFileError::Damaged {
        origin: path.display().to_string(),
        detail: detail.to_owned(),
    };
    if !meta.is_file() {
        return Err(damaged("is no regular file"));
    }
    if meta.len() > FILE_LEN_MAX {
        return Err(damaged("is too large for a key file"));
    }
    // Room for all of it and one byte more from the start: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; meta.len() as usize + 1]);
    let mut len = 0;
    while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    if len as u64 != meta.len() {
        return Err(damaged("changed while it was read"));
    }
    bytes.truncate(len);
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(bytes);
    }
    // The advice to close it is for key files only: the path may be a mistake, and name what all must be able to read.
    match is_key_file(&bytes) {
        true => Err(KeyFileError::TooOpen { path: path.to_owned(), mode }),
        false => Err(damaged("this is no key file")),
    }
}

/// Whether this was made as a key file; a damaged one is one too, and one that this program is too old for.
fn is_key_file(bytes: &[u8]) -> bool {
    ["\"embassyfs_key\"", "\"embassyfs_drill_key\""]
        .iter()
        .any(|mark| bytes.windows(mark.len()).any(|at| at == mark.as_bytes()))
}

#[cfg(test)]
mod tests;
