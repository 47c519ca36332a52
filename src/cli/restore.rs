//! `embassyfs restore`: copies files out of a version, without a mount.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::{At, parse_past};
use super::progress::Counting;
use super::reading::{ReadArgs, Reading};
use super::{print, print_error, print_json, seam, signals};
use crate::crypto::keyfile::Role;
use crate::fs::{Error, Settings};
use crate::ops::names::plain_path;
use crate::ops::place::Dir;
use crate::ops::reader::Reader;
use crate::ops::restore::{Report, Restore, Stopped};
use crate::ops::status::{bytes, rfc3339};
use crate::replica::durable::Protection;
use crate::replica::volume::{OpenOptions, Volume};
use crate::replica::{Trust, Version};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Opened frames in memory and copies on the local disk, in bytes.
const FRAME_CACHE: usize = 64 << 20;
const DISK_CACHE: u64 = 1 << 30;
/// What to say when it ends before its end.
const WAY_OUT: &str = "what is finished stays; run the command again to go on (with --at, so that it means the same \
                       version)";
/// Problems printed one by one.
const SHOWN: usize = 20;

/// Copy files and directories out of a version, without a mount.
///
/// Each PATH of the volume comes into DEST under its last name ('.': all that the volume holds), with owner, mode,
/// times, extended attributes, access control lists, symbolic links, hard links among what is copied, holes, devices and
/// pipes. Every byte is authenticated as it is read, and every file read back from the disk and compared before it gets
/// its name. Run again after an interruption, what is finished is not copied again. Give --at, so that both runs mean the
/// same version.
#[derive(clap::Args)]
#[command(after_help = "\
What is in DEST already is known to be finished by its type, owner, mode, size, time of
modification, extended attributes and access list. A file that was damaged behind these is not
seen without --verify, which reads it and compares every byte. What differs is left as it is, and
told of, unless --overwrite is given. Directories that are there are filled and take the volume's
attributes. No symbolic link in DEST is followed. As another user than root, owners and devices
are told of as not restored.

Exit codes:
  0  all is restored                     1  something is not; each is named, the rest is restored
  2  wrong usage    7  the store is unreachable or holds no volume; run again to go on
  8  refused (key, damage, no such version)

Examples:
  embassyfs restore --store s3://embassy/land --key reader.key \\
    --at 2026-11-20T03:00:00Z deeds/2026 /srv/back
  embassyfs restore --store s3://embassy/land --key reader.key --at 1041 \\
    --state /var/tmp/r . /srv/back
  embassyfs restore --store s3://embassy/land --key reader.key --at 1041 \\
    --verify --overwrite . /srv/back")]
pub struct RestoreArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// The version: a commit number, a time like 2025-01-31T12:00:00Z, @seconds since 1970, or newest, which it is
    /// without this. A time to come is refused.
    #[arg(long, value_name = "SEQ|TIME", value_parser = parse_past)]
    at: Option<At>,
    /// Replace what is in DEST and differs.
    #[arg(long)]
    overwrite: bool,
    /// Compare the contents of what is in DEST already, too: reads all of it on both sides.
    #[arg(long)]
    verify: bool,
    /// A JSON report instead of text.
    #[arg(long)]
    json: bool,
    /// Paths of the volume, then the directory to copy to; it is made if it is not there.
    #[arg(required = true, num_args = 2.., value_names = ["PATH", "DEST"])]
    paths: Vec<OsString>,
}

/// Runs the command.
pub fn run(args: RestoreArgs) -> Outcome {
    let (dest, sources) =
        args.paths.split_last().ok_or_else(|| Failure::usage("PATH and DEST are missing"))?;
    let sources: Vec<Vec<u8>> = sources
        .iter()
        .map(|path| plain_path(path.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(Failure::usage)?;
    let mut names: Vec<_> = sources.iter().map(|path| path.rsplit(|b| *b == b'/').next()).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Failure::usage("two of the paths would have the same name in DEST")
            .hint("restore them into two directories"));
    }
    let reading = args.read.begin_saying(Role::Reader, WAY_OUT)?;
    let volume = open(&reading, args.at)?;
    let dest = PathBuf::from(dest);
    let report = copy(&reading, &volume, &sources, &dest, &args)?;
    let (commit, time) = volume.opened.map_or((0, None), |(no, time)| (no.0, Some(rfc3339::text(time))));
    let code = if report.problem_count == 0 { ExitCode::Ok } else { ExitCode::Failed };
    if args.json {
        print_json(&json!({"commit": commit, "time": time, "dest": dest, "report": report}))?;
        return Ok(code);
    }
    for (path, why) in report.problems.iter().take(SHOWN) {
        print_error(&format!("{path}: {why}"));
    }
    if report.problem_count > SHOWN as u64 {
        print_error(&format!(
            "... and {} more; --json shows a thousand",
            report.problem_count - SHOWN as u64
        ));
    }
    print(&format!(
        "commit {commit}: {} files ({}), {} directories, {} others, {} links restored to {}; {} were there already \
         ({}); {} problems",
        report.files,
        bytes(report.bytes),
        report.directories,
        report.others,
        report.links,
        dest.display(),
        report.present,
        match args.verify {
            true => format!("contents of {} files compared", report.compared),
            false => "by size, times and attributes; --verify reads them".into(),
        },
        report.problem_count
    ));
    Ok(code)
}

/// Opens a version for its core, without a mount.
pub fn open(reading: &Reading, at: Option<At>) -> Result<Volume, Failure> {
    let options = OpenOptions {
        store: reading.place.store.clone(),
        key: reading.place.key.clone(),
        state: reading.state().to_path_buf(),
        env: reading.place.env.clone(),
        version: at.map_or(Version::Newest, Version::from),
        protection: Protection::Local,
        sync_timeout: Duration::ZERO,
        disk_cache: DISK_CACHE,
        frame_cache: FRAME_CACHE,
        uploads: 1,
        trust: Trust::default(),
        settings: Settings { read_only: true, ..Settings::default() },
    };
    Volume::open(options, reading.runtime.handle()).map_err(|e| seam::failure(&e))
}

fn copy(
    reading: &Reading,
    volume: &Volume,
    sources: &[Vec<u8>],
    dest: &Path,
    args: &RestoreArgs,
) -> Result<Report, Failure> {
    let place = |e: std::io::Error| {
        Failure::from_error(ExitCode::Failed, format!("cannot restore to {}", dest.display()), &e)
    };
    std::fs::create_dir_all(dest).map_err(place)?;
    let dir = Dir::open(dest).map_err(place)?;
    let fetch = |ptrs: &[crate::types::FramePtr]| reading.runtime.block_on(volume.fetch(ptrs));
    let reader = Reader { fs: &volume.fs, fetch: &fetch };
    let mut bar = Counting::new("restoring");
    let mut show = |report: &Report| {
        signals::wait_if_ending();
        bar.show(report.files + report.present, report.bytes);
    };
    let mut restore = Restore::new(reader, dir, args.overwrite, &mut show).comparing(args.verify);
    let done = sources.iter().try_for_each(|path| restore.copy(path)).and_then(|()| restore.finish());
    bar.finish();
    done.map_err(|e| stopped(&e))
}

/// What to say when a copy ended early.
pub fn stopped(e: &Stopped) -> Failure {
    let failure = match e {
        Stopped::Volume(Error::Log(e)) => seam::failure(e),
        e => Failure::from_error(ExitCode::Failed, "the restore stopped", e),
    };
    match failure.hint {
        None => failure.hint(WAY_OUT),
        Some(_) => failure,
    }
}
