//! Finding the mount that a command is about, and its daemon, without touching the mount itself.

use super::exit::{ExitCode, Failure};
use crate::clock::Env;
use crate::fuse::identity::MountIdentity;
use crate::fuse::mount::own_ids;
use crate::fuse::table::{self, MountEntry};
use crate::ops::control::{Client, ControlError, Request, socket_path};
use crate::ops::status::Status;
use std::io;
use std::path::{Path, PathBuf};

/// A mount of this program that is in the table.
#[derive(Debug)]
pub struct Mounted {
    /// Its path, as the table has it.
    pub path: PathBuf,
    /// Which it is, whatever comes to its place.
    pub identity: MountIdentity,
}

/// The EmbassyFS mount at `path`.
pub fn find(path: &Path) -> Result<Mounted, Failure> {
    let shown = path.display();
    let real = table::normalise(path).map_err(|e| {
        Failure::from_error(ExitCode::NotMounted, format!("cannot look for a mount at {shown}"), &e)
    })?;
    let entry = table::find(&real)
        .map_err(|e| Failure::from_error(ExitCode::Failed, "cannot read the mount table", &e))?;
    match entry {
        Some(entry) if entry.is_ours() => Ok(Mounted::of(MountIdentity::of(entry))),
        Some(entry) => Err(Failure::new(
            ExitCode::NotMounted,
            format!("what is mounted at {shown} is of type {}, not EmbassyFS", entry.fs_type),
        )),
        None => Err(Failure::new(ExitCode::NotMounted, format!("no EmbassyFS volume is mounted at {shown}"))
            .hint("'embassyfs status' lists all mounts")),
    }
}

/// All EmbassyFS mounts, in the table's order.
pub fn all() -> Result<Vec<Mounted>, Failure> {
    let mounts = table::mounts()
        .map_err(|e| Failure::from_error(ExitCode::Failed, "cannot read the mount table", &e))?;
    let ours = mounts.into_iter().filter(MountEntry::is_ours);
    Ok(ours.map(MountIdentity::of).map(Mounted::of).collect())
}

/// The EmbassyFS mount at `path` (normalised), if there is one.
pub fn at(path: &Path) -> Option<Mounted> {
    MountIdentity::at(path).map(Mounted::of)
}

/// The same, if its daemon has died.
pub fn dead_at(path: &Path) -> Option<Mounted> {
    let mount = at(path)?;
    mount.connect().is_err_and(|e| nobody_listens(&e)).then_some(mount)
}

/// What [`Mounted::connect`] gives when the daemon has died.
pub fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

impl Mounted {
    fn of(identity: MountIdentity) -> Mounted {
        Mounted { path: identity.entry().mount_point.clone(), identity }
    }

    /// A connection to the daemon; the error as the system gives it.
    pub fn connect(&self) -> io::Result<Client> {
        Client::connect(&self.socket(), Env::system().clock)
    }

    /// A connection to the daemon.
    pub fn daemon(&self) -> Result<Client, Failure> {
        self.connect().map_err(|e| self.unreachable(&e))
    }

    /// How the daemon says it stands.
    pub fn status(&self) -> Result<Status, Failure> {
        let answer = self.daemon()?.ask(Request::Status {}, &mut |_| {});
        answer.map_err(|e| self.failure("no status of", ExitCode::Failed, &e))
    }

    fn socket(&self) -> PathBuf {
        socket_path(self.owner(), &self.path)
    }

    fn owner(&self) -> u32 {
        self.identity.entry().user_id().unwrap_or(own_ids().0)
    }

    /// The failure that an error of [`Mounted::connect`] stands for.
    pub fn unreachable(&self, error: &io::Error) -> Failure {
        let path = self.path.display();
        let what = format!("the daemon of {path} cannot be reached over {}", self.socket().display());
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("only root and the owner of the mount (user {}) may ask it", self.owner())
            }
            _ => format!(
                "if it has died, 'embassyfs umount --force {path}' clears the mount, and mounting again recovers \
                 what was committed"
            ),
        };
        Failure::from_error(ExitCode::NoDaemon, what, error).hint(hint)
    }

    /// The failure that a daemon's answer stands for; `code` is for the case that it answered.
    pub fn failure(&self, what: &str, code: ExitCode, error: &ControlError) -> Failure {
        let code = match error {
            ControlError::NoAnswer(_) => ExitCode::NoDaemon,
            ControlError::Failed { .. } => code,
        };
        Failure::from_error(code, format!("{what} {}", self.path.display()), error)
    }
}

/// Processes that have something below `path` open or as their directory, as far as this user may see: number and
/// name. Only links in /proc are read, so that nothing waits for the mount.
pub fn users_of(path: &Path) -> Vec<(u32, String)> {
    let below = |link: PathBuf| std::fs::read_link(link).is_ok_and(|target| target.starts_with(path));
    let uses = |process: &Path| {
        let open = std::fs::read_dir(process.join("fd"));
        ["cwd", "root", "exe"].iter().any(|name| below(process.join(name)))
            || open.is_ok_and(|fds| fds.flatten().any(|fd| below(fd.path())))
    };
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbered = processes.flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, entry.path()))
    });
    numbered
        .filter(|(pid, process)| *pid != std::process::id() && uses(process))
        .map(|(pid, process)| {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            (pid, name.trim().to_string())
        })
        .collect()
}
