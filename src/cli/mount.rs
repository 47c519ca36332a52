//! `embassyfs mount`: from flags and config file to a plan, and from the plan to a daemon.
//! Invariant: what can be known to fail without the store fails before the fork, on the user's terminal.

use super::daemon::{self, ReadyPipe, Side};
use super::exit::{ExitCode, Failure, Outcome};
use super::logging;
use super::options::{At, MountOptions, parse_duration, parse_past};
use super::seam::OpenRequest;
use super::serve::serve;
use super::supervise;
use super::{StoreArgs, absolute, required};
use crate::fuse::control_dir;
use crate::fuse::mount::{self as kernel, MountSettings};
use crate::fuse::table;
use crate::replica::{Trust, parse_head};
use crate::types::Head;
use ::log::LevelFilter;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the parent waits for a mount to become usable. Opening may replay a log over a slow link.
const USABLE_WAIT: Duration = Duration::from_secs(600);

/// Mount a volume.
///
/// Returns when the mount is usable, or with one line that says why not; the daemon goes on in the background.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(after_help = format!("\
Mount options (-o):
{}
Examples:
  embassyfs mount --store s3://embassy/land --key writer.key \\
    --state /var/lib/embassyfs/land -o allow_other,protection=strict /srv/land
  embassyfs mount --read-only --follow --store s3://embassy/land \\
    --key reader.key --state /var/lib/embassyfs/land /srv/land
  embassyfs mount --config /etc/embassyfs/land.toml
  embassyfs mount --read-only --at 2025-01-31T12:00:00Z \\
    --store s3://embassy/land --key reader.key \\
    --state /var/lib/embassyfs/land-january /srv/land-january

In /etc/fstab:
  /etc/embassyfs/land.toml  /srv/land  embassyfs  allow_other,_netdev  0  0", super::man::option_list()))]
pub struct MountArgs {
    #[command(flatten)]
    pub(super) store: StoreArgs,
    /// The key file: writer.key to write, reader.key to read.
    #[arg(long, value_name = "FILE")]
    pub(super) key: Option<PathBuf>,
    /// The directory for what this host keeps of the volume: unsent data, cache, lock, log. One per mount.
    #[arg(long, value_name = "DIR")]
    pub(super) state: Option<PathBuf>,
    /// Mount options, comma-separated; may be given several times, later ones win.
    #[arg(short = 'o', long = "options", value_name = "OPTION,...")]
    pub(super) options: Vec<String>,
    /// Mount without writing anything to the store; the reader's key is enough.
    #[arg(long)]
    pub(super) read_only: bool,
    /// With --read-only: move on as home ships, instead of showing one state.
    #[arg(long)]
    pub(super) follow: bool,
    /// With --read-only: refuse a store whose newest commit is older, such as 1h. A follower goes on and says so.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(super) max_age: Option<Duration>,
    /// With --read-only: refuse a store whose history does not hold this segment, as 'status' and 'versions' print it.
    #[arg(long, value_name = "SEQ:HASH", value_parser = parse_head)]
    pub(super) expect: Option<Head>,
    /// Show the volume as it was: a commit number, a time like 2025-01-31T12:00:00Z, @seconds since 1970, or newest. A
    /// time to come is refused.
    #[arg(long, value_name = "SEQ|TIME", value_parser = parse_past)]
    pub(super) at: Option<At>,
    /// Stay in the foreground and log to standard error.
    #[arg(long, short = 'f')]
    pub(super) foreground: bool,
    /// Log into this file (default in the background: embassyfs.log in the state directory).
    #[arg(long, value_name = "FILE")]
    pub(super) log_file: Option<PathBuf>,
    /// off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", env = "EMBASSYFS_LOG", value_parser = logging::parse_level)]
    pub(super) log_level: Option<LevelFilter>,
    /// Where to mount: a directory.
    pub(super) mountpoint: Option<PathBuf>,
    /// Source to show in the mount table when no `fsname=` is given (for mount(8), which compares it).
    #[arg(skip)]
    pub(super) fstab_source: Option<String>,
}

/// Everything a mount needs, checked as far as can be without touching the store.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// For opening the volume.
    pub request: OpenRequest,
    /// For the kernel; `fsname` is empty when it is to follow from the volume's name.
    pub settings: MountSettings,
    pub(super) foreground: bool,
    pub(super) log_file: Option<PathBuf>,
    pub(super) log_level: LevelFilter,
    /// A supervisor stands above the daemon: a mount that cannot be served is left to it.
    pub(super) supervise: bool,
    /// The mount point holds a dead mount, whose place the new one takes.
    pub(super) replace: bool,
}

/// Runs the command.
pub fn run(args: MountArgs) -> Outcome {
    start(plan(args)?)
}

/// Combines flags and config file; flags win.
pub fn plan(args: MountArgs) -> Result<MountPlan, Failure> {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let key = required(args.key.or(config.key), "--key FILE", "key")?;
    let state = required(args.state.or(config.state), "--state DIR", "state")?;
    let mountpoint = required(args.mountpoint.or(config.mountpoint), "MOUNTPOINT", "mountpoint")?;
    let at = match (args.at, config.at) {
        (Some(at), _) => Some(at),
        (None, Some(text)) => Some(parse_past(&text).map_err(|e| Failure::usage(format!("at: {e}")))?),
        (None, None) => None,
    };
    let level =
        |text: String| logging::parse_level(&text).map_err(|e| Failure::usage(format!("log-level: {e}")));
    let log_level =
        args.log_level.map_or_else(|| config.log_level.map(level).transpose(), |l| Ok(Some(l)))?;
    let mut options =
        MountOptions { read_only: config.read_only.unwrap_or(false), ..MountOptions::default() };
    config.options.iter().try_for_each(|word| options.apply_one(word))?;
    args.options.iter().try_for_each(|list| options.apply(list))?;
    options.read_only |= args.read_only;
    options.follow |= args.follow;
    if options.follow && !options.read_only {
        return Err(Failure::usage("--follow is for mounts that do not write").hint("add --read-only"));
    }
    if options.follow && at.is_some() {
        return Err(Failure::usage("--at shows one state, --follow moves on; they do not go together"));
    }
    if at.is_some() && !options.read_only {
        return Err(Failure::usage("--at shows the past, which cannot be written").hint("add --read-only"));
    }
    // The newest is what is shown without it; then what goes with that goes with it.
    let at = at.filter(|at| *at != At::Newest);
    let trust = Trust { expect: args.expect, max_age: args.max_age };
    if trust != Trust::default() && !options.read_only {
        return Err(
            Failure::usage("--expect and --max-age are for mounts that do not write").hint("add --read-only")
        );
    }
    if trust.max_age.is_some() && at.is_some() {
        return Err(Failure::usage("--at shows the past, however old; --max-age does not go with it"));
    }
    let fsname = options.fsname.clone().or(args.fstab_source).unwrap_or_default();
    let settings = MountSettings {
        allow_other: options.allow_other,
        read_only: options.read_only,
        suid: options.suid,
        dev: options.dev,
        exec: options.exec,
        relatime: options.relatime,
        read_ahead_kib: u32::try_from(options.read_ahead >> 10).unwrap_or(u32::MAX),
        ..MountSettings::new(absolute(&mountpoint)?, fsname)
    };
    let log_file = args.log_file.or(config.log_file);
    Ok(MountPlan {
        request: OpenRequest {
            store_url,
            store_options,
            key: absolute(&key)?,
            state: absolute(&state)?,
            read_only: options.read_only,
            at,
            protection: options.protection,
            sync_timeout: options.sync_timeout,
            cache_size: options.cache_size,
            memory_size: options.memory_size,
            dirty_size: options.dirty_size,
            uploads: options.uploads,
            size_limit: options.size_limit,
            relatime: options.relatime,
            heartbeat: options.heartbeat,
            trust,
            follow: options.follow.then_some(options.follow_interval),
        },
        settings,
        foreground: args.foreground || config.foreground.unwrap_or(false),
        log_file: log_file.map(|p| absolute(&p)).transpose()?,
        log_level: log_level.unwrap_or(LevelFilter::Info),
        supervise: options.supervise,
        replace: false,
    })
}

/// Mounts according to `plan`; returns in the parent when the mount is usable, in the daemon when it has ended.
pub fn start(mut plan: MountPlan) -> Outcome {
    check_place(&mut plan)?;
    let run = if plan.supervise { supervise::run } else { serve };
    if plan.foreground {
        return run(&plan, ReadyPipe::none());
    }
    let fork =
        daemon::fork().map_err(|e| Failure::from_error(ExitCode::Failed, "cannot start the daemon", &e))?;
    match fork {
        Side::Parent(child) => {
            let code = child.wait(USABLE_WAIT)?;
            // Once looked up it is found also while the root directory is busy. Nothing is lost if this fails.
            let _ = std::fs::symlink_metadata(plan.settings.mountpoint.join(control_dir::NAME));
            Ok(code)
        }
        Side::Child(pipe) => {
            let outcome = run(&plan, pipe.clone());
            if let Err(failure) = &outcome {
                ::log::error!("{failure}");
                pipe.failed(failure);
            }
            // Nobody reads our standard error, and the parent prints the failure.
            Ok(outcome.unwrap_or_else(|failure| failure.code))
        }
    }
}

/// Refuses early what cannot work, and makes the state directory.
fn check_place(plan: &mut MountPlan) -> Result<(), Failure> {
    let fail = |e: io::Error, path: &Path| {
        let code = if e.kind() == io::ErrorKind::ResourceBusy { ExitCode::Busy } else { ExitCode::Usage };
        Failure::from_error(code, format!("cannot mount at {}", path.display()), &e)
    };
    let given = plan.settings.mountpoint.clone();
    plan.settings.mountpoint = table::normalise(&given).map_err(|e| fail(e, &given))?;
    kernel::check_mountpoint(&plan.settings.mountpoint).map_err(|e| match e.kind() {
        io::ErrorKind::ResourceBusy => {
            fail(e, &given).hint(format!("'embassyfs umount {}' first", given.display()))
        }
        io::ErrorKind::NotFound => fail(e, &given).hint("make the directory first"),
        _ => fail(e, &given),
    })?;
    let state = &plan.request.state;
    if state.starts_with(&plan.settings.mountpoint) || plan.request.key.starts_with(&plan.settings.mountpoint)
    {
        return Err(Failure::usage("the state directory and the key must not lie below the mount point")
            .hint("the daemon would wait for itself"));
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
    made.map_err(|e| {
        Failure::from_error(ExitCode::Failed, format!("state directory {}", state.display()), &e)
    })
}
