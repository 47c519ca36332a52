//! Where the bytes of a file lie: in memory, in the log, or nowhere (a hole).
//! Invariant: an extent never crosses a record boundary of its file, so all extents that touch an offset start
//! within its record. Requests only read extents; the committer alone changes them.

use super::dirty::Run;
use super::error::{Result, of};
use super::state::State;
use super::{Fs, MAX_FILE_SIZE};
use crate::log::{self, Part};
use crate::tree::delta::Value;
use crate::tree::key::{self, Key, KeyRange, KeyRef};
use crate::tree::value::Extent;
use crate::types::{FramePtr, Ino};
use std::ops::Range;
use std::sync::Arc;

/// Extents looked at in one go when a file's are counted.
const COUNT_BATCH: usize = 1024;

/// Extents that a read rarely meets more of.
const FEW: usize = 64;

/// Where a piece of a file lies.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// In memory, from this byte on.
    Memory(Arc<Vec<u8>>, usize),
    /// In a sealed frame, from this plain byte on.
    Frame(FramePtr, u32),
    /// Nowhere: zeros.
    Hole,
}

/// A stretch of a file and where it lies.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub start: u64,
    pub len: u64,
    pub source: Source,
}

impl Piece {
    /// The part of a frame that it is, if it is one.
    pub fn part(&self) -> Option<Part> {
        match self.source {
            Source::Frame(ptr, from) => Some(Part { ptr, from, len: self.len }),
            _ => None,
        }
    }
}

/// The file offset at which the extent with this key starts.
pub(super) fn offset_of(key: &[u8]) -> Result<u64> {
    match key::parse(key) {
        Some(KeyRef::Extent { off, .. }) => Ok(off),
        _ => Err(log::Error::corrupt("the tree", "a key among extents is no extent's").into()),
    }
}

/// Where in the file the stored extent starts, and what it is.
pub(super) fn stored_extent<'a>(key: &[u8], value: &'a [u8]) -> Result<(u64, Extent<'a>)> {
    let start = offset_of(key)?;
    let ino = || key.first_chunk().map_or(0, |ino| u64::from_be_bytes(*ino));
    let object = || format!("inode {}, extent at {start}", ino());
    let extent = Extent::decode(value).map_err(|e| of(object(), e))?;
    match start.checked_add(extent.len()) {
        Some(end) if end <= MAX_FILE_SIZE => Ok((start, extent)),
        _ => Err(log::Error::corrupt(object(), "ends where no file does").into()),
    }
}

/// First offset at which an extent that touches `offset` can start.
pub(super) fn scan_from(offset: u64, record: u64) -> u64 {
    offset - offset % record
}

/// Where the extent starts that covers `at`, or else the last one before it in its record, or `at`. Extents do not
/// overlap, so that no other one before `at` touches it; a record can have hundreds of small ones. `last` gives the
/// greatest key in a range.
pub(super) fn first_touching(
    ino: Ino,
    at: u64,
    record: u64,
    last: impl FnOnce(KeyRange) -> Result<Option<(Key, Value)>>,
) -> Result<u64> {
    match last(key::extents(ino, scan_from(at, record)..at.saturating_add(1)))? {
        Some((key, _)) => offset_of(&key),
        None => Ok(at),
    }
}

impl Fs {
    /// What lies in `range` of the file, as pieces in file order without gaps.
    pub(super) fn pieces(&self, state: &State, ino: Ino, range: Range<u64>) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut gaps = vec![range.clone()];
        let layers = [state.dirty.get(&ino), state.sealing.as_ref().and_then(|s| s.get(&ino))];
        for file in layers.into_iter().flatten() {
            let mut left = Vec::new();
            for gap in gaps {
                let mut at = gap.start;
                for (start, run) in file.overlapping(gap.clone()) {
                    let from = start.max(gap.start);
                    let to = (start + run.len()).min(gap.end);
                    if at < from {
                        left.push(at..from);
                    }
                    pieces.push(Piece { start: from, len: to - from, source: run_source(run, from - start) });
                    at = to;
                }
                if at < gap.end {
                    left.push(at..gap.end);
                }
            }
            gaps = left;
        }
        if state.has_past(ino) {
            for gap in gaps {
                self.stored_pieces(state, ino, gap, &mut pieces)?;
            }
        } else {
            pieces.extend(gaps.into_iter().map(hole));
        }
        pieces.sort_unstable_by_key(|p| p.start);
        Ok(pieces)
    }

    /// The pieces of a stretch that only the log can know of.
    fn stored_pieces(&self, state: &State, ino: Ino, gap: Range<u64>, pieces: &mut Vec<Piece>) -> Result<()> {
        let mut at = gap.start;
        for (key, value) in self.extents(state, ino, gap.clone())? {
            let (start, extent) = stored_extent(&key, &value)?;
            let from = start.max(at);
            let to = (start + extent.len()).min(gap.end);
            if to <= from {
                continue;
            }
            if at < from {
                pieces.push(hole(at..from));
            }
            let skip = from - start;
            let source = match extent {
                Extent::Stored { ptr, from, .. } => Source::Frame(ptr, from + skip as u32),
                // Few bytes: a copy is cheaper than another kind of source.
                Extent::Inline { bytes } => Source::Memory(Arc::new(bytes.to_vec()), skip as usize),
            };
            pieces.push(Piece { start: from, len: to - from, source });
            at = to;
        }
        if at < gap.end {
            pieces.push(hole(at..gap.end));
        }
        Ok(())
    }

    /// The extents that touch `range`, in file order.
    fn extents(&self, state: &State, ino: Ino, range: Range<u64>) -> Result<Vec<(Key, Value)>> {
        let mut from = scan_from(range.start, self.settings.record_size);
        let found = state.range(&*self.frames, key::extents(ino, from..range.end), FEW)?;
        if found.len() < FEW {
            return Ok(found);
        }
        from = self.first_touching(state, ino, range.start)?; // a record of many little pieces
        state.range(&*self.frames, key::extents(ino, from..range.end), usize::MAX)
    }

    fn first_touching(&self, state: &State, ino: Ino, at: u64) -> Result<u64> {
        first_touching(ino, at, self.settings.record_size, |range| state.last(&*self.frames, range))
    }

    /// The stretch that begins at `at`: what it is, and where it ends (never past `end`).
    pub(super) fn stretch(&self, state: &State, ino: Ino, at: u64, end: u64) -> Result<(bool, u64)> {
        let mut end = end;
        let layers = [state.dirty.get(&ino), state.sealing.as_ref().and_then(|s| s.get(&ino))];
        for file in layers.into_iter().flatten() {
            if let Some((start, run)) = file.overlapping(at..end).next() {
                if start <= at {
                    return Ok((!matches!(run, Run::Hole(_)), end.min(start + run.len())));
                }
                end = start;
            }
        }
        if !state.has_past(ino) {
            return Ok((false, end));
        }
        let mut from = self.first_touching(state, ino, at)?;
        while from < end {
            let found = state.range(&*self.frames, key::extents(ino, from..end), 8)?;
            let Some((last, _)) = found.last() else { break };
            from = offset_of(last)? + 1;
            for (key, value) in &found {
                let (start, extent) = stored_extent(key, value)?;
                if start + extent.len() > at {
                    let is_data = start <= at;
                    return Ok((is_data, end.min(if is_data { start + extent.len() } else { start })));
                }
            }
        }
        Ok((false, end))
    }

    /// Bytes in `range` of the file that are not holes.
    pub(super) fn allocated_bytes(&self, state: &State, ino: Ino, range: Range<u64>) -> Result<u64> {
        let (mut at, mut sum) = (range.start, 0);
        let mut from = scan_from(at, self.settings.record_size);
        // In batches, so that what is looked at is bounded by the extents there are, not by the file's size.
        while at < range.end {
            let next = match state.has_past(ino) {
                true => state.range(&*self.frames, key::extents(ino, from..range.end), COUNT_BATCH)?,
                false => Vec::new(),
            };
            let end = match next.last() {
                Some((last, _)) if next.len() == COUNT_BATCH => offset_of(last)?.max(at + 1),
                _ => range.end,
            };
            let pieces = self.pieces(state, ino, at..end)?;
            sum += pieces.iter().filter(|p| !matches!(p.source, Source::Hole)).map(|p| p.len).sum::<u64>();
            at = end;
            from = at; // a batch ends where an extent starts
        }
        Ok(sum)
    }
}

fn hole(range: Range<u64>) -> Piece {
    Piece { start: range.start, len: range.end - range.start, source: Source::Hole }
}

fn run_source(run: &Run, skip: u64) -> Source {
    match run {
        Run::Data(bytes) => Source::Memory(bytes.clone(), skip as usize),
        Run::Hole(_) => Source::Hole,
        Run::Stored { ptr, from, .. } => Source::Frame(*ptr, from + skip as u32),
    }
}
