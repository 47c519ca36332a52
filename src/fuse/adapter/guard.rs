//! What stands around every handler: the gate, and the catching of panics.
//! Invariant: every call that `fuser` can make comes through here. A handler that panics answers EIO, is logged with
//! what it was at, and harms no other; once the gate is closed no handler runs but FORGET, which has no answer and
//! so is not asked again.

use super::control::WithControlDir;
use crate::fuse::gate::What;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::SystemTime;

/// The adapter behind the gate.
pub(super) struct Guard(pub(super) WithControlDir);

impl Guard {
    fn pass<R>(&self, what: What, reply: R, call: impl FnOnce(R)) {
        let Some(_inside) = self.0.requests().gate().enter() else {
            // Who goes on with the connection is asked again; dropped, this would answer EIO.
            return std::mem::forget(reply);
        };
        self.caught(what, || call(reply));
    }

    /// A reply that is dropped by a panic answers EIO.
    fn caught(&self, what: What, call: impl FnOnce()) {
        what.enter();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(call)) {
            self.0.requests().panicked(&what, &*panic);
        }
    }
}

/// Calls with an inode first and a reply last; in brackets the argument that is a name to log.
macro_rules! guarded {
    ($($call:ident($ino:ident $(, $arg:ident: $ty:ty)*) -> $reply:ty $(, [$name:ident])?;)*) => {$(
        fn $call(&self, req: &Request, $ino: INodeNo $(, $arg: $ty)*, reply: $reply) {
            let what = What::new(stringify!($call), $ino.0, guarded!(@bytes $($name)?));
            self.pass(what, reply, |reply| self.0.$call(req, $ino $(, $arg)*, reply));
        }
    )*};
    (@bytes) => { b"" };
    (@bytes $name:ident) => { $name.as_bytes() };
}

impl Filesystem for Guard {
    fn init(&mut self, req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.0.init(req, config)
    }

    fn destroy(&mut self) {
        self.0.destroy();
    }

    fn forget(&self, req: &Request, n: INodeNo, nlookup: u64) {
        self.caught(What::new("forget", n.0, b""), || self.0.forget(req, n, nlookup));
    }

    guarded! {
        lookup(parent, name: &OsStr) -> ReplyEntry, [name];
        getattr(n, fh: Option<FileHandle>) -> ReplyAttr;
        setattr(
            n, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>, size: Option<u64>,
            atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>, ctime: Option<SystemTime>,
            fh: Option<FileHandle>, crtime: Option<SystemTime>, chgtime: Option<SystemTime>,
            bkuptime: Option<SystemTime>, flags: Option<BsdFileFlags>
        ) -> ReplyAttr;
        readlink(n) -> ReplyData;
        mknod(parent, name: &OsStr, mode: u32, umask: u32, rdev: u32) -> ReplyEntry, [name];
        mkdir(parent, name: &OsStr, mode: u32, umask: u32) -> ReplyEntry, [name];
        unlink(parent, name: &OsStr) -> ReplyEmpty, [name];
        rmdir(parent, name: &OsStr) -> ReplyEmpty, [name];
        symlink(parent, name: &OsStr, target: &Path) -> ReplyEntry, [name];
        rename(
            parent, name: &OsStr, newparent: INodeNo, newname: &OsStr, flags: RenameFlags
        ) -> ReplyEmpty, [name];
        link(n, newparent: INodeNo, newname: &OsStr) -> ReplyEntry, [newname];
        open(n, flags: OpenFlags) -> ReplyOpen;
        read(
            n, fh: FileHandle, offset: u64, size: u32, flags: OpenFlags, owner: Option<LockOwner>
        ) -> ReplyData;
        write(
            n, fh: FileHandle, offset: u64, data: &[u8], write_flags: WriteFlags, flags: OpenFlags,
            owner: Option<LockOwner>
        ) -> ReplyWrite;
        flush(n, fh: FileHandle, owner: LockOwner) -> ReplyEmpty;
        release(
            n, fh: FileHandle, flags: OpenFlags, owner: Option<LockOwner>, flush: bool
        ) -> ReplyEmpty;
        fsync(n, fh: FileHandle, datasync: bool) -> ReplyEmpty;
        opendir(n, flags: OpenFlags) -> ReplyOpen;
        readdir(n, fh: FileHandle, offset: u64) -> ReplyDirectory;
        readdirplus(n, fh: FileHandle, offset: u64) -> ReplyDirectoryPlus;
        releasedir(n, fh: FileHandle, flags: OpenFlags) -> ReplyEmpty;
        fsyncdir(n, fh: FileHandle, datasync: bool) -> ReplyEmpty;
        statfs(n) -> ReplyStatfs;
        setxattr(n, name: &OsStr, value: &[u8], flags: i32, position: u32) -> ReplyEmpty, [name];
        getxattr(n, name: &OsStr, size: u32) -> ReplyXattr, [name];
        listxattr(n, size: u32) -> ReplyXattr;
        removexattr(n, name: &OsStr) -> ReplyEmpty, [name];
        access(n, mask: AccessFlags) -> ReplyEmpty;
        create(parent, name: &OsStr, mode: u32, umask: u32, flags: i32) -> ReplyCreate, [name];
        getlk(
            n, fh: FileHandle, owner: LockOwner, start: u64, end: u64, kind: i32, pid: u32
        ) -> ReplyLock;
        setlk(
            n, fh: FileHandle, owner: LockOwner, start: u64, end: u64, kind: i32, pid: u32, sleep: bool
        ) -> ReplyEmpty;
        bmap(n, blocksize: u32, idx: u64) -> ReplyBmap;
        ioctl(
            n, fh: FileHandle, flags: IoctlFlags, cmd: u32, in_data: &[u8], out_size: u32
        ) -> ReplyIoctl;
        poll(
            n, fh: FileHandle, ph: PollNotifier, events: PollEvents, flags: PollFlags
        ) -> ReplyPoll;
        fallocate(n, fh: FileHandle, offset: u64, length: u64, mode: i32) -> ReplyEmpty;
        lseek(n, fh: FileHandle, offset: i64, whence: i32) -> ReplyLseek;
        copy_file_range(
            n, fh_in: FileHandle, offset_in: u64, ino_out: INodeNo, fh_out: FileHandle, offset_out: u64,
            len: u64, flags: CopyFileRangeFlags
        ) -> ReplyWrite;
    }
}
