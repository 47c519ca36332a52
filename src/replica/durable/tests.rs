//! The account by hand: no runtime, no sleeping; time is what `tick` and the clock are told.

use super::*;
use crate::clock::{Clock, Random};
use crate::types::{Hash, Seq, Timestamp};

const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Hand(Mutex<Duration>);

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        Timestamp::default()
    }
    fn monotonic(&self) -> Duration {
        *self.0.lock()
    }
}

struct Zeros;

impl Random for Zeros {
    fn fill(&self, out: &mut [u8]) {
        out.fill(0);
    }
}

type Answered = Vec<(u64, Result<(), WaitError>)>;

struct Rig {
    durable: Arc<Durable>,
    clock: Arc<Hand>,
    answers: Arc<Mutex<Answered>>,
}

impl Rig {
    fn new(protection: Protection) -> Rig {
        let clock = Arc::new(Hand::default());
        let env = Env { clock: clock.clone(), random: Arc::new(Zeros), ..Env::system() };
        let durable = Arc::new(Durable::new(protection, TIMEOUT, env, Position::default()));
        Rig { durable, clock, answers: Arc::default() }
    }

    fn callback(&self, commit: u64) -> Callback {
        let answers = self.answers.clone();
        Box::new(move |result| answers.lock().push((commit, result)))
    }

    fn wait(&self, commit: u64) {
        self.durable.wait(CommitNo(commit), self.callback(commit));
    }

    /// The commit becomes local and its segment is queued.
    fn local(&self, commit: u64) {
        self.durable.set_local(CommitNo(commit));
        self.durable.queued(&segment(commit));
    }

    fn sent(&self, commit: u64) {
        self.durable.sent(&segment(commit));
    }

    fn pass(&self, time: Duration) {
        let now = {
            let mut clock = self.clock.0.lock();
            *clock += time;
            *clock
        };
        self.durable.tick(now);
    }

    fn answered(&self) -> Answered {
        std::mem::take(&mut self.answers.lock())
    }
}

fn segment(n: u64) -> ClosedSegment {
    ClosedSegment {
        file: crate::disk::FileRef::system("x".as_ref()),
        len: 100,
        head: Head { seq: Seq(n), hash: Hash::default() },
        last_commit: CommitNo(n),
        stored: Seq(1),
        closed_at: None,
    }
}

#[test]
fn levels_are_spelled_as_they_are_parsed() {
    for level in [Protection::Strict, Protection::Available, Protection::Local] {
        assert_eq!(level.to_string().parse(), Ok(level));
    }
    assert!("sync".parse::<Protection>().unwrap_err().contains("available"));
}

#[test]
fn local_answers_when_the_disk_holds_it_and_never_times_out() {
    let rig = Rig::new(Protection::Local);
    rig.wait(1);
    rig.pass(TIMEOUT * 10);
    assert!(rig.answered().is_empty());
    rig.local(1);
    assert_eq!(rig.answered(), [(1, Ok(()))]);
    assert!(!rig.durable.waits_for_remote());
}

#[test]
fn strict_answers_from_the_embassy_or_times_out() {
    let rig = Rig::new(Protection::Strict);
    rig.local(1);
    rig.wait(1);
    rig.sent(1);
    assert_eq!(rig.answered(), [(1, Ok(()))]);
    rig.local(2);
    rig.wait(2);
    rig.pass(TIMEOUT / 2);
    rig.wait(2);
    rig.pass(TIMEOUT / 2);
    assert_eq!(rig.answered(), [(2, Err(WaitError::TimedOut))]);
    assert!(rig.durable.snapshot().in_sync, "strict never falls back");
    rig.sent(2);
    assert_eq!(rig.answered(), [(2, Ok(()))]);
}

#[test]
fn available_falls_back_once_and_returns_by_itself() {
    let rig = Rig::new(Protection::Available);
    rig.local(1);
    rig.wait(1);
    rig.wait(2);
    rig.pass(TIMEOUT);
    assert_eq!(rig.answered(), [(1, Ok(()))], "commit 2 is not even local");
    rig.local(2);
    rig.local(3);
    rig.wait(3);
    assert_eq!(rig.answered(), [(2, Ok(())), (3, Ok(()))], "answered at once while out of sync");
    let seen = rig.durable.snapshot();
    assert_eq!((seen.in_sync, seen.fallbacks, seen.unsent_segments, seen.unsent_bytes), (false, 1, 3, 300));
    assert_eq!(seen.lag, TIMEOUT);
    assert!(!rig.durable.waits_for_remote());

    rig.sent(1);
    rig.sent(2);
    rig.sent(3);
    let seen = rig.durable.snapshot();
    assert_eq!((seen.in_sync, seen.unsent_bytes, seen.lag), (true, 0, Duration::ZERO));
    rig.local(4);
    rig.wait(4);
    assert!(rig.answered().is_empty(), "in sync again: the embassy is waited for");
    rig.sent(4);
    assert_eq!(rig.answered(), [(4, Ok(()))]);
}

#[test]
fn a_long_backlog_keeps_it_out_of_sync_until_it_is_gone() {
    let rig = Rig::new(Protection::Available);
    for commit in 1..=10 {
        rig.local(commit);
        rig.wait(commit);
        rig.pass(TIMEOUT);
    }
    for commit in 1..10 {
        rig.sent(commit);
        assert!(!rig.durable.snapshot().in_sync, "commit {commit}");
    }
    rig.sent(10);
    assert!(rig.durable.snapshot().in_sync);
    assert_eq!(rig.durable.snapshot().fallbacks, 1);
}

#[test]
fn a_slow_local_disk_is_not_a_fall_back() {
    let rig = Rig::new(Protection::Available);
    rig.wait(1);
    rig.pass(TIMEOUT * 3);
    assert!(rig.durable.snapshot().in_sync);
}

#[test]
fn a_fence_fails_what_the_embassy_does_not_hold() {
    for level in [Protection::Strict, Protection::Available, Protection::Local] {
        let rig = Rig::new(level);
        rig.local(1);
        rig.sent(1);
        rig.local(2);
        rig.durable.fence("FENCED: first".to_owned());
        rig.durable.fence("FENCED: second".to_owned());
        for commit in 1..=3 {
            rig.wait(commit);
        }
        rig.pass(TIMEOUT * 2);
        let failed = Err(WaitError::Failed("FENCED: first".to_owned()));
        let second = if level == Protection::Local { Ok(()) } else { failed.clone() };
        assert_eq!(rig.answered(), [(1, Ok(())), (2, second), (3, failed)], "{level}");
    }
}

#[test]
fn a_fence_while_out_of_sync_acknowledges_nothing_more() {
    let rig = Rig::new(Protection::Available);
    rig.local(1);
    rig.wait(1);
    rig.pass(TIMEOUT);
    rig.answered();
    rig.wait(2);
    rig.durable.fence("taken".to_owned());
    rig.local(2);
    assert_eq!(rig.answered(), [(2, Err(WaitError::Failed("taken".to_owned())))]);
}

#[test]
fn local_acknowledges_nothing_that_was_written_behind_a_fence() {
    let rig = Rig::new(Protection::Local);
    rig.local(1);
    rig.durable.fence("taken".to_owned());
    rig.local(2);
    rig.wait(1);
    rig.wait(2);
    assert_eq!(rig.answered(), [(1, Ok(())), (2, Err(WaitError::Failed("taken".to_owned())))]);
}

#[test]
fn a_fence_calls_its_hooks_once_before_any_waiter_and_outside_the_lock() {
    let rig = Rig::new(Protection::Strict);
    let hook = |mark: u64| -> FenceHook {
        let (durable, answers) = (rig.durable.clone(), rig.answers.clone());
        Box::new(move |reason| {
            assert_eq!(durable.fenced().as_deref(), Some(reason));
            // Whatever else changes the account meanwhile.
            durable.tick(Duration::ZERO);
            answers.lock().push((mark, Ok(())));
        })
    };
    rig.durable.on_fence(hook(100));
    rig.wait(1);
    rig.durable.fence("first".to_owned());
    rig.durable.fence("second".to_owned());
    assert_eq!(rig.answered(), [(100, Ok(())), (1, Err(WaitError::Failed("first".to_owned())))]);
    rig.durable.on_fence(hook(101));
    assert_eq!(rig.answered(), [(101, Ok(()))]);
}

#[test]
fn a_latched_log_still_sends_what_it_holds() {
    let rig = Rig::new(Protection::Strict);
    rig.local(1);
    rig.wait(1);
    rig.wait(2);
    rig.durable.latch("disk".to_owned());
    assert_eq!(rig.answered(), [(2, Err(WaitError::Failed("disk".to_owned())))]);
    rig.sent(1);
    assert_eq!(rig.answered(), [(1, Ok(()))]);
}

#[test]
fn the_sync_command_waits_for_the_embassy_at_every_level() {
    let rig = Rig::new(Protection::Local);
    rig.local(1);
    rig.durable.wait_remote(CommitNo(1), TIMEOUT, rig.callback(1));
    rig.durable.wait_remote(CommitNo(1), TIMEOUT * 4, rig.callback(100));
    rig.pass(TIMEOUT);
    assert_eq!(rig.answered(), [(1, Err(WaitError::TimedOut))]);
    rig.sent(1);
    assert_eq!(rig.answered(), [(100, Ok(()))]);
    assert!(!rig.durable.has_waiters());
}

#[test]
fn the_lag_of_a_long_outage_is_kept_in_bounded_room() {
    let rig = Rig::new(Protection::Local);
    for commit in 1..=5000 {
        rig.durable.set_local(CommitNo(commit));
        rig.pass(Duration::from_secs(1));
    }
    assert!(rig.durable.state.lock().marks.len() <= MARKS_MAX);
    assert_eq!(rig.durable.snapshot().lag, Duration::from_secs(5000));
    rig.sent(2500);
    let lag = rig.durable.snapshot().lag.as_secs();
    assert!((2500..=2516).contains(&lag), "{lag}");
}

#[test]
fn a_callback_may_use_the_account() {
    let rig = Rig::new(Protection::Local);
    let (durable, inner) = (rig.durable.clone(), rig.callback(2));
    let outer = Box::new(move |_| durable.wait(CommitNo(1), inner));
    rig.durable.wait(CommitNo(1), outer);
    rig.local(1);
    assert_eq!(rig.answered(), [(2, Ok(()))]);
}
