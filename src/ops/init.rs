//! Making a volume, and reading its superblock back.
//! Invariant: no volume exists without its key files (they are durable before `volume.json` is put), none is made
//! over another or in a store that would overwrite, and an `init` that failed for certain leaves no key file behind.

use crate::clock::Env;
use crate::crypto::keyfile::{KeyFile, KeyFileError, KeySet, check_name, sync_dir};
use crate::crypto::slots::{Argon2Params, SlotError, wrap_passphrase};
use crate::log::volume::{self, Parameters, Superblock, UnverifiedSuperblock};
use crate::store::{Store, StoreError};
use crate::types::{VolumeId, hex};
use bytes::Bytes;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Name of the writer's key file in the directory of key files.
pub const WRITER_KEY: &str = "writer.key";
/// Name of the readers' key file.
pub const READER_KEY: &str = "reader.key";
/// Name of the auditors' key file.
pub const AUDITOR_KEY: &str = "auditor.key";
/// Name of the steward's key file.
pub const STEWARD_KEY: &str = "steward.key";

/// What to make. Holds the passphrase, and therefore does not print itself.
pub struct InitParams {
    /// Name of the volume, for people.
    pub name: String,
    /// With it, `volume.json` gets a passphrase slot: whoever has a copy of it can try passphrases.
    pub passphrase: Option<Zeroizing<Vec<u8>>>,
    /// Cost of one guess at the passphrase.
    pub argon: Argon2Params,
    /// Sizes that hold for the whole volume.
    pub parameters: Parameters,
    /// Where the key files go; created if it is missing.
    pub keys_dir: PathBuf,
}

/// What was made.
#[derive(Debug)]
pub struct InitReport {
    /// Identity of the new volume.
    pub volume: VolumeId,
    /// The superblock as it is in the store.
    pub superblock: Superblock,
    /// The bytes of `volume.json`.
    pub volume_json: Bytes,
    /// The key files: writer, reader, auditor, steward.
    pub key_files: Vec<PathBuf>,
    /// What the operator should know although all went well.
    pub warnings: Vec<String>,
}

/// Why no volume was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The store holds a volume, or what is left of one.
    #[error("{store} already holds {object}: a volume is never made over another; choose another prefix")]
    VolumeExists {
        /// The store.
        store: String,
        /// What was found.
        object: String,
    },
    /// The store does not keep the contract that the whole system stands on.
    #[error("{store} cannot hold a volume: {detail}")]
    StoreUnfit {
        /// The store.
        store: String,
        /// What it did.
        detail: String,
    },
    /// The store failed before anything was made.
    #[error("no volume was made: {0}")]
    Store(#[source] StoreError),
    /// The store did not say whether it took `volume.json`. The key files are kept, for they may be the only ones.
    #[error(
        "{store} did not say whether it took volume.json ({source}). The key files are kept in {keys_dir}. When the \
         store answers again, see whether it holds volume.json: if it does, and these key files open it, the volume is \
         made; if it does not, delete these key files and run init again"
    )]
    Unknown {
        /// The store.
        store: String,
        /// Where the key files are.
        keys_dir: PathBuf,
        /// What the store said.
        #[source]
        source: StoreError,
    },
    /// The key files could not be written; no volume was made.
    #[error("no volume was made: {0}")]
    KeyFile(#[from] KeyFileError),
    /// The parameters cannot be met; no volume was made.
    #[error("no volume was made: {0}")]
    Refused(String),
}

/// Makes a volume: looks whether the place is free and the store fit, writes the key files, puts `volume.json`.
///
/// Blocks its thread while Argon2id runs and files are synced; it is meant for a command that does nothing else.
pub async fn init(store: &dyn Store, env: &Env, params: InitParams) -> Result<InitReport, InitError> {
    check_name(&params.name).map_err(InitError::Refused)?;
    params.parameters.check().map_err(InitError::Refused)?;
    let key_dir = KeyDir::check(&params.keys_dir)?;
    refuse_if_taken(store).await?;
    let mut warnings = probe(store, env).await?;

    let keys = KeySet::generate(env, &params.name);
    let superblock = superblock(env, &keys, &params).map_err(|e| InitError::Refused(e.to_string()))?;
    let volume_json = encode(&keys, &superblock).map_err(|e| InitError::Refused(e.to_string()))?;
    if params.passphrase.is_some() {
        warnings.push(
            "volume.json has a passphrase slot: whoever can read the store can try passphrases on a machine of his \
             own, and who finds it reads everything; it must be long and random"
                .into(),
        );
    }

    let written = key_dir.write(&keys)?;
    match put_volume_json(store, &volume_json).await {
        Put::Ours => {}
        Put::Failed(error) => {
            written.remove();
            return Err(error);
        }
        Put::Unknown(source) => {
            let (store, keys_dir) = (store.describe(), params.keys_dir);
            return Err(InitError::Unknown { store, keys_dir, source });
        }
    }
    Ok(InitReport { volume: superblock.volume, superblock, volume_json, key_files: written.files, warnings })
}

/// Reads `volume.json` and authenticates it with `key`; also its bytes, for the pinned copy at home.
pub async fn load_superblock(store: &dyn Store, key: &KeyFile) -> crate::log::Result<(Superblock, Bytes)> {
    use crate::log::Error;
    let (bytes, size) = match store.get_suffix(volume::NAME, volume::LEN_MAX).await {
        Ok(found) => found,
        Err(StoreError::NotFound { .. }) => return Err(without_superblock(store).await?),
        Err(e) => return Err(e.into()),
    };
    if size != bytes.len() as u64 {
        return Err(Error::corrupt(volume::NAME, "is too large for a superblock"));
    }
    let superblock = UnverifiedSuperblock::parse(&bytes)?.verify(key)?;
    Ok((superblock, bytes))
}

/// What a store without volume.json is: a wrong address, unless something of a volume is there.
async fn without_superblock(store: &dyn Store) -> crate::log::Result<crate::log::Error> {
    use crate::log::Error;
    for prefix in ["log/", "checkpoint/"] {
        if let Some(object) = store.list(prefix, None, 1).await?.first() {
            let detail = format!(
                "is missing, though {} is there: the store has lost it. Every state directory with which the volume was \
                 mounted holds a copy; put that back",
                object.name
            );
            return Ok(Error::corrupt(volume::NAME, detail));
        }
    }
    Ok(Error::NoVolume { store: store.describe() })
}

fn superblock(env: &Env, keys: &KeySet, params: &InitParams) -> Result<Superblock, SlotError> {
    let writer = &keys.writer;
    let mut slots = Vec::new();
    if let (Some(passphrase), Some(key)) = (&params.passphrase, &writer.volume_key) {
        slots.push(wrap_passphrase(env, &writer.volume, writer.key_id, key, passphrase, params.argon)?);
    }
    Ok(Superblock {
        volume: writer.volume,
        name: writer.name.clone(),
        key_id: writer.key_id,
        writer_public: writer.writer_public,
        steward_public: writer.steward_public,
        slots,
        created: env.clock.now(),
        parameters: params.parameters,
    })
}

fn encode(keys: &KeySet, superblock: &Superblock) -> crate::log::Result<Bytes> {
    use crate::log::Error;
    let refused = |e: KeyFileError| Error::Refused(e.to_string());
    let key = keys.writer.volume_key().map_err(refused)?;
    let bytes = superblock.encode(key, keys.writer.signing_key().map_err(refused)?)?;
    for role in [&keys.writer, &keys.reader, &keys.auditor] {
        UnverifiedSuperblock::parse(&bytes)?.verify(role)?;
    }
    Ok(bytes.into())
}

async fn refuse_if_taken(store: &dyn Store) -> Result<(), InitError> {
    let taken = |object: &str| InitError::VolumeExists { store: store.describe(), object: object.to_owned() };
    match store.get_suffix(volume::NAME, 1).await {
        Ok(_) => return Err(taken(volume::NAME)),
        Err(StoreError::NotFound { .. }) => {}
        Err(e) => return Err(InitError::Store(e)),
    }
    for prefix in ["log/", "checkpoint/"] {
        let found = store.list(prefix, None, 1).await.map_err(InitError::Store)?;
        if let Some(object) = found.first() {
            return Err(taken(&object.name));
        }
    }
    Ok(())
}

/// Sees for itself that the store does not overwrite and gives back what it was given; returns warnings.
async fn probe(store: &dyn Store, env: &Env) -> Result<Vec<String>, InitError> {
    let name = format!("probe/{}", hex(&env.random_bytes::<8>()));
    let first = Bytes::from(env.random_bytes::<32>().to_vec());
    let second = Bytes::from(env.random_bytes::<32>().to_vec());
    store.put_new(&name, first.clone()).await.map_err(InitError::Store)?;
    let verdict = probe_again(store, &name, &first, second).await;
    // Whatever came out, the scratch object goes, if this identity may delete at all.
    let deleted = store.delete(&name).await;
    verdict?;
    Ok(deleted
        .err()
        .map(|e| format!("the scratch object {name} is left in the store and does no harm ({e})"))
        .into_iter()
        .collect())
}

async fn probe_again(store: &dyn Store, name: &str, first: &Bytes, second: Bytes) -> Result<(), InitError> {
    let unfit = |detail: &str| InitError::StoreUnfit { store: store.describe(), detail: detail.to_owned() };
    let overwrites = "it overwrote an object that was to be created only if absent, so two writers could destroy \
                      each other's data; use a store with conditional writes (If-None-Match), or switch them on; where there are \
                      none, put_if_absent=emulated says that you know what is weaker then (operations.md)";
    match store.put_new(name, second).await {
        Ok(()) => return Err(unfit(overwrites)),
        Err(StoreError::AlreadyExists { .. }) => {}
        Err(e) => return Err(InitError::Store(e)),
    }
    match store.get_suffix(name, 64).await {
        Ok((back, _)) if back == first => Ok(()),
        Ok(_) => Err(unfit("it gives back other bytes than it was given first")),
        Err(StoreError::NotFound { .. }) => {
            Err(unfit("an object it had taken is not there when it is read at once"))
        }
        Err(e) => Err(InitError::Store(e)),
    }
}

enum Put {
    Ours,
    Failed(InitError),
    Unknown(StoreError),
}

async fn put_volume_json(store: &dyn Store, bytes: &Bytes) -> Put {
    let answer = match store.put_new(volume::NAME, bytes.clone()).await {
        Ok(()) => return Put::Ours,
        // A refusal for good: it is not there.
        Err(e @ (StoreError::Denied { .. } | StoreError::NotFound { .. })) => {
            return Put::Failed(InitError::Store(e));
        }
        Err(e) => e,
    };
    // "Exists already" may be the second answer to our own request; so may silence.
    match (store.get_suffix(volume::NAME, volume::LEN_MAX).await, answer) {
        (Ok((back, _)), _) if back == bytes => Put::Ours,
        (Ok(_), _) => {
            Put::Failed(InitError::VolumeExists { store: store.describe(), object: volume::NAME.into() })
        }
        (Err(_), answer) => Put::Unknown(answer),
    }
}

/// The directory of key files, found free of them.
struct KeyDir {
    dir: PathBuf,
}

/// Key files that this `init` wrote.
struct Written {
    dir: PathBuf,
    made_dir: bool,
    files: Vec<PathBuf>,
}

impl KeyDir {
    /// Refuses early, before the store is touched.
    fn check(dir: &Path) -> Result<KeyDir, InitError> {
        for name in [WRITER_KEY, READER_KEY, AUDITOR_KEY, STEWARD_KEY] {
            let path = dir.join(name);
            match path.symlink_metadata() {
                Ok(_) => return Err(KeyFileError::Exists { path }.into()),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(KeyFileError::Io { path, source }.into()),
            }
        }
        Ok(KeyDir { dir: dir.to_owned() })
    }

    /// Writes all four, or none.
    fn write(self, keys: &KeySet) -> Result<Written, InitError> {
        let made_dir =
            self.make_dir().map_err(|source| KeyFileError::Io { path: self.dir.clone(), source })?;
        let mut written = Written { dir: self.dir, made_dir, files: Vec::new() };
        let path = |name: &str| written.dir.join(name);
        let files = [path(WRITER_KEY), path(READER_KEY), path(AUDITOR_KEY), path(STEWARD_KEY)];
        let [writer, reader, auditor, steward] = &files;
        let mut save = |path: &PathBuf, outcome: Result<(), KeyFileError>| {
            outcome.map(|()| written.files.push(path.clone()))
        };
        let outcome = save(writer, keys.writer.save(writer))
            .and_then(|()| save(reader, keys.reader.save(reader)))
            .and_then(|()| save(auditor, keys.auditor.save(auditor)))
            .and_then(|()| save(steward, keys.steward.save(steward)));
        match outcome {
            Ok(()) => Ok(written),
            Err(e) => {
                written.remove();
                Err(e.into())
            }
        }
    }

    /// True when the directory was not there before.
    fn make_dir(&self) -> io::Result<bool> {
        if self.dir.is_dir() {
            return Ok(false);
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        sync_dir(self.dir.parent().unwrap_or(Path::new(".")))?;
        Ok(true)
    }
}

impl Written {
    /// Takes back what was written: keys of a volume that does not exist only mislead. Best effort, for the error
    /// that led here is the one to report.
    fn remove(&self) {
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
        if self.made_dir {
            let _ = std::fs::remove_dir(&self.dir);
        }
        let _ = sync_dir(if self.made_dir { self.dir.parent().unwrap_or(Path::new(".")) } else { &self.dir });
    }
}

#[cfg(test)]
mod tests;
