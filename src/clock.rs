//! Time and randomness: the only door to the wall clock, the monotonic clock and the kernel's random source.
//! Invariant: a layer that takes an [`Env`] is a pure function of it, so that a simulation can replay a run.

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

/// Time and randomness together, as they are handed down through the layers.
#[derive(Clone)]
pub struct Env {
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Where randomness comes from.
    pub random: Arc<dyn Random>,
}

impl Env {
    /// The machine's own clocks and the kernel's random source.
    pub fn system() -> Env {
        Env { clock: Arc::new(SystemClock::new()), random: Arc::new(KernelRandom) }
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
