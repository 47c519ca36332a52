//! POSIX access control lists, as POSIX.1e draft 17 and acl(5) describe them: who may do what beyond owner, group
//! and others, and what a directory hands down to what is made in it.
//! Invariant: mode and access list of an inode say the same (the owner's bits, the mask's or without one the
//! group's, the others' bits), and a list that says no more than a mode is not stored.
//!
//! The kernel checks permissions with them; here they are kept. They are stored as the kernel passes them, in the
//! extended attributes of [`AclKind::name`] (`linux/posix_acl_xattr.h`, version 2).

use super::error::{Result, os};
use super::state::Tx;
use super::{Fs, NewNode};
use crate::log;
use crate::tree::key;
use crate::tree::value::{FileType, HAS_ACCESS_ACL, HAS_DEFAULT_ACL, HAS_XATTR, decode_xattr, encode_xattr};
use crate::types::Ino;

/// Version of the attribute's form.
const VERSION: u32 = 2;
const RWX: u16 = 0o7;

/// The two lists of a directory; everything else has the first only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AclKind {
    /// Who may do what with the inode itself.
    Access,
    /// What is made in the directory begins with this one.
    Default,
}

impl AclKind {
    /// The list that is behind this extended attribute, if one is.
    pub fn of(name: &[u8]) -> Option<AclKind> {
        [AclKind::Access, AclKind::Default].into_iter().find(|kind| kind.name() == name)
    }

    /// Its extended attribute.
    pub fn name(self) -> &'static [u8] {
        match self {
            AclKind::Access => b"system.posix_acl_access",
            AclKind::Default => b"system.posix_acl_default",
        }
    }

    fn flag(self) -> u32 {
        match self {
            AclKind::Access => HAS_ACCESS_ACL,
            AclKind::Default => HAS_DEFAULT_ACL,
        }
    }
}

/// Whom an entry is for. The numbers are the kernel's, and the order that of a list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u16)]
enum Tag {
    Owner = 0x01,
    User = 0x02,
    Group = 0x04,
    NamedGroup = 0x08,
    Mask = 0x10,
    Others = 0x20,
}

impl Tag {
    const ALL: [Tag; 6] = [Tag::Owner, Tag::User, Tag::Group, Tag::NamedGroup, Tag::Mask, Tag::Others];

    /// May stand in a list more than once, each time for another user or group.
    fn is_named(self) -> bool {
        matches!(self, Tag::User | Tag::NamedGroup)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    tag: Tag,
    /// Three bits: read, write, execute.
    perm: u16,
    /// Of the user or group that is named.
    id: u32,
}

/// A list that is valid: in order, owner, group and others once each, a mask where somebody is named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Acl(Vec<Entry>);

impl Acl {
    /// The list in an attribute's value; `None` if it is no valid list.
    fn parse(bytes: &[u8]) -> Option<Acl> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (entries, odd) = rest.as_chunks::<8>();
        if u32::from_le_bytes(*version) != VERSION || !odd.is_empty() {
            return None;
        }
        let entry = |&[t0, t1, p0, p1, i0, i1, i2, i3]: &[u8; 8]| {
            let number = u16::from_le_bytes([t0, t1]);
            let tag = Tag::ALL.into_iter().find(|tag| *tag as u16 == number)?;
            let (perm, id) = (u16::from_le_bytes([p0, p1]), u32::from_le_bytes([i0, i1, i2, i3]));
            (perm & !RWX == 0).then_some(Entry { tag, perm, id })
        };
        let entries: Vec<Entry> = entries.iter().map(entry).collect::<Option<_>>()?;
        let in_order = entries.windows(2).all(|pair| match pair {
            [a, b] => a.tag < b.tag || (a.tag == b.tag && a.tag.is_named()),
            _ => true,
        });
        let has = |tag: Tag| entries.iter().any(|e| e.tag == tag);
        let complete = has(Tag::Owner) && has(Tag::Group) && has(Tag::Others);
        let masked = has(Tag::Mask) || !entries.iter().any(|e| e.tag.is_named());
        (in_order && complete && masked).then_some(Acl(entries))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            out.extend_from_slice(&(entry.tag as u16).to_le_bytes());
            out.extend_from_slice(&entry.perm.to_le_bytes());
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
        out
    }

    /// Says no more than a mode can.
    fn is_minimal(&self) -> bool {
        self.0.iter().all(|e| matches!(e.tag, Tag::Owner | Tag::Group | Tag::Others))
    }

    /// The entries that a mode's bits stand for, each with the place of its bits in a mode.
    fn classes(&mut self) -> impl Iterator<Item = (&mut Entry, u32)> {
        let group_class = if self.0.iter().any(|e| e.tag == Tag::Mask) { Tag::Mask } else { Tag::Group };
        self.0.iter_mut().filter_map(move |e| match e.tag {
            Tag::Owner => Some((e, 6)),
            Tag::Others => Some((e, 0)),
            tag if tag == group_class => Some((e, 3)),
            _ => None,
        })
    }

    /// The nine permission bits that say the same.
    fn permissions(&mut self) -> u32 {
        self.classes().map(|(e, shift)| u32::from(e.perm) << shift).sum()
    }

    /// chmod(2) of a file with a list.
    fn set_permissions(&mut self, mode: u32) {
        for (entry, shift) in self.classes() {
            entry.perm = (mode >> shift) as u16 & RWX;
        }
    }
}

/// A list in the form in which two that say the same are the same bytes; `None` for one that says no more than a mode.
/// What is no list stays as it is.
pub fn canonical(kind: AclKind, value: &[u8]) -> Option<Vec<u8>> {
    let Some(mut acl) = Acl::parse(value) else { return Some(value.to_vec()) };
    if kind == AclKind::Access && acl.is_minimal() {
        return None;
    }
    // Who is not named has no number, and each system fills the place as it likes.
    acl.0.iter_mut().filter(|entry| !entry.tag.is_named()).for_each(|entry| entry.id = u32::MAX);
    acl.0.sort_by_key(|entry| (entry.tag, entry.id));
    Some(acl.encode())
}

impl Fs {
    /// Sets a list, or with `None` removes it. `in_group` says whether who asks is in a group, or may act as if: if
    /// not in that of the file, its set-group-id bit goes, as with chmod(2). `EINVAL` if it is no list, `EACCES` for a
    /// default list on anything but a directory.
    pub fn set_acl(
        &self,
        ino: Ino,
        kind: AclKind,
        value: Option<&[u8]>,
        in_group: impl Fn(u32) -> bool,
    ) -> Result<()> {
        let acl = match value {
            Some(bytes) => Some(Acl::parse(bytes).ok_or(super::Error::Os(libc::EINVAL))?),
            None => None,
        };
        let mut tx = if acl.is_some() { self.begin_growing()? } else { self.begin()? };
        let now = tx.now;
        let inode = tx.inode(ino)?;
        match (inode.kind(), kind) {
            (FileType::Symlink, _) => return os(libc::EOPNOTSUPP),
            (FileType::Directory, _) | (_, AclKind::Access) => {}
            (_, AclKind::Default) if acl.is_none() => return Ok(()),
            (_, AclKind::Default) => return os(libc::EACCES),
        }
        if acl.is_none() && inode.flags & kind.flag() == 0 {
            return Ok(());
        }
        inode.ctime = now;
        let mut stored = acl;
        if let (AclKind::Access, Some(acl)) = (kind, &mut stored) {
            inode.mode = (inode.mode & !0o777) | acl.permissions();
            if !in_group(inode.gid) {
                inode.mode &= !libc::S_ISGID;
            }
            if acl.is_minimal() {
                stored = None;
            }
        }
        tx.store_acl(ino, kind, stored.as_ref())?;
        tx.apply();
        Ok(())
    }
}

impl Tx<'_> {
    fn store_acl(&mut self, ino: Ino, kind: AclKind, acl: Option<&Acl>) -> Result<()> {
        let inode = self.inode(ino)?;
        match acl {
            Some(acl) => {
                inode.flags |= kind.flag() | HAS_XATTR;
                self.put(key::xattr(ino, kind.name()), Some(encode_xattr(&acl.encode())));
            }
            None if inode.flags & kind.flag() != 0 => {
                inode.flags &= !kind.flag();
                self.put(key::xattr(ino, kind.name()), None);
            }
            None => {}
        }
        Ok(())
    }

    /// The list an inode has.
    pub(super) fn acl(&mut self, ino: Ino, kind: AclKind) -> Result<Option<Acl>> {
        if self.inode(ino)?.flags & kind.flag() == 0 {
            return Ok(None);
        }
        let damaged = |what| log::Error::corrupt(format!("the access list of inode {}", ino.0), what);
        let value = self.st.get(self.frames(), &key::xattr(ino, kind.name()))?;
        let value = value.ok_or_else(|| damaged("it is missing"))?;
        let acl = Acl::parse(decode_xattr(&value)?).ok_or_else(|| damaged("it is not valid"))?;
        Ok(Some(acl))
    }

    /// The inode's mode has changed: the list follows.
    pub fn chmod_acl(&mut self, ino: Ino, mode: u32) -> Result<()> {
        if let Some(mut acl) = self.acl(ino, AclKind::Access)? {
            acl.set_permissions(mode);
            self.store_acl(ino, AclKind::Access, Some(&acl))?;
        }
        Ok(())
    }

    /// The mode of a new inode in `dir`, and its lists. Where the directory has a default list, this takes the place
    /// of the umask: the new inode gets at most what both the list and the asked mode allow.
    pub fn inherit_acl(&mut self, dir: Ino, ino: Ino, node: &NewNode<'_>) -> Result<u32> {
        if node.kind == FileType::Symlink {
            return Ok(node.mode);
        }
        let Some(default) = self.acl(dir, AclKind::Default)? else { return Ok(node.mode & !node.umask) };
        let mut access = default.clone();
        let mode = node.mode & (!0o777 | access.permissions());
        access.set_permissions(mode);
        if !access.is_minimal() {
            self.store_acl(ino, AclKind::Access, Some(&access))?;
        }
        if node.kind == FileType::Directory {
            self.store_acl(ino, AclKind::Default, Some(&default))?;
        }
        Ok(mode)
    }
}

/// A fuzz target: an attribute's value that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz(bytes: &[u8]) {
    let Some(mut acl) = Acl::parse(bytes) else { return };
    assert_eq!(acl.encode(), bytes);
    let mode = acl.permissions();
    acl.set_permissions(mode);
    assert_eq!(Acl::parse(&acl.encode()).map(|mut again| again.permissions()), Some(mode));
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: u32 = u32::MAX;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&perm.to_le_bytes());
            out.extend_from_slice(&id.to_le_bytes());
        }
        out
    }

    const OWNER: (u16, u16, u32) = (1, 7, NOBODY);
    const GROUP: (u16, u16, u32) = (4, 5, NOBODY);
    const OTHERS: (u16, u16, u32) = (0x20, 1, NOBODY);

    #[test]
    fn a_valid_list_comes_back_as_it_was() {
        let bytes = acl(&[OWNER, (2, 6, 10), (2, 4, 11), GROUP, (8, 2, 7), (0x10, 3, NOBODY), OTHERS]);
        let mut parsed = Acl::parse(&bytes).expect("valid");
        assert_eq!(parsed.encode(), bytes);
        assert!(!parsed.is_minimal());
        assert_eq!(parsed.permissions(), 0o731, "the mask stands for the group");
        parsed.set_permissions(0o640);
        assert_eq!(parsed.permissions(), 0o640);
        let group = parsed.0.iter().find(|e| e.tag == Tag::Group).expect("there");
        assert_eq!(group.perm, 5, "the group's own entry stays when there is a mask");
    }

    #[test]
    fn without_a_mask_the_group_is_the_group() {
        let mut parsed = Acl::parse(&acl(&[OWNER, GROUP, OTHERS])).expect("valid");
        assert!(parsed.is_minimal());
        assert_eq!(parsed.permissions(), 0o751);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let mask = (0x10, 7, NOBODY);
        let bad: &[&[(u16, u16, u32)]] = &[
            &[],
            &[OWNER, GROUP],
            &[OWNER, OTHERS, GROUP],
            &[OWNER, OWNER, GROUP, OTHERS],
            &[OWNER, (2, 7, 10), GROUP, OTHERS],
            &[OWNER, GROUP, mask, mask, OTHERS],
            &[OWNER, GROUP, OTHERS, (0x40, 7, 0)],
            &[(1, 8, NOBODY), GROUP, OTHERS],
        ];
        for entries in bad {
            assert_eq!(Acl::parse(&acl(entries)), None, "{entries:?}");
        }
        let good = acl(&[OWNER, GROUP, OTHERS]);
        assert_eq!(Acl::parse(&good[..good.len() - 1]), None);
        assert_eq!(Acl::parse(&[]), None);
        assert_eq!(Acl::parse(&[&3u32.to_le_bytes(), &good[4..]].concat()), None);
    }
}
