//! What a run happens in: one runtime without threads, in paused time; one store; one source of chance.
//! Invariant: nothing moves but when the run waits, and every wait has a bound in simulated time.

use super::chance::{Chance, SimClock};
use super::nonces::Nonces;
use super::store::SimStore;
use super::threads::Turns;
use embassyfs::clock::Env;
use embassyfs::crypto::keyfile::KeyFile;
use embassyfs::crypto::slots::Argon2Params;
use embassyfs::fs::{self, Fs};
use embassyfs::log::volume::Parameters;
use embassyfs::ops::init::{InitParams, init};
use embassyfs::replica::Io;
use embassyfs::replica::volume::Volume;
use embassyfs::types::Timestamp;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Longest that anything may take in a run, in simulated time. No weather lasts longer than a fraction of it.
pub const FOR_EVER: Duration = Duration::from_secs(3600);

pub struct World {
    pub dir: tempfile::TempDir,
    pub runtime: Arc<Runtime>,
    pub store: SimStore,
    pub turns: Turns,
    pub chance: Chance,
    pub clock: Arc<SimClock>,
    pub nonces: Nonces,
}

impl World {
    pub fn new(seed: u64, parameters: Parameters, now: Timestamp) -> World {
        count_panics();
        let dir = tempfile::tempdir().unwrap();
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let clock = Arc::new(SimClock::new(runtime.handle(), now));
        let chance = Chance::new(seed);
        let store = SimStore::new(chance.clone(), clock.clone());
        let params = InitParams {
            name: "land".into(),
            passphrase: None,
            argon: Argon2Params::default(),
            parameters,
            keys_dir: dir.path().join("keys"),
        };
        let (turns, nonces) = (Turns::default(), Nonces::default());
        let world = World { dir, runtime: Arc::new(runtime), store, turns, chance, clock, nonces };
        world.runtime.block_on(init(world.store.truth(), &world.env(), params)).unwrap();
        world
    }

    pub fn env(&self) -> Env {
        let (clock, random) = (self.clock.clone(), Arc::new(self.chance.clone()));
        Env { clock, random, threads: Arc::new(self.turns.clone()), ..Env::system() }
    }

    pub fn io(&self) -> Io {
        Io::driven(self.runtime.clone())
    }

    pub fn key(&self, name: &str) -> KeyFile {
        KeyFile::load(&self.dir.path().join("keys").join(name)).unwrap()
    }

    /// Lets time pass, and others have turns.
    pub fn pass(&self, time: Duration) {
        self.runtime.block_on(async { tokio::time::sleep(time).await });
        self.turns.give(self.chance.below(8) as usize);
    }

    /// Lets time pass until `done`; panics when that takes for ever.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let clock: &dyn embassyfs::clock::Clock = &*self.clock;
        let end = clock.monotonic() + FOR_EVER;
        while !done() {
            assert!(clock.monotonic() < end, "{what}: for ever");
            self.pass(self.chance.millis(1, 50));
        }
    }

    /// Runs an operation as the FUSE side does: fetch what is missing, wait for room, try again. Bad weather passes, so
    /// the operation happens in the end, unless the volume has failed.
    pub fn run<T>(&self, volume: &Volume, mut op: impl FnMut(&Fs) -> fs::Result<T>) -> fs::Result<T> {
        let mut over_limit = false;
        let mut left = 3000;
        loop {
            left -= 1;
            let error = match op(&volume.fs) {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if volume.fs.failure().is_some() || left == 0 {
                return Err(error);
            }
            match error {
                fs::Error::Busy | fs::Error::OverLimit
                    if !(over_limit && matches!(error, fs::Error::OverLimit)) =>
                {
                    over_limit |= matches!(error, fs::Error::OverLimit);
                    let room = Arc::new(AtomicBool::new(false));
                    let made = room.clone();
                    volume.fs.when_space(Box::new(move || made.store(true, Ordering::SeqCst)));
                    self.until("a writer waits for room", || room.load(Ordering::SeqCst));
                }
                error if error.errno() == libc::ENOSPC => self.pass(Duration::from_secs(1)),
                error => match error.missing() {
                    Some(ptrs) => {
                        if let Err(e) = self.runtime.block_on(volume.fetch(ptrs)) {
                            assert!(left > 1, "for ever: {e}");
                            self.pass(Duration::from_secs(1));
                        }
                    }
                    None => return Err(error),
                },
            }
        }
    }
}

/// Panics so far: the core catches its own, and goes on as after a failing disk. Here each is the end of the run.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn count_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
}

/// Ends the run if anything has panicked.
pub fn no_panic() {
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "something panicked; its message stands above");
}
