//! The bytes of the tree as `docs/format.md` says them, held fast by `tests/fixtures/v1/tree.txt`.
//! A difference here is a change of the format: it needs a new version, not a new fixture. What has no fixture yet
//! is added by running this test with `EMBASSYFS_NEW_FIXTURES=1`; lines that are there are never rewritten.

#![allow(missing_docs, clippy::unwrap_used)]

use bytes::Bytes;
use embassyfs::clock::{Clock, Env, Random};
use embassyfs::crypto::keys::VolumeKey;
use embassyfs::crypto::sign::SecretKey;
use embassyfs::log::{Frames, Result};
use embassyfs::tree::checkpoint::{self, Root};
use embassyfs::tree::page::Page;
use embassyfs::tree::value::{self, Body, Dirent, Entry, Extent, FileType, Inode};
use embassyfs::tree::{Counters, Delta, Source, Tree, Value, delta, key};
use embassyfs::types::{CommitNo, FrameKind, FramePtr, Hash, Head, Ino, Seq, Timestamp, VolumeId, hex};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PTR: FramePtr = FramePtr { seq: Seq(0x0102_0304), offset: 0x1122_3344, len: 0x5566 };
const VOLUME: VolumeId = VolumeId([0xa5; 16]);

fn time(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 999_999_999 }
}

fn inode(body: Body) -> Inode {
    Inode {
        mode: 0o4755,
        uid: 1000,
        gid: 100,
        nlink: 2,
        size: 0x1_0000_0001,
        flags: value::SPARSE | value::HAS_XATTR,
        atime: time(1),
        mtime: time(2),
        ctime: time(1_700_000_000),
        btime: time(-1),
        body,
    }
}

fn inodes() -> Vec<(&'static str, Inode)> {
    let dir = Body::Directory { parent: Ino::ROOT, next_entry: 300, entries: 17 };
    vec![
        ("inode-regular", inode(Body::Regular)),
        ("inode-directory", inode(dir)),
        ("inode-symlink", inode(Body::Symlink { target: b"../a".to_vec() })),
        ("inode-fifo", inode(Body::Fifo)),
        ("inode-socket", inode(Body::Socket)),
        ("inode-char-device", inode(Body::CharDevice(0x0501))),
        ("inode-block-device", inode(Body::BlockDevice(0x0800_0001))),
    ]
}

fn changes() -> Delta {
    BTreeMap::from([
        (key::inode(Ino(2)), Some(inode(Body::Regular).encode())),
        (key::dirent(Ino::ROOT, b"name"), None),
        (key::xattr(Ino(2), b"user.empty"), Some(Value::from(Vec::new()))),
    ])
}

fn counters() -> Counters {
    Counters { next_ino: 3, live_bytes: 4_294_967_297, inodes: 2 }
}

fn root() -> Root {
    Root {
        tree: Some(PTR),
        commit: CommitNo(258),
        time: time(1_700_000_000),
        counters: counters(),
        replay_seq: Seq(0x0102_0304),
        replay_prev: Some(Head { seq: Seq(0x0102_0303), hash: Hash([0x11; 32]) }),
        root_seq: Seq(0x0102_0304),
    }
}

/// Time and randomness that say the same in each run.
struct Fixed;

impl Clock for Fixed {
    fn now(&self) -> Timestamp {
        time(0)
    }
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for Fixed {
    fn fill(&self, out: &mut [u8]) {
        out.fill(0x5a);
    }
}

fn keys() -> (VolumeKey, SecretKey) {
    (VolumeKey::from_bytes([7; 32]), SecretKey::from_bytes(&[9; 32]))
}

fn sealed(root: &Root) -> Vec<u8> {
    let (key, signer) = keys();
    let env = Env { clock: Arc::new(Fixed), random: Arc::new(Fixed), ..Env::system() };
    checkpoint::seal(root, VOLUME, &key, 1, &signer, &env)
}

fn open(bytes: &[u8], object: &str) -> Result<Root> {
    let (key, signer) = keys();
    checkpoint::open(bytes, object, VOLUME, &key, &signer.public())
}

struct NoFrames;

impl Frames for NoFrames {
    fn get(&self, _: FramePtr, _: FrameKind) -> Result<Bytes> {
        unreachable!("an empty tree has no pages")
    }
}

/// A tree of two leaves and a root, in the order they were written.
fn pages() -> Vec<Vec<u8>> {
    let written = Mutex::new(Vec::new());
    let changes =
        (1..=20).map(|i| (key::extent(Ino(2), i), Some(value::encode_xattr(&[i as u8; 20])))).collect();
    let mut write = |page: &[u8]| {
        let mut written = written.lock().unwrap();
        written.push(page.to_vec());
        Ok(FramePtr { seq: Seq(5), offset: written.len() as u32, len: page.len() as u32 })
    };
    let source = Source { frames: &NoFrames, fetch: &|_| Ok(()) };
    Tree::default().merge(source, &changes, 512, &mut write).unwrap();
    written.into_inner().unwrap()
}

fn all_encodings() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> =
        inodes().iter().map(|(name, inode)| (name.to_string(), inode.encode().to_vec())).collect();
    let mut add = |name: &str, bytes: &[u8]| all.push((name.to_string(), bytes.to_vec()));
    add("key-inode", &key::inode(Ino(0x0102)));
    add("key-dirent", &key::dirent(Ino(0x0102), b"name"));
    add("key-entry", &key::entry(Ino(0x0102), 0x0304));
    add("key-xattr", &key::xattr(Ino(0x0102), b"user.a"));
    add("key-extent", &key::extent(Ino(0x0102), 0x1000));
    add("key-orphan", &key::orphan(Ino(0x0102)));
    add("dirent", &Dirent { entry: 258, ino: Ino(77), kind: FileType::Symlink }.encode());
    add("entry", &Entry { ino: Ino(77), kind: FileType::Directory, name: b"name" }.encode());
    add("xattr", &value::encode_xattr(b"bytes"));
    add("extent-stored", &Extent::Stored { ptr: PTR, from: 4096, len: 65_536 }.encode());
    add("extent-inline", &Extent::Inline { bytes: b"bytes" }.encode());
    add("orphan", &value::encode_orphan());
    for (i, part) in delta::encode(&counters(), &changes()).iter().enumerate() {
        add(&format!("delta-{i}"), part);
    }
    for (i, page) in pages().iter().enumerate() {
        add(&format!("page-{i}"), page);
    }
    add("root", &root().encode());
    add("root-empty", &Root { tree: None, replay_prev: None, replay_seq: Seq(1), ..root() }.encode());
    add("checkpoint", &sealed(&root()));
    all
}

#[test]
fn the_bytes_are_those_of_format_version_1() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1/tree.txt");
    let mut text = std::fs::read_to_string(&path).unwrap_or_default();
    let known: BTreeMap<String, String> =
        text.lines().filter_map(|line| line.split_once(' ')).map(|(n, b)| (n.into(), b.into())).collect();
    let mut added = false;
    for (name, bytes) in all_encodings() {
        match known.get(&name) {
            Some(fixture) => assert_eq!(&hex(&bytes), fixture, "{name}"),
            None => {
                text += &format!("{name} {}\n", hex(&bytes));
                added = true;
            }
        }
    }
    if added {
        assert!(
            std::env::var_os("EMBASSYFS_NEW_FIXTURES").is_some(),
            "there are encodings without a fixture"
        );
        std::fs::write(path, text).unwrap();
    }
}

#[test]
fn what_is_encoded_is_decoded() {
    for (_, inode) in inodes() {
        assert_eq!(Inode::decode(&inode.encode()).unwrap(), inode);
    }
    let dirent = Dirent { entry: u64::MAX, ino: Ino(77), kind: FileType::Socket };
    assert_eq!(Dirent::decode(&dirent.encode()).unwrap(), dirent);
    let entry = Entry { ino: Ino(77), kind: FileType::Fifo, name: &[0xff; 255] };
    assert_eq!(Entry::decode(&entry.encode()).unwrap(), entry);
    for extent in [Extent::Stored { ptr: PTR, from: 1, len: 2 }, Extent::Inline { bytes: &[3; 5000] }] {
        assert_eq!(Extent::decode(&extent.encode()).unwrap(), extent);
    }
    for bytes in [&b""[..], &[1; 65_536]] {
        assert_eq!(value::decode_xattr(&value::encode_xattr(bytes)).unwrap(), bytes);
    }
    value::decode_orphan(&value::encode_orphan()).unwrap();
    for root in [root(), Root { tree: None, replay_prev: None, ..root() }] {
        assert_eq!(Root::decode(&root.encode(), "root").unwrap(), root);
        assert_eq!(open(&sealed(&root), &checkpoint::name(root.commit)).unwrap(), root);
    }
}

/// `bytes` cut at each length, with something behind, and with each bit flipped.
fn damaged(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let cut = (0..bytes.len()).map(|n| bytes[..n].to_vec());
    let longer = std::iter::once([bytes, &[0]].concat());
    let flipped = (0..8 * bytes.len()).map(|bit| {
        let mut bytes = bytes.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    });
    cut.chain(longer).chain(flipped)
}

/// What a decoder accepts it encodes to the same bytes, so nothing in them is overlooked.
#[test]
fn damage_is_an_error_or_another_value_but_never_a_panic() {
    let same = |bad: &[u8], again: Result<Vec<u8>>| assert!(again.is_err() || again.unwrap() == bad);
    for (name, bytes) in all_encodings() {
        for bad in damaged(&bytes) {
            match name.split('-').next().unwrap() {
                "inode" => same(&bad, Inode::decode(&bad).map(|v| v.encode().to_vec())),
                "dirent" => same(&bad, Dirent::decode(&bad).map(|v| v.encode().to_vec())),
                "entry" => same(&bad, Entry::decode(&bad).map(|v| v.encode().to_vec())),
                "extent" => same(&bad, Extent::decode(&bad).map(|v| v.encode().to_vec())),
                "xattr" => same(&bad, value::decode_xattr(&bad).map(|v| value::encode_xattr(v).to_vec())),
                "orphan" => same(&bad, value::decode_orphan(&bad).map(|()| value::encode_orphan().to_vec())),
                "root" => same(&bad, Root::decode(&bad, "root").map(|root| root.encode())),
                "delta" => same(&bad, decode_delta(&bad)),
                "page" => {
                    let _ = Page::parse(bad.into(), PTR).and_then(|page| page.verify());
                }
                "checkpoint" => assert!(open(&bad, &checkpoint::name(root().commit)).is_err()),
                "key" => {
                    key::parse(&bad);
                }
                other => panic!("no decoder for {other}"),
            }
        }
    }
}

fn decode_delta(bytes: &[u8]) -> Result<Vec<u8>> {
    let (counters, changes) = delta::decode(&[bytes])?;
    Ok(delta::encode(&counters, changes.iter().map(|(key, value)| (key, value))).concat())
}

#[test]
fn a_checkpoint_opens_only_as_what_it_is() {
    let (key, signer) = keys();
    let bytes = sealed(&root());
    let object = checkpoint::name(root().commit);
    let writer = signer.public();
    assert_eq!(open(&bytes, &object).unwrap(), root());
    assert_eq!(checkpoint::verify(&bytes, &object, VOLUME, &writer).unwrap().key_id, 1);
    assert!(open(&bytes, &checkpoint::name(CommitNo(259))).is_err());
    assert!(checkpoint::open(&bytes, &object, VolumeId([0; 16]), &key, &writer).is_err());
    let other_key = VolumeKey::from_bytes([8; 32]);
    assert!(checkpoint::open(&bytes, &object, VOLUME, &other_key, &writer).is_err());
    let other_writer = SecretKey::from_bytes(&[1; 32]).public();
    assert!(checkpoint::open(&bytes, &object, VOLUME, &key, &other_writer).is_err());
}

#[test]
fn checkpoint_names_sort_newest_first_and_only_they_are_names() {
    assert!(checkpoint::name(CommitNo(2)) < checkpoint::name(CommitNo(1)));
    for no in [0, 1, 258, u64::MAX] {
        assert_eq!(checkpoint::commit_of(&checkpoint::name(CommitNo(no))), Some(CommitNo(no)));
    }
    for bad in
        ["", "checkpoint/", "checkpoint/ff", "checkpoint/FFFFFFFFFFFFFFFF", "checkpoint/+fffffffffffffff"]
    {
        assert_eq!(checkpoint::commit_of(bad), None);
    }
}
