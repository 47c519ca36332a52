//! What a run does, one step after the other: drawn from the seed and from what the model has.
//! Invariant: a step is drawn without asking the file system anything, so the seed alone gives the steps, but for
//! what depends on which commits there are.

use super::reference::{Model, Node};
use super::rng::Rng;
use bytes::Bytes;
use embassyfs::fs::{Caller, MAX_FILE_SIZE, Seek, SetAttr, XattrMode};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Ino, Timestamp};
use std::ops::Range;

/// Bytes to be written: as many, of that kind.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub len: u64,
    pub seed: u64,
}

impl Fill {
    /// Noise, or one byte again and again (zero among them).
    pub fn bytes(&self) -> Bytes {
        if self.seed.is_multiple_of(3) {
            return vec![(self.seed % 5) as u8; self.len as usize].into();
        }
        let mut rng = Rng::new(self.seed);
        let mut out = Vec::with_capacity(self.len as usize + 8);
        while (out.len() as u64) < self.len {
            out.extend_from_slice(&rng.next().to_le_bytes());
        }
        out.truncate(self.len as usize);
        out.into()
    }
}

#[derive(Clone, Debug)]
pub enum Op {
    Make {
        dir: Ino,
        name: Bytes,
        kind: FileType,
        mode: u32,
        umask: u32,
        rdev: u32,
        target: Bytes,
        who: Caller,
        hold: bool,
    },
    Lookup {
        dir: Ino,
        name: Bytes,
    },
    Link {
        ino: Ino,
        dir: Ino,
        name: Bytes,
    },
    Remove {
        dir: Ino,
        name: Bytes,
        directory: bool,
    },
    Rename {
        from: (Ino, Bytes),
        to: (Ino, Bytes),
        flags: u32,
        who: Caller,
    },
    Write {
        ino: Ino,
        at: u64,
        fill: Fill,
        kill: bool,
    },
    Read {
        ino: Ino,
        at: u64,
        len: u64,
    },
    Fallocate {
        ino: Ino,
        at: u64,
        len: u64,
        mode: i32,
        kill: bool,
    },
    Copy {
        from: (Ino, u64),
        to: (Ino, u64),
        len: u64,
        kill: bool,
    },
    SeekTo {
        ino: Ino,
        at: u64,
        what: Seek,
    },
    SetAttr {
        ino: Ino,
        set: SetAttr,
    },
    SetXattr {
        ino: Ino,
        name: Bytes,
        value: Fill,
        mode: XattrMode,
    },
    RemoveXattr {
        ino: Ino,
        name: Bytes,
    },
    GetXattr {
        ino: Ino,
        name: Bytes,
    },
    Readlink {
        ino: Ino,
    },
    Hold {
        ino: Ino,
    },
    Forget {
        ino: Ino,
        n: u64,
    },
    Scan {
        dir: Ino,
    },
    ScanOn {
        scan: usize,
        limit: usize,
    },
    Commit {
        wait: bool,
    },
    Ship,
    Compare,
    Reopen {
        ship: bool,
    },
    Crash,
    Embassy {
        newest: bool,
        fresh: bool,
    },
    /// So many attributes that the memtable is full, and a checkpoint is made beside the run. No inode gets so many that
    /// the frame cache cannot hold them: they are listed in one step.
    Flood {
        inos: Vec<Ino>,
    },
}

/// How often each step is taken, by its place in [`Draw::next`].
const WEIGHTS: [u64; 24] =
    [90, 30, 25, 50, 60, 150, 40, 50, 40, 30, 60, 40, 20, 20, 5, 25, 25, 8, 40, 25, 4, 2, 2, 2];

pub struct Draw {
    pub rng: Rng,
    /// A run's own taste: how often it takes each step.
    weights: Vec<u64>,
    record: u64,
    /// Inodes that were freed.
    pub gone: Vec<Ino>,
    pub floods: bool,
    /// More inodes than this are not made.
    nodes_max: usize,
    /// A stretch that was just written, and how many small writes into it are to follow: those meet the sealing.
    hot: (Ino, Range<u64>, u32),
}

impl Draw {
    pub fn new(seed: u64, record: u64, floods: bool) -> Draw {
        let mut rng = Rng::new(seed);
        let mut weights: Vec<u64> = WEIGHTS.iter().map(|w| w * rng.pick(&[0, 1, 2, 2, 4])).collect();
        weights[0] = WEIGHTS[0] * 2; // without nodes there is nothing to do
        weights[20..].copy_from_slice(&WEIGHTS[20..]);
        let nodes_max = rng.pick(&[20, 80, 300]);
        let hot = (Ino::ROOT, 0..1, 0);
        Draw { rng, weights, record, gone: Vec::new(), floods, nodes_max, hot }
    }

    pub fn next(&mut self, model: &Model, scans: usize) -> Op {
        if self.hot.2 > 0 && !self.rng.one_in(20) {
            return self.write_hot();
        }
        let mut at = self.rng.below(self.weights.iter().sum());
        let mut which = 0;
        while at >= self.weights[which] {
            at -= self.weights[which];
            which += 1;
        }
        let full = model.nodes.len() >= self.nodes_max;
        match which {
            0 if full => self.remove(model),
            0 => self.make(model),
            1 => Op::Lookup { dir: self.dir(model), name: self.any_name(model) },
            2 => {
                let dir = self.dir(model);
                Op::Link { ino: self.node(model), dir, name: self.name(model, dir, 4) }
            }
            3 => self.remove(model),
            4 => self.rename(model),
            5 => self.write(model),
            6 => {
                let ino = self.file(model);
                let len = self.len();
                Op::Read { ino, at: self.offset(model, ino), len }
            }
            7 => self.fallocate(model),
            8 => self.copy(model),
            9 => {
                let ino = self.file(model);
                let what = self.rng.pick(&[Seek::Data, Seek::Hole]);
                Op::SeekTo { ino, at: self.offset(model, ino), what }
            }
            10 => self.setattr(model),
            11 => self.setxattr(model),
            12 => Op::RemoveXattr { ino: self.node(model), name: self.attribute() },
            13 => Op::GetXattr { ino: self.node(model), name: self.attribute() },
            14 => Op::Readlink { ino: self.node(model) },
            15 => Op::Hold { ino: self.node(model) },
            16 => self.forget(model),
            17 => Op::Scan { dir: self.dir(model) },
            18 if scans > 0 => Op::ScanOn {
                scan: self.rng.below(scans as u64) as usize,
                limit: self.rng.pick(&[1, 2, 7, 50]),
            },
            18 | 19 => Op::Commit { wait: self.rng.one_in(3) },
            20 => Op::Ship,
            21 => Op::Embassy { newest: self.rng.one_in(2), fresh: self.rng.one_in(3) },
            22 => self.end(model),
            _ => Op::Compare,
        }
    }

    fn end(&mut self, model: &Model) -> Op {
        match self.rng.below(4) {
            0 if self.floods => Op::Flood { inos: (0..10).map(|_| self.node(model)).collect() },
            0 | 1 => Op::Crash,
            _ => Op::Reopen { ship: self.rng.one_in(2) },
        }
    }

    /// Any inode; now and then one that is gone.
    fn node(&mut self, model: &Model) -> Ino {
        self.one(model, |_| true)
    }

    fn file(&mut self, model: &Model) -> Ino {
        if self.rng.one_in(40) {
            return self.node(model);
        }
        self.one(model, |node| node.kind == FileType::Regular)
    }

    fn dir(&mut self, model: &Model) -> Ino {
        match self.rng.below(40) {
            0 => self.node(model),
            1..10 => Ino::ROOT,
            _ => self.one(model, |node| node.kind == FileType::Directory),
        }
    }

    fn one(&mut self, model: &Model, wanted: impl Fn(&Node) -> bool) -> Ino {
        if !self.gone.is_empty() && self.rng.one_in(60) {
            return self.rng.pick(&self.gone);
        }
        let found: Vec<Ino> =
            model.nodes.iter().filter(|(_, node)| wanted(node)).map(|(ino, _)| *ino).collect();
        if found.is_empty() { Ino::ROOT } else { self.rng.pick(&found) }
    }

    /// A name from a small stock, so that names meet; now and then of any bytes, and of any length.
    fn stock(&mut self) -> Bytes {
        if !self.rng.one_in(8) {
            return Bytes::from(format!("n{}", self.rng.below(30)));
        }
        let len = self.rng.pick(&[1, 2, 40, 254, 255, 255, 256, 300]);
        let odd = |byte: u64| match byte as u8 {
            0 | b'/' | b'.' => 0xff,
            byte => byte,
        };
        (0..len).map(|_| odd(self.rng.next())).collect()
    }

    /// A name for `dir`: once in `n` times one that is there.
    fn name(&mut self, model: &Model, dir: Ino, n: u64) -> Bytes {
        match model.node(dir) {
            Some(node) if !node.entries.is_empty() && self.rng.one_in(n) => self.rng.pick(&node.entries).name,
            _ => self.stock(),
        }
    }

    fn any_name(&mut self, model: &Model) -> Bytes {
        let dir = self.dir(model);
        self.name(model, dir, 2)
    }

    /// A directory and, mostly, a name that is in it.
    fn place(&mut self, model: &Model) -> (Ino, Bytes) {
        let full = |node: &Node| !node.entries.is_empty();
        let dir = if self.rng.one_in(10) { self.dir(model) } else { self.one(model, full) };
        let name = if self.rng.one_in(15) { self.stock() } else { self.name(model, dir, 1) };
        (dir, name)
    }

    fn who(&mut self) -> Caller {
        Caller { uid: self.rng.pick(&[0, 1000, u32::MAX - 1]), gid: self.rng.pick(&[0, 100, 70_000]) }
    }

    fn mode(&mut self) -> u32 {
        let bits = self.rng.next() as u32 & 0o7777;
        if self.rng.one_in(3) { bits } else { bits & 0o777 }
    }

    fn make(&mut self, model: &Model) -> Op {
        use FileType::*;
        let dir = self.dir(model);
        let kinds = [
            Regular,
            Regular,
            Regular,
            Regular,
            Directory,
            Directory,
            Symlink,
            Fifo,
            Socket,
            CharDevice,
            BlockDevice,
        ];
        let len = self.rng.pick(&[1, 10, 300, 4095, 4096, 0]);
        Op::Make {
            dir,
            name: self.name(model, dir, 12),
            kind: self.rng.pick(&kinds),
            mode: self.mode(),
            umask: self.rng.pick(&[0, 0o022, 0o077, 0o777]),
            rdev: self.rng.next() as u32,
            target: Fill { len, seed: self.rng.next() | 1 }.bytes(),
            who: self.who(),
            hold: self.rng.one_in(4),
        }
    }

    fn remove(&mut self, model: &Model) -> Op {
        let (dir, name) = self.place(model);
        let entry = model.node(dir).and_then(|node| node.entry(&name));
        let is_dir = entry.is_some_and(|entry| model.nodes[&entry.ino].kind == FileType::Directory);
        Op::Remove { dir, name, directory: is_dir != self.rng.one_in(12) }
    }

    fn rename(&mut self, model: &Model) -> Op {
        let from = self.place(model);
        let to = match self.rng.below(5) {
            0 if self.rng.one_in(4) => from.clone(),
            0 | 1 => self.place(model),
            2 => (from.0, self.name(model, from.0, 2)),
            _ => {
                let dir = self.dir(model);
                (dir, self.name(model, dir, 4))
            }
        };
        let flags = self.rng.pick(&[0, 0, 0, 0, 1, 2, 2, 4, 4, 5, 3, 6, 7, 8, 1 << 31]);
        Op::Rename { from, to, flags, who: self.who() }
    }

    fn len(&mut self) -> u64 {
        if self.rng.one_in(150) {
            return (2 << 20) + self.rng.below(4 << 20); // so much that records are sealed before their commit
        }
        let longest = self.rng.pick(&[10, 300, 5000, 5000, 40_000, 3 * self.record, 2 * self.record]);
        1 + self.rng.below(longest.min(600_000))
    }

    /// Near what is there, near the ends of records, and far away.
    fn offset(&mut self, model: &Model, ino: Ino) -> u64 {
        let size = model.node(ino).map_or(0, |node| node.data.size);
        match self.rng.below(16) {
            0 => size,
            1 => size.saturating_add(self.rng.below(100_000)),
            2 => size.saturating_sub(self.rng.below(5000)),
            3..7 => (self.rng.below(20) * self.record + self.rng.below(3)).saturating_sub(1),
            7 if self.rng.one_in(8) => MAX_FILE_SIZE - self.rng.below(10_000),
            7 if self.rng.one_in(4) => self.rng.next() >> self.rng.below(40),
            _ => self.rng.below(size.clamp(1, 300_000)),
        }
    }

    fn write(&mut self, model: &Model) -> Op {
        let ino = self.file(model);
        let at = self.offset(model, ino);
        let fill = Fill { len: self.len(), seed: self.rng.next() };
        if fill.len > 1 << 20 && at < 1 << 40 {
            self.hot = (ino, at..at + fill.len, 100);
        }
        Op::Write { ino, at, fill, kill: self.rng.one_in(2) }
    }

    fn write_hot(&mut self) -> Op {
        let (ino, range, left) = self.hot.clone();
        self.hot.2 = left - 1;
        let at = range.start + self.rng.below(range.end - range.start);
        let fill = Fill { len: 1 + self.rng.below(100), seed: self.rng.next() };
        Op::Write { ino, at, fill, kill: false }
    }

    fn fallocate(&mut self, model: &Model) -> Op {
        use libc::{FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH};
        let ino = self.file(model);
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        let modes = [0, KEEP, PUNCH | KEEP, PUNCH | KEEP, PUNCH | KEEP, zero, zero | KEEP];
        let mode = if self.rng.one_in(20) { FALLOC_FL_COLLAPSE_RANGE } else { self.rng.pick(&modes) };
        let len = match self.rng.below(20) {
            0 => 0,
            1 => self.rng.next() >> 1,
            _ => self.len(),
        };
        Op::Fallocate { ino, at: self.offset(model, ino), len, mode, kill: self.rng.one_in(2) }
    }

    fn copy(&mut self, model: &Model) -> Op {
        let from = self.file(model);
        let to = if self.rng.one_in(3) { from } else { self.file(model) };
        let len = if self.rng.one_in(20) { self.rng.next() >> 2 } else { self.len() };
        Op::Copy {
            from: (from, self.offset(model, from)),
            to: (to, self.offset(model, to)),
            len,
            kill: self.rng.one_in(2),
        }
    }

    fn time(&mut self) -> Option<Timestamp> {
        let secs = [i64::MIN, -1, 0, 4_291_747_200, 1 << 34, i64::MAX, -62_135_596_800];
        let nanos = self.rng.pick(&[0, 1, 999_999_999]);
        (!self.rng.one_in(4)).then(|| Timestamp { secs: self.rng.pick(&secs), nanos })
    }

    fn setattr(&mut self, model: &Model) -> Op {
        let sized = self.rng.one_in(2);
        let ino = if sized { self.file(model) } else { self.node(model) };
        let mut set = SetAttr { privileged: self.rng.one_in(2), ..SetAttr::default() };
        if sized {
            set.size = Some(match self.rng.below(20) {
                0 => 0,
                1 => MAX_FILE_SIZE,
                2 => u64::MAX,
                _ => self.offset(model, ino),
            });
        }
        if !sized || self.rng.one_in(8) {
            set.mode = self.rng.one_in(3).then(|| self.mode());
            set.uid = self.rng.one_in(3).then(|| self.who().uid);
            set.gid = self.rng.one_in(3).then(|| self.who().gid);
            set.atime = self.rng.one_in(3).then(|| self.time());
            set.mtime = self.rng.one_in(3).then(|| self.time());
        }
        Op::SetAttr { ino, set }
    }

    /// To have `system.*` in the runs, its names are added here, and what they mean to the model's `setxattr`.
    fn attribute(&mut self) -> Bytes {
        let long = |len: usize| Bytes::from(format!("user.{}", "x".repeat(len - 5)));
        match self.rng.below(24) {
            0 => long(255),
            1 => long(256),
            2 => Bytes::new(),
            3..9 => Bytes::from_static(b"security.capability"),
            9 => Bytes::from(self.rng.pick(&["security.capabilit", "plain", "system.other", "user."])),
            n => Bytes::from(format!("{}{n}", ["user.a", "trusted.b", "security.c"][n as usize % 3])),
        }
    }

    fn setxattr(&mut self, model: &Model) -> Op {
        let len = match self.rng.below(20) {
            0 => self.rng.pick(&[65_535, 65_536, 65_537]),
            1 => self.rng.below(20_000),
            _ => self.rng.below(100),
        };
        let value = Fill { len, seed: self.rng.next() };
        let mode = self.rng.pick(&[XattrMode::Any, XattrMode::Any, XattrMode::Create, XattrMode::Replace]);
        Op::SetXattr { ino: self.node(model), name: self.attribute(), value, mode }
    }

    fn forget(&mut self, model: &Model) -> Op {
        let held: Vec<(Ino, u64)> = model.held.iter().map(|(ino, n)| (*ino, *n)).collect();
        match held.is_empty() {
            true => Op::Hold { ino: self.node(model) },
            false => {
                let (ino, n) = self.rng.pick(&held);
                Op::Forget { ino, n: 1 + self.rng.below(n) }
            }
        }
    }
}
