//! `embassyfs divergence`: what a host had written and not sent when it lost the volume.
//! Invariant: nothing is changed, neither in the state directory nor in the store.

use super::diff;
use super::exit::{ExitCode, Failure, Outcome};
use super::progress::Counting;
use super::reading::{ReadArgs, Reading};
use super::{absolute, print, print_error, print_json, seam};
use crate::crypto::keyfile::Role;
use crate::log::statedir::StateDir;
use crate::ops::changes::{Change, Kind, compare};
use crate::ops::names::plain_path;
use crate::ops::place::Dir;
use crate::ops::reader::Reader;
use crate::ops::restore::{Report, Restore};
use crate::ops::status::{bytes, rfc3339};
use crate::replica::divergent::{Divergence, divergences};
use crate::replica::views::Views;
use crate::replica::{Version, context_of};
use crate::tree::value::FileType;
use crate::tree::{Delta, Levels, Tree};
use crate::types::{CommitNo, FramePtr, Timestamp};
use serde_json::json;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What was changed, in the directory of an export; the files lie beside it.
const LIST: &str = "changes.json";
const FILES: &str = "files";
/// Problems printed one by one.
const SHOWN: usize = 20;

/// What a host had written and not sent when another took the volume over.
///
/// Nothing of it is lost: the segments stay in the state directory, in log/ as long as the host is fenced and in
/// divergent/EPOCH/ once 'accept' or 'promote' has set them aside. None of it is in the volume's history, and nothing
/// merges it: look at it, and bring in by hand what is wanted.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs divergence list --state /var/lib/embassyfs/land
  embassyfs divergence show --state /var/lib/embassyfs/land \\
    --store s3://embassy/land --key reader.key
  embassyfs divergence export --state /var/lib/embassyfs/land \\
    --store s3://embassy/land --key reader.key /srv/lost-writes")]
pub struct DivergenceArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// What there is, without a key: epochs, times, sizes, and why the host lost the volume.
    ///
    /// Exit codes: 0 there is nothing; 9 there is something.
    List(ListArgs),
    /// The paths that it changed, beside the last version that was sent. Letters and exit codes as in 'diff'.
    Show(ShowArgs),
    /// Copy out the files that it added or wrote to, as they were at its end, with a list of all changes.
    ///
    /// DEST/files gets the files under their paths; DEST/changes.json says what was added, written to, renamed and
    /// deleted. Run again, it goes on.
    Export(ExportArgs),
}

#[derive(clap::Args)]
struct ListArgs {
    /// The state directory of the host that lost the volume.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct ShowArgs {
    /// The store and the key. The state directory is that of the host that lost the volume.
    #[command(flatten)]
    read: ReadArgs,
    /// The epoch it was written in, where there are several.
    #[arg(long, value_name = "EPOCH")]
    epoch: Option<u32>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct ExportArgs {
    #[command(flatten)]
    show: ShowArgs,
    /// The directory to copy to; it is made if it is not there.
    dest: PathBuf,
}

/// Runs the command.
pub fn run(args: DivergenceArgs) -> Outcome {
    match args.what {
        What::List(args) => list(&args),
        What::Show(args) => show(args),
        What::Export(args) => export(args),
    }
}

fn open_state(path: &Path) -> Result<StateDir, Failure> {
    let path = absolute(path)?;
    if !path.join("log").is_dir() {
        return Err(Failure::usage(format!("{} is not a state directory", path.display()))
            .hint("it is what was given to 'mount' as --state"));
    }
    Ok(StateDir::look(&path))
}

fn list(args: &ListArgs) -> Outcome {
    let dir = open_state(&args.state)?;
    let found = divergences(&dir).map_err(|e| seam::failure(&e))?;
    if args.json {
        print_json(&found.iter().map(summary).collect::<Vec<_>>())?;
    } else if found.is_empty() {
        print("nothing: all that was written here is in the volume's history, or waits to be sent");
    } else {
        found.iter().for_each(tell);
    }
    Ok(if found.is_empty() { ExitCode::Ok } else { ExitCode::Found })
}

fn commits(found: &Divergence) -> u64 {
    found.segments.iter().filter_map(|part| part.trailer).map(|trailer| u64::from(trailer.commit_count)).sum()
}

fn times(found: &Divergence) -> Option<(Timestamp, Timestamp)> {
    let with: Vec<_> =
        found.segments.iter().filter_map(|part| part.trailer.filter(|t| t.commit_count > 0)).collect();
    Some((with.first()?.first_time, with.last()?.last_time))
}

fn open_bytes(found: &Divergence) -> u64 {
    found.segments.iter().filter(|part| part.trailer.is_none()).map(|part| part.size).sum()
}

fn summary(found: &Divergence) -> serde_json::Value {
    let times = times(found);
    json!({
        "epoch": found.epoch.0,
        "set_aside": found.set_aside,
        "directory": found.at.display().to_string(),
        "segments": found.segments.len(),
        "bytes": found.segments.iter().map(|part| part.size).sum::<u64>(),
        "left_open_bytes": open_bytes(found),
        "commits": commits(found),
        "first": times.map(|(first, _)| rfc3339::text(first)),
        "last": times.map(|(_, last)| rfc3339::text(last)),
        "note": found.note.trim(),
    })
}

fn tell(found: &Divergence) {
    let size: u64 = found.segments.iter().map(|part| part.size).sum();
    let state = if found.set_aside { "set aside" } else { "not set aside yet" };
    print(&format!("epoch {}: {} segments, {}, {state}", found.epoch.0, found.segments.len(), bytes(size)));
    match times(found) {
        Some((first, last)) => print(&format!(
            "  commits       {}, from {} to {}",
            commits(found),
            rfc3339::text(first),
            rfc3339::text(last)
        )),
        None => print("  commits       none in closed segments"),
    }
    let open = open_bytes(found);
    if open > 0 {
        print(&format!(
            "  left open     {} by a crash; 'accept' or 'promote' closes what is whole of it",
            bytes(open)
        ));
    }
    print(&format!("  directory     {}", found.at.display()));
    print(&format!("  why           {}", found.note.trim()));
}

/// A divergence beside what it diverged from.
struct Side {
    reading: Reading,
    views: Views,
    shared: CommitNo,
    epoch: u32,
}

impl Side {
    fn open(args: ShowArgs) -> Result<Side, Failure> {
        let ShowArgs { mut read, epoch, .. } = args;
        // Copies of what is read go into a directory of their own: this one is the host's.
        let state = match (read.state.take(), read.store.load_config()?.state) {
            (Some(state), _) | (None, Some(state)) => state,
            (None, None) => return Err(Failure::usage("--state DIR is missing")),
        };
        let dir = open_state(&state)?;
        let found = divergences(&dir).map_err(|e| seam::failure(&e))?;
        let found = chosen(found, epoch, &state)?;
        let mut reading = read.begin(Role::Reader)?;
        let place = reading.place.clone();
        let beside = async {
            let ctx = context_of(&*place.store, &place.key).await?;
            found.beside(&ctx, place.store.clone()).await
        };
        let (overlay, shared) = reading.runtime.block_on(beside).map_err(|e| seam::failure(&e))?;
        reading.place.store = std::sync::Arc::new(overlay);
        let mut versions = vec![Version::Newest];
        if shared.0 > 0 {
            versions.push(Version::Commit(shared));
        }
        let views = reading.views(&versions)?;
        Ok(Side { reading, views, shared, epoch: found.epoch.0 })
    }

    fn changes(&self) -> Result<Vec<Change>, Failure> {
        let fetch = |ptrs: &[FramePtr]| self.views.fetch(ptrs);
        let (none, nothing) = (Tree { root: None }, Delta::new());
        let empty = Levels { maps: &[&nothing], tree: &none, frames: self.views.frames() };
        let [new, old @ ..] = self.views.views.as_slice() else { return Ok(Vec::new()) };
        let found = self.views.with(new, |new| match old.first() {
            Some(old) => self.views.with(old, |old| compare(old, new, &fetch, b"")),
            None => compare(&empty, new, &fetch, b""),
        });
        Ok(found.map_err(|e| seam::failure(&e))?.changes)
    }

    fn as_json(&self, changes: &[Change]) -> serde_json::Value {
        json!({
            "epoch": self.epoch,
            "shared_commit": self.shared.0,
            "last_commit": self.views.views.first().map(|view| view.commit.0),
            "changes": changes.iter().map(diff::as_json).collect::<Vec<_>>(),
        })
    }
}

fn chosen(found: Vec<Divergence>, epoch: Option<u32>, state: &Path) -> Result<Divergence, Failure> {
    let epochs: Vec<String> = found.iter().map(|one| one.epoch.0.to_string()).collect();
    let mut fit: Vec<Divergence> =
        found.into_iter().filter(|one| epoch.is_none_or(|epoch| one.epoch.0 == epoch)).collect();
    match (fit.len(), epochs.len()) {
        (1, _) => Ok(fit.remove(0)),
        (_, 0) => {
            Err(Failure::new(ExitCode::Failed, format!("{} holds nothing that diverged", state.display())))
        }
        _ => Err(Failure::usage(format!("there are those of epochs {}", epochs.join(", ")))
            .hint("give one of them with --epoch")),
    }
}

fn show(args: ShowArgs) -> Outcome {
    let json = args.json;
    let side = Side::open(args)?;
    let changes = side.changes()?;
    match json {
        true => print_json(&side.as_json(&changes))?,
        false => changes.iter().for_each(|change| print(&diff::line(change))),
    }
    Ok(if changes.is_empty() { ExitCode::Ok } else { ExitCode::Found })
}

/// What is copied: files and the like that were added or written to, and of directories that are new the topmost.
fn wanted(changes: &[Change]) -> Vec<&Change> {
    let mut out: Vec<&Change> = Vec::new();
    for change in changes {
        let inside = out.last().is_some_and(|top| {
            top.of == FileType::Directory
                && change.path.strip_prefix(&*top.path).is_some_and(|rest| rest.starts_with(b"/"))
        });
        let copied = match (change.kind, change.of) {
            (Kind::Added, _) => true,
            (Kind::Content | Kind::Attributes, of) => of != FileType::Directory,
            (Kind::Deleted | Kind::Renamed, _) => false,
        };
        if copied && !inside {
            out.push(change);
        }
    }
    out
}

fn export(args: ExportArgs) -> Outcome {
    let (json, dest) = (args.show.json, args.dest);
    let side = Side::open(args.show)?;
    let changes = side.changes()?;
    let files = dest.join(FILES);
    let place = |e: std::io::Error| {
        Failure::from_error(ExitCode::Failed, format!("cannot export to {}", dest.display()), &e)
    };
    std::fs::create_dir_all(&files).map_err(place)?;
    let list = serde_json::to_vec_pretty(&side.as_json(&changes)).unwrap_or_default();
    std::fs::write(dest.join(LIST), list).map_err(place)?;
    let Side { reading, views, epoch, .. } = side;
    drop(views); // the directory for copies is the volume's now
    let volume = super::restore::open(&reading, None)?;
    let fetch = |ptrs: &[FramePtr]| reading.runtime.block_on(volume.fetch(ptrs));
    let mut bar = Counting::new("exporting");
    let mut report = Report::default();
    for change in wanted(&changes) {
        let parent = change.path.rsplitn(2, |b| *b == b'/').nth(1).unwrap_or_default();
        let parent = plain_path(parent).map_err(Failure::usage)?;
        let above = files.join(std::ffi::OsStr::from_bytes(&parent));
        std::fs::create_dir_all(&above).map_err(place)?;
        let dir = Dir::open(&above).map_err(place)?;
        let before = report.clone();
        let mut show =
            |now: &Report| bar.show(before.files + now.files + now.present, before.bytes + now.bytes);
        let mut restore = Restore::new(Reader { fs: &volume.fs, fetch: &fetch }, dir, false, &mut show);
        let done = restore.copy(&change.path).and_then(|()| restore.finish());
        report.add(done.map_err(|e| super::restore::stopped(&e))?);
    }
    bar.finish();
    let code = if report.problem_count == 0 { ExitCode::Ok } else { ExitCode::Failed };
    if json {
        print_json(&json!({"dest": dest, "changes": changes.len(), "report": report}))?;
        return Ok(code);
    }
    for (path, why) in report.problems.iter().take(SHOWN) {
        print_error(&format!("{path}: {why}"));
    }
    let gone = changes.iter().filter(|change| change.kind == Kind::Deleted).count();
    print(&format!(
        "epoch {}: {} files ({}) exported to {}; {} were there already; {} paths had been deleted; all {} changes are \
         listed in {}; {} problems",
        epoch,
        report.files,
        bytes(report.bytes),
        files.display(),
        report.present,
        gone,
        changes.len(),
        dest.join(LIST).display(),
        report.problem_count
    ));
    Ok(code)
}
