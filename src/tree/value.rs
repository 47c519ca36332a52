//! The values of the tree: what stands behind each kind of key. Every value starts with its format version.
//! Invariant: `decode(encode(x)) == x`, and bytes that `encode` cannot have made are [`crate::log::Error::Corrupt`].

use super::codec::{Reader, put_ptr, put_time};
use super::delta::Value;
use crate::log::Result;
use crate::types::{FramePtr, Ino, Timestamp};

/// Version of the value formats.
const VERSION: u8 = 1;

/// The permission bits with set-user-id, set-group-id and sticky.
pub const MODE_MASK: u32 = 0o7777;

/// Longest name in a directory, in bytes.
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes.
pub const TARGET_MAX: usize = 4095;
/// No inode has more links: one can be added without a thought.
const LINKS_MAX: u32 = i32::MAX as u32;

/// Inode flag: the file has holes, so that what lies between its extents is zeros on purpose.
pub const SPARSE: u32 = 1;
/// Inode flag: there is a `security.capability` attribute, which a write must drop.
pub const HAS_CAPABILITY_XATTR: u32 = 1 << 1;
/// Inode flag: there are extended attributes; without it a lookup of one need not search.
pub const HAS_XATTR: u32 = 1 << 2;

/// Inode flag: it has an access control list.
pub const HAS_ACCESS_ACL: u32 = 1 << 3;
/// Inode flag: the directory has a list to hand down.
pub const HAS_DEFAULT_ACL: u32 = 1 << 4;

const KNOWN_FLAGS: u32 = SPARSE | HAS_CAPABILITY_XATTR | HAS_XATTR | HAS_ACCESS_ACL | HAS_DEFAULT_ACL;

/// What an inode is. The numbers are those of the format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FileType {
    /// Regular file.
    Regular = 1,
    /// Directory.
    Directory = 2,
    /// Symbolic link.
    Symlink = 3,
    /// Named pipe.
    Fifo = 4,
    /// Unix socket.
    Socket = 5,
    /// Character device.
    CharDevice = 6,
    /// Block device.
    BlockDevice = 7,
}

impl FileType {
    /// The type with this number in the format, if there is one.
    pub fn from_u8(n: u8) -> Option<FileType> {
        use FileType::*;
        [Regular, Directory, Symlink, Fifo, Socket, CharDevice, BlockDevice]
            .into_iter()
            .find(|t| *t as u8 == n)
    }
}

/// What only inodes of one type have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// Regular file.
    Regular,
    /// Directory.
    Directory {
        /// The directory that holds this one; the root is its own parent.
        parent: Ino,
        /// Id of the next entry; grows by one with each, and is never taken back.
        next_entry: u64,
        /// How many entries there are, without `.` and `..`.
        entries: u64,
    },
    /// Symbolic link.
    Symlink {
        /// Where it points.
        target: Vec<u8>,
    },
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device with its number.
    CharDevice(u32),
    /// Block device with its number.
    BlockDevice(u32),
}

/// The attributes of an inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inode {
    /// Permission bits (see [`MODE_MASK`]), without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names (for a directory: 2 and one for each directory in it).
    pub nlink: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bits that are named constants of this module.
    pub flags: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the contents.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// The type, and what only this type has.
    pub body: Body,
}

impl Inode {
    /// The type.
    pub fn kind(&self) -> FileType {
        match self.body {
            Body::Regular => FileType::Regular,
            Body::Directory { .. } => FileType::Directory,
            Body::Symlink { .. } => FileType::Symlink,
            Body::Fifo => FileType::Fifo,
            Body::Socket => FileType::Socket,
            Body::CharDevice(_) => FileType::CharDevice,
            Body::BlockDevice(_) => FileType::BlockDevice,
        }
    }

    /// The device number; 0 unless this is a device.
    pub fn rdev(&self) -> u32 {
        match self.body {
            Body::CharDevice(rdev) | Body::BlockDevice(rdev) => rdev,
            _ => 0,
        }
    }

    /// The value to store.
    pub fn encode(&self) -> Value {
        let mut out = Vec::with_capacity(100);
        out.extend_from_slice(&[VERSION, self.kind() as u8]);
        out.extend_from_slice(&((self.mode & MODE_MASK) as u16).to_le_bytes());
        for number in [self.uid, self.gid, self.nlink, self.flags] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.size.to_le_bytes());
        for time in [self.atime, self.mtime, self.ctime, self.btime] {
            put_time(&mut out, time);
        }
        match &self.body {
            Body::Regular | Body::Fifo | Body::Socket => {}
            Body::Directory { parent, next_entry, entries } => {
                for number in [parent.0, *next_entry, *entries] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            Body::Symlink { target } => out.extend_from_slice(target),
            Body::CharDevice(rdev) | Body::BlockDevice(rdev) => out.extend_from_slice(&rdev.to_le_bytes()),
        }
        out.into()
    }

    /// The inode in a stored value.
    pub fn decode(bytes: &[u8]) -> Result<Inode> {
        let mut r = Reader::versioned(bytes, "inode value", VERSION)?;
        let kind = file_type(&mut r)?;
        let mode = u32::from(r.u16()?);
        let (uid, gid, nlink, flags) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        if mode & !MODE_MASK != 0 || flags & !KNOWN_FLAGS != 0 {
            return Err(r.bad(format!("unknown bits in mode {mode:o} or flags {flags:x}")));
        }
        let size = r.number()?;
        if nlink > LINKS_MAX {
            return Err(r.bad(format!("{nlink} links")));
        }
        let (atime, mtime, ctime, btime) = (r.time()?, r.time()?, r.time()?, r.time()?);
        let body = match kind {
            FileType::Regular => Body::Regular,
            FileType::Directory => {
                let (parent, next_entry, entries) = (inode_number(&mut r)?, r.number()?, r.u64()?);
                if entries > next_entry {
                    return Err(
                        r.bad(format!("{entries} entries, though {next_entry} is the next one's number"))
                    );
                }
                Body::Directory { parent, next_entry, entries }
            }
            FileType::Symlink => {
                let target = r.take(r.left())?;
                if target.is_empty() || target.len() > TARGET_MAX {
                    return Err(r.bad("what it points to is no path"));
                }
                Body::Symlink { target: target.to_vec() }
            }
            FileType::Fifo => Body::Fifo,
            FileType::Socket => Body::Socket,
            FileType::CharDevice => Body::CharDevice(r.u32()?),
            FileType::BlockDevice => Body::BlockDevice(r.u32()?),
        };
        r.finish()?;
        Ok(Inode { mode, uid, gid, nlink, size, flags, atime, mtime, ctime, btime, body })
    }
}

/// A directory entry, found by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dirent {
    /// Id of the entry in its directory.
    pub entry: u64,
    /// The inode it names.
    pub ino: Ino,
    /// The inode's type.
    pub kind: FileType,
}

impl Dirent {
    /// The value to store.
    pub fn encode(&self) -> Value {
        let mut out = [0; 18];
        out[..2].copy_from_slice(&[VERSION, self.kind as u8]);
        out[2..10].copy_from_slice(&self.entry.to_le_bytes());
        out[10..].copy_from_slice(&self.ino.0.to_le_bytes());
        Value::from(out.as_slice())
    }

    /// The entry in a stored value.
    pub fn decode(bytes: &[u8]) -> Result<Dirent> {
        let mut r = Reader::versioned(bytes, "directory entry value", VERSION)?;
        let kind = file_type(&mut r)?;
        let dirent = Dirent { kind, entry: r.u64()?, ino: inode_number(&mut r)? };
        r.finish()?;
        Ok(dirent)
    }
}

/// A directory entry, found by its id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    /// The inode it names.
    pub ino: Ino,
    /// The inode's type.
    pub kind: FileType,
    /// The name.
    pub name: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The value to store.
    pub fn encode(&self) -> Value {
        let mut out = Vec::with_capacity(10 + self.name.len());
        out.extend_from_slice(&[VERSION, self.kind as u8]);
        out.extend_from_slice(&self.ino.0.to_le_bytes());
        out.extend_from_slice(self.name);
        out.into()
    }

    /// The entry in a stored value.
    pub fn decode(bytes: &'a [u8]) -> Result<Entry<'a>> {
        let mut r = Reader::versioned(bytes, "directory entry id value", VERSION)?;
        let kind = file_type(&mut r)?;
        let ino = inode_number(&mut r)?;
        let name = r.take(r.left())?;
        let special = matches!(name, b"" | b"." | b"..");
        if special || name.len() > NAME_MAX || name.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err(r.bad("its name is none that a file can have"));
        }
        Ok(Entry { ino, kind, name })
    }
}

/// Where the bytes of a piece of a file are; its offset in the file is in the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent<'a> {
    /// In a DATA frame.
    Stored {
        /// The frame.
        ptr: FramePtr,
        /// Offset in the frame's plain bytes.
        from: u32,
        /// Length, not 0.
        len: u32,
    },
    /// Here.
    Inline {
        /// The bytes, not none.
        bytes: &'a [u8],
    },
}

const STORED: u8 = 1;
const INLINE: u8 = 2;

impl<'a> Extent<'a> {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Extent::Stored { len, .. } => u64::from(*len),
            Extent::Inline { bytes } => bytes.len() as u64,
        }
    }

    /// True of no extent that was decoded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value to store.
    pub fn encode(&self) -> Value {
        let mut out = Vec::with_capacity(26);
        match self {
            Extent::Stored { ptr, from, len } => {
                out.extend_from_slice(&[VERSION, STORED]);
                put_ptr(&mut out, *ptr);
                out.extend_from_slice(&from.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }
            Extent::Inline { bytes } => {
                out.reserve_exact(2 + bytes.len());
                out.extend_from_slice(&[VERSION, INLINE]);
                out.extend_from_slice(bytes);
            }
        }
        out.into()
    }

    /// The extent in a stored value.
    pub fn decode(bytes: &'a [u8]) -> Result<Extent<'a>> {
        let mut r = Reader::versioned(bytes, "extent value", VERSION)?;
        let extent = match r.u8()? {
            STORED => {
                let (ptr, from, len) = (r.ptr()?, r.u32()?, r.u32()?);
                if from.checked_add(len).is_none() {
                    return Err(r.bad("it ends beyond any frame"));
                }
                Extent::Stored { ptr, from, len }
            }
            INLINE => Extent::Inline { bytes: r.take(r.left())? },
            other => return Err(r.bad(format!("unknown form {other}"))),
        };
        r.finish()?;
        if extent.is_empty() { Err(r.bad("it is empty")) } else { Ok(extent) }
    }
}

/// The value to store for an extended attribute.
pub fn encode_xattr(bytes: &[u8]) -> Value {
    let mut out = Vec::with_capacity(1 + bytes.len());
    out.push(VERSION);
    out.extend_from_slice(bytes);
    out.into()
}

/// The extended attribute in a stored value.
pub fn decode_xattr(bytes: &[u8]) -> Result<&[u8]> {
    Ok(Reader::versioned(bytes, "extended attribute value", VERSION)?.rest())
}

/// The value to store for an orphan.
pub fn encode_orphan() -> Value {
    Value::from([VERSION].as_slice())
}

/// Checks the value that is stored for an orphan.
pub fn decode_orphan(bytes: &[u8]) -> Result<()> {
    Reader::versioned(bytes, "orphan value", VERSION)?.finish()
}

fn inode_number(r: &mut Reader<'_>) -> Result<Ino> {
    match r.u64()? {
        0 => Err(r.bad("inode 0 is none")),
        number => Ok(Ino(number)),
    }
}

fn file_type(r: &mut Reader<'_>) -> Result<FileType> {
    let number = r.u8()?;
    FileType::from_u8(number).ok_or_else(|| r.bad(format!("unknown file type {number}")))
}
