//! A writer at home, a store, readers abroad: the core without a kernel, for the tests that need one.
#![allow(dead_code)] // no test uses all of it
use embassyfs::clock::Env;
use embassyfs::crypto::keyfile::KeyFile;
use embassyfs::crypto::slots::Argon2Params;
use embassyfs::fs::{self, Caller, Fs, NewNode, Settings};
use embassyfs::log::volume::Parameters;
use embassyfs::ops::init::{InitParams, READER_KEY, WRITER_KEY, init};
use embassyfs::replica::Version;
use embassyfs::replica::durable::Protection;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::Store;
use embassyfs::store::local::LocalStore;
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// One volume and the hosts around it.
pub struct World {
    pub dir: tempfile::TempDir,
    pub runtime: Runtime,
    pub store: Arc<dyn Store>,
}

impl World {
    pub fn new(parameters: Parameters) -> World {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::new(dir.path().join("store")));
        World::over(store, dir, parameters)
    }

    pub fn over(store: Arc<dyn Store>, dir: tempfile::TempDir, parameters: Parameters) -> World {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let params = InitParams {
            name: "land".into(),
            passphrase: None,
            argon: Argon2Params::default(),
            parameters,
            keys_dir: dir.path().join("keys"),
        };
        runtime.block_on(init(&*store, &Env::system(), params)).unwrap();
        World { dir, runtime, store }
    }

    pub fn key(&self, name: &str) -> KeyFile {
        KeyFile::load(&self.dir.path().join("keys").join(name)).unwrap()
    }

    pub fn options(&self, state: &str) -> OpenOptions {
        OpenOptions {
            store: self.store.clone(),
            key: self.key(WRITER_KEY),
            state: self.state(state),
            env: Env::system(),
            version: Version::Newest,
            trust: Default::default(),
            protection: Protection::Local,
            sync_timeout: Duration::from_secs(10),
            disk_cache: 64 << 20,
            frame_cache: 8 << 20,
            uploads: 4,
            settings: Settings { dirty_max: 16 << 20, ..Settings::default() },
        }
    }

    pub fn state(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn home(&self) -> Volume {
        Volume::open(self.options("home"), self.runtime.handle()).unwrap()
    }

    pub fn embassy(&self, state: &str, version: Version) -> embassyfs::log::Result<Volume> {
        let key = self.key(READER_KEY);
        let options = self.options(state);
        let settings = Settings { read_only: true, ..options.settings };
        let options = OpenOptions { key, version, settings, ..options };
        Volume::open(options, self.runtime.handle())
    }

    pub fn sync(&self, volume: &Volume) -> CommitNo {
        let (sender, receiver) = channel();
        let commit = volume.fs.sync_point();
        volume.when_remote(Duration::from_secs(20), Box::new(move |r| sender.send(r).unwrap()));
        receiver.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
        commit
    }

    /// Runs an operation as the FUSE side does: fetch what is missing, wait for room, try again.
    pub fn run<T>(&self, volume: &Volume, mut op: impl FnMut(&Fs) -> fs::Result<T>) -> fs::Result<T> {
        let mut over_limit = false;
        loop {
            match op(&volume.fs) {
                Err(e @ (fs::Error::Busy | fs::Error::OverLimit))
                    if !(over_limit && matches!(e, fs::Error::OverLimit)) =>
                {
                    over_limit |= matches!(e, fs::Error::OverLimit);
                    let (sender, receiver) = channel();
                    volume.fs.when_space(Box::new(move || sender.send(()).unwrap()));
                    receiver.recv_timeout(Duration::from_secs(30)).unwrap();
                }
                Err(e) if e.missing().is_some() => {
                    self.runtime.block_on(volume.fetch(e.missing().unwrap())).unwrap();
                }
                other => return other,
            }
        }
    }
}

pub const ROOT_USER: Caller = Caller { uid: 0, gid: 0 };

pub fn node(kind: FileType, mode: u32) -> NewNode<'static> {
    NewNode { kind, mode, umask: 0, rdev: 0, target: b"" }
}

pub fn create(world: &World, volume: &Volume, dir: Ino, name: &str, data: &[u8]) -> Ino {
    let make = |fs: &Fs| fs.make(dir, name.as_bytes(), &node(FileType::Regular, 0o640), ROOT_USER);
    let ino = world.run(volume, make).unwrap().ino;
    for (i, chunk) in data.chunks(4096).enumerate() {
        world.run(volume, |fs| fs.write(ino, 4096 * i as u64, chunk, false)).unwrap();
    }
    ino
}

pub fn content(world: &World, volume: &Volume, dir: Ino, name: &str) -> Vec<u8> {
    let attr = world.run(volume, |fs| fs.lookup(dir, name.as_bytes())).unwrap();
    let mut out = Vec::new();
    while (out.len() as u64) < attr.inode.size {
        out.extend(world.run(volume, |fs| fs.read(attr.ino, out.len() as u64, 1 << 20)).unwrap());
    }
    out
}

/// Bytes that differ at every place and do not shrink.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| step()).collect()
}
