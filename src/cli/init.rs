//! `embassyfs init`: makes a volume in an empty store, and its key files.

use super::exit::{ExitCode, Failure, Outcome};
use super::{StoreArgs, absolute, print, print_error, print_json, required, seam};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A passphrase is read up to this length.
const PASSPHRASE_BYTES_MAX: u64 = 1024;
/// Below this length guessing is cheap whatever the words are.
const PASSPHRASE_CHARS_MIN: usize = 12;
const NAME_CHARS_MAX: usize = 64;

/// Make a new volume in an empty store, and its key files.
#[derive(clap::Args)]
#[command(after_help = "\
Four key files are written, each for its owner only (mode 0600):
  writer.key    reads and writes; stays on the registry host, and a copy in a safe
  reader.key    reads; for mounting in the embassy
  auditor.key   checks signatures, reads nothing; for verifying the archive, which no command does yet
  steward.key   signs packs, reads nothing; for clearing out old data, which no command does yet
Without writer.key and reader.key nobody can read the volume, unless it has a passphrase.
Without writer.key nobody can write to it. Keep copies apart from the host.

Examples:
  embassyfs init --store file:///data/land --name land \\
    --keys /etc/embassyfs/land
  embassyfs init --store s3://embassy/land --keys ./keys \\
    --store-option aws_region=eu-north-1
  embassyfs init --config /etc/embassyfs/land.toml --json")]
pub struct InitArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The directory for the key files; made if it is missing.
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
    /// The volume's name, shown in mount tables and messages: 1 to 64 letters, digits, '-', '_' and '.' (default: the
    /// last part of the URL).
    #[arg(long)]
    name: Option<String>,
    /// Also put the volume key into the store, locked with the passphrase in this file ('-': standard input). Then
    /// the passphrase alone gives a reader's key file again ('recover-key'), should all be lost. But whoever can read the store, its operator
    /// and host included, can try passphrases for as long as they like, unseen; nothing can revoke a copy they
    /// took. Use it only with a passphrase of six or more random words, or not at all.
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: InitArgs) -> Outcome {
    let config = args.store.load_config()?;
    let (store_url, store_options) = args.store.resolve(&config)?;
    let keys = absolute(&required(args.keys.or(config.keys), "--keys DIR", "keys")?)?;
    let name = args.name.or(config.name).unwrap_or_else(|| default_name(&store_url));
    check_name(&name)?;
    let passphrase = match args.passphrase_file.or(config.passphrase_file) {
        Some(path) => Some(read_passphrase(&path)?),
        None => None,
    };
    if let Some(text) = &passphrase {
        check_strength(text)?;
        print_error(
            "note: this volume gets a passphrase slot in the store: whoever can read the store can try passphrases \
             unseen and without limit, and who finds it reads everything",
        );
    }
    let request = seam::InitRequest { store_url, store_options, keys, name, passphrase };
    let made = seam::init(request)?;
    if args.json {
        let keys: Vec<String> = made.keys.iter().map(|p| p.display().to_string()).collect();
        print_json(
            &json!({"volume": made.name, "volume_id": made.volume_id, "store": made.store, "keys": keys}),
        )?;
        return Ok(ExitCode::Ok);
    }
    print(&format!("volume {} ({}) made in {}", made.name, made.volume_id, made.store));
    for key in &made.keys {
        print(&format!("  key file {}", key.display()));
    }
    print(
        "Keep copies of the key files apart from this host: without one of them nobody can open the volume.",
    );
    Ok(ExitCode::Ok)
}

fn default_name(url: &str) -> String {
    let last = url.split(['/', '?']).rfind(|part| !part.is_empty() && !part.ends_with(':'));
    last.unwrap_or("volume").chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).collect()
}

/// The name is shown in mount tables, where a comma or a space would confuse.
fn check_name(name: &str) -> Result<(), Failure> {
    let fine = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || !name.chars().all(fine) {
        return Err(Failure::usage(format!(
            "--name '{}' must be 1 to {NAME_CHARS_MAX} letters, digits, '-', '_' and '.'",
            name.escape_debug()
        )));
    }
    Ok(())
}

/// The passphrase in a file ('-': standard input), without the line's end.
pub(super) fn read_passphrase(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let fail = |e: std::io::Error| {
        Failure::from_error(ExitCode::Usage, format!("passphrase file {}", path.display()), &e)
    };
    let mut text = Zeroizing::new(String::with_capacity(PASSPHRASE_BYTES_MAX as usize + 1));
    if path == Path::new("-") {
        std::io::stdin().take(PASSPHRASE_BYTES_MAX + 1).read_to_string(&mut text).map_err(fail)?;
    } else {
        let file = std::fs::File::open(path).map_err(fail)?;
        file.take(PASSPHRASE_BYTES_MAX + 1).read_to_string(&mut text).map_err(fail)?;
    }
    if text.len() as u64 > PASSPHRASE_BYTES_MAX {
        return Err(Failure::usage(format!("the passphrase is longer than {PASSPHRASE_BYTES_MAX} bytes")));
    }
    // The line's end is the editor's, not the passphrase's.
    let end = text.trim_end_matches(['\n', '\r']).len();
    text.truncate(end);
    Ok(text)
}

fn check_strength(passphrase: &str) -> Result<(), Failure> {
    if passphrase.chars().count() < PASSPHRASE_CHARS_MIN {
        let what = format!("the passphrase is shorter than {PASSPHRASE_CHARS_MIN} characters");
        return Err(Failure::usage(what).hint("six or more random words are a good one"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(default_name("s3://bucket/a/land/"), "land");
        assert_eq!(default_name("file:///data/my,land"), "myland");
        assert_eq!(default_name("file:///"), "volume");
        assert!(check_name("land-1.x").is_ok());
        assert!(
            check_name("a,b").is_err() && check_name("").is_err() && check_name(&"x".repeat(65)).is_err()
        );
    }
}
