//! The file system as it ought to be: a map of inodes, each with its attributes, names, content.
//! Invariant: it is the specification (`docs/semantics.md` as code), so it has no cleverness: link counts are counted,
//! entries are a list in the order of their arrival, nothing is cached. An operation that errs changes nothing.

use super::sparse::Sparse;
use bytes::Bytes;
use embassyfs::fs::{Caller, NAME_MAX, NewNode};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Ino, Timestamp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is answered; an error is one of several when more than one thing is wrong with the request.
pub type Answer<T> = Result<T, Vec<i32>>;

/// A name in a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: Bytes,
    pub ino: Ino,
    /// Grows with each name that comes into any directory, and is never used twice.
    pub arrival: u64,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub kind: FileType,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub target: Bytes,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    pub xattrs: BTreeMap<Bytes, Bytes>,
    pub data: Sparse,
    /// Of a directory, in the order of arrival.
    pub entries: Vec<Entry>,
    /// Of a directory.
    pub parent: Ino,
}

impl Node {
    pub fn entry(&self, name: &[u8]) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// What a write, or being given away, takes off the mode.
    pub fn clear_set_id(&mut self) {
        self.mode &= !libc::S_ISUID;
        if self.mode & libc::S_IXGRP != 0 {
            self.mode &= !libc::S_ISGID;
        }
    }
}

#[derive(Clone, Debug)]
pub struct Model {
    pub nodes: BTreeMap<Ino, Arc<Node>>,
    /// How often the kernel holds an inode; gone with the process.
    pub held: BTreeMap<Ino, u64>,
    pub arrivals: u64,
}

/// Everything that is wrong with a request.
#[derive(Default)]
pub struct Why(Vec<i32>);

impl Why {
    pub fn when(&mut self, wrong: bool, errno: i32) {
        if wrong {
            self.0.push(errno);
        }
    }

    pub fn nothing(self) -> Answer<()> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }
}

impl Model {
    /// An empty volume.
    pub fn new(now: Timestamp) -> Model {
        let node = NewNode { kind: FileType::Directory, mode: 0o755, umask: 0, rdev: 0, target: b"" };
        let root = new_node(&node, Ino::ROOT, Caller { uid: 0, gid: 0 }, now);
        Model { nodes: BTreeMap::from([(Ino::ROOT, Arc::new(root))]), held: BTreeMap::new(), arrivals: 0 }
    }

    pub fn node(&self, ino: Ino) -> Option<&Node> {
        self.nodes.get(&ino).map(|node| &**node)
    }

    /// The node, to be changed; the caller has seen that it is there.
    pub fn change(&mut self, ino: Ino) -> &mut Node {
        Arc::make_mut(self.nodes.get_mut(&ino).expect("a node of the model"))
    }

    /// How many names an inode has.
    pub fn names(&self, ino: Ino) -> usize {
        let entries = self.nodes.values().flat_map(|node| &node.entries);
        entries.filter(|entry| entry.ino == ino).count()
    }

    /// Without a name, and alive only because the kernel holds it.
    pub fn is_orphan(&self, ino: Ino) -> bool {
        ino != Ino::ROOT && self.nodes.contains_key(&ino) && self.names(ino) == 0
    }

    /// The link count: names; for a directory 2 and one for each directory in it.
    pub fn nlink(&self, ino: Ino) -> u32 {
        let Some(node) = self.node(ino) else { return 0 };
        if node.kind != FileType::Directory {
            return self.names(ino) as u32;
        }
        if self.is_orphan(ino) {
            return 0;
        }
        let is_dir = |entry: &&Entry| self.nodes[&entry.ino].kind == FileType::Directory;
        2 + node.entries.iter().filter(is_dir).count() as u32
    }

    pub fn orphans(&self) -> Vec<Ino> {
        let mut named: Vec<Ino> =
            self.nodes.values().flat_map(|node| &node.entries).map(|entry| entry.ino).collect();
        named.push(Ino::ROOT);
        named.sort();
        self.nodes.keys().copied().filter(|ino| named.binary_search(ino).is_err()).collect()
    }

    /// The process is gone and comes again: nobody holds anything, so what has no name is freed, but for `kept`.
    pub fn restart(&mut self, kept: &[Ino]) {
        self.held.clear();
        for ino in self.orphans().into_iter().filter(|ino| !kept.contains(ino)) {
            self.nodes.remove(&ino);
        }
    }

    /// Bytes of all files that are not holes.
    pub fn used(&self) -> u64 {
        self.nodes.values().map(|node| node.data.data_bytes()).sum()
    }

    fn name_in(&self, why: &mut Why, dir: Ino, name: &[u8]) -> Option<&Entry> {
        why.when(name.len() > NAME_MAX, libc::ENAMETOOLONG);
        let node = self.node(dir);
        why.when(node.is_none(), libc::ESTALE);
        why.when(node.is_some_and(|node| node.kind != FileType::Directory), libc::ENOTDIR);
        node.and_then(|node| node.entry(name))
    }

    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Answer<Ino> {
        let mut why = Why::default();
        let found = self.name_in(&mut why, dir, name).map(|entry| entry.ino);
        why.when(found.is_none(), libc::ENOENT);
        why.nothing().map(|()| found.expect("seen above"))
    }

    /// `ino` is the number that the file system gave.
    pub fn make(
        &mut self,
        dir: Ino,
        name: &Bytes,
        node: &NewNode<'_>,
        who: Caller,
        now: Timestamp,
        ino: Ino,
    ) -> Answer<()> {
        let mut why = Why::default();
        let found = self.name_in(&mut why, dir, name).is_some();
        why.when(found, libc::EEXIST);
        why.when(self.is_orphan(dir), libc::ENOENT);
        let symlink = node.kind == FileType::Symlink;
        why.when(symlink && node.target.is_empty(), libc::ENOENT);
        why.when(symlink && node.target.len() > 4095, libc::ENAMETOOLONG);
        why.nothing()?;
        self.bear(dir, name, node, who, now, ino);
        Ok(())
    }

    fn bear(&mut self, dir: Ino, name: &Bytes, node: &NewNode<'_>, who: Caller, now: Timestamp, ino: Ino) {
        let mut new = new_node(node, dir, who, now);
        let parent = &self.nodes[&dir];
        if parent.mode & libc::S_ISGID != 0 {
            new.gid = parent.gid;
            if new.kind == FileType::Directory {
                new.mode |= libc::S_ISGID;
            }
        }
        self.nodes.insert(ino, Arc::new(new));
        self.arrive(dir, name, ino, now);
    }

    /// A name comes into a directory.
    fn arrive(&mut self, dir: Ino, name: &Bytes, ino: Ino, now: Timestamp) {
        self.arrivals += 1;
        let entry = Entry { name: name.clone(), ino, arrival: self.arrivals };
        let node = self.change(dir);
        node.entries.push(entry);
        (node.mtime, node.ctime) = (now, now);
        if self.nodes[&ino].kind == FileType::Directory {
            self.change(ino).parent = dir;
        }
    }

    /// A name leaves a directory.
    fn leave(&mut self, dir: Ino, name: &[u8], now: Timestamp) {
        let node = self.change(dir);
        node.entries.retain(|entry| entry.name != name);
        (node.mtime, node.ctime) = (now, now);
    }

    /// After a name of `ino` went: the inode goes too if it was the last and nobody holds it.
    fn lost_a_name(&mut self, ino: Ino, now: Timestamp) {
        self.change(ino).ctime = now;
        self.free_if_unused(ino);
    }

    fn free_if_unused(&mut self, ino: Ino) {
        if self.is_orphan(ino) && !self.held.contains_key(&ino) {
            self.nodes.remove(&ino);
        }
    }

    pub fn link(&mut self, ino: Ino, dir: Ino, name: &Bytes, now: Timestamp) -> Answer<()> {
        let mut why = Why::default();
        let found = self.name_in(&mut why, dir, name).is_some();
        why.when(found, libc::EEXIST);
        why.when(self.is_orphan(dir), libc::ENOENT);
        match self.node(ino) {
            None => why.when(true, libc::ESTALE),
            Some(node) => {
                why.when(node.kind == FileType::Directory, libc::EPERM);
                why.when(self.is_orphan(ino), libc::ENOENT);
            }
        }
        why.nothing()?;
        self.arrive(dir, name, ino, now);
        self.change(ino).ctime = now;
        Ok(())
    }

    /// unlink(2), or rmdir(2) if `directory`.
    pub fn remove(&mut self, dir: Ino, name: &[u8], directory: bool, now: Timestamp) -> Answer<()> {
        let mut why = Why::default();
        let found = self.name_in(&mut why, dir, name).map(|entry| entry.ino);
        why.when(found.is_none(), libc::ENOENT);
        if let Some(node) = found.and_then(|ino| self.node(ino)) {
            let is_dir = node.kind == FileType::Directory;
            why.when(is_dir && !directory, libc::EISDIR);
            why.when(!is_dir && directory, libc::ENOTDIR);
            why.when(directory && !node.entries.is_empty(), libc::ENOTEMPTY);
        }
        why.nothing()?;
        self.leave(dir, name, now);
        self.lost_a_name(found.expect("seen above"), now);
        Ok(())
    }

    /// True if `ino` is `top` or lies below it.
    fn is_below(&self, ino: Ino, top: Ino) -> bool {
        let mut at = ino;
        while at != top && at != Ino::ROOT {
            match self.node(at) {
                Some(node) if node.kind == FileType::Directory => at = node.parent,
                _ => return false,
            }
        }
        at == top
    }

    /// renameat2(2). `whiteout` is the number that the file system gave the whiteout, if it made one.
    pub fn rename(
        &mut self,
        from: &(Ino, Bytes),
        to: &(Ino, Bytes),
        flags: u32,
        who: Caller,
        now: Timestamp,
        whiteout: Ino,
    ) -> Answer<()> {
        let noreplace = flags & libc::RENAME_NOREPLACE != 0;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let leave_whiteout = flags & libc::RENAME_WHITEOUT != 0;
        let mut why = Why::default();
        why.when(flags > 7 || (exchange && (noreplace || leave_whiteout)), libc::EINVAL);
        let source = self.name_in(&mut why, from.0, &from.1).map(|entry| entry.ino);
        let target = self.name_in(&mut why, to.0, &to.1).map(|entry| entry.ino);
        why.when(source.is_none(), libc::ENOENT);
        why.when(self.is_orphan(to.0), libc::ENOENT);
        why.when(self.is_orphan(to.0), libc::ESTALE); // its own parent may be gone, too
        why.when(target.is_none() && exchange, libc::ENOENT);
        why.when(target.is_some() && noreplace, libc::EEXIST);
        let is_dir = |ino: Ino| self.nodes[&ino].kind == FileType::Directory;
        if let Some(source) = source {
            why.when(is_dir(source) && self.is_below(to.0, source), libc::EINVAL);
        }
        if let (Some(source), Some(target)) = (source, target)
            && source != target
        {
            why.when(exchange && is_dir(target) && self.is_below(from.0, target), libc::EINVAL);
            why.when(!exchange && is_dir(source) && !is_dir(target), libc::ENOTDIR);
            why.when(!exchange && !is_dir(source) && is_dir(target), libc::EISDIR);
            let full = !self.nodes[&target].entries.is_empty();
            why.when(!exchange && is_dir(source) && full, libc::ENOTEMPTY);
        }
        why.nothing()?;
        let source = source.expect("seen above");
        if target == Some(source) {
            return Ok(()); // two names of one inode: both stay
        }
        self.leave(from.0, &from.1, now);
        self.leave_if(target, to, now);
        self.arrive(to.0, &to.1, source, now);
        self.change(source).ctime = now;
        match target {
            Some(target) if exchange => {
                self.arrive(from.0, &from.1, target, now);
                self.change(target).ctime = now;
            }
            Some(target) => self.lost_a_name(target, now),
            None => {}
        }
        if leave_whiteout {
            let node = NewNode { kind: FileType::CharDevice, mode: 0, umask: 0, rdev: 0, target: b"" };
            self.bear(from.0, &from.1, &node, who, now, whiteout);
        }
        Ok(())
    }

    fn leave_if(&mut self, target: Option<Ino>, to: &(Ino, Bytes), now: Timestamp) {
        if target.is_some() {
            self.leave(to.0, &to.1, now);
        }
    }

    pub fn hold(&mut self, ino: Ino) {
        *self.held.entry(ino).or_default() += 1;
    }

    pub fn forget(&mut self, ino: Ino, n: u64) {
        if let Some(count) = self.held.get_mut(&ino) {
            *count -= n;
            if *count == 0 {
                self.held.remove(&ino);
                self.free_if_unused(ino);
            }
        }
    }
}

fn new_node(node: &NewNode<'_>, dir: Ino, who: Caller, now: Timestamp) -> Node {
    let umask = if node.kind == FileType::Symlink { 0 } else { node.umask };
    Node {
        kind: node.kind,
        mode: node.mode & !umask & 0o7777,
        uid: who.uid,
        gid: who.gid,
        rdev: match node.kind {
            FileType::CharDevice | FileType::BlockDevice => node.rdev,
            _ => 0,
        },
        target: match node.kind {
            FileType::Symlink => Bytes::copy_from_slice(node.target),
            _ => Bytes::new(),
        },
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        xattrs: BTreeMap::new(),
        data: Sparse::default(),
        entries: Vec::new(),
        parent: dir,
    }
}
