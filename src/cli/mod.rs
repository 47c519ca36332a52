//! The command line: one file per command; the only place that prints and that knows clap.
//! Invariant: results go to standard output, all else to standard error, and a failure is one line.

pub mod config;
mod copies;
pub mod daemon;
pub mod diff;
pub mod divergence;
pub mod drill;
mod elsewhere;
pub mod exit;
pub mod handover;
pub mod init;
pub mod logging;
pub mod man;
pub mod manifest;
pub mod mount;
pub mod mount_helper;
pub mod mounted;
pub mod options;
mod passing;
pub mod progress;
pub mod promote;
pub mod reading;
pub mod receipt;
pub mod recover_key;
mod relay;
pub mod restore;
pub mod seam;
pub mod serve;
mod session;
pub mod signals;
pub mod status;
mod supervise;
pub mod sync;
mod takeover;
pub mod umount;
pub mod upgrade;
pub mod verify;
pub mod versions;

use crate::ops::names::{json_told, told};
use crate::store::open::CREDENTIALS;
use clap::{CommandFactory, Parser, Subcommand};
use config::Config;
use exit::{ExitCode, Failure};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 not mounted; 4 daemon does not answer; 5 data is still only on this
host; 6 in use; 7 store unreachable; 8 refused (key, damage, fenced); 9 done, and what was looked for is there
(versions differ, damage). See embassyfs(1) and docs/operations.md.

Examples:
  embassyfs init --store s3://embassy/land --name land \\
    --keys /etc/embassyfs/land
  embassyfs mount --store s3://embassy/land \\
    --key /etc/embassyfs/land/writer.key \\
    --state /var/lib/embassyfs/land -o allow_other /srv/land
  embassyfs status /srv/land
  embassyfs sync /srv/land
  embassyfs umount /srv/land

In the embassy, from the store alone:
  embassyfs mount --read-only --store file:///data/land --key reader.key \\
    --state /var/lib/embassyfs/land /srv/land";

/// A file system whose every write goes through, sealed, to an object store in the data embassy.
#[derive(Parser)]
#[command(name = "embassyfs", version, after_help = EXAMPLES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Init(init::InitArgs),
    Mount(mount::MountArgs),
    #[command(visible_alias = "unmount")]
    Umount(umount::UmountArgs),
    Sync(sync::SyncArgs),
    Upgrade(upgrade::UpgradeArgs),
    Status(status::StatusArgs),
    Versions(versions::VersionsArgs),
    Diff(diff::DiffArgs),
    Restore(restore::RestoreArgs),
    Verify(verify::VerifyArgs),
    Promote(promote::PromoteArgs),
    Handover(handover::HandoverArgs),
    Accept(promote::AcceptArgs),
    Divergence(divergence::DivergenceArgs),
    Receipt(receipt::ReceiptArgs),
    Manifest(manifest::ManifestArgs),
    Drill(drill::DrillArgs),
    RecoverKey(recover_key::RecoverKeyArgs),
    /// What a daemon starts to go on with its mount.
    #[command(hide = true)]
    TakeOver,
    Man(man::ManArgs),
    #[command(hide = true)]
    MountHelper(mount_helper::HelperArgs),
}

/// The store, as several commands ask for it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct StoreArgs {
    /// The volume's store: file:///dir, s3://bucket/prefix, az://container/prefix or gs://bucket/prefix.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// An option for the store, such as aws_region=eu-north-1; may be given several times. The environment (AWS_...)
    /// counts too. Secrets belong there or into the config file: the command line is visible to everybody.
    #[arg(long = "store-option", value_name = "NAME=VALUE", value_parser = options::parse_pair)]
    pub store_options: Vec<(String, String)>,
    /// A TOML file that holds what the flags say, under the same names; flags win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl StoreArgs {
    /// The config file's content (empty without one).
    pub fn load_config(&self) -> Result<Config, Failure> {
        let config = Config::load(self.config.as_deref())?;
        if let Some(warning) = self.config.as_deref().and_then(|p| config::secrets_exposed(p, &config)) {
            print_error(&format!("warning: {warning}"));
        }
        Ok(config)
    }

    /// URL and options, flags before the config file.
    pub fn resolve(&self, config: &Config) -> Result<(String, BTreeMap<String, String>), Failure> {
        let url = required(self.store.clone().or_else(|| config.store.clone()), "--store URL", "store")?;
        let mut options = config.store_options.clone();
        options.extend(self.store_options.iter().cloned());
        if let Some(file) = options.get_mut(CREDENTIALS) {
            *file = absolute(Path::new(file))?.display().to_string();
        }
        Ok((url, options))
    }
}

/// The value of a flag that must be given, here or in the config file.
pub fn required<T>(value: Option<T>, flag: &str, key: &str) -> Result<T, Failure> {
    value.ok_or_else(|| {
        Failure::usage(format!("{flag} is missing")).hint(format!("give it, or '{key}' in --config FILE"))
    })
}

/// An absolute path, so that it stays right when the process leaves its directory.
pub fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|e| Failure::from_error(ExitCode::Usage, format!("path '{}'", path.display()), &e))
}

/// Prints a line of a result, which stays one line whatever it holds. A reader that has gone away (`| head`) is not an
/// error.
pub fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{}", told(line));
}

/// Prints a result of several lines. Who made it has seen to it that nobody else's words make a line of it.
pub fn print_lines(text: &str) {
    text.lines().for_each(print);
}

/// Prints what is not a result, as one line.
pub fn print_error(text: &str) {
    let _ = writeln!(std::io::stderr(), "embassyfs: {}", told(text));
}

/// Prints `value` as one JSON document.
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::from_error(ExitCode::Failed, "cannot write the result as JSON", &e))?;
    let _ = writeln!(std::io::stdout(), "{}", json_told(&text));
    Ok(())
}

/// The whole command line as clap knows it, for the manual.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command that `args` (the program's name first) ask for.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let outcome = dispatch(args);
    signals::wait_if_ending();
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            print_error(&failure.to_string());
            failure.code
        }
    }
}

fn dispatch(args: Vec<OsString>) -> exit::Outcome {
    let name = args.first().map(Path::new).and_then(Path::file_name);
    // The second is what mount(8) looks for when it finds the type in the mount table, to remount.
    if name.is_some_and(|n| n == "mount.embassyfs" || n == "mount.fuse.embassyfs") {
        return mount_helper::run(args.into_iter().skip(1).collect());
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print(); // help and version come this way too
            return Ok(if e.use_stderr() { ExitCode::Usage } else { ExitCode::Ok });
        }
    };
    match cli.command {
        Command::Init(args) => init::run(args),
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Sync(args) => sync::run(args),
        Command::Upgrade(args) => upgrade::run(args),
        Command::TakeOver => takeover::run(),
        Command::Status(args) => status::run(args),
        Command::Versions(args) => versions::run(args),
        Command::Diff(args) => diff::run(args),
        Command::Restore(args) => restore::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Promote(args) => promote::promote(args),
        Command::Handover(args) => handover::run(args),
        Command::Accept(args) => promote::accept(args),
        Command::Divergence(args) => divergence::run(args),
        Command::Receipt(args) => receipt::run(args),
        Command::Manifest(args) => manifest::run(args),
        Command::Drill(args) => drill::run(args),
        Command::RecoverKey(args) => recover_key::run(args),
        Command::Man(args) => man::run(args),
        Command::MountHelper(args) => mount_helper::run(args.words),
    }
}

#[cfg(test)]
#[path = "help_tests.rs"]
mod tests;
