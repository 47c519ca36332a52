//! Comparing two states of the tree: which keys differ, in order, with what stood there and what stands there now.
//! Invariant: a subtree that both states share is not read, so that the cost follows the change; after an error (a
//! missing page) a comparison stands where it stood and goes on when asked again.

use super::btree::{Place, load};
use super::delta::{Delta, Value};
use super::key::Key;
use super::memtable::Levels;
use super::page::Page;
use crate::log::{Error, Frames, Result};
use crate::types::{FrameKind, FramePtr};
use std::collections::HashSet;
use std::ops::Bound;

/// How many missing pages are reported at once.
const MISSING_MAX: usize = 64;

/// A key whose value differs between two states.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Changed {
    /// The key.
    pub key: Key,
    /// Its value in the first state; `None`: it is not there.
    pub old: Option<Value>,
    /// Its value in the second state.
    pub new: Option<Value>,
}

/// A comparison of two states under way. It holds the pages on the way to where it stands, and nothing else of them.
/// Both states must be the same ones in each call.
pub struct Diff {
    old: Walk,
    new: Walk,
    /// The next difference between the pages.
    next: Option<Changed>,
    /// The last key that was dealt with.
    last: Option<Key>,
    pages_read: u64,
}

impl Diff {
    /// A comparison from the first key on.
    pub fn new(old: &Levels<'_>, new: &Levels<'_>) -> Diff {
        let (old_root, new_root) = (old.tree.root, new.tree.root);
        let shared = old_root == new_root;
        let walk = |root: Option<FramePtr>| Walk { root: root.filter(|_| !shared), stack: Vec::new() };
        Diff { old: walk(old_root), new: walk(new_root), next: None, last: None, pages_read: 0 }
    }

    /// Pages of the two trees that were looked at; those on the way to single keys do not count.
    pub fn pages_read(&self) -> u64 {
        self.pages_read
    }

    /// The next differences, at most `limit`; none at the end. [`Error::Missing`] names pages that are to be fetched
    /// before this is asked again.
    pub fn next_batch(&mut self, old: &Levels<'_>, new: &Levels<'_>, limit: usize) -> Result<Vec<Changed>> {
        let mut out = Vec::new();
        while out.len() < limit {
            match self.step(old, new) {
                Ok(Step::Found(changed)) => out.push(changed),
                Ok(Step::Same) => {}
                Ok(Step::End) => break,
                // What was found is given out first; the error comes again.
                Err(_) if !out.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        Ok(out)
    }

    /// Leaves out the page that the last call failed on, with all below it: for who wants to see the rest of a
    /// damaged tree. False when it was not a page of the walk that failed.
    pub fn skip_damaged(&mut self, old: &Levels<'_>, new: &Levels<'_>) -> bool {
        for (walk, levels) in [(&mut self.old, old), (&mut self.new, new)] {
            let failed = |at| load(levels.frames, at, None).and_then(|page| page.verify()).is_err();
            match walk.head() {
                Ok(Head::Below(below)) if failed(below.at) || walk.clone().open(levels.frames).is_err() => {
                    walk.pass();
                    return true;
                }
                Err(_) => {
                    walk.stack.pop();
                    return true;
                }
                _ => {}
            }
        }
        false
    }

    fn step(&mut self, old: &Levels<'_>, new: &Levels<'_>) -> Result<Step> {
        if self.next.is_none() {
            self.next = self.pages(old, new)?;
        }
        let in_memory = [old, new].iter().filter_map(|levels| self.next_in_memory(levels.maps)).min();
        let at_pages = self.next.as_ref().map(|changed| &changed.key);
        let key = match (in_memory, at_pages) {
            (None, None) => return Ok(Step::End),
            (Some(key), Some(page)) => key.min(page).clone(),
            (Some(key), None) | (None, Some(key)) => key.clone(),
        };
        let of_pages = self.next.take_if(|changed| changed.key == key);
        let found = match self.values(old, new, &key, of_pages.as_ref()) {
            Ok(found) => found,
            Err(e) => {
                self.next = of_pages.or(self.next.take());
                return Err(e);
            }
        };
        self.last = Some(key.clone());
        let (old, new) = found;
        Ok(if old == new { Step::Same } else { Step::Found(Changed { key, old, new }) })
    }

    /// What the two states hold under `key`, of which the pages hold what `of_pages` says, or both the same.
    fn values(
        &self,
        old: &Levels<'_>,
        new: &Levels<'_>,
        key: &[u8],
        of_pages: Option<&Changed>,
    ) -> Result<(Option<Value>, Option<Value>)> {
        match (newest(old.maps, key), newest(new.maps, key), of_pages) {
            (Some(old), Some(new), _) => Ok((old.clone(), new.clone())),
            (above_old, above_new, Some(pages)) => {
                Ok((above_old.unwrap_or(&pages.old).clone(), above_new.unwrap_or(&pages.new).clone()))
            }
            (above_old, above_new, None) => {
                let found = new.tree.get(new.frames, key).map_err(|e| self.with_next(e, old, new))?;
                let below = found.map(|bytes| Value::from(bytes.as_ref()));
                Ok((above_old.cloned().unwrap_or_else(|| below.clone()), above_new.cloned().unwrap_or(below)))
            }
        }
    }

    /// The first key in memory behind the last one.
    fn next_in_memory<'a>(&self, maps: &[&'a Delta]) -> Option<&'a Key> {
        maps.iter().filter_map(|map| behind(map, self.last.as_deref()).next()).min()
    }

    /// The missing pages of `error` and those that the next keys in memory will need: fetched together.
    fn with_next(&self, error: Error, old: &Levels<'_>, new: &Levels<'_>) -> Error {
        let Error::Missing(mut missing) = error else { return error };
        let maps = [old, new].map(|levels| levels.maps);
        let keys = maps.iter().flat_map(|maps| maps.iter());
        for key in keys.flat_map(|map| behind(map, self.last.as_deref()).take(4 * MISSING_MAX)) {
            if missing.len() >= MISSING_MAX {
                break;
            }
            if maps.iter().any(|maps| newest(maps, key).is_none())
                && let Err(Error::Missing(more)) = new.tree.get(new.frames, key)
            {
                missing.extend(more);
            }
        }
        let mut seen = HashSet::new();
        missing.retain(|ptr| seen.insert(*ptr));
        Error::Missing(missing)
    }

    /// The next difference between the pages alone.
    fn pages(&mut self, old: &Levels<'_>, new: &Levels<'_>) -> Result<Option<Changed>> {
        loop {
            let order = match (self.old.head()?, self.new.head()?) {
                (Head::End, Head::End) => return Ok(None),
                (Head::Below(a), Head::Below(b)) if a.at == b.at => {
                    self.old.pass();
                    self.new.pass();
                    continue;
                }
                (Head::Below(a), Head::Below(b)) => a.open_before(&b),
                (Head::Below(_), Head::End) => Order::OpenOld,
                (Head::End, Head::Below(_)) => Order::OpenNew,
                (Head::Below(a), Head::Entry(key, _)) if a.first <= key => Order::OpenOld,
                (Head::Entry(key, _), Head::Below(b)) if b.first <= key => Order::OpenNew,
                (Head::Entry(key, value), Head::Below(_) | Head::End) => Order::Old(key, value),
                (Head::Below(_) | Head::End, Head::Entry(key, value)) => Order::New(key, value),
                (Head::Entry(a, old), Head::Entry(b, new)) => match a.cmp(b) {
                    std::cmp::Ordering::Less => Order::Old(a, old),
                    std::cmp::Ordering::Greater => Order::New(b, new),
                    std::cmp::Ordering::Equal => Order::Both(a, old, new),
                },
            };
            let changed = |key: &[u8], old: Option<&[u8]>, new: Option<&[u8]>| {
                Some(Changed { key: key.to_vec(), old: old.map(Value::from), new: new.map(Value::from) })
            };
            let found = match order {
                Order::OpenOld => {
                    self.old.open(old.frames).map_err(|e| missing_with(e, &self.old, old, &self.new))?;
                    self.pages_read += 1;
                    continue;
                }
                Order::OpenNew => {
                    self.new.open(new.frames).map_err(|e| missing_with(e, &self.new, new, &self.old))?;
                    self.pages_read += 1;
                    continue;
                }
                Order::Old(key, value) => (changed(key, Some(value), None), true, false),
                Order::New(key, value) => (changed(key, None, Some(value)), false, true),
                Order::Both(key, a, b) if a != b => (changed(key, Some(a), Some(b)), true, true),
                Order::Both(..) => (None, true, true),
            };
            let (changed, of_old, of_new) = found;
            if of_old {
                self.old.pass();
            }
            if of_new {
                self.new.pass();
            }
            if changed.is_some() {
                return Ok(changed);
            }
        }
    }
}

enum Step {
    Found(Changed),
    Same,
    End,
}

/// What is to be done next, as the heads of the two walks say.
enum Order<'a> {
    OpenOld,
    OpenNew,
    Old(&'a [u8], &'a [u8]),
    New(&'a [u8], &'a [u8]),
    Both(&'a [u8], &'a [u8], &'a [u8]),
}

fn newest<'a>(maps: &[&'a Delta], key: &[u8]) -> Option<&'a Option<Value>> {
    maps.iter().find_map(|map| map.get(key))
}

fn behind<'a>(map: &'a Delta, last: Option<&[u8]>) -> impl Iterator<Item = &'a Key> + use<'a> {
    let from = last.map_or(Bound::Unbounded, Bound::Excluded);
    map.range::<[u8], _>((from, Bound::Unbounded)).map(|(key, _)| key)
}

/// The missing page on which `walk` stopped, and those beside it that will be wanted too: those that `other` does not
/// share.
fn missing_with(error: Error, walk: &Walk, levels: &Levels<'_>, other: &Walk) -> Error {
    let Error::Missing(mut missing) = error else { return error };
    let shared: HashSet<FramePtr> = other.siblings().collect();
    for at in walk.siblings().skip(1).filter(|at| !shared.contains(at)) {
        if missing.len() >= MISSING_MAX {
            break;
        }
        if let Err(Error::Missing(more)) = levels.frames.get(at, FrameKind::Page) {
            missing.extend(more);
        }
    }
    Error::Missing(missing)
}

/// A walk through one tree in the order of its keys, that goes around a subtree or into it as it is told.
#[derive(Clone)]
struct Walk {
    /// The root, as long as it has not been opened.
    root: Option<FramePtr>,
    stack: Vec<Level>,
}

/// A page on the way, and where in it the walk stands.
#[derive(Clone)]
struct Level {
    page: Page,
    at: usize,
    /// All keys of the page are less.
    end: Option<Key>,
}

/// Where a walk stands.
enum Head<'a> {
    /// Before a subtree.
    Below(Below<'a>),
    /// Before an entry: its key and value.
    Entry(&'a [u8], &'a [u8]),
    End,
}

/// A subtree that was not opened.
struct Below<'a> {
    at: FramePtr,
    level: u8,
    first: &'a [u8],
    end: Option<&'a [u8]>,
}

impl Below<'_> {
    /// Which of two different subtrees to go into first: the one that lies before the other; where they lie over each
    /// other the higher one, so that what they share is met at the same height.
    fn open_before<'o>(&self, other: &Below<'_>) -> Order<'o> {
        let before = |a: &Below<'_>, b: &Below<'_>| a.end.is_some_and(|end| end <= b.first);
        if before(self, other) {
            Order::OpenOld
        } else if before(other, self) {
            Order::OpenNew
        } else if self.level != other.level {
            if self.level > other.level { Order::OpenOld } else { Order::OpenNew }
        } else if self.first <= other.first {
            Order::OpenOld
        } else {
            Order::OpenNew
        }
    }
}

impl Walk {
    fn head(&self) -> Result<Head<'_>> {
        if let Some(at) = self.root {
            // Its height is not known yet; nothing is higher.
            return Ok(Head::Below(Below { at, level: u8::MAX, first: &[], end: None }));
        }
        // A page that has been gone through is left when the next step is made.
        let Some(top) = self.stack.iter().rev().find(|level| level.at < level.page.count()) else {
            return Ok(Head::End);
        };
        if top.page.level() == 0 {
            let (key, value) = top.page.entry(top.at)?;
            return Ok(Head::Entry(key, value));
        }
        let place = Place::below(&top.page, top.at, top.end.as_deref())?;
        Ok(Head::Below(Below {
            at: top.page.child(top.at)?,
            level: place.level,
            first: place.first,
            end: place.end,
        }))
    }

    /// Goes past the subtree or entry that it stands before.
    fn pass(&mut self) {
        if self.root.take().is_some() {
            return;
        }
        while self.stack.last().is_some_and(|level| level.at >= level.page.count()) {
            self.stack.pop();
        }
        if let Some(top) = self.stack.last_mut() {
            top.at += 1;
        }
    }

    /// Goes into the subtree that it stands before.
    fn open(&mut self, frames: &dyn Frames) -> Result<()> {
        let is_root = self.root.is_some();
        let Head::Below(below) = self.head()? else { return Ok(()) };
        let place = Place { level: below.level, first: below.first, end: below.end };
        let page = load(frames, below.at, (!is_root).then_some(place))?;
        // Its keys ascend: with its place that makes an order of all keys, whatever somebody has sealed.
        page.verify()?;
        let end = below.end.map(<[u8]>::to_vec);
        self.pass();
        self.stack.push(Level { page, at: 0, end });
        Ok(())
    }

    /// The subtrees in the page where it stands, from that place on.
    fn siblings(&self) -> impl Iterator<Item = FramePtr> {
        let top = self.stack.iter().rev().find(|level| level.at < level.page.count());
        let inner = top.filter(|level| level.page.level() > 0);
        inner
            .into_iter()
            .flat_map(|level| (level.at..level.page.count()).filter_map(|i| level.page.child(i).ok()))
    }
}
