//! Whether what is in a directory is what a version holds.
//! Invariant: nothing is changed, times of access included where the system lets us.

use super::Trouble;
use crate::crypto::Hasher;
use crate::fs::{self, AclKind, Attr, canonical_acl};
use crate::ops::place::Dir;
use crate::ops::reader::{Reader, Xattr};
use crate::tree::value::{Body, FileType};
use crate::types::Hash;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// What differs between what is there and what would be made, its contents aside; `None`: nothing, so that an earlier
/// copy has finished it.
pub(super) fn difference(
    dir: &Dir,
    name: &[u8],
    attr: &Attr,
    there: &libc::stat,
    xattrs: &[Xattr],
) -> io::Result<Option<&'static str>> {
    let inode = &attr.inode;
    let kind = match inode.kind() {
        FileType::Regular => libc::S_IFREG,
        FileType::Directory => libc::S_IFDIR,
        FileType::Symlink => libc::S_IFLNK,
        FileType::Fifo => libc::S_IFIFO,
        FileType::Socket => libc::S_IFSOCK,
        FileType::CharDevice => libc::S_IFCHR,
        FileType::BlockDevice => libc::S_IFBLK,
    };
    if there.st_mode & libc::S_IFMT != kind {
        return Ok(Some("type"));
    }
    if (there.st_uid, there.st_gid) != (inode.uid, inode.gid) {
        return Ok(Some("owner"));
    }
    let differs = match &inode.body {
        Body::Symlink { target } => (dir.readlink(name)? != *target).then_some("target"),
        Body::CharDevice(rdev) | Body::BlockDevice(rdev) => {
            (there.st_rdev != kernel_device(*rdev)).then_some("device number")
        }
        _ => {
            let time = (there.st_mtime, there.st_mtime_nsec);
            if inode.kind() == FileType::Regular && there.st_size.cast_unsigned() != inode.size {
                Some("size")
            } else if time != (inode.mtime.secs, i64::from(inode.mtime.nanos)) {
                Some("time of modification")
            } else {
                (there.st_mode & 0o7777 != inode.mode).then_some("mode")
            }
        }
    };
    if differs.is_some() {
        return Ok(differs);
    }
    Ok((counted(&dir.xattrs(name)?) != counted(xattrs)).then_some("extended attributes or access list"))
}

/// The attributes that are the file's own, in a form that can be compared. Others (labels of the host's security) the
/// host gives as it likes.
fn counted(xattrs: &[Xattr]) -> BTreeMap<&[u8], Vec<u8>> {
    let ours = xattrs.iter().filter(|(name, _)| is_counted(name));
    ours.filter_map(|(name, value)| {
        let value = match AclKind::of(name) {
            Some(kind) => canonical_acl(kind, value)?,
            None => value.clone(),
        };
        Some((name.as_slice(), value))
    })
    .collect()
}

pub(super) fn is_counted(name: &[u8]) -> bool {
    AclKind::of(name).is_some()
        || name == b"security.capability"
        || name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
}

/// Whether a file holds what the version says, byte for byte, with nothing but zeroes in its holes.
pub(super) fn same_contents(
    reader: Reader<'_>,
    file: &File,
    attr: &Attr,
) -> std::result::Result<bool, Trouble> {
    let (mut next, mut failed, mut same) = (0, None, true);
    let read = reader.data(attr, &mut |at, bytes| {
        let found = is_zero(file, next..at).and_then(|zero| Ok(zero && holds(file, at, bytes)?));
        next = at + bytes.len() as u64;
        match found {
            Ok(true) => return Ok(()),
            Ok(false) => same = false,
            Err(e) => failed = Some(e),
        }
        Err(fs::Error::Os(libc::ECANCELED)) // that is enough
    });
    if let Some(e) = failed {
        return Err(e.into());
    }
    if !same {
        return Ok(false);
    }
    read?;
    Ok(is_zero(file, next..attr.inode.size)?)
}

fn holds(file: &File, at: u64, bytes: &[u8]) -> io::Result<bool> {
    let mut there = vec![0; bytes.len()];
    match file.read_exact_at(&mut there, at) {
        Ok(()) => Ok(there == bytes),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether nothing but zeroes lies there. Holes are passed over.
fn is_zero(file: &File, range: Range<u64>) -> io::Result<bool> {
    let mut at = range.start;
    let mut there = Vec::new();
    while at < range.end {
        // SAFETY: takes a descriptor that is open as long as `file`, and numbers.
        let data = unsafe { libc::lseek(file.as_raw_fd(), at.cast_signed(), libc::SEEK_DATA) };
        match u64::try_from(data) {
            Ok(data) => at = data,
            Err(_) => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENXIO) => return Ok(true),
                e => return Err(e),
            },
        }
        if at >= range.end {
            return Ok(true);
        }
        there.resize((range.end - at).min(PIECE) as usize, 0);
        match file.read_at(&mut there, at)? {
            0 => return Ok(true),
            len if there.iter().take(len).any(|byte| *byte != 0) => return Ok(false),
            len => at += len as u64,
        }
    }
    Ok(true)
}

/// What was written to a file: where, and a hash over all of it.
#[derive(Default)]
pub(super) struct Written {
    hasher: Hasher,
    pieces: Vec<Range<u64>>,
    size: u64,
    /// Bytes written.
    pub bytes: u64,
}

impl Written {
    /// Takes note of bytes; they come in the order of their places.
    pub fn note(&mut self, at: u64, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        let end = at + bytes.len() as u64;
        match self.pieces.last_mut() {
            Some(last) if last.end == at => last.end = end,
            _ => self.pieces.push(at..end),
        }
    }

    /// The file is so long now.
    pub fn ends(&mut self, size: u64) {
        self.size = size;
    }

    /// Whether the file holds it, read from its disk and not from memory, as far as the system does us this favour.
    pub fn is_in(&self, file: &File) -> io::Result<bool> {
        // SAFETY: takes a descriptor that is open as long as `file`, and numbers. It is advice: what comes of it is not
        // wanted.
        let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if file.metadata()?.len() != self.size {
            return Ok(false);
        }
        let (mut hasher, mut there) = (Hasher::default(), Vec::new());
        for piece in &self.pieces {
            let mut at = piece.start;
            while at < piece.end {
                there.resize((piece.end - at).min(PIECE) as usize, 0);
                file.read_exact_at(&mut there, at)?;
                hasher.update(&there);
                at += there.len() as u64;
            }
        }
        let (there, written): (Hash, Hash) = (hasher.finish(), self.hasher.finish());
        Ok(there == written)
    }
}

/// The number of a device as the system's calls have it, from how FUSE has it: 12 bits major, 20 bits minor.
pub(super) fn kernel_device(rdev: u32) -> u64 {
    let (major, minor) = ((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00));
    libc::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_written_is_found_again_and_damage_is_not_taken_for_it() {
        let mut file = tempfile::tempfile().unwrap();
        let written = || {
            let mut written = Written::default();
            written.note(0, b"abc");
            written.note(3, b"def");
            written.note(1 << 20, b"ghi");
            written.ends(2 << 20);
            written
        };
        assert_eq!((written().pieces.len(), written().bytes), (2, 9));
        file.write_all(b"abcdef").unwrap();
        file.write_all_at(b"ghi", 1 << 20).unwrap();
        assert!(!written().is_in(&file).unwrap(), "another length");
        file.set_len(2 << 20).unwrap();
        assert!(written().is_in(&file).unwrap());
        file.write_all_at(b"x", (1 << 20) + 2).unwrap();
        assert!(!written().is_in(&file).unwrap(), "one byte is another");
        assert!(is_zero(&file, 6..1 << 20).unwrap() && is_zero(&file, (1 << 20) + 3..2 << 20).unwrap());
        assert!(!is_zero(&file, 6..2 << 20).unwrap());
        assert!(holds(&file, 0, b"abcdef").unwrap() && !holds(&file, (2 << 20) - 1, b"abc").unwrap());
    }

    #[test]
    fn attributes_count_as_far_as_they_are_the_files_own() {
        let xattr = |name: &[u8], value: &[u8]| (name.to_vec(), value.to_vec());
        let list = |id: u32| {
            let entries = [(1u16, 7u16, id), (2, 6, 9), (4, 5, id), (16, 7, id), (32, 5, id)];
            let mut out = 2u32.to_le_bytes().to_vec();
            for (tag, perm, id) in entries {
                out.extend([tag.to_le_bytes(), perm.to_le_bytes()].concat());
                out.extend(id.to_le_bytes());
            }
            out
        };
        let name = AclKind::Access.name();
        let one = [xattr(name, &list(0)), xattr(b"security.selinux", b"a"), xattr(b"user.x", b"1")];
        let two = [xattr(b"user.x", b"1"), xattr(name, &list(u32::MAX)), xattr(b"security.selinux", b"b")];
        assert_eq!(counted(&one), counted(&two));
        assert_ne!(counted(&one), counted(&two[..1]), "no access list");
        assert_ne!(counted(&one[..2]), counted(&two), "one attribute less");
    }
}
