//! `embassyfs handover`: unmounts a volume and gives it away, planned, to a host that takes it with `accept`.
//! Invariant: it says that the volume was handed over only on the daemon's word; if anything fails before, the volume is
//! this host's as it was.

use super::exit::{ExitCode, Failure, Outcome};
use super::mounted;
use super::options::{HOST_NAME_MAX, check_words, parse_duration};
use super::progress::Shipping;
use super::umount;
use super::{print, print_json};
use crate::ops::control::Request;
use std::path::PathBuf;
use std::time::Duration;

/// Give a volume to another host: ship everything, unmount, and say in the log to whom.
///
/// The other host takes it with 'embassyfs accept --name NAME'. Until then nobody writes. This host refuses to mount it
/// for writing from now on; it takes part again with 'accept' once it was handed back. If anything fails on the way, it
/// is said, and the volume stays this host's.
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  handed over                          1  not handed over; the message says whether it is still mounted
  6  in use, here or in another mount namespace, and not handed over; the message says whether it is still mounted

Examples:
  embassyfs handover /srv/land --to embassy
In the embassy then:
  embassyfs accept --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land --name embassy
  embassyfs mount --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land /srv/land")]
pub struct HandoverArgs {
    /// Where the volume is mounted.
    mountpoint: PathBuf,
    /// The host that may take it.
    #[arg(long, value_name = "NAME")]
    to: String,
    /// How long to ship before unmounting.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the last status as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: HandoverArgs) -> Outcome {
    check_words("--to", &args.to, HOST_NAME_MAX)?;
    let mount = mounted::find(&args.mountpoint)?;
    let path = mount.path.display();
    let mut daemon = mount.connect().map_err(|e| mount.unreachable(&e))?;
    let mut bar = Shipping::new("shipping");
    let timeout_ms = args.timeout.as_millis() as u64;
    let ready = daemon
        .ask(Request::HandOver { to: Some(args.to.clone()), timeout_ms }, &mut |status| bar.show(status));
    bar.finish();
    ready.map_err(|e| {
        mount
            .failure("not handed over, and still mounted:", ExitCode::Failed, &e)
            .hint("'embassyfs status' shows what is unsent; try again")
    })?;
    let ended = umount::leave(&mount, &mut daemon);
    let last = match ended {
        Ok(last) => last,
        Err(failure) => {
            // If this is not heard, the daemon forgets it by itself after a while.
            let _ = daemon.ask(Request::HandOver { to: None, timeout_ms: 0 }, &mut |_| {});
            return Err(match failure.code {
                ExitCode::Busy => {
                    Failure { message: format!("not handed over: {}", failure.message), ..failure }
                }
                _ => failure,
            });
        }
    };
    if args.json {
        print_json(&last)?;
    }
    if last.handed_over.as_deref() != Some(args.to.as_str()) {
        let why = last.last_error.unwrap_or_else(|| "the daemon does not say why".into());
        return Err(Failure::new(
            ExitCode::Failed,
            format!("{path} is unmounted, but not handed over: {why}"),
        )
        .hint("the volume is still this host's: mount it again"));
    }
    if !args.json {
        print(&format!("{} is handed over to {}: embassyfs accept --name {}", last.volume, args.to, args.to));
    }
    Ok(ExitCode::Ok)
}
