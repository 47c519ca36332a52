//! What one commit changes in the extents of files: written runs take the place of what lay there before.
//! Invariant: after [`ExtentEdit::replace`] no two extents of a file overlap, none crosses a record boundary, and the
//! count of live bytes has changed by exactly what was added and freed.

use super::commit::{Shipping, Taken};
use super::extents::{first_touching, stored_extent};
use crate::log::{self, Frames};
use crate::tree::btree::Tree;
use crate::tree::delta::{Delta, Value};
use crate::tree::key::{self, Key, KeyRange};
use crate::tree::memtable::Levels;
use crate::tree::value::Extent;
use crate::types::{FramePtr, Ino};
use std::collections::BTreeMap;
use std::ops::Range;

/// Extents looked at in one step when a long stretch is removed.
const PUNCH_BATCH: usize = 1024;

/// The changes one commit makes to extents.
pub(super) struct ExtentEdit<'a> {
    base: Vec<&'a Delta>,
    tree: &'a Tree,
    frames: &'a dyn Frames,
    shipping: &'a dyn Shipping,
    first_new: u64,
    record: u64,
    pub changes: Delta,
    pub live_added: u64,
    pub live_freed: u64,
    pub dead: Vec<FramePtr>,
}

impl<'a> ExtentEdit<'a> {
    pub fn new(
        taken: &'a Taken,
        frames: &'a dyn Frames,
        record: u64,
        shipping: &'a dyn Shipping,
    ) -> ExtentEdit<'a> {
        ExtentEdit {
            base: taken.base.iter().map(|delta| &**delta).collect(),
            tree: &taken.tree,
            frames,
            shipping,
            first_new: taken.first_new,
            record,
            changes: BTreeMap::new(),
            live_added: 0,
            live_freed: 0,
            dead: Vec::new(),
        }
    }

    /// What lies in `range` is replaced by `extent`, or by a hole.
    pub fn replace(&mut self, ino: Ino, range: Range<u64>, extent: Option<Value>) -> log::Result<()> {
        if ino.0 < self.first_new {
            self.punch(ino, range.clone())?;
        }
        if let Some(extent) = extent {
            self.live_added += range.end - range.start;
            self.changes.insert(key::extent(ino, range.start), Some(extent));
        }
        Ok(())
    }

    fn punch(&mut self, ino: Ino, range: Range<u64>) -> log::Result<()> {
        let last = |keys: KeyRange| Ok(self.look(|levels| levels.last(&keys.start, &keys.end))?);
        let mut from = first_touching(ino, range.start, self.record, last).map_err(into_log)?;
        loop {
            let found = self.extents(ino, from..range.end)?;
            for (key, value) in &found {
                let (start, extent) = stored_extent(key, value).map_err(into_log)?;
                self.trim(ino, start, &extent, &range);
                from = start + 1;
            }
            if found.len() < PUNCH_BATCH {
                return Ok(());
            }
        }
    }

    /// Takes `range` out of the extent that starts at `start`.
    fn trim(&mut self, ino: Ino, start: u64, extent: &Extent<'_>, range: &Range<u64>) {
        let end = start + extent.len();
        if end <= range.start {
            return;
        }
        self.live_freed += end.min(range.end) - start.max(range.start);
        self.changes.insert(key::extent(ino, start), None);
        if start < range.start {
            let part = part_of(extent, 0..range.start - start);
            self.changes.insert(key::extent(ino, start), Some(part));
        }
        if end > range.end {
            let part = part_of(extent, range.end - start..end - start);
            self.changes.insert(key::extent(ino, range.end), Some(part));
        }
        if let Extent::Stored { ptr, from: 0, .. } = extent
            && start >= range.start
            && end <= range.end
        {
            self.dead.push(*ptr);
        }
    }

    fn extents(&self, ino: Ino, offsets: Range<u64>) -> log::Result<Vec<(Key, Value)>> {
        let range = key::extents(ino, offsets);
        self.look(|levels| levels.range(&range.start, &range.end, PUNCH_BATCH))
    }

    /// Looks at the newest committed state under the changes of this commit. Pages that are only in the store are
    /// fetched: the committer may wait, requests never do.
    fn look<T>(&self, what: impl Fn(&Levels<'_>) -> log::Result<T>) -> log::Result<T> {
        let mut maps = Vec::with_capacity(self.base.len() + 1);
        maps.push(&self.changes);
        maps.extend(&self.base);
        let levels = Levels { maps: &maps, tree: self.tree, frames: self.frames };
        loop {
            match what(&levels) {
                Err(log::Error::Missing(ptrs)) => self.shipping.fetch(&ptrs)?,
                other => return other,
            }
        }
    }
}

fn part_of(extent: &Extent<'_>, part: Range<u64>) -> Value {
    match extent {
        Extent::Stored { ptr, from, .. } => {
            Extent::Stored { ptr: *ptr, from: from + part.start as u32, len: (part.end - part.start) as u32 }
                .encode()
        }
        Extent::Inline { bytes } => {
            Extent::Inline { bytes: &bytes[part.start as usize..part.end as usize] }.encode()
        }
    }
}

fn into_log(e: super::Error) -> log::Error {
    match e {
        super::Error::Log(e) => e,
        other => log::Error::corrupt("the tree", other),
    }
}
