//! From FUSE requests to file-system operations and back: unpack, one call, reply.
//! Invariant: no request waits on the dispatch thread. What needs the network, the disk's sync or room is handed
//! to the pool together with its reply; a handler that panics answers EIO and is logged.

mod control;
mod convert;
mod guard;
mod invalidate;
mod past;
mod reply;
mod request;
mod session;
#[cfg(test)]
mod tests;

pub use session::{Ended, Ready};

use self::control::WithControlDir;
use super::connection::{Connection, Switch};
use super::control_dir::ControlDir;
use super::pace::{self, Pace};
use super::past::Past;
use super::serve::{Requests, Served};
use crate::clock::Clock;
use crate::fs::{self, AclKind, Attr, CAPABILITY, Fs, NewNode, SetAttr, Strip, XattrMode};
use crate::tree::value::FileType;
use convert::{file_attr, kind_of};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use guard::Guard;
use parking_lot::Mutex;
use reply::ttl;
use request::{OwnedNode, caller, in_group, ino, leaves_atime, time_or_now, untrusted};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// Entries taken from the file system at once for a readdir reply.
const DIR_BATCH: usize = 256;
/// Largest request, in bytes (the kernel's page limit allows no more).
const REQUEST_MAX: u32 = 1 << 20;

/// Dispatch threads: more than one only costs latency while requests are answered from memory.
const DISPATCH_THREADS: usize = 1;

/// Answers the kernel until the file system is unmounted or `switch` is thrown; calls `ready` before the first request.
pub fn serve(
    requests: Arc<Requests>,
    connection: &mut Connection,
    switch: &Switch,
    clock: Arc<dyn Clock>,
    (control, past): (ControlDir, Past),
    ready: Ready,
) -> io::Result<Ended> {
    let pace = Pace::start(connection.fd.as_fd(), clock.clone())?;
    let kernel = Arc::new(OnceLock::new());
    let adapter = Adapter { requests, pace, stripped: Mutex::default(), kernel: kernel.clone() };
    let adapter = WithControlDir::new(adapter, control, past, clock.now());
    session::run(Guard(adapter), connection, switch, &kernel, ready)
}

/// The FUSE side of one mount.
struct Adapter {
    requests: Arc<Requests>,
    pace: Arc<Pace>,
    /// The inode that lost its capabilities last, and the process for which the kernel asked that.
    stripped: Mutex<(u64, u32)>,
    /// The way to tell the kernel something; there once it has greeted.
    kernel: Arc<OnceLock<Notifier>>,
}

impl Adapter {
    fn serve<T: Send + 'static>(
        &self,
        what: &'static str,
        op: impl FnMut(&Fs) -> fs::Result<T> + Send + 'static,
        reply: impl FnOnce(&Fs, Served<T>) + Send + 'static,
    ) {
        self.pace.small();
        self.requests.serve(what, op, reply);
    }

    fn paced(&self, len: usize) {
        if len < pace::SMALL { self.pace.small() } else { self.pace.large() }
    }

    fn serve_empty(
        &self,
        what: &'static str,
        op: impl FnMut(&Fs) -> fs::Result<()> + Send + 'static,
        reply: ReplyEmpty,
    ) {
        self.serve(what, op, move |_, result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    fn serve_attr(
        &self,
        what: &'static str,
        op: impl FnMut(&Fs) -> fs::Result<Attr> + Send + 'static,
        reply: ReplyAttr,
    ) {
        self.serve(what, op, move |_, result| match result {
            Ok(attr) => reply.attr(&ttl(&attr), &file_attr(&attr)),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    fn serve_entry(
        &self,
        what: &'static str,
        op: impl FnMut(&Fs) -> fs::Result<Attr> + Send + 'static,
        reply: ReplyEntry,
    ) {
        self.serve(what, op, move |fs, result| reply::entry(fs, reply, result));
    }

    fn make(&self, req: &Request, parent: INodeNo, name: &OsStr, node: OwnedNode, reply: ReplyEntry) {
        let (caller, name) = (caller(req), name.as_bytes().to_vec());
        self.serve_entry("make", move |fs| fs.make(ino(parent), &name, &node.borrow(), caller), reply);
    }

    /// Handles carry no state: the kernel need not ask before it opens. Unless access times are counted: then what is
    /// cached is dropped when the next read has to be seen.
    fn open_as(&self, n: INodeNo, flags: OpenFlags, cached: FopenFlags, reply: ReplyOpen) {
        if !self.requests.counts_access() {
            return reply.error(Errno::from_i32(libc::ENOSYS));
        }
        let due = move |fs: &Fs| Ok(!leaves_atime(flags) && fs.access_is_due(ino(n))?);
        self.serve("open", due, move |_, due| match due {
            Ok(true) => reply.opened(FileHandle(0), cached & !FopenFlags::FOPEN_KEEP_CACHE),
            Ok(false) => reply.opened(FileHandle(0), cached),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }
}

impl Filesystem for Adapter {
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
            // The kernel heeds access lists, and leaves the umask to who knows whether there is one to inherit.
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
        ];
        for flag in wanted {
            // An older kernel that lacks one only loses speed.
            let _ = config.add_capabilities(flag);
        }
        if !self.requests.counts_access() {
            let _ = config.add_capabilities(InitFlags::FUSE_CACHE_SYMLINKS);
        }
        let _ = config.set_max_write(REQUEST_MAX);
        let _ = config.set_max_background(128);
        let _ = config.set_congestion_threshold(96);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        let find = move |fs: &Fs| fs.lookup(ino(parent), &name);
        self.serve("lookup", find, move |fs, result| reply::entry_or_none(fs, reply, result));
    }

    fn forget(&self, _req: &Request, n: INodeNo, nlookup: u64) {
        self.serve("forget", move |fs| fs.forget(ino(n), nlookup), |_, _| ());
    }

    fn getattr(&self, _req: &Request, n: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve_attr("getattr", move |fs| fs.getattr(ino(n)), reply);
    }

    fn setattr(
        &self,
        req: &Request,
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
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time_or_now),
            mtime: mtime.map(time_or_now),
            privileged: req.uid() == 0,
        };
        // Nothing to change: a chown to the same owner. Or a privileged write to a file that had capabilities, which the
        // kernel has just had removed; that one keeps the set-id bits.
        if mode.or(uid).or(gid).is_none() && size.is_none() && set.atime.is_none() && set.mtime.is_none() {
            let caller = req.uid();
            let writes = caller == 0 && *self.stripped.lock() == (n.0, req.pid());
            let op =
                move |fs: &Fs| if writes { fs.getattr(ino(n)) } else { fs.chown_to_same(ino(n), caller) };
            return self.serve_attr("chown", op, reply);
        }
        self.serve_attr("setattr", move |fs| fs.setattr(ino(n), &set), reply);
    }

    fn readlink(&self, _req: &Request, n: INodeNo, reply: ReplyData) {
        self.serve(
            "readlink",
            move |fs| fs.readlink(ino(n)).inspect(|_| fs.accessed(ino(n))),
            move |_, result| match result {
                Ok(target) => reply.data(&target),
                Err(e) => reply.error(Errno::from_i32(e)),
            },
        );
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        match kind_of(mode) {
            Some(kind) => {
                let node = OwnedNode { rdev, ..OwnedNode::new(kind, mode, umask) };
                self.make(req, parent, name, node, reply);
            }
            None => reply.error(Errno::from_i32(libc::EINVAL)),
        }
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.make(req, parent, name, OwnedNode::new(FileType::Directory, mode, umask), reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.serve_empty("unlink", move |fs| fs.unlink(ino(parent), &name), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.serve_empty("rmdir", move |fs| fs.rmdir(ino(parent), &name), reply);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes().to_vec();
        let node = OwnedNode { target, ..OwnedNode::new(FileType::Symlink, 0o777, 0) };
        self.make(req, parent, name, node, reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, newname) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        let caller = caller(req);
        let op =
            move |fs: &Fs| fs.rename((ino(parent), &name), (ino(newparent), &newname), flags.bits(), caller);
        self.serve_empty("rename", op, reply);
    }

    fn link(&self, _req: &Request, n: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let newname = newname.as_bytes().to_vec();
        self.serve_entry("link", move |fs| fs.link(ino(n), ino(newparent), &newname), reply);
    }

    fn open(&self, _req: &Request, n: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.open_as(n, flags, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH, reply);
    }

    fn opendir(&self, _req: &Request, n: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.open_as(n, flags, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR, reply);
    }

    // Errors are reported by the write itself; there is nothing left to say at close.
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::from_i32(libc::ENOSYS));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, name) = (caller(req), name.as_bytes().to_vec());
        self.serve(
            "create",
            move |fs| {
                let node = NewNode { kind: FileType::Regular, mode, umask, rdev: 0, target: b"" };
                fs.make(ino(parent), &name, &node, caller)
            },
            move |fs, result| reply::created(fs, reply, result),
        );
    }

    fn read(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.paced(size as usize);
        let counts = !leaves_atime(flags);
        self.requests.read(ino(n), offset, size as usize, counts, move |result| match result {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    fn write(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let strip = if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
            Strip::All
        } else if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            Strip::Nothing
        } else {
            Strip::Capability
        };
        self.paced(data.len());
        let requests = Arc::downgrade(&self.requests); // a reply that is never sent must not hold them
        self.requests.write(ino(n), offset, data, strip, move |result| match result {
            Ok(written) => reply.written(written as u32),
            Err(e) => {
                if let (Strip::Nothing, Some(requests)) = (strip, requests.upgrade()) {
                    requests.mapped_write_failed(ino(n), offset, e);
                }
                reply.error(Errno::from_i32(e));
            }
        });
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.requests.fsync(move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    fn fsyncdir(&self, req: &Request, n: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.fsync(req, n, fh, datasync, reply);
    }

    fn readdir(&self, _req: &Request, n: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.serve(
            "readdir",
            move |fs| fs.readdir(ino(n), offset, DIR_BATCH).inspect(|_| fs.accessed(ino(n))),
            move |_, result| reply::entries(reply, result),
        );
    }

    fn readdirplus(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.serve(
            "readdirplus",
            move |fs| fs.readdir_plus(ino(n), offset, DIR_BATCH).inspect(|_| fs.accessed(ino(n))),
            move |fs, result| reply::entries_plus(fs, reply, result),
        );
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply::statfs(reply, &self.requests.statfs());
    }

    fn setxattr(
        &self,
        req: &Request,
        n: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        if let Some(kind) = AclKind::of(&name) {
            let in_group = in_group(req);
            let set = move |fs: &Fs| fs.set_acl(ino(n), kind, Some(&value), &in_group);
            return self.serve_empty("setxattr", set, reply);
        }
        let mode = match flags {
            3 => XattrMode::Neither, // both of these
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => XattrMode::Any,
        };
        self.serve_empty("setxattr", move |fs| fs.setxattr(ino(n), &name, &value, mode), reply);
    }

    fn getxattr(&self, _req: &Request, n: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        self.serve(
            "getxattr",
            move |fs| fs.getxattr(ino(n), &name),
            move |_, r| reply::xattr(reply, size, r),
        );
    }

    fn listxattr(&self, req: &Request, n: INodeNo, size: u32, reply: ReplyXattr) {
        let all = req.uid() == 0;
        let list =
            move |fs: &Fs| fs.listxattr(ino(n)).map(|names| if all { names } else { untrusted(&names) });
        self.serve("listxattr", list, move |_, r| reply::xattr(reply, size, r));
    }

    fn removexattr(&self, req: &Request, n: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        if let Some(kind) = AclKind::of(&name) {
            let in_group = in_group(req);
            let remove = move |fs: &Fs| fs.set_acl(ino(n), kind, None, &in_group);
            return self.serve_empty("removexattr", remove, reply);
        }
        if name == CAPABILITY {
            *self.stripped.lock() = (n.0, req.pid());
        }
        self.serve_empty("removexattr", move |fs| fs.removexattr(ino(n), &name), reply);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::from_i32(libc::ENOTTY));
    }

    // Files are always ready; the kernel need not ask.
    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::from_i32(libc::ENOSYS));
    }

    fn fallocate(
        &self,
        req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let kill = req.uid() != 0;
        self.serve_empty("fallocate", move |fs| fs.fallocate(ino(n), offset, length, mode, kill), reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        n: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (what, offset) = match request::seek(offset, whence) {
            Ok(asked) => asked,
            Err(e) => return reply.error(e),
        };
        let kernel = self.kernel.clone();
        let write_back = move |at: u64, len: u64| {
            let range = (i64::try_from(at).unwrap_or(i64::MAX), i64::try_from(len).unwrap_or(i64::MAX));
            kernel.get().map_or(Ok(()), |kernel| kernel.inval_inode(n, range.0, range.1))
        };
        self.pace.small();
        self.requests.seek(ino(n), offset, what, write_back, move |result| match result {
            Ok(at) => reply.offset(at as i64),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    fn copy_file_range(
        &self,
        req: &Request,
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
        let kill = req.uid() != 0;
        self.serve(
            "copy_file_range",
            move |fs| fs.copy_range((ino(ino_in), offset_in), (ino(ino_out), offset_out), len, kill),
            move |_, result| match result {
                Ok(copied) => reply.written(copied as u32),
                Err(e) => reply.error(Errno::from_i32(e)),
            },
        );
    }
}
