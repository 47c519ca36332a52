//! A bucket in a directory (`file:///dir`): a disk at hand, a mounted share, or a second site's volume.
//! Invariant: an object appears under its name whole, durable and once. It is written and synced under `.tmp`, then
//! linked (link(2) fails if the name is taken, also between hosts on one share), then its directory is synced.
//! Nothing is answered from, and nothing put into, what shows under the directory's path while its share is away.

use super::entry::{self, Entry};
use super::{ObjectInfo, Store, StoreError, check_name, check_range, direct, unreadable};
use crate::disk::FileRef;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use std::collections::{BinaryHeap, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Where unfinished objects lie; [`check_name`] keeps objects out of it.
const TEMP_DIR: &str = ".tmp";
/// A temporary file that nobody has written for this long belongs to a process that died.
const TEMP_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// The object by which a directory is known to be the volume's; the first that stays in it.
const SUPERBLOCK: &str = "volume.json";
/// What `init` puts to try the store out, before there is a superblock.
const PROBE: &str = "probe/";
/// A larger superblock is not kept to know the directory by.
const SUPERBLOCK_LEN_MAX: u64 = 1 << 20;

/// See the module.
pub struct LocalStore {
    shared: Arc<Shared>,
}

struct Shared {
    root: PathBuf,
    /// The volume has been made: a root that is missing is away, not empty.
    existing: bool,
    /// The root as it was first seen to be the volume's.
    known: Mutex<Option<Arc<Known>>>,
    /// Directories whose own entry is known to be durable.
    made: Mutex<HashSet<PathBuf>>,
    serial: AtomicU64,
    swept: AtomicBool,
}

/// By what the root is known again.
struct Known {
    /// Device and inode.
    id: (u64, u64),
    /// The superblock, if it was there. A share that was mounted anew may have another device number.
    superblock: Option<Vec<u8>>,
}

/// What is about to be done below the root.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// Changes nothing, or only takes away.
    Read,
    /// Puts an object of a volume that was made before.
    Put,
    /// Puts what a volume begins with; only this makes the root.
    FirstPut,
}

impl LocalStore {
    /// The store in `root`. If that is missing it reads as empty, and is created when a volume's first object is put:
    /// `volume.json`, or what `init` tries the store with.
    pub fn new(root: impl Into<PathBuf>) -> LocalStore {
        LocalStore::with(root.into(), false)
    }

    /// The store in `root`, where a volume has been made before: while `root` is missing everything is `Unavailable`.
    pub fn existing(root: impl Into<PathBuf>) -> LocalStore {
        LocalStore::with(root.into(), true)
    }

    fn with(root: PathBuf, existing: bool) -> LocalStore {
        let shared = Shared {
            root,
            existing,
            known: Mutex::default(),
            made: Mutex::default(),
            serial: AtomicU64::new(0),
            swept: AtomicBool::new(false),
        };
        LocalStore { shared: Arc::new(shared) }
    }

    /// Runs blocking I/O off the runtime's own threads, below a root that is known before and after. It goes on to its
    /// end if the caller drops the future.
    fn run<T: Send + 'static>(
        &self,
        name: &str,
        access: Access,
        work: impl FnOnce(&Shared, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        let (shared, name) = (self.shared.clone(), name.to_owned());
        async move {
            let task_name = name.clone();
            let task = move || {
                shared.check_root(&task_name, access)?;
                let answer = work(&shared, &task_name);
                if matches!(answer, Ok(_) | Err(StoreError::NotFound { .. })) {
                    // The share may have gone meanwhile; then it was not the volume that answered.
                    shared.check_root(&task_name, access)?;
                }
                answer
            };
            match tokio::task::spawn_blocking(task).await {
                Ok(answer) => answer,
                Err(error) => Err(StoreError::unavailable(&name, error)),
            }
        }
        .boxed()
    }
}

/// Why a temporary file could not be filled.
enum Unfilled {
    /// What was to be put is at fault.
    Source(StoreError),
    Io(io::Error),
}

impl From<io::Error> for Unfilled {
    fn from(error: io::Error) -> Unfilled {
        Unfilled::Io(error)
    }
}

/// What putting `name` is.
fn access_of(name: &str) -> Access {
    if name == SUPERBLOCK || name.starts_with(PROBE) { Access::FirstPut } else { Access::Put }
}

/// What an I/O error on `path` means for the object `name`.
fn refused(name: &str, path: &Path, error: &io::Error) -> StoreError {
    let detail = format!("{}: {error}", path.display());
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreError::denied(name, detail),
        // A link that leads to itself does so the next time, too.
        _ if error.raw_os_error() == Some(libc::ELOOP) => StoreError::denied(name, detail),
        _ => StoreError::unavailable(name, detail),
    }
}

fn no_object(name: &str, path: &Path, what: &str) -> StoreError {
    let detail = format!("{} is {what}, where the object's file must be", path.display());
    StoreError::not_an_object(name, detail)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path)?.sync_all()
}

impl Shared {
    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name)?;
        Ok(self.root.join(name))
    }

    /// Refuses when the root is not the directory that was seen to be the volume's. Without this, puts would go to the
    /// disk below a share that was unmounted, and be called durable in the embassy.
    fn check_root(&self, name: &str, access: Access) -> Result<(), StoreError> {
        let known = self.known.lock().clone();
        let id = match fs::metadata(&self.root) {
            Ok(meta) if meta.is_dir() => (meta.dev(), meta.ino()),
            Err(e) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(refused(name, &self.root, &e));
            }
            _ => {
                let may_be_new = access == Access::FirstPut || (access == Access::Read && !self.existing);
                return match known {
                    None if may_be_new => Ok(()),
                    _ => Err(self.away(name, "is not there")),
                };
            }
        };
        if known.as_ref().is_some_and(|known| known.id == id) {
            return Ok(());
        }
        let superblock = match self.superblock() {
            // Who only reads is told so when it asks for volume.json.
            Err(StoreError::NotAnObject { .. }) if access == Access::Read && known.is_none() => return Ok(()),
            superblock => superblock?,
        };
        match &known {
            Some(known) if superblock.is_none() || known.superblock != superblock => {
                return Err(self.away(name, "is another directory than before"));
            }
            None if superblock.is_none() && access != Access::FirstPut => {
                return match access {
                    Access::Read => Ok(()),
                    _ => Err(self.away(name, "holds no volume.json")),
                };
            }
            _ => (),
        }
        *self.known.lock() = Some(Arc::new(Known { id, superblock }));
        self.made.lock().clear();
        Ok(())
    }

    fn superblock(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.root.join(SUPERBLOCK);
        let failed = |e: io::Error| refused(SUPERBLOCK, &path, &e);
        let file = match entry::open(&path).map_err(failed)? {
            Entry::File(file, _) => file,
            Entry::Nothing => return Ok(None),
            Entry::Other(what) => return Err(no_object(SUPERBLOCK, &path, what)),
        };
        let mut superblock = Vec::new();
        file.take(SUPERBLOCK_LEN_MAX).read_to_end(&mut superblock).map_err(failed)?;
        Ok(Some(superblock))
    }

    fn away(&self, name: &str, what: &str) -> StoreError {
        let root = self.root.display();
        StoreError::unavailable(
            name,
            format!("the directory {root} {what}; is what it lies on still mounted?"),
        )
    }

    /// Makes `dir` and what is missing above it, durably. Once per process also for a directory that is there: who
    /// made it may have died before it was durable.
    fn make_root(&self, dir: &Path) -> io::Result<()> {
        if self.made.lock().contains(dir) {
            return Ok(());
        }
        match fs::create_dir(dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let parent = dir.parent().ok_or(error)?;
                self.make_root(parent)?;
                fs::create_dir(dir).or_else(ignore_existing)?;
            }
            answer => answer.or_else(ignore_existing)?,
        }
        self.entry_durable(dir)
    }

    /// The same for a directory in the root; never makes the root.
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        if dir == self.root || self.made.lock().contains(dir) {
            return Ok(());
        }
        fs::create_dir(dir).or_else(ignore_existing)?;
        self.entry_durable(dir)
    }

    fn entry_durable(&self, dir: &Path) -> io::Result<()> {
        if let Some(parent) = dir.parent() {
            match sync_dir(parent) {
                // A parent that may be searched but not read (a share's root) cannot be synced by us.
                Err(error) if error.kind() != ErrorKind::PermissionDenied => return Err(error),
                _ => (),
            }
        }
        self.made.lock().insert(dir.to_owned());
        Ok(())
    }

    /// Puts what `fill` writes.
    fn put(
        &self,
        name: &str,
        fill: impl FnOnce(&mut File) -> Result<(), Unfilled>,
    ) -> Result<(), StoreError> {
        let path = self.path(name)?;
        let dir = path.parent().unwrap_or(&self.root);
        let temps = self.root.join(TEMP_DIR);
        if access_of(name) == Access::FirstPut {
            self.make_root(&self.root).map_err(|e| refused(name, &self.root, &e))?;
        }
        self.make_dir(dir).map_err(|e| refused(name, dir, &e))?;
        if let Some(what) = entry::other(&path).map_err(|e| refused(name, &path, &e))? {
            return Err(no_object(name, &path, what));
        }
        if path.exists() {
            return self.taken(name, dir);
        }
        self.make_dir(&temps).map_err(|e| refused(name, &temps, &e))?;
        let (temp, mut file) = self.create_temp(&temps).map_err(|e| refused(name, &temps, &e))?;
        let written =
            fill(&mut file).and_then(|()| Ok(file.sync_all()?)).map_err(|unfilled| match unfilled {
                Unfilled::Source(error) => error,
                Unfilled::Io(error) => refused(name, &temp, &error),
            });
        let linked = written.and_then(|()| match fs::hard_link(&temp, &path) {
            Ok(()) => sync_dir(dir).map_err(|e| refused(name, dir, &e)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.taken(name, dir),
            Err(error) => Err(refused(name, &path, &error)),
        });
        self.sweep(&temps, &temp);
        // What is left behind by a failure here is swept another day.
        let _ = fs::remove_file(&temp);
        linked
    }

    fn put_new(&self, name: &str, body: &[u8]) -> Result<(), StoreError> {
        self.put(name, |file| Ok(file.write_all(body)?))
    }

    /// The kernel copies the file, so that its contents are in nobody's memory (but the page cache).
    fn put_file(&self, name: &str, from: &FileRef) -> Result<(), StoreError> {
        check_name(name)?;
        let opened = File::open(&from.path).and_then(|file| file.metadata().map(|meta| (file, meta.len())));
        let (source, size) = opened.map_err(|e| unreadable(name, from, &e))?;
        self.put(name, |file| match direct::copy(&source, file)? {
            copied if copied == size => Ok(()),
            copied => {
                let error = io::Error::other(format!("{copied} bytes of {size} were copied"));
                Err(Unfilled::Source(unreadable(name, from, &error)))
            }
        })
    }

    /// The name is taken. The caller may learn that the object is its own, so it must be durable by now: who linked
    /// it may have died before syncing the directory.
    fn taken(&self, name: &str, dir: &Path) -> Result<(), StoreError> {
        sync_dir(dir).map_err(|e| refused(name, dir, &e))?;
        Err(StoreError::already_exists(name))
    }

    fn create_temp(&self, temps: &Path) -> io::Result<(PathBuf, File)> {
        loop {
            let serial = self.serial.fetch_add(1, Ordering::Relaxed);
            let temp = temps.join(format!("{}-{serial}", std::process::id()));
            match File::options().write(true).create_new(true).open(&temp) {
                // Another host on the same share, or a dead process of the same number.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                answer => return answer.map(|file| (temp, file)),
            }
        }
    }

    /// Once per process removes temporary files much older than `fresh`, by the file system's own clock.
    fn sweep(&self, temps: &Path, fresh: &Path) {
        if self.swept.swap(true, Ordering::Relaxed) {
            return;
        }
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
        let (Ok(now), Ok(entries)) = (modified(fresh), fs::read_dir(temps)) else { return };
        for entry in entries.flatten() {
            let age = modified(&entry.path()).ok().and_then(|time| now.duration_since(time).ok());
            if age.is_some_and(|age| age > TEMP_AGE_MAX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn open(&self, name: &str) -> Result<(File, u64, PathBuf), StoreError> {
        let path = self.path(name)?;
        match entry::open(&path).map_err(|e| refused(name, &path, &e))? {
            Entry::File(file, size) => Ok((file, size, path)),
            Entry::Nothing => Err(StoreError::not_found(name)),
            Entry::Other(what) => Err(no_object(name, &path, what)),
        }
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (mut file, size, path) = self.open(name)?;
        check_range(name, &range, size)?;
        read_exactly(&mut file, range).map_err(|e| refused(name, &path, &e))
    }

    fn get_suffix(&self, name: &str, len: u64) -> Result<(Bytes, u64), StoreError> {
        let (mut file, size, path) = self.open(name)?;
        let range = size.saturating_sub(len)..size;
        Ok((read_exactly(&mut file, range).map_err(|e| refused(name, &path, &e))?, size))
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectInfo>, StoreError> {
        'scan: loop {
            let names = self.names(prefix, after, limit).map_err(|e| refused(prefix, &self.root, &e))?;
            let mut found = Vec::with_capacity(names.len());
            for name in names {
                // What is no file is listed all the same: who asks for it is told what it is.
                match entry::size(&self.root.join(&name)) {
                    Ok(Some(size)) => found.push(ObjectInfo { name, size }),
                    // Deleted meanwhile: look again, for a short answer would say that there are no more.
                    Ok(None) => continue 'scan,
                    Err(error) => return Err(refused(&name, &self.root, &error)),
                }
            }
            return Ok(found);
        }
    }

    /// The names that [`Store::list`] asks for. Reads only the directory of the prefix and, when the prefix names no
    /// directory, those below the root that may hold matches; keeps no more than `limit` names at a time.
    fn names(&self, prefix: &str, after: Option<&str>, limit: usize) -> io::Result<Vec<String>> {
        let mut smallest = BinaryHeap::new();
        let mut dirs = vec![prefix.rfind('/').map_or("", |slash| &prefix[..=slash]).to_owned()];
        while let Some(dir) = dirs.pop() {
            let entries = match fs::read_dir(self.root.join(&dir)) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                let Some(name) = entry.file_name().to_str().map(|name| format!("{dir}{name}")) else {
                    continue;
                };
                if !name.starts_with(prefix) || check_name(&name).is_err() {
                    continue;
                }
                if entry.file_type()?.is_dir() {
                    dirs.extend(dir.is_empty().then(|| format!("{name}/")));
                } else if after.is_none_or(|after| name.as_str() > after) {
                    smallest.push(name);
                    if smallest.len() > limit {
                        smallest.pop();
                    }
                }
            }
        }
        Ok(smallest.into_sorted_vec())
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => path.parent().map_or(Ok(()), sync_dir).map_err(|e| refused(name, &path, &e)),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(()),
            Err(error) => Err(refused(name, &path, &error)),
        }
    }
}

fn ignore_existing(error: io::Error) -> io::Result<()> {
    if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

fn read_exactly(file: &mut File, range: Range<u64>) -> io::Result<Bytes> {
    let len = range.end - range.start;
    let mut data = Vec::with_capacity(len as usize);
    file.seek(SeekFrom::Start(range.start))?;
    file.take(len).read_to_end(&mut data)?;
    if data.len() as u64 != len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(data.into())
}

impl Store for LocalStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(name, access_of(name), move |shared, name| shared.put_new(name, &body))
    }

    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let file = file.clone();
        self.run(name, access_of(name), move |shared, name| shared.put_file(name, &file))
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.run(name, Access::Read, move |shared, name| shared.get_range(name, range))
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.run(name, Access::Read, move |shared, name| shared.get_suffix(name, len))
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let after = after.map(str::to_owned);
        self.run(prefix, Access::Read, move |shared, prefix| shared.list(prefix, after.as_deref(), limit))
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(name, Access::Read, |shared, name| shared.delete(name))
    }

    fn device(&self) -> Option<u64> {
        self.shared.known.lock().as_ref().map(|known| known.id.0)
    }

    fn describe(&self) -> String {
        format!("file://{}", self.shared.root.display())
    }
}

#[cfg(test)]
mod tests;
