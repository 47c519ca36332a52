//! `embassyfs promote` and `embassyfs accept`: this host becomes the volume's writer.
//! Invariant: nothing is mounted; what is done can be done again after a crash at any point.

use super::exit::{ExitCode, Outcome};
use super::options::{HOST_NAME_MAX, REASON_MAX, check_words, parse_duration};
use super::{StoreArgs, absolute, print, print_json, required, seam};
use crate::ops::status::rfc3339;
use crate::replica::promote::{Came, Report};
use crate::replica::{Trust, parse_head};
use crate::types::Head;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// What both commands need.
#[derive(clap::Args)]
pub struct TakeArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The writer's key file.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The state directory to write from afterwards: a new one, that of a reader, or that of a home that was fenced.
    /// Nothing is mounted with it.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Take nothing that does not hold this segment: the newest that home, or whoever looked last, knows of ('head' in
    /// 'status'; 'versions' prints it too). A store that was rolled back is found out so.
    #[arg(long, value_name = "SEQ:HASH", value_parser = parse_head)]
    expect: Option<Head>,
    /// Take nothing whose newest commit is older than this.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// This host's name, for those who look (default: its host name).
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Take a volume over: fence the host that writes to it, and become its writer.
///
/// Needs nothing of that host. It stops at its next upload, for good, and keeps what it had not sent; nothing that it
/// was told is stored is lost. Done twice, it says that it has been done.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs promote --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land --reason 'the ministry is under water'
  embassyfs mount --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land /srv/land")]
pub struct PromoteArgs {
    #[command(flatten)]
    take: TakeArgs,
    /// Why; the host that is fenced shows it.
    #[arg(long, value_name = "TEXT", default_value = "none given")]
    reason: String,
}

/// Take over a volume that its writer has handed over to this host.
///
/// Like 'promote', but only where the newest segment says so ('embassyfs handover'): then nothing can diverge.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs accept --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land --name tallinn")]
pub struct AcceptArgs {
    #[command(flatten)]
    take: TakeArgs,
    /// The name that the volume was handed over to (default: the host's).
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Runs `promote`.
pub fn promote(args: PromoteArgs) -> Outcome {
    run(args.take, args.reason, None)
}

/// Runs `accept`.
pub fn accept(args: AcceptArgs) -> Outcome {
    let name = args.name.or_else(|| args.take.host.clone()).unwrap_or_else(seam::host_name);
    run(args.take, format!("handed over to {name}"), Some(name))
}

fn run(args: TakeArgs, reason: String, accept: Option<String>) -> Outcome {
    let host = args.host.unwrap_or_else(seam::host_name);
    check_words("--host", &host, HOST_NAME_MAX)?;
    match &accept {
        Some(name) => check_words("--name", name, HOST_NAME_MAX)?,
        None => check_words("--reason", &reason, REASON_MAX)?,
    }
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let key = required(args.key.or(config.key), "--key FILE", "key")?;
    let state = required(args.state.or(config.state), "--state DIR", "state")?;
    let request = seam::StoreRequest { store_url, store_options, key: absolute(&key)? };
    let trust = Trust { expect: args.expect, max_age: args.max_age };
    let report = seam::promote(&request, absolute(&state)?, host, reason, accept, trust)?;
    match args.json {
        true => print_json(&as_json(&report))?,
        false => tell(&report, &state.display().to_string()),
    }
    Ok(ExitCode::Ok)
}

fn lag(report: &Report) -> Option<f64> {
    report.time.map(|time| {
        let nanos = f64::from(report.now.nanos) - f64::from(time.nanos);
        ((report.now.secs - time.secs) as f64 + nanos / 1e9).max(0.0)
    })
}

fn as_json(report: &Report) -> serde_json::Value {
    json!({
        "outcome": match report.came {
            Came::Promoted => "promoted",
            Came::Before => "promoted before",
            Came::Writer => "already the writer",
        },
        "volume": report.volume,
        "epoch": report.epoch.0,
        "place": report.place.map(|seq| seq.0),
        "commit": report.commit.0,
        "commit_time": report.time.map(rfc3339::text),
        "commit_age_seconds": lag(report),
        "seconds": report.took.as_secs_f64(),
        "home_alive": report.home_alive,
        "places_lost": report.lost_places,
        "barriers": report.barriers,
        "set_aside": report.set_aside.as_ref().map(|path| path.display().to_string()),
        "unsent_segments": report.unsent,
    })
}

fn tell(report: &Report, state: &str) {
    let (volume, epoch) = (&report.volume, report.epoch.0);
    print(&match report.came {
        Came::Promoted => format!("this host is the writer of {volume} now: epoch {epoch}"),
        Came::Before => format!("this host was made the writer of {volume} before: epoch {epoch}"),
        Came::Writer => {
            format!("this host is the writer of {volume} already: epoch {epoch}; nothing was changed")
        }
    });
    if let Some(place) = report.place {
        print(&format!("  segment       log/{place}"));
    }
    let (commit, age) = (report.commit.0, lag(report).unwrap_or_default());
    match report.time {
        Some(time) => print(&format!("  newest commit {commit} of {}, {age:.1} s ago", rfc3339::text(time))),
        None => print(&format!("  newest commit {commit}")),
    }
    print(&format!("  took          {:.2} s", report.took.as_secs_f64()));
    print(match report.home_alive {
        true => "  the host before was alive and writing; it stops at its next upload",
        false => "  the host before was not seen writing",
    });
    if let Some(path) = &report.set_aside {
        print(&format!("  what this host had that is in nobody's history: {}", path.display()));
        print(&format!("  see 'embassyfs divergence list --state {state}'"));
    }
    if report.unsent > 0 {
        print(&format!("  {} segments are only on this host; a mount sends them", report.unsent));
    }
}
