//! Signals that ask the daemon to stop: SIGTERM, SIGINT, SIGHUP; and, for a supervisor, that a daemon has ended.
//! Invariant: they are blocked in every thread before the first thread starts, and one thread takes them in turn;
//! no code runs in a signal handler.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// A set of the signals that ask us to stop.
fn stop_signals() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset makes `set` a valid (empty) set; the others are given that set and valid signal numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// The same, and that a child has ended.
fn supervisor_signals() -> libc::sigset_t {
    let mut set = stop_signals();
    // SAFETY: `set` is a valid set, and the number that of a signal.
    unsafe { libc::sigaddset(&mut set, libc::SIGCHLD) };
    set
}

/// Blocks what [`wait_for`] takes.
pub fn block_for_supervisor() -> io::Result<()> {
    block_set(&supervisor_signals())
}

/// The next signal for a supervisor, if one comes within `limit`.
pub fn wait_for(limit: Duration) -> Option<libc::c_int> {
    let set = supervisor_signals();
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: `set` and `limit` are valid; more about the signal is not wanted.
    let signal = unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &limit) };
    (signal > 0).then_some(signal)
}

/// Blocks the stop signals in this thread and in all threads it starts from now on.
pub fn block() -> io::Result<()> {
    block_set(&stop_signals())
}

fn block_set(set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `set` is a valid set; the old mask is not wanted.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Starts the thread that waits for the stop signals and calls `on_signal` with the number of signals so far.
/// [`block`] must have been called before.
pub fn watch(on_signal: impl Fn(u32) + Send + 'static) -> io::Result<()> {
    let wait = move || {
        let set = stop_signals();
        let mut count = 0;
        loop {
            let mut signal = 0;
            // SAFETY: `set` is a valid set and `signal` a valid place for the answer.
            if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                count += 1;
                ::log::info!("signal {signal} asks to stop");
                on_signal(count);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
}
