//! Attributes and extended attributes of inodes.
//! Invariant: whoever changes data, owner or mode keeps the set-id bits and file capabilities as ext4 would.

use super::acl::AclKind;
use super::error::{Result, os};
use super::lookups::Lookups;
use super::state::Tx;
use super::{Caller, Fs, MAX_FILE_SIZE, NAME_MAX};
use crate::log;
use crate::tree::key::{self, KeyRef};
use crate::tree::value::{Body, FileType, HAS_CAPABILITY_XATTR, HAS_XATTR, Inode, SPARSE};
use crate::types::{Ino, Timestamp};

/// Longest value of an extended attribute, in bytes (the kernel's own limit).
const XATTR_VALUE_MAX: usize = 65536;
/// Files whose bytes are counted and kept count of; beyond that counting begins anew.
const COUNTS_MAX: usize = 4096;
/// Access times are renewed after this at the latest, in seconds (mount(8), `relatime`).
const ACCESS_RENEWAL: i64 = 86_400;
/// The attributes that anybody, root, and security modules can set.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// File capabilities (capabilities(7)).
pub const CAPABILITY: &[u8] = b"security.capability";

/// An inode as `stat` shows it.
#[derive(Clone, Debug)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// Everything that is stored of it.
    pub inode: Inode,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
}

/// The attributes to change; `None` leaves one as it is.
#[derive(Clone, Debug, Default)]
pub struct SetAttr {
    /// Permission bits with set-id and sticky bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes (truncate or extend).
    pub size: Option<u64>,
    /// Access time; `Some(None)` is now.
    pub atime: Option<Option<Timestamp>>,
    /// Modification time; `Some(None)` is now.
    pub mtime: Option<Option<Timestamp>>,
    /// The caller may keep set-id bits over a truncation (CAP_FSETID).
    pub privileged: bool,
}

/// What `setxattr` demands of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Set whether or not it is there.
    Any,
    /// It must be new (`XATTR_CREATE`).
    Create,
    /// It must be there (`XATTR_REPLACE`).
    Replace,
    /// Both at once: never possible.
    Neither,
}

impl Fs {
    /// Attributes of an inode. `ESTALE` when it does not exist.
    pub fn getattr(&self, ino: Ino) -> Result<Attr> {
        let mut state = self.state.lock();
        let inode = state.inode(&*self.frames, ino)?;
        self.attr_of(&mut state, ino, inode)
    }

    pub(super) fn attr_of(&self, state: &mut super::state::State, ino: Ino, inode: Inode) -> Result<Attr> {
        let bytes = self.allocated(state, ino, &inode, inode.size)?;
        // Space is shown in whole blocks of 4096, as the applications know it.
        Ok(Attr { ino, inode, blocks: bytes.div_ceil(4096) * 8 })
    }

    /// Bytes among the first `end` of an inode that are not holes. The count for a whole file is kept.
    fn allocated(&self, state: &mut super::state::State, ino: Ino, inode: &Inode, end: u64) -> Result<u64> {
        match inode.kind() {
            FileType::Regular if inode.flags & SPARSE == 0 => return Ok(end),
            FileType::Regular => {}
            _ => return Ok(0),
        }
        let whole = end == inode.size;
        if let Some(bytes) = state.allocated.get(&ino).filter(|_| whole) {
            return Ok(*bytes);
        }
        let bytes = self.allocated_bytes(state, ino, 0..end)?;
        if whole {
            if state.allocated.len() >= COUNTS_MAX {
                state.allocated.clear();
            }
            state.allocated.insert(ino, bytes);
        }
        Ok(bytes)
    }

    /// Changes attributes, all or none.
    pub fn setattr(&self, ino: Ino, set: &SetAttr) -> Result<Attr> {
        let mut tx = self.begin()?;
        let now = tx.now;
        let old = tx.inode(ino)?.clone();
        let kept = set.size.unwrap_or(old.size).min(old.size);
        let bytes = self.allocated(&mut tx.st, ino, &old, kept)?;
        // The last read, before the first effect.
        if let Some(mode) = set.mode {
            tx.chmod_acl(ino, mode)?;
        }
        if let Some(size) = set.size {
            if size > old.size {
                tx.want_room()?;
            }
            tx.truncate(ino, size, set.privileged)?;
        }
        let owner_changes = set.uid.is_some() || set.gid.is_some();
        if owner_changes {
            tx.drop_capability(ino)?;
        }
        let inode = tx.inode(ino)?;
        if let Some(mode) = set.mode {
            inode.mode = mode & 0o7777;
        }
        inode.uid = set.uid.unwrap_or(inode.uid);
        inode.gid = set.gid.unwrap_or(inode.gid);
        if owner_changes && set.mode.is_none() && inode.kind() != FileType::Directory {
            clear_set_id(inode);
        }
        if let Some(atime) = set.atime {
            inode.atime = atime.unwrap_or(now);
        }
        if let Some(mtime) = set.mtime {
            inode.mtime = mtime.unwrap_or(now);
        }
        inode.ctime = now;
        let inode = inode.clone();
        tx.apply();
        Ok(Attr { ino, inode, blocks: bytes.div_ceil(4096) * 8 })
    }

    /// chown(2) to the same owner and group: it takes set-id bits and capabilities away all the same. From others than
    /// root and the owner it changes nothing: the kernel asks on behalf of writers too, whose write then does it.
    pub fn chown_to_same(&self, ino: Ino, caller: u32) -> Result<Attr> {
        let mut tx = self.begin()?;
        let now = tx.now;
        let inode = tx.inode(ino)?;
        if inode.kind() != FileType::Directory && (caller == 0 || caller == inode.uid) {
            inode.ctime = now;
            clear_set_id(inode);
            tx.drop_capability(ino)?;
            tx.apply();
        } else {
            drop(tx);
        }
        self.getattr(ino)
    }

    /// Whether reading the inode now has to change its access time (never, unless the mount counts them).
    pub fn access_is_due(&self, ino: Ino) -> Result<bool> {
        if !self.settings.relatime || self.settings.read_only {
            return Ok(false);
        }
        let inode = self.state.lock().inode(&*self.frames, ino)?;
        Ok(access_is_due(&inode, self.env.clock.now()))
    }

    /// The inode was read. If its access time cannot be changed now, the next read does it.
    pub fn accessed(&self, ino: Ino) {
        if !self.settings.relatime {
            return;
        }
        let Ok(mut tx) = self.begin_growing() else { return };
        let now = tx.now;
        let Ok(inode) = tx.inode(ino) else { return };
        if access_is_due(inode, now) {
            inode.atime = now;
            tx.apply();
        }
    }

    /// The value of an extended attribute; `ENODATA` when it has none of that name.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let state = self.state.lock();
        let inode = state.inode(&*self.frames, ino)?;
        if AclKind::of(name).is_none() {
            check_xattr_name(name)?;
        }
        if inode.flags & HAS_XATTR == 0 {
            return os(libc::ENODATA);
        }
        match state.get(&*self.frames, &key::xattr(ino, name))? {
            Some(value) => Ok(crate::tree::value::decode_xattr(&value)?.to_vec()),
            None => os(libc::ENODATA),
        }
    }

    /// Names of all extended attributes, each ended by a zero byte.
    pub fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        let state = self.state.lock();
        let inode = state.inode(&*self.frames, ino)?;
        let mut out = Vec::new();
        if inode.flags & HAS_XATTR != 0 {
            for (key, _) in state.range(&*self.frames, key::xattrs(ino), usize::MAX)? {
                if let Some(KeyRef::Xattr { name, .. }) = key::parse(&key) {
                    out.extend_from_slice(name);
                    out.push(0);
                }
            }
        }
        Ok(out)
    }

    /// Sets an extended attribute.
    pub fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        check_xattr_name(name)?;
        if value.len() > XATTR_VALUE_MAX {
            return os(libc::E2BIG);
        }
        let mut tx = self.begin_growing()?;
        let now = tx.now;
        let exists = tx.st.get(tx.frames(), &key::xattr(ino, name))?.is_some();
        match mode {
            XattrMode::Create | XattrMode::Neither if exists => return os(libc::EEXIST),
            XattrMode::Replace | XattrMode::Neither if !exists => return os(libc::ENODATA),
            _ => {}
        }
        let inode = tx.inode(ino)?;
        inode.flags |= HAS_XATTR;
        if name == CAPABILITY {
            inode.flags |= HAS_CAPABILITY_XATTR;
        }
        inode.ctime = now;
        tx.put(key::xattr(ino, name), Some(crate::tree::value::encode_xattr(value)));
        tx.apply();
        Ok(())
    }

    /// Removes an extended attribute; `ENODATA` when it is not there.
    pub fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        check_xattr_name(name)?;
        let mut tx = self.begin()?;
        let now = tx.now;
        if tx.st.get(tx.frames(), &key::xattr(ino, name))?.is_none() {
            return os(libc::ENODATA);
        }
        let inode = tx.inode(ino)?;
        inode.ctime = now;
        if name == CAPABILITY {
            inode.flags &= !HAS_CAPABILITY_XATTR;
        }
        tx.put(key::xattr(ino, name), None);
        tx.apply();
        Ok(())
    }

    /// The kernel was told of the inode once more.
    pub fn looked_up(&self, ino: Ino) {
        self.state.lock().lookups.add(ino);
    }

    /// The kernel gave back `n` references; an unlinked inode nobody holds any more is freed.
    pub fn forget(&self, ino: Ino, n: u64) -> Result<()> {
        let mut state = self.state.lock();
        let let_go = state.lookups.forget(ino, n);
        if let_go {
            state.kept.forget(ino);
        }
        if !let_go || !state.orphans.contains(&ino) || self.settings.read_only {
            return Ok(());
        }
        drop(state);
        self.release_orphan(ino)
    }

    /// Frees an unlinked inode.
    pub fn release_orphan(&self, ino: Ino) -> Result<()> {
        let mut tx = self.begin()?;
        if !tx.st.orphans.contains(&ino) {
            return Ok(());
        }
        if tx.inode(ino)?.nlink > 0 {
            let detail = "is said to be without a name, but counts names; it is not freed";
            return Err(log::Error::corrupt(format!("inode {}", ino.0), detail).into());
        }
        tx.release(ino)?;
        tx.apply();
        Ok(())
    }

    /// What the kernel holds, for who goes on with its connection.
    pub fn held(&self) -> Vec<u8> {
        self.state.lock().lookups.encode()
    }

    /// Takes over what the kernel holds; see [`Fs::held`]. False if it cannot be understood.
    pub fn take_held(&self, held: &[u8]) -> bool {
        let Some(lookups) = Lookups::decode(held) else { return false };
        self.state.lock().lookups = lookups;
        true
    }

    /// Inodes that were unlinked but not freed yet.
    pub fn orphans(&self) -> Vec<Ino> {
        self.state.lock().orphans.iter().copied().collect()
    }

    /// Of these, the ones that the kernel does not hold.
    pub fn abandoned(&self) -> Vec<Ino> {
        let state = self.state.lock();
        state.orphans.iter().copied().filter(|ino| !state.lookups.holds(*ino)).collect()
    }
}

fn access_is_due(inode: &Inode, now: Timestamp) -> bool {
    inode.atime <= inode.mtime
        || inode.atime <= inode.ctime
        || now.secs.saturating_sub(inode.atime.secs) >= ACCESS_RENEWAL
}

fn check_xattr_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name.len() > NAME_MAX {
        return os(libc::ERANGE);
    }
    // Access control lists have their own way in; what else there may be in `system.`, nobody would act upon.
    match NAMESPACES.iter().find_map(|space| name.strip_prefix(*space)) {
        None => os(libc::EOPNOTSUPP),
        Some(b"") => os(libc::EINVAL),
        Some(_) => Ok(()),
    }
}

/// A new inode with one name, all times `now`.
pub(super) fn new_inode(body: Body, mode: u32, owner: Caller, now: Timestamp) -> Inode {
    Inode {
        mode: mode & 0o7777,
        uid: owner.uid,
        gid: owner.gid,
        nlink: 1,
        size: 0,
        flags: 0,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        body,
    }
}

/// What writing to or giving away a file takes off its mode: set-user-id, and set-group-id where it means that.
pub(super) fn clear_set_id(inode: &mut Inode) {
    inode.mode &= !libc::S_ISUID;
    if inode.mode & libc::S_IXGRP != 0 {
        inode.mode &= !libc::S_ISGID;
    }
}

/// What only a directory has, to be changed.
pub(super) struct DirMut<'a> {
    pub parent: &'a mut Ino,
    pub next_entry: &'a mut u64,
    pub entries: &'a mut u64,
}

/// The directory in an inode; `ENOTDIR` when it is something else.
pub(super) fn dir_mut(inode: &mut Inode) -> Result<DirMut<'_>> {
    match &mut inode.body {
        Body::Directory { parent, next_entry, entries } => Ok(DirMut { parent, next_entry, entries }),
        _ => os(libc::ENOTDIR),
    }
}

impl Tx<'_> {
    /// Sets the size; what lay beyond is gone, what is new reads as zero.
    pub fn truncate(&mut self, ino: Ino, size: u64, privileged: bool) -> Result<()> {
        if size > MAX_FILE_SIZE {
            return os(libc::EFBIG);
        }
        let inode = self.inode(ino)?;
        match inode.kind() {
            FileType::Regular => {}
            FileType::Directory => return os(libc::EISDIR),
            _ => return os(libc::EINVAL),
        }
        let old = inode.size;
        self.drop_capability(ino)?;
        let now = self.now;
        let inode = self.inode(ino)?;
        inode.size = size;
        (inode.mtime, inode.ctime) = (now, now);
        if size > old {
            inode.flags |= SPARSE;
        }
        if size == 0 {
            inode.flags &= !SPARSE;
        }
        if !privileged {
            clear_set_id(inode);
        }
        if size < old {
            self.punch(ino, size..MAX_FILE_SIZE);
        }
        self.st.allocated.remove(&ino);
        Ok(())
    }

    /// File capabilities do not survive a change of data or owner.
    pub fn drop_capability(&mut self, ino: Ino) -> Result<()> {
        let inode = self.inode(ino)?;
        if inode.flags & HAS_CAPABILITY_XATTR != 0 {
            inode.flags &= !HAS_CAPABILITY_XATTR;
            self.put(key::xattr(ino, CAPABILITY), None);
        }
        Ok(())
    }

    /// Removes every trace of an inode without names.
    pub fn release(&mut self, ino: Ino) -> Result<()> {
        let inode = self.inode(ino)?.clone();
        if inode.flags & HAS_XATTR != 0 {
            for (key, _) in self.st.range(self.frames(), key::xattrs(ino), usize::MAX)? {
                self.put(key, None);
            }
        }
        if inode.kind() == FileType::Regular {
            self.punch(ino, 0..MAX_FILE_SIZE);
            if !self.st.has_past(ino) {
                self.st.dirty.remove(&ino);
            }
        }
        self.put(key::orphan(ino), None);
        self.drop_inode(ino);
        self.st.changing = true;
        self.st.orphans.remove(&ino);
        self.st.allocated.remove(&ino);
        self.st.inodes = self.st.inodes.saturating_sub(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_time_is_renewed_after_a_change_and_after_a_day() {
        let at = |secs| Timestamp { secs, nanos: 0 };
        let mut inode = new_inode(Body::Regular, 0o644, Caller { uid: 0, gid: 0 }, at(1000));
        assert!(access_is_due(&inode, at(1001)), "never read since it was made");
        inode.atime = at(1001);
        assert!(!access_is_due(&inode, at(1002)));
        assert!(!access_is_due(&inode, at(1001 + ACCESS_RENEWAL - 1)));
        assert!(access_is_due(&inode, at(1001 + ACCESS_RENEWAL)));
        inode.ctime = at(1001);
        assert!(access_is_due(&inode, at(1002)), "changed since");
        inode.atime = at(i64::MIN);
        assert!(access_is_due(&inode, at(i64::MAX)));
    }
}
