//! The account of what is durable where, and those who wait for it.
//! Invariant: a waiter is answered exactly once, outside the lock, and with `Ok` only when its commit is durable at
//! the volume's protection level at that moment. Falling back from a level is a state that everybody can see.

use crate::clock::Env;
use crate::log::ClosedSegment;
use crate::types::{CommitNo, Head};
use ::log::{error, warn};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Marks kept to know the age of the oldest commit that is not in the embassy; beyond it neighbours are merged.
const MARKS_MAX: usize = 1024;
/// Commits nearer to each other than this share a mark.
const MARK_INTERVAL: Duration = Duration::from_millis(100);
/// A local disk that has not taken a commit for this long after the deadline is stuck; nobody waits for ever.
const STUCK_AFTER: Duration = Duration::from_secs(300);
/// How often timeouts are looked at while somebody waits.
const TICK: Duration = Duration::from_millis(50);

/// What an acknowledged `fsync` promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protection {
    /// The embassy holds it; when it cannot, `fsync` fails.
    Strict,
    /// The embassy holds it; while it cannot, the local disk holds it, and this is said loudly.
    #[default]
    Available,
    /// The local disk holds it.
    Local,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protection::Strict => "strict",
            Protection::Available => "available",
            Protection::Local => "local",
        })
    }
}

impl FromStr for Protection {
    type Err = String;

    fn from_str(text: &str) -> Result<Protection, String> {
        match text {
            "strict" => Ok(Protection::Strict),
            "available" => Ok(Protection::Available),
            "local" => Ok(Protection::Local),
            _ => Err(format!("`{text}` is no protection level; use strict, available or local")),
        }
    }
}

/// Why a commit is not known to be durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// Not within the time allowed. It may become durable later.
    #[error("not durable within the time allowed")]
    TimedOut,
    /// It never will in this process.
    #[error("{0}")]
    Failed(String),
}

/// Where the two logs stand when the account is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Position {
    /// Newest commit durable on the local disk.
    pub local: CommitNo,
    /// Newest commit durable in the embassy.
    pub remote: CommitNo,
    /// Newest segment durable in the embassy with all before it.
    pub remote_head: Option<Head>,
}

/// The account at one moment, for status and metrics.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The volume's level.
    pub protection: Protection,
    /// Newest commit durable on the local disk.
    pub local: CommitNo,
    /// Newest commit durable in the embassy.
    pub remote: CommitNo,
    /// Newest segment durable in the embassy with all before it.
    pub remote_head: Option<Head>,
    /// False while the level has fallen back to the local disk.
    pub in_sync: bool,
    /// For how long that has been so; none while it is in sync.
    pub out_of_sync: Option<Duration>,
    /// Closed segments that are not in the embassy.
    pub unsent_segments: u64,
    /// Their bytes.
    pub unsent_bytes: u64,
    /// For how long the oldest commit that is not in the embassy has been waiting here; zero when there is none. What
    /// an earlier run left counts from this run's start.
    pub lag: Duration,
    /// What went wrong with the store since it last took something.
    pub last_error: Option<String>,
    /// How often the level has fallen back.
    pub fallbacks: u64,
    /// Set when another writer owns the chain.
    pub fenced: Option<String>,
    /// Set when the local log has failed.
    pub latched: Option<String>,
    /// Callers that wait.
    pub waiters: usize,
}

/// Called with the answer, once.
pub type Callback = Box<dyn FnOnce(Result<(), WaitError>) + Send>;

/// Called with the reason of a fence, once.
pub type FenceHook = Box<dyn FnOnce(&str) + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Goal {
    /// Durable at the volume's level.
    Level,
    /// Durable in the embassy whatever the level.
    Remote,
}

struct Waiter {
    commit: CommitNo,
    goal: Goal,
    deadline: Duration,
    callback: Callback,
}

/// Commits up to `commit` and behind the mark before became local at `since` or later.
struct Mark {
    commit: CommitNo,
    since: Duration,
}

struct State {
    at: Position,
    in_sync: bool,
    out_since: Duration,
    unsent_segments: u64,
    unsent_bytes: u64,
    marks: VecDeque<Mark>,
    last_error: Option<String>,
    fallbacks: u64,
    fenced: Option<Fence>,
    fence_hooks: Vec<FenceHook>,
    latched: Option<String>,
    waiters: Vec<Waiter>,
}

struct Fence {
    reason: String,
    /// Newest commit that was durable on the local disk by then: the last that `local` may acknowledge.
    local: CommitNo,
    /// The hooks have run: whoever waits may hear of it.
    told: bool,
}

/// See the module. Shared by the committer, the uploader, those who wait, and the status.
pub struct Durable {
    protection: Protection,
    sync_timeout: Duration,
    env: Env,
    state: Mutex<State>,
    /// Wakes the ticker when somebody begins to wait.
    waiting: tokio::sync::Notify,
}

type Answers = Vec<(Callback, Result<(), WaitError>)>;

fn answer(answers: Answers) {
    for (callback, result) in answers {
        callback(result);
    }
}

impl Durable {
    /// Opens the account at `at`. `sync_timeout` bounds how long the embassy is waited for.
    pub fn new(protection: Protection, sync_timeout: Duration, env: Env, at: Position) -> Durable {
        let mut marks = VecDeque::new();
        if at.local > at.remote {
            marks.push_back(Mark { commit: at.local, since: env.clock.monotonic() });
        }
        let state = State {
            at,
            in_sync: true,
            out_since: Duration::ZERO,
            unsent_segments: 0,
            unsent_bytes: 0,
            marks,
            last_error: None,
            fallbacks: 0,
            fenced: None,
            fence_hooks: Vec::new(),
            latched: None,
            waiters: Vec::new(),
        };
        Durable {
            protection,
            sync_timeout,
            env,
            state: Mutex::new(state),
            waiting: tokio::sync::Notify::new(),
        }
    }

    /// The volume's level.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// True while an `fsync` waits for the embassy: the segment that holds its commit must be closed and sent now.
    pub fn waits_for_remote(&self) -> bool {
        let state = self.state.lock();
        self.protection == Protection::Strict || (self.protection == Protection::Available && state.in_sync)
    }

    /// Why the writer is fenced, if it is.
    pub fn fenced(&self) -> Option<String> {
        self.state.lock().fence_reason()
    }

    /// The newest segment that is in the embassy with all before it.
    pub fn remote_head(&self) -> Option<Head> {
        self.state.lock().at.remote_head
    }

    /// Goes on where the process before this one stood: who waits for the embassy has waited there already.
    pub(super) fn take_over(&self, fallen_back: bool) {
        let mut state = self.state.lock();
        if fallen_back && self.protection == Protection::Available {
            state.in_sync = false;
            state.out_since = self.env.clock.monotonic();
        }
    }

    /// The account as it stands.
    pub fn snapshot(&self) -> Snapshot {
        let now = self.env.clock.monotonic();
        let state = self.state.lock();
        Snapshot {
            protection: self.protection,
            local: state.at.local,
            remote: state.at.remote,
            remote_head: state.at.remote_head,
            in_sync: state.in_sync,
            out_of_sync: (!state.in_sync).then(|| now.saturating_sub(state.out_since)),
            unsent_segments: state.unsent_segments,
            unsent_bytes: state.unsent_bytes,
            lag: state.lag(now),
            last_error: state.last_error.clone(),
            fallbacks: state.fallbacks,
            fenced: state.fence_reason(),
            latched: state.latched.clone(),
            waiters: state.waiters.len(),
        }
    }

    /// Bytes in closed segments that the embassy is not known to hold.
    pub fn unsent_bytes(&self) -> u64 {
        self.state.lock().unsent_bytes
    }

    /// The committer: everything up to `commit` is durable on the local disk.
    pub fn set_local(&self, commit: CommitNo) {
        let now = self.env.clock.monotonic();
        self.change(|state| {
            if commit > state.at.local {
                state.at.local = commit;
                // Its segment may have been closed, sent and confirmed before the committer came to say so.
                if commit > state.at.remote {
                    state.mark(commit, now);
                }
            }
        });
    }

    /// The uploader: this segment waits to be sent.
    pub(super) fn queued(&self, segment: &ClosedSegment) {
        let mut state = self.state.lock();
        state.unsent_segments += 1;
        state.unsent_bytes += segment.len;
    }

    /// The uploader: this segment and all before it are durable in the embassy.
    pub(super) fn sent(&self, segment: &ClosedSegment) {
        let now = self.env.clock.monotonic();
        let patience = self.sync_timeout / 4;
        self.change(|state| {
            state.unsent_segments = state.unsent_segments.saturating_sub(1);
            state.unsent_bytes = state.unsent_bytes.saturating_sub(segment.len);
            state.at.remote = state.at.remote.max(segment.last_commit);
            if state.at.remote_head.is_none_or(|head| head.seq < segment.head.seq) {
                state.at.remote_head = Some(segment.head);
            }
            let remote = state.at.remote;
            while state.marks.front().is_some_and(|mark| mark.commit <= remote) {
                state.marks.pop_front();
            }
            state.last_error = None;
            // Under steady writes something is always under way: then it counts that it arrives well in time.
            let caught_up =
                remote >= state.at.local || state.unsent_segments == 0 || state.lag(now) < patience;
            if !state.in_sync && caught_up {
                state.in_sync = true;
                let out = now.saturating_sub(state.out_since).as_secs_f64();
                warn!(
                    "back in sync after {out:.1} s: fsync waits for the embassy again (commit {})",
                    remote.0
                );
            }
        });
    }

    /// The uploader: what stands in the way just now, if anything does.
    pub(super) fn set_error(&self, message: Option<String>) {
        self.state.lock().last_error = message;
    }

    /// Another writer owns the chain: nothing more will become durable in the embassy. The first reason stays. The
    /// hooks run before this answers those who wait, so that who is told finds the writer stopped.
    pub fn fence(&self, reason: String) {
        let hooks = {
            let mut state = self.state.lock();
            if state.fenced.is_some() {
                return;
            }
            error!("{reason}");
            state.fenced = Some(Fence { reason: reason.clone(), local: state.at.local, told: false });
            std::mem::take(&mut state.fence_hooks)
        };
        for hook in hooks {
            hook(&reason);
        }
        self.change(|state| state.fenced.iter_mut().for_each(|fence| fence.told = true));
    }

    /// Calls `hook` with the reason when the writer is fenced, outside the account's lock, once; before this returns
    /// if it is fenced already.
    pub fn on_fence(&self, hook: FenceHook) {
        let reason = {
            let mut state = self.state.lock();
            match state.fence_reason() {
                Some(reason) => reason,
                None => return state.fence_hooks.push(hook),
            }
        };
        hook(&reason);
    }

    /// The local log failed: nothing more will become durable at home. What is already there can still be sent.
    pub fn latch(&self, reason: String) {
        self.change(|state| {
            if state.latched.is_none() {
                error!("the local log stopped: {reason}");
                state.latched = Some(reason);
            }
        });
    }

    /// Calls `callback` when `commit` is durable at the volume's level, or cannot be. It may be called before this
    /// returns, on this thread.
    ///
    /// After a fence `strict` and `available` fail for what the embassy does not hold. `local` promised the local disk
    /// only, so it answers `Ok` also for what that held when the fence came, and the state directory keeps it; what
    /// reaches the disk later is written by a writer that should have stopped, and fails.
    pub fn wait(&self, commit: CommitNo, callback: Callback) {
        self.enlist(commit, Goal::Level, self.sync_timeout, callback);
    }

    /// Calls `callback` when `commit` is durable in the embassy, whatever the level, or when `timeout` has passed.
    pub fn wait_remote(&self, commit: CommitNo, timeout: Duration, callback: Callback) {
        self.enlist(commit, Goal::Remote, timeout, callback);
    }

    fn enlist(&self, commit: CommitNo, goal: Goal, timeout: Duration, callback: Callback) {
        let deadline = self.env.clock.monotonic().saturating_add(timeout);
        self.change(|state| state.waiters.push(Waiter { commit, goal, deadline, callback }));
        self.waiting.notify_one();
    }

    /// Whether somebody waits, so that [`Durable::tick`] is worth calling.
    pub fn has_waiters(&self) -> bool {
        !self.state.lock().waiters.is_empty()
    }

    /// Lets time pass: `now` is the environment's monotonic clock.
    pub fn tick(&self, now: Duration) {
        let answers = {
            let mut state = self.state.lock();
            self.fall_back(&mut state, now);
            self.settle(&mut state, Some(now))
        };
        answer(answers);
    }

    /// Spawns the task that calls [`Durable::tick`] while somebody waits. It ends with the account.
    pub fn start_ticker(self: &Arc<Durable>, handle: &tokio::runtime::Handle) -> tokio::task::JoinHandle<()> {
        let durable = Arc::downgrade(self);
        handle.spawn(async move {
            while let Some(durable) = durable.upgrade() {
                durable.tick(durable.env.clock.monotonic());
                if !durable.has_waiters() {
                    // The pause bounds how long the account is kept when all others have let go of it.
                    let _ = tokio::time::timeout(20 * TICK, durable.waiting.notified()).await;
                }
                drop(durable);
                tokio::time::sleep(TICK).await;
            }
        })
    }

    /// Changes the account, then answers those whose wait is over.
    fn change(&self, edit: impl FnOnce(&mut State)) {
        let answers = {
            let mut state = self.state.lock();
            edit(&mut state);
            self.settle(&mut state, None)
        };
        answer(answers);
    }

    /// Falls back to the local disk when the embassy has been waited for too long. Not while the commit is not even
    /// local: a slow local disk is not the embassy's silence.
    fn fall_back(&self, state: &mut State, now: Duration) {
        if self.protection != Protection::Available || !state.in_sync || state.fenced.is_some() {
            return;
        }
        let at = state.at;
        let late = state.waiters.iter().find(|waiter| {
            let open = waiter.commit > at.remote && waiter.commit <= at.local;
            waiter.goal == Goal::Level && open && waiter.deadline <= now
        });
        let Some(late) = late.map(|waiter| waiter.commit.0) else { return };
        state.in_sync = false;
        state.out_since = now;
        state.fallbacks += 1;
        // A store that is silent has failed nothing yet.
        let silent = || format!("the store has not answered within {:?}", self.sync_timeout);
        state.last_error.get_or_insert_with(silent);
        warn!(
            "OUT OF SYNC: the embassy has not confirmed commit {late} within {:?}; until it catches up, fsync \
             answers when the local disk holds the data. Unsent: {} segments, {} bytes. Last error: {}",
            self.sync_timeout,
            state.unsent_segments,
            state.unsent_bytes,
            state.last_error.as_deref().unwrap_or("none"),
        );
    }

    /// Takes out the waiters whose answer is known. Deadlines count only when `now` is given.
    fn settle(&self, state: &mut State, now: Option<Duration>) -> Answers {
        let mut answers = Vec::new();
        let mut still = Vec::new();
        for waiter in std::mem::take(&mut state.waiters) {
            match self.verdict(state, &waiter, now) {
                Some(result) => answers.push((waiter.callback, result)),
                None => still.push(waiter),
            }
        }
        state.waiters = still;
        answers
    }

    fn verdict(
        &self,
        state: &State,
        waiter: &Waiter,
        now: Option<Duration>,
    ) -> Option<Result<(), WaitError>> {
        // A fenced writer's commits are in nobody's history: falling back must not acknowledge them.
        let local_suffices = waiter.goal == Goal::Level
            && match self.protection {
                Protection::Strict => false,
                Protection::Available => !state.in_sync && state.fenced.is_none(),
                Protection::Local => true,
            };
        let local = state.fenced.as_ref().map_or(state.at.local, |fence| fence.local);
        let reached = if local_suffices { local.max(state.at.remote) } else { state.at.remote };
        if reached >= waiter.commit {
            return Some(Ok(()));
        }
        if let Some(fence) = &state.fenced {
            return fence.told.then(|| Err(WaitError::Failed(fence.reason.clone())));
        }
        match &state.latched {
            Some(reason) if waiter.commit > state.at.local => {
                return Some(Err(WaitError::Failed(reason.clone())));
            }
            _ => (),
        }
        let times_out = waiter.goal == Goal::Remote || self.protection == Protection::Strict;
        let last = if times_out { waiter.deadline } else { waiter.deadline.saturating_add(STUCK_AFTER) };
        now.is_some_and(|now| last <= now).then_some(Err(WaitError::TimedOut))
    }
}

impl State {
    fn fence_reason(&self) -> Option<String> {
        self.fenced.as_ref().map(|fence| fence.reason.clone())
    }

    fn lag(&self, now: Duration) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |mark| now.saturating_sub(mark.since))
    }

    fn mark(&mut self, commit: CommitNo, now: Duration) {
        match self.marks.back_mut() {
            Some(last) if now.saturating_sub(last.since) < MARK_INTERVAL => last.commit = commit,
            _ => self.marks.push_back(Mark { commit, since: now }),
        }
        if self.marks.len() > MARKS_MAX {
            // Pairs keep the older time and the newer commit: the lag may be shown too long, never too short.
            let mut merged: VecDeque<Mark> = VecDeque::with_capacity(MARKS_MAX);
            for (n, mark) in std::mem::take(&mut self.marks).into_iter().enumerate() {
                match merged.back_mut() {
                    Some(last) if n % 2 == 1 => last.commit = mark.commit,
                    _ => merged.push_back(mark),
                }
            }
            self.marks = merged;
        }
    }
}

#[cfg(test)]
mod tests;
