//! Merging changes into the tree: a copy of the pages that the changes touch, and of the pages above them.
//! Invariant: a page is written after the pages it points to; a page that no change has an effect on keeps its place,
//! except for the one neighbour that a page which shrank below a quarter is packed with. Nothing is written before
//! all that the changes touch was here once and is whole; what a small cache has let go by then is fetched again.

use super::btree::{Place, Tree, load};
use super::codec::{Reader, ptr_bytes};
use super::delta::{Delta, Value};
use super::key::Key;
use super::page::{Page, Run};
use crate::log::{Error, Frames, Result};
use crate::types::{FrameKind, FramePtr};
use std::collections::{HashSet, btree_map};
use std::iter::Peekable;
use std::ops::Bound;

/// How often a page is fetched that is gone again when it is looked at, before the cache counts as too small.
const FETCHES_MAX: usize = 100;

/// An inner page is not closed with fewer children, however small pages are asked for: else a tree would not end.
const FANOUT_MIN: usize = 4;

/// What a merge has done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MergeOutcome {
    /// The tree with the changes.
    pub tree: Tree,
    /// Pages that were written.
    pub pages_written: u64,
    /// Their plain bytes.
    pub bytes_written: u64,
    /// Pages of the old tree that the new one does not use.
    pub dead: Vec<FramePtr>,
}

/// Appends one page to the log and says where it lies.
pub type WritePage<'a> = &'a mut dyn FnMut(&[u8]) -> Result<FramePtr>;

/// Where a merge has the pages of the old tree from. It may wait for them.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// What is here.
    pub frames: &'a dyn Frames,
    /// Brings more here, all at once.
    pub fetch: &'a dyn Fn(&[FramePtr]) -> Result<()>,
}

impl Source<'_> {
    fn load(&self, at: FramePtr, place: Option<Place<'_>>) -> Result<Page> {
        for _ in 0..FETCHES_MAX {
            match load(self.frames, at, place) {
                Err(Error::Missing(ptrs)) => (self.fetch)(&ptrs)?,
                done => return done,
            }
        }
        Err(Error::Missing(vec![at]))
    }

    /// Has the pages that are not here fetched together. Those of one page's children at most, so that they fit into
    /// the cache; if they do not, [`Source::load`] fetches them once more.
    fn bring(&self, pages: impl Iterator<Item = FramePtr>) -> Result<()> {
        let mut missing = Vec::new();
        for at in pages {
            match self.frames.get(at, FrameKind::Page) {
                Err(Error::Missing(more)) => missing.extend(more),
                other => drop(other?),
            }
        }
        if missing.is_empty() { Ok(()) } else { (self.fetch)(&missing) }
    }
}

impl Tree {
    /// This tree with `changes`, in pages of about `page_size` bytes. `out` is called once per page, without any
    /// lock held here, so that others append in between.
    pub fn merge(
        &self,
        source: Source<'_>,
        changes: &Delta,
        page_size: usize,
        out: WritePage<'_>,
    ) -> Result<MergeOutcome> {
        let mut survey =
            Survey { source, all: changes, changes: changes.iter().peekable(), touched: HashSet::new() };
        if let Some(root) = self.root
            && !survey.visit(root, None)?
        {
            return Ok(MergeOutcome { tree: *self, ..MergeOutcome::default() });
        }
        let mut rewrite = Rewrite {
            source,
            changes: changes.iter().peekable(),
            touched: survey.touched,
            page_size,
            levels: Vec::new(),
            scratch: Vec::new(),
            outcome: MergeOutcome::default(),
            out,
        };
        match self.root {
            Some(root) => rewrite.visit(root, None)?,
            None => rewrite.take_changes()?,
        }
        rewrite.outcome.tree.root = rewrite.finish()?;
        Ok(rewrite.outcome)
    }
}

type Changes<'a> = Peekable<btree_map::Iter<'a, Key, Option<Value>>>;

/// The next change before `end` (the first key of the next subtree; `None`: of nothing).
fn next_before<'a>(changes: &mut Changes<'a>, end: Option<&[u8]>) -> Option<(&'a Key, &'a Option<Value>)> {
    changes.next_if(|(key, _)| end.is_none_or(|end| key.as_slice() < end))
}

fn any_before(changes: &mut Changes<'_>, end: Option<&[u8]>) -> bool {
    changes.peek().is_some_and(|(key, _)| end.is_none_or(|end| key.as_slice() < end))
}

/// Finds the pages that the changes have an effect on.
struct Survey<'a> {
    source: Source<'a>,
    all: &'a Delta,
    changes: Changes<'a>,
    touched: HashSet<FramePtr>,
}

impl Survey<'_> {
    fn visit(&mut self, at: FramePtr, place: Option<Place<'_>>) -> Result<bool> {
        let page = self.source.load(at, place)?;
        page.verify()?;
        let end = place.and_then(|place| place.end);
        let mut touched = false;
        if page.level() == 0 {
            while let Some((key, value)) = next_before(&mut self.changes, end) {
                touched |= match (page.search(key)?, value) {
                    (Ok(i), Some(value)) => page.entry(i)?.1 != &**value,
                    (Ok(_), None) | (Err(_), Some(_)) => true,
                    (Err(_), None) => false,
                };
            }
        }
        if page.level() > 0 {
            let children = self.children_with_changes(&page, end)?;
            self.source.bring(children.into_iter())?;
            for i in 0..page.count() {
                let child = Place::below(&page, i, end)?;
                if any_before(&mut self.changes, child.end) {
                    touched |= self.visit(page.child(i)?, Some(child))?;
                }
            }
        }
        if touched {
            self.touched.insert(at);
        }
        Ok(touched)
    }
}

impl Survey<'_> {
    fn children_with_changes(&mut self, page: &Page, end: Option<&[u8]>) -> Result<Vec<FramePtr>> {
        let mut next = self.changes.peek().map(|(key, _)| *key);
        let mut found = Vec::new();
        for i in 0..page.count() {
            let child_end = Place::below(page, i, end)?.end;
            let Some(key) = next else { break };
            if child_end.is_none_or(|end| key.as_slice() < end) {
                found.push(page.child(i)?);
                next = match child_end {
                    Some(end) => self
                        .all
                        .range::<[u8], _>((Bound::Included(end), Bound::Unbounded))
                        .next()
                        .map(|(k, _)| k),
                    None => None,
                };
            }
        }
        Ok(found)
    }
}

/// One level of the new tree while it grows to the right.
#[derive(Default)]
struct Level {
    /// A full page that is not written yet, in case the rest behind it is too small for a page of its own.
    held: Run,
    /// The page that is being filled.
    pending: Run,
}

struct Rewrite<'a, 'o> {
    source: Source<'a>,
    changes: Changes<'a>,
    touched: HashSet<FramePtr>,
    page_size: usize,
    levels: Vec<Level>,
    scratch: Vec<u8>,
    outcome: MergeOutcome,
    out: WritePage<'o>,
}

impl Rewrite<'_, '_> {
    /// Takes the subtree at `at` over, with the changes before its end.
    fn visit(&mut self, at: FramePtr, place: Option<Place<'_>>) -> Result<()> {
        let end = place.and_then(|place| place.end);
        if let Some(Place { level, first, .. }) = place
            && !self.touched.contains(&at)
        {
            while next_before(&mut self.changes, end).is_some() {}
            return self.keep(at, level, first);
        }
        let page = self.source.load(at, place)?;
        self.outcome.dead.push(at);
        if page.level() > 0 {
            let children: Vec<FramePtr> = (0..page.count()).map(|i| page.child(i)).collect::<Result<_>>()?;
            self.source.bring(children.into_iter().filter(|child| self.touched.contains(child)))?;
            for i in 0..page.count() {
                self.visit(page.child(i)?, Some(Place::below(&page, i, end)?))?;
            }
            return Ok(());
        }
        let mut i = 0;
        while let Some((key, value)) = next_before(&mut self.changes, end) {
            while i < page.count() && page.key(i)? < key.as_slice() {
                let (old_key, old_value) = page.entry(i)?;
                self.push(0, old_key, old_value)?;
                i += 1;
            }
            if i < page.count() && page.key(i)? == key.as_slice() {
                i += 1;
            }
            if let Some(value) = value {
                self.push(0, key, value)?;
            }
        }
        self.push_all(&page, i)
    }

    /// Takes all changes where there was nothing.
    fn take_changes(&mut self) -> Result<()> {
        while let Some((key, value)) = self.changes.next() {
            if let Some(value) = value {
                self.push(0, key, value)?;
            }
        }
        Ok(())
    }

    /// Takes the page at `at` over as it is, unless what is left of a rewritten neighbour needs company.
    fn keep(&mut self, at: FramePtr, level: u8, first: &[u8]) -> Result<()> {
        for below in 0..=level {
            if self.is_small(below) && at.len as usize <= 2 * self.page_size && self.open(at, level, first)? {
                return Ok(());
            }
            self.flush(below, false)?;
        }
        self.push(level + 1, first, &ptr_bytes(at))
    }

    /// Takes the entries of an unchanged page over instead of the page. It can wait if the page is not here.
    fn open(&mut self, at: FramePtr, level: u8, first: &[u8]) -> Result<bool> {
        let page = match load(self.source.frames, at, Some(Place { level, first, end: None })) {
            Err(Error::Missing(_)) => return Ok(false),
            page => page?,
        };
        page.verify()?;
        self.outcome.dead.push(at);
        if level == 0 {
            self.push_all(&page, 0)?;
        } else {
            for i in 0..page.count() {
                self.keep(page.child(i)?, level - 1, page.key(i)?)?;
            }
        }
        Ok(true)
    }

    fn push_all(&mut self, page: &Page, from: usize) -> Result<()> {
        for i in from..page.count() {
            let (key, value) = page.entry(i)?;
            self.push(0, key, value)?;
        }
        Ok(())
    }

    /// True when what is pending is too little for a page, and no full page before it can share with it.
    fn is_small(&self, level: u8) -> bool {
        self.levels.get(usize::from(level)).is_some_and(|level| {
            level.held.is_empty()
                && !level.pending.is_empty()
                && level.pending.page_len() < self.page_size / 4
        })
    }

    /// Appends an entry to a level.
    fn push(&mut self, level: u8, key: &[u8], value: &[u8]) -> Result<()> {
        let n = usize::from(level);
        if self.levels.len() <= n {
            self.levels.resize_with(n + 1, Level::default);
        }
        let Level { held, pending } = &self.levels[n];
        // What somebody has sealed may be in any order; what is written here is not, and so a merge comes to an end.
        if [pending, held].iter().find_map(|run| run.last_key()).is_some_and(|last| last >= key) {
            return Err(Error::corrupt(
                "tree",
                "the keys of its pages are out of order; no page is made of them",
            ));
        }
        let close_from = if level == 0 { 1 } else { FANOUT_MIN };
        if pending.count() >= close_from && pending.page_len() + Run::entry_len(key, value) > self.page_size {
            self.write_held(level)?;
            let own = &mut self.levels[n];
            std::mem::swap(&mut own.held, &mut own.pending);
        }
        self.levels[n].pending.push(key, value);
        Ok(())
    }

    fn write_held(&mut self, level: u8) -> Result<()> {
        let mut held = std::mem::take(&mut self.levels[usize::from(level)].held);
        if !held.is_empty() {
            self.write(level, &held, 0..held.count())?;
            held.clear();
        }
        self.levels[usize::from(level)].held = held;
        Ok(())
    }

    /// Writes what a level has collected. Before a page that is kept the last two pages share evenly when the last is
    /// small. At the right edge of the tree the last page stays small: growing keys fill it next time.
    fn flush(&mut self, level: u8, edge: bool) -> Result<()> {
        let Some(own) = self.levels.get_mut(usize::from(level)) else { return Ok(()) };
        let (mut held, mut pending) = (std::mem::take(&mut own.held), std::mem::take(&mut own.pending));
        if !edge && !held.is_empty() && !pending.is_empty() && pending.page_len() < self.page_size / 4 {
            held.append(&mut pending);
            let middle = held.middle();
            self.write(level, &held, 0..middle)?;
            self.write(level, &held, middle..held.count())?;
        } else {
            for run in [&held, &pending].into_iter().filter(|run| !run.is_empty()) {
                self.write(level, run, 0..run.count())?;
            }
        }
        held.clear();
        pending.clear();
        self.levels[usize::from(level)] = Level { held, pending };
        Ok(())
    }

    fn write(&mut self, level: u8, run: &Run, entries: std::ops::Range<usize>) -> Result<()> {
        let first = run.entry(entries.start).0;
        let at = self.write_page(level, run, entries)?;
        self.push(level + 1, first, &ptr_bytes(at))
    }

    fn write_page(&mut self, level: u8, run: &Run, entries: std::ops::Range<usize>) -> Result<FramePtr> {
        run.encode(level, entries, &mut self.scratch);
        self.outcome.pages_written += 1;
        self.outcome.bytes_written += self.scratch.len() as u64;
        (self.out)(&self.scratch)
    }

    /// Writes what is pending on all levels, and the root.
    fn finish(&mut self) -> Result<Option<FramePtr>> {
        for level in 0.. {
            let n = usize::from(level);
            if self.levels.len() <= n {
                break; // nothing is left of the tree
            }
            if n + 1 < self.levels.len() || !self.levels[n].held.is_empty() {
                self.flush(level, true)?;
                continue;
            }
            let top = std::mem::take(&mut self.levels[n].pending);
            if level > 0 && top.count() == 1 {
                let child = Reader::new(top.entry(0).1, "tree page").ptr()?;
                return self.collapse(child, level - 1).map(Some);
            }
            return self.write_page(level, &top, 0..top.count()).map(Some);
        }
        Ok(None)
    }

    /// The root of a tree whose root would be `at`, without the levels that have only one page.
    fn collapse(&mut self, mut at: FramePtr, mut level: u8) -> Result<FramePtr> {
        while level > 0 {
            match load(self.source.frames, at, Some(Place::of_level(level))) {
                Ok(page) if page.count() == 1 => {
                    self.outcome.dead.push(at);
                    at = page.child(0)?;
                    level -= 1;
                }
                Ok(_) | Err(Error::Missing(_)) => break, // a higher tree is as right
                Err(error) => return Err(error),
            }
        }
        Ok(at)
    }
}
