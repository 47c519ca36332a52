//! Targets for what lies in the tree: pages, whole trees of any pages, deltas, keys, values.
//! Invariant: as in `fuzz.rs`; a tree answers any request over any pages in bounded time.

use bytes::Bytes;
use embassyfs::log::{Error, Frames, Result};
use embassyfs::tree::page::{Page, Run};
use embassyfs::tree::value::{
    Dirent, Entry, Extent, Inode, decode_orphan, decode_xattr, encode_orphan, encode_xattr,
};
use embassyfs::tree::key::{self, KeyRef};
use embassyfs::tree::{Cursor, Delta, Levels, Source, Tree, Value, delta as deltas};
use embassyfs::types::{FrameKind, FramePtr, Seq};

const AT: FramePtr = FramePtr { seq: Seq(1), offset: 96, len: 1000 };

pub fn page(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(page) = Page::parse(bytes, AT) else { return };
    for i in 0..page.count().min(100) {
        let (key, entry) = (page.key(i), page.entry(i));
        assert_eq!(key.is_ok(), entry.is_ok());
        let _ = (page.value(i), page.child(i));
    }
    let _ = page.entry(page.count());
    for key in [&data[..data.len().min(9)], b"", &[0xff; 20]] {
        let _ = (page.search(key), page.child_of(key));
    }
    if page.verify().is_ok() {
        let mut run = Run::default();
        for i in 0..page.count() {
            let (key, value) = page.entry(i).expect("verified");
            assert_eq!(page.search(key).expect("verified"), Ok(i));
            run.push(key, value);
        }
        let mut again = Vec::new();
        run.encode(page.level(), 0..run.count(), &mut again);
        assert_eq!(again, data);
    }
}

/// Pages that refer to each other by number, in segment 1 at offset 96 + 64 times the number.
struct Pages(Vec<Bytes>);

impl Frames for Pages {
    fn get(&self, ptr: FramePtr, _: FrameKind) -> Result<Bytes> {
        let number = (ptr.offset.wrapping_sub(96) / 64) as usize;
        self.0.get(number).cloned().ok_or_else(|| Error::Missing(vec![ptr]))
    }
}

fn ptr_of(number: usize) -> FramePtr {
    FramePtr { seq: Seq(1), offset: 96 + 64 * number as u32, len: 1000 }
}

/// Pages, each behind its length (u16); the first is the root. Three requests of all kinds, and a merge.
pub fn tree(data: &[u8]) {
    let mut pages = Vec::new();
    let mut rest = data;
    while let Some((len, more)) = rest.split_first_chunk::<2>() {
        let (page, more) = more.split_at(more.len().min(usize::from(u16::from_le_bytes(*len))));
        pages.push(Bytes::copy_from_slice(page));
        rest = more;
    }
    let pages = Pages(pages);
    let tree = Tree { root: Some(ptr_of(0)) };
    let (lo, middle, hi) = (&[][..], &[0, 0, 0, 0, 0, 0, 0, 2][..], &[0xff; 12][..]);
    let _ = tree.get(&pages, middle);
    for (from, to) in [(lo, hi), (middle, hi), (lo, middle)] {
        if let Ok(found) = tree.range(&pages, from, to, 1000) {
            assert!(found.is_sorted_by(|a, b| a.0 < b.0));
            assert!(found.iter().all(|(key, _)| key.as_slice() >= from && key.as_slice() < to));
        }
        let _ = tree.last(&pages, from, to);
    }
    let mut cursor = Cursor::new(lo.to_vec()..hi.to_vec());
    while cursor.next_batch(&tree, &pages, 2).is_ok_and(|batch| !batch.is_empty()) {}
    let value = |byte| Some(Value::from([byte; 9].as_slice()));
    let changes: Delta =
        [(middle.to_vec(), value(1)), (vec![0, 1], None), (vec![1; 9], value(2))].into_iter().collect();
    let levels = Levels { maps: &[&changes], tree: &tree, frames: &pages };
    let _ = (levels.range(lo, hi, usize::MAX), levels.last(lo, hi));
    let nothing = |_: &[FramePtr]| Err(Error::Refused("there is no store".into()));
    let source = Source { frames: &pages, fetch: &nothing };
    let mut written = 0;
    let mut write = |_: &[u8]| {
        written += 1;
        Ok(ptr_of(pages.0.len() + written))
    };
    let _ = tree.merge(source, &changes, 256, &mut write);
}

/// One or two parts; the first two bytes are the length of the first.
pub fn delta(data: &[u8]) {
    let Some((len, rest)) = data.split_first_chunk::<2>() else { return };
    let (first, second) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
    let parts: Vec<&[u8]> = [first, second].into_iter().filter(|part| !part.is_empty()).collect();
    let Ok((counters, changes)) = deltas::decode(&parts) else { return };
    assert!(changes.is_sorted_by(|a, b| a.0 < b.0));
    let map: Delta = changes.iter().cloned().collect();
    let again = deltas::encode(&counters, &map);
    assert_eq!(deltas::decode(&again).expect("encoded a moment ago"), (counters, changes));
    if parts.len() == 1 {
        assert_eq!(again, parts);
    }
}

pub fn key(data: &[u8]) {
    let Some(parsed) = key::parse(data) else { return };
    let again = match parsed {
        KeyRef::Inode(ino) => key::inode(ino),
        KeyRef::Dirent { dir, name } => key::dirent(dir, name),
        KeyRef::Entry { dir, id } => key::entry(dir, id),
        KeyRef::Xattr { ino, name } => key::xattr(ino, name),
        KeyRef::Extent { ino, off } => key::extent(ino, off),
        KeyRef::Orphan(ino) => key::orphan(ino),
    };
    assert_eq!(again, data);
    assert!(key::everything().contains(&again));
}

pub fn value(data: &[u8]) {
    if let Ok(inode) = Inode::decode(data) {
        assert_eq!(&*inode.encode(), data);
    }
    if let Ok(dirent) = Dirent::decode(data) {
        assert_eq!(&*dirent.encode(), data);
    }
    if let Ok(entry) = Entry::decode(data) {
        assert_eq!(&*entry.encode(), data);
    }
    if let Ok(extent) = Extent::decode(data) {
        assert_eq!(&*extent.encode(), data);
        assert!(!extent.is_empty());
    }
    if let Ok(bytes) = decode_xattr(data) {
        assert_eq!(&*encode_xattr(bytes), data);
    }
    if decode_orphan(data).is_ok() {
        assert_eq!(&*encode_orphan(), data);
    }
}

/// Inputs that are good, or nearly.
pub fn seeds(mut put: impl FnMut(&str, &[u8])) {
    for (name, bytes) in crate::seeds::tree_fixtures() {
        let target = match name.split('-').next().unwrap_or_default() {
            "key" => "key",
            "page" => "page",
            "root" | "checkpoint" => "checkpoint",
            "delta" => {
                put("delta", &[&(bytes.len() as u16).to_le_bytes()[..], &bytes].concat());
                continue;
            }
            _ => "value",
        };
        put(target, &bytes);
        if name == "root" {
            put("checkpoint", &crate::seeds::checkpoint_plain(&bytes));
        }
    }
    let leaf = |keys: &[u8]| encoded(0, keys.iter().map(|k| (vec![*k], vec![7; 9])));
    let inner = |level, children: &[(u8, usize)]| {
        encoded(level, children.iter().map(|(k, number)| (vec![*k], pointer(*number))))
    };
    let pages = |all: &[Vec<u8>]| -> Vec<u8> {
        all.iter().flat_map(|page| [&(page.len() as u16).to_le_bytes()[..], page].concat()).collect()
    };
    put("tree", &pages(&[leaf(&[0, 1, 5])]));
    put("tree", &pages(&[inner(1, &[(0, 1), (5, 2)]), leaf(&[0, 1, 2]), leaf(&[5, 6, 7])]));
    put("tree", &pages(&[inner(2, &[(0, 1), (5, 2)]), inner(1, &[(0, 3)]), inner(1, &[(5, 4)]), leaf(&[0]), leaf(&[5])]));
    put("tree", &pages(&[inner(2, &[(0, 1), (5, 1)]), inner(1, &[(0, 2), (5, 2)]), leaf(&[0, 5])]));
}

fn encoded(level: u8, entries: impl Iterator<Item = (Vec<u8>, Vec<u8>)>) -> Vec<u8> {
    let mut run = Run::default();
    entries.for_each(|(key, value)| run.push(&key, &value));
    let mut out = Vec::new();
    run.encode(level, 0..run.count(), &mut out);
    out
}

fn pointer(number: usize) -> Vec<u8> {
    let ptr = ptr_of(number);
    [&ptr.seq.0.to_le_bytes()[..], &ptr.offset.to_le_bytes(), &ptr.len.to_le_bytes()].concat()
}
