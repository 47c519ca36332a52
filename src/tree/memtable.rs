//! The levels of the tree as one map: the changes that are not in pages yet, newest first, above the pages.
//! Invariant: the newest level that knows a key decides; a deletion there hides the key in all levels below.

use super::btree::Tree;
use super::delta::{Delta, Value};
use super::key::Key;
use crate::log::{Frames, Result};
use std::collections::btree_map;
use std::iter::Peekable;
use std::ops::Bound;

/// What an entry of a [`Delta`] costs beside its bytes: its slot in a node of the map that is two thirds full, and
/// what the allocator and the reference counts add.
const ENTRY_OVERHEAD: usize = 128;

/// How many entries are read from the pages at once while levels are merged.
const BATCH_MIN: usize = 16;
const BATCH_MAX: usize = 512;

/// About how much memory an entry of a [`Delta`] takes, in bytes.
pub fn weight(key: &[u8], value: &Option<Value>) -> usize {
    weight_of(key.len(), value)
}

/// The same, for a key of so many bytes.
pub fn weight_of(key: usize, value: &Option<Value>) -> usize {
    ENTRY_OVERHEAD + key + value.as_ref().map_or(0, |v| v.len())
}

/// A view of changes above a tree.
#[derive(Clone, Copy)]
pub struct Levels<'a> {
    /// Changes, newest first.
    pub maps: &'a [&'a Delta],
    /// What they change.
    pub tree: &'a Tree,
    /// Where the tree's pages are.
    pub frames: &'a dyn Frames,
}

impl Levels<'_> {
    /// The value of `key`.
    pub fn get(&self, key: &[u8]) -> Result<Option<Value>> {
        for map in self.maps {
            if let Some(value) = map.get(key) {
                return Ok(value.clone());
            }
        }
        Ok(self.tree.get(self.frames, key)?.map(|bytes| Value::from(bytes.as_ref())))
    }

    /// The first `limit` keys from `lo` up to, not including, `hi`, with their values, in order.
    pub fn range(&self, lo: &[u8], hi: &[u8], limit: usize) -> Result<Vec<(Key, Value)>> {
        if lo >= hi || limit == 0 {
            return Ok(Vec::new());
        }
        let mut layers: Vec<_> = self.maps.iter().map(|map| between(map, lo, hi).peekable()).collect();
        layers.retain_mut(|layer| layer.peek().is_some());
        if layers.is_empty() {
            return self.tree.range(self.frames, lo, hi, limit);
        }
        let mut pages =
            PageEntries { levels: self, next: lo.to_vec(), hi, batch: Vec::new().into_iter(), done: false };
        let mut out = Vec::new();
        while out.len() < limit {
            pages.fill(limit - out.len())?;
            let newest = newest_of_smallest(&mut layers);
            match (newest, pages.peek()) {
                (None, None) => break,
                (Some(i), page) if page.is_none_or(|page| key_at(&mut layers, i) <= Some(page)) => {
                    let (key, value) = layers[i].next().expect("it was just looked at");
                    for layer in &mut layers {
                        layer.next_if(|(other, _)| *other == key);
                    }
                    if pages.peek() == Some(key) {
                        pages.batch.next();
                    }
                    out.extend(value.as_ref().map(|value| (key.clone(), value.clone())));
                }
                _ => out.extend(pages.batch.next()),
            }
        }
        Ok(out)
    }

    /// The greatest key from `lo` up to, not including, `hi`, with its value.
    pub fn last(&self, lo: &[u8], hi: &[u8]) -> Result<Option<(Key, Value)>> {
        let mut hi = hi.to_vec();
        // What the pages hold below `hi`; to be looked up. The first time they matter only above what memory has, behind a
        // deletion all of them do, and are asked once, however many deletions follow.
        let (mut below, mut known, mut all) = (None, false, false);
        while lo < hi.as_slice() {
            let mut found: Option<(&Key, &Option<Value>)> = None;
            for map in self.maps {
                if let Some((key, value)) = between(map, lo, &hi).next_back()
                    && found.is_none_or(|(other, _)| key > other)
                {
                    found = Some((key, value));
                }
            }
            let passed = |(key, _): &(Key, Value)| *key >= hi;
            if !known || below.as_ref().is_some_and(passed) {
                let floor = found.filter(|_| !all).map_or(lo, |(key, _)| key);
                below = self.tree.last(self.frames, floor, &hi)?;
                known = all;
            }
            all = true;
            match (&below, found) {
                (Some(page), found) if found.is_none_or(|(key, _)| page.0 > *key) => return Ok(below),
                (_, None) => return Ok(None),
                (_, Some((key, Some(value)))) => return Ok(Some((key.clone(), value.clone()))),
                (_, Some((key, None))) => hi.clone_from(key),
            }
        }
        Ok(None)
    }
}

type Layer<'a> = Peekable<btree_map::Range<'a, Key, Option<Value>>>;

fn between<'a>(map: &'a Delta, lo: &[u8], hi: &[u8]) -> btree_map::Range<'a, Key, Option<Value>> {
    map.range::<[u8], _>((Bound::Included(lo), Bound::Excluded(hi)))
}

fn key_at<'a>(layers: &mut [Layer<'a>], i: usize) -> Option<&'a Key> {
    layers.get_mut(i)?.peek().map(|(key, _)| *key)
}

/// Which layer has the smallest next key; of several with the same one the newest.
fn newest_of_smallest(layers: &mut [Layer<'_>]) -> Option<usize> {
    let mut best: Option<(usize, &Key)> = None;
    for (i, layer) in layers.iter_mut().enumerate() {
        if let Some((key, _)) = layer.peek()
            && best.is_none_or(|(_, other)| *key < other)
        {
            best = Some((i, key));
        }
    }
    best.map(|(i, _)| i)
}

/// Reads the pages of a range in batches, so that a small limit costs little however long the range is.
struct PageEntries<'a> {
    levels: &'a Levels<'a>,
    next: Key,
    hi: &'a [u8],
    batch: std::vec::IntoIter<(Key, Value)>,
    done: bool,
}

impl PageEntries<'_> {
    /// Makes sure that [`peek`](Self::peek) sees the next entry if there is one.
    fn fill(&mut self, wanted: usize) -> Result<()> {
        if self.done || !self.batch.as_slice().is_empty() {
            return Ok(());
        }
        let limit = wanted.clamp(BATCH_MIN, BATCH_MAX);
        let batch = self.levels.tree.range(self.levels.frames, &self.next, self.hi, limit)?;
        self.done = batch.len() < limit;
        if let Some((last, _)) = batch.last() {
            self.next.clone_from(last);
            self.next.push(0);
        }
        self.batch = batch.into_iter();
        Ok(())
    }

    fn peek(&self) -> Option<&Key> {
        self.batch.as_slice().first().map(|(key, _)| key)
    }
}
