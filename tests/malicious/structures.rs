//! Hostile volumes whose pages, checkpoints and segments are not put together as they must be.
//! Invariant: each differs from the honest volume in what its name says.

use crate::evil::{Evil, directory};
use crate::forge::Segment;
use embassyfs::log::segment::IndexedCommit;
use embassyfs::tree::delta::{self, Counters};
use embassyfs::tree::page::Run;
use embassyfs::tree::value;
use embassyfs::tree::{Delta, key};
use embassyfs::types::{CommitNo, Epoch, FrameKind, FramePtr, Head, Ino, Seq};

/// A name, a part of what must be told of it, and the volume.
type Case = (&'static str, &'static str, Evil);

pub fn all() -> Vec<Case> {
    [trees(), roots(), segments()].into_iter().flatten().collect()
}

fn page(level: u8, entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut run = Run::default();
    entries.iter().for_each(|(key, value)| run.push(key, value));
    let mut out = Vec::new();
    run.encode(level, 0..run.count(), &mut out);
    out
}

fn pointer(ptr: FramePtr) -> Vec<u8> {
    [&ptr.seq.0.to_le_bytes()[..], &ptr.offset.to_le_bytes(), &ptr.len.to_le_bytes()].concat()
}

/// Keys that divide the entries of the root directory.
fn keys(n: u64) -> Vec<Vec<u8>> {
    (0..n).map(|i| if i == 0 { Vec::from([0]) } else { key::entry(Ino::ROOT, 3 + i) }).collect()
}

fn counters() -> Counters {
    Evil::honest().counters
}

/// An inner page of `n` entries that all point to `child`.
fn fan(level: u8, n: u64, child: FramePtr) -> Vec<u8> {
    page(level, &keys(n).into_iter().map(|key| (key, pointer(child))).collect::<Vec<_>>())
}

/// A tree under `make`'s root page in segment 2; what is behind it in the log is the honest root directory.
fn tree(make: impl FnOnce(&mut Segment) -> Vec<u8>) -> Evil {
    let mut evil = Evil::with_tree(counters(), |segment| {
        let root = make(segment);
        Some(segment.frame(FrameKind::Page, &root))
    });
    let head = evil.head_of(1);
    let root = (key::inode(Ino::ROOT), Some(directory(Ino::ROOT, 4, 3).encode()));
    let mut third = evil.segment(3);
    third.commit(2, &delta::encode(&counters(), &Delta::from([root])));
    evil.add(3, third.close(Some(head)));
    evil
}

fn trees() -> Vec<Case> {
    let later = FramePtr { seq: Seq(9), offset: 96, len: 500 };
    let empty_leaf = || page(0, &[(vec![0], vec![1])]);
    vec![
        (
            "a page that points to itself",
            "another frame lies there",
            tree(|segment| {
                // The page's own place is known before it is sealed: the frame is as long as the page, and 24 bytes.
                let offset = segment.bytes.len() as u32;
                let ptr = |len| FramePtr { seq: Seq(2), offset, len };
                let len = fan(3, 5, ptr(0)).len() as u32 + 24;
                fan(3, 5, ptr(len))
            }),
        ),
        (
            "forty levels of pages, each a thousand times below the next",
            "tree page",
            tree(|segment| {
                let mut child = segment.frame(FrameKind::Page, &empty_leaf());
                for level in 1..40 {
                    child = segment.frame(FrameKind::Page, &fan(level, 1000, child));
                }
                fan(40, 1000, child)
            }),
        ),
        (
            "the same with leaves that have nothing of what is asked",
            "tree page",
            tree(|segment| {
                let mut child = segment.frame(FrameKind::Page, &page(0, &[(vec![0xff; 20], vec![1])]));
                for level in 1..40 {
                    child = segment.frame(FrameKind::Page, &fan(level, 1000, child));
                }
                fan(40, 1000, child)
            }),
        ),
        ("a page of level 255", "tree page", tree(|_| fan(255, 5, later))),
        ("children in segments to come", "log/", tree(|_| fan(1, 5, later))),
        ("children of 4 GiB", "tree page", tree(|_| fan(1, 5, FramePtr { len: u32::MAX, ..later }))),
        (
            "children that are data",
            "not Page",
            tree(|segment| {
                let data = segment.frame(FrameKind::Data, &empty_leaf());
                fan(1, 5, data)
            }),
        ),
        (
            "children of another level",
            "tree page",
            tree(|segment| {
                let leaf = segment.frame(FrameKind::Page, &empty_leaf());
                fan(7, 5, leaf)
            }),
        ),
        (
            "children whose keys are not theirs",
            "tree page",
            tree(|segment| {
                let leaf = segment.frame(FrameKind::Page, &page(0, &[(key::inode(Ino(1)), vec![1])]));
                fan(1, 8, leaf)
            }),
        ),
        (
            "a page that says it has 2^32-1 entries",
            "tree page",
            tree(|_| [&[1, 0, 0, 0][..], &[0xff; 40]].concat()),
        ),
        ("a page without entries", "tree page", tree(|_| vec![1, 0, 0, 0, 0, 0, 0, 0])),
        ("an empty page", "tree page", tree(|_| Vec::new())),
        (
            "entries outside the page",
            "tree page",
            tree(|_| [&[1, 0, 0, 0, 1, 0, 0, 0][..], &[0xf0; 4], &[0xff; 40]].concat()),
        ),
        ("keys that do not ascend", "tree page", {
            let state = Evil::honest();
            let mut entries: Vec<_> =
                state.changes.iter().map(|(k, v)| (k.clone(), v.as_ref().unwrap().to_vec())).collect();
            entries.reverse();
            tree(move |_| page(0, &entries))
        }),
        (
            "the same key a thousand times",
            "tree page",
            tree(|_| {
                let root = directory(Ino::ROOT, 4, 3).encode().to_vec();
                page(0, &vec![(key::inode(Ino::ROOT), root); 1000])
            }),
        ),
        (
            "a page that unpacks to 256 MiB",
            "does not decompress",
            tree(|segment| {
                let bomb = bomb(256 << 20);
                let child = segment.raw_frame(FrameKind::Page, 1, &bomb);
                fan(1, 5, child)
            }),
        ),
        (
            "a page that says it unpacks to 4 GiB",
            "does not decompress",
            tree(|segment| {
                let child = segment.raw_frame(FrameKind::Page, 1, &[0xff, 0xff, 0xff, 0xff, 0x10, 0]);
                fan(1, 5, child)
            }),
        ),
    ]
}

/// The contents of a compressed frame of so many zeros (LZ4: one byte, then a match as long as is wanted).
fn bomb(len: usize) -> Vec<u8> {
    let mut out = (len as u32).to_le_bytes().to_vec();
    out.extend_from_slice(&[0x1f, 0, 1, 0]);
    // The last five bytes must be literals.
    let left = len - 1 - 19 - 5;
    out.extend(std::iter::repeat_n(0xff, left / 255));
    out.extend_from_slice(&[(left % 255) as u8, 0x50, 0, 0, 0, 0, 0]);
    out
}

fn roots() -> Vec<Case> {
    let root = |bend: fn(&mut embassyfs::tree::checkpoint::Root)| Evil::with_root(counters(), |_| None, bend);
    vec![
        ("a checkpoint without a tree", "", root(|_| {})),
        (
            "a checkpoint whose tree lies behind it",
            "checkpoint/",
            root(|root| {
                root.tree = Some(FramePtr { seq: Seq(9), offset: 96, len: 500 });
            }),
        ),
        (
            "a checkpoint with a tree of 4 GiB",
            "checkpoint/",
            root(|root| {
                root.tree = Some(FramePtr { seq: Seq(2), offset: 96, len: u32::MAX });
            }),
        ),
        (
            "a checkpoint of the last commit there can be",
            "checkpoint/",
            root(|root| root.commit = CommitNo(u64::MAX)),
        ),
        (
            "a checkpoint that replays from behind itself",
            "checkpoint/",
            root(|root| {
                root.replay_prev = root.replay_prev.map(|prev| Head { seq: Seq(2), ..prev });
            }),
        ),
        (
            "a checkpoint that replays from segments to come",
            "log/",
            root(|root| {
                root.replay_seq = Seq(1000);
                root.replay_prev = root.replay_prev.map(|prev| Head { seq: Seq(999), ..prev });
            }),
        ),
        (
            "a checkpoint that replays from the end of all segments",
            "checkpoint/",
            root(|root| {
                root.replay_seq = Seq(u64::MAX);
                root.root_seq = Seq(u64::MAX);
            }),
        ),
        ("a checkpoint that replays from nothing", "checkpoint/", root(|root| root.replay_prev = None)),
        (
            "a checkpoint of another history",
            "log/",
            root(|root| {
                root.replay_prev =
                    root.replay_prev.map(|prev| Head { hash: crate::forge::no_hash(), ..prev });
            }),
        ),
        (
            "a checkpoint with counters at their end",
            "checkpoint/",
            root(|root| {
                root.counters = Counters { next_ino: u64::MAX, live_bytes: u64::MAX, inodes: u64::MAX };
            }),
        ),
    ]
}

/// An honest first segment, and a second one that `make` fills and closes.
fn second(make: impl FnOnce(Segment, Head) -> (Vec<u8>, Head)) -> Evil {
    let mut evil = Evil::new();
    let state = Evil::honest();
    let first = evil.first(&delta::encode(&state.counters, &state.changes));
    let head = evil.add(1, first.close(None));
    let second = evil.segment(2);
    evil.add(2, make(second, head));
    evil
}

/// The entry of a commit whose deltas are the first `parts` frames.
fn whole_commit(no: u64, parts: usize) -> IndexedCommit {
    IndexedCommit { no: CommitNo(no), time: crate::forge::TIME, deltas: 0..parts }
}

fn body() -> Vec<Vec<u8>> {
    delta::encode(&counters(), &Delta::new())
}

fn segments() -> Vec<Case> {
    let index = |frames: u32, commits: u32, rest: &[u8]| {
        [&[1][..], &frames.to_le_bytes(), &commits.to_le_bytes(), rest].concat()
    };
    vec![
        (
            "an index of 2^32-1 frames",
            "log/",
            second(|mut segment, head| {
                segment.commit(2, &body());
                segment.close_with(Some(head), &index(u32::MAX, u32::MAX, &[1; 100]), |trailer| {
                    (trailer.frame_count, trailer.commit_count) = (u32::MAX, u32::MAX);
                })
            }),
        ),
        (
            "an index of frames that are not there",
            "log/",
            second(|mut segment, head| {
                segment.commit(2, &body());
                let frames: Vec<u8> = [[3, 0xff, 0xff, 0xff, 0x7f]; 3].concat();
                segment.close_with(Some(head), &index(3, 0, &frames), |trailer| trailer.frame_count = 3)
            }),
        ),
        (
            "a commit number that goes back",
            "log/",
            second(|mut segment, head| {
                segment.commit(1, &body());
                segment.close(Some(head))
            }),
        ),
        (
            "a trailer whose commits go back",
            "log/",
            second(|mut segment, head| {
                segment.commit(2, &body());
                let index = segment.index.encode();
                segment.close_with(Some(head), &index, |trailer| trailer.last_commit = CommitNo(1))
            }),
        ),
        (
            "the last commit number there is",
            "log/",
            second(|mut segment, head| {
                segment.commit(u64::MAX, &body());
                segment.close(Some(head))
            }),
        ),
        (
            "a trailer that knows of the last commit there is",
            "log/",
            second(|mut segment, head| {
                segment.frame(FrameKind::Mark, b"");
                let index = segment.index.encode();
                segment.close_with(Some(head), &index, |trailer| trailer.last_commit = CommitNo(u64::MAX))
            }),
        ),
        ("an epoch that goes back", "log/", {
            let mut evil = Evil::new();
            let state = Evil::honest();
            let mut first = Segment::new(&evil.ctx, Seq(1), Epoch(5));
            first.commit(1, &delta::encode(&state.counters, &state.changes));
            let head = evil.add(1, first.close(None));
            let mut second = evil.segment(2);
            second.commit(2, &body());
            evil.add(2, second.close(Some(head)));
            evil
        }),
        ("the last segment number there is", "log/ffff", {
            let mut evil = Evil::replayed(Evil::honest());
            let mut last = evil.segment(u64::MAX);
            last.commit(2, &body());
            let prev = evil.head_of(0);
            let closed = last.close(Some(prev));
            evil.add(u64::MAX, closed);
            evil
        }),
        (
            "a delta that is none",
            "delta",
            second(|mut segment, head| {
                segment.commit(2, &[b"no delta".to_vec()]);
                segment.close(Some(head))
            }),
        ),
        (
            "a delta of 2^32-1 entries",
            "delta",
            second(|mut segment, head| {
                let mut body = body();
                body[0][25..29].fill(0xff);
                segment.commit(2, &body);
                segment.close(Some(head))
            }),
        ),
        (
            "a delta that unpacks to 256 MiB",
            "log/",
            second(|mut segment, head| {
                segment.raw_frame(FrameKind::Delta, 1, &bomb(256 << 20));
                segment.index.commits.push(whole_commit(2, 1));
                segment.close(Some(head))
            }),
        ),
        (
            "a hundred deltas that unpack to 15 MiB each",
            "log/",
            second(|mut segment, head| {
                for _ in 0..100 {
                    segment.raw_frame(FrameKind::Delta, 1, &bomb(15 << 20));
                }
                segment.index.commits.push(whole_commit(2, 100));
                segment.close(Some(head))
            }),
        ),
        (
            "a thousand commits of 2 MiB of zeros each, never a checkpoint",
            "unpack to too much",
            second(|mut segment, head| {
                for i in 0..1000u64 {
                    let value = value::encode_xattr(&vec![0; 2 << 20]);
                    let changes: Delta =
                        [(key::xattr(Ino(10 + i), b"user.zeros"), Some(value))].into_iter().collect();
                    segment.commit(2 + i, &delta::encode(&counters(), &changes));
                }
                segment.close(Some(head))
            }),
        ),
        (
            "a segment that is its own predecessor",
            "log/",
            second(|mut segment, head| {
                segment.commit(2, &body());
                segment.close(Some(Head { seq: Seq(2), ..head }))
            }),
        ),
    ]
}
