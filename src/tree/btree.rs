//! Reading the tree: lookups, ranges, scans.
//! Invariant: a descent takes one level per page, so that it ends on any bytes; a page that is not on this host is
//! [`Error::Missing`] with its neighbours that the same request needs, and the request has had no effect.

use super::delta::Value;
use super::key::{Key, KeyRange};
use super::page::{LEVEL_MAX, Page, damaged};
use crate::log::{Error, Frames, Result};
use crate::types::{FrameKind, FramePtr};
use bytes::Bytes;

/// How many missing pages a range reports at once.
const MISSING_MAX: usize = 32;

/// Entries that a page holds at least, as a rule: a guess, on which depends only how much a bounded range prefetches.
const ENTRIES_PER_PAGE: usize = 64;

/// A tree as of one root; as cheap to copy as its pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    /// The root page; `None` when the tree is empty.
    pub root: Option<FramePtr>,
}

impl Tree {
    /// The value of `key`, sharing the page's bytes.
    pub fn get(&self, frames: &dyn Frames, key: &[u8]) -> Result<Option<Bytes>> {
        let Some(mut at) = self.root else { return Ok(None) };
        let mut page = load(frames, at, None)?;
        while page.level() > 0 {
            let Some(i) = page.child_of(key)? else { return Ok(None) };
            at = page.child(i)?;
            page = load(frames, at, Some(Place::of_level(page.level() - 1)))?;
        }
        match page.search(key)? {
            Ok(i) => Ok(Some(page.value(i)?)),
            Err(_) => Ok(None),
        }
    }

    /// The first `limit` keys from `lo` up to, not including, `hi`, with their values, in order.
    pub fn range(
        &self,
        frames: &dyn Frames,
        lo: &[u8],
        hi: &[u8],
        limit: usize,
    ) -> Result<Vec<(Key, Value)>> {
        let mut scan = Scan { frames, lo, hi, limit, out: Vec::new() };
        if let Some(root) = self.root
            && lo < hi
            && limit > 0
        {
            scan.visit(root, None)?;
        }
        Ok(scan.out)
    }

    /// The greatest key from `lo` up to, not including, `hi`, with its value.
    pub fn last(&self, frames: &dyn Frames, lo: &[u8], hi: &[u8]) -> Result<Option<(Key, Value)>> {
        match self.root {
            Some(root) if lo < hi => last_below(frames, root, None, lo, hi),
            _ => Ok(None),
        }
    }
}

/// Where a page belongs: what its parent says of it.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub level: u8,
    /// None of its keys is less.
    pub first: &'a [u8],
    /// All of its keys are less; `None`: there is no bound.
    pub end: Option<&'a [u8]>,
}

impl<'a> Place<'a> {
    /// Anywhere on this level: enough for one way down, which ends in any case.
    pub fn of_level(level: u8) -> Place<'a> {
        Place { level, first: &[], end: None }
    }

    /// Below entry `i` of `page`, whose own keys are less than `end`.
    pub fn below(page: &'a Page, i: usize, end: Option<&'a [u8]>) -> Result<Place<'a>> {
        let end = if i + 1 < page.count() { Some(page.key(i + 1)?) } else { end };
        Ok(Place { level: page.level().saturating_sub(1), first: page.key(i)?, end })
    }
}

/// The page at `at`, which must be what its parent says, when it has one. Because its keys must fit, no page is met
/// under two entries: who goes through a range sees each page once, whatever somebody has sealed.
pub(super) fn load(frames: &dyn Frames, at: FramePtr, place: Option<Place<'_>>) -> Result<Page> {
    let page = Page::parse(frames.get(at, FrameKind::Page)?, at)?;
    let Some(Place { level, first, end }) = place else { return Ok(page) };
    if level != page.level() {
        return Err(damaged(at, format!("level {} where {level} belongs", page.level())));
    }
    let outside = page.key(0)? < first
        || match end {
            Some(end) => page.key(page.count() - 1)? >= end,
            None => false,
        };
    if outside { Err(damaged(at, "its keys belong elsewhere")) } else { Ok(page) }
}

fn last_below(
    frames: &dyn Frames,
    at: FramePtr,
    place: Option<Place<'_>>,
    lo: &[u8],
    hi: &[u8],
) -> Result<Option<(Key, Value)>> {
    let page = load(frames, at, place)?;
    let page_end = place.and_then(|place| place.end);
    let (Ok(end) | Err(end)) = page.search(hi)?;
    for i in (0..end).rev() {
        let (key, value) = page.entry(i)?;
        if page.level() == 0 {
            return Ok((key >= lo).then(|| (key.to_vec(), Value::from(value))));
        }
        let child = Place::below(&page, i, page_end)?;
        if let Some(found) = last_below(frames, page.child(i)?, Some(child), lo, hi)? {
            return Ok(Some(found));
        }
        if key <= lo {
            break;
        }
    }
    Ok(None)
}

struct Scan<'a> {
    frames: &'a dyn Frames,
    lo: &'a [u8],
    hi: &'a [u8],
    limit: usize,
    out: Vec<(Key, Value)>,
}

impl Scan<'_> {
    fn visit(&mut self, at: FramePtr, place: Option<Place<'_>>) -> Result<()> {
        let page = load(self.frames, at, place)?;
        if page.level() == 0 {
            let (Ok(start) | Err(start)) = page.search(self.lo)?;
            for i in start..page.count() {
                let (key, value) = page.entry(i)?;
                if key >= self.hi || self.out.len() >= self.limit {
                    break;
                }
                // Whoever goes on behind the last key must not come back to it.
                if key < self.lo || self.out.last().is_some_and(|(last, _)| last.as_slice() >= key) {
                    return Err(damaged(at, format!("entry {i} is out of order")));
                }
                self.out.push((key.to_vec(), Value::from(value)));
            }
            return Ok(());
        }
        let start = page.child_of(self.lo)?.unwrap_or(0);
        for i in start..page.count() {
            if (i > start && page.key(i)? >= self.hi) || self.out.len() >= self.limit {
                break;
            }
            let child = Place::below(&page, i, place.and_then(|place| place.end))?;
            match self.visit(page.child(i)?, Some(child)) {
                Err(Error::Missing(missing)) => return Err(self.missing_from(&page, i + 1, missing)),
                other => other?,
            }
        }
        Ok(())
    }

    /// `missing` and the pages among the children of `page` from number `from` on that the range will need next and
    /// that are missing too, so that they are fetched together.
    fn missing_from(&self, page: &Page, from: usize, mut missing: Vec<FramePtr>) -> Error {
        let per_child = ENTRIES_PER_PAGE.saturating_pow(u32::from(page.level().min(LEVEL_MAX)));
        let ahead = (self.limit - self.out.len()) / per_child;
        for i in from..page.count().min(from.saturating_add(ahead)) {
            if missing.len() >= MISSING_MAX || page.key(i).is_ok_and(|key| key >= self.hi) {
                break;
            }
            // Other errors are met again, and reported, when it is this page's turn.
            if let Ok(child) = page.child(i)
                && let Err(Error::Missing(more)) = self.frames.get(child, FrameKind::Page)
            {
                missing.extend(more);
            }
        }
        missing.truncate(MISSING_MAX);
        Error::Missing(missing)
    }
}

/// A scan of a range in batches. After an error (a missing page) it stands where it stood and goes on when asked again;
/// it holds no page meanwhile, so that it may go on over another tree.
#[derive(Clone, Debug)]
pub struct Cursor {
    left: KeyRange,
}

impl Cursor {
    /// A scan of `range`.
    pub fn new(range: KeyRange) -> Cursor {
        Cursor { left: range }
    }

    /// The next `limit` keys with their values; none at the end.
    pub fn next_batch(
        &mut self,
        tree: &Tree,
        frames: &dyn Frames,
        limit: usize,
    ) -> Result<Vec<(Key, Value)>> {
        let batch = tree.range(frames, &self.left.start, &self.left.end, limit)?;
        match batch.last() {
            Some((last, _)) => {
                self.left.start.clone_from(last);
                self.left.start.push(0);
            }
            None => self.left.start.clone_from(&self.left.end),
        }
        Ok(batch)
    }
}
