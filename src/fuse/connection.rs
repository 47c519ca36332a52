//! The connection to the kernel: the descriptor, what was said on it first, and the way to stop serving it without
//! ending it, so that another process, or this one again, goes on with it.
//! Invariant: from the moment a stop closes the gate, nothing that was asked takes effect any more, and what had no
//! answer then gets none from here: the kernel asks whoever goes on.

use super::gate::Gate;
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The most bytes of a greeting; the kernel wants room for this many before it gives any request.
const GREETING_MAX: usize = 16 << 10;
/// Codes of linux/fuse.h.
const FUSE_DESTROY: u32 = 38;
const FUSE_NOTIFY_RESEND: i32 = 7;
/// Bytes of a request's and of an answer's header.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Where the kernel's greeting has its flags: the low half, the high half, and in the low half the bit that says that
/// there is a high half.
const FLAGS_AT: (usize, usize) = (IN_HEADER + 12, IN_HEADER + 16);
const INIT_EXT: u32 = 1 << 30;
/// Of the high half: the kernel can be told to ask again.
const HAS_RESEND: u32 = 1 << 7;
/// How long the dispatch thread may take to notice that it is to end, and between two calls to it.
const STOP_WAIT: Duration = Duration::from_secs(5);
const NUDGE_EVERY: Duration = Duration::from_millis(1);
/// Wakes the dispatch thread; it does nothing else.
const NUDGE: libc::c_int = libc::SIGUSR1;
/// What `fuser` calls its dispatch thread.
const DISPATCH_THREAD: &str = "fuser-0";

/// A connection to the kernel.
pub struct Connection {
    /// `/dev/fuse`. The mount lives as long as somebody holds it.
    pub fd: OwnedFd,
    /// How it began; none while it has not.
    pub greeting: Option<Greeting>,
}

/// FUSE_INIT and its answer, as they went over the descriptor. Who takes a connection over must greet in the same way,
/// for the kernel is not asked again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the kernel offered.
    pub request: Vec<u8>,
    /// What it was answered.
    pub reply: Vec<u8>,
}

impl Connection {
    /// The connection of a mount that was just made.
    pub fn new(fd: OwnedFd) -> Connection {
        Connection { fd, greeting: None }
    }

    /// Says why this connection cannot be handed over, if that is so.
    pub fn check_can_be_handed_over(greeting: &Greeting) -> io::Result<()> {
        let word = |at: usize| {
            let bytes = greeting.request.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u32::from_ne_bytes)
        };
        match (word(FLAGS_AT.0) & INIT_EXT, word(FLAGS_AT.1) & HAS_RESEND) {
            (1.., 1..) => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel cannot ask again what was not answered; Linux 6.9 can",
            )),
        }
    }

    /// The kernel's greeting.
    pub(super) fn read_greeting(&self) -> io::Result<Vec<u8>> {
        let mut device = File::from(self.fd.try_clone()?);
        let mut buf = vec![0; GREETING_MAX];
        loop {
            match device.read(&mut buf) {
                Ok(n) => {
                    buf.truncate(n);
                    return Ok(buf);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Has the kernel ask again what it was not answered.
    pub(super) fn ask_again(&self) -> io::Result<()> {
        let mut notice = [0u8; OUT_HEADER];
        notice[..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
        notice[4..8].copy_from_slice(&FUSE_NOTIFY_RESEND.to_ne_bytes());
        File::from(self.fd.try_clone()?).write_all(&notice)
    }
}

/// A pair of sockets that keep messages apart, as the kernel's descriptor does.
pub(super) fn message_pair(flags: libc::c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | flags;
    // SAFETY: `fds` is room for the two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us these two; nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Sends one message whole.
pub(super) fn send_message(to: &OwnedFd, message: &[u8]) -> io::Result<()> {
    File::from(to.try_clone()?).write_all(message)
}

/// Receives one message.
pub(super) fn receive_message(from: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; GREETING_MAX];
    let n = File::from(from.try_clone()?).read(&mut buf)?;
    buf.truncate(n);
    Ok(buf)
}

/// Lets the descriptor number `at` stand for the open file `file`.
pub(super) fn put_in_place(file: BorrowedFd<'_>, at: RawFd) -> io::Result<()> {
    // SAFETY: both are open descriptors of this process, and who owns `at` goes on owning that number.
    match unsafe { libc::dup3(file.as_raw_fd(), at, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Stops serving.
#[derive(Default)]
pub struct Switch {
    running: Mutex<Option<Running>>,
    ended: Condvar,
    stopped: AtomicBool,
    /// Where answers go that come too late. Nobody reads them.
    sink: Mutex<Option<OwnedFd>>,
}

struct Running {
    gate: Arc<Gate>,
    /// The number by which the dispatch thread knows the connection.
    fd: RawFd,
}

impl Switch {
    /// Serving begins; the number `fd` stays open until [`Switch::disarm`].
    pub(super) fn arm(&self, gate: Arc<Gate>, fd: RawFd) {
        *self.running.lock() = Some(Running { gate, fd });
    }

    /// Serving has ended; true when a stop was the reason.
    pub(super) fn disarm(&self) -> bool {
        *self.running.lock() = None;
        self.ended.notify_all();
        self.stopped.swap(false, Ordering::AcqRel)
    }

    /// Stops serving, and returns when it has ended: every request that took effect has been answered, and no other
    /// will be.
    pub fn stop(&self) -> io::Result<()> {
        let mut running = self.running.lock();
        let Some(Running { gate, fd }) = &*running else {
            return Err(io::Error::other("the mount is not served just now"));
        };
        let (far, sink) = message_pair(libc::SOCK_NONBLOCK)?;
        send_message(&sink, &destroy_request())?;
        gate.close();
        self.stopped.store(true, Ordering::Release);
        // The dispatch thread's next read finds a request to end; until then it may sit in a read of the connection.
        put_in_place(far.as_fd(), *fd)?;
        *self.sink.lock() = Some(sink);
        ignore_nudges();
        for _ in 0..STOP_WAIT.as_millis() / NUDGE_EVERY.as_millis() {
            nudge_dispatch_thread()?;
            self.ended.wait_for(&mut running, NUDGE_EVERY);
            if running.is_none() {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the dispatch thread does not end"))
    }
}

fn destroy_request() -> [u8; IN_HEADER] {
    let mut request = [0u8; IN_HEADER];
    request[..4].copy_from_slice(&(IN_HEADER as u32).to_ne_bytes());
    request[4..8].copy_from_slice(&FUSE_DESTROY.to_ne_bytes());
    request
}

/// Gives [`NUDGE`] a handler, without which it would end the process; one that does not restart system calls.
fn ignore_nudges() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: `action` is plain data, for which all zeroes is valid, and its handler does nothing at all.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(NUDGE, &action, std::ptr::null_mut());
    }
}

/// Gets the dispatch thread out of a read in which it waits.
fn nudge_dispatch_thread() -> io::Result<()> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?;
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if let (DISPATCH_THREAD, Some(Ok(id))) = (name.trim_end(), task.file_name().to_str().map(str::parse))
        {
            let id: libc::pid_t = id;
            // SAFETY: sends a signal that has a handler to a thread of this process; takes integers only.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, NUDGE) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_cannot_ask_again_is_told_from_one_that_can() {
        let mut request = vec![0u8; 104];
        let greeting = |request: &[u8]| Greeting { request: request.into(), reply: Vec::new() };
        assert!(Connection::check_can_be_handed_over(&greeting(&request)).is_err());
        request[FLAGS_AT.0..FLAGS_AT.0 + 4].copy_from_slice(&INIT_EXT.to_ne_bytes());
        request[FLAGS_AT.1..FLAGS_AT.1 + 4].copy_from_slice(&HAS_RESEND.to_ne_bytes());
        assert!(Connection::check_can_be_handed_over(&greeting(&request)).is_ok());
        assert!(Connection::check_can_be_handed_over(&greeting(&request[..50])).is_err());
    }
}
