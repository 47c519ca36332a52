//! `embassyfs verify`: is what the store holds whole, signed, and new enough?

use super::exit::{ExitCode, Outcome};
use super::options::parse_duration;
use super::progress::Counting;
use super::reading::ReadArgs;
use super::{print, print_error, print_json, seam, signals};
use crate::crypto::keyfile::Role;
use crate::ops::names::shown;
use crate::ops::status::{bytes, seconds};
use crate::replica::Io;
use crate::replica::audit::{self, Audit, Depth};
use std::time::Duration;

/// Findings printed one by one.
const SHOWN: usize = 200;

/// Look whether the store holds the volume whole, signed and unchanged.
///
/// With the auditor's key (auditor.key) nothing can be read, and still it shows: the signature of volume.json, of every segment's end
/// and of every checkpoint; the whole chain from the newest segment to the first; that every object is there and as long
/// as it says; with --full that every byte of every segment is the one that was signed. With a reader's key and --full
/// every frame is opened, and the newest tree is gone through: names, link counts, parents, sizes, counters, and that
/// all contents it refers to are there.
#[derive(clap::Args)]
#[command(after_help = "\
Everything that is wrong is told of, with the object's name. With --state DIR the newest segment is remembered, and a
store that was rolled back or forked since is found out; without it, only --max-age tells an old store from a new one.

Exit codes:
  0  nothing is wrong     9  damage was found (or the newest commit is too old)
  2  wrong usage    8  the key is refused
  7  the store could not be read, or holds nothing of a volume, so nothing is known

Examples:
  embassyfs verify --store s3://embassy/land --key auditor.key \\
    --state /var/lib/audit/land --max-age 1h
  embassyfs verify --store s3://embassy/land --key auditor.key --full --json
  embassyfs verify --store s3://embassy/land --key reader.key --full")]
pub struct VerifyArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// Read every byte; with a reader's key, open every frame and walk the tree.
    #[arg(long)]
    full: bool,
    /// The newest commit must not be older than this, by this host's clock.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: VerifyArgs) -> Outcome {
    let reading = args.read.begin(Role::Auditor)?;
    let depth = Depth { full: args.full, max_age: args.max_age };
    let io = Io::on(reading.runtime.handle());
    let mut bar = Counting::new("verifying");
    let mut show = |what: &'static str, done: u64, of: u64| {
        signals::wait_if_ending();
        bar.part(what, done, of);
    };
    let found = audit::run(&reading.place, reading.state(), depth, &io, &mut show);
    bar.finish();
    let found = found.map_err(|e| seam::failure(&e))?;
    let code = if found.findings.is_empty() { ExitCode::Ok } else { ExitCode::Found };
    if args.json {
        print_json(&found)?;
        return Ok(code);
    }
    for finding in found.findings.iter().take(SHOWN) {
        print(&format!("DAMAGE  {}: {}", shown(finding.object.as_bytes()), finding.detail));
    }
    if found.findings.len() > SHOWN {
        print(&format!("... and {} more; --json shows them", found.findings.len() - SHOWN));
    }
    found.notes.iter().for_each(|note| print_error(&format!("{}: {}", note.object, note.detail)));
    print(&summary(&found, reading.place.key.role, args.full));
    Ok(code)
}

fn summary(found: &Audit, role: Role, full: bool) -> String {
    let age = found.age_seconds.map_or_else(|| "none".into(), |age| seconds(age.max(0) as f64));
    let mut out = format!(
        "{}: {} segments ({}), {} commits, {} checkpoints; newest commit {} (age {age})",
        if found.findings.is_empty() { "whole" } else { "NOT WHOLE" },
        found.segments,
        bytes(found.segment_bytes),
        found.commits,
        found.checkpoints,
        found.newest_commit.unwrap_or(0),
    );
    if full {
        out += &format!("; {} segments read through", found.bodies);
    }
    if full && role >= Role::Reader {
        let (frames, inodes, extents) = (found.frames, found.inodes, found.extents);
        out +=
            &format!("; {frames} frames opened; the tree's {inodes} inodes and {extents} pieces looked at");
    }
    out + &format!("; {} requests, {} read", found.requests, bytes(found.bytes_read))
}
