//! Each thing that can be wrong in a tree whose frames all open is found, and a right one has none of it.

use super::*;
use crate::log::Frames;
use crate::tree::Delta;
use crate::types::{FrameKind, Seq, Timestamp};
use bytes::Bytes;

struct NoFrames;

impl Frames for NoFrames {
    fn get(&self, _: FramePtr, _: FrameKind) -> Result<Bytes> {
        Err(Error::corrupt("a frame", "there is none"))
    }
}

const ROOT: Ino = Ino::ROOT;
const DIR: Ino = Ino(2);
const FILE: Ino = Ino(3);

fn inode(body: Body, nlink: u32, size: u64) -> Inode {
    let t = Timestamp::default();
    Inode { mode: 0o644, uid: 0, gid: 0, nlink, size, flags: 0, atime: t, mtime: t, ctime: t, btime: t, body }
}

fn directory(parent: Ino, nlink: u32, entries: u64) -> Inode {
    inode(Body::Directory { parent, next_entry: 9, entries }, nlink, 0)
}

fn name(tree: &mut Delta, dir: Ino, id: u64, name: &[u8], ino: Ino, kind: FileType) {
    tree.insert(key::dirent(dir, name), Some(Dirent { entry: id, ino, kind }.encode()));
    tree.insert(key::entry(dir, id), Some(Entry { ino, kind, name }.encode()));
}

fn stored(len: u32) -> Extent<'static> {
    Extent::Stored { ptr: FramePtr { seq: Seq(7), offset: 96, len: 200 }, from: 0, len }
}

/// A root with a directory, which holds a file of 100 bytes with two names.
fn whole() -> Delta {
    let mut tree = Delta::new();
    tree.insert(key::inode(ROOT), Some(directory(ROOT, 3, 2).encode()));
    tree.insert(key::inode(DIR), Some(directory(ROOT, 2, 1).encode()));
    tree.insert(key::inode(FILE), Some(inode(Body::Regular, 2, 100).encode()));
    tree.insert(key::extent(FILE, 0), Some(stored(100).encode()));
    name(&mut tree, ROOT, 3, b"dir", DIR, FileType::Directory);
    name(&mut tree, ROOT, 4, b"file", FILE, FileType::Regular);
    name(&mut tree, DIR, 3, b"link", FILE, FileType::Regular);
    tree
}

const COUNTERS: Counters = Counters { next_ino: 4, live_bytes: 100, inodes: 3 };

/// What is found in `tree`, whose only frame holds `frame_len` bytes.
fn found(tree: &Delta, counters: Counters, frame_len: Result<u64>) -> Vec<String> {
    let none = Tree::default();
    let levels = Levels { maps: &[tree], tree: &none, frames: &NoFrames };
    let mut frame = |ptr: FramePtr| match &frame_len {
        Ok(len) => Ok(*len),
        Err(_) => Err(Error::corrupt(format!("{}", ptr.seq), "does not open")),
    };
    let checked =
        check(&levels, counters, &|_| Ok(()), &mut frame, &mut |_| {}).expect("nothing is asked of a store");
    checked.findings.into_iter().map(|f| format!("{}: {}", f.object, f.detail)).collect()
}

#[test]
fn a_right_tree_has_no_findings() {
    assert_eq!(found(&whole(), COUNTERS, Ok(100)), Vec::<String>::new());
}

#[test]
fn every_kind_of_wrong_is_found() {
    type Change = fn(&mut Delta);
    let cases: &[(&str, Change)] = &[
        ("link count differs by 1", |t| {
            t.insert(key::inode(FILE), Some(inode(Body::Regular, 3, 100).encode()));
        }),
        ("link count differs by -1", |t| {
            t.insert(key::inode(ROOT), Some(directory(ROOT, 2, 2).encode()));
        }),
        ("by name and by id do not agree", |t| {
            t.remove(&key::dirent(DIR, b"link"));
        }),
        ("by name and by id do not agree", |t| {
            let other = Entry { ino: FILE, kind: FileType::Regular, name: b"other" };
            t.insert(key::entry(DIR, 3), Some(other.encode()));
        }),
        ("says it has 5 entries", |t| {
            t.insert(key::inode(DIR), Some(directory(ROOT, 2, 5).encode()));
        }),
        ("would give out again", |t| {
            name(t, DIR, 9, b"late", FILE, FileType::Regular);
        }),
        ("has its name elsewhere", |t| {
            t.insert(key::inode(DIR), Some(directory(FILE, 2, 1).encode()));
        }),
        ("cannot be reached from the root", |t| {
            name(t, DIR, 4, b"self", DIR, FileType::Directory);
            t.insert(key::inode(DIR), Some(directory(DIR, 4, 2).encode()));
        }),
        ("of another type than its name says", |t| {
            name(t, DIR, 3, b"link", FILE, FileType::Fifo);
        }),
        ("has a name, but is not there", |t| {
            name(t, DIR, 4, b"lost", Ino(77), FileType::Regular);
        }),
        ("but is not there itself", |t| {
            t.insert(key::extent(Ino(50), 0), Some(stored(1).encode()));
        }),
        ("over each other, or beyond its end", |t| {
            t.insert(key::extent(FILE, 50), Some(stored(50).encode()));
        }),
        ("over each other, or beyond its end", |t| {
            t.insert(key::extent(FILE, 0), Some(stored(101).encode()));
        }),
        ("has a hole, and says", |t| {
            t.insert(key::extent(FILE, 0), Some(stored(99).encode()));
        }),
        ("has extended attributes, and says", |t| {
            t.insert(key::xattr(FILE, b"user.a"), Some(crate::tree::value::encode_xattr(b"1")));
        }),
        ("has entries, but is no directory", |t| {
            name(t, FILE, 3, b"below", FILE, FileType::Regular);
        }),
        ("contents, but is no regular file", |t| {
            t.insert(key::extent(DIR, 0), Some(stored(1).encode()));
        }),
        ("no known form", |t| {
            t.insert(vec![0, 0, 0, 0, 0, 0, 0, 9, 99], Some(crate::tree::value::encode_orphan()));
        }),
        ("2 inodes", |_| {}),
        ("90 bytes", |_| {}),
        ("the next inode is 3", |_| {}),
    ];
    for (want, change) in cases {
        let mut tree = whole();
        change(&mut tree);
        let counters = match *want {
            "2 inodes" => Counters { inodes: 2, ..COUNTERS },
            "90 bytes" => Counters { live_bytes: 90, ..COUNTERS },
            "the next inode is 3" => Counters { next_ino: 3, ..COUNTERS },
            _ => COUNTERS,
        };
        let found = found(&tree, counters, Ok(1000));
        assert!(found.iter().any(|line| line.contains(want)), "{want}: {found:?}");
    }
}

#[test]
fn contents_that_are_not_there_are_named_with_their_path() {
    let short = found(&whole(), COUNTERS, Ok(99));
    assert!(
        short
            .iter()
            .any(|line| line.starts_with("log/0000000000000007") && line.contains("99 bytes where 100"))
    );
    let gone = found(&whole(), COUNTERS, Err(Error::corrupt("", "")));
    assert!(gone.iter().any(|line| line.contains("does not open")), "{gone:?}");
    assert!(
        gone.iter()
            .any(|line| line == "inode 3: damaged: it is file" || line == "inode 3: damaged: it is dir/link")
    );
}
