//! Tests of recovery: from spool, store or both, torn at every byte, and refusals.

use super::super::Append;
use super::super::listing::list_commits;
use super::super::segment::{HEADER_LEN, TRAILER_LEN, UncheckedHeader};
use super::super::testing::{MemoryStore, env, noise, volume};
use super::super::writer::LogWriter;
use super::*;
use crate::types::{FrameKind, FramePtr};
use futures::executor::block_on;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

type Commits = Vec<(u64, Vec<Vec<u8>>)>;

struct Host {
    _tmp: tempfile::TempDir,
    dir: Arc<StateDir>,
}

fn host() -> Host {
    let tmp = tempfile::tempdir().unwrap();
    let dir = Arc::new(StateDir::open(tmp.path()).unwrap());
    Host { _tmp: tmp, dir }
}

fn time(no: u64) -> Timestamp {
    Timestamp { secs: no.cast_signed(), nanos: 7 }
}

/// The delta bodies of commit `no`: one, two or three.
fn parts(no: u64) -> Vec<Vec<u8>> {
    (0..1 + no % 3).map(|part| noise(no * 10 + part, 20 + no as usize)).collect()
}

fn expected(commits: std::ops::RangeInclusive<u64>) -> Commits {
    commits.map(|no| (no, parts(no))).collect()
}

impl Host {
    fn writer(&self, seed: u64, at: &Recovered) -> LogWriter {
        LogWriter::new(self.dir.clone(), volume(), env(seed), at.epoch, at.head, at.next_seq, at.last_commit)
    }

    fn recover(
        &self,
        store: Option<&dyn Store>,
        start: ChainStart,
        role: Role,
    ) -> Result<(Recovered, Commits)> {
        self.recover_until(store, start, role, u64::MAX)
    }

    fn recover_until(
        &self,
        store: Option<&dyn Store>,
        start: ChainStart,
        role: Role,
        until: u64,
    ) -> Result<(Recovered, Commits)> {
        let mut commits = Commits::new();
        let mut apply = |no: CommitNo, at, _, bodies: &[Bytes]| {
            if no.0 > until {
                return Ok(Step::Stop);
            }
            assert_eq!(at, time(no.0));
            commits.push((no.0, bodies.iter().map(|body| body.to_vec()).collect()));
            Ok(Step::Continue)
        };
        let (env, ctx) = (env(77), volume());
        let recovering = recover(&ctx, &self.dir, &env, store, start, role, &mut apply);
        let recovered = block_on(is_send(recovering))?;
        Ok((recovered, commits))
    }

    fn file(&self, seq: u64) -> Vec<u8> {
        std::fs::read(self.dir.log_path(Seq(seq))).unwrap()
    }

    fn write(&self, seq: u64, bytes: &[u8]) {
        std::fs::write(self.dir.log_path(Seq(seq)), bytes).unwrap();
    }

    fn upload(&self, store: &MemoryStore) {
        for (seq, _) in self.dir.log_segments().unwrap() {
            store.objects.lock().insert(segment_name(seq), self.file(seq.0).into());
        }
    }
}

fn is_send<T: Send>(value: T) -> T {
    value
}

fn fresh() -> Recovered {
    Recovered {
        head: None,
        next_seq: Seq(1),
        epoch: Epoch(1),
        last_commit: CommitNo(0),
        local: Vec::new(),
        store_newest: None,
        segments_read: 0,
    }
}

fn commit(writer: &mut LogWriter, no: u64, data: usize) -> FramePtr {
    let ptr = writer.append(FrameKind::Data, &noise(no, data)).unwrap();
    writer.append_commit(CommitNo(no), time(no), &parts(no)).unwrap();
    ptr
}

/// A home with three closed segments: commits 1 to 9.
fn home() -> Host {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    for no in 1..=9 {
        commit(&mut writer, no, 50);
        if no % 3 == 0 {
            writer.close().unwrap().unwrap();
        }
    }
    home
}

fn store_of(home: &Host) -> Arc<MemoryStore> {
    let store = MemoryStore::new();
    home.upload(&store);
    store
}

#[track_caller]
fn refused(outcome: Result<(Recovered, Commits)>, words: &[&str]) {
    let error = outcome.map(|(recovered, _)| recovered).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    words.iter().for_each(|word| assert!(error.to_string().contains(word), "{error}"));
}

#[track_caller]
fn corrupt(outcome: Result<(Recovered, Commits)>, word: &str) {
    let error = outcome.map(|(recovered, _)| recovered).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }) && error.to_string().contains(word), "{error}");
}

#[test]
fn home_and_abroad_recover_the_same_commits() {
    let home = home();
    let store = store_of(&home);
    let start = ChainStart::default();
    let (local, at_home) = home.recover(None, start, Role::Writer).unwrap();
    let (both, at_home_online) = home.recover(Some(&*store), start, Role::Writer).unwrap();
    store.gets.store(0, Relaxed);
    let (remote, abroad) = host().recover(Some(&*store), start, Role::Reader).unwrap();
    assert_eq!(store.gets.load(Relaxed), 3, "one suffix each");
    assert_eq!(at_home, expected(1..=9));
    assert_eq!((&at_home_online, &abroad), (&at_home, &at_home));
    assert_eq!((local.head, local.next_seq), (remote.head, Seq(4)));
    assert_eq!((local.store_newest, both.store_newest), (None, Some(Seq(3))));
    assert_eq!((local.local.len(), remote.local.len(), remote.segments_read), (3, 0, 3));
    assert_eq!((remote.last_commit, remote.epoch), (CommitNo(9), Epoch(1)));
    // Behind a checkpoint.
    let start = ChainStart { replay_seq: Seq(3), prev: Some(local.local[1].head) };
    let (later, commits) = host().recover(Some(&*store), start, Role::Reader).unwrap();
    assert_eq!((later.head, commits), (local.head, expected(7..=9)));
    let start = ChainStart { replay_seq: Seq(4), prev: local.head };
    let (last, commits) = host().recover(Some(&*store), start, Role::Reader).unwrap();
    assert_eq!((last.last_commit, last.head, commits), (CommitNo(9), local.head, vec![]));
}

#[test]
fn deltas_that_do_not_lie_in_the_tail_are_fetched() {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    (1..=5).for_each(|no| {
        commit(&mut writer, no, 60_000);
    });
    writer.close().unwrap().unwrap();
    let store = store_of(&home);
    let (_, commits) = host().recover(Some(&*store), ChainStart::default(), Role::Reader).unwrap();
    assert_eq!(commits, expected(1..=5));
    assert_eq!(store.gets.load(Relaxed), 2);
}

#[test]
fn a_mount_of_the_past_ends_before_the_commit_that_is_too_new() {
    let store = store_of(&home());
    for until in 0..10 {
        let (recovered, commits) =
            host().recover_until(Some(&*store), ChainStart::default(), Role::Reader, until).unwrap();
        assert_eq!(commits, expected(1..=until.min(9)));
        assert_eq!(recovered.last_commit, CommitNo(until.min(9)));
    }
    refused(home().recover_until(None, ChainStart::default(), Role::Writer, 4), &["past"]);
}

#[test]
fn versions_are_listed_from_the_indexes() {
    let store = store_of(&home());
    let commits = block_on(list_commits(&volume(), &*store)).unwrap();
    let seen: Vec<_> = commits.iter().map(|c| (c.no.0, c.time, c.seq.0)).collect();
    assert_eq!(seen, (1..=9).map(|no| (no, time(no), no.div_ceil(3))).collect::<Vec<_>>());
    // The collector took the first segment.
    store.objects.lock().remove(&segment_name(Seq(1)));
    assert_eq!(block_on(list_commits(&volume(), &*store)).unwrap().len(), 6);
}

/// One closed segment (commits 1 to 3), then an open one (4 to 7), as a crash leaves them; and, per commit of the
/// open one, the file's length when it was complete.
fn crashed() -> (Host, Vec<u8>, Vec<usize>) {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    (1..=3).for_each(|no| {
        commit(&mut writer, no, 50);
    });
    writer.close().unwrap();
    let mut ends = Vec::new();
    for no in 4..=7 {
        commit(&mut writer, no, 50);
        writer.flush().unwrap();
        ends.push(writer.open_len() as usize);
    }
    writer.append(FrameKind::Data, b"of a commit that never came").unwrap();
    writer.flush().unwrap();
    let bytes = home.file(2);
    (home, bytes, ends)
}

#[test]
fn a_tail_torn_at_any_byte_recovers_to_the_last_complete_commit() {
    let (home, whole, ends) = crashed();
    for cut in 0..=whole.len() {
        for zeros in [false, true] {
            let mut bytes = whole[..cut].to_vec();
            if zeros {
                bytes.resize(whole.len() + 100, 0);
            }
            home.write(2, &bytes);
            let complete = ends.iter().filter(|end| **end <= cut).count() as u64;
            // A reader sees the same and changes nothing.
            let (_, seen) = home.recover(None, ChainStart::default(), Role::Reader).unwrap();
            assert_eq!((home.file(2), &seen), (bytes, &expected(1..=3 + complete)));
            let (recovered, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
            assert_eq!(commits, expected(1..=3 + complete), "cut at {cut}");
            assert_eq!(recovered.last_commit, CommitNo(3 + complete));
            assert_eq!(recovered.next_seq, Seq(if complete > 0 { 3 } else { 2 }));
            assert_eq!(recovered.local.len(), if complete > 0 { 2 } else { 1 });
            // What was closed there reads like any other segment.
            let (again, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
            assert_eq!((again.head, commits), (recovered.head, expected(1..=3 + complete)));
        }
    }
}

#[test]
fn a_sector_left_as_an_earlier_write_had_it_is_a_torn_tail_however_little_is_missing() {
    const SECTOR: usize = 512;
    let ending_at = |data| {
        let home = host();
        let mut writer = home.writer(1, &fresh());
        commit(&mut writer, 1, data);
        (home, writer.open_len() as usize, writer)
    };
    let (_, base, _) = ending_at(SECTOR);
    for missing in 1..=20 {
        let (home, end, mut writer) = ending_at(SECTOR + SECTOR - (base + missing) % SECTOR);
        assert_eq!((end + missing) % SECTOR, 0);
        writer.flush().unwrap();
        commit(&mut writer, 2, 50);
        writer.close().unwrap();
        let mut bytes = home.file(1);
        bytes[end..end + missing].fill(0);
        home.write(1, &bytes);
        let (_, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
        assert_eq!(commits, expected(1..=1), "{missing} bytes missing");
    }
}

#[test]
fn what_was_laid_out_ahead_is_no_part_of_a_segment() {
    for crash in [false, true] {
        let home = host();
        let mut writer = home.writer(1, &fresh());
        for no in 1..=4 {
            commit(&mut writer, no, 50);
            writer.sync().unwrap();
        }
        let (end, laid_out) = (writer.open_len() as usize, home.file(1));
        assert!(laid_out.len() > end + 100 && laid_out[end..].iter().all(|byte| *byte == 0));
        if !crash {
            let closed = writer.close().unwrap().unwrap();
            assert_eq!(home.file(1).len() as u64, closed.len);
            assert!(trailer_of(&volume(), Seq(1), &home.file(1)).is_some());
            // A crash before the end was cut off: the trailer does not end the file, and does not count.
            let mut bytes = home.file(1);
            bytes.resize(laid_out.len(), 0);
            home.write(1, &bytes);
        }
        let (recovered, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
        assert_eq!(commits, expected(1..=4));
        assert_eq!(home.file(1).len() as u64, recovered.local[0].len);
        assert!(recovered.local[0].len < laid_out.len() as u64);
    }
}

#[test]
fn after_a_crash_no_key_is_used_again() {
    let (home, whole, ends) = crashed();
    let salt = |bytes: &[u8], seq| {
        let header = UncheckedHeader::parse(bytes, "it").unwrap().verify(&volume(), Seq(seq), "it");
        header.unwrap().salt
    };
    let mut salts = vec![salt(&home.file(1), 1), salt(&whole, 2)];
    // Nothing kept: the number is used again, the key is not.
    home.write(2, &whole[..ends[0] - 1]);
    let (recovered, _) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
    let mut writer = home.writer(50, &recovered);
    commit(&mut writer, 4, 50);
    writer.sync().unwrap();
    salts.push(salt(&home.file(2), 2));
    // Something kept: a new number and a new key, and an index under its own.
    let (recovered, _) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
    let mut writer = home.writer(60, &recovered);
    commit(&mut writer, 5, 50);
    writer.close().unwrap().unwrap();
    salts.push(salt(&home.file(3), 3));
    for seq in [1, 2, 3] {
        salts.push(trailer_of(&volume(), Seq(seq), &home.file(seq)).unwrap().0.index_salt);
    }
    let all = salts.len();
    salts.sort_unstable();
    salts.dedup();
    assert_eq!(salts.len(), all);
    let (_, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
    assert_eq!(commits, expected(1..=5));
}

#[test]
fn damage_before_a_synced_byte_is_not_taken_for_a_torn_tail() {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    commit(&mut writer, 1, 50);
    writer.sync().unwrap();
    let synced = writer.open_len() as usize;
    commit(&mut writer, 2, 50);
    writer.sync().unwrap();
    let whole = home.file(1);
    for at in 0..writer.open_len() as usize {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        home.write(1, &bytes);
        let outcome = home.recover(None, ChainStart::default(), Role::Writer);
        if at < synced {
            corrupt(outcome, "log/0000000000000001");
            assert_eq!(home.file(1), bytes, "damaged files are left as they are");
        } else {
            assert_eq!(outcome.unwrap().1, expected(1..=1));
        }
    }
}

#[test]
fn a_root_that_a_checkpoint_may_stand_on_is_kept() {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    writer.append(FrameKind::Page, b"page").unwrap();
    let root = writer.append(FrameKind::Root, b"root").unwrap();
    writer.append(FrameKind::Page, b"of the next").unwrap();
    writer.sync().unwrap();
    let (recovered, commits) = home.recover(None, ChainStart::default(), Role::Writer).unwrap();
    assert_eq!((commits, recovered.last_commit, recovered.next_seq), (vec![], CommitNo(0), Seq(2)));
    let (trailer, _) = trailer_of(&volume(), Seq(1), &home.file(1)).unwrap();
    assert_eq!(u64::from(trailer.index_offset), root.range().end);
}

#[test]
fn any_changed_byte_of_a_closed_segment_is_found() {
    let home = home();
    let store = store_of(&home);
    let whole = home.file(2);
    let name = segment_name(Seq(2));
    let dir = host();
    let limits =
        crate::log::reader::ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 0, open_files: 1 };
    let mut quiet = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        store.objects.lock().insert(name.clone(), bytes.clone().into());
        if let Err(error) = host().recover(Some(&*store), ChainStart::default(), Role::Reader) {
            assert!(error.to_string().contains(&name), "{at}: {error}");
            continue;
        }
        // Neither trailer, index nor a delta: then a frame or what opens it.
        quiet += 1;
        assert!(at < whole.len() - TRAILER_LEN);
        let first = FramePtr { seq: Seq(2), offset: HEADER_LEN as u32, len: 50 + 24 };
        let frames = [first, next_data(&whole, first), next_data(&whole, next_data(&whole, first))];
        let reader = crate::log::reader::FrameReader::new(
            dir.dir.clone(),
            volume(),
            Some(store.clone()),
            env(3),
            limits,
        );
        let error = block_on(reader.unwrap().fetch(&frames)).unwrap_err().to_string();
        assert!(error.contains(&name), "{at}: {error}");
    }
    assert_eq!(quiet, HEADER_LEN + 3 * (50 + 24));
}

/// The data frame behind the commit behind `ptr`.
fn next_data(bytes: &[u8], mut ptr: FramePtr) -> FramePtr {
    loop {
        ptr.offset += ptr.len;
        let at = ptr.offset as usize;
        ptr.len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        if bytes[at + 4] == FrameKind::Data as u8 {
            return ptr;
        }
    }
}

#[test]
fn any_changed_byte_of_the_newest_local_segment_is_found_or_harmless() {
    let home = home();
    let whole = home.file(3);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        home.write(3, &bytes);
        match home.recover(None, ChainStart::default(), Role::Writer) {
            Ok((_, commits)) => {
                assert_eq!(commits, expected(1..=9));
                assert!(at >= whole.len() - TRAILER_LEN, "byte {at} changed unnoticed");
            }
            Err(e) => assert!(e.to_string().contains("log/0000000000000003"), "{e}"),
        }
    }
    // Not the newest: its trailer counts, and its deltas; data is found out when it is read.
    home.write(3, &whole);
    let mut bytes = home.file(2);
    let at = bytes.len() - 10;
    bytes[at] ^= 1;
    home.write(2, &bytes);
    corrupt(home.recover(None, ChainStart::default(), Role::Writer), "log/0000000000000002");
}

#[test]
fn a_writer_continues_only_where_the_end_of_the_chain_is() {
    let start = ChainStart::default();
    let home = home();
    let store = store_of(&home);
    // An empty state directory, an older one, a different one.
    refused(host().recover(Some(&*store), start, Role::Writer), &["promote", "nothing", "0000000000000003:"]);
    let old = host();
    old.write(1, &home.file(1));
    refused(old.recover(Some(&*store), start, Role::Writer), &["promote", "0000000000000001:"]);
    let other = host();
    let mut writer = other.writer(9, &fresh());
    for no in 1..=4 {
        commit(&mut writer, no, 10);
        writer.close().unwrap();
    }
    refused(other.recover(Some(&*store), start, Role::Writer), &["promote"]);
    // A newest segment that lost its end, though the store has it: nothing is cut off.
    let hurt = home.file(3);
    home.write(3, &hurt[..hurt.len() - 1]);
    refused(home.recover(Some(&*store), start, Role::Writer), &["not closed"]);
    assert_eq!(home.file(3).len(), hurt.len() - 1);
    home.write(3, &hurt);
    // A checkpoint from the store alone is no end of the chain either.
    let (recovered, _) = home.recover(None, start, Role::Writer).unwrap();
    let behind = ChainStart { replay_seq: Seq(4), prev: recovered.head };
    refused(host().recover(Some(&*store), behind, Role::Writer), &["promote"]);
    // With the checkpoint here and all segments sent and retired, it is.
    let clean = host();
    clean.dir.write_atomic("checkpoint/fffffffffffffff6", b"").unwrap();
    assert_eq!(clean.recover(Some(&*store), behind, Role::Writer).unwrap().0.next_seq, Seq(4));
    // Unsent segments are no obstacle, nor is a store that does not answer; but with nothing here it is.
    store.objects.lock().remove(&segment_name(Seq(3)));
    assert_eq!(home.recover(Some(&*store), start, Role::Writer).unwrap().1, expected(1..=9));
    store.unavailable.store(true, Relaxed);
    assert_eq!(home.recover(Some(&*store), start, Role::Writer).unwrap().1, expected(1..=9));
    assert!(matches!(host().recover(Some(&*store), start, Role::Writer), Err(Error::Store(_))));
    assert!(matches!(home.recover(Some(&*store), start, Role::Reader), Err(Error::Store(_))));
}

#[test]
fn a_missing_segment_is_damage_unless_its_upload_was_cut_off() {
    let build = |stored: bool| {
        let home = host();
        let mut writer = home.writer(1, &fresh());
        for no in 1..=6 {
            commit(&mut writer, no, 10);
            writer.close().unwrap();
            if stored && no < 4 {
                writer.set_stored(Seq(no));
            }
        }
        store_of(&home)
    };
    for (stored, lost) in [(false, 3), (false, 1), (true, 3), (true, 2)] {
        let store = build(stored);
        store.objects.lock().remove(&segment_name(Seq(lost)));
        corrupt(
            host().recover(Some(&*store), ChainStart::default(), Role::Reader),
            &format!("log/{}: missing", Seq(lost)),
        );
        // What lies before the damage is there for who asks for it.
        let before = host().recover_until(Some(&*store), ChainStart::default(), Role::Reader, 0);
        assert_eq!(before.is_ok(), lost > 1);
    }
    // Segments 4 to 6 were closed when the store was known to hold 3: 4 and 5 never arrived.
    let store = build(true);
    store.objects.lock().remove(&segment_name(Seq(4)));
    let (recovered, commits) = host().recover(Some(&*store), ChainStart::default(), Role::Reader).unwrap();
    assert_eq!(
        (commits, recovered.next_seq, recovered.store_newest),
        (expected(1..=3), Seq(4), Some(Seq(6)))
    );
}

#[test]
fn a_fork_and_a_foreign_segment_are_refused() {
    let home = home();
    let other = host();
    let mut writer = other.writer(9, &fresh());
    for no in 1..=3 {
        commit(&mut writer, no, 10);
        writer.close().unwrap();
    }
    let store = store_of(&home);
    let name = segment_name(Seq(2));
    store.objects.lock().insert(name.clone(), other.file(2).into());
    corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), &name);
    store.objects.lock().insert(name.clone(), home.file(1).into());
    corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), &name);
    store.objects.lock().insert(name.clone(), Bytes::from_static(b"short"));
    corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), &name);
}

#[test]
fn no_bytes_make_a_parser_panic() {
    use super::super::frame::{DeltaHeader, Prefix};
    use super::super::segment::{Index, SegmentCipher, UncheckedTrailer};
    let header =
        UncheckedHeader::parse(&home().file(1), "it").unwrap().verify(&volume(), Seq(1), "it").unwrap();
    let cipher = SegmentCipher::new(&volume(), header);
    for seed in 0..20_000u64 {
        let mut bytes = noise(seed, (seed % 700) as usize);
        for (i, byte) in bytes.iter_mut().enumerate().filter(|(i, _)| seed % 3 > 0 && i % 5 > 0) {
            *byte = (seed >> (i % 7)) as u8 & 3;
        }
        let _ = UncheckedHeader::parse(&bytes, "it").map(|h| h.verify(&volume(), Seq(1), "it"));
        let _ = UncheckedTrailer::parse(&bytes, "it").map(|t| t.verify(&volume(), Seq(1), 900, "it"));
        let _ = Index::decode(&bytes, seed as u32);
        let _ = DeltaHeader::split(&bytes.clone().into());
        let _ = Prefix::parse(&bytes);
        let ptr = FramePtr { seq: Seq(1), offset: 96, len: bytes.len() as u32 };
        assert!(cipher.open_any(ptr, bytes.clone()).is_err());
        let _ = scan(&volume(), Seq(1), &bytes, std::path::Path::new("it")).is_ok();
    }
}

#[path = "claim_tests.rs"]
mod claims;
