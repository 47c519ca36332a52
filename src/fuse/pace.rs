//! Keeping the dispatch thread awake through a burst of small requests.
//! To wake a processor that has gone to sleep takes longer than to answer a request from memory, above all in a
//! virtual machine, and a client that creates or looks up many files waits for that each time. So during such a burst
//! the FUSE descriptor does not block and the thread asks again at once; shortly after the burst it blocks again.
//! Invariant: nobody spins for longer than [`QUIET`] and a tick after the last small request, never while large ones
//! stream (the processor has better to do), and never on a machine with a single processor.

use crate::clock::Clock;
use parking_lot::{Condvar, Mutex};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Requests and data below this many bytes are small.
pub(super) const SMALL: usize = 128 << 10;
/// Small requests, each soon after the other, that make a burst.
const BURST: u64 = 16;
/// A pause this long ends a burst.
const QUIET: Duration = Duration::from_micros(500);
/// How often the end of a burst is looked for.
const TICK: Duration = Duration::from_millis(1);

/// The pace of one mount's requests.
pub(super) struct Pace {
    clock: Arc<dyn Clock>,
    /// Shares its open file, and so the flag, with the descriptor that is read.
    fd: OwnedFd,
    /// False where spinning would only keep the client from running.
    useful: bool,
    spinning: AtomicBool,
    /// Time of the last small request, nanoseconds of the monotonic clock.
    last: AtomicU64,
    /// Small requests in the burst so far.
    count: AtomicU64,
    begun: Mutex<bool>,
    wake: Condvar,
}

impl Pace {
    /// The pace of the requests read from `fd`; a thread of its own ends the bursts, and ends with the mount.
    pub fn start(fd: BorrowedFd<'_>, clock: Arc<dyn Clock>) -> io::Result<Arc<Pace>> {
        let pace = Arc::new(Pace {
            clock,
            fd: fd.try_clone_to_owned()?,
            useful: std::thread::available_parallelism().is_ok_and(|n| n.get() > 1),
            spinning: AtomicBool::new(false),
            last: AtomicU64::new(0),
            count: AtomicU64::new(0),
            begun: Mutex::new(false),
            wake: Condvar::new(),
        });
        if pace.useful {
            let watched = Arc::downgrade(&pace);
            std::thread::Builder::new().name("pace".into()).spawn(move || watch(&watched))?;
        }
        Ok(pace)
    }

    /// A small request came in.
    pub fn small(&self) {
        if !self.useful {
            return;
        }
        let now = self.clock.monotonic().as_nanos() as u64;
        let last = self.last.swap(now, Ordering::Relaxed);
        if self.spinning.load(Ordering::Relaxed) {
            return;
        }
        let near = now.saturating_sub(last) < QUIET.as_nanos() as u64;
        let count = if near { self.count.fetch_add(1, Ordering::Relaxed) } else { 0 };
        if !near {
            self.count.store(0, Ordering::Relaxed);
        }
        if count >= BURST {
            self.set_spinning(true);
            *self.begun.lock() = true;
            self.wake.notify_one();
        }
    }

    /// A request with much data came in.
    pub fn large(&self) {
        self.count.store(0, Ordering::Relaxed);
        if self.spinning.load(Ordering::Relaxed) {
            self.set_spinning(false);
        }
    }

    fn set_spinning(&self, on: bool) {
        let flags = libc::O_RDWR | if on { libc::O_NONBLOCK } else { 0 };
        // SAFETY: sets a flag of a descriptor that we own; no pointers.
        let set = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETFL, flags) };
        // Only speed is at stake: a kernel that refuses leaves a descriptor that blocks.
        self.spinning.store(on && set == 0, Ordering::Relaxed);
    }

    /// Ends the burst if it has been quiet for long enough.
    fn rest(&self) {
        let now = self.clock.monotonic().as_nanos() as u64;
        if now.saturating_sub(self.last.load(Ordering::Relaxed)) >= QUIET.as_nanos() as u64 {
            self.count.store(0, Ordering::Relaxed);
            self.set_spinning(false);
        }
    }
}

/// Looks after a burst until it is over, then sleeps until the next.
fn watch(pace: &Weak<Pace>) {
    while let Some(pace) = pace.upgrade() {
        let mut begun = pace.begun.lock();
        if pace.spinning.load(Ordering::Relaxed) {
            pace.wake.wait_for(&mut begun, TICK);
            pace.rest();
        } else if !std::mem::take(&mut *begun) {
            // The bound lets the thread notice that the mount is gone.
            pace.wake.wait_for(&mut begun, 1000 * TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Timestamp;
    use std::os::fd::AsFd;

    struct Ticks(AtomicU64);

    impl Clock for Ticks {
        fn now(&self) -> Timestamp {
            Timestamp::default()
        }
        fn monotonic(&self) -> Duration {
            Duration::from_micros(self.0.load(Ordering::Relaxed))
        }
    }

    fn blocks(pace: &Pace) -> bool {
        // SAFETY: asks for flags of a descriptor that is open; no pointers.
        let flags = unsafe { libc::fcntl(pace.fd.as_raw_fd(), libc::F_GETFL) };
        flags & libc::O_NONBLOCK == 0
    }

    #[test]
    fn a_burst_spins_and_quiet_or_much_data_ends_it() {
        let clock = Arc::new(Ticks(AtomicU64::new(1_000_000)));
        let file = std::fs::File::open("/dev/null").unwrap();
        let pace = Pace {
            clock: clock.clone(),
            fd: file.as_fd().try_clone_to_owned().unwrap(),
            useful: true,
            spinning: AtomicBool::new(false),
            last: AtomicU64::new(0),
            count: AtomicU64::new(0),
            begun: Mutex::new(false),
            wake: Condvar::new(),
        };
        let requests = |n: u64, apart: u64| {
            for _ in 0..n {
                clock.0.fetch_add(apart, Ordering::Relaxed);
                pace.small();
            }
        };
        requests(100, 600);
        assert!(blocks(&pace), "requests far apart are no burst");
        requests(BURST + 2, 50);
        assert!(!blocks(&pace));
        pace.rest();
        assert!(!blocks(&pace), "the burst is not over");
        clock.0.fetch_add(600, Ordering::Relaxed);
        pace.rest();
        assert!(blocks(&pace));
        requests(BURST + 2, 50);
        assert!(!blocks(&pace));
        pace.large();
        assert!(blocks(&pace));
    }
}
