//! `embassyfs diff`: what changed between two versions.

use super::exit::{ExitCode, Failure, Outcome};
use super::reading::{ReadArgs, parse_version};
use super::{print, print_json, seam};
use crate::crypto::keyfile::Role;
use crate::ops::changes::{Change, Changes, compare};
use crate::ops::names::{Names, plain_path, shown};
use crate::ops::status::rfc3339;
use crate::replica::Version;
use crate::replica::views::{View, Views};
use crate::tree::value::FileType;
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// Show what changed between two versions.
///
/// Compares the trees of the two versions and reads only what differs, so that the cost follows the change and not the
/// size of the volume. Only where the name of a changed file is not found near to it, names are read more widely.
#[derive(clap::Args)]
#[command(after_help = "\
Letters:
  A added          D deleted          R renamed, or moved (old -> new)
  M written to: contents, size, target, device number
  m attributes only: mode, owner, modification time, extended attributes, access control list
A directory that was moved is one line, with nothing of what it holds. Bytes that are no printable text are shown as
\\xNN. A file with several names is shown under one of them when it was written to.

Exit codes:
  0  the two versions hold the same        9  they differ
  2  wrong usage, or PATH is in neither version
  7  the store is unreachable or holds no volume    8  refused (key, damage, no such version)

Examples:
  embassyfs diff --store s3://embassy/land --key reader.key \\
    2026-11-20T03:00:00Z newest
  embassyfs diff --store s3://embassy/land --key reader.key \\
    1041 1042 deeds/2026
  embassyfs diff --store s3://embassy/land --key reader.key \\
    1041 newest --json | jq '.changes[].path'")]
pub struct DiffArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// The first version: a commit number, a time like 2025-01-31T12:00:00Z, @seconds, or newest.
    #[arg(value_parser = parse_version)]
    from: Version,
    /// The second version.
    #[arg(value_parser = parse_version)]
    to: Version,
    /// Only what is at or below this path of the volume.
    path: Option<OsString>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: DiffArgs) -> Outcome {
    let within =
        plain_path(args.path.as_ref().map_or(b"", |path| path.as_bytes())).map_err(Failure::usage)?;
    let reading = args.read.begin(Role::Reader)?;
    let views = reading.views(&[args.from, args.to])?;
    let [old, new] = views.views.as_slice() else {
        return Err(Failure::new(ExitCode::Failed, "two versions were not opened"));
    };
    let found = between(&views, old, new, &within)?;
    if found.changes.is_empty() && !is_in(&views, old, &within)? && !is_in(&views, new, &within)? {
        return Err(Failure::usage(format!("'{}' is in neither of the two versions", shown(&within)))
            .hint("give the path from the volume's root; without it all of the volume is compared"));
    }
    if args.json {
        print_json(&json!({
            "from": point(old),
            "to": point(new),
            "changes": found.changes.iter().map(as_json).collect::<Vec<_>>(),
            "keys": found.keys,
            "pages_read": found.pages_read,
        }))?;
    } else {
        found.changes.iter().for_each(|change| print(&line(change)));
    }
    Ok(if found.changes.is_empty() { ExitCode::Ok } else { ExitCode::Found })
}

fn between(views: &Views, old: &View, new: &View, within: &[u8]) -> Result<Changes, Failure> {
    let fetch = |ptrs: &[crate::types::FramePtr]| views.fetch(ptrs);
    let found = views.with(old, |old| views.with(new, |new| compare(old, new, &fetch, within)));
    found.map_err(|e| seam::failure(&e))
}

fn is_in(views: &Views, view: &View, path: &[u8]) -> Result<bool, Failure> {
    let fetch = |ptrs: &[crate::types::FramePtr]| views.fetch(ptrs);
    let found = views.with(view, |levels| Names::new(levels, &fetch).find(path));
    Ok(found.map_err(|e| seam::failure(&e))?.is_some())
}

fn point(view: &View) -> serde_json::Value {
    json!({"commit": view.commit.0, "time": view.time.map(rfc3339::text)})
}

/// One line of text for a change.
pub fn line(change: &Change) -> String {
    let slash = if change.of == FileType::Directory { "/" } else { "" };
    let path = shown(&change.path);
    match &change.from {
        Some(from) => format!("{} {}{slash} -> {path}{slash}", change.kind.letter(), shown(from)),
        None => format!("{} {path}{slash}", change.kind.letter()),
    }
}

/// The same for machines.
pub fn as_json(change: &Change) -> serde_json::Value {
    json!({
        "change": change.kind.letter().to_string(),
        "path": shown(&change.path),
        "from": change.from.as_deref().map(shown),
        "type": type_name(change.of),
    })
}

/// What a type is called in results.
pub fn type_name(of: FileType) -> &'static str {
    match of {
        FileType::Regular => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharDevice => "character device",
        FileType::BlockDevice => "block device",
    }
}
