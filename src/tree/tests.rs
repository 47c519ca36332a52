//! The tree against a model: random changes, cold caches, and how much work a merge may do.

mod diff;

use super::btree::{Place, load};
use super::memtable::weight;
use super::page::Page;
use super::*;
use crate::log::{Error, Frames, Result};
use crate::types::{FrameKind, FramePtr, Ino, Seq};
use bytes::Bytes;
use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages in memory; those that are not in `warm` are missing, as if they were only in the store.
struct Pages {
    all: Mutex<Vec<Bytes>>,
    cold: bool,
    warm: Mutex<HashSet<FramePtr>>,
    /// How many of them there can be while a merge runs.
    room: usize,
    fetches: AtomicUsize,
}

impl Default for Pages {
    fn default() -> Pages {
        let (all, warm, fetches) = Default::default();
        Pages { all, cold: false, warm, room: usize::MAX, fetches }
    }
}

impl Frames for Pages {
    fn get(&self, ptr: FramePtr, kind: FrameKind) -> Result<Bytes> {
        assert_eq!(kind, FrameKind::Page);
        if self.cold && !self.warm.lock().unwrap().contains(&ptr) {
            return Err(Error::Missing(vec![ptr]));
        }
        Ok(self.all.lock().unwrap()[ptr.offset as usize].clone())
    }
}

impl Pages {
    fn append(&self, plain: &[u8]) -> Result<FramePtr> {
        let mut all = self.all.lock().unwrap();
        all.push(Bytes::copy_from_slice(plain));
        Ok(FramePtr { seq: Seq(1), offset: all.len() as u32 - 1, len: plain.len() as u32 })
    }

    /// Does `request` as often as it takes to fetch everything it needs, from nothing.
    fn fetching<T>(&self, mut request: impl FnMut() -> Result<T>) -> T {
        self.warm.lock().unwrap().clear();
        self.fetches.store(0, Ordering::Relaxed);
        loop {
            match request() {
                Err(Error::Missing(ptrs)) => {
                    assert!(!ptrs.is_empty());
                    self.fetches.fetch_add(1, Ordering::Relaxed);
                    self.warm.lock().unwrap().extend(ptrs);
                }
                other => return other.unwrap(),
            }
        }
    }

    fn merge(&self, tree: &Tree, changes: &Delta, page_size: usize) -> MergeOutcome {
        self.warm.lock().unwrap().clear();
        self.fetches.store(0, Ordering::Relaxed);
        let before = self.all.lock().unwrap().len();
        let fetch = |ptrs: &[FramePtr]| {
            let mut warm = self.warm.lock().unwrap();
            if self.room == usize::MAX {
                let written = self.all.lock().unwrap().len() - before;
                assert_eq!(written, 0, "nothing is written before all is here");
            } else if warm.len() + ptrs.len() > self.room {
                warm.clear();
            }
            warm.extend(ptrs.iter().take(self.room));
            self.fetches.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let source = Source { frames: self, fetch: &fetch };
        tree.merge(source, changes, page_size, &mut |page| self.append(page)).unwrap()
    }

    /// All pages of `tree`, checked.
    fn walk(&self, tree: &Tree) -> Vec<(FramePtr, Page)> {
        let mut found = Vec::new();
        let mut left: Vec<_> = tree.root.map(|root| (root, None, Vec::new())).into_iter().collect();
        while let Some((at, level, first)) = left.pop() {
            self.warm.lock().unwrap().insert(at);
            let page = load(self, at, level.map(Place::of_level)).unwrap();
            page.verify().unwrap();
            assert!(page.key(0).unwrap() >= first.as_slice());
            for i in 0..if page.level() == 0 { 0 } else { page.count() } {
                left.push((page.child(i).unwrap(), Some(page.level() - 1), page.key(i).unwrap().to_vec()));
            }
            found.push((at, page));
        }
        found
    }
}

/// xorshift64*: the same run for the same seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn key(&mut self) -> Key {
        let ino = Ino(1 + self.below(60) as u64);
        match self.below(4) {
            0 => key::inode(ino),
            1 => key::dirent(ino, &b"abcdefghijklmnopqrstuvwxyz"[..1 + self.below(26)]),
            2 => key::entry(ino, self.below(20) as u64),
            _ => key::extent(ino, 4096 * self.below(20) as u64),
        }
    }

    fn value(&mut self) -> Value {
        let len = match self.below(200) {
            0 => self.below(70_000),
            1..5 => self.below(2000),
            _ => self.below(60),
        };
        vec![self.below(256) as u8; len].into()
    }

    fn delta(&mut self, model: &BTreeMap<Key, Value>) -> Delta {
        let mut delta = Delta::new();
        match self.below(8) {
            // a long run vanishes, with keys around it
            0 => {
                let from = self.key();
                let n = self.below(model.len() + 1);
                delta.extend(model.range(from..).take(n).map(|(key, _)| (key.clone(), None)));
            }
            // an append to one inode
            1 => {
                let ino = Ino(1 + self.below(80) as u64);
                delta.extend((0..self.below(100)).map(|i| (key::extent(ino, i as u64), Some(self.value()))));
            }
            _ => {}
        }
        for _ in 0..self.below(60) {
            let value = (self.below(3) > 0).then(|| self.value());
            delta.insert(self.key(), value);
        }
        delta
    }
}

fn apply(model: &mut BTreeMap<Key, Value>, delta: &Delta) {
    for (key, value) in delta {
        match value {
            Some(value) => model.insert(key.clone(), value.clone()),
            None => model.remove(key),
        };
    }
}

fn expected(model: &BTreeMap<Key, Value>, lo: &Key, hi: &Key, limit: usize) -> Vec<(Key, Value)> {
    if lo >= hi {
        return Vec::new();
    }
    model.range(lo.clone()..hi.clone()).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn compare(rng: &mut Rng, pages: &Pages, levels: Levels<'_>, model: &BTreeMap<Key, Value>) {
    for _ in 0..6 {
        let key = rng.key();
        assert_eq!(pages.fetching(|| levels.get(&key)), model.get(&key).cloned());
        let (lo, hi) = (rng.key(), rng.key());
        let limit = [0, 1, 7, 100, usize::MAX][rng.below(5)];
        let found = pages.fetching(|| levels.range(&lo, &hi, limit));
        assert!(found == expected(model, &lo, &hi, limit), "range with limit {limit}");
        let last = expected(model, &lo, &hi, usize::MAX).pop();
        assert!(pages.fetching(|| levels.last(&lo, &hi)) == last);
    }
}

#[test]
fn any_history_of_merges_reads_like_the_model() {
    for seed in 1..=6 {
        let mut rng = Rng(seed * 0x9e37_79b9);
        let page_size = [128, 512, 1024, 4096, 256, 2048][seed as usize % 6];
        let pages = Pages { cold: true, ..Pages::default() };
        let (mut tree, mut model) = (Tree::default(), BTreeMap::new());
        for round in 0..40 {
            let delta = if round == 30 {
                model.keys().map(|key: &Key| (key.clone(), None)).collect()
            } else {
                rng.delta(&model)
            };
            apply(&mut model, &delta);
            let newer = rng.delta(&model);
            compare(&mut rng, &pages, Levels { maps: &[&delta], tree: &tree, frames: &pages }, &model);

            let old: HashSet<_> = pages.walk(&tree).into_iter().map(|(at, _)| at).collect();
            let outcome = pages.merge(&tree, &delta, page_size);
            let new: HashSet<_> = pages.walk(&outcome.tree).into_iter().map(|(at, _)| at).collect();
            let dead: HashSet<_> = outcome.dead.iter().copied().collect();
            assert_eq!(dead.len(), outcome.dead.len());
            assert_eq!(dead, old.difference(&new).copied().collect(), "dead is what is not used any more");
            assert_eq!(outcome.pages_written as usize, new.difference(&old).count());
            tree = outcome.tree;

            compare(&mut rng, &pages, Levels { maps: &[], tree: &tree, frames: &pages }, &model);
            let mut newest = model.clone();
            apply(&mut newest, &newer);
            let both: [&Delta; 2] = [&newer, &delta];
            compare(&mut rng, &pages, Levels { maps: &both, tree: &tree, frames: &pages }, &newest);
            assert_eq!(tree.root.is_none(), model.is_empty());
        }
        let all = key::everything();
        let (mut cursor, mut scanned) = (Cursor::new(all), Vec::new());
        loop {
            let batch = pages.fetching(|| cursor.next_batch(&tree, &pages, 37));
            if batch.is_empty() {
                break;
            }
            scanned.extend(batch);
        }
        assert!(scanned.into_iter().eq(model));
    }
}

fn numbered(range: std::ops::Range<u64>) -> Delta {
    range.map(|i| (key::inode(Ino(i + 1)), Some(Value::from(vec![i as u8; 80])))).collect()
}

fn height(pages: &Pages, tree: &Tree) -> u64 {
    u64::from(load(pages, tree.root.unwrap(), None).unwrap().level()) + 1
}

const PAGE_SIZE: usize = 16 << 10;

#[test]
fn growing_keys_fill_pages_and_one_change_rewrites_one_path() {
    let pages = Pages::default();
    let mut tree = Tree::default();
    for i in 0..100 {
        tree = pages.merge(&tree, &numbered(i * 1000..(i + 1) * 1000), PAGE_SIZE).tree;
    }
    let all = pages.walk(&tree);
    let leaves = all.iter().filter(|(_, page)| page.level() == 0);
    let lens: Vec<_> = leaves.map(|(at, _)| at.len as usize).collect();
    let fill = lens.iter().sum::<usize>() as f64 / (lens.len() * PAGE_SIZE) as f64;
    assert!(fill > 0.95, "pages are {fill} full");

    let path = height(&pages, &tree);
    for ino in [1, 50_000, 99_999, 100_000] {
        let change = Delta::from([(key::inode(Ino(ino)), Some(Value::from(vec![255; 80])))]);
        let outcome = pages.merge(&tree, &change, PAGE_SIZE);
        assert_eq!((outcome.pages_written, outcome.dead.len() as u64), (path, path));
        let deletion = Delta::from([(key::inode(Ino(ino)), None)]);
        assert_eq!(pages.merge(&tree, &deletion, PAGE_SIZE).pages_written, path);
        // A full leaf must split, and the pages above it when they are full too.
        let addition = Delta::from([(key::xattr(Ino(ino), b"user.new"), Some(Value::from(vec![1; 80])))]);
        assert!(pages.merge(&tree, &addition, PAGE_SIZE).pages_written < 2 * path);
    }
}

#[test]
fn changes_without_effect_write_nothing() {
    let pages = Pages::default();
    let tree = pages.merge(&Tree::default(), &numbered(0..10_000), PAGE_SIZE).tree;
    let mut changes = numbered(400..500);
    changes.extend((0..50).map(|i| (key::extent(Ino(7), i), None)));
    changes.extend((0..50).map(|i| (key::inode(Ino(20_000 + i)), None)));
    assert_eq!(pages.merge(&tree, &changes, PAGE_SIZE), MergeOutcome { tree, ..MergeOutcome::default() });
    let nothing = pages.merge(&Tree::default(), &Delta::from([(key::inode(Ino(1)), None)]), PAGE_SIZE);
    assert_eq!(nothing, MergeOutcome::default());
}

#[test]
fn deleting_most_keys_leaves_few_pages() {
    let pages = Pages::default();
    let tree = pages.merge(&Tree::default(), &numbered(0..50_000), PAGE_SIZE).tree;
    let before = pages.walk(&tree).len();
    let most = (0..50_000).filter(|i| i % 50 != 0).map(|i| (key::inode(Ino(i + 1)), None)).collect();
    let tree = pages.merge(&tree, &most, PAGE_SIZE).tree;
    let after = pages.walk(&tree).len();
    assert!(after <= before / 30, "{after} of {before} pages are left");
    // Page by page, as when a directory is emptied slowly.
    let mut slow = pages.merge(&Tree::default(), &numbered(0..50_000), PAGE_SIZE).tree;
    for chunk in 0..100 {
        let some = (chunk * 500..(chunk + 1) * 500).filter(|i| i % 50 != 0);
        slow = pages.merge(&slow, &some.map(|i| (key::inode(Ino(i + 1)), None)).collect(), PAGE_SIZE).tree;
    }
    assert!(pages.walk(&slow).len() <= before / 10);
    let rest = (0..50_000).map(|i| (key::inode(Ino(i + 1)), None)).collect();
    assert_eq!(pages.merge(&slow, &rest, PAGE_SIZE).tree, Tree::default());
}

#[test]
fn a_cold_range_asks_for_its_pages_together_and_a_small_one_for_few() {
    let pages = Pages::default();
    let tree = pages.merge(&Tree::default(), &numbered(0..10_000), PAGE_SIZE).tree;
    let pages = Pages { cold: true, ..pages };
    let all = key::everything();
    let found = pages.fetching(|| tree.range(&pages, &all.start, &all.end, usize::MAX));
    assert_eq!(found.len(), 10_000);
    assert!(pages.fetches.load(Ordering::Relaxed) <= 4);
    let start = key::inode(Ino(5000));
    let levels = Levels { maps: &[&numbered(5000..5003)], tree: &tree, frames: &pages };
    assert_eq!(pages.fetching(|| levels.range(&start, &all.end, 5)).len(), 5);
    assert!(pages.warm.lock().unwrap().len() <= 3);
}

#[test]
fn a_merge_ends_whatever_the_cache_holds_and_fetches_in_few_goes_when_it_holds_enough() {
    let pages = Pages::default();
    let tree = pages.merge(&Tree::default(), &numbered(0..20_000), PAGE_SIZE).tree;
    let count = pages.walk(&tree).len();
    let changes: Delta = (0..20_000).step_by(3).map(|i| (key::inode(Ino(i + 1)), None)).collect();
    let want = pages.merge(&tree, &changes, PAGE_SIZE);
    let all = key::everything();
    for room in [1, 3, count / 3, count, usize::MAX] {
        let pages = Pages {
            cold: true,
            room,
            all: Mutex::new(pages.all.lock().unwrap().clone()),
            ..Pages::default()
        };
        let got = pages.merge(&tree, &changes, PAGE_SIZE);
        assert_eq!(got.dead, want.dead, "{room}");
        let fetches = pages.fetches.load(Ordering::Relaxed);
        assert!(
            room < count || fetches <= 1 + pages.walk(&tree).iter().filter(|(_, p)| p.level() > 0).count()
        );
        let found = pages.fetching(|| got.tree.range(&pages, &all.start, &all.end, usize::MAX));
        assert_eq!(found.len(), 20_000 - changes.len(), "{room}");
    }
}

#[test]
fn damaged_pages_are_errors_and_never_panics() {
    let mut rng = Rng(99);
    let pages = Pages::default();
    let tree = pages.merge(&Tree::default(), &numbered(0..200), 512).tree;
    let all = key::everything();
    for _ in 0..4000 {
        let victim = rng.below(pages.all.lock().unwrap().len());
        let good = pages.all.lock().unwrap()[victim].clone();
        let mut bad = good.to_vec();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(bad.len());
            bad[at] = [0, 1, 0xff, rng.below(256) as u8][rng.below(4)];
        }
        if rng.below(4) == 0 {
            bad.truncate(rng.below(bad.len()));
        }
        // A pointer may now name any page: the stand-in for the log knows only those it has.
        let bad_page = Page::parse(bad.clone().into(), tree.root.unwrap());
        let points_outside = bad_page.is_ok_and(|page| {
            let n = pages.all.lock().unwrap().len() as u32;
            (0..page.count()).any(|i| page.child(i).is_ok_and(|child| child.offset >= n))
        });
        if points_outside {
            continue;
        }
        pages.all.lock().unwrap()[victim] = bad.into();
        let some = key::inode(Ino(1 + rng.below(200) as u64));
        let _ = tree.get(&pages, &some);
        let _ = tree.range(&pages, &some, &all.end, 50);
        let _ = tree.last(&pages, &all.start, &some);
        let n = pages.all.lock().unwrap().len();
        let source = Source { frames: &pages, fetch: &|_| Ok(()) };
        let _ = tree.merge(source, &Delta::from([(some, None)]), 512, &mut |page| pages.append(page));
        pages.all.lock().unwrap().truncate(n);
        pages.all.lock().unwrap()[victim] = good;
    }
}

#[test]
fn weight_counts_the_bytes() {
    let value = Some(Value::from(vec![0; 1000]));
    assert!(weight(b"key", &value) >= 1003 && weight(b"key", &None) < 200);
}
