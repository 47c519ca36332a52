//! What the null file system keeps: inodes, names and contents, in memory.
//! Invariant: an inode is there while it has a name or the kernel knows of it; a listing goes on where it was, whatever
//! is removed meanwhile.

use embassyfs::clock::Clock;
use fuser::{FileAttr, FileType, INodeNo, Request};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A file's content is in pieces of this size, which copies share.
const CHUNK: usize = 1 << 20;
/// The most that one answer to a copy can name.
const COPY_MAX: u64 = 1 << 30;
/// Cookies of the entries `.` and `..`; names have higher ones.
pub const DOTS: u64 = 2;

pub type Result<T> = std::result::Result<T, i32>;

pub enum Body {
    File(Vec<Arc<Vec<u8>>>),
    Directory(Directory),
    Link(Vec<u8>),
    Other,
}

pub struct Directory {
    parent: u64,
    /// Name to inode and cookie.
    names: HashMap<OsString, (u64, u64)>,
    /// Cookie to name: a listing goes on where it was, whatever is removed meanwhile.
    order: BTreeMap<u64, OsString>,
    next: u64,
}

pub struct Node {
    pub attr: FileAttr,
    pub body: Body,
    /// How often the kernel was told of it and has not forgotten.
    pub lookups: u64,
}

/// All there is. Inode numbers are places in the list, and are never used twice.
pub struct State {
    nodes: Vec<Option<Box<Node>>>,
    clock: Arc<dyn Clock>,
}

impl State {
    pub fn new(clock: Arc<dyn Clock>) -> State {
        let mut state = State { nodes: vec![None], clock };
        let root = state.add(FileType::Directory, 0o755, (0, 0), new_directory(1));
        state.nodes[root as usize].iter_mut().for_each(|n| n.lookups = 1);
        state
    }

    pub fn now(&self) -> SystemTime {
        let now = self.clock.now();
        UNIX_EPOCH + Duration::new(u64::try_from(now.secs).unwrap_or(0), now.nanos)
    }

    pub fn node(&mut self, ino: u64) -> Result<&mut Node> {
        self.nodes.get_mut(ino as usize).and_then(Option::as_deref_mut).ok_or(libc::ENOENT)
    }

    fn directory(&mut self, ino: u64) -> Result<&mut Directory> {
        match &mut self.node(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(libc::ENOTDIR),
        }
    }

    fn add(&mut self, kind: FileType, perm: u32, owner: (u32, u32), body: Body) -> u64 {
        let ino = self.nodes.len() as u64;
        let mut attr = blank(self.now());
        attr.ino = INodeNo(ino);
        attr.kind = kind;
        attr.perm = (perm & 0o7777) as u16;
        (attr.uid, attr.gid) = owner;
        attr.nlink = if kind == FileType::Directory { 2 } else { 1 };
        if let Body::Link(target) = &body {
            attr.size = target.len() as u64;
        }
        self.nodes.push(Some(Box::new(Node { attr, body, lookups: 0 })));
        ino
    }

    /// A name for an inode; the directory's times follow.
    pub fn enter(&mut self, parent: u64, name: &OsStr, ino: u64) -> Result<()> {
        let directory = self.directory(parent)?;
        let cookie = directory.next;
        directory.next += 1;
        directory.names.insert(name.to_os_string(), (ino, cookie));
        directory.order.insert(cookie, name.to_os_string());
        self.touch(parent, 0)
    }

    fn leave(&mut self, parent: u64, name: &OsStr) -> Result<u64> {
        let directory = self.directory(parent)?;
        let (ino, cookie) = directory.names.remove(name).ok_or(libc::ENOENT)?;
        directory.order.remove(&cookie);
        self.touch(parent, 0)?;
        Ok(ino)
    }

    /// A directory has changed, and has so many subdirectories more.
    fn touch(&mut self, ino: u64, subdirectories: i32) -> Result<()> {
        let now = self.now();
        let attr = &mut self.node(ino)?.attr;
        (attr.mtime, attr.ctime) = (now, now);
        attr.nlink = attr.nlink.saturating_add_signed(subdirectories);
        Ok(())
    }

    pub fn find(&mut self, parent: u64, name: &OsStr) -> Result<u64> {
        self.directory(parent)?.names.get(name).map(|(ino, _)| *ino).ok_or(libc::ENOENT)
    }

    /// The attributes of an inode that the kernel is about to be told of.
    pub fn tell(&mut self, ino: u64) -> Result<FileAttr> {
        let node = self.node(ino)?;
        node.lookups += 1;
        Ok(node.attr)
    }

    pub fn make(&mut self, req: &Request, parent: u64, name: &OsStr, new: New) -> Result<FileAttr> {
        if self.find(parent, name).is_ok() {
            return Err(libc::EEXIST);
        }
        let is_directory = new.kind == FileType::Directory;
        let ino = self.add(new.kind, new.mode, (req.uid(), req.gid()), new.body);
        self.enter(parent, name, ino)?;
        if is_directory {
            self.touch(parent, 1)?;
        }
        self.tell(ino)
    }

    pub fn remove(&mut self, parent: u64, name: &OsStr, wants_directory: bool) -> Result<()> {
        let ino = self.find(parent, name)?;
        match (&self.node(ino)?.body, wants_directory) {
            (Body::Directory(d), true) if !d.names.is_empty() => return Err(libc::ENOTEMPTY),
            (Body::Directory(_), false) => return Err(libc::EISDIR),
            (Body::Directory(_), true) => self.touch(parent, -1)?,
            (_, true) => return Err(libc::ENOTDIR),
            (_, false) => {}
        }
        self.leave(parent, name)?;
        let now = self.now();
        let attr = &mut self.node(ino)?.attr;
        attr.nlink = if wants_directory { 0 } else { attr.nlink.saturating_sub(1) };
        attr.ctime = now;
        self.forget(ino, 0)
    }

    /// What has no name and is not known to the kernel is gone.
    pub fn forget(&mut self, ino: u64, times: u64) -> Result<()> {
        let node = self.node(ino)?;
        node.lookups = node.lookups.saturating_sub(times);
        if node.lookups == 0 && node.attr.nlink == 0 {
            self.nodes[ino as usize] = None;
        }
        Ok(())
    }

    pub fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr), flags: u32) -> Result<()> {
        let ino = self.find(from.0, from.1)?;
        let is_directory = matches!(self.node(ino)?.body, Body::Directory(_));
        match self.find(to.0, to.1) {
            Ok(_) if flags & libc::RENAME_NOREPLACE != 0 => return Err(libc::EEXIST),
            _ if flags & !libc::RENAME_NOREPLACE != 0 => return Err(libc::EINVAL),
            Ok(replaced) if replaced == ino => return Ok(()),
            Ok(_) => self.remove(to.0, to.1, is_directory)?,
            Err(_) => {}
        }
        self.leave(from.0, from.1)?;
        self.enter(to.0, to.1, ino)?;
        if is_directory {
            self.touch(from.0, -1)?;
            self.touch(to.0, 1)?;
            self.directory(ino)?.parent = to.0;
        }
        Ok(())
    }

    fn chunks(&mut self, ino: u64) -> Result<(&mut Vec<Arc<Vec<u8>>>, &mut FileAttr)> {
        let node = self.node(ino)?;
        match &mut node.body {
            Body::File(chunks) => Ok((chunks, &mut node.attr)),
            _ => Err(libc::EINVAL),
        }
    }

    pub fn write(&mut self, ino: u64, offset: u64, data: &[u8]) -> Result<()> {
        let now = self.now();
        let (chunks, attr) = self.chunks(ino)?;
        let (mut at, mut rest) = (offset as usize, data);
        while !rest.is_empty() {
            let (index, start) = (at / CHUNK, at % CHUNK);
            let (part, after) = rest.split_at(rest.len().min(CHUNK - start));
            if chunks.len() <= index {
                chunks.resize_with(index + 1, Default::default);
            }
            let chunk = Arc::make_mut(&mut chunks[index]);
            if index > 0 && chunk.capacity() < CHUNK {
                chunk.reserve_exact(CHUNK - chunk.len());
            }
            if chunk.len() < start {
                chunk.resize(start, 0);
            }
            let over = part.len().min(chunk.len() - start);
            chunk[start..start + over].copy_from_slice(&part[..over]);
            chunk.extend_from_slice(&part[over..]);
            (at, rest) = (at + part.len(), after);
        }
        (attr.mtime, attr.ctime) = (now, now);
        set_size(attr, attr.size.max(at as u64));
        Ok(())
    }

    /// Gives what was read to `take`, without a copy where it is in one piece.
    pub fn read(&mut self, ino: u64, offset: u64, len: u64, take: impl FnOnce(&[u8])) -> Result<()> {
        let (chunks, attr) = self.chunks(ino)?;
        let len = len.min(attr.size.saturating_sub(offset)) as usize;
        let (mut at, end) = (offset as usize, offset as usize + len);
        let whole = chunks.get(at / CHUNK).and_then(|c| c.get(at % CHUNK..at % CHUNK + len));
        if let Some(bytes) = whole {
            take(bytes);
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(len);
        while at < end {
            let (start, stop) = (at % CHUNK, CHUNK.min(at % CHUNK + end - at));
            let chunk = chunks.get(at / CHUNK).map_or(&[][..], |c| c.as_slice());
            bytes.extend_from_slice(&chunk[start.min(chunk.len())..stop.min(chunk.len())]);
            at += stop - start;
            bytes.resize(at - offset as usize, 0); // a hole
        }
        take(&bytes);
        Ok(())
    }

    pub fn truncate(&mut self, ino: u64, size: u64) -> Result<()> {
        let now = self.now();
        let (chunks, attr) = self.chunks(ino)?;
        chunks.truncate((size as usize).div_ceil(CHUNK));
        if let Some(last) = chunks.get_mut(size as usize / CHUNK) {
            Arc::make_mut(last).truncate(size as usize % CHUNK);
        }
        (attr.mtime, attr.ctime) = (now, now);
        set_size(attr, size);
        Ok(())
    }

    pub fn copy(&mut self, from: (u64, u64), to: (u64, u64), len: u64) -> Result<u64> {
        let (chunks, attr) = self.chunks(from.0)?;
        let len = len.min(attr.size.saturating_sub(from.1)).min(COPY_MAX);
        let aligned = [from.1, to.1, len].iter().all(|n| n.is_multiple_of(CHUNK as u64));
        if !aligned {
            let mut bytes = Vec::new();
            self.read(from.0, from.1, len, |read| bytes.extend_from_slice(read))?;
            self.write(to.0, to.1, &bytes)?;
            return Ok(len);
        }
        let (first, count) = (from.1 as usize / CHUNK, len as usize / CHUNK);
        let mut shared: Vec<_> = chunks.iter().skip(first).take(count).cloned().collect();
        shared.resize_with(count, Default::default); // what lies behind the last piece is a hole
        let (chunks, attr) = self.chunks(to.0)?;
        let at = to.1 as usize / CHUNK;
        chunks.resize_with(chunks.len().max(at + count), Default::default);
        for (place, chunk) in chunks[at..].iter_mut().zip(shared) {
            *place = chunk;
        }
        set_size(attr, attr.size.max(to.1 + len));
        Ok(len)
    }

    /// The entries of a directory behind a cookie: inode, cookie, name.
    pub fn entries(
        &mut self,
        ino: u64,
        after: u64,
        mut take: impl FnMut(u64, u64, &OsStr) -> bool,
    ) -> Result<()> {
        let directory = self.directory(ino)?;
        let dots = [(ino, 1, OsStr::new(".")), (directory.parent, DOTS, OsStr::new(".."))];
        for (ino, cookie, name) in dots.into_iter().filter(|(_, cookie, _)| *cookie > after) {
            if !take(ino, cookie, name) {
                return Ok(());
            }
        }
        for (cookie, name) in directory.order.range(after.max(DOTS) + 1..) {
            if let Some((ino, _)) = directory.names.get(name)
                && !take(*ino, *cookie, name)
            {
                break;
            }
        }
        Ok(())
    }
}

/// An inode to be made.
pub struct New {
    pub kind: FileType,
    pub mode: u32,
    pub body: Body,
}

pub fn new_directory(parent: u64) -> Body {
    Body::Directory(Directory { parent, names: HashMap::new(), order: BTreeMap::new(), next: DOTS + 1 })
}

/// Attributes with nothing in them; with inode 0 they say "no such name, and you may remember it".
pub fn blank(time: SystemTime) -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

pub fn set_size(attr: &mut FileAttr, size: u64) {
    (attr.size, attr.blocks) = (size, size.div_ceil(512));
}
