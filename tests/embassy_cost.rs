//! What a mount in the embassy asks of the store: a bounded number of round trips, and nothing but reading.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // it measures time

mod common;

use bytes::Bytes;
use common::{ROOT_USER, World, create, node};
use embassyfs::fs::Settings;
use embassyfs::log::volume::Parameters;
use embassyfs::ops::init::READER_KEY;
use embassyfs::replica::Trust;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::{ObjectInfo, Store, StoreError};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Hash, Head, Ino};
use futures::future::{BoxFuture, FutureExt};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Each request takes this long, so that the time of an opening tells how many came one after the other.
const ROUND_TRIP: Duration = Duration::from_millis(100);
const ROUND_TRIPS_MAX: u32 = 10;

/// A store as one whose credential can only read sees it, far away.
struct Abroad {
    inner: Arc<dyn Store>,
    requests: AtomicUsize,
}

type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

impl Abroad {
    fn far<'a, T: Send + 'a>(&'a self, answer: Answer<'a, T>) -> Answer<'a, T> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        async {
            tokio::time::sleep(ROUND_TRIP).await;
            answer.await
        }
        .boxed()
    }
}

impl Store for Abroad {
    fn put_new(&self, name: &str, _: Bytes) -> Answer<'_, ()> {
        panic!("a reader puts {name}");
    }
    fn get_range(&self, name: &str, range: Range<u64>) -> Answer<'_, Bytes> {
        self.far(self.inner.get_range(name, range))
    }
    fn get_suffix(&self, name: &str, len: u64) -> Answer<'_, (Bytes, u64)> {
        self.far(self.inner.get_suffix(name, len))
    }
    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Answer<'_, Vec<ObjectInfo>> {
        self.far(self.inner.list(prefix, after, limit))
    }
    fn delete(&self, name: &str) -> Answer<'_, ()> {
        panic!("a reader deletes {name}");
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// Opens with an empty state directory, and looks at the root. Gives the volume and the round trips it took.
fn open(
    world: &World,
    state: &str,
    follow: bool,
    trust: Trust,
) -> embassyfs::log::Result<(Volume, u32, usize)> {
    let store = Arc::new(Abroad { inner: world.store.clone(), requests: AtomicUsize::new(0) });
    let options = world.options(state);
    let follow = follow.then_some(Duration::from_millis(10));
    let settings = Settings { read_only: true, follow, ..options.settings };
    let options =
        OpenOptions { store: store.clone(), key: world.key(READER_KEY), settings, trust, ..options };
    let since = Instant::now();
    let volume = Volume::open(options, world.runtime.handle())?;
    world.run(&volume, |fs| fs.getattr(Ino::ROOT)).unwrap();
    let round_trips = since.elapsed().as_millis() / ROUND_TRIP.as_millis();
    Ok((volume, round_trips as u32, store.requests.load(Ordering::Relaxed)))
}

#[test]
fn a_mount_takes_a_bounded_number_of_round_trips_whatever_the_volume_holds() {
    let world = World::new(Parameters::default());
    let mut home = world.home();
    let file = create(&world, &home, Ino::ROOT, "ledger", b"1");
    world.sync(&home);
    let mut found = vec![("one file", open(&world, "small", false, Trust::default()).unwrap())];
    for d in 0..20 {
        let name = format!("d{d}");
        let make = |fs: &embassyfs::fs::Fs| {
            fs.make(Ino::ROOT, name.as_bytes(), &node(FileType::Directory, 0o755), ROOT_USER)
        };
        let dir = world.run(&home, make).unwrap().ino;
        for f in 0..1000 {
            let name = format!("f{f}");
            world
                .run(&home, |fs| fs.make(dir, name.as_bytes(), &node(FileType::Regular, 0o600), ROOT_USER))
                .unwrap();
        }
    }
    home.close(Duration::from_secs(20)); // with a checkpoint
    drop(home);
    found.push(("20,000 files", open(&world, "large", false, Trust::default()).unwrap()));
    home = world.home();
    for n in 0..240u64 {
        home.fs.write(file, n, b"2", false).unwrap();
        world.sync(&home);
    }
    found
        .push(("240 segments behind the checkpoint", open(&world, "long", false, Trust::default()).unwrap()));
    for (what, (_, round_trips, requests)) in &found {
        println!("{what}: {round_trips} round trips, {requests} requests");
        assert!(*round_trips <= ROUND_TRIPS_MAX, "{what}: {round_trips}");
    }
    home.close(Duration::from_secs(20));
}

#[test]
fn reading_is_all_that_a_follower_needs() {
    let world = World::new(Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "first", b"1");
    world.sync(&home);
    let (abroad, _, _) = open(&world, "abroad", true, Trust::default()).unwrap();
    create(&world, &home, Ino::ROOT, "second", b"2");
    world.sync(&home);
    let since = Instant::now();
    while world.run(&abroad, |fs| fs.lookup(Ino::ROOT, b"second")).is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "the second file is not seen");
        std::thread::sleep(Duration::from_millis(10));
    }
    abroad.close(Duration::ZERO);
    home.close(Duration::from_secs(20));
}

#[test]
fn a_head_that_is_expected_must_be_in_the_chain() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "first", b"1");
    world.sync(&home);
    let (abroad, ..) = open(&world, "one", false, Trust::default()).unwrap();
    let head = abroad.head.unwrap();
    home.fs.write(file, 0, b"2", false).unwrap();
    world.sync(&home);
    let with = |state: &str, expect: Head| {
        let trust = Trust { expect: Some(expect), max_age: None };
        open(&world, state, false, trust).map(drop).map_err(|e| e.to_string())
    };
    with("two", head).unwrap();
    let other = with("three", Head { hash: Hash([1; 32]), ..head }).unwrap_err();
    assert!(other.contains("FORK"), "{other}");
    let beyond = with("four", Head { seq: embassyfs::types::Seq(head.seq.0 + 9), ..head }).unwrap_err();
    assert!(beyond.contains("ROLLBACK"), "{beyond}");
    home.close(Duration::from_secs(20));
}

#[test]
fn an_idle_writer_gives_signs_of_life_that_leave_nothing_to_do() {
    let world = World::new(Parameters::default());
    let options = world.options("home");
    let settings = Settings { heartbeat: Some(Duration::from_millis(100)), ..options.settings };
    let home = Volume::open(OpenOptions { settings, ..options }, world.runtime.handle()).unwrap();
    create(&world, &home, Ino::ROOT, "first", b"1");
    let first = world.sync(&home);
    let since = Instant::now();
    while home.durable().unwrap().snapshot().remote.0 < first.0 + 5 {
        assert!(since.elapsed() < Duration::from_secs(20), "no sign of life");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((home.fs.dirty_bytes(), home.fs.failure()), (0, None));
    home.close(Duration::from_secs(20));
    let trust = Trust { max_age: Some(Duration::from_secs(60)), expect: None };
    assert!(open(&world, "young", false, trust).is_ok());
    std::thread::sleep(Duration::from_millis(5));
    let trust = Trust { max_age: Some(Duration::from_millis(1)), expect: None };
    let refused = open(&world, "old", false, trust).map(drop).unwrap_err().to_string();
    assert!(refused.contains("FROZEN OR SILENT"), "{refused}");
}
