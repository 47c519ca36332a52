//! Tests of the reader: where frames come from, how few requests it takes, and what damage does.

use super::super::Append;
use super::super::blocks::Layout;
use super::super::testing::{MemoryStore, env, noise, volume};
use super::super::writer::LogWriter;
use super::*;
use crate::store::StoreError;
use crate::store::retry::{RetryPolicy, RetryStore};
use crate::types::{CommitNo, Epoch, Timestamp};
use futures::executor::block_on;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

struct Abroad {
    _home: tempfile::TempDir,
    here: tempfile::TempDir,
    store: Arc<MemoryStore>,
    /// Per segment, its frames and their contents.
    frames: Vec<Vec<(FramePtr, Vec<u8>)>>,
}

const FRAME: usize = 40_000;

/// Three segments of twenty frames each in the store, nothing here.
fn abroad() -> Abroad {
    let (home, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dir = Arc::new(StateDir::open(home.path()).unwrap());
    let store = MemoryStore::new();
    let mut writer = LogWriter::new(dir, volume(), env(1), Epoch(1), None, Seq(1), CommitNo(0));
    let mut frames = Vec::new();
    for segment in 0..3u64 {
        let plain = |i| noise(segment * 100 + i, FRAME);
        let mut append = |i| (writer.append(FrameKind::Data, &plain(i)).unwrap(), plain(i));
        frames.push((0..20).map(&mut append).collect());
        writer.append_commit(CommitNo(segment + 1), Timestamp::default(), &[]).unwrap();
        let closed = writer.close().unwrap().unwrap();
        let body = Bytes::from(std::fs::read(closed.file.path).unwrap());
        store.objects.lock().insert(segment_name(closed.head.seq), body);
    }
    Abroad { _home: home, here, store, frames }
}

impl Abroad {
    fn reader(&self, frame_cache_bytes: usize, disk_cache_bytes: u64) -> FrameReader {
        self.reader_of(self.store.clone(), frame_cache_bytes, disk_cache_bytes)
    }

    fn reader_of(
        &self,
        store: Arc<dyn Store>,
        frame_cache_bytes: usize,
        disk_cache_bytes: u64,
    ) -> FrameReader {
        let dir = Arc::new(StateDir::open(self.here.path()).unwrap());
        let limits = ReaderLimits { frame_cache_bytes, disk_cache_bytes, open_files: 2 };
        FrameReader::new(dir, volume(), Some(store), env(9), limits).unwrap()
    }

    fn gets(&self) -> usize {
        self.store.gets.swap(0, Relaxed)
    }

    fn ptrs(&self, segment: usize) -> Vec<FramePtr> {
        self.frames[segment].iter().map(|(ptr, _)| *ptr).collect()
    }

    fn check(&self, reader: &FrameReader, segment: usize) {
        for (ptr, plain) in &self.frames[segment] {
            assert_eq!(reader.get(*ptr, FrameKind::Data).unwrap(), plain);
        }
    }
}

fn is_send<T: Send>(value: T) -> T {
    value
}

#[test]
fn neighbours_and_the_header_come_in_one_request() {
    let a = abroad();
    let reader = a.reader(64 << 20, 64 << 20);
    let all = a.ptrs(0);
    assert!(matches!(reader.get(all[0], FrameKind::Data), Err(Error::Missing(m)) if m == [all[0]]));
    assert_eq!(reader.missing_of(&[all[3], all[3]]), [all[3]]);
    block_on(is_send(reader.fetch(&all))).unwrap();
    assert_eq!(a.gets(), 1);
    a.check(&reader, 0);
    // Far from the header and with one frame between them, which is less than the gap.
    let some = a.ptrs(1);
    block_on(reader.fetch(&[some[12], some[10]])).unwrap();
    assert_eq!(a.gets(), 2);
    assert!(reader.missing_of(&[some[11]]).is_empty(), "what lay between is here too");
    block_on(reader.fetch(&[some[3], some[17]])).unwrap();
    assert_eq!(a.gets(), 2, "the header is known");
    block_on(reader.fetch(&some[10..12])).unwrap();
    assert_eq!(a.gets(), 0);
}

#[test]
fn two_fetches_of_one_frame_share_a_request() {
    let a = abroad();
    let reader = a.reader(64 << 20, 64 << 20);
    let all = a.ptrs(0);
    let both =
        async { futures::join!(reader.fetch(&all[..2]), reader.fetch(&all[..2]), reader.fetch(&all[1..2])) };
    let (x, y, z) = block_on(both);
    assert!(x.is_ok() && y.is_ok() && z.is_ok());
    assert_eq!(a.gets(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failed_fetch_is_told_and_can_be_tried_again() {
    let a = abroad();
    let reader = a.reader(64 << 20, 64 << 20);
    a.store.unavailable.store(true, Relaxed);
    let all = a.ptrs(0);
    let two = futures::join!(reader.fetch(&all), reader.fetch(&all));
    assert!(matches!(two, (Err(Error::Store(_)), Err(Error::Store(_)))));
    a.store.unavailable.store(false, Relaxed);
    tokio::time::sleep(Duration::from_secs(1)).await;
    reader.fetch(&a.ptrs(0)).await.unwrap();
    a.check(&reader, 0);
}

#[tokio::test(start_paused = true)]
async fn many_that_want_the_same_are_told_together_that_the_store_does_not_answer() {
    let a = abroad();
    let patience = RetryPolicy::default().read_deadline;
    let retry = RetryStore::new(a.store.clone(), Env::system(), RetryPolicy::default());
    let reader = a.reader_of(Arc::new(retry), 64 << 20, 64 << 20);
    let all = a.ptrs(0);
    // Every other one wants a frame of its own, too: nobody is served half and then waits anew.
    let from = |n: usize| {
        let wanted = if n.is_multiple_of(2) { vec![all[0]] } else { vec![all[0], all[1 + n / 8]] };
        let reader = &reader;
        async move {
            tokio::time::sleep(Duration::from_secs(n as u64)).await;
            let begin = Instant::now();
            (reader.fetch(&wanted).await, begin.elapsed())
        }
    };
    a.store.unavailable.store(true, Relaxed);
    for (fetched, took) in futures::future::join_all((0..100).map(from)).await {
        assert!(matches!(fetched, Err(Error::Store(_))), "{fetched:?}");
        assert!(took <= patience, "{took:?}");
    }
    // As the kernel lets them ask: one after the other.
    let begin = Instant::now();
    for _ in 0..100 {
        reader.fetch(&all[..1]).await.unwrap_err();
    }
    assert!(begin.elapsed() <= patience, "{:?}", begin.elapsed());
    // What nobody asked for is asked for; and then the store is known to be there.
    a.store.unavailable.store(false, Relaxed);
    reader.fetch(&all[19..]).await.unwrap();
    reader.fetch(&all[..1]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_want_of_an_answer_is_shared_for_the_same_frame_only_and_other_failures_are_not() {
    let a = abroad();
    let reader = a.reader(64 << 20, 64 << 20);
    let (here, other, third) = (a.ptrs(0), a.ptrs(1), a.ptrs(2));
    a.store.unavailable.store(true, Relaxed);
    reader.fetch(&here[..1]).await.unwrap_err();
    a.store.unavailable.store(false, Relaxed);
    assert!(matches!(reader.fetch(&here[..1]).await, Err(Error::Store(StoreError::Unavailable { .. }))));
    tokio::time::sleep(Duration::from_secs(1)).await;
    reader.fetch(&here[..1]).await.unwrap();
    // The first fails for a frame that is nowhere; the second wanted another one of it, too.
    let nowhere = FramePtr { seq: Seq(77), ..here[0] };
    let (first, second) = ([nowhere, other[5]], [other[5]]);
    let (first, second) = futures::join!(reader.fetch(&first), reader.fetch(&second));
    assert!(first.is_err() && second.is_ok(), "{first:?} {second:?}");
    // Given up in the middle, it says nothing about the store.
    let mut given_up = Box::pin(reader.fetch(&third[..1]));
    assert!(futures::poll!(given_up.as_mut()).is_pending());
    drop(given_up);
    reader.fetch(&third[..1]).await.unwrap();
}

#[test]
fn the_disk_cache_outlives_a_restart_and_heals() {
    let a = abroad();
    let reader = a.reader(0, 64 << 20);
    block_on(reader.fetch(&a.ptrs(0))).unwrap();
    a.check(&reader, 0);
    drop(reader);
    a.gets();
    let reader = a.reader(0, 64 << 20);
    a.check(&reader, 0);
    assert!(reader.missing_of(&a.ptrs(0)).is_empty());
    // One damaged frame and a damaged header.
    let path = reader.dir.cache_path(Seq(1));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let hurt = a.ptrs(0)[4];
    file.write_all_at(&[0; 100], u64::from(hurt.offset) + 50).unwrap();
    assert!(matches!(reader.get(hurt, FrameKind::Data), Err(Error::Missing(_))));
    block_on(reader.fetch(&[hurt])).unwrap();
    a.check(&reader, 0);
    assert_eq!(a.gets(), 1);
    file.write_all_at(&[1; 20], 40).unwrap();
    drop(reader);
    let reader = a.reader(0, 64 << 20);
    assert_eq!(reader.missing_of(&a.ptrs(0)).len(), 20);
    block_on(reader.fetch(&a.ptrs(0))).unwrap();
    a.check(&reader, 0);
    // Without its index the cached file is indexed anew by what it holds: nothing is asked for again.
    drop(reader);
    std::fs::remove_dir_all(a.here.path().join("index.sled")).unwrap();
    let reader = a.reader(0, 64 << 20);
    assert!(reader.missing_of(&a.ptrs(0)).is_empty());
    a.check(&reader, 0);
}

#[test]
fn damage_in_the_store_is_named_and_never_kept() {
    let a = abroad();
    let hurt = a.ptrs(1)[2];
    let name = segment_name(Seq(2));
    let whole = a.store.objects.lock()[&name].clone();
    for at in [hurt.offset as usize, hurt.offset as usize + 100, 50] {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1;
        a.store.objects.lock().insert(name.clone(), bytes.into());
        let reader = a.reader(1 << 20, 64 << 20);
        let error = block_on(reader.fetch(&[hurt])).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { object, .. } if *object == name), "{error}");
        assert!(matches!(reader.get(hurt, FrameKind::Data), Err(Error::Missing(_))));
    }
    let mut truncated = whole.to_vec();
    truncated.truncate(hurt.offset as usize);
    a.store.objects.lock().insert(name.clone(), truncated.into());
    let error = block_on(a.reader(1 << 20, 64 << 20).fetch(&[hurt])).unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
}

#[test]
fn eviction_takes_dead_frames_first_then_the_oldest_and_never_the_spool() {
    let a = abroad();
    let reader = a.reader(0, 2_000_000);
    let unsent = reader.dir.log_path(Seq(9));
    std::fs::write(&unsent, noise(1, 3_000_000)).unwrap();
    for segment in 0..2 {
        block_on(reader.fetch(&a.ptrs(segment))).unwrap();
    }
    assert!((1_600_000..1_700_000).contains(&reader.disk_cache_bytes()));
    // The older half of segment 1 is dead: room enough for half of segment 3.
    a.ptrs(0)[..10].iter().for_each(|ptr| reader.dead(*ptr));
    let blocks =
        || std::os::unix::fs::MetadataExt::blocks(&reader.dir.cache_path(Seq(1)).metadata().unwrap());
    let before = blocks();
    block_on(reader.fetch(&a.ptrs(2)[..10])).unwrap();
    assert!(reader.disk_cache_bytes() <= 2_000_000);
    assert!(blocks() < before, "the dead frames' blocks went back to the disk");
    assert_eq!(reader.missing_of(&a.ptrs(0)).len(), 10);
    assert!(reader.missing_of(&a.ptrs(1)).is_empty());
    // Segment 2 is used, segment 1 is not: it goes.
    a.check(&reader, 1);
    block_on(reader.fetch(&a.ptrs(2))).unwrap();
    assert!(reader.disk_cache_bytes() <= 2_000_000);
    assert_eq!(reader.missing_of(&a.ptrs(0)).len(), 20);
    assert!(!reader.dir.cache_path(Seq(1)).exists() && unsent.exists());
    a.check(&reader, 2);
    a.check(&reader, 1);
}

#[test]
fn a_retired_segment_is_still_read_and_can_be_evicted() {
    let a = abroad();
    let reader = a.reader(0, 10_000_000);
    for segment in 0..3 {
        let seq = Seq(segment + 1);
        std::fs::write(reader.dir.log_path(seq), &a.store.objects.lock()[&segment_name(seq)]).unwrap();
        a.check(&reader, segment as usize);
        reader.retire(seq).unwrap();
        reader.retire(seq).unwrap();
        assert!(!reader.dir.log_path(seq).exists());
        a.check(&reader, segment as usize);
    }
    assert_eq!(a.gets(), 0);
    drop(reader);
    let reader = a.reader(0, 1_000_000);
    reader.evict().unwrap();
    assert!(reader.disk_cache_bytes() <= 1_000_000);
    a.check(&reader, 2);
    block_on(reader.fetch(&a.ptrs(0)[..1])).unwrap();
    assert_eq!(reader.get(a.ptrs(0)[0], FrameKind::Data).unwrap(), a.frames[0][0].1);
}

fn part(reader: &FrameReader, ptr: FramePtr, from: u32, len: u64) -> Result<Vec<u8>> {
    let mut out = vec![7];
    let outcome = reader.parts_onto(&[Part { ptr, from, len }], &mut out);
    assert_eq!((out[0], out.len()), (7, if outcome.is_ok() { 1 + len as usize } else { 1 }));
    outcome.map(|()| out.split_off(1))
}

#[test]
fn a_little_of_a_frame_is_read_by_its_blocks_and_damage_beside_it_does_not_matter() {
    let a = abroad();
    let reader = a.reader(0, 64 << 20); // nothing is held in memory
    let ptrs = a.ptrs(0);
    let (ptr, plain) = a.frames[0][7].clone();
    assert!(matches!(part(&reader, ptr, 0, 10), Err(Error::Missing(m)) if m == [ptr]));
    block_on(reader.fetch(&ptrs)).unwrap();
    // Its last block is changed on the disk.
    let path = reader.dir.cache_path(Seq(1));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4], u64::from(ptr.offset) + FRAME as u64 - 10).unwrap();
    for (from, len) in [(0, 1), (8191, 2), (8192, 8192), (9_000, 16_000), (0, 30_000), (30_000, 1), (5, 0)] {
        assert_eq!(
            part(&reader, ptr, from, len).unwrap(),
            plain[from as usize..][..len as usize],
            "{from}+{len}"
        );
    }
    // What is damaged, and what lies behind the end: by way of the whole frame, which does not open.
    for (from, len) in [(0, 40_000), (39_990, 5), (39_999, 2)] {
        let got = part(&reader, ptr, from, len);
        assert!(matches!(&got, Err(Error::Missing(m)) if *m == [ptr]), "{from}+{len}: {got:?}");
        block_on(reader.fetch(&[ptr])).unwrap();
        match from as usize + len as usize > FRAME {
            true => assert!(matches!(part(&reader, ptr, from, len), Err(Error::Corrupt { .. }))),
            false => {
                assert_eq!(part(&reader, ptr, from, len).unwrap(), plain[from as usize..][..len as usize])
            }
        }
        file.write_all_at(&[0; 4], u64::from(ptr.offset) + FRAME as u64 - 10).unwrap();
    }
}

#[test]
fn a_little_of_a_frame_that_is_not_in_blocks_comes_from_the_whole() {
    let (home, store) = (tempfile::tempdir().unwrap(), MemoryStore::new());
    let dir = Arc::new(StateDir::open(home.path()).unwrap());
    let mut writer = LogWriter::new(dir.clone(), volume(), env(1), Epoch(1), None, Seq(1), CommitNo(0));
    // Of a length, compressed, that could be one in blocks.
    let plain = [noise(3, 60_000), vec![7; 60_000]].concat();
    let packed = writer.append(FrameKind::Data, &plain).unwrap();
    let page = writer.append(FrameKind::Page, &noise(4, 12_000)).unwrap();
    writer.flush().unwrap();
    assert!(Layout::of(packed.len as usize).is_some() && Layout::of(page.len as usize).is_some());
    let limits = ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 0, open_files: 2 };
    let reader = FrameReader::new(dir, volume(), Some(store), env(9), limits).unwrap();
    assert_eq!(part(&reader, packed, 59_999, 2).unwrap(), plain[59_999..60_001]);
    assert!(matches!(part(&reader, page, 0, 10), Err(Error::Corrupt { .. })));
}

#[test]
fn parts_that_lie_one_behind_the_other_are_read_at_once_and_past_the_cache() {
    let home = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let dir = Arc::new(StateDir::open(home.path()).unwrap());
    let mut writer = LogWriter::new(dir.clone(), volume(), env(1), Epoch(1), None, Seq(1), CommitNo(0));
    let mut plain: Vec<Vec<u8>> = (0..20).map(|i| noise(i, if i == 9 { 70_001 } else { 131_072 })).collect();
    plain[10][..100_000].fill(7); // compressed, to a length that could be one in blocks
    let mut parts: Vec<Part> = Vec::new();
    for (i, plain) in plain.iter().enumerate() {
        if i == 6 {
            writer.append(FrameKind::Data, &noise(77, 100)).unwrap(); // between them
        }
        let ptr = writer.append(FrameKind::Data, plain).unwrap();
        parts.push(Part { ptr, from: 0, len: plain.len() as u64 });
    }
    writer.close().unwrap();
    // A reader begins and ends within a frame.
    parts[0] = Part { from: 20_000, len: 111_072, ..parts[0] };
    parts[10].len = 25_000;
    parts[19].len = 5;
    assert!(Layout::of(parts[10].ptr.len as usize).is_some_and(|layout| layout.plain_len() >= 25_000));
    let wanted: Vec<u8> = parts
        .iter()
        .zip(&plain)
        .flat_map(|(p, plain)| &plain[p.from as usize..][..p.len as usize])
        .copied()
        .collect();
    let limits = ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 1 << 20, open_files: 4 };
    let reader = FrameReader::new(dir.clone(), volume(), None, env(2), limits).unwrap();
    let (path, everything) = (dir.log_path(Seq(1)), 0..parts[19].ptr.range().end);
    let kernel = std::fs::File::open(&path).unwrap();
    let read = |parts: &[Part]| {
        let mut out = Vec::new();
        reader.parts_onto(parts, &mut out).map(|()| out)
    };
    for cached in [true, false] {
        if !cached {
            // SAFETY: the descriptor is open, and no pointers are passed.
            let dropped = unsafe { libc::posix_fadvise(kernel.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            assert_eq!(dropped, 0);
        }
        let before = kernel.is_cached(&everything);
        assert!(read(&parts).unwrap() == wanted, "cached: {cached}");
        assert_eq!(kernel.is_cached(&everything), before, "what was not in the cache need not be");
        let mut out = Vec::new();
        // What opens before one that does not is kept.
        let runs = [(0, 6), (6, 4), (10, 0), (11, 9), (14, 6), (19, 1)];
        assert_eq!(runs.map(|(at, _)| (at, reader.run_onto(&parts[at..], &mut out))), runs);
        assert_eq!(reader.run_onto(&[Part { len: 131_073, ..parts[1] }], &mut out), 0);
    }
    // Small steps in order go through the cache, for the kernel's read-ahead.
    for from in (0..131_072).step_by(4096) {
        read(&[Part { from, len: 4096, ..parts[12] }]).unwrap();
    }
    assert!(kernel.is_cached(&parts[12].ptr.range()));
    // Damage in the midst of a run: what lies before it can be read, and it is named.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4], u64::from(parts[3].ptr.offset) + 70_000).unwrap();
    assert!(read(&parts[..3]).unwrap() == wanted[..3 * 131_072 - 20_000]);
    assert!(matches!(read(&parts), Err(Error::Corrupt { .. })));
    let missing = |seq| Part { ptr: FramePtr { seq: Seq(seq), ..parts[0].ptr }, ..parts[0] };
    let asked = [missing(8), parts[1], missing(9)];
    assert!(matches!(read(&asked), Err(Error::Missing(m)) if m == [asked[0].ptr, asked[2].ptr]));
}
