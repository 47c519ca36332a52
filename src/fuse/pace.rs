//! Keeping the dispatch thread awake through a burst of small requests.
//! To wake a processor that has gone to sleep takes longer than to answer a request from memory, above all in a
//! virtual machine, and a client that creates or looks up many files waits for that each time. So during such a burst
//! the FUSE descriptor does not block and the thread asks again at once, and the kernel is asked (`/dev/cpu_dma_latency`,
//! where we may) not to let the client's processor sleep while it waits; shortly after the burst all is as before.
//! Invariant: nobody spins for longer than [`QUIET`] and a tick after the last small request, never while large ones
//! stream or others want the processor (it has better to do then, and does not sleep anyway), and never on a machine
//! with a single processor.

use crate::clock::Clock;
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Requests and data below this many bytes are small.
pub(super) const SMALL: usize = 128 << 10;
/// Small requests, each soon after the other, that make a burst.
const BURST: u64 = 16;
/// A pause this long ends a burst.
const QUIET: Duration = Duration::from_micros(500);
/// Requests between two looks at whether others want the processor.
const LOOK: u64 = 64;
/// This often taken off the processor between two looks, the spinning thread is in somebody's way. A client that waits
/// in `fsync`, or the committer, takes its place now and then and gives it back at once: to stand back for those lets the
/// scheduler move all three from one processor to another all the time, which costs more.
const PREEMPTED: i64 = 20;
/// And stays away for so long.
const STAND_BACK: Duration = Duration::from_millis(250);
/// The wake-up latency that stands for no wish at all, in microseconds.
const ANY_LATENCY: i32 = 2_000_000_000;
/// How often the end of a burst is looked for.
const TICK: Duration = Duration::from_millis(1);

/// The pace of one mount's requests.
pub(super) struct Pace {
    clock: Arc<dyn Clock>,
    /// Shares its open file, and so the flag, with the descriptor that is read.
    fd: OwnedFd,
    /// The kernel's knob for how long a processor may take to wake up; none where we may not turn it.
    latency: Option<File>,
    /// False where spinning would only keep the client from running.
    useful: bool,
    spinning: AtomicBool,
    /// Time of the last small request, nanoseconds of the monotonic clock.
    last: AtomicU64,
    /// Small requests in the burst so far.
    count: AtomicU64,
    /// No spinning before this time, nanoseconds of the monotonic clock.
    not_before: AtomicU64,
    /// How often this thread had been taken off the processor at the last look.
    preempted: AtomicI64,
    begun: Mutex<bool>,
    wake: Condvar,
}

impl Pace {
    /// The pace of the requests read from `fd`; a thread of its own ends the bursts, and ends with the mount.
    pub fn start(fd: BorrowedFd<'_>, clock: Arc<dyn Clock>) -> io::Result<Arc<Pace>> {
        let pace = Arc::new(Pace {
            clock,
            fd: fd.try_clone_to_owned()?,
            latency: File::options().write(true).open("/dev/cpu_dma_latency").ok(),
            useful: std::thread::available_parallelism().is_ok_and(|n| n.get() > 1),
            spinning: AtomicBool::new(false),
            last: AtomicU64::new(0),
            count: AtomicU64::new(0),
            not_before: AtomicU64::new(0),
            preempted: AtomicI64::new(0),
            begun: Mutex::new(false),
            wake: Condvar::new(),
        });
        pace.set_spinning(false); // who served the descriptor before may have left it so
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
        if now.saturating_sub(last) >= QUIET.as_nanos() as u64 {
            self.count.store(0, Ordering::Relaxed);
        }
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if self.spinning.load(Ordering::Relaxed) {
            if count.is_multiple_of(LOOK) {
                self.look(now);
            }
        } else if count >= BURST && now >= self.not_before.load(Ordering::Relaxed) {
            self.preempted.store(preemptions(), Ordering::Relaxed);
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

    /// Stands back when others want the processor that this thread spins on.
    fn look(&self, now: u64) {
        let times = preemptions();
        if times - self.preempted.swap(times, Ordering::Relaxed) >= PREEMPTED {
            self.not_before.store(now + STAND_BACK.as_nanos() as u64, Ordering::Relaxed);
            self.set_spinning(false);
        }
    }

    fn set_spinning(&self, on: bool) {
        let flags = libc::O_RDWR | if on { libc::O_NONBLOCK } else { 0 };
        // SAFETY: sets a flag of a descriptor that we own; no pointers.
        let set = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETFL, flags) };
        // Only speed is at stake: a kernel that refuses leaves a descriptor that blocks.
        let was = self.spinning.swap(on && set == 0, Ordering::Relaxed);
        if was != on
            && let Some(mut latency) = self.latency.as_ref()
        {
            let microseconds: i32 = if on { 0 } else { ANY_LATENCY };
            let _ = latency.write_all(&microseconds.to_ne_bytes());
        }
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

/// How often the calling thread has been taken off the processor against its will.
fn preemptions() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid place for the answer, and all zeros is a valid one if the call fails.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nivcsw
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
            latency: None,
            useful: true,
            spinning: AtomicBool::new(false),
            last: AtomicU64::new(0),
            count: AtomicU64::new(0),
            not_before: AtomicU64::new(0),
            preempted: AtomicI64::new(0),
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
        requests(BURST + 2, 50);
        pace.preempted.store(preemptions() - PREEMPTED / 2, Ordering::Relaxed);
        requests(LOOK, 50);
        assert!(!blocks(&pace), "that was nobody who wants it for long");
        pace.preempted.store(preemptions() - PREEMPTED, Ordering::Relaxed);
        requests(LOOK, 50);
        assert!(blocks(&pace), "others want the processor");
        requests(LOOK, 50);
        assert!(blocks(&pace), "and for a while it stands back");
    }
}
