//! Older versions inside a mount, `.embassyfs/at/VERSION`: which are open, and under which inode numbers.
//! Invariant: a number of a version belongs to that version as long as the kernel holds any number of it; a version is
//! closed only then. A name that means a fixed commit means the same one for as long as it is open.

use super::control_dir::{DIRECTORY, FIRST_SNAPSHOT};
use super::serve::Requests;
use crate::types::Ino;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Its name in the control directory.
pub const NAME: &str = "at";
/// The directory itself.
pub const AT: Ino = Ino(DIRECTORY.0 + 1);
/// Each version has as many numbers as this; the inodes of a volume that has more of them are not found in it.
const SPAN: u64 = 1 << 48;
/// Versions open at once. Each costs the memory of the changes behind its checkpoint.
const OPEN_MAX: usize = 16;

/// So long a name that could not be opened is told the same again. Those that look one name up wait in the kernel for each
/// other, and each would wait for the store as long as the first.
const SHARED: Duration = Duration::from_secs(1);

/// Opens the version of a name; an errno when there is none, or when it cannot be opened.
pub type Open = Box<dyn Fn(&str) -> BoxFuture<'static, Result<Arc<Requests>, i32>> + Send + Sync>;

/// One open version.
#[derive(Clone)]
pub struct Version {
    /// Its requests.
    pub requests: Arc<Requests>,
    /// What its inode numbers begin behind.
    base: u64,
}

impl Version {
    /// The number by which the kernel knows an inode of it; none beyond its span.
    pub fn outside(&self, ino: Ino) -> Option<Ino> {
        (ino.0 < SPAN).then(|| Ino(self.base + ino.0))
    }
}

/// See the module.
pub struct Past {
    open: Open,
    all: Mutex<BTreeMap<u64, Slot>>,
    /// The name that could not be opened last, and when.
    failed: Mutex<Option<(String, Instant)>>,
}

struct Slot {
    name: String,
    version: Version,
    /// Inodes told to the kernel, less those it has forgotten.
    held: u64,
    /// Rises with each use of the name.
    used: u64,
}

/// True for the numbers of `at` and of all that is below it.
pub fn owns(ino: Ino) -> bool {
    ino.0 > DIRECTORY.0 && ino.0 < FIRST_SNAPSHOT
}

fn slot_of(ino: Ino) -> (u64, Ino) {
    let offset = ino.0 - DIRECTORY.0;
    (offset / SPAN, Ino(offset % SPAN))
}

impl Past {
    /// No version yet; `open` opens those that are asked for.
    pub fn new(open: Open) -> Past {
        Past { open, all: Mutex::default(), failed: Mutex::default() }
    }

    /// The version that a number belongs to, and the inode in it; `ESTALE` when it has been closed.
    pub fn find(&self, ino: Ino) -> Result<(Version, Ino), i32> {
        let (slot, inside) = slot_of(ino);
        self.all.lock().get(&slot).map(|slot| (slot.version.clone(), inside)).ok_or(libc::ESTALE)
    }

    /// The version of that name, if it is open.
    pub fn known(&self, name: &str) -> Option<Version> {
        let mut all = self.all.lock();
        let newest = all.values().map(|slot| slot.used).max().unwrap_or(0);
        all.values_mut().find(|slot| slot.name == name).map(|slot| {
            slot.used = newest + 1;
            slot.version.clone()
        })
    }

    /// Opens the version of that name, in place of one that nobody holds if too many are open.
    pub async fn open(&self, name: &str) -> Result<Version, i32> {
        let same = |(failed, when): &(String, Instant)| failed == name && when.elapsed() < SHARED;
        if self.failed.lock().as_ref().is_some_and(same) {
            return Err(libc::EIO);
        }
        let requests = (self.open)(name).await.inspect_err(|e| {
            if *e == libc::EIO {
                *self.failed.lock() = Some((name.into(), Instant::now()));
            }
        })?;
        if let Some(version) = self.known(name) {
            return Ok(version); // somebody was faster
        }
        let mut all = self.all.lock();
        if all.len() >= OPEN_MAX {
            let idle = all.iter().filter(|(_, slot)| slot.held == 0).min_by_key(|(_, slot)| slot.used);
            let Some(idle) = idle.map(|(number, _)| *number) else {
                ::log::error!("{NAME}/{name}: {OPEN_MAX} versions are in use already; leave one of them");
                return Err(libc::EMFILE);
            };
            all.remove(&idle);
        }
        let free = (1..).find(|number| !all.contains_key(number)).unwrap_or(1);
        let version = Version { requests, base: DIRECTORY.0 + free * SPAN };
        let used = all.values().map(|slot| slot.used).max().unwrap_or(0) + 1;
        all.insert(free, Slot { name: name.into(), version: version.clone(), held: 0, used });
        Ok(version)
    }

    /// The kernel holds a number of it once more.
    pub fn told(&self, ino: Ino) {
        if let Some(slot) = self.all.lock().get_mut(&slot_of(ino).0) {
            slot.held += 1;
        }
    }

    /// The kernel gave a number back `n` times.
    pub fn forget(&self, ino: Ino, n: u64) {
        if let Some(slot) = self.all.lock().get_mut(&slot_of(ino).0) {
            slot.held = slot.held.saturating_sub(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn those_that_look_up_a_version_that_cannot_be_opened_wait_once() {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = opened.clone();
        let past = Past::new(Box::new(move |name| {
            let errno = if name == "none" { libc::ENOENT } else { libc::EIO };
            count.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(42)).await;
                Err(errno)
            })
        }));
        let fails = async |name: &str, errno: i32, opens: usize| {
            let before = opened.load(Ordering::SeqCst);
            assert_eq!(past.open(name).await.err(), Some(errno));
            assert_eq!(opened.load(Ordering::SeqCst) - before, opens, "{name}");
        };
        fails("7", libc::EIO, 1).await;
        for _ in 0..10 {
            fails("7", libc::EIO, 0).await;
        }
        fails("8", libc::EIO, 1).await;
        tokio::time::sleep(SHARED).await;
        fails("8", libc::EIO, 1).await;
        fails("none", libc::ENOENT, 1).await;
        fails("none", libc::ENOENT, 1).await;
    }
}
