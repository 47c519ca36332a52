//! A volume in the making, by somebody who has the keys: its state as keys and values, and the segments and checkpoints
//! that say so. Invariant: everything authenticates.

use crate::forge::{self, Segment, TIME};
use embassyfs::clock::Env;
use embassyfs::log::segment::{VolumeContext, head_of};
use embassyfs::tree::checkpoint::{self, Root};
use embassyfs::tree::delta::{self, Counters};
use embassyfs::tree::value::{Body, Dirent, Entry, Extent, FileType, Inode};
use embassyfs::tree::{Delta, Source, Tree, Value, key};
use embassyfs::types::{CommitNo, Epoch, FrameKind, FramePtr, Head, Ino, Seq};

/// Length of the regular file `file`.
pub const FILE_LEN: u64 = 200_000;

/// Inode numbers of the honest volume.
pub const FILE: Ino = Ino(2);
pub const DIR: Ino = Ino(3);
pub const INNER: Ino = Ino(4);
pub const LINK: Ino = Ino(5);
pub const DEEP: Ino = Ino(6);
pub const SPARSE: Ino = Ino(7);

/// What a volume says of itself.
#[derive(Clone)]
pub struct State {
    pub changes: Delta,
    pub counters: Counters,
}

/// Objects of a store, by name.
pub struct Evil {
    pub ctx: VolumeContext,
    pub objects: Vec<(String, Vec<u8>)>,
}

pub fn inode(body: Body, nlink: u32) -> Inode {
    let mode = 0o755;
    let times = (TIME, TIME, TIME, TIME);
    Inode {
        mode,
        uid: 0,
        gid: 0,
        nlink,
        size: 0,
        flags: 0,
        atime: times.0,
        mtime: times.1,
        ctime: times.2,
        btime: times.3,
        body,
    }
}

pub fn directory(parent: Ino, names: u64, nlink: u32) -> Inode {
    inode(Body::Directory { parent, next_entry: 3 + names, entries: names }, nlink)
}

impl State {
    pub fn put(&mut self, key: Vec<u8>, value: Value) {
        self.changes.insert(key, Some(value));
    }

    pub fn name(&mut self, dir: Ino, id: u64, name: &[u8], ino: Ino, kind: FileType) {
        self.put(key::dirent(dir, name), Dirent { entry: id, ino, kind }.encode());
        self.put(key::entry(dir, id), Entry { ino, kind, name }.encode());
    }
}

/// Where the honest file's two frames lie: the first two of segment 1.
fn data_ptrs() -> [FramePtr; 2] {
    let mut segment = Segment::new(&forge::volume(), Seq(1), Epoch(1));
    put_data(&mut segment)
}

fn put_data(segment: &mut Segment) -> [FramePtr; 2] {
    let noise = crate::common::noise(1, FILE_LEN as usize);
    noise
        .chunks(128 << 10)
        .map(|piece| segment.frame(FrameKind::Data, piece))
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

impl Evil {
    /// A small volume in which nothing is wrong.
    pub fn honest() -> State {
        let counters = Counters { next_ino: 8, live_bytes: FILE_LEN + 8, inodes: 7 };
        let mut state = State { changes: Delta::new(), counters };
        let put = |state: &mut State, ino, inode: Inode| state.put(key::inode(ino), inode.encode());
        put(&mut state, Ino::ROOT, directory(Ino::ROOT, 4, 3));
        put(&mut state, FILE, Inode { size: FILE_LEN, ..inode(Body::Regular, 1) });
        put(&mut state, DIR, directory(Ino::ROOT, 2, 3));
        put(&mut state, INNER, inode(Body::Regular, 1));
        put(&mut state, LINK, Inode { size: 4, ..inode(Body::Symlink { target: b"file".to_vec() }, 1) });
        put(&mut state, DEEP, directory(DIR, 0, 2));
        let sparse =
            Inode { size: 1 << 40, flags: embassyfs::tree::value::SPARSE, ..inode(Body::Regular, 1) };
        put(&mut state, SPARSE, sparse);
        state.name(Ino::ROOT, 3, b"file", FILE, FileType::Regular);
        state.name(Ino::ROOT, 4, b"dir", DIR, FileType::Directory);
        state.name(Ino::ROOT, 5, b"link", LINK, FileType::Symlink);
        state.name(Ino::ROOT, 6, b"sparse", SPARSE, FileType::Regular);
        state.name(DIR, 3, b"inner", INNER, FileType::Regular);
        state.name(DIR, 4, b"deep", DEEP, FileType::Directory);
        let [first, second] = data_ptrs();
        let stored = |ptr, len| Extent::Stored { ptr, from: 0, len }.encode();
        state.put(key::extent(FILE, 0), stored(first, 128 << 10));
        state.put(key::extent(FILE, 128 << 10), stored(second, FILE_LEN as u32 - (128 << 10)));
        state.put(key::extent(SPARSE, 1 << 30), Extent::Inline { bytes: b"an isle " }.encode());
        state
    }

    pub fn new() -> Evil {
        Evil { ctx: forge::volume(), objects: Vec::new() }
    }

    pub fn segment(&self, seq: u64) -> Segment {
        Segment::new(&self.ctx, Seq(seq), Epoch(1))
    }

    /// The first segment: the honest file's frames, and a commit of these delta bodies.
    pub fn first(&self, parts: &[Vec<u8>]) -> Segment {
        let mut segment = self.segment(1);
        put_data(&mut segment);
        segment.commit(1, parts);
        segment
    }

    pub fn add(&mut self, seq: u64, closed: (Vec<u8>, Head)) -> Head {
        self.objects.push((embassyfs::log::segment::segment_name(Seq(seq)), closed.0));
        closed.1
    }

    /// The head that the object of this number makes, a segment.
    pub fn head_of(&self, object: usize) -> Head {
        let (name, bytes) = &self.objects[object];
        let digits = name.strip_prefix("log/").unwrap();
        head_of(Seq(u64::from_str_radix(digits, 16).unwrap()), bytes.last_chunk().unwrap())
    }

    /// Publishes `root` as the checkpoint of its commit.
    pub fn publish(&mut self, root: &Root) {
        let signer = self.ctx.signer.as_ref().unwrap();
        let body =
            checkpoint::seal(root, self.ctx.id, &self.ctx.key, self.ctx.key_id, signer, &Env::system());
        self.objects.push((checkpoint::name(root.commit), body));
    }

    /// A volume whose state is in the log.
    pub fn replayed(state: State) -> Evil {
        let mut evil = Evil::new();
        let segment = evil.first(&delta::encode(&state.counters, &state.changes));
        evil.add(1, segment.close(None));
        evil
    }

    /// A volume whose state is in the pages of a checkpoint.
    pub fn in_pages(state: State) -> Evil {
        Evil::in_pages_but(state, |_, page| page.to_vec())
    }

    /// The same, with each page changed on its way.
    pub fn in_pages_but(state: State, mut bend: impl FnMut(usize, &[u8]) -> Vec<u8>) -> Evil {
        Evil::with_tree(state.counters, |segment| {
            let mut written = 0;
            let mut write = |page: &[u8]| {
                written += 1;
                Ok(segment.frame(FrameKind::Page, &bend(written - 1, page)))
            };
            let source = Source { frames: &NoFrames, fetch: &|_| Ok(()) };
            Tree::default().merge(source, &state.changes, 512, &mut write).unwrap().tree.root
        })
    }

    /// A volume with a checkpoint whose pages `make` puts into segment 2.
    pub fn with_tree(counters: Counters, make: impl FnOnce(&mut Segment) -> Option<FramePtr>) -> Evil {
        Evil::with_root(counters, make, |_| {})
    }

    /// The same, with a root record that was bent.
    pub fn with_root(
        counters: Counters,
        make: impl FnOnce(&mut Segment) -> Option<FramePtr>,
        bend: impl FnOnce(&mut Root),
    ) -> Evil {
        let mut evil = Evil::new();
        let first = evil.first(&delta::encode(&counters, &Delta::new()));
        let head = evil.add(1, first.close(None));
        let mut second = evil.segment(2);
        let mut root = Root {
            tree: make(&mut second),
            commit: CommitNo(1),
            time: TIME,
            counters,
            replay_seq: Seq(2),
            replay_prev: Some(head),
            root_seq: Seq(2),
        };
        bend(&mut root);
        second.frame(FrameKind::Root, &root.encode());
        evil.add(2, second.close(Some(head)));
        evil.publish(&root);
        evil
    }
}

pub struct NoFrames;

impl embassyfs::log::Frames for NoFrames {
    fn get(&self, _: FramePtr, _: FrameKind) -> embassyfs::log::Result<bytes::Bytes> {
        unreachable!("an empty tree has no pages")
    }
}
