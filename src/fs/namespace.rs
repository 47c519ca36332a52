//! Names: lookup, create, link, unlink, rename, readdir.
//! Invariant: a directory's entry by name and its entry by id come and go together; an entry id is given out once
//! per directory, so a readdir cookie stays valid over every change and restart.

use super::acl::AclKind;
use super::error::{Result, of, os};
use super::inode::{Attr, dir_mut, new_inode};
use super::state::{FIRST_ENTRY, Tx};
use super::{Fs, NAME_MAX};
use crate::log;
use crate::tree::key::{self, KeyRef};
use crate::tree::value::{Body, Dirent, Entry, FileType, TARGET_MAX};
use crate::types::Ino;
use std::collections::HashSet;

/// Most names an inode can have.
const LINK_MAX: u32 = 65_000;

/// On whose behalf a node is made.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User, who will own it.
    pub uid: u32,
    /// Group, unless the directory says otherwise.
    pub gid: u32,
}

/// What a new node is to be.
#[derive(Clone, Debug)]
pub struct NewNode<'a> {
    /// Its type.
    pub kind: FileType,
    /// Permission bits as the caller asked for them.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// Device number, for device nodes.
    pub rdev: u32,
    /// Target, for symbolic links.
    pub target: &'a [u8],
}

impl NewNode<'_> {
    fn body(&self, dir: Ino) -> Body {
        match self.kind {
            FileType::Regular => Body::Regular,
            FileType::Directory => Body::Directory { parent: dir, next_entry: FIRST_ENTRY, entries: 0 },
            FileType::Symlink => Body::Symlink { target: self.target.to_vec() },
            FileType::Fifo => Body::Fifo,
            FileType::Socket => Body::Socket,
            FileType::CharDevice => Body::CharDevice(self.rdev),
            FileType::BlockDevice => Body::BlockDevice(self.rdev),
        }
    }
}

/// One entry that `readdir` gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirItem {
    /// Inode.
    pub ino: Ino,
    /// Where to go on after this entry.
    pub cookie: u64,
    /// Type.
    pub kind: FileType,
    /// Name.
    pub name: Vec<u8>,
}

impl Fs {
    /// The inode that `name` in `dir` stands for.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        let mut state = self.state.lock();
        let ino = match name {
            b"." => dir,
            b".." => *dir_mut(&mut state.inode(&*self.frames, dir)?)?.parent,
            _ => match state.get(&*self.frames, &key::dirent(dir, name))? {
                Some(value) => dirent(dir, &value)?.ino,
                None => return os(libc::ENOENT),
            },
        };
        let inode = state.inode(&*self.frames, ino)?;
        self.attr_of(&mut state, ino, inode)
    }

    /// Makes a file, directory, symbolic link, device, fifo or socket.
    pub fn make(&self, dir: Ino, name: &[u8], node: &NewNode<'_>, caller: Caller) -> Result<Attr> {
        check_name(name)?;
        if node.kind == FileType::Symlink && (node.target.is_empty() || node.target.len() > TARGET_MAX) {
            return os(if node.target.is_empty() { libc::ENOENT } else { libc::ENAMETOOLONG });
        }
        let mut tx = self.begin_growing()?;
        if tx.entry(dir, name)?.is_some() {
            return os(libc::EEXIST);
        }
        let ino = tx.make_inode(dir, node, caller)?;
        tx.add_entry(dir, name, ino, node.kind)?;
        let inode = tx.inode(ino)?.clone();
        tx.apply();
        let blocks = 0;
        Ok(Attr { ino, inode, blocks })
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let inode = self.state.lock().inode(&*self.frames, ino)?;
        match inode.body {
            Body::Symlink { target } => Ok(target),
            _ => os(libc::EINVAL),
        }
    }

    /// Gives an inode one more name.
    pub fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        let mut tx = self.begin_growing()?;
        let now = tx.now;
        let inode = tx.inode(ino)?;
        if inode.kind() == FileType::Directory {
            return os(libc::EPERM);
        }
        if inode.nlink == 0 {
            return os(libc::ENOENT);
        }
        if inode.nlink >= LINK_MAX {
            return os(libc::EMLINK);
        }
        inode.nlink += 1;
        inode.ctime = now;
        let kind = inode.kind();
        if tx.entry(dir, name)?.is_some() {
            return os(libc::EEXIST);
        }
        tx.add_entry(dir, name, ino, kind)?;
        let inode = tx.inode(ino)?.clone();
        let attr = self.attr_of(&mut tx.st, ino, inode)?; // may want frames: before anything is changed
        tx.apply();
        Ok(attr)
    }

    /// Removes a name of something that is not a directory.
    pub fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let mut tx = self.begin()?;
        let Some(entry) = tx.entry(dir, name)? else { return os(libc::ENOENT) };
        if entry.kind == FileType::Directory {
            return os(libc::EISDIR);
        }
        tx.remove_entry(dir, name, &entry)?;
        tx.drop_link(entry.ino)?;
        tx.apply();
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        match name {
            b"." => return os(libc::EINVAL),
            b".." => return os(libc::ENOTEMPTY),
            _ => check_name(name)?,
        }
        let mut tx = self.begin()?;
        let Some(entry) = tx.entry(dir, name)? else { return os(libc::ENOENT) };
        if entry.kind != FileType::Directory {
            return os(libc::ENOTDIR);
        }
        if *dir_mut(tx.inode(entry.ino)?)?.entries > 0 {
            return os(libc::ENOTEMPTY);
        }
        tx.remove_entry(dir, name, &entry)?;
        tx.drop_link(entry.ino)?;
        tx.apply();
        Ok(())
    }

    /// Moves a name, with the flags of renameat2(2).
    pub fn rename(&self, from: (Ino, &[u8]), to: (Ino, &[u8]), flags: u32, caller: Caller) -> Result<()> {
        check_name(from.1)?;
        check_name(to.1)?;
        let known = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        if flags & !known != 0 || (exchange && flags != libc::RENAME_EXCHANGE) {
            return os(libc::EINVAL);
        }
        let mut tx = self.begin()?;
        let Some(source) = tx.entry(from.0, from.1)? else { return os(libc::ENOENT) };
        let target = tx.entry(to.0, to.1)?;
        // Every read comes before the first effect.
        tx.inode(source.ino)?;
        if flags & libc::RENAME_WHITEOUT != 0 {
            tx.acl(from.0, AclKind::Default)?;
        }
        tx.check_no_cycle(&source, from.0, to.0)?;
        match target {
            None if exchange => return os(libc::ENOENT),
            Some(_) if flags & libc::RENAME_NOREPLACE != 0 => return os(libc::EEXIST),
            Some(target) if target.ino == source.ino => return Ok(()),
            Some(target) if exchange => {
                tx.check_no_cycle(&target, to.0, from.0)?;
                tx.exchange(from, &source, to, &target)?;
            }
            _ => tx.rename_over(from, &source, to, target)?,
        }
        if flags & libc::RENAME_WHITEOUT != 0 {
            let node = NewNode { kind: FileType::CharDevice, mode: 0, umask: 0, rdev: 0, target: b"" };
            let ino = tx.make_inode(from.0, &node, caller)?;
            tx.add_entry(from.0, from.1, ino, FileType::CharDevice)?;
        }
        tx.apply();
        Ok(())
    }

    /// At most `limit` entries of `dir` after `cookie` (0 is the start), `.` and `..` among them.
    pub fn readdir(&self, dir: Ino, cookie: u64, limit: usize) -> Result<Vec<DirItem>> {
        let state = self.state.lock();
        let parent = *dir_mut(&mut state.inode(&*self.frames, dir)?)?.parent;
        let mut items = Vec::new();
        for (at, ino, name) in [(1, dir, b"." as &[u8]), (2, parent, b"..")] {
            if cookie < at {
                items.push(DirItem { ino, cookie: at, kind: FileType::Directory, name: name.to_vec() });
            }
        }
        let after = cookie.max(FIRST_ENTRY - 1);
        for (key, value) in state.range(&*self.frames, key::entries_after(dir, after), limit)? {
            let entry = Entry::decode(&value).map_err(|e| of(format!("directory {}", dir.0), e))?;
            if let Some(KeyRef::Entry { id: cookie, .. }) = key::parse(&key) {
                items.push(DirItem { ino: entry.ino, cookie, kind: entry.kind, name: entry.name.to_vec() });
            }
        }
        Ok(items)
    }

    /// Like [`Fs::readdir`], with the attributes of each entry.
    pub fn readdir_plus(&self, dir: Ino, cookie: u64, limit: usize) -> Result<Vec<(DirItem, Attr)>> {
        let items = self.readdir(dir, cookie, limit)?;
        let mut state = self.state.lock();
        let mut out = Vec::with_capacity(items.len());
        for item in items {
            match state.inode(&*self.frames, item.ino) {
                Ok(inode) => {
                    let attr = self.attr_of(&mut state, item.ino, inode)?;
                    out.push((item, attr));
                }
                Err(super::Error::Os(libc::ESTALE)) => {} // removed since the entries were read
                Err(e) => return Err(e),
            }
        }
        Ok(out)
    }
}

fn dirent(dir: Ino, value: &[u8]) -> Result<Dirent> {
    Ok(Dirent::decode(value).map_err(|e| of(format!("directory {}", dir.0), e))?)
}

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX { os(libc::ENAMETOOLONG) } else { Ok(()) }
}

impl Tx<'_> {
    /// The entry of that name, if there is one; the directory must exist and be one.
    pub fn entry(&mut self, dir: Ino, name: &[u8]) -> Result<Option<Dirent>> {
        dir_mut(self.inode(dir)?)?;
        match self.st.get(self.frames(), &key::dirent(dir, name))? {
            Some(value) => Ok(Some(dirent(dir, &value)?)),
            None => Ok(None),
        }
    }

    fn make_inode(&mut self, dir: Ino, node: &NewNode<'_>, caller: Caller) -> Result<Ino> {
        let now = self.now;
        let ino = self.next_ino();
        let parent = self.inode(dir)?;
        if parent.nlink == 0 {
            return os(libc::ENOENT);
        }
        let inherits = parent.mode & libc::S_ISGID != 0;
        let gid = if inherits { parent.gid } else { caller.gid };
        if node.kind == FileType::Directory {
            parent.nlink += 1;
        }
        let inode = new_inode(node.body(dir), node.mode, Caller { gid, ..caller }, now);
        self.set_inode(ino, inode);
        let mode = self.inherit_acl(dir, ino, node)?;
        let inode = self.inode(ino)?;
        inode.mode = mode & 0o7777;
        match &inode.body {
            Body::Directory { .. } => {
                inode.nlink = 2;
                if inherits {
                    inode.mode |= libc::S_ISGID;
                }
            }
            Body::Symlink { target } => inode.size = target.len() as u64,
            _ => {}
        }
        self.st.inodes += 1;
        Ok(ino)
    }

    /// Puts a name into a directory; the caller has seen that it is free.
    fn add_entry(&mut self, dir: Ino, name: &[u8], ino: Ino, kind: FileType) -> Result<()> {
        let now = self.now;
        let parent = self.inode(dir)?;
        if parent.nlink == 0 {
            return os(libc::ENOENT);
        }
        let fields = dir_mut(parent)?;
        let id = *fields.next_entry;
        *fields.next_entry += 1;
        *fields.entries += 1;
        (parent.mtime, parent.ctime) = (now, now);
        self.put(key::dirent(dir, name), Some(Dirent { entry: id, ino, kind }.encode()));
        self.put(key::entry(dir, id), Some(Entry { ino, kind, name }.encode()));
        Ok(())
    }

    fn remove_entry(&mut self, dir: Ino, name: &[u8], entry: &Dirent) -> Result<()> {
        let now = self.now;
        let parent = self.inode(dir)?;
        let miscounted =
            || log::Error::corrupt(format!("inode {}", dir.0), "has more entries than it counts");
        let entries = dir_mut(parent)?.entries;
        *entries = entries.checked_sub(1).ok_or_else(miscounted)?;
        if entry.kind == FileType::Directory {
            parent.nlink = parent.nlink.checked_sub(1).ok_or_else(miscounted)?;
        }
        (parent.mtime, parent.ctime) = (now, now);
        self.put(key::dirent(dir, name), None);
        self.put(key::entry(dir, entry.entry), None);
        Ok(())
    }

    /// An inode lost a name; without names it becomes an orphan until the kernel lets go of it.
    fn drop_link(&mut self, ino: Ino) -> Result<()> {
        let now = self.now;
        let inode = self.inode(ino)?;
        inode.ctime = now;
        inode.nlink = if inode.kind() == FileType::Directory { 0 } else { inode.nlink.saturating_sub(1) };
        if inode.nlink > 0 {
            return Ok(());
        }
        if self.st.lookups.holds(ino) {
            self.put(key::orphan(ino), Some(crate::tree::value::encode_orphan()));
            self.st.changing = true;
            self.st.orphans.insert(ino);
            return Ok(());
        }
        self.release(ino)
    }

    /// A directory may not be moved below itself. (The kernel sees to it too; a cycle would lose the subtree.)
    fn check_no_cycle(&mut self, moved: &Dirent, old_dir: Ino, new_dir: Ino) -> Result<()> {
        if moved.kind != FileType::Directory || old_dir == new_dir {
            return Ok(());
        }
        let (mut at, mut passed) = (new_dir, HashSet::new());
        while at != Ino::ROOT {
            if at == moved.ino {
                return os(libc::EINVAL);
            }
            if !passed.insert(at) {
                let detail = "it lies below itself, so that no way leads to the root";
                return Err(log::Error::corrupt(format!("inode {}", at.0), detail).into());
            }
            // Not kept as what is to be changed: there may be many.
            at = *dir_mut(&mut self.st.inode(self.frames(), at)?)?.parent;
        }
        Ok(())
    }

    fn rename_over(
        &mut self,
        from: (Ino, &[u8]),
        source: &Dirent,
        to: (Ino, &[u8]),
        target: Option<Dirent>,
    ) -> Result<()> {
        if let Some(target) = target {
            match (source.kind, target.kind) {
                (FileType::Directory, FileType::Directory)
                    if *dir_mut(self.inode(target.ino)?)?.entries > 0 =>
                {
                    return os(libc::ENOTEMPTY);
                }
                (FileType::Directory, FileType::Directory) => {}
                (FileType::Directory, _) => return os(libc::ENOTDIR),
                (_, FileType::Directory) => return os(libc::EISDIR),
                _ => {}
            }
            self.remove_entry(to.0, to.1, &target)?;
            self.drop_link(target.ino)?;
        }
        self.remove_entry(from.0, from.1, source)?;
        self.arrive(source, to)
    }

    fn exchange(
        &mut self,
        from: (Ino, &[u8]),
        source: &Dirent,
        to: (Ino, &[u8]),
        target: &Dirent,
    ) -> Result<()> {
        self.remove_entry(from.0, from.1, source)?;
        self.remove_entry(to.0, to.1, target)?;
        self.arrive(source, to)?;
        self.arrive(target, from)
    }

    /// A moved inode takes its name in the new place.
    fn arrive(&mut self, moved: &Dirent, to: (Ino, &[u8])) -> Result<()> {
        let now = self.now;
        self.add_entry(to.0, to.1, moved.ino, moved.kind)?;
        if moved.kind == FileType::Directory {
            self.inode(to.0)?.nlink += 1;
        }
        let inode = self.inode(moved.ino)?;
        inode.ctime = now;
        if moved.kind == FileType::Directory {
            *dir_mut(inode)?.parent = to.0;
        }
        Ok(())
    }
}
