//! `embassyfs man`: writes the manual pages, one for the program and one per command.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::KNOWN;
use std::path::PathBuf;

/// Write the manual pages (embassyfs.1, embassyfs-mount.1, ...) into a directory.
#[derive(clap::Args)]
pub struct ManArgs {
    /// The directory, which must exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// The mount options as a list for help texts.
pub fn option_list() -> String {
    KNOWN.iter().map(|(name, what)| format!("  {name:<26} {what}\n")).collect()
}

/// Runs the command.
pub fn run(args: ManArgs) -> Outcome {
    clap_mangen::generate_to(super::command(), &args.out).map_err(|e| {
        Failure::from_error(ExitCode::Failed, format!("writing to {}", args.out.display()), &e)
    })?;
    Ok(ExitCode::Ok)
}
