//! Making files below a directory by handle and name, so that a symbolic link that lies there leads nowhere else.
//! Invariant: no call here follows a symbolic link in a name it is given, and none replaces what is there unless it is
//! [`Dir::rename`].

use crate::types::Timestamp;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// An open directory; copies share the handle.
#[derive(Clone)]
pub struct Dir(Arc<OwnedFd>);

fn text(name: &[u8]) -> Result<CString> {
    CString::new(name).map_err(|_| Error::from_raw_os_error(libc::EINVAL))
}

fn checked(result: libc::c_int) -> Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: libc::c_int) -> Result<OwnedFd> {
    let fd = checked(fd)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const DIRECTORY: libc::c_int = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;

impl Dir {
    /// The directory at `path`, wherever it leads.
    pub fn open(path: &Path) -> Result<Dir> {
        let name = text(path.as_os_str().as_bytes())?;
        // SAFETY: `name` is a string that ends with a zero.
        let fd = unsafe { libc::open(name.as_ptr(), DIRECTORY) };
        Ok(Dir(Arc::new(owned(fd)?)))
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The directory `name` in this one.
    pub fn child(&self, name: &[u8]) -> Result<Dir> {
        let name = text(name)?;
        // SAFETY: `name` is a string that ends with a zero.
        let fd = unsafe { libc::openat(self.fd(), name.as_ptr(), DIRECTORY | libc::O_NOFOLLOW) };
        Ok(Dir(Arc::new(owned(fd)?)))
    }

    /// The directory at a path below this one, without a symbolic link on the way.
    pub fn below(&self, path: &[u8]) -> Result<Dir> {
        path.split(|b| *b == b'/')
            .filter(|name| !name.is_empty())
            .try_fold(self.clone(), |dir, name| dir.child(name))
    }

    /// Makes a directory that only its owner may use.
    pub fn mkdir(&self, name: &[u8]) -> Result<()> {
        let name = text(name)?;
        // SAFETY: `name` is a string that ends with a zero.
        checked(unsafe { libc::mkdirat(self.fd(), name.as_ptr(), 0o700) }).map(drop)
    }

    /// Makes a file that is not there yet.
    pub fn create(&self, name: &[u8]) -> Result<File> {
        let name = text(name)?;
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: `name` is a string that ends with a zero.
        let fd = unsafe { libc::openat(self.fd(), name.as_ptr(), flags, 0o600) };
        Ok(File::from(owned(fd)?))
    }

    /// What is there under that name; `None`: nothing.
    pub fn stat(&self, name: &[u8]) -> Result<Option<libc::stat>> {
        let name = text(name)?;
        // SAFETY: stat is plain data for which all zeroes is a valid value.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: `name` ends with a zero, `stat` is a valid place for the answer.
        match checked(unsafe { libc::fstatat(self.fd(), name.as_ptr(), &raw mut stat, flags) }) {
            Ok(_) => Ok(Some(stat)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Where the symbolic link `name` points.
    pub fn readlink(&self, name: &[u8]) -> Result<Vec<u8>> {
        let name = text(name)?;
        let mut out = vec![0; libc::PATH_MAX as usize];
        // SAFETY: `name` ends with a zero, `out` is a valid place of its length.
        let len = unsafe { libc::readlinkat(self.fd(), name.as_ptr(), out.as_mut_ptr().cast(), out.len()) };
        if len < 0 {
            return Err(Error::last_os_error());
        }
        out.truncate(len as usize);
        Ok(out)
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, target: &[u8], name: &[u8]) -> Result<()> {
        let (target, name) = (text(target)?, text(name)?);
        // SAFETY: both are strings that end with a zero.
        checked(unsafe { libc::symlinkat(target.as_ptr(), self.fd(), name.as_ptr()) }).map(drop)
    }

    /// Makes a device, pipe or socket: `mode` with the type's bits.
    pub fn mknod(&self, name: &[u8], mode: u32, rdev: u64) -> Result<()> {
        let name = text(name)?;
        // SAFETY: `name` is a string that ends with a zero.
        checked(unsafe { libc::mknodat(self.fd(), name.as_ptr(), mode, rdev) }).map(drop)
    }

    /// Gives `from` in `other` a further name here.
    pub fn link(&self, other: &Dir, from: &[u8], name: &[u8]) -> Result<()> {
        let (from, name) = (text(from)?, text(name)?);
        // SAFETY: both are strings that end with a zero; without AT_SYMLINK_FOLLOW no link is followed.
        checked(unsafe { libc::linkat(other.fd(), from.as_ptr(), self.fd(), name.as_ptr(), 0) }).map(drop)
    }

    /// Gives `from` the name `to`, over what has it.
    pub fn rename(&self, from: &[u8], to: &[u8]) -> Result<()> {
        let (from, to) = (text(from)?, text(to)?);
        // SAFETY: both are strings that end with a zero.
        checked(unsafe { libc::renameat(self.fd(), from.as_ptr(), self.fd(), to.as_ptr()) }).map(drop)
    }

    /// Removes a name that is no directory's, if it is there.
    pub fn unlink(&self, name: &[u8]) -> Result<()> {
        let name = text(name)?;
        // SAFETY: `name` is a string that ends with a zero.
        match checked(unsafe { libc::unlinkat(self.fd(), name.as_ptr(), 0) }) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    /// Changes the owner.
    pub fn chown(&self, name: &[u8], uid: u32, gid: u32) -> Result<()> {
        let name = text(name)?;
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: `name` is a string that ends with a zero.
        checked(unsafe { libc::fchownat(self.fd(), name.as_ptr(), uid, gid, flags) }).map(drop)
    }

    /// Changes the mode of what is no symbolic link.
    pub fn chmod(&self, name: &[u8], mode: u32) -> Result<()> {
        match self.stat(name)? {
            Some(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFLNK => {
                return Err(Error::from_raw_os_error(libc::ELOOP));
            }
            _ => {}
        }
        let name = text(name)?;
        // SAFETY: `name` is a string that ends with a zero.
        checked(unsafe { libc::fchmodat(self.fd(), name.as_ptr(), mode, 0) }).map(drop)
    }

    /// Changes the times of access and modification.
    pub fn set_times(&self, name: &[u8], atime: Timestamp, mtime: Timestamp) -> Result<()> {
        let name = text(name)?;
        let time = |t: Timestamp| libc::timespec { tv_sec: t.secs, tv_nsec: i64::from(t.nanos) };
        let times = [time(atime), time(mtime)];
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: `name` ends with a zero, `times` has the two entries that are read.
        checked(unsafe { libc::utimensat(self.fd(), name.as_ptr(), times.as_ptr(), flags) }).map(drop)
    }

    /// Sets an extended attribute.
    pub fn set_xattr(&self, name: &[u8], attribute: &[u8], value: &[u8]) -> Result<()> {
        let path = [format!("/proc/self/fd/{}/", self.fd()).as_bytes(), name].concat();
        let (path, attribute) = (text(&path)?, text(attribute)?);
        // SAFETY: both are strings that end with a zero, `value` is readable for its length; the last name of the path
        // is not followed, and the ones before it are the kernel's.
        let set = unsafe { set(&path, &attribute, value) };
        checked(set).map(drop)
    }

    /// The extended attributes of what has this name; none where there can be none.
    pub fn xattrs(&self, name: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let path = text(&[format!("/proc/self/fd/{}/", self.fd()).as_bytes(), name].concat())?;
        // SAFETY: `path` ends with a zero, the place for the answer has the length that is said.
        let names = grown(|out, len| unsafe { libc::llistxattr(path.as_ptr(), out.cast(), len) });
        let names = match names {
            Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => return Ok(Vec::new()),
            names => names?,
        };
        let mut found = Vec::new();
        for attribute in names.split(|b| *b == 0).filter(|name| !name.is_empty()) {
            let asked = text(attribute)?;
            // SAFETY: as above.
            let value = grown(|out, len| unsafe { libc::lgetxattr(path.as_ptr(), asked.as_ptr(), out, len) });
            match value {
                Err(e) if e.raw_os_error() == Some(libc::ENODATA) => {} // gone since
                value => found.push((attribute.to_vec(), value?)),
            }
        }
        Ok(found)
    }

    /// Takes an extended attribute away, if it is there.
    pub fn remove_xattr(&self, name: &[u8], attribute: &[u8]) -> Result<()> {
        let path = text(&[format!("/proc/self/fd/{}/", self.fd()).as_bytes(), name].concat())?;
        let attribute = text(attribute)?;
        // SAFETY: both are strings that end with a zero; the last name of the path is not followed.
        match checked(unsafe { libc::lremovexattr(path.as_ptr(), attribute.as_ptr()) }) {
            Err(e) if e.raw_os_error() != Some(libc::ENODATA) => Err(e),
            _ => Ok(()),
        }
    }

    /// Opens a file for reading, without its time of access becoming another.
    pub fn read(&self, name: &[u8]) -> Result<File> {
        let name = text(name)?;
        let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let open = |flags| {
            // SAFETY: `name` is a string that ends with a zero.
            owned(unsafe { libc::openat(self.fd(), name.as_ptr(), flags) })
        };
        let opened = match open(flags | libc::O_NOATIME) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => open(flags), // another user's
            opened => opened,
        };
        Ok(File::from(opened?))
    }

    /// Waits until all that was written to this directory's file system is on its disk.
    pub fn sync_all(&self) -> Result<()> {
        // SAFETY: takes a descriptor that is open as long as `self`.
        checked(unsafe { libc::syncfs(self.fd()) }).map(drop)
    }
}

/// What a call answers that is told where to put it, and says how much there is: asked again until the place is enough.
fn grown(ask: impl Fn(*mut libc::c_void, usize) -> isize) -> Result<Vec<u8>> {
    let mut out = vec![0; 4096];
    loop {
        match usize::try_from(ask(out.as_mut_ptr().cast(), out.len())) {
            Ok(len) => {
                out.truncate(len);
                return Ok(out);
            }
            Err(_) => {
                let e = Error::last_os_error();
                // No attribute, and no list of their names, is longer than 64 KiB.
                if e.raw_os_error() != Some(libc::ERANGE) || out.len() > 1 << 20 {
                    return Err(e);
                }
                out = vec![0; out.len() * 4];
            }
        }
    }
}

/// # Safety
/// As lsetxattr(2): the strings end with a zero, `value` is readable.
unsafe fn set(path: &CStr, attribute: &CStr, value: &[u8]) -> libc::c_int {
    // SAFETY: as the caller has promised.
    unsafe { libc::lsetxattr(path.as_ptr(), attribute.as_ptr(), value.as_ptr().cast(), value.len(), 0) }
}
