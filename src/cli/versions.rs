//! `embassyfs versions`: the commits that can be mounted with `--at`.

use super::exit::{ExitCode, Outcome};
use super::options::{At, parse_at, parse_duration};
use super::{StoreArgs, absolute, print, print_error, print_json, required, seam};
use crate::ops::status::rfc3339;
use crate::types::Timestamp;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// List the commits in the store, the newest first; each can be mounted with 'mount --read-only --at'.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs versions --store s3://embassy/land --key reader.key
  embassyfs versions --store s3://embassy/land --key reader.key \\
    --since 2025-01-31T12:00:00Z --limit 0
  embassyfs versions --store s3://embassy/land --key reader.key \\
    --limit 0 --json | jq '.[0]'")]
pub struct VersionsArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The key file: reader.key or writer.key.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Only the newest N commits; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Only commits made at this time or later: a time like 2025-01-31T12:00:00Z, or @seconds since 1970.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Refuse a store whose newest commit is older, such as 1h.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    match parse_at(text)? {
        At::Time(time) => Ok(time),
        At::Commit(_) | At::Newest => {
            Err(format!("'{text}' is no time; one has an offset, as 2025-01-31T12:00:00Z, or an @"))
        }
    }
}

/// Runs the command.
pub fn run(args: VersionsArgs) -> Outcome {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let key = required(args.key.or(config.key), "--key FILE", "key")?;
    let request = seam::StoreRequest { store_url, store_options, key: absolute(&key)? };
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    let commits = seam::versions(&request, args.since, limit, args.max_age)?;
    if args.json {
        let rows: Vec<_> = commits
            .iter()
            .map(|(c, checkpoint)| {
                json!({"commit": c.no.0, "time": rfc3339::text(c.time), "seq": c.seq.0, "checkpoint": checkpoint,
                       "head": format!("{}:{}", c.head.seq, c.head.hash)})
            })
            .collect();
        print_json(&rows)?;
        return Ok(ExitCode::Ok);
    }
    print(&format!("{:>12}  {:<32}  {:>10}", "commit", "time", "segment"));
    for (commit, checkpoint) in &commits {
        let mark = if *checkpoint { "  checkpoint" } else { "" };
        print(&format!(
            "{:>12}  {:<32}  {:>10}{mark}",
            commit.no.0,
            rfc3339::text(commit.time),
            commit.seq.0
        ));
    }
    if let Some((newest, _)) = commits.first() {
        print_error(&format!("the newest of these lies in segment {}:{}", newest.head.seq, newest.head.hash));
    }
    if commits.len() == limit {
        print_error(&format!("only the newest {limit} are shown; --limit 0 shows all"));
    }
    Ok(ExitCode::Ok)
}
