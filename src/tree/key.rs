//! The keys of the tree: inode number (big endian) | kind | rest, so that all that belongs to one inode lies together
//! and its parts lie in the order they are read in.
//! Invariant: a key's bytes compare as the things they name do; a stored key is never empty.

use crate::types::Ino;
use std::ops::Range;

/// A key as it is stored.
pub type Key = Vec<u8>;

/// The keys from `start` up to, not including, `end`.
pub type KeyRange = Range<Key>;

const INODE: u8 = 1;
const DIRENT: u8 = 2;
const ENTRY: u8 = 3;
const XATTR: u8 = 4;
const EXTENT: u8 = 5;
const ORPHAN: u8 = 6;

/// Above every kind: ends the range of one inode's keys.
const END: u8 = 0xff;

/// Orphans are listed under this number, which no inode has.
const NOBODY: Ino = Ino(0);

/// What a key names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyRef<'a> {
    /// The attributes of an inode.
    Inode(Ino),
    /// The directory entry of this name.
    Dirent {
        /// Directory.
        dir: Ino,
        /// Name in it.
        name: &'a [u8],
    },
    /// The directory entry with this id (the cookie of readdir).
    Entry {
        /// Directory.
        dir: Ino,
        /// Entry id.
        id: u64,
    },
    /// An extended attribute.
    Xattr {
        /// Whose.
        ino: Ino,
        /// Name with its namespace.
        name: &'a [u8],
    },
    /// The piece of a file that starts at this offset.
    Extent {
        /// File.
        ino: Ino,
        /// Offset in the file.
        off: u64,
    },
    /// An inode without a name that is still open.
    Orphan(Ino),
}

fn make(ino: Ino, kind: u8, rest: &[u8]) -> Key {
    let mut key = Vec::with_capacity(9 + rest.len());
    key.extend_from_slice(&ino.0.to_be_bytes());
    key.push(kind);
    key.extend_from_slice(rest);
    key
}

fn kind_range(ino: Ino, kind: u8) -> KeyRange {
    make(ino, kind, &[])..make(ino, kind + 1, &[])
}

/// Key of the attributes of `ino`.
pub fn inode(ino: Ino) -> Key {
    make(ino, INODE, &[])
}

/// Key of the entry called `name` in `dir`.
pub fn dirent(dir: Ino, name: &[u8]) -> Key {
    make(dir, DIRENT, name)
}

/// Key of the entry with this id in `dir`.
pub fn entry(dir: Ino, id: u64) -> Key {
    make(dir, ENTRY, &id.to_be_bytes())
}

/// Key of the extended attribute `name` of `ino`.
pub fn xattr(ino: Ino, name: &[u8]) -> Key {
    make(ino, XATTR, name)
}

/// Key of the extent of `ino` that starts at `off`.
pub fn extent(ino: Ino, off: u64) -> Key {
    make(ino, EXTENT, &off.to_be_bytes())
}

/// Key that marks `ino` as an orphan.
pub fn orphan(ino: Ino) -> Key {
    make(NOBODY, ORPHAN, &ino.0.to_be_bytes())
}

/// The entries of `dir` by name.
pub fn dirents(dir: Ino) -> KeyRange {
    kind_range(dir, DIRENT)
}

/// The entries of `dir` whose id is greater than `id`, in the order of their ids.
pub fn entries_after(dir: Ino, id: u64) -> KeyRange {
    let end = make(dir, ENTRY + 1, &[]);
    match id.checked_add(1) {
        Some(next) => entry(dir, next)..end,
        None => end.clone()..end,
    }
}

/// The extended attributes of `ino`.
pub fn xattrs(ino: Ino) -> KeyRange {
    kind_range(ino, XATTR)
}

/// The extents of `ino` that start in `offsets`. The extent that covers `offsets.start` may start before it:
/// [`Levels::last`](super::Levels::last) over `extents(ino, 0..offsets.start + 1)` finds it.
pub fn extents(ino: Ino, offsets: Range<u64>) -> KeyRange {
    extent(ino, offsets.start)..extent(ino, offsets.end)
}

/// Everything that is stored under `ino`.
pub fn all_of(ino: Ino) -> KeyRange {
    make(ino, 0, &[])..make(ino, END, &[])
}

/// All orphans.
pub fn orphans() -> KeyRange {
    kind_range(NOBODY, ORPHAN)
}

/// Every key there is.
pub fn everything() -> KeyRange {
    Key::new()..make(Ino(u64::MAX), END, &[])
}

/// What `key` names; `None` when it is no key of this format.
pub fn parse(key: &[u8]) -> Option<KeyRef<'_>> {
    let (ino, rest) = key.split_first_chunk::<8>()?;
    let (kind, rest) = rest.split_first()?;
    let ino = Ino(u64::from_be_bytes(*ino));
    let number = || Some(u64::from_be_bytes(rest.try_into().ok()?));
    let name = || Some(rest).filter(|name| !name.is_empty());
    match (ino, *kind) {
        (NOBODY, ORPHAN) => Some(KeyRef::Orphan(Ino(number()?))),
        (NOBODY, _) => None,
        (_, INODE) => rest.is_empty().then_some(KeyRef::Inode(ino)),
        (_, DIRENT) => Some(KeyRef::Dirent { dir: ino, name: name()? }),
        (_, ENTRY) => Some(KeyRef::Entry { dir: ino, id: number()? }),
        (_, XATTR) => Some(KeyRef::Xattr { ino, name: name()? }),
        (_, EXTENT) => Some(KeyRef::Extent { ino, off: number()? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_inode_then_kind_then_rest() {
        let two = Ino(2);
        let keys = [
            orphan(Ino(9)),
            inode(Ino::ROOT),
            inode(two),
            dirent(two, b"a"),
            dirent(two, b"a\0"),
            dirent(two, b"b"),
            entry(two, 1),
            entry(two, 256),
            xattr(two, b"user.a"),
            extent(two, 0),
            extent(two, u64::MAX),
            inode(Ino(256)),
            inode(Ino(u64::MAX)),
        ];
        assert!(keys.is_sorted());
        assert!(keys.iter().all(|k| everything().contains(k) && parse(k).is_some()));
        assert_eq!(keys.iter().filter(|k| all_of(two).contains(*k)).count(), 9);
        assert!(all_of(Ino(u64::MAX)).contains(&extent(Ino(u64::MAX), u64::MAX)));
    }

    #[test]
    fn ranges_hold_what_they_say() {
        let ino = Ino(5);
        assert!(!entries_after(ino, 7).contains(&entry(ino, 7)));
        assert!(entries_after(ino, 7).contains(&entry(ino, 8)));
        assert!(entries_after(ino, 7).contains(&entry(ino, u64::MAX)));
        assert!(entries_after(ino, u64::MAX).is_empty());
        assert!(xattrs(ino).contains(&xattr(ino, &[0xff; 255])));
        assert!(dirents(ino).contains(&dirent(ino, &[0xff; 255])));
        assert!(!extents(ino, 4..8).contains(&extent(ino, 8)));
        assert!(orphans().contains(&orphan(Ino(u64::MAX))));
    }

    #[test]
    fn parse_inverts_the_constructors_and_refuses_the_rest() {
        let ino = Ino(77);
        assert_eq!(parse(&inode(ino)), Some(KeyRef::Inode(ino)));
        assert_eq!(parse(&dirent(ino, b"n")), Some(KeyRef::Dirent { dir: ino, name: b"n" }));
        assert_eq!(parse(&entry(ino, 3)), Some(KeyRef::Entry { dir: ino, id: 3 }));
        assert_eq!(parse(&xattr(ino, b"user.x")), Some(KeyRef::Xattr { ino, name: b"user.x" }));
        assert_eq!(parse(&extent(ino, 4096)), Some(KeyRef::Extent { ino, off: 4096 }));
        assert_eq!(parse(&orphan(ino)), Some(KeyRef::Orphan(ino)));
        let longer = [inode(ino), vec![0]].concat();
        let orphan_of_somebody = make(ino, ORPHAN, &[0; 8]);
        for bad in
            [&longer[..], &orphan_of_somebody, b"", &longer[..8], &entry(ino, 3)[..16], &dirent(ino, b"")]
        {
            assert_eq!(parse(bad), None);
        }
    }
}
