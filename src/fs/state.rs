//! What a file system holds in memory, and the transaction over it.
//! Invariant: the newest state of a key is in `active`, else in the first of `levels` that has it, else in `tree`;
//! a commit takes the whole change by a pointer swap, and what anybody holds of `levels` outside the lock is not changed.

use super::dirty::DirtyFile;
use super::error::{Error, Result, of, os};
use super::follow::Kept;
use super::inode::new_inode;
use super::lookups::Lookups;
use super::{Fs, Settings};
use crate::clock::Env;
use crate::log::{self, Frames};
use crate::tree::btree::Tree;
use crate::tree::delta::{Counters, Delta, Value};
use crate::tree::key::{self, Key};
use crate::tree::memtable::{Levels, weight, weight_of};
use crate::tree::value::{Body, Inode};
use crate::types::{CommitNo, Ino, Timestamp};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::time::Duration;

/// Entry ids below this are `.` and `..`.
pub(super) const FIRST_ENTRY: u64 = 3;

/// Changed keys in memory, in units of the size at which a checkpoint is made, at which writers wait for it.
const MEMTABLES_MAX: usize = 4;

/// A level of at most so many keys is moved into the next under the lock: nobody notices.
const POURED_MAX: usize = 64;

/// Why a file system is latched in which a change was left half made.
pub(super) const BROKEN: &str = "a bug: a panic in the middle of a change; what was not committed is lost";

/// What recovery hands over: the tree of the newest checkpoint, and the changes replayed behind it.
pub struct Recovery {
    /// Tree of the checkpoint.
    pub tree: Tree,
    /// Changes after it, merged.
    pub replayed: Delta,
    /// Newest commit in them.
    pub last_commit: CommitNo,
    /// Next inode number to hand out.
    pub next_ino: u64,
    /// File bytes the tree refers to.
    pub live_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
    /// Inodes that were unlinked but open; empty for a reader.
    pub orphans: Vec<Ino>,
}

impl Recovery {
    /// A volume without any commit.
    pub fn empty() -> Recovery {
        Recovery {
            tree: Tree::default(),
            replayed: Delta::new(),
            last_commit: CommitNo(0),
            next_ino: Ino::ROOT.0 + 1,
            live_bytes: 0,
            inodes: 0,
            orphans: Vec::new(),
        }
    }
}

/// Changed keys of one or several commits; immutable while anybody else holds them.
#[derive(Clone)]
pub(super) struct Level {
    pub delta: Arc<Delta>,
    pub weight: usize,
    /// Being merged into the tree: later commits may not be folded into it.
    pub frozen: bool,
    /// Its newest commit.
    pub upto: CommitNo,
}

pub(super) type DirtyFiles = HashMap<Ino, DirtyFile>;

pub(super) struct State {
    /// Changes of the running generation.
    pub active: Delta,
    pub active_weight: usize,
    /// Newest first: the commit under way (if any), committed ones, frozen ones.
    pub levels: Vec<Level>,
    pub tree: Tree,
    /// The commit that will carry `active`.
    pub generation: CommitNo,
    /// Inodes from this number on were made in the running generation: the log knows nothing of them.
    pub first_new: u64,
    /// When the oldest change of the running generation was made.
    pub changed_at: Option<Duration>,
    pub next_ino: u64,
    pub live_bytes: u64,
    pub inodes: u64,
    pub dirty: DirtyFiles,
    pub dirty_bytes: u64,
    /// File bytes that the running generation adds at most: what it overwrites or frees is known when it is committed.
    pub growth: u64,
    /// Runs of the generation that is being committed.
    pub sealing: Option<Arc<DirtyFiles>>,
    pub sealing_bytes: u64,
    /// As `growth`, of the generation that is being committed.
    pub sealing_growth: u64,
    /// A change was refused for the volume's size, unless this commit makes room.
    pub over_limit: Option<CommitNo>,
    /// Runs that have become whole records and can be sealed early.
    pub full: VecDeque<(Ino, u64)>,
    pub lookups: Lookups,
    /// What a follower keeps for the kernel though it is gone.
    pub kept: Kept,
    /// In order, so that what frees them does the same things in each simulated run of a seed.
    pub orphans: BTreeSet<Ino>,
    /// Bytes of sparse files that are not holes: counted when first asked for, then kept up to date by writes.
    pub allocated: HashMap<Ino, u64>,
    pub waiting_for_space: Vec<Box<dyn FnOnce() + Send>>,
    pub no_space: bool,
    pub failed: Option<String>,
    /// A change has begun and is not complete yet.
    pub changing: bool,
    /// A panic left a change half made: nothing of the running generation may be committed.
    pub broken: bool,
    /// Commits up to this are asked for now.
    pub wanted: CommitNo,
    /// Commits up to this are asked to be in closed segments.
    pub wanted_closed: CommitNo,
    /// The committer shall end when there is nothing left to commit.
    pub stopping: bool,
}

impl State {
    pub fn new(recovery: Recovery, settings: &Settings, env: &Env) -> State {
        let replayed_weight = recovery.replayed.iter().map(|(k, v)| weight(k, v)).sum();
        let mut state = State {
            active: Delta::new(),
            active_weight: 0,
            levels: Vec::new(),
            tree: recovery.tree,
            generation: CommitNo(recovery.last_commit.0 + 1),
            // A reader makes none, so nothing that it sees is new, whatever the counter says.
            first_new: if settings.read_only { u64::MAX } else { recovery.next_ino },
            changed_at: None,
            next_ino: recovery.next_ino,
            live_bytes: recovery.live_bytes,
            inodes: recovery.inodes,
            dirty: HashMap::new(),
            dirty_bytes: 0,
            growth: 0,
            sealing: None,
            sealing_bytes: 0,
            sealing_growth: 0,
            over_limit: None,
            full: VecDeque::new(),
            lookups: Lookups::default(),
            kept: Kept::default(),
            orphans: recovery.orphans.into_iter().collect(),
            allocated: HashMap::new(),
            waiting_for_space: Vec::new(),
            no_space: false,
            failed: None,
            changing: false,
            broken: false,
            wanted: CommitNo(0),
            wanted_closed: CommitNo(0),
            stopping: false,
        };
        if !recovery.replayed.is_empty() {
            let (delta, upto) = (Arc::new(recovery.replayed), recovery.last_commit);
            state.levels.push(Level { delta, weight: replayed_weight, frozen: false, upto });
        }
        if recovery.last_commit == CommitNo(0) {
            state.make_root(settings, env);
        }
        state
    }

    /// A volume without a commit has an empty root directory; a writer will commit it, a reader only shows it.
    fn make_root(&mut self, settings: &Settings, env: &Env) {
        let now = env.clock.now();
        let body = Body::Directory { parent: Ino::ROOT, next_entry: FIRST_ENTRY, entries: 0 };
        let mut root = new_inode(body, 0o755, settings.root_owner, now);
        root.nlink = 2;
        self.inodes = 1;
        self.put(key::inode(Ino::ROOT), Some(root.encode()));
        if !settings.read_only {
            self.touch(env.clock.monotonic());
        }
    }

    pub fn put(&mut self, key: Key, value: Option<Value>) {
        put(&mut self.active, &mut self.active_weight, key, value);
    }

    /// Marks the running generation as changed.
    pub fn touch(&mut self, now: Duration) {
        self.changed_at.get_or_insert(now);
    }

    pub fn newest_change(&self) -> CommitNo {
        if self.changed_at.is_some() { self.generation } else { CommitNo(self.generation.0 - 1) }
    }

    /// Bytes written but not yet in the log.
    pub fn unlogged_bytes(&self) -> u64 {
        self.dirty_bytes + self.sealing_bytes
    }

    pub fn has_room(&self, settings: &Settings) -> bool {
        self.unlogged_bytes() < settings.dirty_max
            && self.active_weight < settings.memtable_max
            && self.memtable_weight() < MEMTABLES_MAX * settings.memtable_max
            && self.over_limit.is_none()
    }

    /// True while applications write faster than the local disk takes it. One that is full is not waited for, since only what
    /// was sent can go from it; nor is one to which nothing more will be written.
    pub fn is_behind(&self, settings: &Settings) -> bool {
        let goes_on = !self.no_space && !self.stopping && self.failed.is_none();
        goes_on && self.unlogged_bytes() >= settings.dirty_max / 4
    }

    /// File bytes in use, at most.
    pub fn used(&self) -> u64 {
        self.live_bytes + self.growth + self.sealing_growth
    }

    /// Changes the written bytes of a file; the closure also gets the queue of runs that have become whole records.
    pub fn edit_dirty(&mut self, ino: Ino, change: impl FnOnce(&mut DirtyFile, &mut VecDeque<(Ino, u64)>)) {
        self.changing = true;
        let file = self.dirty.entry(ino).or_default();
        let before = file.bytes();
        change(file, &mut self.full);
        let after = file.bytes();
        self.dirty_bytes = self.dirty_bytes + after - before;
        // Bytes sealed early are not in memory any more, but still to be counted.
        self.growth = (self.growth + after).saturating_sub(before);
    }

    pub fn memtable_weight(&self) -> usize {
        self.active_weight + self.levels.iter().map(|l| l.weight).sum::<usize>()
    }

    pub fn get(&self, frames: &dyn Frames, key: &[u8]) -> Result<Option<Value>> {
        match self.older(frames, key)? {
            Some(older) => Ok(older.levels().get(key)?),
            None => Ok(self.newest(frames, key)?),
        }
    }

    /// The value of `key` in the newest state.
    pub fn newest(&self, frames: &dyn Frames, key: &[u8]) -> log::Result<Option<Value>> {
        if let Some(value) = self.active.get(key) {
            return Ok(value.clone());
        }
        for level in &self.levels {
            if let Some(value) = level.delta.get(key) {
                return Ok(value.clone());
            }
        }
        Ok(self.tree.get(frames, key)?.map(|bytes| Value::from(bytes.as_ref())))
    }

    pub fn range(&self, frames: &dyn Frames, range: Range<Key>, limit: usize) -> Result<Vec<(Key, Value)>> {
        if let Some(older) = self.older(frames, &range.start)? {
            return Ok(older.levels().range(&range.start, &range.end, limit)?);
        }
        let mut maps: Vec<&Delta> = Vec::with_capacity(self.levels.len() + 1);
        maps.push(&self.active);
        maps.extend(self.levels.iter().map(|l| &*l.delta));
        Ok(Levels { maps: &maps, tree: &self.tree, frames }.range(&range.start, &range.end, limit)?)
    }

    /// The greatest key in `range`, with its value.
    pub fn last(&self, frames: &dyn Frames, range: Range<Key>) -> Result<Option<(Key, Value)>> {
        if let Some(older) = self.older(frames, &range.start)? {
            return Ok(older.levels().last(&range.start, &range.end)?);
        }
        let mut maps: Vec<&Delta> = Vec::with_capacity(self.levels.len() + 1);
        maps.push(&self.active);
        maps.extend(self.levels.iter().map(|l| &*l.delta));
        Ok(Levels { maps: &maps, tree: &self.tree, frames }.last(&range.start, &range.end)?)
    }

    pub fn inode(&self, frames: &dyn Frames, ino: Ino) -> Result<Inode> {
        match self.get(frames, &key::inode(ino))? {
            Some(value) => {
                let inode = Inode::decode(&value).map_err(|e| of(format!("inode {}", ino.0), e))?;
                Ok(Inode { nlink: if self.is_gone(ino) { 0 } else { inode.nlink }, ..inode })
            }
            None => os(libc::ESTALE),
        }
    }

    /// The volume's counters as of the newest commit that a reader shows.
    pub fn count(&mut self, counters: Counters) {
        (self.next_ino, self.live_bytes, self.inodes) =
            (counters.next_ino, counters.live_bytes, counters.inodes);
    }

    /// True when the log may hold bytes of this file.
    pub fn has_past(&self, ino: Ino) -> bool {
        ino.0 < self.first_new
    }
}

/// The state in the hands of a change. A panic that leaves the change half made latches the file system.
pub(super) struct Changing<'a> {
    state: MutexGuard<'a, State>,
    wake: &'a Condvar,
}

impl Deref for Changing<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Changing<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if self.state.changing && std::thread::panicking() {
            ::log::error!("the file system is read-only from here: {BROKEN}");
            self.state.broken = true;
            self.state.failed.get_or_insert_with(|| BROKEN.into());
            self.wake.notify_one();
        }
        self.state.changing = false;
    }
}

/// One operation that changes things: reads freely, collects its changes, and applies them all at the end.
pub(super) struct Tx<'a> {
    pub fs: &'a Fs,
    pub st: Changing<'a>,
    /// The instant every time stamp of this operation takes.
    pub now: Timestamp,
    inodes: Vec<(Ino, Inode)>,
    puts: Vec<(Key, Option<Value>)>,
}

impl Fs {
    /// Begins a change; refused when nothing may be changed.
    pub(super) fn begin(&self) -> Result<Tx<'_>> {
        if self.settings.read_only {
            return os(libc::EROFS);
        }
        let st = self.state.lock();
        if st.failed.is_some() {
            return os(libc::EROFS);
        }
        if st.memtable_weight() >= MEMTABLES_MAX * self.settings.memtable_max {
            return Err(Error::Busy);
        }
        let st = Changing { state: st, wake: &self.wake };
        Ok(Tx { fs: self, st, now: self.env.clock.now(), inodes: Vec::new(), puts: Vec::new() })
    }

    /// Begins a change that needs room: more bytes or more names.
    pub(super) fn begin_growing(&self) -> Result<Tx<'_>> {
        let tx = self.begin()?;
        tx.want_room()?;
        Ok(tx)
    }
}

impl Tx<'_> {
    /// There is room for more, on the disk and in memory.
    pub fn want_room(&self) -> Result<()> {
        if self.st.no_space {
            return os(libc::ENOSPC);
        }
        if self.st.has_room(&self.fs.settings) { Ok(()) } else { Err(Error::Busy) }
    }

    pub fn frames(&self) -> &dyn Frames {
        &*self.fs.frames
    }

    /// The inode, loaded once; what is changed through the reference is written by [`Tx::apply`].
    pub fn inode(&mut self, ino: Ino) -> Result<&mut Inode> {
        let at = match self.inodes.iter().position(|(n, _)| *n == ino) {
            Some(at) => at,
            None => {
                let inode = self.st.inode(&*self.fs.frames, ino)?;
                self.inodes.push((ino, inode));
                self.inodes.len() - 1
            }
        };
        Ok(&mut self.inodes[at].1)
    }

    /// A new inode, or the replacement of one.
    pub fn set_inode(&mut self, ino: Ino, inode: Inode) {
        self.inodes.retain(|(n, _)| *n != ino);
        self.inodes.push((ino, inode));
    }

    /// The inode is gone: it will not be written by [`Tx::apply`].
    pub fn drop_inode(&mut self, ino: Ino) {
        self.inodes.retain(|(n, _)| *n != ino);
        self.put(key::inode(ino), None);
    }

    pub fn put(&mut self, key: Key, value: Option<Value>) {
        self.puts.push((key, value));
    }

    /// A fresh inode number; taken only if the operation is applied.
    pub fn next_ino(&mut self) -> Ino {
        let ino = Ino(self.st.next_ino);
        self.st.next_ino += 1;
        ino
    }

    /// Makes the change visible. Nothing can fail from here on.
    pub fn apply(mut self) {
        self.st.changing = true;
        for (key, value) in self.puts.drain(..) {
            self.st.put(key, value);
        }
        for (ino, inode) in self.inodes.drain(..) {
            self.st.put(key::inode(ino), Some(inode.encode()));
        }
        let first = self.st.changed_at.is_none();
        self.st.touch(self.fs.env.clock.monotonic());
        drop(self.st);
        if first {
            self.fs.wake.notify_one();
        }
    }
}

/// Changes a key in a map that weighs so much.
fn put(delta: &mut Delta, total: &mut usize, key: Key, value: Option<Value>) {
    let (heavy, len) = (weight(&key, &value), key.len());
    let old = delta.insert(key, value).map_or(0, |old| weight_of(len, &old));
    *total = *total + heavy - old;
}

/// Moves the keys of a level of few into the one below it, if it `may` be and nobody else holds either. False when there
/// is no such level.
fn pour(levels: &mut Vec<Level>, may: &impl Fn(&Level, &Level) -> bool) -> bool {
    for at in 1..levels.len() {
        let (above, below) = levels.split_at_mut(at);
        let (Some(upper), Some(lower)) = (above.last_mut(), below.first_mut()) else { continue };
        if upper.delta.len() > POURED_MAX || !may(upper, lower) {
            continue;
        }
        let maps = (Arc::get_mut(&mut upper.delta), Arc::get_mut(&mut lower.delta));
        let (Some(from), Some(into)) = maps else { continue };
        for (key, value) in std::mem::take(from) {
            put(into, &mut lower.weight, key, value);
        }
        lower.upto = upper.upto;
        levels.remove(at - 1);
        return true;
    }
    false
}

/// Folds small levels into larger ones, those that `may` be, so that a lookup passes few of them: behind it each is less
/// than half as heavy as the next. What a commit of little leaves, its changes and, above them, a light level of extents,
/// is moved key by key, for that costs nothing of what is there already; larger levels are copied into new ones outside the
/// lock. Only one thread changes the levels of a file system: the committer, or the follower; what a checkpoint takes away
/// lies below all that may be folded.
pub(super) fn fold_levels(state: &Mutex<State>, may: impl Fn(&Level, &Level) -> bool) {
    while pour(&mut state.lock().levels, &may) {}
    loop {
        let (at, upper, lower) = {
            let state = state.lock();
            let heavy = |pair: &[Level]| pair[0].weight * 2 >= pair[1].weight && may(&pair[0], &pair[1]);
            match state.levels.windows(2).position(heavy) {
                Some(at) => (at, state.levels[at].clone(), state.levels[at + 1].clone()),
                None => return,
            }
        };
        let mut delta = Delta::clone(&lower.delta);
        delta.extend(upper.delta.iter().map(|(k, v)| (k.clone(), v.clone())));
        let weight = delta.iter().map(|(k, v)| weight(k, v)).sum();
        let level = Level { delta: Arc::new(delta), weight, frozen: false, upto: upper.upto };
        let old: Vec<Level> = state.lock().levels.splice(at..at + 2, [level]).collect();
        drop(old); // outside the lock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_levels() -> Mutex<State> {
        Mutex::new(State::new(Recovery::empty(), &Settings::default(), &Env::system()))
    }

    fn level(keys: &[u32], value: &[u8], frozen: bool, upto: u64) -> Level {
        let delta: Delta = keys.iter().map(|key| (key.to_be_bytes().to_vec(), Some(value.into()))).collect();
        let weight = delta.iter().map(|(k, v)| weight(k, v)).sum();
        Level { delta: Arc::new(delta), weight, frozen, upto: CommitNo(upto) }
    }

    #[test]
    fn the_disk_is_behind_while_much_waits_and_not_once_it_is_full() {
        let settings = Settings { dirty_max: 400, ..Settings::default() };
        let behind = |dirty, sealing, change: fn(&mut State)| {
            let state = no_levels();
            let mut state = state.lock();
            (state.dirty_bytes, state.sealing_bytes) = (dirty, sealing);
            change(&mut state);
            state.is_behind(&settings)
        };
        let waits = [(60, 40), (0, 100), (60, 39)].map(|(dirty, sealing)| behind(dirty, sealing, |_| ()));
        assert_eq!(waits, [true, true, false]);
        assert!(!behind(400, 400, |st| st.no_space = true), "waiting would keep it full");
        assert!(behind(400, 0, |_| ()));
        assert!(!behind(400, 0, |st| st.stopping = true));
        assert!(!behind(400, 0, |st| st.failed = Some("x".into())));
    }

    #[test]
    fn a_level_of_few_keys_is_moved_into_the_next_in_place_and_is_not_if_it_may_not_be() {
        let many: Vec<u32> = (0..1000).collect();
        // The keys and the newest commit of each level that is left, and whether the lowest is where it was.
        let fold = |few: Level, held: bool| {
            let state = no_levels();
            state.lock().levels.extend([few, level(&many, b"old", false, 4)]);
            let below = state.lock().levels[1].delta.clone();
            let at = Arc::as_ptr(&below);
            let kept = held.then_some(below);
            fold_levels(&state, |a, b| !a.frozen && !b.frozen);
            let old =
                |kept: Arc<Delta>| kept.len() == 1000 && kept.values().all(|v| v.as_deref() == Some(b"old"));
            assert!(kept.is_none_or(old));
            let state = state.lock();
            let left: Vec<_> = state.levels.iter().map(|l| (l.delta.len(), l.upto.0)).collect();
            (left, state.levels.last().is_some_and(|l| Arc::as_ptr(&l.delta) == at))
        };
        let few: Vec<u32> = (990..990 + POURED_MAX as u32).collect();
        let more = [&few[..], &[5000]].concat();
        assert_eq!(fold(level(&few, b"new", false, 5), false), (vec![(1054, 5)], true));
        let two = |few: &[u32]| vec![(few.len(), 5), (1000, 4)];
        assert_eq!(fold(level(&few, b"new", false, 5), true), (two(&few), true), "somebody holds it");
        assert_eq!(fold(level(&few, b"new", true, 5), false), (two(&few), true), "it may not be");
        assert_eq!(fold(level(&more, b"new", false, 5), false), (two(&more), true), "not few");
    }

    #[test]
    fn levels_stay_few_whatever_their_weights_and_the_newest_value_wins() {
        let state = no_levels();
        let push = |keys: &[u32], value: u32, size: usize, frozen| {
            let value = [value.to_le_bytes().to_vec(), vec![0; size]].concat();
            state.lock().levels.insert(0, level(keys, &value, frozen, 0));
        };
        push(&[u32::MAX], 0, 10, true);
        let mut most = 0;
        for n in 0..3000u32 {
            // As a commit of one small file leaves them: what it changed, and a light one above.
            push(&[3 * n, 3 * n + 1, 7], n, 600, false);
            push(&[3 * n + 2], n, 10, false);
            // What somebody still reads stays as it is.
            let held: Vec<_> = match n % 5 {
                0 => state.lock().levels.iter().skip(2).map(|level| level.delta.clone()).collect(),
                _ => Vec::new(),
            };
            let before: Vec<Delta> = held.iter().map(|delta| Delta::clone(delta)).collect();
            fold_levels(&state, |a, b| !a.frozen && !b.frozen);
            assert!(held.iter().zip(&before).all(|(now, before)| **now == *before));
            most = most.max(state.lock().levels.len());
        }
        assert!(most <= 20, "{most} levels");
        let state = state.lock();
        let newest = |key: u32| {
            let found = state.levels.iter().find_map(|level| level.delta.get(&key.to_be_bytes()[..]));
            found.and_then(|value| value.as_ref()).map(|value| value[..4].to_vec())
        };
        assert_eq!(newest(7), Some(2999u32.to_le_bytes().to_vec()));
        assert!((8..9000).all(|key| newest(key) == Some((key / 3).to_le_bytes().to_vec())));
        assert!(state.levels.last().is_some_and(|level| level.frozen), "what is frozen stays as it is");
        for level in &state.levels {
            assert_eq!(level.weight, level.delta.iter().map(|(k, v)| weight(k, v)).sum::<usize>());
        }
    }
}
