//! The replies that are more than a value or an errno, and how long the kernel may keep what it is told.
//! Invariant: an entry is counted as known to the kernel exactly if the reply has taken it in.

use super::convert::{file_attr, fuse_kind, negative};
use crate::fs::{self, Attr, DirItem, Fs};
use crate::fuse::serve::{Served, StatFs};
use crate::tree::value::FileType;
use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, ReplyCreate, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEntry, ReplyStatfs, ReplyXattr,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Every change goes through the kernel that caches it, so names and attributes never grow old.
pub(super) const TTL: Duration = Duration::from_secs(365 * 86_400);

/// How long the kernel may keep attributes. It clears set-id bits on a write by asking us to, and keeps the mode it had:
/// a program that a stranger has just overwritten would run as its owner. So it asks for these each time.
pub(super) fn ttl(attr: &Attr) -> Duration {
    let set_id =
        attr.inode.kind() == FileType::Regular && attr.inode.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
    if set_id { Duration::ZERO } else { TTL }
}

/// How long the kernel may keep the name of what has these attributes.
fn names_ttl(fs: &Fs, attr: &Attr) -> Duration {
    ttl(attr).min(fs.names_keep())
}

/// Inode numbers are never used twice.
pub(super) const GENERATION: Generation = Generation(0);

/// Replies with an inode that the kernel holds from now on.
pub(super) fn entry(fs: &Fs, reply: ReplyEntry, result: Served<Attr>) {
    match result {
        Ok(attr) => {
            fs.looked_up(attr.ino);
            reply.entry_with_ttls(&ttl(&attr), &names_ttl(fs, &attr), &file_attr(&attr), GENERATION);
        }
        Err(e) => reply.error(Errno::from_i32(e)),
    }
}

/// The same; that there is no such name may be remembered too.
pub(super) fn entry_or_none(fs: &Fs, reply: ReplyEntry, result: Served<Attr>) {
    match result {
        // Inode 0 lets the kernel remember that there is no such name.
        Err(libc::ENOENT) => reply.entry(&fs.names_keep(), &negative(), GENERATION),
        result => entry(fs, reply, result),
    }
}

/// Replies with a new file, which is open.
pub(super) fn created(fs: &Fs, reply: ReplyCreate, result: Served<Attr>) {
    match result {
        Ok(attr) => {
            fs.looked_up(attr.ino);
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
            reply.created(&ttl(&attr), &file_attr(&attr), GENERATION, FileHandle(0), flags);
        }
        Err(e) => reply.error(Errno::from_i32(e)),
    }
}

/// Replies with the size of the volume.
pub(super) fn statfs(reply: ReplyStatfs, s: &StatFs) {
    let name_max = fs::NAME_MAX as u32;
    reply.statfs(s.blocks, s.free, s.available, s.files, s.files_free, s.block_size, name_max, s.block_size);
}

/// Replies with as many entries as fit.
pub(super) fn entries(mut reply: ReplyDirectory, result: Served<Vec<DirItem>>) {
    let items = match result {
        Ok(items) => items,
        Err(e) => return reply.error(Errno::from_i32(e)),
    };
    for item in items {
        let name = OsStr::from_bytes(&item.name);
        if reply.add(INodeNo(item.ino.0), item.cookie, fuse_kind(item.kind), name) {
            break;
        }
    }
    reply.ok();
}

/// Replies with as many entries and their attributes as fit.
pub(super) fn entries_plus(fs: &Fs, mut reply: ReplyDirectoryPlus, result: Served<Vec<(DirItem, Attr)>>) {
    let items = match result {
        Ok(items) => items,
        Err(e) => return reply.error(Errno::from_i32(e)),
    };
    for (item, attr) in items {
        let name = OsStr::from_bytes(&item.name);
        let ino = INodeNo(item.ino.0);
        if reply.add(ino, item.cookie, name, &names_ttl(fs, &attr), &file_attr(&attr), GENERATION) {
            break;
        }
        // These two the kernel does not count.
        if item.name != b"." && item.name != b".." {
            fs.looked_up(item.ino);
        }
    }
    reply.ok();
}

/// Replies with the value, its size when the caller only asks for that, or ERANGE when its buffer is too small.
pub(super) fn xattr(reply: ReplyXattr, size: u32, result: Served<Vec<u8>>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::from_i32(libc::ERANGE)),
        Ok(value) => reply.data(&value),
        Err(e) => reply.error(Errno::from_i32(e)),
    }
}
