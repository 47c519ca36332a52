//! The volume under test: home and its ends (a clean one, a sudden one), readers at the embassy, a clock that the test
//! turns.
//! Invariant: at any time one home is open, over a state directory that a real home could have left behind.

use super::common::World;
use embassyfs::clock::{Clock, Env};
use embassyfs::fs::{self, Fs, Settings};
use embassyfs::log::volume::Parameters;
use embassyfs::replica::Version;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::fault::{FaultStore, Faults};
use embassyfs::store::local::LocalStore;
use embassyfs::types::{CommitNo, Ino, Timestamp};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The sizes a run is made with.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub parameters: Parameters,
    pub dirty_max: u64,
    pub disk_cache: u64,
}

/// Small enough that many records, pages, segments and waits are gone through.
pub const SMALL: Sizes = Sizes {
    parameters: Parameters { record_size: 4 << 10, segment_size: 1 << 20, page_size: 4 << 10 },
    dirty_max: 128 << 10,
    disk_cache: 1 << 20,
};

/// As `init` and `mount` have them by default.
pub fn usual() -> Sizes {
    Sizes { parameters: Parameters::default(), dirty_max: 64 << 20, disk_cache: 10 << 30 }
}

/// With floods: the tree must find room in the cache, else a checkpoint can never hold all that it needs. With much
/// unwritten data, so that records are sealed before their commit.
pub const FLOODED: Sizes = Sizes { disk_cache: 1 << 30, dirty_max: 64 << 20, ..SMALL };

/// The wall clock stands still until it is set; the monotonic clock is the machine's.
struct TestClock {
    wall: Mutex<Timestamp>,
    real: Arc<dyn Clock>,
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        *self.wall.lock().unwrap()
    }
    fn monotonic(&self) -> Duration {
        self.real.monotonic()
    }
}

pub struct Host {
    pub world: World,
    sizes: Sizes,
    clock: Arc<TestClock>,
    /// What stands between the store and the home that is open.
    link: Arc<FaultStore>,
    home: Option<Volume>,
    state: String,
    /// State directories so far.
    states: u32,
    /// Homes that ended suddenly: their threads end beside the run.
    dying: Vec<std::thread::JoinHandle<()>>,
}

impl Host {
    pub fn new(sizes: Sizes, now: Timestamp) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::new(dir.path().join("store")));
        let world = World::over(store, dir, sizes.parameters);
        let clock = Arc::new(TestClock { wall: Mutex::new(now), real: Env::system().clock });
        let link = Arc::new(FaultStore::new(world.store.clone(), 0, Faults::default()));
        let state = "home".into();
        let mut host = Host { world, sizes, clock, link, home: None, state, states: 0, dying: Vec::new() };
        host.open();
        host
    }

    fn options(&self, state: &str) -> OpenOptions {
        let env = Env { clock: self.clock.clone(), ..Env::system() };
        let options = self.world.options(state);
        let settings = Settings { dirty_max: self.sizes.dirty_max, ..options.settings };
        OpenOptions { env, store: self.link.clone(), disk_cache: self.sizes.disk_cache, settings, ..options }
    }

    /// Opens home over its state directory.
    pub fn open(&mut self) {
        self.link = Arc::new(FaultStore::new(self.world.store.clone(), 0, Faults::default()));
        let begun = self.clock.monotonic();
        let home = loop {
            match Volume::open(self.options(&self.state), self.world.runtime.handle()) {
                // A last task of the home before, an upload that was given up, may still have the directory.
                Err(e)
                    if e.to_string().contains("is held by process")
                        && self.clock.monotonic() < begun + Duration::from_secs(20) =>
                {
                    std::thread::yield_now();
                }
                other => break other,
            }
        };
        self.home = Some(home.unwrap_or_else(|e| panic!("{} does not open: {e}", self.state)));
    }

    pub fn home(&self) -> &Volume {
        self.home.as_ref().expect("home is open")
    }

    pub fn set_clock(&self, now: Timestamp) {
        *self.clock.wall.lock().unwrap() = now;
    }

    /// Runs an operation at home as the FUSE side would.
    pub fn run<T>(&self, op: impl FnMut(&Fs) -> fs::Result<T>) -> Result<T, i32> {
        self.world.run(self.home(), op).map_err(|e| e.errno())
    }

    /// The commit that holds all changes so far.
    pub fn newest(&self) -> u64 {
        self.home().fs.sync_point().0
    }

    /// Asks for a commit; with `wait` until it is durable here. True if it was waited for.
    pub fn commit(&self, wait: bool) -> bool {
        let home = self.home();
        let commit = home.fs.sync_point();
        home.fs.request_commit(commit, false);
        if wait {
            let (sender, receiver) = channel();
            home.durable().unwrap().wait(commit, Box::new(move |answer| drop(sender.send(answer))));
            receiver.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        }
        wait
    }

    /// Returns when the store holds everything.
    pub fn ship(&self) {
        self.world.sync(self.home());
    }

    /// Bytes in use, once they are `expected`; else what they are after a long while. The store can have a commit a
    /// moment before home counts it.
    pub fn used(&self, expected: u64) -> u64 {
        let begun = self.clock.monotonic();
        loop {
            let used = self.home().fs.usage().used;
            if used == expected || self.clock.monotonic() > begun + Duration::from_secs(10) {
                return used;
            }
            std::thread::yield_now();
        }
    }

    /// Ends home as `umount` does; with no time for the store, the rest stays here.
    pub fn close(&mut self, time: Duration) {
        self.home().close(time);
        self.home = None;
    }

    /// Home's machine goes down at this moment: the next home opens over the disk as it is now, and the old one's
    /// words do not reach the store any more.
    pub fn crash(&mut self) -> io::Result<()> {
        self.link.set_outage(true);
        self.states += 1;
        let state = format!("home{}", self.states);
        let (from, to) = (self.world.state(&self.state), self.world.state(&state));
        image(&from, &to)?;
        let old = self.home.take().expect("home is open");
        self.dying.push(std::thread::spawn(move || {
            old.fs.fail("the machine is down");
            old.close(Duration::ZERO);
        }));
        self.state = state;
        Ok(())
    }

    /// A reader with an empty state directory, or one that has been here before.
    pub fn embassy(&mut self, version: Version, fresh: bool) -> embassyfs::log::Result<Volume> {
        let state = if fresh {
            self.states += 1;
            format!("embassy{}", self.states)
        } else {
            "embassy".into()
        };
        let key = self.world.key(embassyfs::ops::init::READER_KEY);
        let options = self.options(&state);
        let settings = Settings { read_only: true, ..options.settings };
        let options = OpenOptions { key, version, settings, ..options };
        Volume::open(options, self.world.runtime.handle())
    }

    /// Newest commit that the store is known to hold.
    pub fn shipped(&self) -> CommitNo {
        self.home().durable().unwrap().snapshot().remote
    }

    /// Inodes without names that could not be freed at the opening; none, for here the store always answers.
    pub fn not_freed(&self) -> Vec<Ino> {
        Vec::new()
    }

    /// Newest commit that is durable here.
    pub fn durable(&self) -> CommitNo {
        self.home().durable().unwrap().snapshot().local
    }

    /// Checkpoints in the store.
    pub fn checkpoints(&self) -> usize {
        self.world.runtime.block_on(self.world.store.list("checkpoint/", None, 10_000)).unwrap().len()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.close(Duration::ZERO);
        }
        for old in self.dying.drain(..) {
            drop(old.join());
        }
    }
}

/// Copies the disk as it is at one moment: again, until nothing moved meanwhile. The cache is left out, as it may be
/// lost at any time.
fn image(from: &Path, to: &Path) -> io::Result<()> {
    for _ in 0..1000 {
        let before = listing(from)?;
        drop(std::fs::remove_dir_all(to));
        let copied = before.keys().try_for_each(|name| {
            let path = to.join(name);
            std::fs::create_dir_all(path.parent().expect("it is below `to`"))?;
            std::fs::copy(from.join(name), path).map(drop)
        });
        if copied.is_ok() && listing(from)? == before {
            return Ok(());
        }
    }
    Err(io::Error::other("the state directory never stood still"))
}

/// Files of a state directory, with what tells a changed one.
fn listing(root: &Path) -> io::Result<BTreeMap<PathBuf, (u64, std::time::SystemTime)>> {
    let mut found = BTreeMap::new();
    for sub in ["", "log", "checkpoint"] {
        for entry in std::fs::read_dir(root.join(sub))? {
            let entry = entry?;
            // A file that went away while it was looked at makes the listing another one.
            if let Ok(meta) = entry.metadata()
                && meta.is_file()
            {
                let name = Path::new(sub).join(entry.file_name());
                found.insert(name, (meta.len(), meta.modified()?));
            }
        }
    }
    Ok(found)
}
