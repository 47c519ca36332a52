//! A whole volume against the model: every name, attribute, extended attribute and byte.
//! Invariant: nothing is taken from the file system on trust; it says in words what differs, the first thing first.

use super::common::World;
use super::reference::{Entry, Model, Node};
use embassyfs::fs::{Attr, DirItem, Fs, Result as FsResult, Seek};
use embassyfs::replica::volume::Volume;
use embassyfs::tree::value::{Body, FileType};
use embassyfs::types::Ino;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::Range;

/// `Err` says what differs.
pub type Same = Result<(), String>;

/// Bytes looked at on each side of a hole's ends.
const EDGE: u64 = 64;
/// Bytes of a file read at once.
const READ: u64 = 100_000;

pub fn same<T: PartialEq + Debug>(what: impl Fn() -> String, found: T, expected: T) -> Same {
    if found == expected {
        return Ok(());
    }
    Err(format!("{}: found {found:?}, the model has {expected:?}", what()))
}

/// A volume to look at.
pub struct View<'a> {
    pub world: &'a World,
    pub volume: &'a Volume,
    /// Entries asked for at once.
    pub batch: usize,
    /// The cookie of each arrival, as first seen.
    pub cookies: &'a mut BTreeMap<u64, u64>,
}

impl View<'_> {
    fn run<T>(&self, what: impl Fn() -> String, op: impl FnMut(&Fs) -> FsResult<T>) -> Result<T, String> {
        self.world.run(self.volume, op).map_err(|e| format!("{}: errno {} ({e})", what(), e.errno()))
    }

    /// Everything that can be reached by names, then what has none, then the counters.
    pub fn compare(&mut self, model: &Model) -> Same {
        let mut seen = BTreeSet::new();
        let mut dirs = vec![Ino::ROOT];
        let root = self.run(|| "getattr of the root".into(), |fs| fs.getattr(Ino::ROOT))?;
        self.compare_inode(model, &root)?;
        while let Some(dir) = dirs.pop() {
            for entry in self.compare_dir(model, dir)? {
                let what = || format!("lookup of {:?} in {dir:?}", entry.name);
                let attr = self.run(what, |fs| fs.lookup(dir, &entry.name))?;
                same(what, attr.ino, entry.ino)?;
                if seen.insert(entry.ino) {
                    self.compare_inode(model, &attr)?;
                    if attr.inode.kind() == FileType::Directory {
                        dirs.push(entry.ino);
                    }
                }
            }
        }
        let orphans = model.orphans();
        for ino in &orphans {
            let attr = self.run(|| format!("getattr of the orphan {ino:?}"), |fs| fs.getattr(*ino))?;
            self.compare_inode(model, &attr)?;
        }
        same(|| "inodes reached".into(), seen.len() + 1 + orphans.len(), model.nodes.len())?;
        same(|| "usage().inodes".into(), self.volume.fs.usage().inodes, model.nodes.len() as u64)?;
        if self.volume.durable().is_some() {
            let mut listed = self.volume.fs.orphans();
            listed.sort();
            same(|| "orphans()".into(), listed, orphans)?;
        }
        Ok(())
    }

    /// The list of a directory; gives its entries.
    fn compare_dir(&mut self, model: &Model, dir: Ino) -> Result<Vec<Entry>, String> {
        let entries = model.nodes[&dir].entries.clone();
        let mut items: Vec<DirItem> = Vec::new();
        let mut attrs = Vec::new();
        loop {
            let cookie = items.last().map_or(0, |item| item.cookie);
            let what = || format!("readdir of {dir:?} after {cookie}");
            let more = self.run(what, |fs| fs.readdir_plus(dir, cookie, self.batch))?;
            if more.is_empty() {
                break;
            }
            for (item, attr) in more {
                items.push(item);
                attrs.push(attr);
            }
        }
        compare_list(model, dir, 0, &items, &entries)?;
        same(|| format!("entries of {dir:?}"), items.len(), entries.len() + 2)?;
        for (item, attr) in items.iter().zip(&attrs).skip(2) {
            same(|| format!("readdir's inode of {item:?}"), attr.ino, item.ino)?;
            compare_attr(model, attr)?;
        }
        for (item, entry) in items[2..].iter().zip(&entries) {
            let first = *self.cookies.entry(entry.arrival).or_insert(item.cookie);
            same(|| format!("cookie of {:?} in {dir:?}", entry.name), item.cookie, first)?;
        }
        Ok(entries)
    }

    fn compare_inode(&self, model: &Model, attr: &Attr) -> Same {
        let ino = attr.ino;
        compare_attr(model, attr)?;
        let node = &model.nodes[&ino];
        let list = self.run(|| format!("listxattr of {ino:?}"), |fs| fs.listxattr(ino))?;
        same(|| format!("attributes of {ino:?}"), list, model.listxattr(ino).unwrap_or_default())?;
        for (name, value) in &node.xattrs {
            let what = || format!("attribute {name:?} of {ino:?}");
            let found = self.run(what, |fs| fs.getxattr(ino, name))?;
            if found != *value {
                return Err(format!(
                    "{}: {} bytes, others than the {} expected",
                    what(),
                    found.len(),
                    value.len()
                ));
            }
        }
        match node.kind {
            FileType::Regular => self.compare_content(ino, node),
            FileType::Symlink => {
                let target = self.run(|| format!("readlink of {ino:?}"), |fs| fs.readlink(ino))?;
                same(|| format!("target of {ino:?}"), target, node.target.to_vec())
            }
            _ => Ok(()),
        }
    }

    /// Holes where the model has holes; gives the stretches of data.
    pub fn compare_holes(&self, ino: Ino, node: &Node) -> Result<Vec<Range<u64>>, String> {
        let (size, mut at) = (node.data.size, 0);
        let mut stretches = Vec::new();
        while at < size {
            let start = match self.world.run(self.volume, |fs| fs.seek(ino, at, Seek::Data)) {
                Ok(start) => start,
                Err(e) if e.errno() == libc::ENXIO => break,
                Err(e) => return Err(format!("SEEK_DATA from {at} of {ino:?}: {e}")),
            };
            let what = || format!("SEEK_HOLE from {start} of {ino:?}");
            at = self.run(what, |fs| fs.seek(ino, start, Seek::Hole))?;
            stretches.push(start..at);
        }
        same(|| format!("data of {ino:?}"), &stretches, &node.data.stretches())?;
        Ok(stretches)
    }

    /// The model's bytes where it has data, zeros at the edges of holes, nothing behind the end.
    fn compare_content(&self, ino: Ino, node: &Node) -> Same {
        let size = node.data.size;
        let stretches = self.compare_holes(ino, node)?;
        let mut hole = 0;
        for stretch in &stretches {
            self.compare_zeros(ino, hole, stretch.start)?;
            hole = stretch.end;
            let mut at = stretch.start;
            while at < stretch.end {
                let len = READ.min(stretch.end - at);
                self.compare_bytes(ino, at, len, &node.data.read(at, len))?;
                at += len;
            }
        }
        self.compare_zeros(ino, hole, size)?;
        self.compare_bytes(ino, size, 10, &[])
    }

    /// The ends of a hole; all of it if it is short.
    fn compare_zeros(&self, ino: Ino, start: u64, end: u64) -> Same {
        let len = EDGE.min(end - start);
        self.compare_bytes(ino, start, len, &[0; EDGE as usize][..len as usize])?;
        self.compare_bytes(ino, end - len, len, &[0; EDGE as usize][..len as usize])
    }

    fn compare_bytes(&self, ino: Ino, at: u64, len: u64, expected: &[u8]) -> Same {
        let found =
            self.run(|| format!("read of {len} at {at} of {ino:?}"), |fs| fs.read(ino, at, len as usize))?;
        compare_bytes(ino, at, &found, expected)
    }
}

pub fn compare_bytes(ino: Ino, at: u64, found: &[u8], expected: &[u8]) -> Same {
    if found == expected {
        return Ok(());
    }
    let first = found.iter().zip(expected).position(|(a, b)| a != b);
    Err(format!(
        "content of {ino:?} at {at}: {} bytes, expected {}; the first that differs is at {}",
        found.len(),
        expected.len(),
        first.map_or("the end of the shorter".into(), |i| format!(
            "{} (found {}, expected {})",
            at + i as u64,
            found[i],
            expected[i]
        )),
    ))
}

/// What `readdir` gave after `cookie` against what stands in the model from there on: a beginning of it, and not less
/// than one entry unless there is none.
pub fn compare_list(model: &Model, dir: Ino, cookie: u64, items: &[DirItem], entries: &[Entry]) -> Same {
    let parent = model.nodes[&dir].parent;
    let dots = [(1, dir, &b"."[..]), (2, parent, b"..")];
    let mut expected: Vec<(Ino, &[u8], FileType)> = Vec::new();
    for (at, ino, name) in dots {
        if cookie < at {
            expected.push((ino, name, FileType::Directory));
        }
    }
    expected.extend(entries.iter().map(|entry| (entry.ino, &*entry.name, model.nodes[&entry.ino].kind)));
    if items.is_empty() && !expected.is_empty() {
        return Err(format!("readdir of {dir:?} after {cookie} gives nothing, the model has {expected:?}"));
    }
    for (i, item) in items.iter().enumerate() {
        let found = (item.ino, &*item.name, item.kind);
        let what = || format!("entry {i} after cookie {cookie} of {dir:?}");
        same(what, Some(&found), expected.get(i))?;
        let before = if i == 0 { cookie } else { items[i - 1].cookie };
        if item.cookie <= before {
            return Err(format!("{}: its cookie {} does not grow", what(), item.cookie));
        }
    }
    Ok(())
}

/// What `stat` shows of an inode.
pub fn compare_attr(model: &Model, attr: &Attr) -> Same {
    let (ino, inode) = (attr.ino, &attr.inode);
    let Some(node) = model.node(ino) else {
        return Err(format!("{ino:?} is there, and ought not to be: {inode:?}"));
    };
    let what = |field: &'static str| move || format!("{field} of {ino:?}");
    same(what("type"), inode.kind(), node.kind)?;
    same(what("mode"), inode.mode, node.mode)?;
    same(what("owner and group"), (inode.uid, inode.gid), (node.uid, node.gid))?;
    same(what("links"), inode.nlink, model.nlink(ino))?;
    same(what("device"), inode.rdev(), node.rdev)?;
    same(what("atime"), inode.atime, node.atime)?;
    same(what("mtime"), inode.mtime, node.mtime)?;
    same(what("ctime"), inode.ctime, node.ctime)?;
    same(what("btime"), inode.btime, node.btime)?;
    match &inode.body {
        Body::Regular => {
            same(what("size"), inode.size, node.data.size)?;
            same(what("blocks"), attr.blocks, node.data.data_bytes().div_ceil(4096) * 8)
        }
        Body::Symlink { .. } => same(what("size"), inode.size, node.target.len() as u64),
        Body::Directory { parent, entries, .. } => {
            same(what("parent"), *parent, node.parent)?;
            same(what("entries"), *entries, node.entries.len() as u64)
        }
        _ => Ok(()),
    }
}
