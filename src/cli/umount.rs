//! `embassyfs umount`: commits, ships within a bound, unmounts, waits for the daemon, and says what is unsent or lost.
//! Invariant: it never reports "all shipped" but on the daemon's word, it promises nothing about what is not committed,
//! and it ends in bounded time whatever state the daemon is in.

use super::copies::{self, Copies};
use super::exit::{ExitCode, Failure, Outcome};
use super::mounted::{self, Mounted};
use super::options::parse_duration;
use super::progress::Shipping;
use super::{print_error, print_json};
use crate::fuse::mount::{self as kernel, Pidfd, Unmount};
use crate::ops::control::{Client, ControlError, Request};
use crate::ops::status::{Ending, Status};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long the system call may take, and how long the daemon may take to close the volume after it.
const KERNEL_WAIT: Duration = Duration::from_secs(30);
const CLOSE_WAIT: Duration = Duration::from_secs(60);
/// How long the wait for a daemon that closes the volume needs no words: it ships its last checkpoint.
const QUIET_WAIT: Duration = Duration::from_secs(12);
/// How long to look whether a daemon that may go on has ended.
const LAZY_WAIT: Duration = Duration::from_secs(2);
/// How long a daemon whose connection was broken may take.
const FORCED_WAIT: Duration = Duration::from_secs(10);
/// As many processes are named that keep a mount busy.
const USERS_SHOWN: usize = 4;

/// Commit, ship and unmount.
///
/// Bounded in time; says what is still unsent, and what is lost. What was committed and is unsent stays in the state
/// directory, and the next mount ships it. What could not be committed (the local log has failed) is lost.
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  all is in the store (with --lazy: it was when the daemon was last asked)
  1  unmounted, and changes that were never committed are lost
  5  unmounted, but data is still only in the state directory, or it cannot be told because the daemon had died
  6  in use: still mounted, or unmounted here and still mounted in another mount namespace, which is named
  8  unmounted; another writer owns the volume, and what is unsent stays in the state directory

Examples:
  embassyfs umount /srv/land
  embassyfs umount --timeout 5m /srv/land   # wait longer for a slow link
  embassyfs umount --lazy /srv/land   # though somebody still uses it
  embassyfs umount --force /srv/land   # though the daemon does not answer")]
pub struct UmountArgs {
    /// How long to ship before unmounting.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    /// Break the connection if need be: processes that use the mount get errors. What is committed stays.
    #[arg(long)]
    force: bool,
    /// Take it out of the tree now; the daemon goes on until the last user has left.
    #[arg(long)]
    lazy: bool,
    /// Print the last status as JSON.
    #[arg(long)]
    json: bool,
    /// Where the volume is mounted.
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(args: UmountArgs) -> Outcome {
    let mount = mounted::find(&args.mountpoint)?;
    match mount.connect() {
        Ok(daemon) => with_daemon(&args, &mount, daemon),
        // Nobody listens: it has died. An ordinary unmount is right, and harmless should it live after all.
        Err(e) if mounted::nobody_listens(&e) => without_daemon(&args, &mount),
        Err(_) if args.force => without_daemon(&args, &mount),
        Err(e) => Err(mount.unreachable(&e)),
    }
}

fn with_daemon(args: &UmountArgs, mount: &Mounted, mut daemon: Client) -> Outcome {
    let mut bar = Shipping::new("shipping");
    let request = Request::Shutdown { timeout_ms: args.timeout.as_millis() as u64 };
    let answer = daemon.ask(request, &mut |status| bar.show(status));
    bar.finish();
    let known = match answer {
        Ok(status) => Some(status),
        Err(ControlError::Failed { message, status }) => {
            print_error(&format!("before unmounting: {message}"));
            status.map(|s| *s)
        }
        Err(ControlError::NoAnswer(why)) if args.force => {
            print_error(&format!("{why}; breaking its connection"));
            return without_daemon(args, mount);
        }
        Err(e) => {
            return Err(mount
                .failure("the daemon is stuck:", ExitCode::NoDaemon, &e)
                .hint("--force unmounts nevertheless; what is committed stays in the state directory"));
        }
    };
    // Opened while the daemon surely lives, so that the number means it and nobody else.
    let process = Pidfd::open(daemon.pid());
    let mut forced = take_out(args.lazy, args.force, mount)?;
    if !args.lazy
        && !forced
        && let Some(copies) = copies::of(&mount.identity)
    {
        if !args.force {
            return Err(still_held(mount, &copies, known.as_ref()));
        }
        mount.identity.abort().map_err(|e| {
            print_error(&format!("the connection cannot be broken: {e}"));
            still_held(mount, &copies, known.as_ref())
        })?;
        forced = true;
    }
    let wait = match (args.lazy, forced) {
        (true, _) => LAZY_WAIT,
        (_, true) => FORCED_WAIT,
        _ => CLOSE_WAIT,
    };
    let last = farewell(mount, &mut daemon, wait);
    let ended =
        process.and_then(|p| p.wait(if last.is_ok() { CLOSE_WAIT } else { LAZY_WAIT })).unwrap_or(false);
    if !ended && !args.lazy {
        return Err(not_ended(mount, &daemon));
    }
    match (last, known) {
        (Ok(status), _) => report(args, mount, &status),
        (Err(_), Some(status)) if !ended => report_going_on(args, mount, &status),
        // It ended before its farewell was heard. Where nothing was waiting and nobody held the mount, nothing is.
        (Err(_), Some(status)) if !status.has_unsent() => report(args, mount, &status),
        (Err(_), known) => Ok(report_unknown(mount, known)),
    }
}

/// Takes the mount out of the tree, for a daemon that has been told what for, and gives its last word.
pub(super) fn leave(mount: &Mounted, daemon: &mut Client) -> Result<Status, Failure> {
    let process = Pidfd::open(daemon.pid());
    take_out(false, false, mount)?;
    if let Some(copies) = copies::of(&mount.identity) {
        return Err(still_held(mount, &copies, None));
    }
    let last = farewell(mount, daemon, CLOSE_WAIT).map_err(|e| {
        mount
            .failure("unmounted, but how the daemon ended is not known:", ExitCode::NoDaemon, &e)
            .hint("look at its log, and at the state directory: a file 'fenced' says that it was handed over")
    })?;
    // What it said is so, whether its process is gone or not; a mount with its state directory would have to wait.
    if !process.and_then(|p| p.wait(CLOSE_WAIT)).unwrap_or(false) {
        print_error(&not_ended(mount, daemon).to_string());
    }
    Ok(last)
}

/// The daemon's last word. Who waits for it hears after a while what for.
fn farewell(mount: &Mounted, daemon: &mut Client, wait: Duration) -> Result<Status, ControlError> {
    let ask = |daemon: &mut Client, wait: Duration| {
        daemon.ask(Request::Farewell { timeout_ms: wait.as_millis() as u64 }, &mut |_| {})
    };
    let rest = wait.saturating_sub(QUIET_WAIT);
    match ask(daemon, wait.min(QUIET_WAIT)) {
        Err(ControlError::Failed { .. }) if !rest.is_zero() => {
            print_error(&format!(
                "{} is unmounted; waiting up to {} s more for its daemon (process {}) to close the volume",
                mount.path.display(),
                rest.as_secs(),
                daemon.pid()
            ));
            ask(daemon, rest)
        }
        answer => answer,
    }
}

/// What is unmounted here and lives on elsewhere: its daemon does not end, however long one waits.
fn still_held(mount: &Mounted, copies: &Copies, known: Option<&Status>) -> Failure {
    let path = mount.path.display();
    let waiting =
        known.and_then(Status::waiting_in_words).map_or(String::new(), |words| format!(" ({words})"));
    Failure::new(
        ExitCode::Busy,
        format!("{path} is unmounted here, but its daemon goes on, for the volume is still mounted {copies}{waiting}"),
    )
    .hint(format!(
        "{}; then the daemon closes the volume by itself, and it can be mounted again",
        copies.way_out()
    ))
}

fn not_ended(mount: &Mounted, daemon: &Client) -> Failure {
    let (path, pid) = (mount.path.display(), daemon.pid());
    Failure::new(
        ExitCode::NoDaemon,
        format!("{path} is unmounted, but its daemon (process {pid}) has not ended"),
    )
    .hint(
        "look at its log, and whether a mount namespace made just now holds it; it can be mounted again when it has ended",
    )
}

/// Unmounts; true when the connection had to be broken.
fn take_out(lazy: bool, force: bool, mount: &Mounted) -> Result<bool, Failure> {
    if !mount.identity.is_there() {
        return Ok(false); // somebody was faster, and what is there now is not ours to take away
    }
    let how = if lazy { Unmount::Lazy } else { Unmount::Normal };
    let error = match kernel::unmount_bounded(&mount.path, how, KERNEL_WAIT) {
        Ok(()) => return Ok(false),
        // Not where it has left the tree and waits for a daemon that is stuck.
        Err(e) if e.kind() != io::ErrorKind::TimedOut && !mount.identity.is_there() => return Ok(false),
        Err(e) => e,
    };
    let path = mount.path.display();
    let stuck = matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::TimedOut);
    if force && stuck {
        break_connection(mount)?;
        return Ok(true);
    }
    Err(match error.kind() {
        io::ErrorKind::ResourceBusy => {
            let users = mounted::users_of(&mount.path);
            let mut names: Vec<String> =
                users.iter().take(USERS_SHOWN).map(|(pid, name)| format!("{name} ({pid})")).collect();
            if users.len() > USERS_SHOWN {
                names.push("others".into());
            }
            let by = if names.is_empty() { String::new() } else { format!(" by {}", names.join(", ")) };
            Failure::new(ExitCode::Busy, format!("{path} is in use{by} and stays mounted"))
                .hint("end what uses it, or use --lazy (until they end) or --force (they get errors)")
        }
        io::ErrorKind::TimedOut => {
            Failure::new(ExitCode::NoDaemon, format!("unmounting {path} does not come to an end"))
                .hint("--force breaks the connection")
        }
        _ => Failure::from_error(ExitCode::Failed, format!("cannot unmount {path}"), &error),
    })
}

fn break_connection(mount: &Mounted) -> Result<(), Failure> {
    // Through fusectl first: it frees processes that wait, whatever umount2 then has to say. MNT_FORCE does the same
    // where fusectl is not mounted.
    let _ = mount.identity.abort();
    // A daemon that lives unmounts by itself when its connection breaks, and may have come before us.
    if !mount.identity.is_there() {
        return Ok(());
    }
    match kernel::unmount_bounded(&mount.path, Unmount::Force, KERNEL_WAIT) {
        Err(e) if mount.identity.is_there() => {
            Err(Failure::from_error(ExitCode::Failed, format!("cannot unmount {}", mount.path.display()), &e))
        }
        _ => Ok(()),
    }
}

/// The mount of a daemon that has died or does not answer.
fn without_daemon(args: &UmountArgs, mount: &Mounted) -> Outcome {
    if args.force {
        break_connection(mount)?;
    } else {
        take_out(args.lazy, args.force, mount)?;
    }
    Ok(report_unknown(mount, None))
}

/// Says what is unsent or lost, after the last word of a daemon that has closed the volume.
fn report(args: &UmountArgs, mount: &Mounted, last: &Status) -> Outcome {
    if args.json {
        print_json(last)?;
    }
    if let Some(words) = last.ending_in_words() {
        print_error(&format!("{} is unmounted; {words}", mount.path.display()));
    }
    Ok(exit_code(last.ending()))
}

fn exit_code(ending: Ending) -> ExitCode {
    match ending {
        Ending::Clean => ExitCode::Ok,
        Ending::Unsent => ExitCode::Unsent,
        // Not `Unsent`, which promises that the next mount ships it.
        Ending::Fenced => ExitCode::Refused,
        Ending::Lost => ExitCode::Failed,
    }
}

/// A daemon that serves its last users still commits and ships; nothing is lost yet.
fn report_going_on(args: &UmountArgs, mount: &Mounted, known: &Status) -> Outcome {
    if args.json {
        print_json(known)?;
    }
    let waiting = known.waiting_in_words();
    let so_far = waiting.as_ref().map_or(String::new(), |words| format!(" ({words})"));
    print_error(&format!(
        "{} is out of the tree and still in use; the daemon goes on until the last user has left{so_far}",
        mount.path.display()
    ));
    Ok(match (waiting, known.fenced) {
        (None, _) => ExitCode::Ok,
        (Some(_), true) => ExitCode::Refused,
        (Some(_), false) => ExitCode::Unsent,
    })
}

/// The daemon has not said how it ended; `known` is what it said before.
fn report_unknown(mount: &Mounted, known: Option<Status>) -> ExitCode {
    let known = known.unwrap_or_default();
    let before = known.waiting_in_words().map_or(String::new(), |words| format!(" (before: {words})"));
    let (then, code) = match known.fenced {
        true => (
            "another writer owns the volume; what was committed stays in the state directory",
            ExitCode::Refused,
        ),
        false => {
            ("mount it again with the same state directory to ship what was committed", ExitCode::Unsent)
        }
    };
    print_error(&format!(
        "{} is unmounted; its daemon had died or did not answer, so whether data is unsent cannot be told{before}: \
         {then}; what was not committed is lost",
        mount.path.display()
    ));
    code
}
