//! `embassyfs status`: how a mounted volume stands, or what a store says about its volume.

use super::exit::{ExitCode, Failure, Outcome};
use super::mounted;
use super::{StoreArgs, absolute, print_error, print_json, print_lines, required, seam};
use crate::ops::metrics;
use crate::ops::status::Status;
use std::path::PathBuf;

/// Show how a mounted volume stands, or what a store holds.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs status   # all mounts of this host
  embassyfs status /srv/land
  embassyfs status --json /srv/land
  embassyfs status --metrics > land.prom.new && mv land.prom.new land.prom
  embassyfs status --store s3://embassy/land --key reader.key")]
pub struct StatusArgs {
    /// Where the volume is mounted; without it and without a store, all mounts are shown.
    #[arg(conflicts_with_all = ["store", "config"])]
    mountpoint: Option<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
    /// A reader's or writer's key file, with --store.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
    /// The figures as Prometheus reads them, for the textfile collector of a node exporter.
    #[arg(long, conflicts_with_all = ["json", "store", "config"])]
    metrics: bool,
}

/// Runs the command.
pub fn run(args: StatusArgs) -> Outcome {
    if args.store.store.is_some() || args.store.config.is_some() {
        return of_store(&args);
    }
    match &args.mountpoint {
        Some(path) => {
            let status = mounted::find(path)?.status()?;
            show(&[status], &args, false)?;
            Ok(ExitCode::Ok)
        }
        None => of_all(&args),
    }
}

/// `list`: JSON as a list, however many there are.
fn show(all: &[Status], args: &StatusArgs, list: bool) -> Result<(), Failure> {
    match all {
        _ if args.metrics => print_lines(&metrics::text(all)),
        [one] if args.json && !list => print_json(one)?,
        _ if args.json => print_json(&all)?,
        _ => all.iter().for_each(|status| print_lines(&status.to_string())),
    }
    Ok(())
}

/// All mounts; one that does not answer does not hide the others.
fn of_all(args: &StatusArgs) -> Outcome {
    let mut code = ExitCode::Ok;
    let mut all = Vec::new();
    for mount in mounted::all()? {
        match mount.status() {
            Ok(status) => all.push(status),
            Err(failure) => {
                print_error(&failure.to_string());
                code = failure.code;
            }
        }
    }
    show(&all, args, true)?;
    if !args.json && all.is_empty() && code == ExitCode::Ok {
        print_error("no EmbassyFS volume is mounted on this host");
    }
    Ok(code)
}

fn of_store(args: &StatusArgs) -> Outcome {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let key = required(args.key.clone().or(config.key), "--key FILE", "key")?;
    let request = seam::StoreRequest { store_url, store_options, key: absolute(&key)? };
    let status = seam::store_status(&request)?;
    if args.json {
        print_json(&status)?;
    } else {
        print_lines(&status.to_string());
    }
    Ok(ExitCode::Ok)
}
