//! Checkpoints: the changes since the last one are merged into the tree, beside the running commits.
//! Invariant: a checkpoint is announced only when its pages, its root and everything they refer to are durable on
//! the local disk; until then the frozen changes stay in memory and in the replay.

use super::Fs;
use super::commit::{Shipping, close_and_ship};
use super::state::State;
use crate::clock::Thread;
use crate::log::writer::LogWriter;
use crate::log::{self, Append};
use crate::tree::Source;
use crate::tree::btree::Tree;
use crate::tree::checkpoint::Root;
use crate::tree::delta::{Counters, Delta};
use crate::types::{CommitNo, FrameKind, FramePtr, Head, Seq, Timestamp};
use parking_lot::Mutex;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Segments since the last checkpoint above which one is made: each costs a replay a request.
const REPLAY_SEGMENTS_MAX: u64 = 256;
/// The same on a full disk, where a checkpoint is what lets segments go.
const FULL_SEGMENTS_MAX: u64 = 16;

/// Pause after a checkpoint that failed, in seconds.
const RETRY_SECS: u64 = 30;

/// What is to be merged into the tree, and from where on the log must be replayed afterwards.
pub(super) struct Frozen {
    pub levels: Vec<Arc<Delta>>,
    pub tree: Tree,
    pub commit: CommitNo,
    pub time: Timestamp,
    pub counters: Counters,
    pub replay_seq: Seq,
    pub replay_prev: Option<Head>,
}

/// A checkpoint that is durable on the local disk but for its own small object.
#[derive(Clone, Debug)]
pub struct CheckpointOutcome {
    /// What the checkpoint object says.
    pub root: Root,
    /// Tree pages written for it.
    pub pages: u64,
    /// Frames the new tree no longer refers to.
    pub dead: Vec<FramePtr>,
}

/// Runs one checkpoint at a time on a thread of its own.
pub struct Checkpointer {
    fs: Arc<Fs>,
    log: Arc<Mutex<LogWriter>>,
    shipping: Arc<dyn Shipping>,
    busy: Arc<AtomicBool>,
    worker: Option<Box<dyn Thread>>,
    /// First segment a replay would need now.
    replay_seq: Arc<AtomicU64>,
    /// After a failure, the monotonic time in seconds before which no other is begun.
    not_before: Arc<AtomicU64>,
}

impl Checkpointer {
    /// A checkpointer over a log that would be replayed from `replay_seq` on.
    pub fn new(
        fs: Arc<Fs>,
        log: Arc<Mutex<LogWriter>>,
        shipping: Arc<dyn Shipping>,
        replay_seq: Seq,
    ) -> Checkpointer {
        Checkpointer {
            fs,
            log,
            shipping,
            busy: Arc::default(),
            worker: None,
            replay_seq: Arc::new(AtomicU64::new(replay_seq.0)),
            not_before: Arc::default(),
        }
    }

    pub(super) fn busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// True when memory, replay time or a full disk call for a checkpoint: what lies behind it may leave the spool as
    /// soon as it is sent, what no checkpoint covers may not. The log has its next segment at `next_seq`, and has
    /// taken `log_bytes` since the last checkpoint.
    pub(super) fn due(&self, state: &State, next_seq: u64, log_bytes: u64) -> bool {
        let settings = &self.fs.settings;
        if self.fs.env.clock.monotonic().as_secs() < self.not_before.load(Ordering::Acquire) {
            return false;
        }
        let weight: usize = state.levels.iter().map(|l| l.weight).sum();
        let segments = next_seq.saturating_sub(self.replay_seq.load(Ordering::Acquire));
        let log_max = if state.no_space { settings.segment_size } else { settings.replay_max };
        // What was logged before the last start is counted in segments only.
        let segments_max = if state.no_space { FULL_SEGMENTS_MAX } else { REPLAY_SEGMENTS_MAX };
        // Commits without changes, signs of life, are segments to replay all the same.
        weight >= settings.memtable_max
            || segments >= REPLAY_SEGMENTS_MAX
            || (self.anything_new(state) && segments >= segments_max)
            || (self.anything_new(state) && log_bytes >= log_max)
    }

    /// True when there are committed changes that no checkpoint holds.
    pub(super) fn anything_new(&self, state: &State) -> bool {
        !state.levels.is_empty()
    }

    pub(super) fn start(&mut self, frozen: Frozen) {
        self.finish();
        self.busy.store(true, Ordering::Release);
        let (fs, log, shipping) = (self.fs.clone(), self.log.clone(), self.shipping.clone());
        let (busy, replay_seq) = (self.busy.clone(), self.replay_seq.clone());
        let not_before = self.not_before.clone();
        let work = move || {
            let ran = catch_unwind(AssertUnwindSafe(|| run(&fs, &log, &*shipping, &frozen)));
            match ran.unwrap_or_else(|_| Err(log::Error::Latched("the checkpoint panicked".into()))) {
                Ok(()) => replay_seq.store(frozen.replay_seq.0, Ordering::Release),
                Err(e) => {
                    // Nothing is lost: the changes stay in memory and in the replay; the next one tries again.
                    ::log::error!("checkpoint of commit {} failed: {e}", frozen.commit.0);
                    fs.state.lock().levels.iter_mut().for_each(|level| level.frozen = false);
                    not_before.store(fs.env.clock.monotonic().as_secs() + RETRY_SECS, Ordering::Release);
                }
            }
            busy.store(false, Ordering::Release);
            fs.wake.notify_one();
        };
        match self.fs.env.threads.spawn("checkpoint", Box::new(work)) {
            Ok(worker) => self.worker = Some(worker),
            Err(e) => {
                ::log::error!("no thread for a checkpoint: {e}");
                self.busy.store(false, Ordering::Release);
            }
        }
    }

    /// Waits for the checkpoint under way, if any.
    pub(super) fn finish(&mut self) {
        if let Some(worker) = self.worker.take()
            && !worker.join()
        {
            ::log::error!("the checkpoint thread ended in a panic");
            self.busy.store(false, Ordering::Release);
        }
    }
}

/// Merges, appends pages and root, waits for the disk, and lets the new tree take over.
fn run(fs: &Fs, log: &Mutex<LogWriter>, shipping: &dyn Shipping, frozen: &Frozen) -> log::Result<()> {
    let changes = fold(&frozen.levels);
    let segment_size = fs.settings.segment_size;
    let mut write_page = |page: &[u8]| {
        fs.env.threads.turn(); // commits go on between two pages
        append_page(log, shipping, segment_size, page)
    };
    let source = Source { frames: &*fs.frames, fetch: &|ptrs| shipping.fetch(ptrs) };
    let merged = frozen.tree.merge(source, &changes, fs.settings.page_size, &mut write_page)?;
    let root = {
        let mut log = log.lock();
        let root = Root {
            tree: merged.tree.root,
            commit: frozen.commit,
            time: frozen.time,
            counters: frozen.counters,
            replay_seq: frozen.replay_seq,
            replay_prev: frozen.replay_prev,
            root_seq: log.current_seq(),
        };
        log.append(FrameKind::Root, &root.encode())?;
        close_and_ship(&mut log, shipping)?; // closed: durable, and never truncated by a recovery
        root
    };
    shipping.checkpoint(CheckpointOutcome { root, pages: merged.pages_written, dead: merged.dead })?;
    let mut state = fs.state.lock();
    state.tree = merged.tree;
    let gone: Vec<_> = state.levels.extract_if(.., |level| level.frozen).collect();
    let waiting = std::mem::take(&mut state.waiting_for_space);
    drop(state);
    drop(gone); // freeing a large map must not hold the lock
    waiting.into_iter().for_each(|retry| retry());
    Ok(())
}

/// One map of all levels; the newest value of a key wins.
fn fold(levels: &[Arc<Delta>]) -> Delta {
    let mut all = Delta::new();
    for level in levels.iter().rev() {
        all.extend(level.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    all
}

/// Appends one page, holding the log only for it.
fn append_page(
    log: &Mutex<LogWriter>,
    shipping: &dyn Shipping,
    segment_size: u64,
    page: &[u8],
) -> log::Result<FramePtr> {
    let mut log = log.lock();
    let ptr = log.append(FrameKind::Page, page)?;
    if log.open_len() >= segment_size {
        close_and_ship(&mut log, shipping)?;
    }
    Ok(ptr)
}
