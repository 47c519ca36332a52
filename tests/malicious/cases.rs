//! The hostile volumes, one by one: what is wrong with each, and what somebody must be told of it. Here those whose keys
//! and values say what is not so.
//! Invariant: each differs from the honest volume in what its name says.

use crate::evil::{DEEP, DIR, Evil, FILE, INNER, LINK, SPARSE, State, directory, inode};
use crate::structures;
use embassyfs::tree::delta::Counters;
use embassyfs::tree::value::{self, Body, Dirent, Entry, Extent, FileType, Inode};
use embassyfs::tree::{Value, key};
use embassyfs::types::{FramePtr, Ino, Seq};

/// A hostile volume: its name, and a part of what must be told of it (empty: it may pass for a strange one).
pub type Case = (String, &'static str, Evil);

pub fn all() -> Vec<Case> {
    let mut all = Vec::new();
    for (name, needle, change) in states() {
        for (form, make) in [("log", Evil::replayed as fn(State) -> Evil), ("pages", Evil::in_pages)] {
            let mut state = Evil::honest();
            change(&mut state);
            all.push((format!("{name} ({form})"), needle, make(state)));
        }
    }
    let named = |(name, needle, evil): (&str, &'static str, Evil)| (name.to_string(), needle, evil);
    all.extend(structures::all().into_iter().map(named));
    all
}

type Change = (&'static str, &'static str, fn(&mut State));

fn put_inode(state: &mut State, ino: Ino, inode: Inode) {
    state.put(key::inode(ino), inode.encode());
}

/// What keys and values can say that is not so.
fn states() -> Vec<Change> {
    [inodes(), names(), files()].concat()
}

fn inodes() -> Vec<Change> {
    vec![
        ("a size of 2^64-1", "inode 2", |s| {
            put_inode(s, FILE, Inode { size: u64::MAX, ..inode(Body::Regular, 1) });
        }),
        ("a sparse file of 2^63-1 bytes", "", |s| {
            put_inode(
                s,
                SPARSE,
                Inode { size: i64::MAX as u64, flags: value::SPARSE, ..inode(Body::Regular, 1) },
            );
        }),
        ("mode 0", "", |s| put_inode(s, FILE, Inode { mode: 0, ..inode(Body::Regular, 1) })),
        ("no links", "", |s| put_inode(s, FILE, inode(Body::Regular, 0))),
        ("2^32-1 links of a directory", "inode 3", |s| put_inode(s, DIR, directory(Ino::ROOT, 2, u32::MAX))),
        ("2^32-1 links of a file", "inode 2", |s| put_inode(s, FILE, inode(Body::Regular, u32::MAX))),
        ("a directory of fewer links than directories", "inode 1", |s| {
            put_inode(s, Ino::ROOT, directory(Ino::ROOT, 4, 0));
        }),
        ("a directory that counts no entries", "inode 1", |s| {
            let body = Body::Directory { parent: Ino::ROOT, next_entry: 7, entries: 0 };
            put_inode(s, Ino::ROOT, inode(body, 3));
        }),
        ("a directory whose entry ids are at their end", "inode 1", |s| {
            let body = Body::Directory { parent: Ino::ROOT, next_entry: u64::MAX, entries: 4 };
            put_inode(s, Ino::ROOT, inode(body, 3));
        }),
        ("a directory whose entry ids begin anew", "", |s| {
            let body = Body::Directory { parent: Ino::ROOT, next_entry: 0, entries: 0 };
            put_inode(s, DEEP, inode(body, 2));
        }),
        ("an inode that is no inode", "inode 2", |s| s.put(key::inode(FILE), Value::from(&b"\x01"[..]))),
        ("no root directory", "Stale", |s| drop(s.changes.remove(&key::inode(Ino::ROOT)))),
        ("a root that is a file", "", |s| put_inode(s, Ino::ROOT, inode(Body::Regular, 1))),
        ("a link without a target", "inode 5", |s| {
            put_inode(s, LINK, inode(Body::Symlink { target: Vec::new() }, 1));
        }),
        ("a link with a target of a MiB", "inode 5", |s| {
            put_inode(s, LINK, inode(Body::Symlink { target: vec![b'a'; 1 << 20] }, 1));
        }),
        ("an access list that is none", "access list of inode 2", |s| {
            let flags = value::HAS_ACCESS_ACL | value::HAS_XATTR;
            put_inode(s, FILE, Inode { flags, ..inode(Body::Regular, 1) });
            s.put(key::xattr(FILE, b"system.posix_acl_access"), value::encode_xattr(b"no list"));
        }),
        ("an access list that is missing", "access list of inode 2", |s| {
            put_inode(s, FILE, Inode { flags: value::HAS_ACCESS_ACL, ..inode(Body::Regular, 1) });
        }),
        ("orphans that have names", "inode 3: is said to be without a name", |s| {
            for ino in [Ino::ROOT, FILE, DIR, Ino(99), Ino(u64::MAX)] {
                s.put(key::orphan(ino), value::encode_orphan());
            }
        }),
        ("fewer inodes counted than there are", "", |s| s.counters.inodes = 0),
        ("counters at their end", "counts", |s| {
            s.counters = Counters { next_ino: u64::MAX, live_bytes: u64::MAX, inodes: u64::MAX };
        }),
        ("next inode lower than one that is there", "next inode", |s| s.counters.next_ino = 2),
        ("next inode 0", "next inode", |s| s.counters.next_ino = 0),
        ("an attribute of 12 MiB", "", |s| {
            put_inode(s, FILE, Inode { flags: value::HAS_XATTR, ..inode(Body::Regular, 1) });
            s.put(key::xattr(FILE, b"user.large"), value::encode_xattr(&vec![0; 12 << 20]));
        }),
    ]
}

fn names() -> Vec<Change> {
    vec![
        ("a directory that is its own parent", "", |s| put_inode(s, DIR, directory(DIR, 2, 3))),
        ("two directories that are each other's parent", "inode", |s| {
            put_inode(s, DIR, directory(DEEP, 2, 3));
            put_inode(s, DEEP, directory(DIR, 0, 2));
        }),
        ("a directory in itself", "", |s| s.name(DEEP, 3, b"again", DEEP, FileType::Directory)),
        ("the root in a directory", "", |s| s.name(DEEP, 3, b"root", Ino::ROOT, FileType::Directory)),
        ("a name of an inode that is not there", "Stale", |s| {
            s.name(Ino::ROOT, 3, b"file", Ino(4711), FileType::Regular);
        }),
        ("a name of inode 0", "directory", |s| s.name(Ino::ROOT, 3, b"file", Ino(0), FileType::Regular)),
        ("a name of the highest inode", "next inode", |s| {
            s.name(Ino::ROOT, 3, b"file", Ino(u64::MAX), FileType::Regular);
            put_inode(s, Ino(u64::MAX), inode(Body::Regular, 1));
        }),
        ("a name with a slash", "directory", |s| s.name(Ino::ROOT, 3, b"../etc", FILE, FileType::Regular)),
        ("a name with a NUL", "directory", |s| s.name(Ino::ROOT, 3, b"a\0b", FILE, FileType::Regular)),
        ("the name .", "directory", |s| s.name(Ino::ROOT, 3, b".", FILE, FileType::Regular)),
        ("the name ..", "directory", |s| s.name(Ino::ROOT, 3, b"..", FILE, FileType::Regular)),
        ("a name of 65000 bytes", "directory", |s| {
            s.name(Ino::ROOT, 3, &[b'a'; 65_000], FILE, FileType::Regular);
        }),
        ("a name of 70 KiB in an entry", "directory", |s| {
            let name = vec![b'a'; 70 << 10];
            s.put(
                key::entry(Ino::ROOT, 3),
                Entry { ino: FILE, kind: FileType::Regular, name: &name }.encode(),
            );
        }),
        ("a name of the wrong type", "", |s| {
            s.name(Ino::ROOT, 3, b"file", FILE, FileType::Directory);
            s.name(Ino::ROOT, 4, b"dir", DIR, FileType::Regular);
        }),
        ("a name only among the positions", "", |s| drop(s.changes.remove(&key::dirent(Ino::ROOT, b"file")))),
        ("a name without a position", "", |s| drop(s.changes.remove(&key::entry(Ino::ROOT, 3)))),
        ("an entry that is no entry", "directory", |s| {
            s.put(key::dirent(Ino::ROOT, b"file"), Value::from(&b"x"[..]));
            s.put(key::entry(Ino::ROOT, 3), Value::from(&b"\x01"[..]));
        }),
        ("an entry at the last position", "", |s| {
            s.put(
                key::entry(DIR, u64::MAX),
                Entry { ino: FILE, kind: FileType::Regular, name: b"z" }.encode(),
            );
            s.put(
                key::dirent(DIR, b"z"),
                Dirent { entry: u64::MAX, ino: FILE, kind: FileType::Regular }.encode(),
            );
        }),
        ("keys that are no keys", "", |s| {
            for key in [&b"a"[..], &[0; 8], &[0; 9], &[0, 0, 0, 0, 0, 0, 0, 2, 77], &[0xff; 300]] {
                s.put(key.to_vec(), Value::from(&b"x"[..]));
            }
            for ino in [Ino::ROOT, FILE] {
                for kind in [0, 1, 2, 3, 4, 5, 7] {
                    s.put([&ino.0.to_be_bytes()[..], &[kind, 1]].concat(), Value::from(&b"x"[..]));
                }
            }
        }),
    ]
}

fn stored(ptr: FramePtr, from: u32, len: u32) -> Value {
    Extent::Stored { ptr, from, len }.encode()
}

fn files() -> Vec<Change> {
    const NOWHERE: FramePtr = FramePtr { seq: Seq(1), offset: 96, len: 131_096 };
    vec![
        ("an extent of a frame in a segment that is not there", "log/", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { seq: Seq(77), ..NOWHERE }, 0, 1000));
        }),
        ("an extent of a frame of 4 GiB", "extent", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { len: u32::MAX, ..NOWHERE }, 0, 1000));
        }),
        ("an extent of 15 MiB that are not there", "log/", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { len: 15 << 20, ..NOWHERE }, 0, 1000));
        }),
        ("an extent at the end of all offsets", "log/", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { offset: u32::MAX, ..NOWHERE }, 0, 1000));
        }),
        ("an extent of the header", "log/", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { offset: 0, len: 96, ..NOWHERE }, 0, 10));
        }),
        ("an extent of a frame without a length", "log/", |s| {
            s.put(key::extent(FILE, 0), stored(FramePtr { len: 0, ..NOWHERE }, 0, 10));
        }),
        ("an extent beyond its frame", "frame", |s| {
            s.put(key::extent(FILE, 0), stored(NOWHERE, 131_000, 131_072));
        }),
        ("an extent of 4 GiB", "frame", |s| s.put(key::extent(FILE, 0), stored(NOWHERE, 0, u32::MAX))),
        ("extents that overlap", "", |s| {
            for off in [1, 2, 3, 1000, 131_071, 131_073] {
                s.put(key::extent(FILE, off), stored(NOWHERE, 0, 131_072));
            }
        }),
        ("an extent at the end of all files", "", |s| {
            let size = i64::MAX as u64;
            put_inode(s, SPARSE, Inode { size, flags: value::SPARSE, ..inode(Body::Regular, 1) });
            for off in [size - 10, size - 1, size, u64::MAX - 5, u64::MAX] {
                s.put(key::extent(SPARSE, off), stored(NOWHERE, 0, 1000));
            }
        }),
        ("an extent that is none", "extent", |s| s.put(key::extent(FILE, 0), Value::from(&b"\x01\x07"[..]))),
        ("extents of a directory", "", |s| s.put(key::extent(DIR, 0), stored(NOWHERE, 0, 1000))),
        ("a record of a hundred thousand extents", "", |s| {
            put_inode(s, SPARSE, Inode { size: 1 << 20, flags: value::SPARSE, ..inode(Body::Regular, 1) });
            for off in 0..100_000 {
                s.put(key::extent(SPARSE, off), Extent::Inline { bytes: b"a" }.encode());
            }
        }),
        ("extents that are an attribute", "", |s| {
            s.put(key::xattr(INNER, b"user.x"), Value::from(&b"\x09"[..]))
        }),
    ]
}
