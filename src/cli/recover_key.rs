//! `embassyfs recover-key`: a reader's key file from the passphrase slot in the store, for when all key files are lost.
//! Invariant: nothing is written unless the passphrase has proven the whole of `volume.json`, and no file is replaced.

use super::exit::{ExitCode, Failure, Outcome};
use super::init::read_passphrase;
use super::{StoreArgs, absolute, print, required, seam};
use std::path::PathBuf;

/// Make a reader's key file again, from the passphrase slot in the store.
///
/// For volumes made with 'init --passphrase-file', when no key file is at hand. The new file reads the whole volume,
/// as reader.key does. It does not write: the writer's signing key is in no slot, and if every writer.key is lost,
/// nothing can be added to the volume any more.
#[derive(clap::Args)]
#[command(after_help = "\
One try takes about a second and 256 MiB of memory.

Exit codes:
  0  the key file is written
  2  wrong usage, or the passphrase file cannot be read
  7  the store is unreachable, or holds no volume
  8  the passphrase is another one, the volume has none, volume.json is damaged, or OUT exists already

Examples:
  embassyfs recover-key --store s3://embassy/land \\
    --passphrase-file words.txt reader.key
  embassyfs recover-key --store file:///data/land \\
    --passphrase-file - reader.key < words.txt
  embassyfs versions --store file:///data/land --key reader.key")]
pub struct RecoverKeyArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The file with the passphrase that was given to init ('-': standard input).
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// The key file to write, for its owner only (mode 0600); a file that exists is never overwritten.
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: RecoverKeyArgs) -> Outcome {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let file = args.passphrase_file.or(config.passphrase_file);
    let file = required(file, "--passphrase-file FILE", "passphrase-file")?;
    let out = absolute(&args.out)?;
    // Looked at early, so that nobody waits for Argon2id in vain; saving looks again.
    if out.symlink_metadata().is_ok() {
        let what = format!("{} exists already, and a key file is never overwritten", out.display());
        return Err(Failure::new(ExitCode::Refused, what).hint("choose another place"));
    }
    let passphrase = read_passphrase(&file)?;
    let key = seam::recover_key(&store_url, &store_options, passphrase.as_bytes(), &out)?;
    print(&format!("volume {} ({}): reader's key file {}", key.name, key.volume, out.display()));
    Ok(ExitCode::Ok)
}
