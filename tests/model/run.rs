//! One run: steps on the file system and on the model side by side, their answers compared, then all that they touched.
//! Invariant: after each step the model is what home has to show, and `history` what each commit has to show.

use super::compare::{Same, View, compare_attr, compare_bytes, compare_list, same};
use super::host::{Host, Sizes};
use super::ops::{Draw, Fill, Op};
use super::reference::{Answer, Model};
use bytes::Bytes;
use embassyfs::fs::{Attr, Caller, Fs, NewNode, Seek, SetAttr, XattrMode};
use embassyfs::tree::value::FileType;
use embassyfs::types::{Ino, Timestamp};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Debug;

/// Steps that are told when a run fails.
const TOLD: usize = 30;
/// Characters of each that are told.
const TOLD_CHARS: usize = 300;
/// Bytes of data in the model above which its largest file is emptied.
const DATA_MAX: u64 = 12 << 20;
/// Attributes of 64 KiB that fill the memtable (24 MiB).
const FLOOD: usize = 420;

/// A listing under way.
pub(super) struct Scan {
    dir: Ino,
    cookie: u64,
    /// Arrival of the entry that was listed last.
    arrival: u64,
}

pub struct Run {
    pub(super) seed: u64,
    pub(super) draw: Draw,
    pub(super) host: Host,
    pub(super) model: Model,
    /// The model after the last step of each commit.
    pub(super) history: Vec<(u64, Model)>,
    /// Every inode number that was given out.
    pub(super) used: BTreeSet<Ino>,
    pub(super) cookies: BTreeMap<u64, u64>,
    pub(super) scans: Vec<Scan>,
    pub(super) now: Timestamp,
    pub(super) step: u64,
    pub(super) recent: VecDeque<String>,
    /// Commit that was shipped on demand, the newest.
    pub(super) shipped: u64,
    /// Commit that was waited for, the newest.
    pub(super) acked: u64,
    /// Checkpoints in the store when home was opened.
    pub(super) checkpoints: usize,
    pub(super) done: Counts,
}

/// What a run came to, so that a test can see that it did what it is for.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    pub steps: u64,
    pub errors: u64,
    pub commits: u64,
    pub reopened: u64,
    pub crashes: u64,
    /// Crashes after which something was missing.
    pub lost: u64,
    pub readers: u64,
    /// Checkpoints that were made beside the run.
    pub checkpoints: u64,
}

impl Counts {
    pub fn plus(self, other: Counts) -> Counts {
        Counts {
            steps: self.steps + other.steps,
            errors: self.errors + other.errors,
            commits: self.commits + other.commits,
            reopened: self.reopened + other.reopened,
            crashes: self.crashes + other.crashes,
            lost: self.lost + other.lost,
            readers: self.readers + other.readers,
            checkpoints: self.checkpoints + other.checkpoints,
        }
    }
}

/// Whatever ends a run early, also a panic in the file system: the steps that led to it.
impl Drop for Run {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let steps: Vec<&str> = self.recent.iter().map(String::as_str).collect();
        eprintln!(
            "seed {} step {}; the last {} steps:\n{}\nagain: EMBASSYFS_{}_SEED={} cargo test --release --test {} \
             other_seeds -- --nocapture",
            self.seed,
            self.step,
            steps.len(),
            steps.join("\n"),
            super::NAME.to_uppercase(),
            self.seed,
            super::NAME
        );
    }
}

impl Run {
    pub fn new(seed: u64, sizes: Sizes, floods: bool) -> Run {
        let mut draw = Draw::new(seed, u64::from(sizes.parameters.record_size), floods);
        let now = Timestamp { secs: draw.rng.pick(&[1_700_000_000, 5_000_000_000]), nanos: 0 };
        let host = Host::new(sizes, now);
        let model = Model::new(now);
        let mut run = Run {
            seed,
            draw,
            model: model.clone(),
            history: vec![(0, model)],
            host,
            used: BTreeSet::from([Ino::ROOT]),
            cookies: BTreeMap::new(),
            scans: Vec::new(),
            now,
            step: 0,
            recent: VecDeque::new(),
            shipped: 0,
            acked: 0,
            checkpoints: 0,
            done: Counts::default(),
        };
        run.note();
        run
    }

    /// Takes `steps` steps, then compares everything, here and after all ends; panics where something differs.
    pub fn go(&mut self, steps: u64) -> Counts {
        let last =
            [Op::Compare, Op::Ship, Op::Embassy { newest: true, fresh: true }, Op::Reopen { ship: true }];
        for step in 0..steps + last.len() as u64 {
            let op = match step.checked_sub(steps) {
                None => self.draw.next(&self.model, self.scans.len()),
                Some(i) => last[i as usize].clone(),
            };
            self.take(&op);
        }
        let commits = self.history.last().map_or(0, |(commit, _)| *commit);
        Counts { steps: self.step, commits, ..self.done }
    }

    fn take(&mut self, op: &Op) {
        self.step += 1;
        let nanos = self.now.nanos + 1 + self.draw.rng.below(999_999_998) as u32;
        self.now = Timestamp {
            secs: self.now.secs + i64::from(nanos / 1_000_000_000),
            nanos: nanos % 1_000_000_000,
        };
        self.host.set_clock(self.now);
        let before: BTreeSet<Ino> = self.touched(op);
        let told: String = format!("{:6} {op:?}", self.step).chars().take(TOLD_CHARS).collect();
        self.recent.push_back(told);
        if self.recent.len() > TOLD {
            self.recent.pop_front();
        }
        let result = self.apply(op).and_then(|()| {
            let after = self.touched(op);
            before.union(&after).try_for_each(|ino| self.look_at(*ino))
        });
        if let Err(difference) = result
            && !self.excused()
        {
            self.tell(&difference);
        }
        if self.model.used() > DATA_MAX
            && let Some(ino) = self.largest()
        {
            let set = SetAttr { size: Some(0), ..SetAttr::default() };
            self.take(&Op::SetAttr { ino, set });
        }
    }

    fn largest(&self) -> Option<Ino> {
        self.model.nodes.iter().max_by_key(|(_, node)| node.data.data_bytes()).map(|(ino, _)| *ino)
    }

    pub(super) fn tell(&self, difference: &str) -> ! {
        panic!("seed {} step {}: {difference}", self.seed, self.step);
    }

    /// Inodes that a step names, by number or by place.
    fn touched(&self, op: &Op) -> BTreeSet<Ino> {
        let place = |dir: &Ino, name: &Bytes| {
            let entry = self.model.node(*dir).and_then(|node| node.entry(name));
            [Some(*dir), entry.map(|entry| entry.ino)].into_iter().flatten()
        };
        match op {
            Op::Make { dir, name, .. } | Op::Remove { dir, name, .. } => place(dir, name).collect(),
            Op::Link { ino, dir, name } => place(dir, name).chain([*ino]).collect(),
            Op::Rename { from, to, .. } => place(&from.0, &from.1).chain(place(&to.0, &to.1)).collect(),
            Op::Copy { from, to, .. } => BTreeSet::from([from.0, to.0]),
            Op::Write { ino, .. }
            | Op::Fallocate { ino, .. }
            | Op::SetAttr { ino, .. }
            | Op::SetXattr { ino, .. }
            | Op::RemoveXattr { ino, .. }
            | Op::Forget { ino, .. } => BTreeSet::from([*ino]),
            _ => BTreeSet::new(),
        }
    }

    fn look_at(&mut self, ino: Ino) -> Same {
        match (self.host.run(|fs| fs.getattr(ino)), self.model.node(ino)) {
            (Ok(attr), None) => compare_attr(&self.model, &attr),
            (Ok(attr), Some(node)) => {
                compare_attr(&self.model, &attr)?;
                if node.kind != FileType::Regular || self.draw.rng.one_in(2) {
                    return Ok(()); // half the time is enough
                }
                let (world, volume) = (&self.host.world, self.host.home());
                let view = View { world, volume, batch: 1, cookies: &mut self.cookies };
                view.compare_holes(ino, node).map(drop)
            }
            (Err(libc::ESTALE), None) => {
                self.draw.gone.push(ino);
                Ok(())
            }
            (Err(errno), _) => Err(format!("getattr of {ino:?}: errno {errno}")),
        }
    }

    /// The step changed the model: the commit that has it is the newest.
    pub(super) fn note(&mut self) {
        let commit = self.host.newest();
        self.history.retain(|(no, _)| *no < commit);
        self.history.push((commit, self.model.clone()));
    }

    /// What a commit has to show.
    pub(super) fn at(&self, commit: u64) -> &Model {
        let found = self.history.iter().rev().find(|(no, _)| *no <= commit);
        &found.expect("the history begins with commit 0").1
    }

    fn agree<T: PartialEq + Debug>(&mut self, found: Result<T, i32>, expected: Answer<T>) -> Same {
        match (found, expected) {
            (Ok(found), Ok(expected)) => same(|| "the answer".into(), found, expected),
            (Err(errno), Err(right)) if right.contains(&errno) => {
                self.done.errors += 1;
                Ok(())
            }
            (found, expected) => Err(format!("the answer: found {found:?}, the model says {expected:?}")),
        }
    }

    fn fs<T>(&self, op: impl FnMut(&Fs) -> embassyfs::fs::Result<T>) -> Result<T, i32> {
        self.host.run(op)
    }

    pub(super) fn apply(&mut self, op: &Op) -> Same {
        match op {
            Op::Make { .. } | Op::Link { .. } | Op::Remove { .. } | Op::Rename { .. } => {
                self.change_names(op)?;
                self.note();
            }
            Op::Write { .. }
            | Op::Fallocate { .. }
            | Op::Copy { .. }
            | Op::SetAttr { .. }
            | Op::SetXattr { .. }
            | Op::RemoveXattr { .. } => {
                self.change_inode(op)?;
                self.note();
            }
            Op::Hold { ino } => {
                if self.model.node(*ino).is_some() {
                    self.host.home().fs.looked_up(*ino);
                    self.model.hold(*ino);
                }
            }
            Op::Forget { ino, n } => {
                let found = self.fs(|fs| fs.forget(*ino, *n));
                self.model.forget(*ino, *n);
                self.agree(found, Ok(()))?;
                self.note();
            }
            Op::Flood { inos } => self.flood(inos)?,
            Op::Commit { wait } => {
                let commit = self.host.newest();
                if self.host.commit(*wait) {
                    self.acked = commit;
                }
            }
            Op::Ship => self.ship()?,
            Op::Compare => self.compare_home()?,
            Op::Reopen { ship } => self.reopen(*ship)?,
            Op::Crash => self.crash()?,
            Op::Embassy { newest, fresh } => self.look_abroad(*newest, *fresh)?,
            _ => self.ask(op)?,
        }
        Ok(())
    }

    fn flood(&mut self, inos: &[Ino]) -> Same {
        for i in 0..FLOOD {
            let (ino, name) = (inos[i % inos.len()], Bytes::from(format!("user.flood{}", i / inos.len())));
            let value = Fill { len: 65_536, seed: self.step * 3 + 1 };
            self.change_inode(&Op::SetXattr { ino, name, value, mode: XattrMode::Any })?;
            self.note();
        }
        Ok(())
    }

    fn change_names(&mut self, op: &Op) -> Same {
        let now = self.now;
        match op {
            Op::Make { dir, name, kind, mode, umask, rdev, target, who, hold } => {
                let node = NewNode { kind: *kind, mode: *mode, umask: *umask, rdev: *rdev, target };
                let found = self.fs(|fs| fs.make(*dir, name, &node, *who));
                let ino = found.as_ref().map_or(Ino(0), |attr| attr.ino);
                let expected = self.model.make(*dir, name, &node, *who, now, ino);
                self.agree(found.map(|_| ()), expected)?;
                if ino != Ino(0) {
                    self.born(ino)?;
                    if *hold {
                        self.host.home().fs.looked_up(ino);
                        self.model.hold(ino);
                    }
                }
                Ok(())
            }
            Op::Link { ino, dir, name } => {
                let found = self.fs(|fs| fs.link(*ino, *dir, name));
                let expected = self.model.link(*ino, *dir, name, now);
                if let Ok(attr) = &found
                    && expected.is_ok()
                {
                    compare_attr(&self.model, attr)?;
                }
                self.agree(found.map(|_| ()), expected)
            }
            Op::Remove { dir, name, directory } => {
                let found =
                    self.fs(|fs| if *directory { fs.rmdir(*dir, name) } else { fs.unlink(*dir, name) });
                let expected = self.model.remove(*dir, name, *directory, now);
                self.agree(found, expected)
            }
            Op::Rename { from, to, flags, who } => self.rename(from, to, *flags, *who),
            _ => unreachable!("no change of names"),
        }
    }

    fn born(&mut self, ino: Ino) -> Same {
        if self.used.insert(ino) { Ok(()) } else { Err(format!("{ino:?} was given out before")) }
    }

    fn rename(&mut self, from: &(Ino, Bytes), to: &(Ino, Bytes), flags: u32, who: Caller) -> Same {
        let found = self.fs(|fs| fs.rename((from.0, &from.1), (to.0, &to.1), flags, who));
        // Which number the whiteout got can only be asked.
        let mut whiteout = Ino(0);
        if found.is_ok() && flags & libc::RENAME_WHITEOUT != 0 {
            // At once, before a commit can have the rename: what was just made needs nothing from the store.
            let left = self.host.home().fs.lookup(from.0, &from.1);
            let left = left.map_err(|error| format!("lookup of the whiteout: {error}"))?;
            if left.inode.kind() == FileType::CharDevice && !self.used.contains(&left.ino) {
                whiteout = left.ino;
                self.born(whiteout)?;
            }
        }
        let expected = self.model.rename(from, to, flags, who, self.now, whiteout);
        self.agree(found, expected)
    }

    fn change_inode(&mut self, op: &Op) -> Same {
        let now = self.now;
        match op {
            Op::Write { ino, at, fill, kill } => {
                let data = fill.bytes();
                let found = self.fs(|fs| fs.write(*ino, *at, &data, *kill));
                let expected = self.model.write(*ino, *at, &data, *kill, now);
                self.agree(found, expected)
            }
            Op::Fallocate { ino, at, len, mode, kill } => {
                let found = self.fs(|fs| fs.fallocate(*ino, *at, *len, *mode, *kill));
                let expected = self.model.fallocate(*ino, *at, *len, *mode, *kill, now);
                self.agree(found, expected)
            }
            Op::Copy { from, to, len, kill } => {
                let found = self.fs(|fs| fs.copy_range(*from, *to, *len, *kill));
                let expected = self.model.copy(*from, *to, *len, *kill, now);
                self.agree(found, expected)
            }
            Op::SetAttr { ino, set } => {
                let found = self.fs(|fs| fs.setattr(*ino, set));
                let expected = self.model.setattr(*ino, set, now);
                if let Ok(attr) = &found
                    && expected.is_ok()
                {
                    // Space that cannot be counted at once is a guess in this answer; the next `stat` has it right.
                    let blocks = self.model.nodes[ino].data.data_bytes().div_ceil(4096) * 8;
                    compare_attr(&self.model, &Attr { blocks, ..attr.clone() })?;
                }
                self.agree(found.map(|_| ()), expected)
            }
            Op::SetXattr { ino, name, value, mode } => {
                let value = value.bytes();
                let found = self.fs(|fs| fs.setxattr(*ino, name, &value, *mode));
                let expected = self.model.setxattr(*ino, name, &value, *mode, now);
                self.agree(found, expected)
            }
            Op::RemoveXattr { ino, name } => {
                let found = self.fs(|fs| fs.removexattr(*ino, name));
                let expected = self.model.removexattr(*ino, name, now);
                self.agree(found, expected)
            }
            _ => unreachable!("no change of an inode"),
        }
    }

    /// Steps that change nothing.
    fn ask(&mut self, op: &Op) -> Same {
        match op {
            Op::Lookup { dir, name } => {
                // The kernel asks only directories that it knows.
                if self.model.node(*dir).is_none_or(|node| node.kind != FileType::Directory) {
                    return Ok(());
                }
                let found = self.fs(|fs| fs.lookup(*dir, name)).map(|attr| attr.ino);
                let expected = self.model.lookup(*dir, name);
                self.agree(found, expected)
            }
            Op::Read { ino, at, len } => {
                let found = self.fs(|fs| fs.read(*ino, *at, *len as usize));
                match (found, self.model.read(*ino, *at, *len)) {
                    (Ok(found), Ok(expected)) => compare_bytes(*ino, *at, &found, &expected),
                    (found, expected) => self.agree(found.map(|_| ()), expected.map(|_| ())),
                }
            }
            Op::SeekTo { ino, at, what } => {
                if self.model.node(*ino).is_some_and(|node| node.kind != FileType::Regular) {
                    return Ok(()); // the kernel does not ask
                }
                let found = self.fs(|fs| fs.seek(*ino, *at, *what));
                let expected = self.model.seek(*ino, *at, *what == Seek::Data);
                self.agree(found, expected)
            }
            Op::GetXattr { ino, name } => {
                let found = self.fs(|fs| fs.getxattr(*ino, name)).map(Bytes::from);
                let expected = self.model.getxattr(*ino, name);
                self.agree(found, expected)
            }
            Op::Readlink { ino } => {
                let found = self.fs(|fs| fs.readlink(*ino));
                let expected = self.model.readlink(*ino);
                self.agree(found, expected)
            }
            Op::Scan { dir } => {
                self.scans.push(Scan { dir: *dir, cookie: 0, arrival: 0 });
                Ok(())
            }
            Op::ScanOn { scan, limit } => self.scan_on(*scan, *limit),
            _ => unreachable!("not a question"),
        }
    }

    /// Goes on with a listing, whatever has come and gone in the directory since.
    fn scan_on(&mut self, which: usize, limit: usize) -> Same {
        let Scan { dir, cookie, arrival } = self.scans[which];
        let found = self.fs(|fs| fs.readdir(dir, cookie, limit));
        let (items, node) = match (found, self.model.node(dir)) {
            (Ok(items), Some(node)) if node.kind == FileType::Directory => (items, node),
            (Err(libc::ESTALE), None) => return self.scan_over(which),
            (Err(libc::ENOTDIR), Some(node)) if node.kind != FileType::Directory => {
                return self.scan_over(which);
            }
            (found, _) => return Err(format!("readdir of {dir:?} after {cookie}: {found:?}")),
        };
        let left: Vec<_> = node.entries.iter().filter(|entry| entry.arrival > arrival).cloned().collect();
        compare_list(&self.model, dir, cookie, &items, &left)?;
        let Some(last) = items.last() else { return self.scan_over(which) };
        let listed = left.iter().find(|entry| entry.name == last.name);
        self.scans[which] =
            Scan { dir, cookie: last.cookie, arrival: listed.map_or(arrival, |entry| entry.arrival) };
        Ok(())
    }

    fn scan_over(&mut self, which: usize) -> Same {
        self.scans.remove(which);
        Ok(())
    }
}
