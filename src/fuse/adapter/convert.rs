//! Between the types of `fuser` and our own.
//! Invariant: a time stamp survives the way through both directions, also before 1970.

use crate::fs::Attr;
use crate::tree::value::FileType;
use crate::types::Timestamp;
use fuser::{FileAttr, INodeNo};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Block size that `stat` recommends for I/O.
const BLOCK_SIZE: u32 = 4096;

/// Our attributes as `fuser` replies them.
pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    let inode = &attr.inode;
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: inode.size,
        // A file of holes may have pages that were changed through a mapping and that only the kernel knows of; tar takes
        // 0 blocks to mean that there is nothing to read.
        blocks: attr.blocks.max(u64::from(inode.kind() == FileType::Regular && inode.size > 0)),
        atime: system_time(inode.atime),
        mtime: system_time(inode.mtime),
        ctime: system_time(inode.ctime),
        crtime: system_time(inode.btime),
        kind: fuse_kind(inode.kind()),
        perm: (inode.mode & 0o7777) as u16,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev(),
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// The reply that says "no such name, and you may remember it".
pub(super) fn negative() -> FileAttr {
    blank(Timestamp::default())
}

/// Attributes with all times `time` and nothing else in them.
pub(super) fn blank(time: Timestamp) -> FileAttr {
    let time = system_time(time);
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

pub(super) fn fuse_kind(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
    }
}

/// The type in the mode of mknod(2); no type at all means a regular file.
pub(super) fn kind_of(mode: u32) -> Option<FileType> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Some(FileType::Regular),
        libc::S_IFIFO => Some(FileType::Fifo),
        libc::S_IFSOCK => Some(FileType::Socket),
        libc::S_IFCHR => Some(FileType::CharDevice),
        libc::S_IFBLK => Some(FileType::BlockDevice),
        _ => None,
    }
}

/// What `fuser` turns back into the same seconds and nanoseconds.
fn system_time(t: Timestamp) -> SystemTime {
    let time = if t.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::new(t.secs as u64, t.nanos))
    } else {
        UNIX_EPOCH
            .checked_sub(Duration::from_secs(t.secs.unsigned_abs()))
            .and_then(|second| second.checked_add(Duration::from_nanos(u64::from(t.nanos))))
    };
    time.unwrap_or(UNIX_EPOCH)
}

/// A time that came in with a request. `fuser` 0.18 takes seconds and nanoseconds before 1970 both off the epoch,
/// though the nanoseconds count forward; taking the two apart again gives what the kernel sent.
pub(super) fn timestamp(t: SystemTime) -> Timestamp {
    match t.duration_since(UNIX_EPOCH) {
        Ok(d) => Timestamp { secs: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), nanos: d.subsec_nanos() },
        Err(before) => {
            let d = before.duration();
            let secs = 0i64.checked_sub_unsigned(d.as_secs()).unwrap_or(i64::MIN);
            Timestamp { secs, nanos: d.subsec_nanos() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_come_back_as_the_kernel_sent_them() {
        // What fuser 0.18 makes of secs = -5, nsecs = 300_000_000.
        let from_fuser = UNIX_EPOCH - Duration::new(5, 300_000_000);
        assert_eq!(timestamp(from_fuser), Timestamp { secs: -5, nanos: 300_000_000 });
        // On the way out fuser splits correctly: 4.7 s before the epoch.
        let out = system_time(Timestamp { secs: -5, nanos: 300_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(out).unwrap(), Duration::new(4, 700_000_000));
    }
}
