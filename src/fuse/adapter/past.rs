//! Requests for older versions inside the mount (`.embassyfs/at`): reading, and nothing else.
//! Invariant: numbers are turned on the way in and on the way out, so that no version sees another's, and every number
//! that a reply tells the kernel is counted.

use super::convert::{blank, file_attr, fuse_kind, negative};
use super::reply::{self, GENERATION, TTL};
use super::request::{self, ino, untrusted};
use crate::fs::{Attr, DirItem};
use crate::fuse::control_dir::DIRECTORY;
use crate::fuse::past::{AT, Past, Version};
use crate::fuse::serve::Served;
use crate::types::{Ino, Timestamp};
use fuser::{
    Errno, FileAttr, FileType, INodeNo, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry,
    ReplyLseek, ReplyXattr, Request,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// Entries taken at once for a readdir reply.
const DIR_BATCH: usize = 256;

/// See the module.
pub(super) struct PastDir {
    past: Arc<Past>,
    pool: Handle,
    owner: (u32, u32),
    since: Timestamp,
}

/// Unpacks what a number stands for, or answers that it stands for nothing any more.
macro_rules! find {
    ($self:ident, $n:ident, $reply:ident) => {
        match $self.past.find(ino($n)) {
            Ok(found) => found,
            Err(e) => return $reply.error(Errno::from_i32(e)),
        }
    };
}

impl PastDir {
    pub fn new(past: Past, pool: Handle, owner: (u32, u32), since: Timestamp) -> PastDir {
        PastDir { past: Arc::new(past), pool, owner, since }
    }

    /// The attributes of `at` itself.
    pub fn directory(&self) -> FileAttr {
        let (uid, gid) = self.owner;
        let kind = FileType::Directory;
        FileAttr { ino: INodeNo(AT.0), kind, perm: 0o555, nlink: 2, uid, gid, ..blank(self.since) }
    }

    /// A name in `at` is a version; any other lies in one. Opening a version asks the store, so it is left to the pool.
    pub fn lookup(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if ino(parent) != AT {
            let (version, dir) = find!(self, parent, reply);
            let (name, past) = (name.as_bytes().to_vec(), self.past.clone());
            let find = move |fs: &crate::fs::Fs| fs.lookup(dir, &name);
            let requests = version.requests.clone();
            return requests.serve("lookup", find, move |_, found| entry(&past, &version, reply, found, TTL));
        }
        let Some(name) = name.to_str().map(str::to_owned) else {
            return reply.error(Errno::from_i32(libc::ENOENT));
        };
        let past = self.past.clone();
        if let Some(version) = past.known(&name) {
            return root(&past, version, reply);
        }
        self.pool.spawn(async move {
            match past.open(&name).await {
                Ok(version) => root(&past, version, reply),
                Err(e) => reply.error(Errno::from_i32(e)),
            }
        });
    }

    pub fn forget(&self, n: INodeNo, nlookup: u64) {
        self.past.forget(ino(n), nlookup);
    }

    pub fn getattr(&self, n: INodeNo, reply: ReplyAttr) {
        if ino(n) == AT {
            return reply.attr(&TTL, &self.directory());
        }
        let (version, inside) = find!(self, n, reply);
        let requests = version.requests.clone();
        let ask = move |fs: &crate::fs::Fs| fs.getattr(inside);
        requests.serve("getattr", ask, move |_, found| match found.and_then(|a| outside(&version, &a)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    pub fn readlink(&self, n: INodeNo, reply: ReplyData) {
        let (version, inside) = find!(self, n, reply);
        version.requests.serve(
            "readlink",
            move |fs| fs.readlink(inside),
            move |_, found| match found {
                Ok(target) => reply.data(&target),
                Err(e) => reply.error(Errno::from_i32(e)),
            },
        );
    }

    pub fn read(&self, n: INodeNo, offset: u64, size: u32, reply: ReplyData) {
        let (version, inside) = find!(self, n, reply);
        version.requests.read(inside, offset, size as usize, false, move |found| match found {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }

    pub fn readdir(&self, n: INodeNo, offset: u64, mut reply: ReplyDirectory) {
        if ino(n) == AT {
            for (next, name, number) in itself(offset) {
                if reply.add(INodeNo(number.0), next, FileType::Directory, name) {
                    break;
                }
            }
            return reply.ok();
        }
        let (version, dir) = find!(self, n, reply);
        let requests = version.requests.clone();
        let list = move |fs: &crate::fs::Fs| fs.readdir(dir, offset, DIR_BATCH);
        requests.serve("readdir", list, move |_, found| {
            let items = match found {
                Ok(items) => items,
                Err(e) => return reply.error(Errno::from_i32(e)),
            };
            for item in items {
                let Ok(number) = number(&version, item.ino) else { continue };
                let name = OsStr::from_bytes(&item.name);
                if reply.add(number, item.cookie, fuse_kind(item.kind), name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    pub fn readdirplus(&self, n: INodeNo, offset: u64, mut reply: ReplyDirectoryPlus) {
        if ino(n) == AT {
            for (next, name, number) in itself(offset) {
                let attr = FileAttr { ino: INodeNo(number.0), ..self.directory() };
                if reply.add(attr.ino, next, name, &Duration::ZERO, &attr, GENERATION) {
                    break;
                }
            }
            return reply.ok();
        }
        let (version, dir) = find!(self, n, reply);
        let (requests, past) = (version.requests.clone(), self.past.clone());
        let list = move |fs: &crate::fs::Fs| fs.readdir_plus(dir, offset, DIR_BATCH);
        requests.serve("readdirplus", list, move |_, found: Served<Vec<(DirItem, Attr)>>| {
            let items = match found {
                Ok(items) => items,
                Err(e) => return reply.error(Errno::from_i32(e)),
            };
            for (item, attr) in items {
                let Ok(attr) = outside(&version, &attr) else { continue };
                let name = OsStr::from_bytes(&item.name);
                if reply.add(attr.ino, item.cookie, name, &TTL, &attr, GENERATION) {
                    break;
                }
                if item.name != b"." && item.name != b".." {
                    past.told(ino(attr.ino));
                }
            }
            reply.ok();
        });
    }

    pub fn getxattr(&self, n: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if ino(n) == AT {
            return reply.error(Errno::from_i32(libc::ENODATA));
        }
        let (version, inside) = find!(self, n, reply);
        let name = name.as_bytes().to_vec();
        let get = move |fs: &crate::fs::Fs| fs.getxattr(inside, &name);
        version.requests.serve("getxattr", get, move |_, found| reply::xattr(reply, size, found));
    }

    pub fn listxattr(&self, req: &Request, n: INodeNo, size: u32, reply: ReplyXattr) {
        if ino(n) == AT {
            return reply::xattr(reply, size, Ok(Vec::new()));
        }
        let (version, inside) = find!(self, n, reply);
        let all = req.uid() == 0;
        let list = move |fs: &crate::fs::Fs| {
            fs.listxattr(inside).map(|names| if all { names } else { untrusted(&names) })
        };
        version.requests.serve("listxattr", list, move |_, found| reply::xattr(reply, size, found));
    }

    pub fn lseek(&self, n: INodeNo, offset: i64, whence: i32, reply: ReplyLseek) {
        let (what, offset) = match request::seek(offset, whence) {
            Ok(asked) => asked,
            Err(e) => return reply.error(e),
        };
        let (version, inside) = find!(self, n, reply);
        let seek = move |fs: &crate::fs::Fs| fs.seek(inside, offset, what);
        version.requests.serve("lseek", seek, move |_, found| match found {
            Ok(at) => reply.offset(at as i64),
            Err(e) => reply.error(Errno::from_i32(e)),
        });
    }
}

/// What a listing of `at` shows behind `offset`: nothing but itself, for the versions are too many.
fn itself(offset: u64) -> impl Iterator<Item = (u64, &'static str, Ino)> {
    [(1, ".", AT), (2, "..", DIRECTORY)].into_iter().filter(move |(next, ..)| *next > offset)
}

fn number(version: &Version, inside: Ino) -> Served<INodeNo> {
    version.outside(inside).map(|outside| INodeNo(outside.0)).ok_or(libc::EOVERFLOW)
}

fn outside(version: &Version, attr: &Attr) -> Served<FileAttr> {
    Ok(FileAttr { ino: number(version, attr.ino)?, ..file_attr(attr) })
}

fn entry(past: &Past, version: &Version, reply: ReplyEntry, found: Served<Attr>, ttl: Duration) {
    match found.and_then(|attr| outside(version, &attr)) {
        Ok(attr) => {
            past.told(ino(attr.ino));
            reply.entry_with_ttls(&TTL, &ttl, &attr, GENERATION);
        }
        Err(libc::ENOENT) => reply.entry(&TTL, &negative(), GENERATION),
        Err(e) => reply.error(Errno::from_i32(e)),
    }
}

/// The root of a version. Its name is asked for each time: the version behind it can be closed.
fn root(past: &Arc<Past>, version: Version, reply: ReplyEntry) {
    let (past, requests) = (past.clone(), version.requests.clone());
    let find = |fs: &crate::fs::Fs| fs.getattr(Ino::ROOT);
    requests.serve("lookup", find, move |_, found| entry(&past, &version, reply, found, Duration::ZERO));
}
