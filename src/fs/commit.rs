//! The committer: takes what has changed in memory and puts it into the log, as one atomic step after the other.
//! Invariant: it alone appends commits and changes extents; a commit is acknowledged only after the log said it is
//! durable; after a failure of the log nothing more is acknowledged.

use super::checkpoint::{Checkpointer, Frozen};
use super::dirty::{DirtyFile, Run};
use super::edit::ExtentEdit;
use super::state::{BROKEN, DirtyFiles, Level, State, fold_levels};
use super::{Fs, MAX_FILE_SIZE};
use crate::log::writer::LogWriter;
use crate::log::{self, Append, ClosedSegment};
use crate::tree::btree::Tree;
use crate::tree::delta::{self, Counters, Delta, Value};
use crate::tree::key::Key;
use crate::tree::memtable::weight;
use crate::tree::value::Extent;
use crate::types::{CommitNo, FrameKind, FramePtr, Ino, Seq, Timestamp};
use parking_lot::Mutex;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Whole records waiting in memory above which the committer seals them without waiting for the commit.
pub(super) const SEAL_EARLY_BYTES: u64 = 4 << 20;
/// Records sealed between two looks at the state.
const SEAL_BATCH: usize = 32;
/// A run of at most this many bytes lies in the tree instead of a frame of its own.
const INLINE_MAX: usize = 256;
/// How long the committer sleeps when nothing has changed.
const IDLE_SLEEP: Duration = Duration::from_secs(5);

/// Where commits and closed segments go: implemented above, by the part that ships them.
pub trait Shipping: Send + Sync {
    /// The commit, and all before it, is durable on the local disk.
    fn committed(&self, commit: CommitNo);
    /// A segment is complete and durable on the local disk. Called in the order of the chain, with the log locked.
    fn closed(&self, segment: ClosedSegment);
    /// A checkpoint is ready; its pages and its root are durable on the local disk.
    fn checkpoint(&self, checkpoint: super::CheckpointOutcome) -> log::Result<()>;
    /// The newest tree no longer refers to this frame (a hint).
    fn dead(&self, ptr: FramePtr);
    /// Waits a moment for the disk to get room; false when the volume is being closed and nothing is waited for.
    fn pause(&self) -> bool;
    /// The newest segment that the store is known to hold with all before it.
    fn stored(&self) -> Seq;
    /// Brings frames here; waits for the network, within a bound.
    fn fetch(&self, ptrs: &[FramePtr]) -> log::Result<()>;
    /// The log failed; nothing more will be committed in this process.
    fn failed(&self, reason: &str);
}

/// The one writer of a volume's log; runs on a thread of its own.
pub struct Committer {
    fs: Arc<Fs>,
    log: Arc<Mutex<LogWriter>>,
    shipping: Arc<dyn Shipping>,
    checkpointer: Checkpointer,
    /// Newest commit in a closed segment.
    closed: CommitNo,
    /// When this committer closed a segment last (monotonic), or began.
    closed_at: Duration,
    /// Newest commit in the log.
    committed: CommitNo,
    /// When it was made (monotonic), or this committer began.
    committed_at: Duration,
    /// When it was made, as it says itself.
    committed_time: Timestamp,
    counters: Counters,
    /// The number of the next segment, as last seen: read when nobody else holds the log.
    next_seq: Seq,
    /// Bytes of segments closed since the last checkpoint began.
    log_bytes: u64,
}

/// What the committer found to do.
#[derive(Default, Debug, PartialEq, Eq)]
struct Todo {
    seal: bool,
    /// A commit of nothing, as a sign of life.
    beat: bool,
    commit: bool,
    close: bool,
    checkpoint: bool,
    stop: bool,
}

/// The part of the state that one commit takes with it.
pub(super) struct Taken {
    pub no: CommitNo,
    pub meta: Arc<Delta>,
    pub dirty: Arc<DirtyFiles>,
    /// Inodes from here on are new: the log has no extents of them.
    pub first_new: u64,
    pub base: Vec<Arc<Delta>>,
    pub tree: Tree,
    pub next_ino: u64,
    pub inodes: u64,
}

impl Committer {
    /// A committer that goes on behind `committed`, which was made at that time.
    pub fn new(
        fs: Arc<Fs>,
        log: Arc<Mutex<LogWriter>>,
        shipping: Arc<dyn Shipping>,
        checkpointer: Checkpointer,
        (committed, committed_time): (CommitNo, Timestamp),
    ) -> Committer {
        let counters = {
            let state = fs.state.lock();
            Counters { next_ino: state.next_ino, live_bytes: state.live_bytes, inodes: state.inodes }
        };
        let committed_at = fs.env.clock.monotonic();
        Committer {
            fs,
            log,
            shipping,
            checkpointer,
            closed: committed,
            closed_at: committed_at,
            committed,
            committed_at,
            committed_time,
            counters,
            next_seq: Seq(0),
            log_bytes: 0,
        }
    }

    /// Works until [`Fs::stop_commits`], then commits, closes and checkpoints what there is, and returns.
    pub fn run(mut self) {
        loop {
            let todo = self.wait();
            let stop = todo.stop;
            // A panic is a bug, but those who wait for a commit must hear of it like of any other failure.
            let broken = self.fs.state.lock().broken;
            let worked = match broken {
                false => catch_unwind(AssertUnwindSafe(|| self.work(todo))),
                true => Ok(Err(log::Error::Latched(BROKEN.into()))),
            };
            let failed = match worked {
                Ok(Ok(())) => None,
                Ok(Err(e)) => Some(e.to_string()),
                Err(_) => Some("the committer panicked; its message is in the log".to_string()),
            };
            if let Some(reason) = failed {
                self.fs.fail(&reason);
                self.shipping.failed(&reason);
            }
            if stop || self.fs.failure().is_some() {
                self.checkpointer.finish();
                return;
            }
        }
    }

    fn work(&mut self, todo: Todo) -> log::Result<()> {
        if todo.seal && !todo.commit {
            self.seal_full_records()?;
        }
        if todo.beat {
            let mut state = self.fs.state.lock();
            state.touch(self.committed_at);
            state.wanted_closed = state.wanted_closed.max(state.generation); // and sent at once
        }
        if todo.commit || todo.beat {
            // With the commit that made it due, and not a second later: what lies abroad is that much newer.
            let due = self.fs.env.clock.monotonic() >= self.close_due();
            let close = due || todo.close || self.fs.state.lock().wanted_closed > self.closed;
            self.commit(close)?;
            self.compact();
        } else if todo.close {
            self.close()?;
        }
        // The last commit may be the first thing that a checkpoint has to take.
        let at_end = todo.stop && self.checkpointer.anything_new(&self.fs.state.lock());
        if (todo.checkpoint || at_end) && !self.checkpointer.busy() {
            self.freeze(todo.stop)?;
        }
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> Todo {
        let fs = self.fs.clone();
        loop {
            // Never under the state's lock: the checkpointer may hold the log while the disk works.
            if let Some(log) = self.log.try_lock() {
                self.next_seq = log.current_seq();
            }
            let mut state = fs.state.lock();
            let (todo, sleep) = self.look(&state, fs.env.clock.monotonic());
            if todo != Todo::default() {
                return todo;
            }
            match fs.env.threads.take_turns() {
                false => drop(fs.wake.wait_for(&mut state, sleep)),
                true => {
                    drop(state);
                    fs.env.threads.turn();
                }
            }
        }
    }

    /// What is due `now`, and how long to sleep if nothing is.
    fn look(&self, state: &State, now: Duration) -> (Todo, Duration) {
        let settings = &self.fs.settings;
        let interval = settings.commit_interval;
        let changed = state.changed_at.is_some();
        let behind = self.committed > self.closed;
        let close_due = Some(self.close_due()).filter(|_| behind);
        let commit_due = state.changed_at.map(|at| at + interval);
        let passed = |due: Option<Duration>| due.is_some_and(|at| now >= at);
        let pressure = !state.waiting_for_space.is_empty()
            || state.dirty_bytes >= settings.dirty_max / 2
            || state.active_weight >= settings.memtable_max / 2;
        let urgent = pressure || state.stopping || state.wanted >= state.generation;
        let checkpoint = self.checkpointer.due(state, self.next_seq.0, self.log_bytes);
        let beat = settings.heartbeat.map(|every| self.committed_at + every).filter(|_| !changed && !behind);
        let todo = Todo {
            beat: passed(beat) && !state.stopping,
            seal: state.full.len() as u64 * settings.record_size >= SEAL_EARLY_BYTES,
            commit: changed && (urgent || passed(commit_due)),
            close: behind && (passed(close_due) || state.stopping || state.wanted_closed > self.closed),
            checkpoint: checkpoint && !self.checkpointer.busy(),
            stop: state.stopping || state.broken,
        };
        let deadlines = [commit_due, close_due, beat].into_iter().flatten();
        let next = deadlines.map(|at| at.saturating_sub(now)).min();
        (todo, next.unwrap_or(IDLE_SLEEP).clamp(Duration::from_millis(1), IDLE_SLEEP))
    }

    /// From when on a commit need not wait for company in its segment: one segment an interval is all that age asks for.
    fn close_due(&self) -> Duration {
        self.closed_at + self.fs.settings.commit_interval
    }

    /// Seals whole records of the running generation, so that a commit never has much left to do.
    fn seal_full_records(&mut self) -> log::Result<()> {
        loop {
            let batch: Vec<(Ino, u64, Arc<Vec<u8>>)> = {
                let mut state = self.fs.state.lock();
                let mut batch = Vec::new();
                while batch.len() < SEAL_BATCH
                    && let Some((ino, start)) = state.full.pop_front()
                {
                    let run = state.dirty.get(&ino).and_then(|file| file.run_at(start));
                    if let Some(Run::Data(bytes)) = run
                        && bytes.len() as u64 == self.fs.settings.record_size
                    {
                        batch.push((ino, start, bytes.clone()));
                    }
                }
                batch
            };
            if batch.is_empty() {
                return Ok(());
            }
            let mut sealed = Vec::with_capacity(batch.len());
            for (ino, start, bytes) in batch {
                let ptr = self.append(FrameKind::Data, &bytes)?;
                sealed.push((ino, start, bytes, ptr));
            }
            self.with_room(LogWriter::flush)?;
            let mut freed = Vec::with_capacity(sealed.len());
            let waiting = {
                let mut state = self.fs.state.lock();
                for (ino, start, bytes, ptr) in sealed {
                    if let Some(file) = state.dirty.get_mut(&ino)
                        && file.sealed(start, &bytes, ptr)
                    {
                        state.dirty_bytes -= bytes.len() as u64;
                    }
                    freed.push(bytes); // dropped outside the lock
                }
                self.take_waiting(&mut state)
            };
            drop(freed);
            waiting.into_iter().for_each(|retry| retry());
        }
    }

    fn take_waiting(&self, state: &mut State) -> Vec<Box<dyn FnOnce() + Send>> {
        if state.has_room(&self.fs.settings) {
            std::mem::take(&mut state.waiting_for_space)
        } else {
            Vec::new()
        }
    }

    /// Appends a frame; closes the segment when it has grown large enough.
    fn append(&mut self, kind: FrameKind, plain: &[u8]) -> log::Result<FramePtr> {
        let ptr = self.with_room(|log| log.append(kind, plain))?;
        if self.log.lock().open_len() >= self.fs.settings.segment_size {
            self.close()?;
        }
        Ok(ptr)
    }

    /// Does something with the log; while the disk has no room, tells the writers so and tries again. Nothing that
    /// was taken for a commit is given up for a full disk.
    fn with_room<T>(&self, mut op: impl FnMut(&mut LogWriter) -> log::Result<T>) -> log::Result<T> {
        loop {
            let done = op(&mut self.log.lock()); // and the lock is free again while we wait
            match done {
                Err(e) if e.is_no_space() => {
                    self.fs.set_no_space(true);
                    ::log::error!("a commit waits for room on the spool's disk: {e}");
                    if !self.shipping.pause() {
                        return Err(e);
                    }
                }
                other => return other,
            }
        }
    }

    /// One commit: everything changed so far, as one step of the whole tree.
    fn commit(&mut self, close: bool) -> log::Result<()> {
        let Some(taken) = self.take() else { return Ok(()) };
        let (fs, shipping) = (self.fs.clone(), self.shipping.clone());
        let mut edit = ExtentEdit::new(&taken, &*fs.frames, fs.settings.record_size, &*shipping);
        let mut files: Vec<(&Ino, &DirtyFile)> = taken.dirty.iter().collect();
        files.sort_unstable_by_key(|(ino, _)| **ino);
        for (ino, file) in files {
            for (start, run) in file.runs() {
                let extent = match run {
                    Run::Hole(_) => None,
                    Run::Data(bytes) if bytes.len() <= INLINE_MAX => Some(Extent::Inline { bytes }.encode()),
                    Run::Data(bytes) => {
                        let ptr = self.append(FrameKind::Data, bytes)?;
                        Some(Extent::Stored { ptr, from: 0, len: bytes.len() as u32 }.encode())
                    }
                    Run::Stored { ptr, from, len } => {
                        Some(Extent::Stored { ptr: *ptr, from: *from, len: *len }.encode())
                    }
                };
                edit.replace(*ino, start..start.saturating_add(run.len()).min(MAX_FILE_SIZE), extent)?;
            }
        }
        let ExtentEdit { changes, live_added, live_freed, dead, .. } = edit;
        let counters = Counters {
            next_ino: taken.next_ino,
            live_bytes: (self.counters.live_bytes + live_added).saturating_sub(live_freed),
            inodes: taken.inodes,
        };
        let parts = delta::encode(&counters, merged(&taken.meta, &changes));
        let time = self.fs.env.clock.now();
        self.with_room(|log| log.append_commit(taken.no, time, &parts))?;
        let close = close || self.log.lock().is_full(self.fs.settings.segment_size);
        match close {
            true => self.close()?,
            false => {
                let open = self.with_room(|log| log.sync().map(|()| log.open_len()))?;
                self.fs.open_segment.store(open, Ordering::Relaxed);
            }
        }
        drop(parts);
        (self.committed, self.committed_time) = (taken.no, time);
        self.committed_at = self.fs.env.clock.monotonic();
        self.counters = counters;
        self.publish(changes, counters);
        self.shipping.committed(taken.no);
        if close {
            self.closed = taken.no;
        }
        dead.into_iter().for_each(|ptr| self.shipping.dead(ptr));
        Ok(())
    }

    /// Takes the running generation and begins the next: a few pointer swaps.
    fn take(&mut self) -> Option<Taken> {
        let mut state = self.fs.state.lock();
        if state.broken {
            return None;
        }
        state.changed_at.take()?;
        let meta = Arc::new(std::mem::take(&mut state.active));
        let weight = std::mem::take(&mut state.active_weight);
        let base = state.levels.iter().map(|l| l.delta.clone()).collect();
        let upto = state.generation;
        if !meta.is_empty() {
            state.levels.insert(0, Level { delta: meta.clone(), weight, frozen: false, upto });
        }
        let dirty = Arc::new(std::mem::take(&mut state.dirty));
        state.sealing = Some(dirty.clone());
        state.sealing_bytes = std::mem::take(&mut state.dirty_bytes);
        state.sealing_growth = std::mem::take(&mut state.growth);
        state.full.clear();
        let no = state.generation;
        state.generation = CommitNo(no.0 + 1);
        let first_new = state.first_new;
        state.first_new = state.next_ino;
        Some(Taken {
            no,
            meta,
            dirty,
            first_new,
            base,
            tree: state.tree,
            next_ino: state.next_ino,
            inodes: state.inodes,
        })
    }

    /// The commit is in the log: its extents become visible in place of the runs in memory.
    fn publish(&mut self, changes: Delta, counters: Counters) {
        let weight = changes.iter().map(|(k, v)| weight(k, v)).sum();
        let mut state = self.fs.state.lock();
        if !changes.is_empty() {
            let upto = self.committed;
            state.levels.insert(0, Level { delta: Arc::new(changes), weight, frozen: false, upto });
        }
        let done = state.sealing.take();
        (state.sealing_bytes, state.sealing_growth) = (0, 0);
        state.over_limit = state.over_limit.filter(|no| *no > self.committed);
        state.live_bytes = counters.live_bytes;
        let waiting = self.take_waiting(&mut state);
        drop(state);
        drop(done); // freeing many buffers must not hold the lock
        waiting.into_iter().for_each(|retry| retry());
    }

    /// Folds small levels into larger ones, but none that a checkpoint has frozen.
    fn compact(&mut self) {
        fold_levels(&self.fs.state, |a, b| !a.frozen && !b.frozen);
    }

    fn close(&mut self) -> log::Result<()> {
        self.log_bytes += self.with_room(|log| close_and_ship(log, &*self.shipping))?;
        self.fs.open_segment.store(0, Ordering::Relaxed);
        self.closed = self.committed;
        self.closed_at = self.fs.env.clock.monotonic();
        Ok(())
    }

    /// Hands everything committed so far to the checkpointer. The segment ends here, so that a replay from the
    /// checkpoint begins with a whole one.
    fn freeze(&mut self, and_wait: bool) -> log::Result<()> {
        self.close()?;
        self.log_bytes = 0;
        let (replay_seq, replay_prev) = {
            let log = self.log.lock();
            (log.current_seq(), log.last_closed())
        };
        let (levels, tree) = {
            let mut state = self.fs.state.lock();
            state.levels.iter_mut().for_each(|level| level.frozen = true);
            (state.levels.iter().map(|l| l.delta.clone()).collect::<Vec<_>>(), state.tree)
        };
        let frozen = Frozen {
            levels,
            tree,
            commit: self.committed,
            time: self.committed_time,
            counters: self.counters,
            replay_seq,
            replay_prev,
        };
        self.checkpointer.start(frozen);
        if and_wait {
            self.checkpointer.finish();
        }
        Ok(())
    }
}

/// Closes the open segment, if there is one, and hands it over before anybody else can close the next: segments
/// are shipped in the order of the chain, because who waits for one is told when a later one is there. Returns the
/// segment's bytes.
pub(super) fn close_and_ship(log: &mut LogWriter, shipping: &dyn Shipping) -> log::Result<u64> {
    log.set_stored(shipping.stored());
    let Some(segment) = log.close()? else { return Ok(0) };
    let len = segment.len;
    shipping.closed(segment);
    Ok(len)
}

impl Fs {
    /// Asks the committer to commit what there is and to end.
    pub fn stop_commits(&self) {
        self.state.lock().stopping = true;
        self.wake.notify_one();
    }
}

/// Both maps in key order; they have no key in common.
fn merged<'a>(a: &'a Delta, b: &'a Delta) -> Vec<(&'a Key, &'a Option<Value>)> {
    let mut all: Vec<_> = a.iter().chain(b.iter()).collect();
    all.sort_by(|x, y| x.0.cmp(y.0)); // two sorted runs: the stable sort merges them
    all
}
