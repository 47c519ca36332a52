//! One source of chance for a whole run, shared by everything in it, and the account of what happened.
//! Invariant: the same seed and the same program give the same draws and the same events, in order, to the byte.

use super::rng::Rng;
use embassyfs::clock::{Clock, Random};
use embassyfs::types::Timestamp;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// See the module.
#[derive(Clone)]
pub struct Chance(Arc<Mutex<Inner>>);

struct Inner {
    rng: Rng,
    trace: DefaultHasher,
    events: u64,
    faults: BTreeMap<&'static str, u64>,
    /// Events are printed, for the comparison of two runs.
    told: bool,
}

impl Chance {
    pub fn new(seed: u64) -> Chance {
        let told = std::env::var_os("EMBASSYFS_SIM_TRACE").is_some();
        let (rng, trace) = (Rng::new(seed), DefaultHasher::new());
        Chance(Arc::new(Mutex::new(Inner { rng, trace, events: 0, faults: BTreeMap::new(), told })))
    }

    pub fn next(&self) -> u64 {
        self.0.lock().unwrap().rng.next()
    }

    /// A number below `n`.
    pub fn below(&self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True so many times in a thousand.
    pub fn per_mille(&self, n: u64) -> bool {
        self.below(1000) < n
    }

    pub fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    /// Takes note of something that happened.
    pub fn event(&self, what: &str, bytes: &[u8]) {
        let mut inner = self.0.lock().unwrap();
        inner.events += 1;
        what.hash(&mut inner.trace);
        bytes.hash(&mut inner.trace);
        if inner.told {
            let mut hasher = DefaultHasher::new();
            bytes.hash(&mut hasher);
            println!("{:8} {what} {}b {:016x}", inner.events, bytes.len(), hasher.finish());
        }
    }

    /// Takes note of a fault that was put in.
    pub fn fault(&self, kind: &'static str) {
        *self.0.lock().unwrap().faults.entry(kind).or_default() += 1;
    }

    /// How many events there were, and what they come to.
    pub fn trace(&self) -> (u64, u64) {
        let inner = self.0.lock().unwrap();
        (inner.events, inner.trace.finish())
    }

    /// The faults that were put in, by kind.
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap().faults.clone()
    }
}

impl Random for Chance {
    fn fill(&self, out: &mut [u8]) {
        let mut inner = self.0.lock().unwrap();
        for chunk in out.chunks_mut(8) {
            let bytes = inner.rng.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// The runtime's paused time, from 0 on: rounding must not depend on when the process began. The wall clock is set by
/// the run.
pub struct SimClock {
    handle: Handle,
    start: Instant,
    pub wall: Mutex<Timestamp>,
}

impl SimClock {
    pub fn new(handle: &Handle, wall: Timestamp) -> SimClock {
        let _context = handle.enter();
        SimClock { handle: handle.clone(), start: Instant::now(), wall: Mutex::new(wall) }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        *self.wall.lock().unwrap()
    }

    fn monotonic(&self) -> Duration {
        let _context = self.handle.enter();
        Instant::now().duration_since(self.start)
    }
}
