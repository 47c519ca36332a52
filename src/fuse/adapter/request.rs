//! What a request says: whom it is for, what is to be made.
//! Invariant: nothing here reaches the file system; of other processes only their own lines in /proc are read.

use super::convert::timestamp;
use crate::fs::{Caller, NewNode, Seek};
use crate::tree::value::FileType;
use crate::types::{Ino, Timestamp};
use fuser::{Errno, INodeNo, OpenFlags, Request, TimeOrNow};

/// A [`NewNode`] that can wait for its turn.
pub(super) struct OwnedNode {
    pub kind: FileType,
    pub mode: u32,
    pub umask: u32,
    pub rdev: u32,
    pub target: Vec<u8>,
}

impl OwnedNode {
    pub fn new(kind: FileType, mode: u32, umask: u32) -> OwnedNode {
        OwnedNode { kind, mode, umask, rdev: 0, target: Vec::new() }
    }

    pub fn borrow(&self) -> NewNode<'_> {
        NewNode { kind: self.kind, mode: self.mode, umask: self.umask, rdev: self.rdev, target: &self.target }
    }
}

/// What lseek(2) looks for, and from where; an errno for what it cannot be asked.
pub(super) fn seek(offset: i64, whence: i32) -> Result<(Seek, u64), Errno> {
    let what = match whence {
        libc::SEEK_DATA => Seek::Data,
        libc::SEEK_HOLE => Seek::Hole,
        _ => return Err(Errno::from_i32(libc::EINVAL)),
    };
    u64::try_from(offset).map(|offset| (what, offset)).map_err(|_| Errno::from_i32(libc::ENXIO))
}

pub(super) fn ino(n: INodeNo) -> Ino {
    Ino(n.0)
}

pub(super) fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid() }
}

/// The names without those that only root may know of (xattr(7)); the kernel keeps their values back itself.
pub(super) fn untrusted(names: &[u8]) -> Vec<u8> {
    names
        .split_inclusive(|byte| *byte == 0)
        .filter(|name| !name.starts_with(b"trusted."))
        .flatten()
        .copied()
        .collect()
}

/// Whether who makes a request may act for a group: it is one of its groups, or it may do anything.
pub(super) fn in_group(req: &Request) -> impl Fn(u32) -> bool + Send + 'static {
    let (all, own) = (req.uid() == 0, req.gid());
    // The request names one group only; the others are the process's, which waits for the answer.
    let status = if all { None } else { std::fs::read_to_string(format!("/proc/{}/status", req.pid())).ok() };
    let listed =
        status.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("Groups:")));
    let more: Vec<u32> =
        listed.unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect();
    move |group| all || group == own || more.contains(&group)
}

pub(super) fn time_or_now(time: TimeOrNow) -> Option<Timestamp> {
    match time {
        TimeOrNow::SpecificTime(t) => Some(timestamp(t)),
        TimeOrNow::Now => None,
    }
}

/// Opened so that reading does not change the access time (open(2), `O_NOATIME`).
pub(super) fn leaves_atime(flags: OpenFlags) -> bool {
    flags.0 & libc::O_NOATIME != 0
}
