//! Signals that ask the daemon to stop: SIGTERM, SIGINT, SIGHUP; and, for a supervisor, that a daemon has ended.
//! Invariant: they are blocked in every thread before the first thread starts, and one thread takes them in turn;
//! no code runs in a signal handler.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// The stop signals that would end this process: one that it was told to ignore (nohup, a shell's `&`) stays ignored.
fn ending_signals() -> libc::sigset_t {
    let mut set = stop_signals();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut now = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: `now` is a valid place for the answer, which is read only if it was given; nothing is changed but
        // `set`, which is a valid set.
        unsafe {
            if libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) == 0
                && now.assume_init().sa_sigaction == libc::SIG_IGN
            {
                libc::sigdelset(&mut set, signal);
            }
        }
    }
    set
}

/// A signal is ending the process; the command's own thread does nothing any more.
static ENDING: AtomicBool = AtomicBool::new(false);
static STILL: AtomicBool = AtomicBool::new(false);
/// The command's own thread is waited for so many milliseconds.
const STILL_WAIT: u32 = 500;

/// Returns only while no signal is ending the process (see [`before_end`]). For the command's own thread: now and then,
/// and before it says how it ended, for that would be that something was taken away from it.
pub fn wait_if_ending() {
    while ENDING.load(Ordering::SeqCst) {
        STILL.store(true, Ordering::SeqCst);
        std::thread::park();
    }
}

/// From now on a signal that ends this process runs `before` first, and what that returns last, when as little as can be
/// is at work besides. For commands, and called before their first other
/// thread starts; where stop signals are blocked already somebody else takes them, and nothing is done.
pub fn before_end<Last: FnOnce()>(
    before: impl FnOnce(&'static str) -> Last + Send + 'static,
) -> io::Result<()> {
    let set = ending_signals();
    let mut blocked = MaybeUninit::uninit();
    // SAFETY: no set is given, `blocked` is a valid place for the one in force, and is read after it was given.
    let is_taken = unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), blocked.as_mut_ptr()) == 0
            && libc::sigismember(&blocked.assume_init(), libc::SIGTERM) == 1
    };
    if is_taken {
        return Ok(());
    }
    block_set(&set)?;
    let wait = move || {
        let mut signal = 0;
        // SAFETY: `set` is a valid set and `signal` a valid place for the answer.
        if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
            return;
        }
        ENDING.store(true, Ordering::SeqCst);
        let last = before(match signal {
            libc::SIGINT => "SIGINT",
            libc::SIGHUP => "SIGHUP",
            _ => "SIGTERM",
        });
        for _ in 0..STILL_WAIT {
            if STILL.load(Ordering::SeqCst) {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        last();
        // As if nobody had waited for it: whoever started us sees by what we ended.
        // SAFETY: a signal with its default effect, sent to this very thread, which lets it through.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
            libc::raise(signal);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
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
