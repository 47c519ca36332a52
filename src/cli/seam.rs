//! Where the command line meets the volume: the requests it makes and what it gets back.
//! Invariant: nothing here prints or exits; every error comes back as a [`Failure`] with its exit code.

use super::exit::{ExitCode, Failure};
use super::options::At;
use super::session::{MountControl, Session};
use crate::clock::Env;
use crate::crypto::keyfile::{KeyFile, KeyFileError, Role};
use crate::crypto::slots::Argon2Params;
use crate::fs::{Caller, Settings};
use crate::fuse::adapter::{Ended, Ready};
use crate::fuse::connection::{Connection, Switch};
use crate::fuse::mount::own_ids;
use crate::log::volume::{self, Parameters};
use crate::log::{CommitInfo, Error};
use crate::ops::control::Control;
use crate::ops::status::{CommitPoint, Status, StoreStatus};
use crate::ops::{self, init::InitError};
use crate::replica::durable::Protection;
use crate::replica::volume::{OpenOptions, Volume};
use crate::replica::{Io, Predecessor, Trust, Version, listing, promote};
use crate::store::{self, Store, StoreError};
use crate::types::{CommitNo, Timestamp};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use zeroize::Zeroizing;

const NO_VOLUME: &str = "check the URL, or make a volume with 'embassyfs init'";

/// Threads for the store's traffic and for requests that had to wait.
const WORKERS: usize = 2;

/// What opening a volume needs.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// URL of the store.
    pub store_url: String,
    /// Its options, which may hold credentials.
    pub store_options: BTreeMap<String, String>,
    /// Key file.
    pub key: PathBuf,
    /// State directory; it exists.
    pub state: PathBuf,
    /// Open as a reader.
    pub read_only: bool,
    /// The commit to show (readers only); the newest without it.
    pub at: Option<At>,
    /// What fsync waits for.
    pub protection: Protection,
    /// How long fsync waits for the store.
    pub sync_timeout: Duration,
    /// Bound on the local disk cache, in bytes.
    pub cache_size: u64,
    /// Bound on opened frames in memory, in bytes.
    pub memory_size: u64,
    /// Bound on written, not yet committed data in memory, in bytes.
    pub dirty_size: u64,
    /// Segments uploaded at once.
    pub uploads: u32,
    /// Bound on what the volume may hold, in bytes.
    pub size_limit: Option<u64>,
    /// Reading changes access times.
    pub relatime: bool,
    /// An idle writer gives a sign of life this often.
    pub heartbeat: Option<Duration>,
    /// What a reader demands of the store.
    pub trust: Trust,
    /// A reader moves on with home, and asks the store this often.
    pub follow: Option<Duration>,
}

/// An open volume, not mounted yet.
pub trait Served {
    /// The volume's name.
    fn name(&self) -> String;
    /// What status and shutdown are asked of. It keeps working until [`Served::close`].
    fn control(&self) -> Arc<dyn Control>;
    /// Answers the kernel until the volume is unmounted or `switch` is thrown; calls `ready` before the first request.
    /// `control` is what the mount's control directory shows.
    fn serve(
        &mut self,
        connection: &mut Connection,
        switch: &Switch,
        control: Arc<dyn Control>,
        ready: Ready,
    ) -> Result<Ended, Failure>;
    /// The commit shown, by a reader.
    fn shown(&self) -> Option<CommitNo>;
    /// Closes the volume for who goes on with the mount, waiting for nothing but the local disk. The state directory is
    /// free when this returns. All control of it must have been dropped before.
    fn pass_on(self: Box<Self>) -> Predecessor;
    /// Closes the volume after [`Served::serve`] has returned; says how things stand for good.
    fn close(self: Box<Self>) -> Result<Status, Failure>;
}

/// Opens a volume: finds the newest (or the asked) commit, recovers what is only on this host.
pub fn open(request: OpenRequest) -> Result<Box<dyn Served>, Failure> {
    prepare(request)?.open(None)
}

/// All that opening needs, got together without touching the state directory.
pub struct Prepared {
    request: OpenRequest,
    key: KeyFile,
    store: Arc<dyn Store>,
    runtime: Runtime,
}

/// Does what can be done before the state directory is free.
pub fn prepare(request: OpenRequest) -> Result<Prepared, Failure> {
    let key = load_key(&request.key, if request.read_only { Role::Reader } else { Role::Writer })?;
    let store = open_store(&request.store_url, &request.store_options)?;
    let runtime = runtime()?;
    Ok(Prepared { request, key, store, runtime })
}

/// Says why a reader's volume could not be opened again just now: the store does not answer, or not as it did.
pub fn check_store(request: &OpenRequest) -> Result<(), Failure> {
    let OpenRequest { store_url, store_options, key, .. } = request.clone();
    store_status(&StoreRequest { store_url, store_options, key }).map(drop)
}

impl Prepared {
    /// Opens the volume, after `before` has closed it if somebody had it open.
    pub fn open(self, before: Option<&Predecessor>) -> Result<Box<dyn Served>, Failure> {
        let Prepared { request, key, store, runtime } = self;
        // Who mounts a new volume can use it, root or not.
        let (uid, gid) = own_ids();
        let options = OpenOptions {
            store,
            key,
            state: request.state.clone(),
            env: Env::system(),
            version: request.at.map_or(Version::Newest, Version::from),
            trust: request.trust,
            protection: request.protection,
            sync_timeout: request.sync_timeout,
            disk_cache: request.cache_size,
            frame_cache: usize::try_from(request.memory_size).unwrap_or(usize::MAX),
            uploads: request.uploads as usize,
            settings: Settings {
                read_only: request.read_only,
                dirty_max: request.dirty_size,
                size_limit: request.size_limit,
                relatime: request.relatime,
                heartbeat: request.heartbeat,
                follow: request.follow,
                root_owner: Caller { uid, gid },
                ..Settings::default()
            },
        };
        let volume =
            Volume::open_after(options, before, &Io::on(runtime.handle())).map_err(|e| failure(&e))?;
        let control = Arc::new(MountControl::new(Arc::new(volume), &request));
        Ok(Box::new(Session::new(control, runtime)))
    }
}

/// A store and a key to read it with.
#[derive(Clone, Debug)]
pub struct StoreRequest {
    /// URL of the store.
    pub store_url: String,
    /// Its options.
    pub store_options: BTreeMap<String, String>,
    /// Key file.
    pub key: PathBuf,
}

/// What making a volume needs.
pub struct InitRequest {
    /// URL of the store.
    pub store_url: String,
    /// Its options.
    pub store_options: BTreeMap<String, String>,
    /// Directory for the key files.
    pub keys: PathBuf,
    /// The volume's name.
    pub name: String,
    /// For a passphrase slot.
    pub passphrase: Option<Zeroizing<String>>,
}

/// A volume that was just made.
pub struct InitReport {
    /// Its name.
    pub name: String,
    /// Its identity, hexadecimal.
    pub volume_id: String,
    /// The store, without secrets.
    pub store: String,
    /// The key files written.
    pub keys: Vec<PathBuf>,
}

/// Makes a volume.
pub fn init(request: InitRequest) -> Result<InitReport, Failure> {
    let store = open_store(&request.store_url, &request.store_options)?;
    let params = ops::init::InitParams {
        name: request.name.clone(),
        passphrase: request.passphrase.map(|text| Zeroizing::new(text.as_bytes().to_vec())),
        argon: Argon2Params::default(),
        parameters: Parameters::default(),
        keys_dir: request.keys,
    };
    let made =
        runtime()?.block_on(ops::init::init(&*store, &Env::system(), params)).map_err(|e| match &e {
            InitError::Store(_) => Failure::from_error(ExitCode::Store, request.store_url.clone(), &e),
            _ => Failure::from_error(ExitCode::Refused, format!("store {}", request.store_url), &e),
        })?;
    made.warnings.iter().for_each(|warning| super::print_error(warning));
    Ok(InitReport {
        name: request.name,
        volume_id: made.volume.to_string(),
        store: store.describe(),
        keys: made.key_files,
    })
}

/// At most `limit` commits of the volume from `since` on, the newest first, and which of them have a checkpoint. Refused
/// if the newest of all is older than `max_age`.
pub fn versions(
    request: &StoreRequest,
    since: Option<Timestamp>,
    limit: usize,
    max_age: Option<Duration>,
) -> Result<Vec<(CommitInfo, bool)>, Failure> {
    let asked = Asked::new(request)?;
    let listing = listing::versions(&*asked.store, &asked.key, since, limit);
    let commits = asked.runtime.block_on(listing).map_err(|e| failure(&e))?;
    if max_age.is_some() {
        let newest = match commits.first() {
            Some((newest, _)) => Some(newest.time),
            None => store_status(request)?.last_commit.map(|point| point.time),
        };
        let trust = Trust { max_age, ..Trust::default() };
        trust.check_age(newest, Env::system().clock.now()).map_err(|e| failure(&e))?;
    }
    Ok(commits)
}

/// What the store says about its volume.
pub fn store_status(request: &StoreRequest) -> Result<StoreStatus, Failure> {
    let asked = Asked::new(request)?;
    let found =
        asked.runtime.block_on(listing::summary(&*asked.store, &asked.key)).map_err(|e| failure(&e))?;
    let point = |p: Option<(crate::types::CommitNo, crate::types::Timestamp)>| {
        p.map(|(no, time)| CommitPoint { no: no.0, time })
    };
    Ok(StoreStatus {
        store: asked.store.describe(),
        volume: found.name,
        volume_id: found.id.to_string(),
        newest_segment: found.newest_segment.map(|head| head.seq.0),
        head: found.newest_segment.map(|head| format!("{}:{}", head.seq, head.hash)),
        last_commit: point(found.last_commit),
        newest_checkpoint: point(found.newest_checkpoint),
    })
}

/// What this host calls itself.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".into() } else { name.trim().to_owned() }
}

/// Makes this host the volume's writer; with `accept` only if the volume was handed over to that name.
pub fn promote(
    request: &StoreRequest,
    state: PathBuf,
    host: String,
    reason: String,
    accept: Option<String>,
    trust: Trust,
) -> Result<promote::Report, Failure> {
    let key = load_key(&request.key, Role::Writer)?;
    let store = open_store(&request.store_url, &request.store_options)?;
    let options = promote::Promotion { store, key, state, env: Env::system(), host, reason, accept, trust };
    runtime()?.block_on(promote::promote(&options)).map_err(|e| failure(&e))
}

/// Writes to `out` the reader's key file that `passphrase` opens in the store; the file must not exist.
pub fn recover_key(
    store_url: &str,
    store_options: &BTreeMap<String, String>,
    passphrase: &[u8],
    out: &Path,
) -> Result<KeyFile, Failure> {
    let store = open_store(store_url, store_options)?;
    let found = runtime()?.block_on(store.get_suffix(volume::NAME, volume::LEN_MAX));
    let (bytes, size) = found.map_err(|e| failure(&e.into()))?;
    if size != bytes.len() as u64 {
        return Err(failure(&Error::corrupt(volume::NAME, "is too large for a superblock")));
    }
    let (_, key) = volume::open_with_passphrase(&bytes, passphrase).map_err(|e| failure(&e))?;
    key.save(out).map_err(|e| {
        let code = match e {
            KeyFileError::Exists { .. } => ExitCode::Refused,
            _ => ExitCode::Failed,
        };
        Failure::from_error(code, "cannot write the key file", &e)
    })?;
    Ok(key)
}

/// A store that is asked without a mount.
struct Asked {
    runtime: Runtime,
    store: Arc<dyn Store>,
    key: KeyFile,
}

impl Asked {
    fn new(request: &StoreRequest) -> Result<Asked, Failure> {
        let key = load_key(&request.key, Role::Reader)?;
        let store = open_store(&request.store_url, &request.store_options)?;
        Ok(Asked { runtime: runtime()?, store, key })
    }
}

pub(super) fn load_key(path: &std::path::Path, role: Role) -> Result<KeyFile, Failure> {
    let key = KeyFile::load(path).map_err(|e| Failure::from_error(ExitCode::Refused, "key file", &e))?;
    key.require(role).map_err(|e| {
        let failure = Failure::from_error(ExitCode::Refused, format!("key file {}", path.display()), &e);
        match (key.role, role) {
            (Role::Auditor, _) => failure.hint(
                "it opens nothing that the volume holds, and is for 'verify' and 'receipt check'; every command that \
                 reads takes reader.key or writer.key",
            ),
            (_, Role::Writer) => failure.hint("with reader.key a volume is mounted --read-only"),
            _ => failure,
        }
    })?;
    Ok(key)
}

pub(super) fn open_store(url: &str, options: &BTreeMap<String, String>) -> Result<Arc<dyn Store>, Failure> {
    store::open::open(url, options)
        .map_err(|e| Failure::from_error(ExitCode::Store, format!("store {url}"), &e))
}

pub(super) fn runtime() -> Result<Runtime, Failure> {
    Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("io")
        .enable_all()
        .build()
        .map_err(|e| Failure::from_error(ExitCode::Failed, "cannot start the runtime", &e))
}

/// The exit code that fits an error of the layers below.
pub(super) fn failure(e: &Error) -> Failure {
    match e {
        Error::Store(StoreError::NotFound { name }) if name == volume::NAME => {
            Failure::from_error(ExitCode::Store, "no volume in the store", e).hint(NO_VOLUME)
        }
        Error::NoVolume { .. } => {
            Failure::from_error(ExitCode::Store, "no volume in the store", e).hint(NO_VOLUME)
        }
        // The volume is there, and not all of it.
        Error::Store(StoreError::NotFound { .. } | StoreError::OutOfRange { .. }) => {
            Failure::from_error(ExitCode::Refused, "the store has lost a part of the volume", e)
                .hint("'embassyfs verify' tells all that is missing")
        }
        Error::Store(_) => Failure::from_error(ExitCode::Store, "the store failed", e),
        Error::Io { .. } | Error::Missing(_) | Error::Latched(_) => {
            Failure::from_error(ExitCode::Failed, "cannot open the volume", e)
        }
        Error::Corrupt { .. } | Error::Fenced { .. } | Error::Refused(_) => {
            Failure::from_error(ExitCode::Refused, "the volume is refused", e)
        }
    }
}
