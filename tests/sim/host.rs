//! Home: its machine, its ends, and what it was told.
//! Invariant: what home acknowledges after its power was cut was not heard by anybody.

use super::common::{World, no_panic};
use super::disk::SimDisk;
use super::store::{Link, Temper};
use embassyfs::clock::Env;
use embassyfs::fs::{Fs, Result as FsResult, Settings};
use embassyfs::log;
use embassyfs::log::volume::Parameters;
use embassyfs::ops::init::{READER_KEY, WRITER_KEY};
use embassyfs::replica::durable::Protection;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::replica::{Version, WaitError};
use embassyfs::store::Store;
use embassyfs::store::retry::{RetryPolicy, RetryStore};
use embassyfs::types::{CommitNo, Ino, Timestamp};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What home answers when it is no more.
pub const DOWN: i32 = libc::ENOTCONN;

/// The sizes a run is made with, and how bad its world is.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub seed: u64,
    pub parameters: Parameters,
    pub settings: Settings,
    pub disk_cache: u64,
    pub protection: Protection,
    /// Faults come so many times as often; 0: none.
    pub rough: u64,
}

/// What somebody was told, with the commits it is true of.
#[derive(Clone, Copy, Default, Debug)]
pub struct Told {
    /// An `fsync` was acknowledged at the volume's level.
    pub acked: u64,
    /// The embassy was said to hold it.
    pub remote: u64,
}

pub struct Host {
    pub world: World,
    pub sizes: Sizes,
    pub disk: SimDisk,
    link: Arc<Link>,
    home: Option<Volume>,
    told: Arc<Mutex<Told>>,
    /// The disk of a reader that has been here before.
    reader: SimDisk,
    pub readers: u64,
}

impl Host {
    pub fn new(sizes: Sizes, now: Timestamp) -> Host {
        let world = World::new(sizes.seed, sizes.parameters, now);
        let disk = |name: &str| SimDisk::new(&world.dir.path().join(name), &world);
        let (disk, reader) = (disk("home"), disk("embassy"));
        let link = world.store.link(1);
        let mut host =
            Host { world, sizes, disk, link, home: None, told: Arc::default(), reader, readers: 0 };
        host.rise().expect("a new volume opens");
        host
    }

    fn root(&self, name: &str) -> PathBuf {
        self.world.dir.path().join(name)
    }

    fn options(&self, link: &Arc<Link>, disk: &SimDisk, state: &str) -> OpenOptions {
        let env = Env { disk: Arc::new(disk.clone()), ..self.world.env() };
        let store = RetryStore::new(link.clone(), env.clone(), RetryPolicy::default());
        OpenOptions {
            store: Arc::new(store),
            key: self.world.key(WRITER_KEY),
            state: self.root(state),
            env,
            version: Version::Newest,
            trust: Default::default(),
            protection: self.sizes.protection,
            sync_timeout: Duration::from_secs(10),
            disk_cache: self.sizes.disk_cache,
            frame_cache: 8 << 20,
            uploads: 4,
            settings: self.sizes.settings,
        }
    }

    /// One try to open home over its disk.
    pub fn rise(&mut self) -> log::Result<()> {
        self.link = self.world.store.link(1);
        let options = self.options(&self.link, &self.disk, "home");
        self.home = Some(Volume::open_after(options, None, &self.world.io())?);
        Ok(())
    }

    pub fn home(&self) -> &Volume {
        self.home.as_ref().expect("home is open")
    }

    pub fn set_clock(&self, now: Timestamp) {
        *self.world.clock.wall.lock().unwrap() = now;
    }

    /// Home works no more: its machine is down, or it has failed.
    pub fn down(&self) -> bool {
        self.disk.is_down() || self.home.as_ref().is_none_or(|home| home.fs.failure().is_some())
    }

    /// Runs an operation at home as the FUSE side would.
    pub fn run<T>(&self, op: impl FnMut(&Fs) -> FsResult<T>) -> Result<T, i32> {
        self.breathe();
        if self.down() {
            return Err(DOWN);
        }
        let answer = self.world.run(self.home(), op).map_err(|e| e.errno());
        if self.down() { Err(DOWN) } else { answer }
    }

    /// The world goes on: threads have turns, time passes, things break.
    pub fn breathe(&self) {
        no_panic();
        let chance = &self.world.chance;
        for _ in 0..chance.below(4) {
            self.world.turns.give(chance.below(8) as usize);
        }
        if chance.one_in(6) {
            let longest = if chance.one_in(12) { 5_000 } else { 200 };
            self.world.pass(chance.millis(1, longest));
        }
        let rough = self.sizes.rough;
        if rough > 0 {
            if chance.per_mille(3 * rough) {
                self.world.store.weather();
            }
            if chance.per_mille(rough) {
                let temper = if chance.one_in(2) { Temper::ROUGH } else { Temper::CALM };
                self.world.store.set_temper(temper);
            }
            if chance.per_mille(rough) {
                self.disk.cut_within(60);
            }
            if chance.one_in(2000 / rough) {
                self.disk.fail_next_sync();
            }
            if chance.one_in(700 / rough) {
                self.disk.fill(chance.millis(500, 20_000));
                chance.fault("full disk");
            }
        }
    }

    /// The commit that holds all changes so far.
    pub fn newest(&self) -> u64 {
        self.home().fs.sync_point().0
    }

    /// Asks for a commit; with `wait` until it is known what came of it. True if it was acknowledged.
    pub fn commit(&self, wait: bool) -> bool {
        let home = self.home();
        let commit = home.fs.sync_point();
        let durable = home.durable().expect("home is a writer");
        home.fs.request_commit(commit, durable.waits_for_remote());
        if !wait || self.down() {
            return false;
        }
        let (disk, told, level) = (self.disk.clone(), self.told.clone(), self.sizes.protection);
        let (chance, answered) = (self.world.chance.clone(), Arc::new(Mutex::new(None)));
        let account = Arc::downgrade(durable);
        let answer = answered.clone();
        durable.wait(
            commit,
            Box::new(move |result: Result<(), WaitError>| {
                let heard = result.is_ok() && !disk.is_down();
                chance.event(&format!("fsync of {}: {heard}", commit.0), &[]);
                if heard {
                    let mut told = told.lock().unwrap();
                    told.acked = told.acked.max(commit.0);
                    let in_sync = || account.upgrade().is_some_and(|account| account.snapshot().in_sync);
                    if level == Protection::Strict || (level == Protection::Available && in_sync()) {
                        told.remote = told.remote.max(commit.0);
                    }
                }
                *answer.lock().unwrap() = Some(heard);
            }),
        );
        self.world.until("fsync", || answered.lock().unwrap().is_some() || self.disk.is_down());
        let heard = *answered.lock().unwrap();
        heard == Some(true)
    }

    /// Returns when the store holds everything, if home lives to see it.
    pub fn ship(&self) -> bool {
        let home = self.home();
        let commit = home.fs.sync_point();
        home.fs.request_commit(commit, true);
        self.world.until("shipping", || {
            self.breathe();
            let sent = home.durable().is_some_and(|durable| durable.snapshot().remote >= commit);
            sent || self.down()
        });
        !self.down()
    }

    /// Bytes in use, once they are `expected`; else what they are after a long while. The store can have a commit a
    /// moment before home counts it.
    pub fn used(&self, expected: u64) -> u64 {
        for _ in 0..100 {
            if self.home().fs.usage().used == expected {
                break;
            }
            self.world.pass(Duration::from_millis(100));
        }
        self.home().fs.usage().used
    }

    /// What has been promised by now.
    pub fn told(&self) -> Told {
        let mut told = self.told.lock().unwrap();
        if let Some(durable) = self.home.as_ref().and_then(Volume::durable) {
            let snapshot = durable.snapshot();
            told.remote = told.remote.max(snapshot.remote.0);
            if !self.disk.is_down() {
                told.acked = told.acked.max(snapshot.local.0);
            }
        }
        *told
    }

    /// Ends home as `umount` does. True if it ended well.
    pub fn close(&mut self, time: Duration) -> bool {
        let home = self.home.take().expect("home is open");
        home.close(time);
        let well = !self.disk.is_down() && home.fs.failure().is_none();
        self.end(home);
        well
    }

    fn end(&mut self, home: Volume) {
        self.link.cut();
        drop(home);
        // Tasks that were given up end.
        self.world.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        self.disk = self.disk.after();
    }

    /// Home's machine goes down, or only its process does.
    pub fn fall(&mut self) {
        let Some(home) = self.home.take() else {
            self.disk = self.disk.after();
            return;
        };
        self.link.cut();
        if !self.disk.is_down() && self.world.chance.one_in(2) {
            self.disk.cut_now();
        } else if !self.disk.is_down() {
            self.world.chance.fault("kill");
        }
        let after = self.disk.after(); // from here on the old process reaches nothing
        home.close(Duration::ZERO);
        self.end(home);
        self.disk = after;
    }

    /// A reader with an empty state directory, or one that has been here before.
    pub fn embassy(&mut self, version: Version, fresh: bool) -> log::Result<Volume> {
        self.readers += 1;
        let name = if fresh { format!("embassy{}", self.readers) } else { "embassy".into() };
        let disk = match fresh {
            true => SimDisk::new(&self.root(&name), &self.world),
            false => self.reader.clone(),
        };
        let link = self.world.store.link(2);
        let options = self.options(&link, &disk, &name);
        let settings = Settings { read_only: true, ..options.settings };
        let key = self.world.key(READER_KEY);
        Volume::open_after(OpenOptions { key, version, settings, ..options }, None, &self.world.io())
    }

    /// Inodes without names that could not be freed at the opening, because the store did not answer.
    pub fn not_freed(&self) -> Vec<Ino> {
        if self.sizes.rough > 0 { self.home().fs.orphans() } else { Vec::new() }
    }

    /// Newest commit that the store is known to hold.
    pub fn shipped(&self) -> CommitNo {
        CommitNo(self.told().remote)
    }

    /// Checkpoints in the store.
    pub fn checkpoints(&self) -> usize {
        let truth = self.world.store.truth();
        self.world.runtime.block_on(truth.list("checkpoint/", None, 10_000)).unwrap().len()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            if std::thread::panicking() {
                std::mem::forget(home); // its threads rest for ever; the run is over
            } else {
                home.close(Duration::ZERO);
            }
        }
    }
}
