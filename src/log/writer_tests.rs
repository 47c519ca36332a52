//! Tests of the writer on disks that fill up or fail.

use super::super::Frames;
use super::super::reader::{FrameReader, ReaderLimits};
use super::super::testing::{SmallDisk, env, noise, volume};
use super::*;
use crate::disk::{Disk, SystemDisk};
use parking_lot::Mutex;

struct Setup {
    _tmp: tempfile::TempDir,
    dir: Arc<StateDir>,
    room: Arc<Mutex<u64>>,
    broken: Arc<Mutex<Option<i32>>>,
    writer: LogWriter,
    reader: FrameReader,
}

fn setup() -> Setup {
    let tmp = tempfile::tempdir().unwrap();
    let dir = Arc::new(StateDir::open(tmp.path()).unwrap());
    let (room, broken) = (Arc::new(Mutex::new(u64::MAX)), Arc::<Mutex<_>>::default());
    let (room2, broken2) = (room.clone(), broken.clone());
    let writer = LogWriter::new(dir.clone(), volume(), env(1), Epoch(1), None, Seq(1), CommitNo(0))
        .with_create(Box::new(move |path| {
            let file = SystemDisk.open(path, Mode::CreateNew)?;
            let (room, broken) = (room2.clone(), broken2.clone());
            Ok(Arc::new(SmallDisk { file, room, broken, refused: Arc::default() }))
        }));
    let limits = ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 1 << 20, open_files: 4 };
    let reader = FrameReader::new(dir.clone(), volume(), None, env(2), limits).unwrap();
    Setup { _tmp: tmp, dir, room, broken, writer, reader }
}

fn time(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 0 }
}

#[test]
fn frames_can_be_read_while_the_segment_is_open_and_after() {
    let mut s = setup();
    let mut wanted = Vec::new();
    for (i, len) in [0, 1, 63, 64, 5_000, 20_000, 3 << 20].into_iter().enumerate() {
        for plain in [noise(i as u64, len), vec![7; len]] {
            wanted.push((s.writer.append(FrameKind::Data, &plain).unwrap(), plain));
        }
    }
    s.writer.flush().unwrap();
    let check = |reader: &FrameReader| {
        for (ptr, plain) in &wanted {
            assert_eq!(reader.get(*ptr, FrameKind::Data).unwrap(), plain);
            assert!(matches!(reader.get(*ptr, FrameKind::Page), Err(Error::Corrupt { .. })));
        }
    };
    check(&s.reader);
    let (noise, same) = (wanted[12].0.len as usize, wanted[13].0.len as usize);
    assert!(noise == sealed_len(3 << 20) && same < 20_000, "{noise} {same}");
    s.writer.append_commit(CommitNo(1), time(1), &[]).unwrap();
    let closed = s.writer.close().unwrap().unwrap();
    assert_eq!(std::fs::metadata(&closed.file.path).unwrap().len(), closed.len);
    assert_eq!((closed.head.seq, closed.last_commit), (Seq(1), CommitNo(1)));
    assert_eq!((s.writer.last_closed(), s.writer.close().unwrap()), (Some(closed.head), None));
    check(&s.reader);
}

#[test]
fn a_full_disk_loses_nothing_and_the_writer_goes_on_when_there_is_room() {
    let mut s = setup();
    *s.room.lock() = 300_000;
    let mut wanted = Vec::new();
    let mut refused = 0;
    for i in 0..40 {
        let plain = noise(i, 100_000);
        match s.writer.append(FrameKind::Data, &plain) {
            Ok(ptr) => wanted.push((ptr, plain)),
            Err(e) => {
                assert!(e.is_no_space(), "{e}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    let before = s.writer.open_len();
    let commit = s.writer.append_commit(CommitNo(1), time(1), &[noise(1, 10), noise(2, 10)]);
    assert!(commit.unwrap_err().is_no_space());
    assert_eq!((s.writer.open_len(), s.writer.last_commit()), (before, CommitNo(0)));
    assert!(s.writer.sync().unwrap_err().is_no_space());
    *s.room.lock() = before + 500;
    s.writer.append_commit(CommitNo(1), time(1), &[noise(1, 10), noise(2, 10)]).unwrap();
    s.writer.sync().unwrap();
    // Now the index does not fit.
    assert!(s.writer.close().unwrap_err().is_no_space());
    assert_eq!(std::fs::metadata(s.dir.log_path(Seq(1))).unwrap().len(), s.writer.open_len());
    *s.room.lock() = u64::MAX;
    s.writer.append_commit(CommitNo(2), time(2), &[]).unwrap();
    s.writer.close().unwrap().unwrap();
    for (ptr, plain) in wanted {
        assert_eq!(s.reader.get(ptr, FrameKind::Data).unwrap(), plain);
    }
}

#[test]
fn a_failed_sync_latches_the_writer_for_good() {
    let mut s = setup();
    s.writer.append_commit(CommitNo(1), time(1), &[]).unwrap();
    *s.broken.lock() = Some(libc::EIO);
    assert!(matches!(s.writer.sync(), Err(Error::Io { .. })));
    *s.broken.lock() = None;
    assert!(matches!(s.writer.sync(), Err(Error::Latched(_))));
    assert!(matches!(s.writer.append(FrameKind::Data, b"x"), Err(Error::Latched(_))));
    assert!(matches!(s.writer.append_commit(CommitNo(2), time(1), &[]), Err(Error::Latched(_))));
    assert!(matches!(s.writer.close(), Err(Error::Latched(_))));
}

#[test]
fn a_trailer_that_did_not_fit_and_cannot_be_cut_off_latches_the_writer() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let mut s = setup();
        s.writer.append_commit(CommitNo(1), time(1), &[]).unwrap();
        s.writer.sync().unwrap();
        (*s.room.lock(), *s.broken.lock()) = (s.writer.open_len() + 50, Some(errno));
        let error = s.writer.close().unwrap_err();
        assert!(error.to_string().starts_with("cut "), "{error}");
        (*s.room.lock(), *s.broken.lock()) = (u64::MAX, None);
        assert!(matches!(s.writer.close(), Err(Error::Latched(_))));
        assert!(matches!(s.writer.append(FrameKind::Data, b"x"), Err(Error::Latched(_))));
    }
}

#[test]
fn commits_do_not_go_back() {
    let mut s = setup();
    s.writer.append_commit(CommitNo(5), time(1), &[]).unwrap();
    assert!(matches!(s.writer.append_commit(CommitNo(5), time(1), &[]), Err(Error::Refused(_))));
    s.writer.close().unwrap().unwrap();
    s.writer.append_commit(CommitNo(6), time(1), &[]).unwrap();
}

#[test]
fn without_a_signing_key_nothing_is_begun() {
    let s = setup();
    let ctx = Arc::new(VolumeContext { signer: None, ..(*volume()).clone() });
    let mut writer = LogWriter::new(s.dir.clone(), ctx, env(1), Epoch(1), None, Seq(1), CommitNo(0));
    assert!(matches!(writer.append(FrameKind::Data, b"x"), Err(Error::Refused(_))));
    assert!(s.dir.log_segments().unwrap().is_empty());
}
