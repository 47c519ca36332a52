//! Becoming a daemon: the parent waits until the mount is usable or has failed, the child goes on alone.
//! Invariant: the fork happens while the process has one thread, and the child keeps nothing of its origin: no
//! terminal, no descriptor, no working directory (any of them could lie on the mount it is about to serve).

use super::exit::{ExitCode, Failure, Outcome};
use crate::clock::Env;
use crate::fuse::mount::{Pidfd, readable_within};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The longest line a child sends.
const LINE_BYTES_MAX: usize = 8 << 10;
/// From linux/prctl.h; the libc crate lacks it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
/// How long a child that has hung up may take to end.
const ENDING_WAIT: Duration = Duration::from_secs(5);

/// The child's end of the pipe on which the parent waits; nothing in the foreground. Of all clones the first word
/// counts, and closes it.
#[derive(Clone)]
pub struct ReadyPipe(Arc<Mutex<Option<File>>>);

impl ReadyPipe {
    /// For a process that nobody waits for.
    pub fn none() -> ReadyPipe {
        ReadyPipe(Arc::default())
    }

    /// Tells the parent that the mount is usable. An error means that the parent is gone.
    pub fn ready(&self) -> io::Result<()> {
        self.send("ready\n")
    }

    /// Tells the parent why there will be no mount.
    pub fn failed(&self, failure: &Failure) {
        // If the parent is gone nobody wants to know; the log has it as well.
        let _ = self.send(&format!("{} {failure}\n", failure.code as u8));
    }

    /// Leaves it to the process that was just forked to say a word.
    pub fn leave(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn send(&self, line: &str) -> io::Result<()> {
        let pipe = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match pipe {
            Some(mut pipe) => pipe.write_all(line.as_bytes()),
            None => Ok(()),
        }
    }
}

/// Which side of the fork this is.
pub enum Side {
    /// The one that was called by the user.
    Parent(Waiting),
    /// The one that will serve.
    Child(ReadyPipe),
}

/// The parent's hold on the child.
pub struct Waiting {
    pipe: File,
    child: libc::pid_t,
}

/// Splits the process in two.
pub fn fork() -> io::Result<Side> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with threads cannot be forked"));
    }
    let (reader, writer) = io::pipe()?;
    // SAFETY: this process has one thread (checked above), so the child is a complete copy with no lock left held.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            let pipe = detach(OwnedFd::from(writer))?;
            Ok(Side::Child(ReadyPipe(Arc::new(Mutex::new(Some(pipe))))))
        }
        child => Ok(Side::Parent(Waiting { pipe: File::from(OwnedFd::from(reader)), child })),
    }
}

/// Lets go of session, terminal, directory and all descriptors but `pipe`.
fn detach(pipe: OwnedFd) -> io::Result<File> {
    // SAFETY: takes nothing; fails only for a group leader, which a fresh child is not.
    unsafe { libc::setsid() };
    leave_surroundings()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for fd in 0..=2 {
        // SAFETY: both are descriptors of this process; the standard streams belong to no object that minds.
        if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // The pipe moves to 3, and all above is closed in one go. From here on the numbers belong to no object.
    let (pipe, _null) = (pipe.into_raw_fd(), null.into_raw_fd());
    // SAFETY: `pipe` is open and ours; whatever has number 3 is given up, which is the purpose.
    if pipe != 3 && unsafe { libc::dup3(pipe, 3, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no object owns a descriptor above 3: nothing else was open in this process but what it inherited.
    unsafe { libc::syscall(libc::SYS_close_range, 4u32, u32::MAX, 0u32) };
    // SAFETY: 3 is the pipe and no object owns it yet.
    Ok(unsafe { File::from_raw_fd(3) })
}

/// What a serving process does in the foreground as well: no directory of the mount as its own, and files that it
/// makes are for its owner only (what the mount's users may do is not decided by this mask).
pub fn leave_surroundings() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    // SAFETY: sets the mask of this process; cannot fail.
    unsafe { libc::umask(0o077) };
    Ok(())
}

/// Makes the kernel treat this process as what it is: one on which file I/O depends and which holds keys. Best
/// effort; parts need privileges.
pub fn protect_process() {
    // SAFETY: both calls take integers only and change how the kernel treats this process.
    unsafe {
        // Memory reclaim must not wait for writes that only we can complete.
        libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        // No core file with keys in it, no debugger of the same user.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
    }
    // Segments and records are allocated and freed all the time by few threads: kept in few arenas and not handed
    // back to the kernel each time, they cost neither page faults nor twice the memory.
    // SAFETY: sets parameters of the allocator; takes integers only.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
    }
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer, and then a valid value to set.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Tells systemd (`Type=notify`) that the service is up, if systemd wants to know.
pub fn notify_service_manager() {
    notify("READY=1");
}

/// Tells systemd which process the service is from now on.
pub fn notify_new_main_process(pid: u32) {
    notify(&format!("MAINPID={pid}"));
}

fn notify(what: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_encoded_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &to));
    if let Err(e) = sent {
        ::log::warn!("cannot tell the service manager '{what}': {e}");
    }
}

impl Waiting {
    /// Waits until the child has said that the mount is usable, has failed, or has taken too long; then it is asked
    /// to stop.
    pub fn wait(mut self, limit: Duration) -> Outcome {
        let line = self.read_line(limit).map_err(|e| {
            // SAFETY: the child was not waited for, so the number is still its own.
            unsafe { libc::kill(self.child, libc::SIGTERM) };
            Failure::from_error(ExitCode::Failed, "the mount did not become usable", &e)
        })?;
        if line == "ready" {
            return Ok(ExitCode::Ok);
        }
        match line.split_once(' ').map(|(code, text)| (code.parse(), text)) {
            Some((Ok(code), text)) => Err(Failure::new(ExitCode::from_number(code), text)),
            _ => Err(Failure::new(
                ExitCode::Failed,
                format!("the daemon ended before the mount was usable ({})", self.ending()),
            )),
        }
    }

    fn read_line(&mut self, limit: Duration) -> io::Result<String> {
        let clock = Env::system().clock;
        let deadline = clock.monotonic() + limit;
        let mut line = Vec::new();
        let mut buf = [0; 1024];
        while !line.ends_with(b"\n") && line.len() < LINE_BYTES_MAX {
            let left = deadline.saturating_sub(clock.monotonic());
            if !readable_within(self.pipe.as_fd(), left)? {
                let text = format!("nothing heard for {} s", limit.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            match self.pipe.read(&mut buf)? {
                0 => break,
                n => line.extend_from_slice(buf.get(..n).unwrap_or_default()),
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_string())
    }

    fn ending(&self) -> String {
        // It has closed its pipe, so it is about to end.
        let _ = Pidfd::open(self.child as u32).and_then(|p| p.wait(ENDING_WAIT));
        let mut status = 0;
        // SAFETY: our own child, and a valid place for the answer.
        if unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } != self.child {
            return "its end is not known".into();
        }
        match (libc::WIFSIGNALED(status), libc::WIFEXITED(status)) {
            (true, _) => format!("killed by signal {}", libc::WTERMSIG(status)),
            (_, true) => format!("exit code {}", libc::WEXITSTATUS(status)),
            _ => "its end is not known".into(),
        }
    }
}
