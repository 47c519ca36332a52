//! A mount of a command's own: another process of this program, at a mount point that nobody else knows.
//! Invariant: it ends with the one that started it, however that ends, and is taken out of the mount table; no wait here
//! is without a bound, and nothing here touches the mount.

use super::exit::{ExitCode, Failure};
use super::mounted;
use crate::clock::{Clock, Env};
use crate::fuse::mount::{self as kernel, Unmount};
use crate::fuse::table;
use crate::ops::status::Status;
use crate::types::hex;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const POLL: Duration = Duration::from_millis(5);
/// How long an ordered end may take, and then each further step.
const END_WAIT: Duration = Duration::from_secs(25);
const STEP_WAIT: Duration = Duration::from_secs(10);
/// As much of what the process said is told.
const SAID_MAX: usize = 2000;

/// See the module. It is unmounted when this is dropped.
pub struct Elsewhere {
    child: Child,
    clock: Arc<dyn Clock>,
    directory: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    said: PathBuf,
}

impl Elsewhere {
    /// Starts `embassyfs mount` with these words, a mount point of its own and `state`; does not wait for it.
    pub fn start(words: &[std::ffi::OsString], state: &Path, env: &Env) -> Result<Elsewhere, Failure> {
        let failed = |what: &str, e: &io::Error| {
            Failure::from_error(ExitCode::Failed, format!("a mount for this command: {what}"), e)
        };
        let name: [u8; 8] = env.random_bytes();
        let directory = std::env::temp_dir().join(format!("embassyfs-drill-{}", hex(&name)));
        let point = directory.join("mnt");
        DirBuilder::new().mode(0o700).create(&directory).map_err(|e| failed("its directory", &e))?;
        let said = directory.join("said");
        let started = DirBuilder::new().mode(0o700).create(&point).and_then(|()| {
            let point = table::normalise(&point)?;
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("mount").args(words).args(["--read-only", "--foreground", "--state"]).arg(state);
            command.arg("--log-file").arg(state.join("drill.log")).arg(&point);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create_new(&said)?);
            // A group of its own: what the terminal sends is for us, who end it in order.
            command.process_group(0);
            // SAFETY: prctl with a signal's number is async-signal-safe and touches nothing of ours.
            unsafe {
                command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                });
            }
            Ok((command.spawn()?, point))
        });
        match started {
            Ok((child, point)) => Ok(Elsewhere { child, clock: env.clock.clone(), directory, point, said }),
            Err(e) => {
                let _ = std::fs::remove_dir_all(&directory); // it is empty but for what we made
                Err(failed("starting it", &e))
            }
        }
    }

    /// Waits until it is in the mount table and its process answers; how it stands then.
    pub fn wait(&mut self, limit: Duration, stopped: &dyn Fn() -> bool) -> Result<Status, String> {
        let end = self.clock.monotonic() + limit;
        while self.clock.monotonic() < end && !stopped() {
            if !self.alive() {
                return Err(format!("it could not be mounted: {}", self.said()));
            }
            if let Some(mount) = mounted::at(&self.point)
                && let Ok(status) = mount.status()
            {
                return Ok(status);
            }
            std::thread::sleep(POLL);
        }
        Err(if stopped() { "stopped".into() } else { format!("not mounted within {} s", limit.as_secs()) })
    }

    /// Whether its process runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What its process said before it ended.
    pub fn said(&self) -> String {
        let text = std::fs::read_to_string(&self.said).unwrap_or_default();
        let last: String = text.trim().chars().take(SAID_MAX).collect();
        if last.is_empty() { "its process ended".into() } else { last }
    }

    /// Breaks it: whoever waits for the mount gets an error at once.
    pub fn break_off(&mut self) {
        let _ = self.child.kill(); // it may have ended
        self.ended(STEP_WAIT);
    }

    fn ended(&mut self, limit: Duration) -> bool {
        let end = self.clock.monotonic() + limit;
        while self.alive() {
            if self.clock.monotonic() > end {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }

    fn is_mounted(&self) -> bool {
        table::find(&self.point).is_ok_and(|found| found.is_some())
    }

    /// Unmounts and ends it. What cannot be ended in order is broken.
    pub fn end(&mut self) -> Result<(), String> {
        if self.alive() {
            // SAFETY: takes two integers; the process is our own child, which was not waited for.
            unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
            if !self.ended(END_WAIT) {
                self.break_off();
            }
        }
        if self.is_mounted() {
            kernel::unmount_bounded(&self.point, Unmount::Lazy, STEP_WAIT)
                .map_err(|e| format!("{} could not be unmounted: {e}", self.point.display()))?;
        }
        if self.directory.exists() {
            // Not what is below a mount: it was looked for just now, and an empty directory is all there can be.
            let _ = std::fs::remove_dir(&self.point);
            let _ = std::fs::remove_file(&self.said);
            let _ = std::fs::remove_dir(&self.directory);
        }
        Ok(())
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            super::print_error(&e);
        }
    }
}
