//! A reader that moves on with home: what it shows is home's state as of a commit, at every step.
#![allow(clippy::unwrap_used)]

mod common;

use common::{ROOT_USER, World, content, create, node, noise};
use embassyfs::fs::{Changed, Settings};
use embassyfs::log::volume::Parameters;
use embassyfs::ops::init::READER_KEY;
use embassyfs::replica::follow::Trouble;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::tree::value::FileType;
use embassyfs::types::Ino;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Long: the tests step it themselves.
const NEVER: Duration = Duration::from_secs(3600);

fn follower(world: &World, state: &str) -> Volume {
    let options = world.options(state);
    let settings = Settings { read_only: true, follow: Some(NEVER), ..options.settings };
    let options = OpenOptions { key: world.key(READER_KEY), settings, ..options };
    Volume::open(options, world.runtime.handle()).unwrap()
}

/// Goes as far as the store has it.
fn catch_up(world: &World, volume: &Volume) {
    while world.runtime.block_on(volume.follower().unwrap().step()).unwrap() {}
}

/// All files below the root with their contents.
fn listing(world: &World, volume: &Volume) -> BTreeMap<String, Vec<u8>> {
    let items = world.run(volume, |fs| fs.readdir(Ino::ROOT, 0, 100_000)).unwrap();
    let names = items.into_iter().map(|item| String::from_utf8(item.name).unwrap());
    let files = names.filter(|name| name != "." && name != "..");
    files.map(|name| (name.clone(), content(world, volume, Ino::ROOT, &name))).collect()
}

fn told(volume: &Volume) -> Arc<Mutex<Changed>> {
    let told = Arc::new(Mutex::new(Changed::default()));
    let all = told.clone();
    volume.follower().unwrap().on_change(Some(Box::new(move |changed| all.lock().merge(changed))));
    told
}

#[test]
fn a_follower_shows_what_home_shipped_and_says_what_changed() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let abroad = follower(&world, "abroad"); // of a volume without commits
    let told = told(&abroad);
    let ledger = create(&world, &home, Ino::ROOT, "ledger", b"one");
    create(&world, &home, Ino::ROOT, "other", b"untouched");
    let commit = world.sync(&home);
    assert!(listing(&world, &abroad).is_empty());
    catch_up(&world, &abroad);
    assert_eq!(abroad.shown().unwrap().0, commit);
    assert_eq!(listing(&world, &abroad), listing(&world, &home));
    let changed = std::mem::take(&mut *told.lock());
    assert!(changed.names.contains(&(Ino::ROOT, b"ledger".to_vec())), "{changed:?}");
    assert!(changed.inodes[&Ino::ROOT].data.is_some() && !changed.inodes.contains_key(&ledger));

    // Only what the kernel holds is told, and only the records that differ.
    abroad.fs.looked_up(ledger);
    home.fs.write(ledger, 5 << 20, &noise(1, 300_000), false).unwrap();
    home.fs.setxattr(ledger, b"user.a", b"b", embassyfs::fs::XattrMode::Any).unwrap();
    world.sync(&home);
    catch_up(&world, &abroad);
    let changed = std::mem::take(&mut *told.lock());
    assert_eq!(changed.names.len(), 0);
    assert_eq!(changed.inodes.keys().collect::<Vec<_>>(), [&ledger]);
    assert_eq!(changed.inodes[&ledger].data, Some(5 << 20..(5 << 20) + (384 << 10)));
    assert_eq!(listing(&world, &abroad), listing(&world, &home));
    home.close(Duration::from_secs(20));
}

#[test]
fn what_is_open_stays_readable_after_home_has_removed_it_until_it_is_let_go() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let big = noise(7, 700_000);
    let file = create(&world, &home, Ino::ROOT, "deed", &big);
    create(&world, &home, Ino::ROOT, "new", b"new");
    world.sync(&home);
    let abroad = follower(&world, "abroad");
    let read = |volume: &Volume| world.run(volume, |fs| fs.read(file, 0, 1 << 20));
    abroad.fs.looked_up(file);
    home.fs.rename((Ino::ROOT, b"new"), (Ino::ROOT, b"deed"), 0, ROOT_USER).unwrap();
    home.fs.orphans().into_iter().for_each(|ino| home.fs.release_orphan(ino).unwrap());
    world.sync(&home);
    catch_up(&world, &abroad);
    assert_eq!(content(&world, &abroad, Ino::ROOT, "deed"), b"new");
    assert!(read(&abroad).unwrap() == big, "the replaced file is read as it was");
    assert_eq!(world.run(&abroad, |fs| fs.getattr(file)).unwrap().inode.nlink, 0);
    abroad.fs.forget(file, 1).unwrap();
    assert_eq!(read(&abroad).unwrap_err().errno(), libc::ESTALE);
    home.close(Duration::from_secs(20));
}

#[test]
fn a_follower_that_is_far_behind_jumps_and_keeps_what_is_open() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "gone", b"still here");
    let stays = create(&world, &home, Ino::ROOT, "stays", b"1");
    world.sync(&home);
    let abroad = follower(&world, "abroad");
    let told = told(&abroad);
    abroad.fs.looked_up(file);
    abroad.fs.looked_up(stays);
    home.fs.unlink(Ino::ROOT, b"gone").unwrap();
    home.fs.release_orphan(file).unwrap();
    for i in 0..200u64 {
        home.fs.write(stays, i, b"x", false).unwrap();
        world.sync(&home);
    }
    home.close(Duration::from_secs(20)); // with a checkpoint
    drop(home);
    let home = world.home();
    home.fs.make(Ino::ROOT, b"after", &node(FileType::Regular, 0o600), ROOT_USER).unwrap();
    world.sync(&home);
    catch_up(&world, &abroad);
    let standing = abroad.follower().unwrap().standing();
    assert_eq!((standing.jumps, standing.trouble), (1, None));
    assert!(told.lock().all_names && told.lock().inodes.contains_key(&stays));
    assert_eq!(listing(&world, &abroad), listing(&world, &home));
    let kept = world.run(&abroad, |fs| fs.read(file, 0, 100)).unwrap();
    assert_eq!(&kept[..], b"still here");
    home.close(Duration::from_secs(20));
}

#[test]
fn random_changes_are_followed_step_by_step() {
    let world = World::new(Parameters { segment_size: 1 << 20, ..Parameters::default() });
    let home = world.home();
    let abroad = follower(&world, "abroad");
    let mut state = 11u64;
    let mut next = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    for round in 0..60u64 {
        for _ in 0..next(5) {
            let name = format!("f{}", next(12));
            match (world.run(&home, |fs| fs.lookup(Ino::ROOT, name.as_bytes())), next(4)) {
                (Ok(attr), 0) => {
                    home.fs.unlink(Ino::ROOT, name.as_bytes()).unwrap();
                    home.fs.release_orphan(attr.ino).unwrap();
                }
                (Ok(_), 1) => {
                    let to = format!("f{}", next(12));
                    home.fs
                        .rename((Ino::ROOT, name.as_bytes()), (Ino::ROOT, to.as_bytes()), 0, ROOT_USER)
                        .unwrap();
                }
                (Ok(attr), _) => {
                    let data = noise(round, next(200_000) as usize + 1);
                    world.run(&home, |fs| fs.write(attr.ino, next(300_000), &data, false)).unwrap();
                }
                (Err(_), _) => drop(create(&world, &home, Ino::ROOT, &name, &noise(round, 1000))),
            }
        }
        world.sync(&home);
        catch_up(&world, &abroad);
        assert_eq!(abroad.shown().map(|(no, _)| no.0), Some(home.fs.sync_point().0));
        assert!(listing(&world, &abroad) == listing(&world, &home), "after round {round}");
    }
    home.close(Duration::from_secs(20));
}

#[test]
fn a_store_that_is_damaged_rolled_back_or_forked_stops_the_follower_where_it_is() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "ledger", b"good");
    world.sync(&home);
    let abroad = follower(&world, "abroad");
    let log = world.dir.path().join("store/log");
    let segments = || {
        let mut all: Vec<_> = std::fs::read_dir(&log).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all
    };
    let first = segments().pop().unwrap();
    home.fs.write(file, 0, b"next", false).unwrap();
    world.sync(&home);
    let second = segments().pop().unwrap();
    let (good, step) =
        (std::fs::read(&second).unwrap(), || world.runtime.block_on(abroad.follower().unwrap().step()));
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&second, &bad).unwrap();
    assert!(step().is_err());
    assert!(matches!(abroad.follower().unwrap().standing().trouble, Some(Trouble::Wrong(_))));
    assert_eq!(content(&world, &abroad, Ino::ROOT, "ledger"), b"good");
    // Put right, it goes on.
    std::fs::write(&second, &good).unwrap();
    catch_up(&world, &abroad);
    assert_eq!(content(&world, &abroad, Ino::ROOT, "ledger"), b"next");
    // A follower that starts anew on a store that has lost its end is refused, and so is one under way.
    drop(abroad);
    let abroad = follower(&world, "abroad");
    std::fs::remove_file(&second).unwrap();
    let refused = world.runtime.block_on(abroad.follower().unwrap().step()).unwrap_err().to_string();
    assert!(refused.contains("ROLLBACK"), "{refused}");
    std::fs::copy(&first, &second).unwrap();
    assert!(first != second);
    home.close(Duration::from_secs(20));
}
