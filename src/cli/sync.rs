//! `embassyfs sync`: returns when everything written before it is durable in the store.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::parse_duration;
use super::progress::Shipping;
use super::{mounted, print, print_json};
use crate::ops::control::{ControlError, Request};
use std::path::PathBuf;
use std::time::Duration;

/// Return when everything written before is durable in the store.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs sync /srv/land
  embassyfs sync --timeout 10m /srv/land || echo 'not all is abroad yet'")]
pub struct SyncArgs {
    /// Give up after this time (exit code 5); shipping goes on in the background.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the resulting status as JSON.
    #[arg(long)]
    json: bool,
    /// Where the volume is mounted.
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(args: SyncArgs) -> Outcome {
    let mount = mounted::find(&args.mountpoint)?;
    let mut daemon = mount.daemon()?;
    let mut bar = Shipping::new("shipping");
    let request = Request::Sync { timeout_ms: args.timeout.as_millis() as u64 };
    let answer = daemon.ask(request, &mut |status| bar.show(status));
    bar.finish();
    match answer {
        Ok(status) => {
            if args.json {
                print_json(&status)?;
            } else if let Some(durable) = status.last_durable {
                print(&format!("{}: durable in the store up to commit {}", mount.path.display(), durable.no));
            }
            Ok(ExitCode::Ok)
        }
        Err(error) => {
            let failure =
                mount.failure("not everything is durable in the store for", ExitCode::Unsent, &error);
            Err(match error {
                ControlError::Failed { status: Some(status), .. } => with_unsent(failure, &status),
                _ => failure,
            })
        }
    }
}

fn with_unsent(failure: Failure, status: &crate::ops::status::Status) -> Failure {
    let code = if status.fenced { ExitCode::Refused } else { failure.code };
    let hint = format!("unsent: {}, kept in {}", status.unsent_in_words(), status.state);
    Failure { code, ..failure }.hint(hint)
}
