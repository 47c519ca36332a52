//! The control directory of a mount, `.embassyfs`: how the volume stands, as files. Reached by name only.
//! Invariant: a file's contents never change under its inode number. A look at a name makes a new inode with the
//! contents of that moment, so size and bytes always belong together, whatever the kernel caches; and making them
//! waits for neither store nor log, so that they can be read while everything else stalls.

use crate::clock::Clock;
use crate::ops::control::Control;
use crate::ops::names::json_told;
use crate::ops::{metrics, protection};
use crate::types::{Ino, Timestamp};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// Its name in the root directory.
pub const NAME: &str = ".embassyfs";
/// Numbers from here on are no inodes of a volume: those count up from 1, and have no way to come here.
const FIRST: u64 = 1 << 62;
/// The directory itself.
pub const DIRECTORY: Ino = Ino(FIRST);
/// Snapshots of files begin here; what lies between belongs to [`super::past`].
pub(super) const FIRST_SNAPSHOT: u64 = FIRST + (1 << 56);
/// Snapshots kept. The oldest goes first; the kernel forgets each soon after it was read.
const SNAPSHOTS_MAX: usize = 256;

/// Looks that follow each other as fast as this see the same file: `cp` looks twice, and wants to see one...
const SAME_LOOK: Duration = Duration::from_millis(250);
/// ... but none that is older than this.
const AGE_MAX: Duration = Duration::from_secs(1);

/// What makes the contents of a file.
type Make = Box<dyn Fn() -> String + Send + Sync>;

/// A file as it was at one moment.
#[derive(Clone)]
pub struct Snapshot {
    /// Inode number; this snapshot's alone.
    pub ino: Ino,
    /// When it was made.
    pub time: Timestamp,
    /// The contents.
    pub bytes: Bytes,
}

/// See the module.
pub struct ControlDir {
    files: Vec<(&'static str, Make)>,
    clock: Arc<dyn Clock>,
    snapshots: Mutex<Snapshots>,
}

struct Snapshots {
    kept: BTreeMap<Ino, Kept>,
    next: u64,
}

struct Kept {
    name: &'static str,
    snapshot: Snapshot,
    /// How often the kernel was told of it, less what it has forgotten.
    lookups: u64,
    made: Duration,
    looked: Duration,
}

/// True for the control directory and what is in it.
pub fn owns(ino: Ino) -> bool {
    ino.0 >= FIRST
}

/// True for the entry of the root directory that is the control directory.
pub fn is_entry(parent: Ino, name: &[u8]) -> bool {
    parent == Ino::ROOT && name == NAME.as_bytes()
}

impl ControlDir {
    /// The files that show what `control` says.
    pub fn new(control: Arc<dyn Control>, clock: Arc<dyn Clock>) -> ControlDir {
        let status = control.clone();
        let figures = control.clone();
        let json = move || match serde_json::to_string_pretty(&status.status()) {
            Ok(text) => json_told(&text) + "\n",
            Err(e) => format!("{{\"last_error\": \"cannot be written as JSON: {}\"}}\n", e.line()),
        };
        ControlDir::of(
            vec![
                ("metrics", Box::new(move || metrics::text(&[figures.status()]))),
                ("protection", Box::new(move || protection::text(&control.status()))),
                ("status", Box::new(json)),
            ],
            clock,
        )
    }

    pub(super) fn of(files: Vec<(&'static str, Make)>, clock: Arc<dyn Clock>) -> ControlDir {
        // A daemon that takes over the mount must not give out the numbers of its predecessor, whose pages the kernel
        // may still have: nobody looks a million times a second.
        let now = clock.now();
        let micros = now.secs.max(0).cast_unsigned() * 1_000_000 + u64::from(now.nanos / 1000);
        let next = FIRST_SNAPSHOT + micros % (1 << 55);
        ControlDir { files, clock, snapshots: Mutex::new(Snapshots { kept: BTreeMap::new(), next }) }
    }

    /// The names in it.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.files.iter().map(|(name, _)| *name)
    }

    /// The file `name` as it is now, for the kernel to know; an errno when there is none, or when it cannot be made.
    pub fn look(&self, name: &[u8]) -> Result<Snapshot, i32> {
        let file = self.files.iter().find(|(known, _)| known.as_bytes() == name);
        let (name, make) = file.ok_or(libc::ENOENT)?;
        let now = self.clock.monotonic();
        let mut all = self.snapshots.lock();
        let newest = all.kept.values_mut().rev().find(|kept| kept.name == *name);
        if let Some(kept) = newest.filter(|k| now < k.looked + SAME_LOOK && now < k.made + AGE_MAX) {
            kept.looked = now;
            kept.lookups += 1;
            return Ok(kept.snapshot.clone());
        }
        let text = catch_unwind(AssertUnwindSafe(make)).map_err(|_| {
            ::log::error!("{NAME}/{name}: making its contents panicked");
            libc::EIO
        })?;
        let snapshot = Snapshot { ino: Ino(all.next), time: self.clock.now(), bytes: text.into() };
        all.next += 1;
        let kept = Kept { name, snapshot: snapshot.clone(), lookups: 1, made: now, looked: now };
        all.kept.insert(snapshot.ino, kept);
        if all.kept.len() > SNAPSHOTS_MAX {
            all.kept.pop_first();
        }
        Ok(snapshot)
    }

    /// A snapshot that was looked at; `ESTALE` when it is gone.
    pub fn snapshot(&self, ino: Ino) -> Result<Snapshot, i32> {
        self.snapshots.lock().kept.get(&ino).map(|kept| kept.snapshot.clone()).ok_or(libc::ESTALE)
    }

    /// The kernel forgets `n` looks at it.
    pub fn forget(&self, ino: Ino, n: u64) {
        let mut all = self.snapshots.lock();
        if let Some(kept) = all.kept.get_mut(&ino) {
            kept.lookups = kept.lookups.saturating_sub(n);
            if kept.lookups == 0 {
                all.kept.remove(&ino);
            }
        }
    }
}

impl Snapshot {
    /// At most `len` bytes from `offset` on.
    pub fn read(&self, offset: u64, len: usize) -> Bytes {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        self.bytes.slice(from..from.saturating_add(len).min(self.bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock that goes on when it is told to, by milliseconds.
    struct Stepped(AtomicU64);

    impl Stepped {
        fn step(&self, ms: u64) {
            self.0.fetch_add(ms, Ordering::Relaxed);
        }
    }

    impl Clock for Stepped {
        fn now(&self) -> Timestamp {
            Timestamp { secs: 1_800_000_000, nanos: 5000 }
        }

        fn monotonic(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    fn directory() -> (ControlDir, Arc<Stepped>) {
        let looks = AtomicU64::new(0);
        let grows = move || "x".repeat(looks.fetch_add(1, Ordering::Relaxed) as usize);
        let files: Vec<(&'static str, Make)> =
            vec![("grows", Box::new(grows)), ("panics", Box::new(|| panic!("on purpose")))];
        let clock = Arc::new(Stepped(AtomicU64::new(0)));
        (ControlDir::of(files, clock.clone()), clock)
    }

    #[test]
    fn each_look_is_a_file_of_its_own_that_never_changes() {
        let (dir, clock) = directory();
        let first = dir.look(b"grows").unwrap();
        clock.step(250);
        let second = dir.look(b"grows").unwrap();
        assert_ne!(first.ino, second.ino);
        assert!(owns(first.ino) && first.ino != DIRECTORY && !owns(Ino(FIRST - 1)));
        assert_eq!((first.bytes.len(), second.bytes.len()), (0, 1));
        assert_eq!(&dir.snapshot(second.ino).unwrap().read(0, 10)[..], b"x");
        assert!(second.read(1, 10).is_empty() && second.read(u64::MAX, 10).is_empty());
        dir.forget(first.ino, 1);
        assert_eq!(dir.snapshot(first.ino).err(), Some(libc::ESTALE));
        assert_eq!(dir.look(b"nothing").err(), Some(libc::ENOENT));
    }

    #[test]
    fn looks_in_a_row_are_one_but_not_for_ever() {
        let (dir, clock) = directory();
        let first = dir.look(b"grows").unwrap();
        let mut same = 1;
        for _ in 0..4 {
            clock.step(200);
            same += u64::from(dir.look(b"grows").unwrap().ino == first.ino);
        }
        assert_eq!(same, 5);
        clock.step(200);
        assert_ne!(dir.look(b"grows").unwrap().ino, first.ino, "a second old");
        dir.forget(first.ino, same - 1);
        assert!(dir.snapshot(first.ino).is_ok(), "the kernel still knows it");
        dir.forget(first.ino, 1);
        assert!(dir.snapshot(first.ino).is_err());
    }

    #[test]
    fn a_panic_is_an_error_and_the_number_of_snapshots_is_bounded() {
        let (dir, clock) = directory();
        assert_eq!(dir.look(b"panics").err(), Some(libc::EIO));
        let first = dir.look(b"grows").unwrap();
        for _ in 0..SNAPSHOTS_MAX {
            clock.step(300);
            dir.look(b"grows").unwrap();
        }
        assert!(dir.snapshot(first.ino).is_err(), "the oldest has gone");
        assert_eq!(dir.snapshots.lock().kept.len(), SNAPSHOTS_MAX);
    }

    #[test]
    fn only_the_root_has_it() {
        assert!(is_entry(Ino::ROOT, b".embassyfs") && !is_entry(Ino::ROOT, b".embassyf"));
        assert!(!is_entry(Ino(7), b".embassyfs"));
    }
}
