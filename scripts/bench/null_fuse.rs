//! A FUSE file system that keeps everything in memory and nothing beyond: the ceiling that FUSE sets to any other;
//! `scripts/bench.sh` mounts it.
//! Invariant: how long the kernel may keep what it is told and how the dispatch thread waits is as in `src/fuse`; an
//! answer costs a lookup or a copy in memory, and nothing is asked that need not be (there are no extended attributes).

use embassyfs::clock::Env;
use fuser::{
    Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use null_memory::{Body, DOTS, New, Node, Result, State, blank, new_directory, set_size};
use parking_lot::{Mutex, MutexGuard};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

mod null_memory;

/// What the file below takes from the crate that it belongs to.
mod clock {
    pub use embassyfs::clock::Clock;
}

// The same waiting, not a likeness of it: without it a file system that does more in each request could look faster.
#[path = "../../src/fuse/pace.rs"]
mod pace;

/// As in `src/fuse/adapter`.
const TTL: Duration = Duration::from_secs(365 * 86_400);
const REQUEST_MAX: u32 = 1 << 20;
const GENERATION: Generation = Generation(0);

fn error(number: i32) -> Errno {
    Errno::from_i32(number)
}

fn answer_entry(reply: ReplyEntry, result: Result<FileAttr>) {
    match result {
        Ok(attr) => reply.entry(&TTL, &attr, GENERATION),
        Err(e) => reply.error(error(e)),
    }
}

fn answer_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(error(e)),
    }
}

struct Null {
    state: Mutex<State>,
    /// There once the connection is.
    pace: Arc<OnceLock<Arc<pace::Pace>>>,
}

impl Null {
    /// A request of so many bytes begins.
    fn begin(&self, len: usize) -> MutexGuard<'_, State> {
        match self.pace.get() {
            Some(pace) if len < pace::SMALL => pace.small(),
            Some(pace) => pace.large(),
            None => {}
        }
        self.state.lock()
    }
}

impl Filesystem for Null {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ];
        for flag in wanted {
            // An older kernel that lacks one only loses speed.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(REQUEST_MAX);
        let _ = config.set_max_background(128);
        let _ = config.set_congestion_threshold(96);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.begin(0);
        match state.find(parent.0, name).and_then(|ino| state.tell(ino)) {
            Err(libc::ENOENT) => reply.entry(&TTL, &blank(UNIX_EPOCH), GENERATION),
            result => answer_entry(reply, result),
        }
    }

    fn forget(&self, _req: &Request, n: INodeNo, nlookup: u64) {
        let _ = self.begin(0).forget(n.0, nlookup); // it may be gone, and nobody waits for an answer
    }

    fn getattr(&self, _req: &Request, n: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.begin(0).node(n.0) {
            Ok(node) => reply.attr(&TTL, &node.attr),
            Err(e) => reply.error(error(e)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        n: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.begin(0);
        if let Some(Err(e)) = size.map(|size| state.truncate(n.0, size)) {
            return reply.error(error(e));
        }
        let now = state.now();
        let time = |t: TimeOrNow| match t {
            TimeOrNow::SpecificTime(t) => t,
            TimeOrNow::Now => now,
        };
        match state.node(n.0) {
            Ok(Node { attr, .. }) => {
                attr.perm = mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
                attr.uid = uid.unwrap_or(attr.uid);
                attr.gid = gid.unwrap_or(attr.gid);
                attr.atime = atime.map_or(attr.atime, time);
                attr.mtime = mtime.map_or(attr.mtime, time);
                attr.ctime = now;
                reply.attr(&TTL, attr);
            }
            Err(e) => reply.error(error(e)),
        }
    }

    fn readlink(&self, _req: &Request, n: INodeNo, reply: ReplyData) {
        match self.begin(0).node(n.0).map(|node| &node.body) {
            Ok(Body::Link(target)) => reply.data(target),
            Ok(_) => reply.error(error(libc::EINVAL)),
            Err(e) => reply.error(error(e)),
        }
    }

    fn mknod(&self, req: &Request, at: INodeNo, name: &OsStr, mode: u32, _: u32, _: u32, reply: ReplyEntry) {
        let (kind, body) = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => (FileType::RegularFile, Body::File(Vec::new())),
            libc::S_IFIFO => (FileType::NamedPipe, Body::Other),
            libc::S_IFSOCK => (FileType::Socket, Body::Other),
            _ => return reply.error(error(libc::EPERM)),
        };
        answer_entry(reply, self.begin(0).make(req, at.0, name, New { kind, mode, body }));
    }

    fn mkdir(&self, req: &Request, at: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let new = New { kind: FileType::Directory, mode, body: new_directory(at.0) };
        answer_entry(reply, self.begin(0).make(req, at.0, name, new));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(reply, self.begin(0).remove(parent.0, name, false));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(reply, self.begin(0).remove(parent.0, name, true));
    }

    fn symlink(&self, req: &Request, at: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let body = Body::Link(target.as_os_str().as_bytes().to_vec());
        answer_entry(
            reply,
            self.begin(0).make(req, at.0, name, New { kind: FileType::Symlink, mode: 0o777, body }),
        );
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        answer_empty(reply, self.begin(0).rename((parent.0, name), (newparent.0, newname), flags.bits()));
    }

    fn link(&self, _req: &Request, n: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.begin(0);
        let linked = state.enter(parent.0, name, n.0).and_then(|()| state.node(n.0)).map(|node| {
            node.attr.nlink += 1;
        });
        answer_entry(reply, linked.and_then(|()| state.tell(n.0)));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS); // the kernel need not ask again
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let new = New { kind: FileType::RegularFile, mode, body: Body::File(Vec::new()) };
        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
        match self.begin(0).make(req, parent.0, name, new) {
            Ok(attr) => reply.created(&TTL, &attr, GENERATION, FileHandle(0), flags),
            Err(e) => reply.error(error(e)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut reply = Some(reply);
        let sent = self.begin(size as usize).read(n.0, offset, u64::from(size), |bytes| {
            if let Some(reply) = reply.take() {
                reply.data(bytes);
            }
        });
        if let (Err(e), Some(reply)) = (sent, reply) {
            reply.error(error(e));
        }
    }

    fn write(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.begin(data.len()).write(n.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(error(e)),
        }
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        drop(self.begin(0));
        reply.ok(); // asked each time, as of one that keeps something
    }

    fn fsyncdir(&self, req: &Request, n: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.fsync(req, n, fh, datasync, reply);
    }

    fn readdir(&self, _req: &Request, n: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.begin(0).entries(n.0, offset, |ino, cookie, name| {
            !reply.add(INodeNo(ino), cookie, FileType::RegularFile, name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(error(e)),
        }
    }

    fn readdirplus(&self, _req: &Request, n: INodeNo, _fh: FileHandle, offset: u64, to: ReplyDirectoryPlus) {
        let (mut state, mut reply) = (self.begin(0), to);
        let mut batch = Vec::new();
        let listed = state.entries(n.0, offset, |ino, cookie, name| {
            batch.push((ino, cookie, name.to_os_string()));
            batch.len() < 256
        });
        if let Err(e) = listed {
            return reply.error(error(e));
        }
        for (ino, cookie, name) in batch {
            let Ok(node) = state.node(ino) else { continue };
            if reply.add(INodeNo(ino), cookie, &name, &TTL, &node.attr, GENERATION) {
                break;
            }
            if cookie > DOTS {
                node.lookups += 1; // the kernel counts all but these two
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let plenty = 1 << 28;
        reply.statfs(plenty, plenty, plenty, plenty, plenty, 4096, 255, 4096);
    }

    fn fallocate(
        &self,
        _: &Request,
        n: INodeNo,
        _: FileHandle,
        at: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.begin(0);
        let grown = match (mode, state.node(n.0)) {
            (0, Ok(node)) => {
                let size = node.attr.size.max(at + len);
                set_size(&mut node.attr, size);
                Ok(())
            }
            (_, Ok(_)) => Err(libc::EOPNOTSUPP),
            (_, Err(e)) => Err(e),
        };
        answer_empty(reply, grown);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        match self.begin(0).copy((ino_in.0, offset_in), (ino_out.0, offset_out), len) {
            Ok(copied) => reply.written(copied as u32),
            Err(e) => reply.error(error(e)),
        }
    }
}

fn main() -> std::io::Result<()> {
    let Some(point) = std::env::args_os().nth(1) else {
        return Err(std::io::Error::other("usage: null_fuse MOUNTPOINT"));
    };
    let clock = Env::system().clock;
    let pace = Arc::new(OnceLock::new());
    let null = Null { state: Mutex::new(State::new(clock.clone())), pace: pace.clone() };
    let mut config = Config::default();
    config.mount_options =
        vec![MountOption::FSName("null".into()), MountOption::DefaultPermissions, MountOption::NoAtime];
    config.acl = SessionACL::All;
    config.n_threads = Some(1);
    let session = Session::new(null, point, &config)?;
    let _ = pace.set(pace::Pace::start(session.as_fd(), clock)?); // it was empty
    session.run()
}
