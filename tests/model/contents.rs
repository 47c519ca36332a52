//! The model's attributes, extended attributes and file contents. Invariant: that of `reference`.

use super::reference::{Answer, Model, Node, Why};
use bytes::Bytes;
use embassyfs::fs::{MAX_FILE_SIZE, SetAttr, XattrMode};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Ino, Timestamp};

const CAPABILITY: &[u8] = b"security.capability";
/// Most bytes one `copy_range` takes.
const COPY_MAX: u64 = 1 << 30;

impl Model {
    /// The inode is there and a regular file; else `of_directory` or `EINVAL`.
    fn regular(&self, why: &mut Why, ino: Ino, of_directory: i32) -> Option<&Node> {
        match self.node(ino) {
            None => why.when(true, libc::ESTALE),
            Some(node) if node.kind == FileType::Directory => why.when(true, of_directory),
            Some(node) => why.when(node.kind != FileType::Regular, libc::EINVAL),
        }
        self.node(ino)
    }

    /// A change of content: times, and what must not survive it.
    fn written(&mut self, ino: Ino, now: Timestamp) -> &mut Node {
        let node = self.change(ino);
        (node.mtime, node.ctime) = (now, now);
        node.xattrs.remove(CAPABILITY);
        node
    }

    pub fn read(&self, ino: Ino, at: u64, len: u64) -> Answer<Vec<u8>> {
        let mut why = Why::default();
        self.regular(&mut why, ino, libc::EISDIR);
        why.nothing().map(|()| self.nodes[&ino].data.read(at, len))
    }

    pub fn write(&mut self, ino: Ino, at: u64, data: &Bytes, kill: bool, now: Timestamp) -> Answer<usize> {
        let mut why = Why::default();
        self.regular(&mut why, ino, libc::EINVAL);
        let end = at.checked_add(data.len() as u64);
        why.when(end.is_none_or(|end| end > MAX_FILE_SIZE), libc::EFBIG);
        why.nothing()?;
        let node = self.written(ino, now);
        node.data.write(at, data.clone());
        if kill {
            node.clear_set_id();
        }
        Ok(data.len())
    }

    pub fn fallocate(
        &mut self,
        ino: Ino,
        at: u64,
        len: u64,
        mode: i32,
        kill: bool,
        now: Timestamp,
    ) -> Answer<()> {
        let holes = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        let mut why = Why::default();
        self.regular(&mut why, ino, libc::EINVAL);
        why.when(mode & !(holes | libc::FALLOC_FL_KEEP_SIZE) != 0, libc::EOPNOTSUPP);
        why.when(len == 0, libc::EINVAL);
        why.when(at.checked_add(len).is_none_or(|end| end > MAX_FILE_SIZE), libc::EFBIG);
        why.nothing()?;
        let node = self.written(ino, now);
        if kill {
            node.clear_set_id();
        }
        let data = &mut node.data;
        if mode & holes != 0 {
            data.punch(at..at + len);
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            data.size = data.size.max(at + len);
        }
        Ok(())
    }

    pub fn seek(&self, ino: Ino, at: u64, data: bool) -> Answer<u64> {
        match self.node(ino) {
            None => Err(vec![libc::ESTALE]),
            Some(node) => node.data.seek(at, data).ok_or(vec![libc::ENXIO]),
        }
    }

    pub fn copy(
        &mut self,
        from: (Ino, u64),
        to: (Ino, u64),
        len: u64,
        kill: bool,
        now: Timestamp,
    ) -> Answer<u64> {
        let mut why = Why::default();
        let size = self.regular(&mut why, from.0, libc::EINVAL).map_or(0, |node| node.data.size);
        let len = len.min(size.saturating_sub(from.1)).min(COPY_MAX);
        if len == 0 {
            return why.nothing().map(|()| 0); // nothing is asked of the target
        }
        self.regular(&mut why, to.0, libc::EINVAL);
        let end = to.1.checked_add(len).filter(|end| *end <= MAX_FILE_SIZE);
        why.when(end.is_none(), libc::EFBIG);
        let overlap = from.0 == to.0 && from.1.abs_diff(to.1) < len;
        why.when(overlap, libc::EINVAL);
        why.nothing()?;
        let pieces = self.nodes[&from.0].data.pieces(from.1..from.1 + len);
        let node = self.written(to.0, now);
        if kill {
            node.clear_set_id();
        }
        node.data.punch(to.1..to.1 + len);
        node.data.size = node.data.size.max(to.1 + len);
        for (at, piece) in pieces {
            node.data.write(at - from.1 + to.1, piece);
        }
        Ok(len)
    }

    pub fn setattr(&mut self, ino: Ino, set: &SetAttr, now: Timestamp) -> Answer<()> {
        let mut why = Why::default();
        match set.size {
            Some(size) => {
                self.regular(&mut why, ino, libc::EISDIR);
                why.when(size > MAX_FILE_SIZE, libc::EFBIG);
            }
            None => why.when(self.node(ino).is_none(), libc::ESTALE),
        }
        why.nothing()?;
        if let Some(size) = set.size {
            let node = self.written(ino, now);
            node.data.truncate(size);
            if !set.privileged {
                node.clear_set_id();
            }
        }
        let node = self.change(ino);
        if set.uid.is_some() || set.gid.is_some() {
            node.xattrs.remove(CAPABILITY);
            if node.kind != FileType::Directory {
                node.clear_set_id();
            }
        }
        node.uid = set.uid.unwrap_or(node.uid);
        node.gid = set.gid.unwrap_or(node.gid);
        if let Some(mode) = set.mode {
            node.mode = mode & 0o7777; // who says what the mode is to be gets it
        }
        node.atime = set.atime.map_or(node.atime, |time| time.unwrap_or(now));
        node.mtime = set.mtime.map_or(node.mtime, |time| time.unwrap_or(now));
        node.ctime = now;
        Ok(())
    }

    pub fn readlink(&self, ino: Ino) -> Answer<Vec<u8>> {
        match self.node(ino) {
            None => Err(vec![libc::ESTALE]),
            Some(node) if node.kind != FileType::Symlink => Err(vec![libc::EINVAL]),
            Some(node) => Ok(node.target.to_vec()),
        }
    }

    /// What names there are besides those is for the caller to avoid: `system.*` has a meaning of its own.
    pub fn setxattr(
        &mut self,
        ino: Ino,
        name: &Bytes,
        value: &Bytes,
        mode: XattrMode,
        now: Timestamp,
    ) -> Answer<()> {
        let mut why = Why::default();
        xattr_name(&mut why, name);
        why.when(value.len() > 65536, libc::E2BIG);
        why.when(self.node(ino).is_none(), libc::ESTALE);
        let there = self.node(ino).is_some_and(|node| node.xattrs.contains_key(name));
        why.when(mode == XattrMode::Create && there, libc::EEXIST);
        why.when(mode == XattrMode::Replace && !there, libc::ENODATA);
        why.nothing()?;
        let node = self.change(ino);
        node.xattrs.insert(name.clone(), value.clone());
        node.ctime = now;
        Ok(())
    }

    pub fn getxattr(&self, ino: Ino, name: &Bytes) -> Answer<Bytes> {
        let mut why = Why::default();
        xattr_name(&mut why, name);
        let value = self.node(ino).and_then(|node| node.xattrs.get(name));
        why.when(self.node(ino).is_none(), libc::ESTALE);
        why.when(value.is_none(), libc::ENODATA);
        why.nothing()?;
        Ok(value.cloned().unwrap_or_default())
    }

    pub fn removexattr(&mut self, ino: Ino, name: &Bytes, now: Timestamp) -> Answer<()> {
        let mut why = Why::default();
        xattr_name(&mut why, name);
        why.when(self.node(ino).is_none(), libc::ESTALE);
        why.when(self.node(ino).is_none_or(|node| !node.xattrs.contains_key(name)), libc::ENODATA);
        why.nothing()?;
        let node = self.change(ino);
        node.xattrs.remove(name);
        node.ctime = now;
        Ok(())
    }

    /// Names in the order of their bytes, each ended by a zero.
    pub fn listxattr(&self, ino: Ino) -> Answer<Vec<u8>> {
        let node = self.node(ino).ok_or(vec![libc::ESTALE])?;
        Ok(node.xattrs.keys().flat_map(|name| [name, &b"\0"[..]].concat()).collect())
    }
}

/// The names that there can be: in one of three namespaces, with something behind it, and not too long.
fn xattr_name(why: &mut Why, name: &[u8]) {
    why.when(name.is_empty() || name.len() > 255, libc::ERANGE);
    let spaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    match spaces.iter().find(|space| name.starts_with(space)) {
        None => why.when(true, libc::EOPNOTSUPP),
        Some(space) => why.when(name.len() == space.len(), libc::EINVAL),
    }
}
