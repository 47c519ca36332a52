//! Where the command line meets the volume: the requests it makes and what it gets back.
//! Invariant: nothing here prints or exits; every error comes back as a [`Failure`] with its exit code.

use super::exit::{ExitCode, Failure};
use super::options::{At, Protection};
use crate::fuse::mount::MountSettings;
use crate::log::CommitInfo;
use crate::ops::control::Control;
use crate::ops::status::{Status, StoreStatus};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

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
}

/// An open volume, not mounted yet.
pub trait Served {
    /// The volume's name.
    fn name(&self) -> String;
    /// What status and shutdown are asked of. It keeps working until [`Served::close`].
    fn control(&self) -> Arc<dyn Control>;
    /// Answers the kernel on `fuse_fd` until the volume is unmounted; calls `ready` once the kernel has greeted.
    fn serve(
        &mut self,
        fuse_fd: OwnedFd,
        settings: &MountSettings,
        ready: Box<dyn FnOnce() + Send>,
    ) -> Result<(), Failure>;
    /// Closes the volume after [`Served::serve`] has returned; says how things stand for good.
    fn close(self: Box<Self>) -> Result<Status, Failure>;
}

/// Opens a volume: finds the newest (or the asked) commit, recovers what is only on this host.
pub fn open(request: OpenRequest) -> Result<Box<dyn Served>, Failure> {
    stub::open(request)
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
    stub::init(request)
}

/// At most `limit` commits of the volume, the newest first.
pub fn versions(request: &StoreRequest, limit: usize) -> Result<Vec<CommitInfo>, Failure> {
    let _ = (request, limit);
    Err(Failure::new(ExitCode::Failed, "not built yet"))
}

/// What the store says about its volume.
pub fn store_status(request: &StoreRequest) -> Result<StoreStatus, Failure> {
    let _ = request;
    Err(Failure::new(ExitCode::Failed, "not built yet"))
}

/// Stands in for the volume until it is wired: an empty directory in a `file://` store.
mod stub {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::UNIX_EPOCH;

    pub fn init(request: InitRequest) -> Result<InitReport, Failure> {
        let io = |e: std::io::Error| Failure::from_error(ExitCode::Store, request.store_url.clone(), &e);
        let dir = dir(&request.store_url)?;
        let file = dir.join("volume.json");
        if file.exists() {
            let text = format!("{} holds a volume already", request.store_url);
            return Err(Failure::new(ExitCode::Refused, text).hint("choose another store or prefix"));
        }
        std::fs::create_dir_all(&dir).map_err(io)?;
        std::fs::create_dir_all(&request.keys).map_err(io)?;
        std::fs::write(file, &request.name).map_err(io)?;
        let keys = ["writer.key", "reader.key", "auditor.key"].map(|n| request.keys.join(n));
        for key in &keys {
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(key).map_err(io)?;
        }
        Ok(InitReport {
            name: request.name,
            volume_id: "00".repeat(16),
            store: request.store_url,
            keys: keys.into(),
        })
    }

    fn dir(url: &str) -> Result<PathBuf, Failure> {
        let path = url.strip_prefix("file://").map(PathBuf::from);
        path.ok_or_else(|| Failure::new(ExitCode::Store, format!("store {url}: only file:// so far")))
    }

    pub fn open(request: OpenRequest) -> Result<Box<dyn Served>, Failure> {
        let file = dir(&request.store_url)?.join("volume.json");
        let name = std::fs::read_to_string(&file)
            .map_err(|e| Failure::from_error(ExitCode::Store, format!("store {}", request.store_url), &e))?;
        std::fs::metadata(&request.key).map_err(|e| {
            Failure::from_error(ExitCode::Refused, format!("key file {}", request.key.display()), &e)
        })?;
        Ok(Box::new(Stub { name, request }))
    }

    struct Stub {
        name: String,
        request: OpenRequest,
    }

    fn status(name: &str, request: &OpenRequest) -> Status {
        Status {
            volume: name.into(),
            role: if request.read_only { "reader" } else { "writer" }.into(),
            protection: request.protection.name().into(),
            store: request.store_url.clone(),
            in_sync: true,
            ..Status::default()
        }
    }

    struct Fixed(Status);
    impl Control for Fixed {
        fn status(&self) -> Status {
            self.0.clone()
        }
        fn sync(&self, _: Duration, _: &mut dyn FnMut(&Status)) -> Result<Status, String> {
            Ok(self.0.clone())
        }
        fn shutdown(&self, _: Duration) -> Result<Status, String> {
            Ok(self.0.clone())
        }
    }

    struct Empty;
    impl fuser::Filesystem for Empty {
        fn getattr(
            &self,
            _: &fuser::Request,
            ino: fuser::INodeNo,
            _: Option<fuser::FileHandle>,
            reply: fuser::ReplyAttr,
        ) {
            let attr = fuser::FileAttr {
                ino,
                size: 0,
                blocks: 0,
                atime: UNIX_EPOCH,
                mtime: UNIX_EPOCH,
                ctime: UNIX_EPOCH,
                crtime: UNIX_EPOCH,
                kind: fuser::FileType::Directory,
                perm: 0o755,
                nlink: 2,
                uid: 0,
                gid: 0,
                rdev: 0,
                blksize: 4096,
                flags: 0,
            };
            reply.attr(&Duration::from_secs(1), &attr);
        }
    }

    impl Served for Stub {
        fn name(&self) -> String {
            self.name.clone()
        }
        fn control(&self) -> Arc<dyn Control> {
            Arc::new(Fixed(status(&self.name, &self.request)))
        }
        fn serve(
            &mut self,
            fd: OwnedFd,
            _: &MountSettings,
            ready: Box<dyn FnOnce() + Send>,
        ) -> Result<(), Failure> {
            let fail = |e: std::io::Error| Failure::from_error(ExitCode::Failed, "serving the kernel", &e);
            let session =
                fuser::Session::from_fd(Empty, fd, fuser::SessionACL::All, fuser::Config::default());
            let session = session.map_err(fail)?;
            ready();
            session.run().map_err(fail)
        }
        fn close(self: Box<Self>) -> Result<Status, Failure> {
            Ok(status(&self.name, &self.request))
        }
    }
}
