//! `-o supervise`: a small process above the daemon that mounts again after a crash.
//! Invariant: it has one thread, never touches the mount, and holds nothing on it. A dead mount stays in its place
//! until the next daemon has opened the volume, so that nobody writes to the directory below; a mount that is not in
//! the table any more, or is served by somebody else, was taken away on purpose, and ends it.

use super::daemon::{self, ReadyPipe};
use super::exit::{ExitCode, Failure, Outcome};
use super::mount::MountPlan;
use super::mounted;
use super::serve::{log_to, serve};
use super::signals;
use crate::clock::{Clock, Env};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A daemon that lived for so long has not died in a row with the one before.
const STEADY: Duration = Duration::from_secs(60);
/// Restarts in a row; then it gives up.
const RESTARTS_MAX: u32 = 10;
/// The longest pause before a restart. The first comes at once, the second after a second, then each after twice as long.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often it looks whether the mount was taken away while it waits.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs daemons according to `plan` until one ends in order. Returns in the daemons as well.
pub(super) fn run(plan: &MountPlan, pipe: ReadyPipe) -> Outcome {
    let fail = |what: &'static str| move |e: io::Error| Failure::from_error(ExitCode::Failed, what, &e);
    signals::block_for_supervisor().map_err(fail("cannot block signals"))?;
    daemon::leave_surroundings().map_err(fail("cannot leave the directory"))?;
    log_to(plan).map_err(fail("cannot open the log"))?;
    // A daemon that hands the mount over leaves its successor to us.
    // SAFETY: takes integers only.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    let mut supervisor = Supervisor { plan, clock: Env::system().clock, stopping: false };
    let mut plan = plan.clone();
    let mut row = 0;
    let mut first = Some(pipe);
    loop {
        let started = supervisor.clock.monotonic();
        // SAFETY: this process has one thread, so the child is a complete copy with no lock left held.
        match unsafe { libc::fork() } {
            -1 => return Err(fail("cannot start the daemon")(io::Error::last_os_error())),
            0 => return serve_here(&plan, first.unwrap_or_else(ReadyPipe::none)),
            child => ::log::debug!("process {child} serves"),
        }
        first.take().into_iter().for_each(|pipe| pipe.leave());
        let ending = supervisor.wait_for_all();
        let mountpoint = &plan.settings.mountpoint;
        // One that ended well was unmounted: what is mounted there now is somebody else's, as is what is served.
        if supervisor.stopping || ending.code() == ExitCode::Ok || mounted::dead_at(mountpoint).is_none() {
            return Ok(ending.code());
        }
        row = if supervisor.clock.monotonic() - started < STEADY { row + 1 } else { 1 };
        ::log::error!("the daemon of {} {ending}, restart {row}", mountpoint.display());
        if row > RESTARTS_MAX {
            let what = format!("gave up after {RESTARTS_MAX} restarts in a row; the mount stays, dead");
            ::log::error!("{what}");
            return Err(Failure::new(ExitCode::NoDaemon, what));
        }
        if !supervisor.pause(row) {
            ::log::info!("no restart: the mount was taken away, or a signal asked to stop");
            return Ok(ExitCode::Ok);
        }
        plan.replace = true;
    }
}

/// In the daemon: serves, and says why it could not.
fn serve_here(plan: &MountPlan, pipe: ReadyPipe) -> Outcome {
    let outcome = serve(plan, pipe.clone());
    if let Err(failure) = &outcome {
        ::log::error!("{failure}");
        pipe.failed(failure);
    }
    outcome
}

struct Supervisor<'a> {
    plan: &'a MountPlan,
    clock: Arc<dyn Clock>,
    stopping: bool,
}

/// How a process ended, as waitpid(2) gives it.
struct Ending(libc::c_int);

impl Ending {
    fn code(&self) -> ExitCode {
        if libc::WIFEXITED(self.0) {
            ExitCode::from_number(libc::WEXITSTATUS(self.0) as u8)
        } else {
            ExitCode::Failed
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match libc::WIFSIGNALED(self.0) {
            true => write!(f, "was killed by signal {}", libc::WTERMSIG(self.0)),
            false => write!(f, "ended with code {}", libc::WEXITSTATUS(self.0)),
        }
    }
}

impl Supervisor<'_> {
    /// Waits until no daemon is left; passes signals on. Gives how the last one ended.
    fn wait_for_all(&mut self) -> Ending {
        let mut last = 0;
        loop {
            let mut status = 0;
            // SAFETY: `status` is a valid place for the answer.
            match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
                -1 => return Ending(last),
                0 => self.heed(signals::wait_for(LOOK_EVERY)),
                _ => last = status,
            }
        }
    }

    /// A signal that asks to stop is meant for the daemon.
    fn heed(&mut self, signal: Option<libc::c_int>) {
        if let Some(signal) = signal.filter(|signal| *signal != libc::SIGCHLD) {
            self.stopping = true;
            for child in children() {
                // SAFETY: a process of ours that was not waited for, so the number is still its own.
                unsafe { libc::kill(child, signal) };
            }
        }
    }

    /// Waits before restart `row`; false if there is to be none.
    fn pause(&mut self, row: u32) -> bool {
        let pause = match row {
            1 => Duration::ZERO,
            _ => Duration::from_secs(1 << (row - 2).min(16)).min(PAUSE_MAX),
        };
        let deadline = self.clock.monotonic() + pause;
        loop {
            let left = deadline.saturating_sub(self.clock.monotonic());
            if left.is_zero() || self.stopping {
                break;
            }
            self.heed(signals::wait_for(left.min(LOOK_EVERY)));
            if mounted::dead_at(&self.plan.settings.mountpoint).is_none() {
                return false;
            }
        }
        if self.stopping
            && let Some(dead) = mounted::dead_at(&self.plan.settings.mountpoint)
            && let Err(e) = dead.identity.detach()
        {
            ::log::error!("cannot take the dead mount away: {e}");
        }
        !self.stopping
    }
}

/// The processes whose parent this one is.
fn children() -> Vec<libc::pid_t> {
    let own = std::process::id().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let ours = |pid: &libc::pid_t| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // pid (name) state parent ...; the name can hold anything.
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)) == Some(own.as_str())
    };
    numbers.filter(ours).collect()
}
