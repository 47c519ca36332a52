//! The bytes of a segment, pinned: what version 1 wrote is read for ever, and is written the same to the byte.
//! `EMBASSYFS_BLESS=1` writes the fixtures anew, which is right only together with a new format version.

#![allow(clippy::unwrap_used)] // a test's helpers may

#[path = "common/forge.rs"]
mod forge;

use bytes::Bytes;
use embassyfs::clock::{Clock, Env, Random};
use embassyfs::crypto::keys::Purpose;
use embassyfs::crypto::seal::{Sealer, TAG_LEN};
use embassyfs::log::chain::ChainStart;
use embassyfs::log::claim::{About, Mark, Put, read_marked};
use embassyfs::log::reader::{FrameReader, ReaderLimits};
use embassyfs::log::recovery::{Role, Step, recover};
use embassyfs::log::segment::{HEADER_LEN, Kind, TRAILER_LEN, VolumeContext};
use embassyfs::log::statedir::StateDir;
use embassyfs::log::writer::LogWriter;
use embassyfs::log::{Append, Frames, Part};
use embassyfs::types::{CommitNo, Epoch, FrameKind, FramePtr, Hash, Head, Seq, Timestamp};
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// Time stands still; the first random bytes are all 1, the next all 2, and so on.
struct Fixed(AtomicU8);

impl Clock for Fixed {
    fn now(&self) -> Timestamp {
        Timestamp { secs: 1_700_000_000, nanos: 0 }
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for Fixed {
    fn fill(&self, out: &mut [u8]) {
        out.fill(self.0.fetch_add(1, Ordering::Relaxed));
    }
}

fn env() -> Env {
    Env {
        clock: Arc::new(Fixed(AtomicU8::new(1))),
        random: Arc::new(Fixed(AtomicU8::new(1))),
        ..Env::system()
    }
}

fn volume() -> Arc<VolumeContext> {
    Arc::new(forge::volume())
}

const DATA: &[u8] = b"Every state keeps registers.";
const TIME: Timestamp = Timestamp { secs: -1, nanos: 500_000_000 };

/// What the second segment holds compresses.
fn page() -> Vec<u8> {
    b"land, business, population; ".repeat(40)
}

struct Written {
    dir: Arc<StateDir>,
    _tmp: tempfile::TempDir,
    data: FramePtr,
    page: FramePtr,
}

fn write() -> Written {
    let tmp = tempfile::tempdir().unwrap();
    let dir = Arc::new(StateDir::open(tmp.path()).unwrap());
    let mut writer = LogWriter::new(dir.clone(), volume(), env(), Epoch(3), None, Seq(1), CommitNo(0));
    let data = writer.append(FrameKind::Data, DATA).unwrap();
    writer.append_commit(CommitNo(1), TIME, &[b"delta".to_vec()]).unwrap();
    writer.close().unwrap().unwrap();
    writer.set_stored(Seq(1));
    let page = writer.append(FrameKind::Page, &page()).unwrap();
    writer.append_commit(CommitNo(2), TIME, &[b"first part".to_vec(), b"second part".to_vec()]).unwrap();
    writer.close().unwrap().unwrap();
    Written { dir, _tmp: tmp, data, page }
}

fn fixture(name: impl Display) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/v1/segment-{name}"))
}

/// Bytes that no compressor makes shorter.
fn noise(len: usize) -> Vec<u8> {
    let words = (0u32..).flat_map(|n| embassyfs::crypto::hash(&n.to_le_bytes()).0);
    words.take(len).collect()
}

#[test]
fn segments_are_written_to_the_byte_as_they_always_were() {
    let written = write();
    for n in [1, 2] {
        let bytes = std::fs::read(written.dir.log_path(Seq(n))).unwrap();
        if std::env::var_os("EMBASSYFS_BLESS").is_some() {
            std::fs::write(fixture(n), &bytes).unwrap();
        }
        let pinned = std::fs::read(fixture(n)).unwrap();
        // The second segment went through a compressor, which may find a shorter form some day: that is no change
        // of the format. Segment 1 has no such excuse.
        if n == 1 {
            assert_eq!(bytes, pinned);
        }
    }
}

#[test]
fn segments_of_version_one_are_read() {
    let written = write();
    for n in [1, 2] {
        std::fs::copy(fixture(n), written.dir.log_path(Seq(n))).unwrap();
    }
    let mut commits = Vec::new();
    let mut apply = |no: CommitNo, time, seq: Seq, bodies: &[Bytes]| {
        commits.push((no.0, time, seq.0, bodies.to_vec()));
        Ok(Step::Continue)
    };
    let (ctx, env) = (volume(), env());
    let start = ChainStart::default();
    let recovering = recover(&ctx, &written.dir, &env, None, start, Role::Reader, &mut apply);
    let recovered = futures::executor::block_on(recovering).unwrap();
    assert_eq!((recovered.epoch, recovered.last_commit, recovered.next_seq), (Epoch(3), CommitNo(2), Seq(3)));
    let body = |text: &'static str| Bytes::from_static(text.as_bytes());
    let wanted =
        vec![(1, TIME, 1, vec![body("delta")]), (2, TIME, 2, vec![body("first part"), body("second part")])];
    assert_eq!(commits, wanted);
    let limits = ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 0, open_files: 2 };
    let reader = FrameReader::new(written.dir.clone(), volume(), None, env, limits).unwrap();
    assert_eq!(reader.get(written.data, FrameKind::Data).unwrap(), DATA);
    assert_eq!(reader.get(written.page, FrameKind::Page).unwrap(), page());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Opens the frame at `offset` by the words of `docs/format.md` alone.
fn open_by_the_book(segment: &[u8], offset: usize, index: bool) -> (u8, u8, Vec<u8>) {
    let header = &segment[..96];
    let trailer = &segment[segment.len() - 344..];
    let key = if index {
        volume().key.derive(Purpose::SegmentIndex, &[header, &trailer[152..184]].concat())
    } else {
        volume().key.derive(Purpose::SegmentFrames, header)
    };
    let frame = &segment[offset..offset + u32_at(segment, offset) as usize];
    let associated =
        [&header[16..32], &header[32..40], &header[40..44], &(offset as u32).to_le_bytes()[..], &frame[..8]];
    let (contents, tag) = frame[8..].split_at(frame.len() - 8 - TAG_LEN);
    let mut plain = contents.to_vec();
    let tag = tag.try_into().unwrap();
    Sealer::new(&key).open(offset as u64, &associated.concat(), &mut plain, tag).unwrap();
    (frame[4], frame[5], plain)
}

#[test]
fn the_format_document_describes_the_bytes() {
    assert_eq!((HEADER_LEN, TRAILER_LEN), (96, 344));
    let segment = std::fs::read(fixture(1)).unwrap();
    assert_eq!(&segment[..8], b"EMBFSSEG");
    assert_eq!((&segment[8..12], u32_at(&segment, 12)), (&[1, 0, 0, 0][..], 7));
    assert_eq!(&segment[16..32], b"embassyfs-volume");
    assert_eq!((u64_at(&segment, 32), u32_at(&segment, 40), u32_at(&segment, 44)), (1, 3, 0));
    assert_eq!(segment[48..80], [1; 32]);
    assert_eq!(segment[80..96], embassyfs::crypto::hash(&segment[..80]).0[..16]);

    assert_eq!(open_by_the_book(&segment, 96, false), (1, 0, DATA.to_vec()));
    let delta_at = 96 + 8 + DATA.len() + 16;
    let (kind, flags, delta) = open_by_the_book(&segment, delta_at, false);
    assert_eq!((kind, flags, delta.len()), (3, 0, 30 + 5));
    assert_eq!((delta[0], u64_at(&delta, 1), u64_at(&delta, 9)), (1, 1, u64::MAX));
    assert_eq!((u32_at(&delta, 17), u32_at(&delta, 21), delta[25]), (500_000_000, 0, 1));
    assert_eq!((u32_at(&delta, 26), &delta[30..]), (0, &b"delta"[..]));

    let trailer = &segment[segment.len() - 344..];
    let (index_at, index_len) = (u32_at(trailer, 12) as usize, u32_at(trailer, 16) as usize);
    assert_eq!((&trailer[..8], &trailer[8..12]), (&b"EMBFSEND"[..], &[1, 0, 0, 0][..]));
    assert_eq!((index_at, index_at + index_len), (delta_at + 8 + 35 + 16, segment.len() - 344));
    assert_eq!([u32_at(trailer, 20), u32_at(trailer, 24), u32_at(trailer, 28)], [2, 1, 0]);
    assert_eq!([u64_at(trailer, 32), u64_at(trailer, 40)], [1, 1]);
    assert_eq!((u64_at(trailer, 48), u32_at(trailer, 56)), (u64::MAX, 500_000_000));
    assert_eq!((u64_at(trailer, 60), u32_at(trailer, 68)), (u64::MAX, 500_000_000));
    assert_eq!((u64_at(trailer, 72), u64_at(trailer, 80)), (0, 0));
    assert_eq!(trailer[88..120], [0; 32]);
    assert_eq!(trailer[120..152], embassyfs::crypto::hash(&segment[..segment.len() - 344]).0);
    assert_eq!(trailer[152..184], [2; 32]);
    assert_eq!(trailer[184..280], segment[..96]);
    let signed = [&b"embassyfs v1 segment trailer"[..], &trailer[..280]].concat();
    volume().writer_public.verify(&signed, trailer[280..].try_into().unwrap()).unwrap();

    let (kind, flags, index) = open_by_the_book(&segment, index_at, true);
    assert_eq!((kind, flags, index.len()), (6, 0, 9 + 2 * 5 + 28));
    assert_eq!((index[0], u32_at(&index, 1), u32_at(&index, 5)), (1, 2, 1));
    assert_eq!((index[9], u32_at(&index, 10), index[14]), (1, 24 + 28, 3));
    assert_eq!((u64_at(&index, 19), u64_at(&index, 27), u32_at(&index, 35)), (1, u64::MAX, 500_000_000));
    assert_eq!((u32_at(&index, 39), u32_at(&index, 43)), (1, 1));

    let second = std::fs::read(fixture(2)).unwrap();
    let (kind, flags, block) = open_by_the_book(&second, 96, false);
    assert_eq!((kind, flags, u32_at(&block, 0) as usize), (2, 1, page().len()));
    let trailer_hash = embassyfs::crypto::hash(trailer);
    let trailer = &second[second.len() - 344..];
    assert_eq!((u64_at(trailer, 72), u64_at(trailer, 80), &trailer[88..120]), (1, 1, &trailer_hash.0[..]));
}

#[test]
fn a_frame_in_blocks_is_written_and_read_as_the_format_document_says() {
    const BLOCK: usize = 8192;
    let plain = noise(2 * BLOCK + 5);
    let tmp = tempfile::tempdir().unwrap();
    let dir = Arc::new(StateDir::open(tmp.path()).unwrap());
    let mut writer = LogWriter::new(dir.clone(), volume(), env(), Epoch(3), None, Seq(1), CommitNo(0));
    let ptr = writer.append(FrameKind::Data, &plain).unwrap();
    writer.append_commit(CommitNo(1), TIME, &[]).unwrap();
    writer.close().unwrap().unwrap();
    let bytes = std::fs::read(dir.log_path(Seq(1))).unwrap();
    if std::env::var_os("EMBASSYFS_BLESS").is_some() {
        std::fs::write(fixture("blocks"), &bytes).unwrap();
    }
    let segment = std::fs::read(fixture("blocks")).unwrap();
    assert_eq!(bytes, segment);

    let limits = ReaderLimits { frame_cache_bytes: 0, disk_cache_bytes: 0, open_files: 2 };
    let reader = FrameReader::new(dir, volume(), None, env(), limits).unwrap();
    assert_eq!(reader.get(ptr, FrameKind::Data).unwrap(), plain);
    let mut part = Vec::new();
    reader.parts_onto(&[Part { ptr, from: BLOCK as u32 - 1, len: 3 }], &mut part).unwrap();
    assert_eq!(part, plain[BLOCK - 1..BLOCK + 2]);

    let frame = &segment[96..96 + u32_at(&segment, 96) as usize];
    assert_eq!((frame.len(), frame[4], frame[5]), (8 + plain.len() + 3 * TAG_LEN, 1, 2));
    let associated =
        [&segment[16..32], &segment[32..40], &segment[40..44], &96u32.to_le_bytes()[..], &frame[..8]]
            .concat();
    let sealer = Sealer::new(&volume().key.derive(Purpose::SegmentFrames, &segment[..96]));
    for (n, (sealed, wanted)) in frame[8..].chunks(BLOCK + TAG_LEN).zip(plain.chunks(BLOCK)).enumerate() {
        let (contents, tag) = sealed.split_at(sealed.len() - TAG_LEN);
        let mut opened = contents.to_vec();
        sealer.open(96 + n as u64, &associated, &mut opened, tag.try_into().unwrap()).unwrap();
        assert_eq!(opened, wanted, "block {n}");
    }
}

/// A claim, a barrier and a handover, behind a segment that is only named.
const MARKS: [(&str, Kind, About, u16); 3] = [
    ("claim", Kind::Claim, About::Claim, 1),
    ("barrier", Kind::Barrier, About::Barrier, 2),
    ("handover", Kind::Ordinary, About::Handover, 0),
];

#[test]
fn segments_that_are_a_mark_are_written_and_read_as_the_format_document_says() {
    let prev = Head { seq: Seq(2), hash: Hash([0x11; 32]) };
    for (name, kind, about, number) in MARKS {
        let mark = Mark { about, time: TIME, host: "embassy".into(), text: "flood".into() };
        let put = Put {
            kind,
            seq: Seq(3),
            epoch: Epoch(4),
            prev: Some(prev),
            last_commit: CommitNo(2),
            mark: &mark,
        };
        let (bytes, head) = put.bytes(&volume(), &env()).unwrap();
        if std::env::var_os("EMBASSYFS_BLESS").is_some() {
            std::fs::write(fixture(name), &bytes).unwrap();
        }
        let segment = std::fs::read(fixture(name)).unwrap();
        assert_eq!(bytes, segment, "{name}");
        let read = read_marked(&volume(), Seq(3), &segment).unwrap();
        assert_eq!((read.kind, read.epoch, read.head, read.prev), (kind, Epoch(4), head, Some(prev)));
        assert_eq!((read.last_commit, read.mark), (CommitNo(2), Some(mark)));

        assert_eq!((u64_at(&segment, 32), u32_at(&segment, 40)), (3, 4));
        let (frame, flags, plain) = open_by_the_book(&segment, 96, false);
        assert_eq!((frame, flags, plain.len()), (5, 0, 2 + 12 + 2 + 7 + 2 + 5));
        assert_eq!((plain[0], plain[1]), (1, about as u8));
        assert_eq!((u64_at(&plain, 2), u32_at(&plain, 10)), (u64::MAX, 500_000_000));
        assert_eq!((&plain[14..16], &plain[16..23]), (&[7, 0][..], &b"embassy"[..]));
        assert_eq!((&plain[23..25], &plain[25..]), (&[5, 0][..], &b"flood"[..]));
        let trailer = &segment[segment.len() - 344..];
        assert_eq!(trailer[10..12], number.to_le_bytes());
        assert_eq!([u32_at(trailer, 20), u32_at(trailer, 24)], [1, 0]);
        assert_eq!([u64_at(trailer, 32), u64_at(trailer, 40), u64_at(trailer, 72)], [0, 2, 2]);
        assert_eq!((u64_at(trailer, 80), &trailer[88..120]), (2, &[0x11; 32][..]));
    }
}
