//! `embassyfs versions`: the commits that can be mounted with `--at`.

use super::exit::{ExitCode, Outcome};
use super::{StoreArgs, absolute, print, print_error, print_json, required, seam};
use crate::ops::status::rfc3339;
use serde_json::json;
use std::path::PathBuf;

/// List the commits in the store, the newest first; each can be mounted with 'mount --read-only --at'.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs versions --store s3://embassy/land --key reader.key
  embassyfs versions --store s3://embassy/land --key reader.key --limit 0 --json | jq .[0]")]
pub struct VersionsArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// A reader's or writer's key file.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Only the newest N commits; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: VersionsArgs) -> Outcome {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let key = required(args.key.or(config.key), "--key FILE", "key")?;
    let request = seam::StoreRequest { store_url, store_options, key: absolute(&key)? };
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    let commits = seam::versions(&request, limit)?;
    if args.json {
        let rows: Vec<_> = commits
            .iter()
            .map(|(c, checkpoint)| {
                json!({"commit": c.no.0, "time": rfc3339::text(c.time), "seq": c.seq.0, "checkpoint": checkpoint})
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
    if commits.len() == limit {
        print_error(&format!("only the newest {limit} are shown; --limit 0 shows all"));
    }
    Ok(ExitCode::Ok)
}
