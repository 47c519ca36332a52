//! The state directory: where this host keeps a volume's log, checkpoints and cache, and the lock on it.
//! Invariant: one process holds a state directory; a file written through [`StateDir::write_atomic`] is there
//! whole or not at all, also after a crash.

use super::segment::seq_of_name;
use super::{Error, Result};
use crate::types::Seq;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Cached segments share a directory in groups of this many numbers.
const CACHE_FAN: u64 = 4096;

/// An open, locked state directory.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    /// Holds the lock until the directory is dropped.
    _lock: File,
}

impl StateDir {
    /// Creates what is missing of the directory, locks it, and clears away what a crash left half made.
    pub fn open(path: &Path) -> Result<StateDir> {
        for sub in ["log", "checkpoint", "cache"] {
            let dir = path.join(sub);
            std::fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        }
        let lock = lock(&path.join("lock"))?;
        let dir = StateDir { root: path.to_owned(), _lock: lock };
        for sub in ["", "log", "checkpoint"] {
            dir.remove_leftovers(sub)?;
        }
        dir.sync_dir("")?;
        Ok(dir)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where segment `seq` lies while it is this host's to keep: unsent, or newer than the local checkpoint.
    pub fn log_path(&self, seq: Seq) -> PathBuf {
        self.root.join(format!("log/{seq}"))
    }

    /// Where the evictable copy of segment `seq` lies; sparse.
    pub fn cache_path(&self, seq: Seq) -> PathBuf {
        self.root.join(format!("cache/{:013x}/{seq}", seq.0 / CACHE_FAN))
    }

    /// Where the index of cached ranges lies.
    pub fn index_path(&self) -> PathBuf {
        self.root.join("index.sled")
    }

    /// Writes the file `name` (relative to the directory) whole and durably, over one that is there.
    pub fn write_atomic(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.root.join(name);
        let tmp = path.with_extension("tmp");
        let write = || {
            let mut file = File::create(&tmp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&tmp, &path)?;
            File::open(path.parent().unwrap_or(&self.root))?.sync_all()
        };
        write().map_err(Error::io(format!("write {}", path.display())))
    }

    /// The file `name` (relative to the directory), if it is there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("read {}", path.display()))(e)),
        }
    }

    /// Makes renames and creations in the sub-directory `sub` durable (`""`: the directory itself).
    pub fn sync_dir(&self, sub: &str) -> Result<()> {
        let path = self.root.join(sub);
        File::open(&path)
            .and_then(|dir| dir.sync_all())
            .map_err(Error::io(format!("sync {}", path.display())))
    }

    /// The segments in `log/` and their sizes in bytes, in order.
    pub fn log_segments(&self) -> Result<Vec<(Seq, u64)>> {
        let mut found = Vec::new();
        for (name, entry) in self.entries("log")? {
            if let Some(seq) = seq_of_name(&name) {
                let meta = entry.metadata().map_err(Error::io(format!("look at log/{name}")))?;
                found.push((seq, meta.len()));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The cached segments, in no order.
    pub fn cache_segments(&self) -> Result<Vec<Seq>> {
        let mut found = Vec::new();
        for (group, _) in self.entries("cache")? {
            let names = self.entries(&format!("cache/{group}"))?;
            found.extend(names.iter().filter_map(|(name, _)| seq_of_name(name)));
        }
        Ok(found)
    }

    /// Names of the local checkpoints as they are in the store, in name order: the newest first.
    pub fn checkpoints(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self
            .entries("checkpoint")?
            .into_iter()
            .filter(|(name, _)| seq_of_name(name).is_some())
            .map(|(name, _)| format!("checkpoint/{name}"))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Bytes that may still be written to the file system the directory lies on.
    pub fn free_bytes(&self) -> Result<u64> {
        let dir = File::open(&self.root).map_err(Error::io(format!("open {}", self.root.display())))?;
        // SAFETY: `statvfs` is plain data for which all zeros is a value, and `fstatvfs` only writes to it.
        let (result, stat) = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            (libc::fstatvfs(dir.as_raw_fd(), &raw mut stat), stat)
        };
        check(result).map_err(Error::io(format!("statvfs {}", self.root.display())))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn entries(&self, sub: &str) -> Result<Vec<(String, std::fs::DirEntry)>> {
        let path = self.root.join(sub);
        let list = || {
            let mut found = Vec::new();
            for entry in std::fs::read_dir(&path)? {
                let entry = entry?;
                if let Ok(name) = entry.file_name().into_string() {
                    found.push((name, entry));
                }
            }
            Ok(found)
        };
        list().map_err(Error::io(format!("list {}", path.display())))
    }

    fn remove_leftovers(&self, sub: &str) -> Result<()> {
        for (name, entry) in self.entries(sub)? {
            if name.ends_with(".tmp") || name.ends_with(".void") {
                std::fs::remove_file(entry.path()).map_err(Error::io(format!("remove {name}")))?;
            }
        }
        Ok(())
    }
}

fn lock(path: &Path) -> Result<File> {
    let wrap = |e| Error::io(format!("lock {}", path.display()))(e);
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(wrap)?;
    // SAFETY: a system call on a descriptor that `file` keeps open; no memory is passed.
    let result = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    match check(result) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::WouldBlock => {
            let mut holder = String::new();
            // Only for the message: a holder that cannot be read is still a holder.
            let _ = (&mut file).take(20).read_to_string(&mut holder);
            return Err(Error::Refused(format!(
                "{} is held by process {}: one process at a time works in a state directory; unmount there first",
                path.display(),
                if holder.trim().is_empty() { "(unknown)" } else { holder.trim() },
            )));
        }
        Err(e) => return Err(wrap(e)),
    }
    file.set_len(0)
        .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
        .map_err(wrap)?;
    Ok(file)
}

/// Gives the blocks of `range` of `file` back to the disk; what is read there afterwards is zeros.
pub(super) fn punch_hole(file: &File, range: std::ops::Range<u64>) -> std::io::Result<()> {
    let (offset, len) = (range.start.cast_signed(), (range.end - range.start).cast_signed());
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a system call on a descriptor that `file` keeps open; no memory is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) })
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// The stretches of a sparse file that are not holes.
pub(super) fn data_ranges(path: &Path) -> io::Result<Vec<Range<u64>>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(&file, at, libc::SEEK_DATA)?
        && start < len
    {
        let end = seek(&file, start, libc::SEEK_HOLE)?.unwrap_or(len);
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// lseek(2) for data or a hole; `None` past the last one.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: lseek takes no pointers, and the descriptor is open for as long as `file` is borrowed.
    match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
        found @ 0.. => Ok(Some(found.cast_unsigned())),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_told_who_holds_the_directory() {
        let tmp = tempfile::tempdir().unwrap();
        let first = StateDir::open(tmp.path()).unwrap();
        let refusal = StateDir::open(tmp.path()).unwrap_err().to_string();
        assert!(refusal.contains(&std::process::id().to_string()), "{refusal}");
        drop(first);
        StateDir::open(tmp.path()).unwrap();
    }

    #[test]
    fn an_atomic_write_replaces_and_leftovers_are_cleared() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = StateDir::open(tmp.path()).unwrap();
        dir.write_atomic("checkpoint/00000000000000aa", b"one").unwrap();
        dir.write_atomic("checkpoint/00000000000000aa", b"two").unwrap();
        assert_eq!(dir.read("checkpoint/00000000000000aa").unwrap().unwrap(), b"two");
        assert_eq!(dir.read("volume.json").unwrap(), None);
        std::fs::write(tmp.path().join("log/0000000000000001.void"), b"x").unwrap();
        drop(dir);
        let dir = StateDir::open(tmp.path()).unwrap();
        assert_eq!(dir.checkpoints().unwrap(), ["checkpoint/00000000000000aa"]);
        assert!(!tmp.path().join("log/0000000000000001.void").exists());
        assert!(dir.log_segments().unwrap().is_empty());
        assert!(dir.free_bytes().unwrap() > 0);
    }
}
