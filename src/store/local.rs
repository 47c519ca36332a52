//! A bucket in a directory (`file:///dir`): a disk at hand, a mounted share, or a second site's volume.
//! Invariant: an object appears under its name whole, durable and once. It is written and synced under `.tmp`, then
//! linked (link(2) fails if the name is taken, also between hosts on one share), then its directory is synced.

use super::{ObjectInfo, Store, StoreError, check_name, check_range};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use std::collections::{BinaryHeap, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Where unfinished objects lie; [`check_name`] keeps objects out of it.
const TEMP_DIR: &str = ".tmp";
/// A temporary file that nobody has written for this long belongs to a process that died.
const TEMP_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// See the module.
pub struct LocalStore {
    shared: Arc<Shared>,
}

struct Shared {
    root: PathBuf,
    /// Directories whose own entry is known to be durable.
    known: Mutex<HashSet<PathBuf>>,
    serial: AtomicU64,
    swept: AtomicBool,
}

impl LocalStore {
    /// The store in `root`, which is created by the first put if it is missing.
    pub fn new(root: impl Into<PathBuf>) -> LocalStore {
        let shared = Shared {
            root: root.into(),
            known: Mutex::default(),
            serial: AtomicU64::new(0),
            swept: AtomicBool::new(false),
        };
        LocalStore { shared: Arc::new(shared) }
    }

    /// Runs blocking I/O off the runtime's own threads. It goes on to its end if the caller drops the future.
    fn run<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce(&Shared, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        let (shared, name) = (self.shared.clone(), name.to_owned());
        async move {
            let task_name = name.clone();
            match tokio::task::spawn_blocking(move || work(&shared, &task_name)).await {
                Ok(answer) => answer,
                Err(error) => Err(StoreError::unavailable(&name, error)),
            }
        }
        .boxed()
    }
}

/// What an I/O error on `path` means for the object `name`.
fn refused(name: &str, path: &Path, error: &io::Error) -> StoreError {
    let detail = format!("{}: {error}", path.display());
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreError::denied(name, detail),
        _ => StoreError::unavailable(name, detail),
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Shared {
    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name)?;
        Ok(self.root.join(name))
    }

    /// Makes `dir` and what is missing above it, durably. Once per process also for a directory that is there: who
    /// made it may have died before it was durable.
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        if self.known.lock().contains(dir) {
            return Ok(());
        }
        match fs::create_dir(dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let parent = dir.parent().ok_or(error)?;
                self.make_dir(parent)?;
                fs::create_dir(dir).or_else(ignore_existing)?;
            }
            answer => answer.or_else(ignore_existing)?,
        }
        if let Some(parent) = dir.parent() {
            match sync_dir(parent) {
                // A parent that may be searched but not read (a share's root) cannot be synced by us.
                Err(error) if error.kind() != ErrorKind::PermissionDenied => return Err(error),
                _ => (),
            }
        }
        self.known.lock().insert(dir.to_owned());
        Ok(())
    }

    fn put_new(&self, name: &str, body: &[u8]) -> Result<(), StoreError> {
        let path = self.path(name)?;
        let dir = path.parent().unwrap_or(&self.root);
        let temps = self.root.join(TEMP_DIR);
        self.make_dir(dir).map_err(|e| refused(name, dir, &e))?;
        if path.exists() {
            return self.taken(name, dir);
        }
        self.make_dir(&temps).map_err(|e| refused(name, &temps, &e))?;
        let (temp, file) = self.create_temp(&temps).map_err(|e| refused(name, &temps, &e))?;
        let written = write_durably(file, body).map_err(|e| refused(name, &temp, &e));
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
        let opened = File::open(&path).and_then(|file| file.metadata().map(|meta| (file, meta)));
        match opened {
            Ok((file, meta)) if meta.is_file() => Ok((file, meta.len(), path)),
            Ok(_) => Err(StoreError::not_found(name)),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Err(StoreError::not_found(name))
            }
            Err(error) => Err(refused(name, &path, &error)),
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
                match fs::metadata(self.root.join(&name)) {
                    Ok(meta) => found.push(ObjectInfo { name, size: meta.len() }),
                    // Deleted meanwhile: look again, for a short answer would say that there are no more.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue 'scan,
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

fn write_durably(mut file: File, body: &[u8]) -> io::Result<()> {
    file.write_all(body)?;
    file.sync_all()
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
        self.run(name, move |shared, name| shared.put_new(name, &body))
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.run(name, move |shared, name| shared.get_range(name, range))
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.run(name, move |shared, name| shared.get_suffix(name, len))
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let after = after.map(str::to_owned);
        self.run(prefix, move |shared, prefix| shared.list(prefix, after.as_deref(), limit))
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(name, |shared, name| shared.delete(name))
    }

    fn describe(&self) -> String {
        format!("file://{}", self.shared.root.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn leftovers_are_not_listed_and_old_ones_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let temps = dir.path().join(TEMP_DIR);
        fs::create_dir(&temps).unwrap();
        let old = File::create(temps.join("1-0")).unwrap();
        fs::write(temps.join("1-1"), "in flight").unwrap();
        old.set_modified(old.metadata().unwrap().modified().unwrap() - TEMP_AGE_MAX * 2).unwrap();

        let store = LocalStore::new(dir.path());
        store.put_new("log/1", Bytes::from_static(b"x")).await.unwrap();
        let listed = store.list("", None, 10).await.unwrap();
        assert_eq!(listed, [ObjectInfo { name: "log/1".into(), size: 1 }]);
        let left: Vec<_> = fs::read_dir(&temps).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["1-1"]);
    }

    #[tokio::test]
    async fn a_missing_root_reads_as_empty_and_is_made_by_the_first_put() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::new(dir.path().join("a/b"));
        assert!(store.list("log/", None, 9).await.unwrap().is_empty());
        assert!(matches!(store.get_suffix("volume.json", 1).await, Err(StoreError::NotFound { .. })));
        store.put_new("volume.json", Bytes::from_static(b"{}")).await.unwrap();
        assert_eq!(store.get_suffix("volume.json", 1).await.unwrap(), (Bytes::from_static(b"}"), 2));
    }
}
