//! Taking a volume over, giving it away, and taking it back: one chain, one writer, and nothing that anybody was told is
//! stored is lost.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{ROOT_USER, World, content, create, node};
use embassyfs::clock::Env;
use embassyfs::fs::Settings;
use embassyfs::log::statedir::StateDir;
use embassyfs::log::volume::Parameters;
use embassyfs::log::{Error, Result};
use embassyfs::ops::init::{READER_KEY, WRITER_KEY};
use embassyfs::replica::divergent::divergences;
use embassyfs::replica::promote::{Came, Promotion, Report, promote};
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::replica::{Trust, Version, context_of};
use embassyfs::store::{ObjectInfo, Store, StoreError};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Epoch, Ino};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

fn promotion(world: &World, state: &str, accept: Option<&str>) -> Promotion {
    Promotion {
        store: world.store.clone(),
        key: world.key(WRITER_KEY),
        state: world.state(state),
        env: Env::system(),
        host: state.into(),
        reason: "a test".into(),
        accept: accept.map(str::to_owned),
        trust: Trust::default(),
    }
}

fn promoted(world: &World, state: &str) -> Report {
    world.runtime.block_on(promote(&promotion(world, state, None))).unwrap()
}

fn accepted(world: &World, state: &str, name: &str) -> Result<Report> {
    world.runtime.block_on(promote(&promotion(world, state, Some(name))))
}

fn writer(world: &World, state: &str) -> Result<Volume> {
    Volume::open(world.options(state), world.runtime.handle())
}

/// Why it cannot be opened for writing.
fn refused(world: &World, state: &str) -> String {
    match writer(world, state) {
        Err(Error::Refused(why)) => why,
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("{state} was opened"),
    }
}

fn sync_fails(volume: &Volume) -> String {
    let (sender, receiver) = std::sync::mpsc::channel();
    volume.when_remote(Duration::from_secs(20), Box::new(move |r| sender.send(r).unwrap()));
    receiver.recv_timeout(Duration::from_secs(30)).unwrap().unwrap_err().to_string()
}

fn names(world: &World, volume: &Volume) -> Vec<String> {
    let items = world.run(volume, |fs| fs.readdir(Ino::ROOT, 0, 100_000)).unwrap();
    let all = items.into_iter().map(|item| String::from_utf8(item.name).unwrap());
    let mut names: Vec<String> = all.filter(|name| name != "." && name != "..").collect();
    names.sort();
    names
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn the_home_that_was_overtaken_is_fenced_and_what_it_had_not_sent_is_kept() {
    let world = World::new(Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "shared", b"1");
    create(&world, &home, Ino::ROOT, "written later", b"old");
    world.sync(&home);
    let report = promoted(&world, "abroad");
    assert_eq!((report.came, report.epoch, report.barriers), (Came::Promoted, Epoch(2), 0));
    create(&world, &home, Ino::ROOT, "lost", b"nobody has this");
    let why = sync_fails(&home);
    assert!(why.contains("FENCED") && why.contains("abroad") && why.contains("a test"), "{why}");
    assert!(home.fs.failure().is_some());
    home.close(LONG);
    drop(home);
    assert!(refused(&world, "home").contains("FENCED"));
    // To read with its state directory would show what is in nobody's history.
    let OpenOptions { settings, .. } = world.options("home");
    let settings = Settings { read_only: true, ..settings };
    let options = OpenOptions { key: world.key(READER_KEY), settings, ..world.options("home") };
    match Volume::open(options, world.runtime.handle()) {
        Err(Error::Refused(why)) => assert!(why.contains("divergence"), "{why}"),
        other => panic!("{:?}", other.map(|volume| volume.opened)),
    }

    let abroad = writer(&world, "abroad").unwrap();
    assert_eq!(names(&world, &abroad), ["shared", "written later"]);
    create(&world, &abroad, Ino::ROOT, "new", b"2");
    world.sync(&abroad);
    let (dir, store) = (StateDir::look(&world.state("home")), world.store.clone());
    let [lost] = &divergences(&dir).unwrap()[..] else { panic!("one divergence") };
    assert_eq!((lost.epoch, lost.set_aside), (Epoch(1), false));
    let beside = async {
        let ctx = context_of(&*store, &world.key(READER_KEY)).await.unwrap();
        lost.beside(&ctx, store.clone()).await.unwrap()
    };
    let (store, _) = world.runtime.block_on(beside);
    let options =
        OpenOptions { store: Arc::new(store), key: world.key(READER_KEY), settings, ..world.options("look") };
    let found = Volume::open(options, world.runtime.handle()).unwrap();
    assert_eq!(names(&world, &found), ["lost", "shared", "written later"]);
    assert_eq!(content(&world, &found, Ino::ROOT, "lost"), b"nobody has this");
    abroad.close(LONG);
}

#[test]
fn a_volume_goes_there_and_back_and_each_has_what_the_other_wrote() {
    let world = World::new(Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "a", b"home");
    world.sync(&home);
    promoted(&world, "abroad");
    create(&world, &home, Ino::ROOT, "lost", b"x");
    // As a crash leaves it: the newest segment has no end.
    home.fs.request_commit(home.fs.sync_point(), false);
    sync_fails(&home);
    home.close(LONG);
    drop(home);
    let newest = StateDir::look(&world.state("home")).log_segments().unwrap().last().unwrap().0;
    let path = world.state("home").join(format!("log/{newest}"));
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 344 - 40]).unwrap();

    let abroad = writer(&world, "abroad").unwrap();
    create(&world, &abroad, Ino::ROOT, "b", b"abroad");
    world.sync(&abroad);
    assert!(accepted(&world, "home", "home").unwrap_err().to_string().contains("has not handed it over"));
    abroad.close(LONG);
    abroad.hand_over("abroad", "home").unwrap();
    drop(abroad);
    assert!(refused(&world, "abroad").contains("HANDED OVER to `home`"));
    assert!(accepted(&world, "home", "other").unwrap_err().to_string().contains("not to `other`"));
    let report = accepted(&world, "home", "home").unwrap();
    assert_eq!((report.came, report.epoch), (Came::Promoted, Epoch(3)));
    assert_eq!(report.set_aside, Some(world.state("home").join("divergent/00000001")));
    let home = writer(&world, "home").unwrap();
    assert_eq!(names(&world, &home), ["a", "b"]);
    assert_eq!(content(&world, &home, Ino::ROOT, "b"), b"abroad");
    let again = accepted(&world, "third", "home").unwrap_err().to_string();
    assert!(again.contains("has not handed it over"), "{again}");
    create(&world, &home, Ino::ROOT, "c", b"back");
    world.sync(&home);
    home.close(LONG);
    home.hand_over("home", "abroad").unwrap();
    drop(home);
    accepted(&world, "abroad", "abroad").unwrap();
    let abroad = writer(&world, "abroad").unwrap();
    assert_eq!(names(&world, &abroad), ["a", "b", "c"]);
    abroad.close(LONG);
    let found = divergences(&StateDir::look(&world.state("home"))).unwrap();
    assert!(found[0].set_aside && found[0].segments.iter().all(|part| part.trailer.is_some()), "{found:?}");
}

#[test]
fn of_two_at_once_one_wins_and_done_again_it_says_so() {
    for round in 0..12 {
        let world = World::new(Parameters::default());
        if round % 2 == 0 {
            let home = world.home();
            create(&world, &home, Ino::ROOT, "a", b"home");
            world.sync(&home);
            home.close(LONG);
        }
        let [one, two] = ["one", "two"].map(|state| promotion(&world, state, None));
        let (first, second) = world.runtime.block_on(async { tokio::join!(promote(&one), promote(&two)) });
        let (won, lost) = match (&first, &second) {
            (Ok(report), Err(Error::Fenced { detail })) => (("one", report), ("two", detail)),
            (Err(Error::Fenced { detail }), Ok(report)) => (("two", report), ("one", detail)),
            // The second came when the first was done: it took the volume from it.
            (Ok(a), Ok(b)) if a.epoch != b.epoch => continue,
            other => panic!("{other:?}"),
        };
        assert_eq!((won.1.came, won.1.epoch), (Came::Promoted, Epoch(2)));
        assert!(lost.1.contains(won.0), "{}", lost.1);
        assert_eq!(promoted(&world, won.0).came, Came::Before);
        let refusal = refused(&world, lost.0);
        assert!(refusal.contains("promote"), "{refusal}");
        let volume = writer(&world, won.0).unwrap();
        create(&world, &volume, Ino::ROOT, "b", b"1");
        world.sync(&volume);
        volume.close(LONG);
        drop(volume);
        assert_eq!(promoted(&world, won.0).came, Came::Writer);
    }
}

/// A store in front of which home is always faster: whenever somebody wants to put a segment, home does first.
struct Racing {
    inner: Arc<dyn Store>,
    home: Mutex<Option<Arc<Volume>>>,
}

impl Racing {
    async fn home_first(&self) {
        let Some(home) = self.home.lock().clone() else { return };
        let writing = tokio::task::spawn_blocking(move || {
            if home.fs.failure().is_some() {
                return;
            }
            let commit = home.fs.sync_point();
            let name = format!("raced {}", commit.0);
            drop(home.fs.make(Ino::ROOT, name.as_bytes(), &node(FileType::Directory, 0o755), ROOT_USER));
            let (sender, receiver) = std::sync::mpsc::channel();
            home.when_remote(Duration::from_secs(20), Box::new(move |r| drop(sender.send(r))));
            drop(receiver.recv_timeout(Duration::from_secs(30)).unwrap());
        });
        writing.await.unwrap();
    }
}

impl Store for Racing {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, std::result::Result<(), StoreError>> {
        let name = name.to_owned();
        async move {
            if name.starts_with("log/") {
                self.home_first().await;
            }
            self.inner.put_new(&name, body).await
        }
        .boxed()
    }
    fn get_range(
        &self,
        name: &str,
        range: Range<u64>,
    ) -> BoxFuture<'_, std::result::Result<Bytes, StoreError>> {
        self.inner.get_range(name, range)
    }
    fn get_suffix(
        &self,
        name: &str,
        len: u64,
    ) -> BoxFuture<'_, std::result::Result<(Bytes, u64), StoreError>> {
        self.inner.get_suffix(name, len)
    }
    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, std::result::Result<Vec<ObjectInfo>, StoreError>> {
        self.inner.list(prefix, after, limit)
    }
    fn delete(&self, name: &str) -> BoxFuture<'_, std::result::Result<(), StoreError>> {
        self.inner.delete(name)
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[test]
fn a_home_that_is_always_faster_is_stopped_by_a_barrier_and_followers_go_past_it() {
    let world = World::new(Parameters::default());
    let home = Arc::new(world.home());
    create(&world, &home, Ino::ROOT, "a", b"home");
    world.sync(&home);
    let options = world.options("reader");
    let settings = Settings { read_only: true, follow: Some(Duration::from_secs(3600)), ..options.settings };
    let options = OpenOptions { key: world.key(READER_KEY), settings, ..options };
    let reader = Volume::open(options, world.runtime.handle()).unwrap();

    let racing = Racing { inner: world.store.clone(), home: Mutex::new(Some(home.clone())) };
    let promotion = Promotion { store: Arc::new(racing), ..promotion(&world, "abroad", None) };
    let report = world.runtime.block_on(promote(&promotion)).unwrap();
    assert_eq!((report.came, report.barriers, report.home_alive), (Came::Promoted, 1, true));
    assert!((4..300).contains(&report.lost_places), "{report:?}");
    let fence = home.durable().unwrap().fenced().unwrap();
    assert!(fence.contains("barrier") && fence.contains("abroad"), "{fence}");
    // What home was told is stored is all there.
    let stored = home.durable().unwrap().snapshot().remote;
    assert_eq!(report.commit, stored);
    drop(promotion);
    Arc::into_inner(home).unwrap().close(LONG);
    let abroad = writer(&world, "abroad").unwrap();
    let there = names(&world, &abroad);
    assert!(there.len() as u64 > u64::from(report.lost_places), "{} {report:?}", there.len());
    create(&world, &abroad, Ino::ROOT, "new", b"2");
    world.sync(&abroad);
    while world.runtime.block_on(reader.follower().unwrap().step()).unwrap() {}
    assert_eq!(names(&world, &reader).len(), there.len() + 1);
    let fresh = world.embassy("fresh", Version::Newest).unwrap();
    assert_eq!(names(&world, &fresh), names(&world, &abroad));
    abroad.close(LONG);
}

#[test]
fn a_store_that_was_rolled_back_is_not_taken() {
    let world = World::new(Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "a", b"1");
    world.sync(&home);
    create(&world, &home, Ino::ROOT, "b", b"2");
    world.sync(&home);
    let head = home.durable().unwrap().snapshot().remote_head.unwrap();
    drop(world.embassy("standby", Version::Newest).unwrap()); // which remembers what it has seen
    home.close(LONG);
    drop(home);
    for name in std::fs::read_dir(world.state("store").join("log")).unwrap() {
        let path = name.unwrap().path();
        if u64::from_str_radix(path.file_name().unwrap().to_str().unwrap(), 16).unwrap() >= head.seq.0 {
            std::fs::remove_file(path).unwrap();
        }
    }
    std::fs::remove_dir_all(world.state("store").join("checkpoint")).unwrap();
    let expecting = Trust { expect: Some(head), max_age: None };
    for (state, trust) in [("standby", Trust::default()), ("new", expecting)] {
        let promotion = Promotion { trust, ..promotion(&world, state, None) };
        let why = world.runtime.block_on(promote(&promotion)).unwrap_err().to_string();
        assert!(why.contains("ROLLBACK"), "{why}");
    }
    let why = Promotion {
        trust: Trust { expect: None, max_age: Some(Duration::ZERO) },
        ..promotion(&world, "other", None)
    };
    let why = world.runtime.block_on(promote(&why)).unwrap_err().to_string();
    assert!(why.contains("FROZEN OR SILENT"), "{why}");
    // Who knows nothing of it takes what is there.
    assert_eq!(promoted(&world, "ignorant").came, Came::Promoted);
}
