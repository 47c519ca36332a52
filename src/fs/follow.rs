//! A reader that moves on with home: commits of the log are applied over what was opened, one after the other.
//! Invariant: each commit becomes visible as a whole, under the state's lock; what the kernel still holds and the
//! newest state no longer has stays readable as it was last, until the kernel lets go of it.

use super::Fs;
use super::error::Error;
use super::state::{Level, Recovery, State, fold_levels};
use crate::log::{Frames, Result};
use crate::tree::btree::Tree;
use crate::tree::delta::{Change, Counters, Delta, Value};
use crate::tree::key::{self, Key, KeyRef};
use crate::tree::memtable::{Levels, weight};
use crate::types::{CommitNo, Ino};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Levels are not folded beyond this, in bytes: a new checkpoint frees whole levels.
const LEVEL_MAX: usize = 4 << 20;
/// What is kept of inodes that are gone, in bytes; what is beyond that is `ESTALE` to who has it open.
const GONE_MAX: usize = 32 << 20;
/// Names of one step that are told one by one; more are told as "all names".
const NAMES_MAX: usize = 16 << 10;

/// What the kernel may have kept of an inode that has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Bytes that may differ; for a directory any range is its listing. `None`: attributes and access lists only.
    pub data: Option<Range<u64>>,
}

/// What a step has changed, for those who keep copies. It may name more than has changed, never less.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Any name of any directory may have changed.
    pub all_names: bool,
    /// Inodes, as far as the kernel holds them.
    pub inodes: BTreeMap<Ino, Touched>,
    /// Names that came, went, or stand for something else, in directories that the kernel holds.
    pub names: BTreeSet<(Ino, Vec<u8>)>,
}

impl Changed {
    /// True when there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        !self.all_names && self.inodes.is_empty() && self.names.is_empty()
    }

    /// Takes in what another step has changed.
    pub fn merge(&mut self, other: Changed) {
        self.all_names |= other.all_names;
        for (ino, touched) in other.inodes {
            self.touch(ino, touched.data);
        }
        self.names.extend(other.names);
        self.bound();
    }

    fn touch(&mut self, ino: Ino, data: Option<Range<u64>>) {
        let touched = self.inodes.entry(ino).or_default();
        touched.data = match (touched.data.take(), data) {
            (Some(a), Some(b)) => Some(a.start.min(b.start)..a.end.max(b.end)),
            (a, b) => a.or(b),
        };
    }

    /// Many names are told as all of them.
    fn bound(&mut self) {
        if self.all_names || self.names.len() > NAMES_MAX {
            self.all_names = true;
            self.names.clear();
        }
    }
}

/// All of a file or of a directory's listing.
const ALL: Range<u64> = 0..u64::MAX;

/// What is left of an inode that the newest state does not have: its own keys that were in memory, above the tree
/// as it was then.
pub(super) struct Gone {
    delta: Delta,
    tree: Tree,
}

impl Gone {
    fn weight(&self) -> usize {
        self.delta.iter().map(|(k, v)| weight(k, v)).sum()
    }
}

/// The state before a jump, until it is known which of the inodes that the kernel holds are gone.
pub(super) struct Past {
    levels: Vec<Level>,
    tree: Tree,
}

/// What only a follower's state has.
#[derive(Default)]
pub(super) struct Kept {
    gone: BTreeMap<Ino, Gone>,
    gone_weight: usize,
    past: Option<Past>,
}

impl Kept {
    pub fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.past.is_none()
    }

    /// The kernel holds the inode no more.
    pub fn forget(&mut self, ino: Ino) {
        if let Some(gone) = self.gone.remove(&ino) {
            self.gone_weight -= gone.weight();
        }
    }

    fn keep(&mut self, ino: Ino, gone: Gone) {
        let weight = gone.weight();
        if self.gone_weight + weight > GONE_MAX {
            ::log::warn!("inode {} is gone and not kept for who has it open: too many are", ino.0);
            return;
        }
        self.forget(ino);
        self.gone_weight += weight;
        self.gone.insert(ino, gone);
    }
}

/// An older state in which an inode is still there.
pub(super) struct Older<'a> {
    maps: Vec<&'a Delta>,
    tree: &'a Tree,
    frames: &'a dyn Frames,
}

impl Older<'_> {
    pub fn levels(&self) -> Levels<'_> {
        Levels { maps: &self.maps, tree: self.tree, frames: self.frames }
    }
}

impl State {
    /// Where the keys of the inode that `key` belongs to are, if the newest state does not have that inode any more.
    pub fn older<'a>(&'a self, frames: &'a dyn Frames, key: &[u8]) -> Result<Option<Older<'a>>> {
        if self.kept.is_empty() {
            return Ok(None);
        }
        let Some(ino) = key.first_chunk::<8>().map(|ino| Ino(u64::from_be_bytes(*ino))) else {
            return Ok(None);
        };
        if let Some(gone) = self.kept.gone.get(&ino) {
            return Ok(Some(Older { maps: vec![&gone.delta], tree: &gone.tree, frames }));
        }
        let Some(past) = &self.kept.past else { return Ok(None) };
        if self.newest(frames, &key::inode(ino))?.is_some() {
            return Ok(None);
        }
        let maps = past.levels.iter().map(|level| &*level.delta).collect();
        Ok(Some(Older { maps, tree: &past.tree, frames }))
    }

    /// True of an inode that is only kept because the kernel holds it.
    pub fn is_gone(&self, ino: Ino) -> bool {
        self.kept.gone.contains_key(&ino)
    }

    fn told(&self, ino: Ino) -> bool {
        ino == Ino::ROOT || self.lookups.holds(ino)
    }

    /// What `delta` changes of what the kernel holds.
    fn changed_by(&self, delta: &Delta, record: u64) -> Changed {
        let mut changed = Changed::default();
        let mut last = (Ino(0), false);
        for key in delta.keys() {
            let Some(parsed) = key::parse(key) else { continue };
            let ino = match parsed {
                KeyRef::Inode(ino) | KeyRef::Xattr { ino, .. } | KeyRef::Extent { ino, .. } => ino,
                KeyRef::Dirent { dir, .. } | KeyRef::Entry { dir, .. } => dir,
                KeyRef::Orphan(_) => continue,
            };
            if last.0 != ino {
                last = (ino, self.told(ino)); // the keys of one inode lie together
            }
            if !last.1 {
                continue;
            }
            match parsed {
                KeyRef::Dirent { dir, name } => {
                    changed.touch(dir, Some(ALL));
                    changed.names.insert((dir, name.to_vec()));
                }
                KeyRef::Entry { dir, .. } => changed.touch(dir, Some(ALL)),
                // No extent crosses a record, whatever its length was before.
                KeyRef::Extent { ino, off } => {
                    let start = off - off % record;
                    changed.touch(ino, Some(start..start.saturating_add(record)));
                }
                _ => changed.touch(ino, None),
            }
        }
        changed.bound();
        changed
    }

    /// Keeps what the kernel holds and `delta` removes.
    fn keep_removed(&mut self, delta: &Delta) {
        let removed = delta.iter().filter(|(_, value)| value.is_none());
        let inodes = removed.filter_map(|(key, _)| match key::parse(key) {
            Some(KeyRef::Inode(ino)) => Some(ino),
            _ => None,
        });
        for ino in inodes.filter(|ino| self.lookups.holds(*ino)).collect::<Vec<_>>() {
            let gone = Gone { delta: keys_of(ino, &self.levels), tree: self.tree };
            self.kept.keep(ino, gone);
        }
    }
}

/// All that the levels know of an inode.
fn keys_of(ino: Ino, levels: &[Level]) -> Delta {
    let all = key::all_of(ino);
    let mut delta = Delta::new();
    for level in levels.iter().rev() {
        delta.extend(
            level.delta.range(all.clone()).map(|(k, v): (&Key, &Option<Value>)| (k.clone(), v.clone())),
        );
    }
    delta
}

impl Fs {
    /// Makes the next commit visible, as one step. Says what the kernel may still show of before; it must be told
    /// after this returns, for until then it may ask for the same again.
    pub fn advance(&self, no: CommitNo, counters: Counters, changes: Vec<Change>) -> Changed {
        let delta: Delta = changes.into_iter().collect();
        let weight = delta.iter().map(|(k, v)| weight(k, v)).sum();
        let mut state = self.state.lock();
        let changed = state.changed_by(&delta, self.settings.record_size);
        state.keep_removed(&delta);
        for ino in changed.inodes.keys() {
            state.allocated.remove(ino);
        }
        // The root directory that a volume without commits shows.
        state.active.clear();
        state.active_weight = 0;
        state.levels.insert(0, Level { delta: Arc::new(delta), weight, frozen: false, upto: no });
        state.generation = CommitNo(no.0 + 1);
        state.count(counters);
        drop(state);
        fold_levels(&self.state, |a, b| a.weight + b.weight <= LEVEL_MAX);
        changed
    }

    /// A checkpoint of a commit that was applied: its tree takes the place of the levels up to it. Nothing that can be
    /// read changes.
    pub fn rebase(&self, tree: Tree, upto: CommitNo) {
        let mut state = self.state.lock();
        if upto >= state.generation {
            return;
        }
        state.tree = tree;
        let freed: Vec<Level> = state.levels.extract_if(.., |level| level.upto <= upto).collect();
        drop(state);
        drop(freed);
    }

    /// Goes on at a state that is newer than the next commit. Without a comparison of the two trees everything may have
    /// changed; telling the kernel more than that is correct, and costs it what it kept. [`Fs::settle`] comes next.
    pub fn jump(&self, to: Recovery) -> Changed {
        let mut state = self.state.lock();
        let mut newest = State::new(to, &self.settings, &self.env);
        let past = Past { levels: std::mem::take(&mut state.levels), tree: state.tree };
        state.kept.past = Some(past);
        std::mem::swap(&mut state.levels, &mut newest.levels);
        state.tree = newest.tree;
        state.generation = newest.generation;
        (state.next_ino, state.live_bytes, state.inodes) =
            (newest.next_ino, newest.live_bytes, newest.inodes);
        state.active.clear();
        state.active_weight = 0;
        state.allocated.clear();
        let held = state.lookups.held().into_iter().chain([Ino::ROOT]);
        let inodes = held.map(|ino| (ino, Touched { data: Some(ALL) })).collect();
        Changed { all_names: true, inodes, names: BTreeSet::new() }
    }

    /// All that the kernel may have kept from before this process.
    pub fn everything_held(&self) -> Changed {
        let held = self.state.lock().lookups.held().into_iter().chain([Ino::ROOT]);
        let inodes = held.map(|ino| (ino, Touched { data: Some(ALL) })).collect();
        Changed { all_names: true, inodes, names: BTreeSet::new() }
    }

    /// The inodes to settle after a jump.
    pub fn unsettled(&self) -> Vec<Ino> {
        let state = self.state.lock();
        if state.kept.past.is_some() { state.lookups.held() } else { Vec::new() }
    }

    /// Finds out whether an inode that the kernel holds was lost by a jump, and then keeps it. May want frames.
    pub fn settle(&self, ino: Ino) -> std::result::Result<(), Error> {
        let mut state = self.state.lock();
        let Some(past) = &state.kept.past else { return Ok(()) };
        if state.kept.gone.contains_key(&ino) || !state.lookups.holds(ino) {
            return Ok(());
        }
        if state.newest(&*self.frames, &key::inode(ino))?.is_none() {
            let gone = Gone { delta: keys_of(ino, &past.levels), tree: past.tree };
            state.kept.keep(ino, gone);
        }
        Ok(())
    }

    /// All that the kernel holds is settled: the state before the jump can go.
    pub fn settled(&self) {
        let past = self.state.lock().kept.past.take();
        drop(past);
    }

    /// Bytes of changes in memory, and the number of the newest commit that is visible.
    pub fn position(&self) -> (usize, CommitNo) {
        let state = self.state.lock();
        (state.memtable_weight(), CommitNo(state.generation.0 - 1))
    }

    /// For how long the kernel may keep a name without asking.
    pub fn names_keep(&self) -> std::time::Duration {
        std::time::Duration::from_millis(self.names_keep.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// The kernel cannot be told that all names may have changed: it asks for them again after `keep`.
    pub fn set_names_keep(&self, keep: std::time::Duration) {
        let ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        self.names_keep.store(ms, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steps_changed_adds_up_and_stays_bounded() {
        let mut changed = Changed::default();
        assert!(changed.is_empty());
        changed.touch(Ino(2), None);
        changed.touch(Ino(2), Some(10..20));
        changed.touch(Ino(2), Some(40..50));
        changed.touch(Ino(2), None);
        assert_eq!(changed.inodes[&Ino(2)].data, Some(10..50));
        let names = (0..NAMES_MAX as u64).map(|n| (Ino(1), n.to_be_bytes().to_vec())).collect();
        changed.merge(Changed { names, ..Changed::default() });
        assert!(!changed.all_names && changed.names.len() == NAMES_MAX);
        changed.merge(Changed { names: [(Ino(1), b"one more".to_vec())].into(), ..Changed::default() });
        assert!(changed.all_names && changed.names.is_empty() && changed.inodes.len() == 1);
    }
}
