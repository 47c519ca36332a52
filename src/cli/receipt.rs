//! `embassyfs receipt`: a signed statement that a file's contents are durable abroad, and its check.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::parse_duration;
use super::progress::{Counting, Shipping};
use super::reading::ReadArgs;
use super::{StoreArgs, mounted, print, print_error, print_json, seam};
use crate::crypto::Hasher;
use crate::crypto::keyfile::{KeyFile, Role};
use crate::crypto::sign::PublicKey;
use crate::ops::control::{ControlError, Request};
use crate::ops::names::plain_path;
use crate::ops::newfile::NewFile;
use crate::ops::receipt::{Asked, Receipt, Untrue, believe};
use crate::ops::signed::Kind;
use crate::ops::status::{bytes, rfc3339};
use crate::replica::{Io, parse_head, receipt::chain_holds};
use crate::types::{VolumeId, unhex};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// No signed document but a manifest is larger.
const LEN_MAX: u64 = 1 << 20;

/// A signed receipt: these contents are durable in the store, at this commit; and its check.
///
/// Waits until everything written before is in the store, then reads the file from the newest commit that the store
/// holds, and signs its path, size, hash and modification time with the writer's key, together with the commit and the
/// store's newest segment. While others write the file, the receipt is for what that commit has, which is one state of
/// the file and never a mixture. Run at the mount that writes the volume, by its owner or root.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Exit codes:
  0  the receipt is written        1  no receipt: no such file in that commit, no regular file, too slow
  3  not mounted   4  no daemon    5  not everything is durable in the store within the time   8  fenced

Examples:
  embassyfs receipt /srv/land deeds/2026/17.pdf --out 17.receipt
  embassyfs receipt --timeout 10m /srv/land /srv/land/deeds/2026/17.pdf
  embassyfs receipt check 17.receipt --public-key auditor.key --content 17.pdf"
)]
pub struct ReceiptArgs {
    #[command(subcommand)]
    check: Option<Sub>,
    /// Give up after this time.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
    /// Write the receipt into this new file instead of to standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where the volume is mounted.
    #[arg(required = true)]
    mountpoint: Option<PathBuf>,
    /// The file: its path from the volume's root, or with the mount point before it.
    #[arg(required = true)]
    path: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum Sub {
    Check(CheckArgs),
}

/// Check a receipt: its signature, and on demand the contents and that the store still holds the commit.
#[derive(clap::Args)]
#[command(after_help = "\
With a key file the receipt must be one of that key's volume; 64 hexadecimal digits say only whose signature it must be.
With --store the whole chain of the volume is followed (one small request for each segment).

Exit codes:
  0  everything that was asked for holds
  9  it does not: FORGED OR ALTERED, ANOTHER VOLUME, CONTENT DIFFERS, or NOT IN THE CHAIN
  2  wrong usage   7  the store could not be asked, so nothing is known   8  the key is refused

Examples:
  embassyfs receipt check 17.receipt --public-key auditor.key \\
    --content /archive/17.pdf
  embassyfs receipt check 17.receipt --public-key 9c2f... \\
    --store s3://embassy/land --key auditor.key")]
pub struct CheckArgs {
    /// The writer's public key: a key file of the volume (auditor.key is enough), or 64 hexadecimal digits.
    #[arg(long, value_name = "KEYFILE|HEX")]
    public_key: String,
    /// A file that must have the contents that the receipt is for.
    #[arg(long, value_name = "FILE")]
    content: Option<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
    /// With --store: auditor.key or reader.key.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// What the receipt says and what was checked, as JSON.
    #[arg(long)]
    json: bool,
    /// The receipt.
    receipt: PathBuf,
}

/// Runs the command.
pub fn run(args: ReceiptArgs) -> Outcome {
    match args {
        ReceiptArgs { check: Some(Sub::Check(args)), .. } => check(args),
        ReceiptArgs { mountpoint: Some(mountpoint), path: Some(path), timeout, out, .. } => {
            issue(&mountpoint, &path, timeout, out.as_deref())
        }
        _ => Err(Failure::usage("MOUNTPOINT and PATH are missing")),
    }
}

fn issue(mountpoint: &Path, path: &Path, timeout: Duration, out: Option<&Path>) -> Outcome {
    let mount = mounted::find(mountpoint)?;
    let inside = path.strip_prefix(&mount.path).or_else(|_| path.strip_prefix(mountpoint)).unwrap_or(path);
    let path = plain_path(inside.as_os_str().as_bytes()).map_err(Failure::usage)?;
    // Before the wait, so that a name that is taken is told at once.
    let failed =
        |out: &Path, e| Failure::from_error(ExitCode::Failed, format!("writing {}", out.display()), &e);
    let file = out.map(|out| NewFile::begin(out).map_err(|e| failed(out, e))).transpose()?;
    let text = signed(&mount, Asked::File { path }, timeout)?;
    let wrote = match file {
        Some(mut file) => file.write_all(text.as_bytes()).and_then(|()| file.finish()),
        None => std::io::stdout().write_all(text.as_bytes()),
    };
    wrote.map_err(|e| failed(out.unwrap_or(Path::new("standard output")), e))?;
    Ok(ExitCode::Ok)
}

/// Has the daemon of a mount sign something, after everything written before is in the store.
pub(super) fn signed(mount: &mounted::Mounted, asked: Asked, timeout: Duration) -> Result<String, Failure> {
    let mut daemon = mount.daemon()?;
    let mut bar = Shipping::new("shipping");
    let request = Request::Sync { timeout_ms: timeout.as_millis() as u64 };
    let answer = daemon.ask(request, &mut |status| bar.show(status));
    bar.finish();
    answer.map_err(|e| {
        let fenced = matches!(&e, ControlError::Failed { status: Some(status), .. } if status.fenced);
        let code = if fenced { ExitCode::Refused } else { ExitCode::Unsent };
        mount.failure("nothing is signed: not everything is durable in the store for", code, &e)
    })?;
    daemon.signed(asked, timeout).map_err(|e| mount.failure("nothing is signed for", ExitCode::Failed, &e))
}

/// A signed document from a file.
pub(super) fn read_signed(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LEN_MAX).read_to_end(&mut text));
    read.map_err(|e| Failure::from_error(ExitCode::Failed, format!("reading {}", path.display()), &e))?;
    Ok(text)
}

/// The writer's public key and, from a key file, the volume it is of.
pub(super) fn public_key(text: &str) -> Result<(PublicKey, Option<VolumeId>), Failure> {
    if let Some(key) = unhex(text) {
        let key = PublicKey::from_bytes(&key);
        let key = key.map_err(|_| Failure::usage(format!("'{text}' is no public key")))?;
        return Ok((key, None));
    }
    let key = KeyFile::load(Path::new(text))
        .map_err(|e| Failure::from_error(ExitCode::Refused, "--public-key", &e))?;
    Ok((key.writer_public, Some(key.volume)))
}

/// What a statement that does not hold is told as.
pub(super) fn untrue(file: &Path, e: &Untrue) -> Failure {
    Failure::from_error(ExitCode::Found, file.display().to_string(), e)
}

fn check(args: CheckArgs) -> Outcome {
    let (key, volume) = public_key(&args.public_key)?;
    let volume = volume.map(|volume| volume.to_string());
    let text = read_signed(&args.receipt)?;
    let receipt: Receipt =
        believe(Kind::Receipt, &text, &key, volume.as_deref()).map_err(|e| untrue(&args.receipt, &e))?;
    if let Some(content) = &args.content {
        same_content(&receipt, content)?;
    }
    if args.store.store.is_some() || args.store.config.is_some() || args.key.is_some() {
        in_chain(&receipt.stand.head, &receipt.stand.volume, args.store, args.key)?;
    }
    if args.json {
        print_json(&json!({"receipt": receipt, "holds": true}))?;
        return Ok(ExitCode::Ok);
    }
    let stand = &receipt.stand;
    print(&format!(
        "true: '{}' of volume {} ({}), {} bytes, BLAKE3 {}, modified {}, was durable abroad at {}: commit {} of {}, \
         segment {}",
        receipt.path,
        stand.name,
        stand.volume,
        receipt.size,
        receipt.blake3,
        rfc3339::text(receipt.mtime),
        rfc3339::text(stand.durable),
        stand.commit.no,
        rfc3339::text(stand.commit.time),
        stand.head
    ));
    Ok(ExitCode::Ok)
}

fn same_content(receipt: &Receipt, path: &Path) -> Result<(), Failure> {
    let failed =
        |e: std::io::Error| Failure::from_error(ExitCode::Failed, format!("reading {}", path.display()), &e);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let (mut hasher, mut size, mut buffer) = (Hasher::default(), 0, vec![0; 1 << 20]);
    let mut bar = Counting::new("reading");
    loop {
        let n = file.read(&mut buffer).map_err(failed)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        size += n as u64;
        bar.part("bytes", size, receipt.size);
    }
    bar.finish();
    let hash = hasher.finish().to_string();
    if (size, &hash) == (receipt.size, &receipt.blake3) {
        return Ok(());
    }
    Err(Failure::new(
        ExitCode::Found,
        format!(
            "CONTENT DIFFERS: {} has {} ({size}) and BLAKE3 {hash}, the receipt is for {} bytes and {}",
            path.display(),
            bytes(size),
            receipt.size,
            receipt.blake3
        ),
    ))
}

/// Fails unless the chain in the store holds the segment.
fn in_chain(head: &str, volume: &str, store: StoreArgs, key: Option<PathBuf>) -> Result<(), Failure> {
    let head = parse_head(head).map_err(|e| Failure::new(ExitCode::Found, format!("the segment: {e}")))?;
    let reading = ReadArgs { store, key, state: None }.begin(Role::Auditor)?;
    if reading.place.key.volume.to_string() != volume {
        return Err(Failure::new(
            ExitCode::Found,
            format!(
                "ANOTHER VOLUME: --key is of volume {}, the receipt of {volume}",
                reading.place.key.volume
            ),
        ));
    }
    let found = chain_holds(&reading.place, head, &Io::on(reading.runtime.handle()));
    let (holds, findings) = found.map_err(|e| seam::failure(&e))?;
    findings.iter().for_each(|finding| print_error(&format!("{}: {}", finding.object, finding.detail)));
    match holds {
        Ok(()) => Ok(()),
        Err(why) => {
            Err(Failure::new(ExitCode::Found, format!("NOT IN THE CHAIN: {}: {why}", reading.store.0)))
        }
    }
}
