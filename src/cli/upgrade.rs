//! `embassyfs upgrade`: another process, and with it another version of the program, goes on with a mount.
//! Invariant: it says that it is done only when the new daemon has answered.

use super::exit::{ExitCode, Failure, Outcome};
use super::mounted::{self, Mounted};
use super::options::parse_duration;
use super::{absolute, print, print_json};
use crate::ops::control::Request;
use crate::ops::status::Status;
use std::path::PathBuf;
use std::time::Duration;

/// How long the new daemon may take to answer, and how often it is asked.
const ANSWER_WAIT: Duration = Duration::from_secs(20);
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Let a new daemon go on with a mount, without unmounting.
///
/// Commits everything, and starts this program (or another one, --program) as the new daemon; it takes the connection
/// to the kernel over. Applications keep their files, locks and mappings; their calls wait for a moment. Nothing waits
/// for the store. If the new daemon cannot take over, the old one goes on and nothing has changed.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs upgrade /srv/land   # the daemon becomes what is installed now
  embassyfs upgrade --program /opt/new/embassyfs /srv/land")]
pub struct UpgradeArgs {
    /// The program that goes on; without it the one that this command is.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// How long to wait for it all.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the new daemon's status as JSON.
    #[arg(long)]
    json: bool,
    /// Where the volume is mounted.
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(args: UpgradeArgs) -> Outcome {
    let mount = mounted::find(&args.mountpoint)?;
    let program = match &args.program {
        Some(path) => absolute(path)?,
        None => std::env::current_exe()
            .map_err(|e| Failure::from_error(ExitCode::Failed, "cannot tell which program this is", &e))?,
    };
    let mut daemon = mount.daemon()?;
    let before = daemon.pid();
    let request = Request::Upgrade { program, timeout_ms: args.timeout.as_millis() as u64 };
    daemon.ask(request, &mut |_| {}).map_err(|e| mount.failure("not upgraded:", ExitCode::Failed, &e))?;
    drop(daemon);
    let status = successor(&mount, before)?;
    if args.json {
        print_json(&status)?;
    } else {
        let path = mount.path.display();
        print(&format!("{path} is served by version {} now, process {}", status.version, status.pid));
    }
    Ok(ExitCode::Ok)
}

/// The status of the daemon that came after `before`.
fn successor(mount: &Mounted, before: u32) -> Result<Status, Failure> {
    let mut answer = mount.status();
    for _ in 0..ANSWER_WAIT.as_millis() / ASK_EVERY.as_millis() {
        match answer {
            Ok(status) if status.pid != before => return Ok(status),
            _ => std::thread::sleep(ASK_EVERY),
        }
        answer = mount.status();
    }
    answer.and_then(|_| Err(Failure::new(ExitCode::NoDaemon, "the new daemon does not answer; see its log")))
}
