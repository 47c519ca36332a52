//! The state directory: where this host keeps a volume's log, checkpoints and cache, and the lock on it.
//! Invariant: one process holds a state directory; a file written through [`StateDir::write_atomic`] is there
//! whole or not at all, also after a crash.

use super::segment::seq_of_name;
use super::{Error, Result};
use crate::disk::{Disk, FileRef, Lock, Mode, SystemDisk};
use crate::types::Seq;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Cached segments share a directory in groups of this many numbers.
const CACHE_FAN: u64 = 4096;

/// An open, locked state directory.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    disk: Arc<dyn Disk>,
    /// Holds the lock until the directory is dropped; not held by who only looks.
    _lock: Option<Box<dyn Lock>>,
}

impl StateDir {
    /// [`StateDir::open_on`] the machine's own disk.
    pub fn open(path: &Path) -> Result<StateDir> {
        StateDir::open_on(Arc::new(SystemDisk), path)
    }

    /// Creates what is missing of the directory, locks it, and clears away what a crash left half made.
    pub fn open_on(disk: Arc<dyn Disk>, path: &Path) -> Result<StateDir> {
        for sub in ["log", "checkpoint", "cache"] {
            let dir = path.join(sub);
            disk.create_dirs(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        }
        let lock = lock(&*disk, &path.join("lock"))?;
        let dir = StateDir { root: path.to_owned(), disk, _lock: Some(lock) };
        for sub in ["", "log", "checkpoint"] {
            dir.remove_leftovers(sub)?;
        }
        dir.sync_dir("")?;
        Ok(dir)
    }

    /// To look at what is there, also while another process works in it. Nothing may be changed.
    pub fn look(path: &Path) -> StateDir {
        StateDir { root: path.to_owned(), disk: Arc::new(SystemDisk), _lock: None }
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

    /// The disk that it lies on.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// A file of the directory, for those who read it later.
    pub fn file(&self, path: PathBuf) -> FileRef {
        FileRef { disk: self.disk.clone(), path }
    }

    /// Writes the file `name` (relative to the directory) whole and durably, over one that is there.
    pub fn write_atomic(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.root.join(name);
        let tmp = path.with_extension("tmp");
        let write = || {
            let file = self.disk.open(&tmp, Mode::Replace)?;
            file.write_all_at(bytes, 0).map_err(|(_, e)| e)?;
            file.sync()?;
            self.disk.rename(&tmp, &path)?;
            self.disk.sync_dir(path.parent().unwrap_or(&self.root))
        };
        write().map_err(Error::io(format!("write {}", path.display())))
    }

    /// The file `name` (relative to the directory), if it is there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(name);
        match self.file(path.clone()).read() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("read {}", path.display()))(e)),
        }
    }

    /// Removes the file `name` (relative to the directory).
    pub fn remove(&self, name: impl AsRef<Path>) -> Result<()> {
        let path = self.root.join(name);
        self.disk.remove(&path).map_err(Error::io(format!("remove {}", path.display())))
    }

    /// Makes the sub-directory `name` and what is missing above it.
    pub fn make_dirs(&self, name: &str) -> Result<()> {
        let path = self.root.join(name);
        self.disk.create_dirs(&path).map_err(Error::io(format!("create {}", path.display())))
    }

    /// Gives the file `from` the name `to` (both relative to the directory), over one that is there. Durable when both
    /// directories have been synced.
    pub fn move_to(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.root.join(from), self.root.join(to));
        let moved = self.disk.rename(&from, &to);
        moved.map_err(Error::io(format!("move {} to {}", from.display(), to.display())))
    }

    /// Makes renames and creations in the sub-directory `sub` durable (`""`: the directory itself).
    pub fn sync_dir(&self, sub: &str) -> Result<()> {
        let path = self.root.join(sub);
        self.disk.sync_dir(&path).map_err(Error::io(format!("sync {}", path.display())))
    }

    /// The segments in `log/` and their sizes in bytes, in order.
    pub fn log_segments(&self) -> Result<Vec<(Seq, u64)>> {
        let mut found = Vec::new();
        for name in self.entries("log")? {
            if let Some(seq) = seq_of_name(&name) {
                let size = self.disk.size(&self.log_path(seq));
                found.push((seq, size.map_err(Error::io(format!("look at log/{name}")))?));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The cached segments, in order.
    pub fn cache_segments(&self) -> Result<Vec<Seq>> {
        let mut found = Vec::new();
        for group in self.entries("cache")? {
            found
                .extend(self.entries(&format!("cache/{group}"))?.iter().filter_map(|name| seq_of_name(name)));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Names of the local checkpoints as they are in the store, in name order: the newest first.
    pub fn checkpoints(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self
            .entries("checkpoint")?
            .into_iter()
            .filter(|name| seq_of_name(name).is_some())
            .map(|name| format!("checkpoint/{name}"))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The device (`st_dev`) on which the log lies, if it is known.
    pub fn log_device(&self) -> Option<u64> {
        self.disk.device(&self.root.join("log"))
    }

    /// Bytes that may still be written to the file system the directory lies on.
    pub fn free_bytes(&self) -> Result<u64> {
        self.disk.free_bytes(&self.root).map_err(Error::io(format!("statvfs {}", self.root.display())))
    }

    /// Names in the sub-directory `sub`, in order; none where it is not there.
    pub fn entries(&self, sub: &str) -> Result<Vec<String>> {
        let path = self.root.join(sub);
        match self.disk.list(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            listed => {
                let mut names = listed.map_err(Error::io(format!("list {}", path.display())))?;
                names.sort_unstable();
                Ok(names)
            }
        }
    }

    fn remove_leftovers(&self, sub: &str) -> Result<()> {
        for name in self.entries(sub)? {
            if name.ends_with(".tmp") || name.ends_with(".void") {
                self.remove(Path::new(sub).join(name))?;
            }
        }
        Ok(())
    }
}

fn lock(disk: &dyn Disk, path: &Path) -> Result<Box<dyn Lock>> {
    match disk.lock(path).map_err(Error::io(format!("lock {}", path.display())))? {
        Ok(lock) => Ok(lock),
        Err(holder) => Err(Error::Refused(format!(
            "{} is held by process {}: one process at a time works in a state directory; unmount there first",
            path.display(),
            if holder.is_empty() { "(unknown)" } else { &holder },
        ))),
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
