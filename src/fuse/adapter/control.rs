//! Requests for the control directory are answered here; all others go on to the volume.
//! Invariant: the volume never sees an inode number of the control directory, nor a request that would put anything
//! in its place; and nothing here waits, so that it answers whatever the volume waits for.

use super::convert::blank;
use super::past::PastDir;
use super::reply::{self, GENERATION, TTL};
use super::{Adapter, ino};
use crate::fuse::control_dir::{ControlDir, DIRECTORY, Snapshot, is_entry, owns};
use crate::fuse::mount::own_ids;
use crate::fuse::past::{self, AT, Past};
use crate::fuse::serve::Requests;
use crate::types::{Ino, Timestamp};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Nobody changes anything here.
const REFUSED: i32 = libc::EPERM;

/// See the module.
pub(super) struct WithControlDir {
    volume: Adapter,
    dir: ControlDir,
    past: PastDir,
    /// When the daemon started: the directory's times.
    since: Timestamp,
    owner: (u32, u32),
}

impl WithControlDir {
    pub fn new(volume: Adapter, dir: ControlDir, past: Past, since: Timestamp) -> WithControlDir {
        let owner = own_ids();
        let past = PastDir::new(past, volume.requests.pool().clone(), owner, since);
        WithControlDir { volume, dir, past, since, owner }
    }

    /// The volume's requests.
    pub fn requests(&self) -> &Arc<Requests> {
        &self.volume.requests
    }

    fn look(&self, name: &[u8]) -> Result<FileAttr, i32> {
        self.dir.look(name).map(|snapshot| self.file(&snapshot))
    }

    fn file(&self, snapshot: &Snapshot) -> FileAttr {
        let size = snapshot.bytes.len() as u64;
        let blocks = size.div_ceil(512);
        FileAttr { size, blocks, ..self.attr(snapshot.ino, FileType::RegularFile, snapshot.time) }
    }

    fn directory(&self) -> FileAttr {
        FileAttr { nlink: 3, perm: 0o555, ..self.attr(DIRECTORY, FileType::Directory, self.since) }
    }

    fn attr(&self, ino: Ino, kind: FileType, time: Timestamp) -> FileAttr {
        let (uid, gid) = self.owner;
        FileAttr { ino: INodeNo(ino.0), kind, perm: 0o444, nlink: 1, uid, gid, ..blank(time) }
    }

    fn attributes(&self, n: Ino) -> Result<FileAttr, i32> {
        match n {
            DIRECTORY => Ok(self.directory()),
            _ => self.dir.snapshot(n).map(|snapshot| self.file(&snapshot)),
        }
    }

    /// The entries behind `offset`, with the offset behind each.
    fn entries(&self, offset: u64) -> impl Iterator<Item = (u64, &'static str)> {
        let names = [".", "..", past::NAME].into_iter().chain(self.dir.names());
        (1..).zip(names).skip(usize::try_from(offset).unwrap_or(usize::MAX))
    }
}

/// True when the request is about the control directory, its contents, or its place in the root.
fn ours(parent: INodeNo, name: &OsStr) -> bool {
    owns(ino(parent)) || is_entry(ino(parent), name.as_bytes())
}

fn refused() -> Errno {
    Errno::from_i32(REFUSED)
}

impl Filesystem for WithControlDir {
    fn init(&mut self, req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        self.volume.init(req, config)
    }

    fn destroy(&mut self) {
        self.volume.destroy();
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if is_entry(ino(parent), name.as_bytes()) {
            // Kept by the kernel, so that it is found also while a change in the root directory waits.
            return reply.entry(&TTL, &self.directory(), GENERATION);
        }
        if !owns(ino(parent)) {
            return self.volume.lookup(req, parent, name, reply);
        }
        if past::owns(ino(parent)) {
            return self.past.lookup(parent, name, reply);
        }
        if name == past::NAME {
            return reply.entry(&TTL, &self.past.directory(), GENERATION);
        }
        match self.look(name.as_bytes()) {
            // The name is asked for each time, the attributes of a snapshot never change.
            Ok(attr) => reply.entry_with_ttls(&TTL, &Duration::ZERO, &attr, GENERATION),
            Err(e) => reply.error(Errno::from_i32(e)),
        }
    }

    fn forget(&self, req: &Request, n: INodeNo, nlookup: u64) {
        match ino(n) {
            n if past::owns(n) => self.past.forget(INodeNo(n.0), nlookup),
            n if owns(n) => self.dir.forget(n, nlookup),
            _ => self.volume.forget(req, n, nlookup),
        }
    }

    fn getattr(&self, req: &Request, n: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        if !owns(ino(n)) {
            return self.volume.getattr(req, n, fh, reply);
        }
        if past::owns(ino(n)) {
            return self.past.getattr(n, reply);
        }
        match self.attributes(ino(n)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(Errno::from_i32(e)),
        }
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
        ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        crtime: Option<SystemTime>,
        chgtime: Option<SystemTime>,
        bkuptime: Option<SystemTime>,
        flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if owns(ino(n)) {
            return reply.error(refused());
        }
        self.volume.setattr(
            req, n, mode, uid, gid, size, atime, mtime, ctime, fh, crtime, chgtime, bkuptime, flags, reply,
        );
    }

    fn readlink(&self, req: &Request, n: INodeNo, reply: ReplyData) {
        if past::owns(ino(n)) {
            return self.past.readlink(n, reply);
        }
        self.volume.readlink(req, n, reply);
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
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.mknod(req, parent, name, mode, umask, rdev, reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.mkdir(req, parent, name, mode, umask, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.unlink(req, parent, name, reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.rmdir(req, parent, name, reply);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.symlink(req, parent, name, target, reply);
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
        if ours(parent, name) || ours(newparent, newname) {
            return reply.error(refused());
        }
        self.volume.rename(req, parent, name, newparent, newname, flags, reply);
    }

    fn link(&self, req: &Request, n: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        if owns(ino(n)) || ours(newparent, newname) {
            return reply.error(refused());
        }
        self.volume.link(req, n, newparent, newname, reply);
    }

    fn open(&self, req: &Request, n: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if owns(ino(n)) {
            return reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
        }
        self.volume.open(req, n, flags, reply);
    }

    fn opendir(&self, req: &Request, n: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if owns(ino(n)) {
            return reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        }
        self.volume.opendir(req, n, flags, reply);
    }

    fn flush(&self, req: &Request, n: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        self.volume.flush(req, n, fh, owner, reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if ours(parent, name) {
            return reply.error(refused());
        }
        self.volume.create(req, parent, name, mode, umask, flags, reply);
    }

    fn read(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if !owns(ino(n)) {
            return self.volume.read(req, n, fh, offset, size, flags, owner, reply);
        }
        if past::owns(ino(n)) {
            return self.past.read(n, offset, size, reply);
        }
        match self.dir.snapshot(ino(n)) {
            Ok(snapshot) => reply.data(&snapshot.read(offset, size as usize)),
            Err(e) => reply.error(Errno::from_i32(e)),
        }
    }

    fn write(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if owns(ino(n)) {
            return reply.error(refused());
        }
        self.volume.write(req, n, fh, offset, data, write_flags, flags, owner, reply);
    }

    fn fsync(&self, req: &Request, n: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        if owns(ino(n)) {
            return reply.ok();
        }
        self.volume.fsync(req, n, fh, datasync, reply);
    }

    fn fsyncdir(&self, req: &Request, n: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        if owns(ino(n)) {
            return reply.ok();
        }
        self.volume.fsyncdir(req, n, fh, datasync, reply);
    }

    fn readdir(&self, req: &Request, n: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if !owns(ino(n)) {
            return self.volume.readdir(req, n, fh, offset, reply);
        }
        if past::owns(ino(n)) {
            return self.past.readdir(n, offset, reply);
        }
        for (next, name) in self.entries(offset) {
            let (number, kind) = match name {
                "." => (INodeNo(DIRECTORY.0), FileType::Directory),
                ".." => (INodeNo::ROOT, FileType::Directory),
                past::NAME => (INodeNo(AT.0), FileType::Directory),
                // A file has a number only once it is looked at; this one is nobody's.
                _ => (INodeNo(DIRECTORY.0 + next), FileType::RegularFile),
            };
            if reply.add(number, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        if !owns(ino(n)) {
            return self.volume.readdirplus(req, n, fh, offset, reply);
        }
        if past::owns(ino(n)) {
            return self.past.readdirplus(n, offset, reply);
        }
        for (next, name) in self.entries(offset) {
            let attr = match name {
                "." => Ok(self.directory()),
                ".." => Ok(FileAttr { ino: INodeNo::ROOT, ..self.directory() }),
                past::NAME => Ok(self.past.directory()),
                _ => self.look(name.as_bytes()),
            };
            let Ok(attr) = attr else { continue };
            if reply.add(attr.ino, next, name, &Duration::ZERO, &attr, GENERATION) {
                self.dir.forget(ino(attr.ino), 1); // it did not fit, so the kernel does not know it
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, req: &Request, n: INodeNo, reply: ReplyStatfs) {
        self.volume.statfs(req, n, reply);
    }

    fn setxattr(
        &self,
        req: &Request,
        n: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        position: u32,
        reply: ReplyEmpty,
    ) {
        if owns(ino(n)) {
            return reply.error(refused());
        }
        self.volume.setxattr(req, n, name, value, flags, position, reply);
    }

    fn getxattr(&self, req: &Request, n: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if past::owns(ino(n)) {
            return self.past.getxattr(n, name, size, reply);
        }
        if owns(ino(n)) {
            return reply.error(Errno::from_i32(libc::ENODATA));
        }
        self.volume.getxattr(req, n, name, size, reply);
    }

    fn listxattr(&self, req: &Request, n: INodeNo, size: u32, reply: ReplyXattr) {
        if past::owns(ino(n)) {
            return self.past.listxattr(req, n, size, reply);
        }
        if owns(ino(n)) {
            return reply::xattr(reply, size, Ok(Vec::new()));
        }
        self.volume.listxattr(req, n, size, reply);
    }

    fn removexattr(&self, req: &Request, n: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if owns(ino(n)) {
            return reply.error(refused());
        }
        self.volume.removexattr(req, n, name, reply);
    }

    fn ioctl(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.volume.ioctl(req, n, fh, flags, cmd, in_data, out_size, reply);
    }

    fn poll(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        ph: PollNotifier,
        events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        self.volume.poll(req, n, fh, ph, events, flags, reply);
    }

    fn fallocate(
        &self,
        req: &Request,
        n: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if owns(ino(n)) {
            return reply.error(refused());
        }
        self.volume.fallocate(req, n, fh, offset, length, mode, reply);
    }

    fn lseek(&self, req: &Request, n: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        if !owns(ino(n)) {
            return self.volume.lseek(req, n, fh, offset, whence, reply);
        }
        if past::owns(ino(n)) {
            return self.past.lseek(n, offset, whence, reply);
        }
        // All data, up to the hole behind the end.
        let size = self.dir.snapshot(ino(n)).map_or(0, |snapshot| snapshot.bytes.len() as i64);
        match whence {
            libc::SEEK_DATA if (0..size).contains(&offset) => reply.offset(offset),
            libc::SEEK_HOLE if (0..size).contains(&offset) => reply.offset(size),
            libc::SEEK_DATA | libc::SEEK_HOLE => reply.error(Errno::from_i32(libc::ENXIO)),
            _ => reply.error(Errno::from_i32(libc::EINVAL)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if owns(ino(ino_out)) {
            return reply.error(refused());
        }
        if owns(ino(ino_in)) {
            // The kernel then reads and writes instead.
            return reply.error(Errno::from_i32(libc::EXDEV));
        }
        let out = (ino_out, fh_out, offset_out);
        self.volume.copy_file_range(req, ino_in, fh_in, offset_in, out.0, out.1, out.2, len, flags, reply);
    }
}
