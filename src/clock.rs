//! Time, randomness and threads: the only door to the wall clock, the monotonic clock, the kernel's random source, and
//! to threads of one's own.
//! Invariant: a layer that takes an [`Env`] is a pure function of it, so that a simulation can replay a run.

use crate::disk::{Disk, SystemDisk};
use crate::types::Timestamp;
use std::sync::Arc;
use std::time::Duration;

/// A source of time.
pub trait Clock: Send + Sync {
    /// Wall-clock time, UTC.
    fn now(&self) -> Timestamp;
    /// Time since an arbitrary fixed instant; never goes back.
    fn monotonic(&self) -> Duration;
}

/// A source of unpredictable bytes.
pub trait Random: Send + Sync {
    /// Fills `out`; panics when the source fails, because nothing sealed without it would be safe.
    fn fill(&self, out: &mut [u8]);
}

/// What a thread does.
pub type Work = Box<dyn FnOnce() + Send>;

/// A source of threads.
pub trait Threads: Send + Sync {
    /// Starts a thread.
    fn spawn(&self, name: &str, work: Work) -> std::io::Result<Box<dyn Thread>>;

    /// Whether threads have turns given to them: then one that has nothing to do gives its turn back ([`Threads::turn`])
    /// instead of sleeping.
    fn take_turns(&self) -> bool {
        false
    }

    /// A place where the calling thread holds no lock and others may go first.
    fn turn(&self) {}
}

/// A thread that was started.
pub trait Thread: Send {
    /// Waits for its end; false if that was a panic.
    fn join(self: Box<Self>) -> bool;
}

/// All that a run depends on beside its input and the store, as it is handed down through the layers.
#[derive(Clone)]
pub struct Env {
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Where randomness comes from.
    pub random: Arc<dyn Random>,
    /// Where threads come from.
    pub threads: Arc<dyn Threads>,
    /// Where files of the state directory are.
    pub disk: Arc<dyn Disk>,
}

impl Env {
    /// The machine's own clocks, threads and disk, and the kernel's random source.
    pub fn system() -> Env {
        let (clock, random) = (Arc::new(SystemClock::new()), Arc::new(KernelRandom));
        Env { clock, random, threads: Arc::new(SystemThreads), disk: Arc::new(SystemDisk) }
    }

    /// `N` fresh random bytes.
    pub fn random_bytes<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        self.random.fill(&mut out);
        out
    }
}

struct SystemClock {
    start: std::time::Instant,
}

impl SystemClock {
    #[allow(clippy::disallowed_methods)] // the one place that may
    fn new() -> SystemClock {
        SystemClock { start: std::time::Instant::now() }
    }
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now(&self) -> Timestamp {
        match std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
            Ok(d) => Timestamp { secs: d.as_secs() as i64, nanos: d.subsec_nanos() },
            Err(_) => Timestamp::default(), // a clock before 1970 is not set at all
        }
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

struct KernelRandom;

impl Random for KernelRandom {
    fn fill(&self, out: &mut [u8]) {
        getrandom::fill(out)
            .expect("the kernel's random source failed; sealing without it would not be safe");
    }
}

struct SystemThreads;

impl Threads for SystemThreads {
    fn spawn(&self, name: &str, work: Work) -> std::io::Result<Box<dyn Thread>> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work)?;
        Ok(Box::new(thread))
    }
}

impl Thread for std::thread::JoinHandle<()> {
    fn join(self: Box<Self>) -> bool {
        std::thread::JoinHandle::join(*self).is_ok()
    }
}
