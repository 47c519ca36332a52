//! The file system without a kernel: inodes, names, data, extended attributes, orphans, commits.
//! Invariant: an operation reads all it needs first and changes the state in one critical section at its end, so
//! that it either happened as a whole or not at all, and can be tried again after frames were fetched.
//!
//! | file | room for |
//! |---|---|
//! | `state` | what is in memory, and the transaction over it |
//! | `inode` | attributes and extended attributes |
//! | `acl` | access control lists |
//! | `namespace` | names: lookup, create, link, unlink, rename, readdir |
//! | `data` | read, write, truncate, holes, shared copies |
//! | `dirty` | written bytes not in the log yet |
//! | `commit`, `edit` | the committer: from memory to the log, and what it changes in extents |
//! | `checkpoint` | from the log's deltas to the tree |
//! | `follow` | a reader that moves on with home |

mod acl;
mod checkpoint;
mod commit;
mod data;
mod dirty;
mod edit;
mod error;
mod extents;
mod follow;
mod inode;
mod lookups;
mod namespace;
mod state;

#[cfg(feature = "fuzzing")]
pub use acl::fuzz as fuzz_acl;
pub use acl::{AclKind, canonical as canonical_acl};
pub use checkpoint::{CheckpointOutcome, Checkpointer};
pub use commit::{Committer, Shipping};
pub use data::{Seek, Strip};
pub use error::{Error, Result};
pub use follow::{Changed, Touched};
pub use inode::{Attr, CAPABILITY, SetAttr, XattrMode};
pub use namespace::{Caller, DirItem, NewNode};
pub use state::Recovery;

use crate::clock::Env;
use crate::log::Frames;
use crate::types::CommitNo;
use parking_lot::{Condvar, Mutex};
use state::State;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Largest file size and offset, in bytes.
pub const MAX_FILE_SIZE: u64 = i64::MAX as u64;
pub use crate::tree::value::NAME_MAX;
/// Every change of a name goes through the kernel or is told to it, so that it need not ask again.
const NAMES_KEEP: Duration = Duration::from_secs(365 * 86_400);

/// The limits and shapes a file system is run with. All sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Largest piece of a file that is sealed as one frame; a power of two, fixed for a volume.
    pub record_size: u64,
    /// Target size of a tree page before sealing.
    pub page_size: usize,
    /// A segment is closed when it has grown to this.
    pub segment_size: u64,
    /// Unwritten file bytes in memory at which writers wait.
    pub dirty_max: u64,
    /// Changed keys in memory above which a checkpoint is made.
    pub memtable_max: usize,
    /// Log bytes since the last checkpoint above which one is made (bounds replay).
    pub replay_max: u64,
    /// Longest time between a change and its commit, and between a commit and its segment's upload.
    pub commit_interval: Duration,
    /// Size of the volume as `statfs` shows it and as writes are held to; `None`: what the disk and store give.
    pub size_limit: Option<u64>,
    /// Refuse every change.
    pub read_only: bool,
    /// Reading changes the access time if it is older than the last change, or a day old.
    pub relatime: bool,
    /// A writer without changes commits after so long all the same, as a sign of life; `None`: never.
    pub heartbeat: Option<Duration>,
    /// A reader moves on with home, and asks the store this often.
    pub follow: Option<Duration>,
    /// Owner of the root directory of a volume that has none yet.
    pub root_owner: Caller,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            record_size: 128 << 10,
            page_size: 16 << 10,
            segment_size: 16 << 20,
            dirty_max: 64 << 20,
            memtable_max: 24 << 20,
            replay_max: 256 << 20,
            commit_interval: Duration::from_secs(1),
            size_limit: None,
            read_only: false,
            relatime: false,
            heartbeat: None,
            follow: None,
            root_owner: Caller { uid: 0, gid: 0 },
        }
    }
}

/// What `statfs` needs to know. Counts, and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// File bytes the newest tree refers to, with what is not committed yet.
    pub used: u64,
    /// Inodes in use.
    pub inodes: u64,
}

/// A volume's file system. Shared by the dispatch thread, the worker pool and the committer.
pub struct Fs {
    pub(crate) settings: Settings,
    env: Env,
    frames: Arc<dyn Frames>,
    state: Mutex<State>,
    /// Wakes the committer.
    wake: Condvar,
    /// Bytes in the segment that is open, as of the last commit.
    open_segment: AtomicU64,
    /// For how long the kernel may keep a name, in milliseconds.
    names_keep: AtomicU64,
}

impl Fs {
    /// Puts a file system over what recovery found.
    pub fn new(settings: Settings, env: Env, frames: Arc<dyn Frames>, recovery: Recovery) -> Fs {
        let state = State::new(recovery, &settings, &env);
        Fs {
            settings,
            env,
            frames,
            state: Mutex::new(state),
            wake: Condvar::new(),
            open_segment: AtomicU64::new(0),
            names_keep: AtomicU64::new(NAMES_KEEP.as_millis() as u64),
        }
    }

    /// The commit that holds, or will hold, every change made so far. An fsync waits for its durability.
    pub fn sync_point(&self) -> CommitNo {
        self.state.lock().newest_change()
    }

    /// Asks the committer to commit now what there is; with `ship`, to close the segment for the uploader too.
    pub fn request_commit(&self, upto: CommitNo, ship: bool) {
        let mut state = self.state.lock();
        state.wanted = state.wanted.max(upto);
        if ship {
            state.wanted_closed = state.wanted_closed.max(upto);
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Runs `retry` when there is room for writes again (on whatever thread made it).
    pub fn when_space(&self, retry: Box<dyn FnOnce() + Send>) {
        let mut state = self.state.lock();
        if state.has_room(&self.settings) || state.failed.is_some() {
            drop(state);
            retry();
            return;
        }
        state.waiting_for_space.push(retry);
        drop(state);
        self.wake.notify_one();
    }

    /// Bytes and inodes in use.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock();
        Usage { used: state.used(), inodes: state.inodes }
    }

    /// See [`State::unlogged_bytes`].
    pub fn dirty_bytes(&self) -> u64 {
        self.state.lock().unlogged_bytes()
    }

    /// See [`State::is_behind`].
    pub fn is_behind(&self) -> bool {
        self.state.lock().is_behind(&self.settings)
    }

    /// Bytes in the segment that is still open: committed here, and not yet on their way.
    pub fn open_segment_bytes(&self) -> u64 {
        self.open_segment.load(Ordering::Relaxed)
    }

    /// Approximate bytes of changed keys held in memory.
    pub fn memtable_bytes(&self) -> usize {
        self.state.lock().memtable_weight()
    }

    /// Says whether the spool's disk has room; without, writers get ENOSPC before anything acknowledged is in danger.
    pub fn set_no_space(&self, full: bool) {
        self.state.lock().no_space = full;
    }

    /// Latches the file system: every later change fails with EROFS and every fsync with EIO; reads go on.
    pub fn fail(&self, reason: &str) {
        let mut state = self.state.lock();
        if state.failed.is_none() {
            ::log::error!("the file system is read-only from here: {reason}");
            state.failed = Some(reason.to_string());
        }
        let waiting = std::mem::take(&mut state.waiting_for_space);
        drop(state);
        self.wake.notify_one();
        waiting.into_iter().for_each(|retry| retry());
    }

    /// Why the file system is latched, if it is.
    pub fn failure(&self) -> Option<String> {
        self.state.lock().failed.clone()
    }
}
