//! One test per bug that was found by attacking the program, with its cause above it.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{ROOT_USER, World, content, create, node, noise};
use embassyfs::clock::Env;
use embassyfs::fs::{self, AclKind, Fs, SetAttr, Settings, XattrMode};
use embassyfs::log::volume::Parameters;
use embassyfs::replica::Version;
use embassyfs::replica::durable::Protection;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::fault::{FaultStore, Faults};
use embassyfs::store::memory::MemoryStore;
use embassyfs::store::{ObjectInfo, Store, StoreError};
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use futures::future::BoxFuture;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A store that notes the order in which objects arrive, and may fall silent about segments: what is put arrives and is
/// not answered, what is asked for neither.
struct Recorder {
    inner: MemoryStore,
    order: Mutex<Vec<String>>,
    answers_puts: AtomicBool,
    /// So many more gets of segments are answered.
    answered: AtomicUsize,
    /// Those that were not.
    unanswered: AtomicUsize,
}

impl Recorder {
    fn new() -> Arc<Recorder> {
        Arc::new(Recorder {
            inner: MemoryStore::new(),
            order: Mutex::default(),
            answers_puts: AtomicBool::new(true),
            answered: AtomicUsize::new(usize::MAX),
            unanswered: AtomicUsize::new(0),
        })
    }

    fn get<'a, T: 'a + Send>(
        &self,
        name: &str,
        answer: BoxFuture<'a, Result<T, StoreError>>,
    ) -> BoxFuture<'a, Result<T, StoreError>> {
        let one_less = |n: usize| n.checked_sub(1);
        if !name.starts_with("log/")
            || self.answered.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok()
        {
            return answer;
        }
        self.unanswered.fetch_add(1, Ordering::SeqCst);
        let silent = StoreError::unavailable(name, "no answer");
        Box::pin(async move { Err(silent) })
    }
}

impl Store for Recorder {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        self.order.lock().unwrap().push(name.clone());
        Box::pin(async move {
            let answer = self.inner.put_new(&name, body).await;
            match self.answers_puts.load(Ordering::SeqCst) || !name.starts_with("log/") {
                true => answer,
                false => std::future::pending().await,
            }
        })
    }
    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.get(name, self.inner.get_range(name, range))
    }
    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.get(name, self.inner.get_suffix(name, len))
    }
    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        self.inner.list(prefix, after, limit)
    }
    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.delete(name)
    }
    fn describe(&self) -> String {
        "recorder".into()
    }
}

/// Committer and checkpointer closed segments under the log's lock and handed them over behind it, so that a later
/// one could overtake; who waited for the earlier was then told that the store had it.
#[test]
fn segments_are_shipped_in_the_order_of_the_chain() {
    let recorder = Recorder::new();
    let parameters = Parameters { segment_size: 1 << 20, ..Parameters::default() };
    let world = World::over(recorder.clone(), tempfile::tempdir().unwrap(), parameters);
    let options = OpenOptions { protection: Protection::Available, uploads: 1, ..world.options("home") };
    let home = Volume::open(options, world.runtime.handle()).unwrap();
    // Enough names for several checkpoints, with somebody in fsync all the time.
    for i in 0..30_000 {
        let name = format!("register entry with a rather long name {i:0200}");
        let made = world
            .run(&home, |fs| fs.make(Ino::ROOT, name.as_bytes(), &node(FileType::Regular, 0o600), ROOT_USER));
        made.unwrap();
        if i % 8 == 0 {
            let commit = home.fs.sync_point();
            home.fs.request_commit(commit, true);
            // A reply takes its time, as the kernel's do: that is the window the bug needed.
            let reply = |answer: Result<(), _>| {
                answer.unwrap();
                std::thread::sleep(Duration::from_millis(3));
            };
            home.durable().unwrap().wait(commit, Box::new(reply));
        }
        if i % 1000 == 999 {
            world.sync(&home); // so that there are many segments, however slow the disk
        }
    }
    home.close(Duration::from_secs(30));
    let order: Vec<String> = recorder.order.lock().unwrap().clone();
    assert!(order.iter().any(|name| name.starts_with("checkpoint/")), "there was no checkpoint to race with");
    let segments: Vec<_> = order.iter().filter(|name| name.starts_with("log/")).collect();
    assert!(segments.len() > 20, "{} segments", segments.len());
    assert!(segments.is_sorted(), "{segments:?}");
}

/// With the store away, a pinned `volume.json` alone was enough to open for writing: an empty volume.
#[test]
fn a_host_that_holds_nothing_of_the_volume_does_not_open_it_without_the_store() {
    let faults = Arc::new(FaultStore::new(Arc::new(MemoryStore::new()), 1, Faults::default()));
    let world = World::over(faults.clone(), tempfile::tempdir().unwrap(), Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "register", b"x");
    world.sync(&home);
    let opened = |state| Volume::open(world.options(state), world.runtime.handle()).map(|_| ());
    assert!(opened("other").unwrap_err().to_string().contains("promote"));
    let pinned = std::fs::read(world.state("home").join("volume.json")).unwrap();
    std::fs::write(world.state("other").join("volume.json"), pinned).unwrap();
    faults.set_outage(true);
    let refused = opened("other").unwrap_err().to_string();
    assert!(refused.contains("does not answer"), "{refused}");
    // Home itself goes on from what it holds.
    home.close(Duration::ZERO);
    drop(home);
    let home = world.home();
    assert_eq!(content(&world, &home, Ino::ROOT, "register"), b"x");
    home.close(Duration::ZERO);
}

/// Only a commit beyond the one that was asked for ended a replay, so a version that ends at a gap was refused.
#[test]
fn the_last_version_before_a_lost_segment_can_be_mounted() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let mut commits = Vec::new();
    for i in 0..4 {
        create(&world, &home, Ino::ROOT, &format!("f{i}"), b"x");
        commits.push(world.sync(&home));
    }
    home.close(Duration::from_secs(20)); // nothing is under way any more
    let names = world.runtime.block_on(world.store.list("log/", None, 100)).unwrap();
    let checkpoints = world.runtime.block_on(world.store.list("checkpoint/", None, 100)).unwrap();
    for object in checkpoints {
        world.runtime.block_on(world.store.delete(&object.name)).unwrap();
    }
    // One segment for each commit; the third is lost.
    world.runtime.block_on(world.store.delete(&names[2].name)).unwrap();
    let open = |commit: CommitNo| world.embassy(&format!("at{}", commit.0), Version::Commit(commit));
    let last = open(commits[1]).unwrap();
    assert_eq!(content(&world, &last, Ino::ROOT, "f1"), b"x");
    let lost = open(commits[3]).map(|_| ()).unwrap_err().to_string();
    assert!(lost.contains(&names[2].name), "{lost}");
}

/// A segment that had overtaken a cut-off one counted as sent, so nobody ever heard that all was there.
#[test]
fn after_uploads_that_were_cut_off_out_of_order_everything_is_sent_in_the_end() {
    let world = World::new(Parameters::default());
    let home = world.home();
    for i in 0..3 {
        create(&world, &home, Ino::ROOT, &format!("f{i}"), b"x");
        world.sync(&home);
    }
    // Home dies here: its disk as it is now, and a store that never got the second segment.
    let image = world.state("image");
    copy_tree(&world.state("home"), &image);
    let lost = "log/0000000000000002";
    world.runtime.block_on(world.store.delete(lost)).unwrap();
    let home = Volume::open(world.options("image"), world.runtime.handle()).unwrap();
    world.sync(&home);
    assert_eq!(home.durable().unwrap().snapshot().unsent_segments, 0);
    assert!(world.runtime.block_on(world.store.get_suffix(lost, 1)).is_ok());
    home.close(Duration::from_secs(10));
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (entry, name) = entry.map(|e| (e.path(), e.file_name())).unwrap();
        match entry.is_dir() {
            true => copy_tree(&entry, &to.join(name)),
            false => drop(std::fs::copy(&entry, to.join(name)).unwrap()),
        }
    }
}

/// Replacing a key in memory counted as another one: a log file of many small writes called for checkpoints.
#[test]
fn writing_one_file_again_and_again_does_not_fill_the_memtable() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "f", b"");
    let before = home.fs.memtable_bytes();
    for i in 0..2000 {
        world.run(&home, |fs| fs.write(file, i * 8, &[1; 8], false)).unwrap();
    }
    let (sender, receiver) = channel();
    let commit = home.fs.sync_point();
    home.fs.request_commit(commit, false);
    home.durable().unwrap().wait(commit, Box::new(move |answer| sender.send(answer).unwrap()));
    receiver.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    assert!(home.fs.memtable_bytes() < before + 4096, "{} bytes", home.fs.memtable_bytes());
    home.close(Duration::ZERO);
}

/// A checkpoint looks at all pages it will change before it writes any, and begins again after each fetch: pages that
/// did not fit into both caches at once were fetched for ever, and `close` never returned.
#[test]
fn a_checkpoint_ends_that_needs_more_pages_than_the_caches_hold() {
    let world = World::new(Parameters { page_size: 4 << 10, segment_size: 1 << 20, ..Parameters::default() });
    let open = || {
        let options = OpenOptions { disk_cache: 1 << 20, frame_cache: 8 << 20, ..world.options("home") };
        Volume::open(options, world.runtime.handle()).unwrap()
    };
    let home = open();
    let mut files = Vec::new();
    for i in 0..30_000 {
        let file = create(&world, &home, Ino::ROOT, &format!("f{i}"), b"");
        world.run(&home, |fs| fs.setxattr(file, b"user.seal", &noise(i, 600), XattrMode::Any)).unwrap();
        files.push(file);
    }
    home.close(Duration::from_secs(20));
    drop(home);
    // The next checkpoint lets the segments with the first one's pages go.
    let home = open();
    create(&world, &home, Ino::ROOT, "one more", b"");
    home.close(Duration::from_secs(20));
    drop(home);
    let home = open();
    for file in files {
        let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        world.run(&home, |fs| fs.setattr(file, &set)).unwrap();
    }
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        home.close(Duration::from_secs(20));
        let _ = sender.send(());
    });
    assert!(receiver.recv_timeout(Duration::from_secs(60)).is_ok(), "the checkpoint does not end");
}

/// A writer at the size limit was woken by the commit that was under way when it was refused, not by the one with the
/// removal that made room, and gave up.
#[test]
fn removed_room_is_room_at_once_beside_commits() {
    let world = World::new(Parameters::default());
    let options = world.options("home");
    let settings = Settings { size_limit: Some(32 << 20), ..options.settings };
    let options = OpenOptions { settings, ..options };
    let home = Volume::open(options, world.runtime.handle()).unwrap();
    let touched = create(&world, &home, Ino::ROOT, "touched", b"x");
    let data = noise(1, 1 << 20);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
                let _ = home.fs.setattr(touched, &set); // it may have to wait for room too; then not this time
                home.fs.request_commit(home.fs.sync_point(), false);
                std::thread::yield_now();
            }
        });
        let rounds = || -> fs::Result<()> {
            for round in 0..40 {
                let name = format!("f{round}");
                let file = create(&world, &home, Ino::ROOT, &name, b"");
                for i in 0..20 {
                    world.run(&home, |fs| fs.write(file, i << 20, &data, false))?;
                }
                world.run(&home, |fs| fs.unlink(Ino::ROOT, name.as_bytes()))?;
            }
            Ok(())
        };
        let done = rounds();
        stop.store(true, Ordering::Relaxed);
        done.unwrap();
    });
    home.close(Duration::from_secs(20));
}

/// The replaced file was freed before the whiteout's inode was made, which can want a page fetched: the file was gone
/// though the rename had not happened.
#[test]
fn a_rename_that_has_to_wait_has_changed_nothing() {
    let world = World::new(Parameters { page_size: 4 << 10, segment_size: 1 << 20, ..Parameters::default() });
    let cold = || {
        let options = OpenOptions { disk_cache: 0, frame_cache: 0, ..world.options("home") };
        Volume::open(options, world.runtime.handle()).unwrap()
    };
    let home = cold();
    let make = |fs: &Fs| fs.make(Ino::ROOT, b"dir", &node(FileType::Directory, 0o755), ROOT_USER);
    let dir = world.run(&home, make).unwrap().ino;
    let attribute = |ino, i: u64| {
        let name = format!("trusted.{i:05}");
        world.run(&home, |fs| fs.setxattr(ino, name.as_bytes(), &noise(i, 300), XattrMode::Any)).unwrap();
    };
    let content_of_target = noise(9, 70_000);
    let target = create(&world, &home, dir, "target", &content_of_target);
    create(&world, &home, dir, "moved", b"");
    for i in 0..2000 {
        create(&world, &home, dir, &format!("file{i}"), b"");
        attribute(dir, i);
        attribute(target, i);
    }
    let entry = |tag: u16, perm: u16, id: u32| {
        [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let none = u32::MAX;
    let entries =
        [entry(1, 7, none), entry(2, 7, 77), entry(4, 5, none), entry(16, 7, none), entry(32, 5, none)];
    let acl = [2u32.to_le_bytes().to_vec(), entries.concat()].concat();
    world.run(&home, |fs| fs.set_acl(dir, AclKind::Default, Some(&acl), |_| true)).unwrap();
    home.close(Duration::from_secs(20));
    drop(home);
    let home = cold();
    create(&world, &home, Ino::ROOT, "one more", b"");
    home.close(Duration::from_secs(20));
    drop(home);

    let home = cold();
    let inodes = home.fs.usage().inodes;
    let mut waits = 0;
    let renamed = loop {
        let flags = libc::RENAME_WHITEOUT;
        match home.fs.rename((dir, b"moved"), (dir, b"target"), flags, ROOT_USER) {
            Err(e) if e.missing().is_some() => {
                waits += 1;
                assert_eq!(home.fs.usage().inodes, inodes, "after {waits} waits");
                let now = world.run(&home, |fs| fs.read(target, 0, 70_000)).unwrap();
                assert!(now == content_of_target, "the replaced file is gone after {waits} waits");
                world.runtime.block_on(home.fetch(e.missing().unwrap())).unwrap();
            }
            other => break other,
        }
    };
    renamed.unwrap();
    assert!(waits > 1, "nothing was cold");
    assert_eq!(home.fs.usage().inodes, inodes, "one came, one went");
    home.close(Duration::from_secs(20));
}

/// A home that came up again asked a store that had just fallen silent for each of the segments that had been on their
/// way, one after the other, each for as long as a read is repeated: sixteen minutes for 32 of them.
#[test]
fn a_home_that_comes_up_asks_a_silent_store_for_one_segment_only() {
    const SEGMENTS: usize = 12;
    let store = Recorder::new();
    let world = World::over(store.clone(), tempfile::tempdir().unwrap(), Parameters::default());
    let clock = Env::system().clock;
    let in_time = |begin: Duration| clock.monotonic() - begin < Duration::from_secs(30);
    let open = || {
        let begin = clock.monotonic();
        loop {
            let options = OpenOptions { uploads: 2 * SEGMENTS, ..world.options("home") };
            match Volume::open(options, world.runtime.handle()) {
                // A put that is never answered lets go of the state directory only when its task is swept up.
                Err(e) if e.to_string().contains("lock is held") && in_time(begin) => {}
                opened => return opened.unwrap(),
            }
        }
    };
    let home = open();
    create(&world, &home, Ino::ROOT, "first", b"sealed");
    world.sync(&home); // tries the store out, too
    let arrived = || world.runtime.block_on(store.list("log/", None, 1000)).unwrap().len();
    let before = arrived();
    store.answers_puts.store(false, Ordering::SeqCst);
    for i in 0..SEGMENTS {
        create(&world, &home, Ino::ROOT, &format!("deed {i}"), b"sealed");
        let (sender, receiver) = channel();
        home.when_remote(Duration::from_millis(1), Box::new(move |r| sender.send(r).unwrap()));
        receiver.recv_timeout(Duration::from_secs(30)).unwrap().unwrap_err();
        let begin = clock.monotonic();
        while arrived() <= before + i && in_time(begin) {
            std::thread::yield_now();
        }
        assert!(arrived() > before + i, "segment {i} does not arrive");
    }
    home.close(Duration::ZERO);
    drop(home);
    for answered in 0..4 * SEGMENTS {
        store.answered.store(answered, Ordering::SeqCst);
        store.unanswered.store(0, Ordering::SeqCst);
        let home = open();
        let unanswered = store.unanswered.load(Ordering::SeqCst);
        assert!(unanswered <= 1, "{unanswered} after {answered} that were answered");
        assert!(answered > 0 || unanswered == 1, "it asks for none");
        home.close(Duration::ZERO);
    }
}
