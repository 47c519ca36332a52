//! The core without a kernel: a writer at home, a directory as the store, a reader with an empty state directory.
#![allow(clippy::unwrap_used)]

mod common;

use common::{ROOT_USER, World, content, create, node, noise};
use embassyfs::fs::{SetAttr, Settings, XattrMode};
use embassyfs::log::segment::TRAILER_LEN;
use embassyfs::log::volume::Parameters;
use embassyfs::replica::Version;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use std::time::Duration;

#[test]
fn what_home_wrote_is_read_abroad_and_survives_a_restart() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let big = noise(1, 3_000_000);
    let dir = world
        .run(&home, |fs| fs.make(Ino::ROOT, b"deeds", &node(FileType::Directory, 0o750), ROOT_USER))
        .unwrap()
        .ino;
    create(&world, &home, dir, "big", &big);
    for i in 0..500 {
        create(&world, &home, dir, &format!("small{i}"), format!("deed {i}").as_bytes());
    }
    let big_ino = home.fs.lookup(dir, b"big").unwrap().ino;
    home.fs.setxattr(big_ino, b"user.note", b"sealed", XattrMode::Any).unwrap();
    world.sync(&home);

    let check = |volume: &Volume| {
        let dir = world.run(volume, |fs| fs.lookup(Ino::ROOT, b"deeds")).unwrap();
        assert_eq!(dir.inode.mode, 0o750);
        assert!(content(&world, volume, dir.ino, "big") == big);
        assert_eq!(content(&world, volume, dir.ino, "small77"), b"deed 77");
        let ino = world.run(volume, |fs| fs.lookup(dir.ino, b"big")).unwrap().ino;
        assert_eq!(world.run(volume, |fs| fs.getxattr(ino, b"user.note")).unwrap(), b"sealed");
        let items = world.run(volume, |fs| fs.readdir(dir.ino, 0, 1000)).unwrap();
        assert_eq!(items.len(), 503);
    };
    check(&home);
    check(&world.embassy("embassy", Version::Newest).unwrap());
    home.close(Duration::from_secs(20));
    drop(home);
    let again = world.home();
    check(&again);
    check(&world.embassy("embassy", Version::Newest).unwrap());
    check(&world.embassy("third", Version::Newest).unwrap());
    again.close(Duration::from_secs(20));
}

#[test]
fn each_version_shows_what_was_there_then() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let mut commits = Vec::new();
    let file = create(&world, &home, Ino::ROOT, "ledger", b"");
    for i in 0..5u8 {
        home.fs.write(file, 0, &[i; 100_000], false).unwrap();
        commits.push(world.sync(&home));
    }
    for (i, commit) in commits.iter().enumerate() {
        let past = world.embassy(&format!("past{i}"), Version::Commit(*commit)).unwrap();
        assert!(content(&world, &past, Ino::ROOT, "ledger") == [i as u8; 100_000]);
        let refused = past.fs.write(file, 0, b"x", false).unwrap_err();
        assert_eq!(refused.errno(), libc::EROFS);
    }
    let beyond = Version::Commit(CommitNo(commits.last().unwrap().0 + 50));
    assert!(world.embassy("beyond", beyond).is_err());
    home.close(Duration::from_secs(20));
}

#[test]
fn overwrites_holes_and_truncation_equal_a_plain_array_through_commits_and_checkpoints() {
    let world =
        World::new(Parameters { segment_size: 1 << 20, record_size: 16 << 10, ..Parameters::default() });
    let mut home = world.home();
    let mut file = create(&world, &home, Ino::ROOT, "f", b"");
    let mut model: Vec<u8> = Vec::new();
    let mut state = 42u64;
    let mut next = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    for round in 0..300u64 {
        let at = next(400_000);
        let len = next(60_000) + 1;
        match next(10) {
            0 => {
                let set = SetAttr { size: Some(at), ..SetAttr::default() };
                world.run(&home, |fs| fs.setattr(file, &set)).unwrap();
                model.resize(at as usize, 0);
            }
            1 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                world.run(&home, |fs| fs.fallocate(file, at, len, mode, false)).unwrap();
                let end = model.len().min((at + len) as usize);
                if (at as usize) < end {
                    model[at as usize..end].fill(0);
                }
            }
            2 if !model.is_empty() => {
                let from = next(model.len() as u64);
                let copied = len.min(model.len() as u64 - from);
                let to = from + copied + next(50_000);
                let done =
                    world.run(&home, |fs| fs.copy_range((file, from), (file, to), copied, false)).unwrap();
                assert_eq!(done, copied);
                let part = model[from as usize..(from + copied) as usize].to_vec();
                model.resize(model.len().max((to + copied) as usize), 0);
                model[to as usize..(to + copied) as usize].copy_from_slice(&part);
            }
            _ => {
                let data = noise(round, len as usize);
                world.run(&home, |fs| fs.write(file, at, &data, false)).unwrap();
                model.resize(model.len().max((at + len) as usize), 0);
                model[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
        }
        if round % 40 == 7 {
            world.sync(&home);
        }
        if round % 100 == 77 {
            home.close(Duration::from_secs(20));
            drop(home);
            home = world.home();
            file = home.fs.lookup(Ino::ROOT, b"f").unwrap().ino;
        }
        assert!(content(&world, &home, Ino::ROOT, "f") == model, "round {round}");
    }
    world.sync(&home);
    let embassy = world.embassy("embassy", Version::Newest).unwrap();
    assert!(content(&world, &embassy, Ino::ROOT, "f") == model);
    home.close(Duration::from_secs(20));
}

#[test]
fn an_unlinked_file_lives_until_the_kernel_lets_go_and_is_freed_after_a_restart() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "open", &noise(3, 300_000));
    home.fs.looked_up(file);
    world.sync(&home);
    let used = home.fs.usage();
    home.fs.unlink(Ino::ROOT, b"open").unwrap();
    world.sync(&home);
    assert_eq!(home.fs.read(file, 0, 10).unwrap(), noise(3, 10));
    home.close(Duration::from_secs(20));
    drop(home);
    let again = world.home();
    world.sync(&again);
    assert!(again.fs.orphans().is_empty());
    assert_eq!(again.fs.getattr(file).unwrap_err().errno(), libc::ESTALE);
    assert_eq!(again.fs.usage().used, used.used - 300_000);
    assert_eq!(again.fs.usage().inodes, used.inodes - 1);
    again.close(Duration::from_secs(20));
}

#[test]
fn small_writes_leave_as_whole_records_and_a_file_deleted_in_time_costs_nothing() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let stored = || -> u64 {
        let names = world.runtime.block_on(world.store.list("log/", None, 1000)).unwrap();
        names.iter().map(|object| object.size).sum()
    };
    world.sync(&home);
    let before = stored();
    create(&world, &home, Ino::ROOT, "short-lived", &noise(1, 2_000_000));
    home.fs.unlink(Ino::ROOT, b"short-lived").unwrap();
    world.sync(&home);
    let after = stored();
    assert!(after - before < 4096, "{} bytes for a file that was gone before its commit", after - before);
    // 4 KiB at a time; a frame for each write would cost 24 bytes and an extent every 4096.
    create(&world, &home, Ino::ROOT, "long-lived", &noise(2, 10 << 20));
    world.sync(&home);
    let file = home.fs.lookup(Ino::ROOT, b"long-lived").unwrap().ino;
    let frames = world.run(&home, |fs| fs.frames_of(file, 0..10 << 20)).unwrap();
    // 80 records of 128 KiB. A commit that comes while they are written cuts the one under way in two.
    assert!((80..=100).contains(&frames.len()), "{} frames", frames.len());
    let tags = (10 << 20) / 8192 * 16; // one for each block
    assert!(stored() - after < (10 << 20) + tags + (10 << 20) / 500);
    home.close(Duration::from_secs(20));
}

#[test]
fn a_second_home_is_refused_and_told_why() {
    let world = World::new(Parameters::default());
    let home = world.home();
    create(&world, &home, Ino::ROOT, "a", b"1");
    world.sync(&home);
    let error = Volume::open(world.options("other"), world.runtime.handle()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("promote"), "{error}");
    home.close(Duration::from_secs(20));
}

#[test]
fn a_full_volume_takes_overwrites_refuses_growth_and_has_room_again_at_once() {
    const MIB: u64 = 1 << 20;
    let world = World::new(Parameters::default());
    let options = world.options("home");
    let settings = Settings { size_limit: Some(40 * MIB), ..options.settings };
    let limited = OpenOptions { settings, ..options };
    let home = Volume::open(limited, world.runtime.handle()).unwrap();
    let file = create(&world, &home, Ino::ROOT, "register", b"");
    let write = |ino: Ino, at: u64, seed: u64| {
        let data = noise(seed, MIB as usize);
        world.run(&home, |fs| fs.write(ino, at, &data, false))
    };
    // Far more than is kept in memory: what was sealed early counts as well.
    let fitted = (0..80).take_while(|i| write(file, i * MIB, *i).is_ok()).count();
    assert_eq!(fitted, 40);
    assert_eq!(home.fs.usage().used, 40 * MIB);
    for i in 0..40 {
        write(file, i * MIB, 100 + i).unwrap();
    }
    assert_eq!(write(file, 40 * MIB, 1).unwrap_err().errno(), libc::ENOSPC);
    assert_eq!(
        world.run(&home, |fs| fs.fallocate(file, 0, 41 * MIB, 0, false)).unwrap_err().errno(),
        libc::ENOSPC
    );
    world.run(&home, |fs| fs.fallocate(file, 0, 40 * MIB, 0, false)).unwrap();
    // Each way to make room, and the room used at once.
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    world.run(&home, |fs| fs.fallocate(file, 0, 10 * MIB, mode, false)).unwrap();
    let second = create(&world, &home, Ino::ROOT, "second", b"");
    for i in 0..10 {
        write(second, i * MIB, 200 + i).unwrap();
    }
    assert_eq!(write(second, 10 * MIB, 1).unwrap_err().errno(), libc::ENOSPC);
    world.run(&home, |fs| fs.unlink(Ino::ROOT, b"second")).unwrap();
    let shorter = SetAttr { size: Some(20 * MIB), ..SetAttr::default() };
    world.run(&home, |fs| fs.setattr(file, &shorter)).unwrap();
    let third = create(&world, &home, Ino::ROOT, "third", b"");
    for i in 0..30 {
        write(third, i * MIB, 300 + i).unwrap();
    }
    assert_eq!(write(third, 30 * MIB, 1).unwrap_err().errno(), libc::ENOSPC);
    home.close(Duration::from_secs(20));
}

#[test]
fn a_segment_says_what_of_the_chain_the_store_held_when_it_was_closed() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let ended_with = |name: &str| {
        create(&world, &home, Ino::ROOT, name, b"a deed");
        world.sync(&home);
        let log = std::fs::read_dir(world.state("store/log")).unwrap();
        let newest = log.map(|entry| entry.unwrap().path()).max().unwrap();
        let seq = u64::from_str_radix(newest.file_name().unwrap().to_str().unwrap(), 16).unwrap();
        let bytes = std::fs::read(newest).unwrap();
        let trailer = &bytes[bytes.len() - TRAILER_LEN..];
        (seq, u64::from_le_bytes(trailer[72..80].try_into().unwrap()))
    };
    let (first, before) = ended_with("first");
    let (second, stored) = ended_with("second");
    assert!(before < first && (first..second).contains(&stored), "{before} {first} {stored} {second}");
    home.close(Duration::from_secs(20));
}
