//! `embassyfs manifest`: home's signed statement of what a version holds.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::parse_duration;
use super::progress::{Counting, Shipping};
use super::{mounted, print, print_json, receipt};
use crate::fuse::{control_dir, past};
use crate::ops::control::Request;
use crate::ops::manifest::Writer;
use crate::ops::names::shown;
use crate::ops::receipt::Asked;
use crate::ops::status::bytes;
use crate::ops::walk;
use serde_json::json;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Requests that change nothing; every other counts as a change.
const HARMLESS: &[&str] = &[
    "forget",
    "fsync",
    "getattr",
    "getxattr",
    "listxattr",
    "lookup",
    "lseek",
    "open",
    "read",
    "readdir",
    "readdirplus",
    "readlink",
];

/// Write home's signed manifest of a version: what a drill in the embassy must find there.
///
/// Every path with kind, mode, owner, group, size, modification time, hash of the contents and of the extended
/// attributes, read at home with plain system calls through home's mount: from the version's directory in it
/// (.embassyfs/at/COMMIT), or with --live from the files themselves. The daemon of the mount signs it, with the commit.
/// Run as root, or attributes that only root sees are missing in it.
#[derive(clap::Args)]
#[command(after_help = "\
--live reads what applications read, and not a version made of it again; it ends with exit code 1 when anything was changed
meanwhile, for then no commit holds what was read.

Exit codes:
  0  the manifest is written and signed    1  it is not: something could not be read, or changed
  3  not mounted   4  no daemon            5  not everything is durable in the store within the time   8  fenced

Examples:
  embassyfs manifest /srv/land --out /var/lib/embassyfs/land.manifest
  embassyfs manifest /srv/land --at 1041 --out land-1041.manifest")]
pub struct ManifestArgs {
    /// The commit; the newest that is durable without it.
    #[arg(long, value_name = "COMMIT", conflicts_with = "live")]
    at: Option<u64>,
    /// Read the files themselves, which nobody may change meanwhile.
    #[arg(long)]
    live: bool,
    /// The new file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// How long to wait until all is durable in the store, and again for the signature.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
    /// What was written, as JSON.
    #[arg(long)]
    json: bool,
    /// Where the volume is mounted, for writing.
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(args: ManifestArgs) -> Outcome {
    let mount = mounted::find(&args.mountpoint)?;
    let before = changes(&mount)?;
    let newest = durable(&mount, args.timeout)?;
    let (top, source) = match args.live {
        true => (mount.path.clone(), "live"),
        false => {
            let at = mount.path.join(control_dir::NAME).join(past::NAME);
            (at.join(args.at.unwrap_or(newest).to_string()), "version")
        }
    };
    let failed =
        |e: io::Error| Failure::from_error(ExitCode::Failed, format!("writing {}", args.out.display()), &e);
    let mut writer = Writer::begin(&args.out, source).map_err(failed)?;
    if let Some(no) = args.at {
        is_commit(&top, no, newest)?;
    }
    let read =
        lines(&top, &mut writer).map_err(|e| match args.live.then(|| nothing_changed(&mount, &before)) {
            // A name that is gone, or a size that is another, may be another's work: that first, then what was seen.
            Some(Err(changed)) => {
                Failure { message: format!("{}: {}", changed.message, e.message), ..changed }
            }
            _ => e,
        });
    let made = read.and_then(|()| {
        let commit = match args.live {
            true => unchanged(&mount, &before, args.timeout)?,
            false => args.at.unwrap_or(newest),
        };
        let holds = writer.lines_end().clone();
        let signed = receipt::signed(&mount, Asked::Manifest { commit, holds: holds.clone() }, args.timeout)?;
        writer.finish(&signed).map_err(failed)?;
        Ok((commit, holds))
    });
    let (commit, holds) = made?;
    if args.json {
        print_json(&json!({"commit": commit, "manifest": holds, "file": args.out}))?;
    } else {
        print(&format!(
            "{}: commit {commit}, {} entries, {} files ({}), signed",
            args.out.display(),
            holds.entries,
            holds.files,
            bytes(holds.bytes)
        ));
    }
    Ok(ExitCode::Ok)
}

/// How many requests there were, by name, that may have changed something.
fn changes(mount: &mounted::Mounted) -> Result<BTreeMap<String, u64>, Failure> {
    let mut counts = mount.status()?.requests.by_operation;
    counts.retain(|name, _| !HARMLESS.contains(&name.as_str()));
    Ok(counts)
}

/// The newest commit, if nothing was changed since `before`. Commits alone do not tell: an idle writer makes empty ones.
fn unchanged(
    mount: &mounted::Mounted,
    before: &BTreeMap<String, u64>,
    timeout: Duration,
) -> Result<u64, Failure> {
    let commit = durable(mount, timeout)?;
    nothing_changed(mount, before)?;
    Ok(commit)
}

fn nothing_changed(mount: &mounted::Mounted, before: &BTreeMap<String, u64>) -> Result<(), Failure> {
    let now = changes(mount)?;
    let changed: Vec<&str> =
        now.iter().filter(|(name, n)| before.get(*name) != Some(n)).map(|(name, _)| name.as_str()).collect();
    match changed.is_empty() && now.len() == before.len() {
        true => Ok(()),
        false => Err(Failure::new(
            ExitCode::Failed,
            format!("the volume was changed while it was read ({})", changed.join(", ")),
        )
        .hint("stop what writes, or leave --live out")),
    }
}

/// The newest commit, when all that was written before is in the store.
fn durable(mount: &mounted::Mounted, timeout: Duration) -> Result<u64, Failure> {
    let mut bar = Shipping::new("shipping");
    let request = Request::Sync { timeout_ms: timeout.as_millis() as u64 };
    let answer = mount.daemon()?.ask(request, &mut |status| bar.show(status));
    bar.finish();
    let status = answer
        .map_err(|e| mount.failure("not everything is durable in the store for", ExitCode::Unsent, &e))?;
    let newest = status.last_durable.filter(|_| status.role == "writer");
    let none = || {
        Failure::new(ExitCode::Failed, format!("{} does not write the volume", mount.path.display()))
            .hint("a manifest is home's statement: make it there")
    };
    newest.map(|point| point.no).ok_or_else(none)
}

/// Fails unless the version can be read.
fn is_commit(top: &Path, no: u64, newest: u64) -> Result<(), Failure> {
    let there = match no > newest {
        true => Err(io::ErrorKind::NotFound.into()),
        false => std::fs::symlink_metadata(top).map(drop),
    };
    there.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(ExitCode::Failed, format!("there is no commit {no} in the store"))
                .hint(format!("the newest that is durable is {newest}; 'embassyfs versions' lists them"))
        }
        _ => Failure::from_error(ExitCode::Failed, format!("commit {no} cannot be opened"), &e),
    })
}

fn lines(top: &Path, writer: &mut Writer) -> Result<(), Failure> {
    let mut bar = Counting::new("reading");
    let stop = AtomicBool::new(false);
    let read = walk::read_all(top, &stop, &mut |entry| {
        let entry = entry.map_err(|e| io::Error::other(format!("'{}': {}", e.path, e.why)))?;
        writer.entry(&entry)?;
        bar.show(writer.holds.entries, writer.holds.bytes);
        Ok(())
    });
    bar.finish();
    read.map_err(|e| {
        let what = format!("no manifest of {}", shown(top.as_os_str().as_bytes()));
        Failure::from_error(ExitCode::Failed, what, &e)
    })
}
