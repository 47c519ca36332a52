//! Which byte ranges of which segments are cached on this host's disk, and when they were last used. The working
//! copy is in memory; `sled` keeps it over restarts, written in batches.
//! Invariant: the ranges of a segment are sorted, apart and not empty. The database holds hints only: if it is
//! lost, damaged or cannot be written, caching goes on in memory and the cached files are fetched again. Only a thread
//! of its own touches it while it is in use, for after an I/O error `sled` waits for ever: nobody else waits for it
//! without a bound.

use crate::types::Seq;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Changes are written to the database when this many segments have some.
const BATCH: usize = 256;
const SLED_CACHE_BYTES: u64 = 8 << 20;
const SLED_FLUSH_MS: u64 = 5_000;
/// Batches on their way to the database; what does not fit is written with a later one.
const BATCHES_MAX: usize = 64;
/// How long the database is waited for; once it has let that pass, not any more.
const FLUSH_MAX: Duration = Duration::from_secs(5);
/// A database whose lock is still held is tried this often, with a pause in between.
const LOCK_TRIES: usize = 250;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
const VERSION: u8 = 1;

/// The index of cached ranges.
pub struct Ranges {
    /// Orders to the thread that has the database, if there is one.
    db: Option<SyncSender<Order>>,
    stuck: AtomicBool,
    inner: Mutex<Inner>,
}

enum Order {
    Write(sled::Batch),
    /// Wait for the disk, then answer.
    Flush(SyncSender<()>),
    /// Close the database, then answer.
    Close(SyncSender<()>),
}

#[derive(Default)]
struct Inner {
    segments: HashMap<Seq, Cached>,
    changed: HashSet<Seq>,
    bytes: u64,
}

#[derive(Default, Clone, Debug, PartialEq, Eq)]
struct Cached {
    ranges: Vec<Range<u64>>,
    last_used: u64,
}

impl Ranges {
    /// An index that is forgotten at the end.
    pub fn in_memory() -> Ranges {
        Ranges { db: None, stuck: AtomicBool::new(false), inner: Mutex::default() }
    }

    /// Opens the database at `path` and reads it; starts afresh when it cannot be read.
    pub fn open(path: &Path) -> Ranges {
        let (db, inner) = open_and_read(path)
            .or_else(|e| {
                if is_held(&e) {
                    return Err(e); // it is somebody's, and whole
                }
                ::log::warn!("{}: {e}; the index of the cache starts afresh", path.display());
                let _ = std::fs::remove_dir_all(path);
                open_and_read(path)
            })
            .inspect_err(|e| ::log::warn!("{}: {e}; the cache will be forgotten at exit", path.display()))
            .ok()
            .unzip();
        let inner = Mutex::new(inner.unwrap_or_default());
        Ranges { db: db.and_then(start), stuck: AtomicBool::new(false), inner }
    }

    /// True when all of `range` of the segment is cached.
    pub fn covers(&self, seq: Seq, range: &Range<u64>) -> bool {
        self.inner.lock().segments.get(&seq).is_some_and(|cached| cached.covers(range))
    }

    /// Notes that the segment was used at `now` (seconds; only the order matters).
    pub fn touch(&self, seq: Seq, now: u64) {
        let mut inner = self.inner.lock();
        if let Some(cached) = inner.segments.get_mut(&seq).filter(|c| c.last_used < now) {
            cached.last_used = now;
            self.changed(&mut inner, seq);
        }
    }

    /// Notes that `range` of the segment is cached, used at `now`.
    pub fn insert(&self, seq: Seq, range: Range<u64>, now: u64) {
        let mut inner = self.inner.lock();
        let cached = inner.segments.entry(seq).or_default();
        let before = cached.bytes();
        cached.insert(range);
        cached.last_used = cached.last_used.max(now);
        let added = cached.bytes() - before;
        inner.bytes += added;
        self.changed(&mut inner, seq);
    }

    /// Notes that `range` of the segment is not cached any more; returns how many bytes of it were.
    pub fn remove(&self, seq: Seq, range: &Range<u64>) -> u64 {
        let mut inner = self.inner.lock();
        let Some(cached) = inner.segments.get_mut(&seq) else { return 0 };
        let before = cached.bytes();
        cached.remove(range);
        let removed = before - cached.bytes();
        inner.bytes -= removed;
        self.changed(&mut inner, seq);
        removed
    }

    /// Forgets the segment.
    pub fn forget(&self, seq: Seq) {
        let mut inner = self.inner.lock();
        if let Some(cached) = inner.segments.remove(&seq) {
            inner.bytes -= cached.bytes();
            self.changed(&mut inner, seq);
        }
    }

    /// True when anything of the segment is cached, or was before its ranges were removed one by one.
    pub fn contains(&self, seq: Seq) -> bool {
        self.inner.lock().segments.contains_key(&seq)
    }

    /// Bytes cached in all.
    pub fn bytes(&self) -> u64 {
        self.inner.lock().bytes
    }

    /// The segments that have cached ranges, the one to evict first in front.
    pub fn oldest_first(&self) -> Vec<Seq> {
        let inner = self.inner.lock();
        let mut all: Vec<(u64, Seq)> = inner.segments.iter().map(|(seq, c)| (c.last_used, *seq)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, seq)| seq).collect()
    }

    /// Writes what changed to the database, without waiting for it.
    pub fn flush(&self) {
        let mut inner = self.inner.lock();
        self.write(&mut inner);
    }

    /// Writes what changed and waits for the disk, within a bound.
    pub fn flush_to_disk(&self) {
        self.flush();
        self.order(Order::Flush);
    }

    /// Gives the order and waits a while until it is done.
    fn order(&self, order: impl FnOnce(SyncSender<()>) -> Order) {
        let Some(db) = &self.db else { return };
        let (done, wait) = sync_channel(1);
        let given = !self.stuck.load(Ordering::Relaxed) && db.try_send(order(done)).is_ok();
        if (!given || wait.recv_timeout(FLUSH_MAX).is_err()) && !self.stuck.swap(true, Ordering::Relaxed) {
            ::log::warn!("the index of the cache is not on the disk: its database does not answer");
        }
    }

    fn changed(&self, inner: &mut Inner, seq: Seq) {
        inner.changed.insert(seq);
        if inner.changed.len() >= BATCH {
            self.write(inner);
        }
    }

    fn write(&self, inner: &mut Inner) {
        let Some(db) = self.db.as_ref().filter(|_| !inner.changed.is_empty()) else { return };
        let mut batch = sled::Batch::default();
        for seq in &inner.changed {
            match inner.segments.get(seq) {
                Some(cached) => batch.insert(&seq.0.to_be_bytes(), cached.encode()),
                None => batch.remove(&seq.0.to_be_bytes()),
            }
        }
        match db.try_send(Order::Write(batch)) {
            Err(TrySendError::Full(_)) => (),
            Ok(()) | Err(TrySendError::Disconnected(_)) => inner.changed.clear(),
        }
    }
}

/// Opens the database and says what is in it.
fn open_and_read(path: &Path) -> sled::Result<(sled::Db, Inner)> {
    let db = open_when_free(path, &mut || std::thread::park_timeout(LOCK_PAUSE))?;
    let mut inner = Inner::default();
    let read = db.iter().try_for_each(|entry| {
        // Ends at the first error: `sled` does not go on behind it, and would tell it again for ever.
        let (key, value) = entry?;
        if let (Ok(key), Some(cached)) = (<[u8; 8]>::try_from(&*key), Cached::decode(&value)) {
            inner.bytes += cached.bytes();
            inner.segments.insert(Seq(u64::from_be_bytes(key)), cached);
        }
        Ok(())
    });
    match read {
        Ok(()) => Ok((db, inner)),
        Err(e) => {
            drop(start(db)); // to close it may take for ever: its thread does that
            Err(e)
        }
    }
}

/// Opens the database, also when who had it before has closed it just now: a thread of `sled`'s pool may have its file,
/// and so its lock, for a moment longer.
fn open_when_free(path: &Path, pause: &mut dyn FnMut()) -> sled::Result<sled::Db> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(SLED_CACHE_BYTES)
        .flush_every_ms(Some(SLED_FLUSH_MS))
        .mode(sled::Mode::LowSpace);
    for _ in 0..LOCK_TRIES {
        match config.open() {
            Err(e) if is_held(&e) => pause(),
            opened => return opened,
        }
    }
    config.open()
}

/// True when somebody else has the database: of what `sled` says when it opens one, only this has no kind.
fn is_held(e: &sled::Error) -> bool {
    matches!(e, sled::Error::Io(e) if e.kind() == std::io::ErrorKind::Other)
}

/// Starts the thread that has the database.
fn start(db: sled::Db) -> Option<SyncSender<Order>> {
    let (orders, incoming) = sync_channel(BATCHES_MAX);
    let thread = std::thread::Builder::new().name("index".into()).spawn(move || obey(db, incoming));
    thread.inspect_err(|e| ::log::warn!("the cache will be forgotten at exit: {e}")).ok().map(|_| orders)
}

fn obey(db: sled::Db, incoming: Receiver<Order>) {
    for order in incoming {
        let (done, outcome) = match order {
            Order::Write(batch) => (None, db.apply_batch(batch)),
            Order::Flush(done) => (Some(done), db.flush().map(|_| ())),
            Order::Close(done) => {
                drop(db);
                let _ = done.send(()); // nobody may wait any more
                return;
            }
        };
        if let Err(e) = outcome {
            ::log::warn!("the index of the cache was not written: {e}");
        }
        if let Some(done) = done {
            let _ = done.send(()); // nobody may wait any more
        }
    }
}

impl Drop for Ranges {
    fn drop(&mut self) {
        self.flush();
        self.order(Order::Close);
    }
}

impl Cached {
    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }

    fn covers(&self, range: &Range<u64>) -> bool {
        let at = self.ranges.partition_point(|r| r.end <= range.start);
        range.is_empty() || self.ranges.get(at).is_some_and(|r| r.start <= range.start && range.end <= r.end)
    }

    fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // Those that touch the new one melt into it.
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = self.ranges.partition_point(|r| r.start <= range.end);
        let start = self.ranges.get(from).map_or(range.start, |r| r.start.min(range.start));
        let end =
            to.checked_sub(1).and_then(|i| self.ranges.get(i)).map_or(range.end, |r| r.end.max(range.end));
        self.ranges.splice(from..to, std::iter::once(start..end));
    }

    fn remove(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        let to = self.ranges.partition_point(|r| r.start < range.end);
        let left: Vec<Range<u64>> = self
            .ranges
            .get(from..to)
            .unwrap_or_default()
            .iter()
            .flat_map(|r| [r.start..range.start.min(r.end), range.end.max(r.start)..r.end])
            .filter(|r| !r.is_empty())
            .collect();
        self.ranges.splice(from..to, left);
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.last_used.to_le_bytes());
        for range in &self.ranges {
            out.extend_from_slice(&range.start.to_le_bytes());
            out.extend_from_slice(&range.end.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Option<Cached> {
        let bytes = bytes.strip_prefix(&[VERSION])?;
        let (last_used, mut rest) = bytes.split_first_chunk::<8>()?;
        let mut cached = Cached { ranges: Vec::new(), last_used: u64::from_le_bytes(*last_used) };
        while let Some((start, more)) = rest.split_first_chunk::<8>() {
            let (end, more) = more.split_first_chunk::<8>()?;
            let range = u64::from_le_bytes(*start)..u64::from_le_bytes(*end);
            if range.is_empty() || cached.ranges.last().is_some_and(|last| last.end >= range.start) {
                return None;
            }
            cached.ranges.push(range);
            rest = more;
        }
        rest.is_empty().then_some(cached)
    }
}

/// A fuzz target: an entry of the index that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz_entry(bytes: &[u8]) {
    if let Some(cached) = Cached::decode(bytes) {
        assert_eq!(cached.encode(), bytes);
        let _ = (cached.bytes(), cached.covers(&(0..1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_melt_together_and_come_apart_like_a_set_of_bytes() {
        let mut cached = Cached::default();
        let mut model = [false; 64];
        let mut state = 12345u64;
        for _ in 0..5000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (a, b) = ((state >> 33) % 64, (state >> 45) % 64);
            let range = a.min(b)..a.max(b);
            let add = state >> 60 > 7;
            if add {
                cached.insert(range.clone())
            } else {
                cached.remove(&range)
            }
            model[range.start as usize..range.end as usize].fill(add);
            let held: Vec<bool> = (0..64).map(|i| cached.covers(&(i..i + 1))).collect();
            assert_eq!(held, model);
            assert_eq!(cached.bytes(), model.iter().filter(|b| **b).count() as u64);
            assert!(cached.ranges.windows(2).all(|w| w[0].end < w[1].start));
            let whole = (a.min(b)..=a.max(b)).all(|i| model[i as usize]);
            assert_eq!(cached.covers(&(a.min(b)..a.max(b) + 1)), whole);
        }
        assert_eq!(Cached::decode(&cached.encode()), Some(cached));
    }

    #[test]
    fn a_database_that_is_stuck_holds_nobody_up() {
        let (orders, incoming) = sync_channel(BATCHES_MAX); // nobody takes any
        let ranges = Ranges { db: Some(orders), stuck: AtomicBool::new(false), inner: Mutex::default() };
        for seq in 0..2 * (BATCHES_MAX as u64) {
            ranges.insert(Seq(seq), 0..10, 1);
            ranges.flush();
        }
        assert!(ranges.covers(Seq(3), &(0..10)));
        assert_eq!(ranges.inner.lock().changed.len(), BATCHES_MAX, "what did not fit is written later");
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(ranges);
            done.send(())
        });
        ended.recv_timeout(20 * FLUSH_MAX).expect("dropping it waits for nobody for ever");
        drop(incoming);
    }

    /// Closes the database, with more patience than there is outside of tests.
    fn close(ranges: Ranges) {
        ranges.flush();
        let (done, closed) = sync_channel(1);
        ranges.db.as_ref().unwrap().send(Order::Close(done)).unwrap();
        closed.recv_timeout(12 * FLUSH_MAX).expect("the database is closed");
    }

    #[test]
    fn what_is_cached_is_known_after_a_restart_and_damage_costs_only_the_cache() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("index.sled");
        let ranges = Ranges::open(&path);
        ranges.insert(Seq(7), 0..100, 5);
        ranges.insert(Seq(8), 50..60, 3);
        ranges.insert(Seq(9), 0..1, 1);
        ranges.forget(Seq(9));
        assert_eq!(ranges.remove(Seq(7), &(90..200)), 10);
        close(ranges);
        let ranges = Ranges::open(&path);
        assert!(ranges.covers(Seq(7), &(0..90)) && !ranges.covers(Seq(7), &(0..91)));
        assert_eq!((ranges.bytes(), ranges.oldest_first()), (100, vec![Seq(8), Seq(7)]));
        ranges.touch(Seq(8), 9);
        assert_eq!(ranges.oldest_first(), [Seq(7), Seq(8)]);
        close(ranges);
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!(Ranges::open(&path).bytes(), 0);
    }

    /// The lock counted as damage: what was cached was forgotten, and removed from under who still closed it.
    #[test]
    fn a_database_that_is_about_to_be_closed_is_waited_for() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("index.sled");
        let mut before = Some(sled::open(&path).unwrap());
        before.as_ref().unwrap().insert(7u64.to_be_bytes(), b"known").unwrap();
        let mut pauses = 0;
        let db = open_when_free(&path, &mut || {
            pauses += 1;
            before = None;
            std::thread::park_timeout(LOCK_PAUSE);
        })
        .unwrap();
        assert!(db.contains_key(7u64.to_be_bytes()).unwrap() && pauses > 0);
        pauses = 0;
        assert!(open_when_free(&path, &mut || pauses += 1).is_err(), "but not for ever");
        assert_eq!(pauses, LOCK_TRIES);
    }

    /// What could not be read was told again and again, and a mount never came up.
    #[test]
    fn a_damaged_database_is_read_to_an_end() {
        const PLACES: usize = 32;
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("index.sled");
        let ranges = Ranges::open(&path);
        for seq in 0..60_000 {
            ranges.insert(Seq(seq), 0..1, seq);
        }
        close(ranges);
        close(Ranges::open(&path)); // which notes where the pages lie: now they are not all read when it is opened
        let whole = std::fs::read(path.join("db")).unwrap();
        let afresh = (0..PLACES).filter(|n| {
            let damaged = tmp.path().join(n.to_string());
            std::fs::create_dir(&damaged).unwrap();
            for file in std::fs::read_dir(&path).unwrap().map(Result::unwrap).filter(|f| f.path().is_file()) {
                std::fs::copy(file.path(), damaged.join(file.file_name())).unwrap();
            }
            let mut bytes = whole.clone();
            let at = bytes.len() / PLACES * n;
            bytes[at..at + 64].fill(0xA5);
            std::fs::write(damaged.join("db"), bytes).unwrap();
            let (done, ended) = std::sync::mpsc::channel();
            std::thread::spawn(move || done.send(Ranges::open(&damaged)).ok());
            let ranges = ended.recv_timeout(12 * FLUSH_MAX).expect("a damaged database is opened");
            ranges.insert(Seq(7), 0..100, 1);
            assert!(ranges.covers(Seq(7), &(0..100)));
            ranges.bytes() < 1000
        });
        let afresh = afresh.count();
        assert!((1..PLACES).contains(&afresh), "{afresh} of {PLACES} cost the index");
    }
}
