//! What the commands share that look into a store without a mount: flags, key, store, a place for copies.
//! Invariant: a state directory that was not asked for is gone when the command ends, also by a signal.

use super::exit::{ExitCode, Failure};
use super::options::parse_past;
use super::{StoreArgs, absolute, print_error, required, seam, signals};
use crate::clock::Env;
use crate::crypto::keyfile::Role;
use crate::replica::views::{Place, Views};
use crate::replica::{Io, Version};
use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

/// Store, key and state directory.
#[derive(clap::Args)]
pub struct ReadArgs {
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// The key file: reader.key or writer.key; for 'verify' and 'receipt check' auditor.key is enough.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// A directory of this command's own for copies of what was read, kept for the next time; it also remembers the
    /// newest version seen, so that an older store is refused. Without it a temporary one is used.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
}

/// Everything that was needed to begin.
pub struct Reading {
    /// The store and the key.
    pub place: Place,
    /// Its URL and options, for who opens it once more.
    pub store: (String, BTreeMap<String, String>),
    /// The key's file.
    pub key: PathBuf,
    /// The runtime of its requests.
    pub runtime: Runtime,
    state: State,
}

enum State {
    Given(PathBuf),
    Temporary(PathBuf),
}

impl Drop for State {
    fn drop(&mut self) {
        if let State::Temporary(path) = self {
            let _ = std::fs::remove_dir_all(path); // copies of what is in the store
        }
    }
}

/// Takes a temporary state directory away from threads that are at work with it: they must not make it anew, so that an
/// empty file has its name afterwards.
fn take_away(path: &Path) {
    let aside = path.with_extension("gone");
    for _ in 0..100 {
        let _ = std::fs::rename(path, &aside); // it may not be there yet
        let _ = std::fs::remove_dir_all(&aside);
        if std::fs::File::create_new(path).is_ok() {
            break; // where a file is no directory is made
        }
    }
    // Who holds a directory open may put something into it while it is emptied.
    for _ in 0..1000 {
        match std::fs::remove_dir_all(&aside) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {}
            _ if aside.exists() => {}
            _ => break,
        }
    }
}

impl ReadArgs {
    /// Loads the key, opens the store, makes the state directory.
    pub fn begin(&self, role: Role) -> Result<Reading, Failure> {
        self.begin_saying(role, "run the command again")
    }

    /// The same; `way_out` is what to say when a signal ends the command.
    pub fn begin_saying(&self, role: Role, way_out: &'static str) -> Result<Reading, Failure> {
        let config = self.store.load_config()?;
        let store = self.store.resolve(&config)?;
        let key = required(self.key.clone().or(config.key), "--key FILE", "key")?;
        let state = match &self.state {
            Some(path) => State::Given(absolute(path)?),
            None => State::Temporary(temporary()),
        };
        let temporary = match &state {
            State::Given(_) => None,
            State::Temporary(path) => Some(path.clone()),
        };
        let end = move |signal| {
            print_error(&format!("ended by {signal}; {way_out}"));
            if let Some(path) = &temporary {
                take_away(path);
            }
            move || temporary.iter().for_each(|path| drop(std::fs::remove_file(path)))
        };
        signals::before_end(end)
            .map_err(|e| Failure::from_error(ExitCode::Failed, "watching for signals", &e))?;
        let (State::Given(path) | State::Temporary(path)) = &state;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|e| {
            Failure::from_error(ExitCode::Failed, format!("state directory {}", path.display()), &e)
        })?;
        let place = Place {
            key: seam::load_key(&key, role)?,
            store: seam::open_store(&store.0, &store.1)?,
            env: Env::system(),
        };
        Ok(Reading { place, store, key: absolute(&key)?, runtime: seam::runtime()?, state })
    }
}

impl Reading {
    /// The state directory.
    pub fn state(&self) -> &Path {
        let (State::Given(path) | State::Temporary(path)) = &self.state;
        path
    }

    /// Opens versions of the volume.
    pub fn views(&self, versions: &[Version]) -> Result<Views, Failure> {
        let io = Io::on(self.runtime.handle());
        Views::open(self.place.clone(), self.state(), versions, &io).map_err(|e| seam::failure(&e))
    }
}

/// A name for a new directory that nobody else has.
fn temporary() -> PathBuf {
    let name: [u8; 8] = Env::system().random_bytes();
    std::env::temp_dir().join(format!("embassyfs-{}", crate::types::hex(&name)))
}

/// A version, as `--at` takes it.
pub fn parse_version(text: &str) -> Result<Version, String> {
    parse_past(text).map(Version::from)
}
