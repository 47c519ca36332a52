//! Parts of large data frames, read from this host's files and opened into the caller's memory: frames in blocks that lie
//! one behind the other are read at once, and what the kernel's cache does not hold is read past it, for the plain bytes
//! are cached above it already.
//! Invariant: nothing is kept; what does not open at its place is not handed out, and is told by who reads it by itself.

use super::Part;
use super::blocks::Layout;
use super::reader::{FrameReader, OpenFile};
use crate::disk::{ALIGN, DiskFile, FileRef, Mode, aligned, is_refused};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// So many sealed bytes are read at once, at most: what the kernel asks for at once, and their tags.
const RUN_MAX: u64 = (1 << 20) + (64 << 10);
/// The next frame begins behind the last block of the one before: this is more than its prefix.
const GAP_MAX: u64 = 64;
/// Frames of at least so many bytes are pieces of large files. Smaller ones lie among others of their tree, which the
/// kernel reads ahead.
const LARGE: u32 = 64 << 10;
/// A small read this near to where the last one of its file ended goes on from it, and the kernel reads ahead for it.
const NEAR: u64 = 128 << 10;
/// The sector of most disks, and so the least that is read past the cache.
const SECTOR: u64 = 512;

thread_local! {
    /// Where sealed bytes lie until they are opened: as long as the longest that this thread has read.
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A segment's file, which can be read in two ways.
pub(super) struct SegmentFile {
    file: Arc<dyn DiskFile>,
    whole: FileRef,
    /// The same file, past the cache.
    past: OnceLock<Arc<dyn DiskFile>>,
    /// What is read past the cache begins and ends at multiples of this; 0 where there is no way past it.
    unit: AtomicU64,
    /// Where the last read ended.
    last: AtomicU64,
}

/// A part, and where the blocks that hold it lie.
struct Placed {
    part: Part,
    layout: Layout,
    which: Range<usize>,
    place: Range<u64>,
}

impl SegmentFile {
    /// `file`, which lies at `whole`.
    pub fn new(file: Arc<dyn DiskFile>, whole: FileRef) -> SegmentFile {
        SegmentFile {
            file,
            whole,
            past: OnceLock::new(),
            unit: AtomicU64::new(SECTOR),
            last: AtomicU64::new(0),
        }
    }

    /// The file, to be read through the cache.
    pub fn cached(&self) -> &dyn DiskFile {
        &*self.file
    }

    /// Shows `range` to `look`. Nothing when it cannot be read.
    fn show<T>(&self, range: &Range<u64>, large: bool, look: impl FnOnce(&[u8]) -> Option<T>) -> Option<T> {
        let len = (range.end - range.start) as usize;
        SEALED.with_borrow_mut(|memory| {
            let past = if large { self.read_past(range, memory) } else { None };
            let at = match past {
                Some(at) => at,
                None => {
                    memory.resize(memory.len().max(len), 0);
                    self.file.read_exact_at(&mut memory[..len], range.start).ok()?;
                    0
                }
            };
            look(memory.get(at..at + len)?)
        })
    }

    /// Reads `range` past the cache; says where in `memory` it begins. Nothing when it is to be read through the cache.
    fn read_past(&self, range: &Range<u64>, memory: &mut Vec<u8>) -> Option<usize> {
        let last = self.last.swap(range.end, Ordering::Relaxed);
        let in_order = range.end - range.start < u64::from(LARGE) && range.start.abs_diff(last) <= NEAR;
        if in_order || self.file.is_cached(range) {
            return None;
        }
        let past = self.past()?;
        loop {
            let unit = self.unit.load(Ordering::Relaxed);
            let begin = range.start.checked_div(unit)? * unit;
            let len = (range.end.next_multiple_of(unit) - begin) as usize;
            let (skip, into) = aligned(memory, len);
            match past.read_at(into, begin) {
                Ok(n) => {
                    return (begin + n as u64 >= range.end).then(|| skip + (range.start - begin) as usize);
                }
                Err(e) if is_refused(&e) => {
                    // A disk with longer sectors, or a file system that minds only now.
                    let longer = if unit < ALIGN as u64 { ALIGN as u64 } else { 0 };
                    self.unit.store(longer, Ordering::Relaxed);
                }
                Err(_) => return None,
            }
        }
    }

    /// The file past the cache. Another reason than that there is no such way may pass.
    fn past(&self) -> Option<&dyn DiskFile> {
        if self.past.get().is_none() && self.unit.load(Ordering::Relaxed) > 0 {
            match self.whole.disk.open(&self.whole.path, Mode::ReadDirect) {
                Ok(file) => drop(self.past.set(file)), // or another thread's, which is as good
                Err(e) if is_refused(&e) => self.unit.store(0, Ordering::Relaxed),
                Err(_) => {}
            }
        }
        self.past.get().map(|file| &**file)
    }
}

impl FrameReader {
    /// Appends the first of `parts`, as many as lie one behind the other in frames in blocks, to `out`; says how many. It ends
    /// where one is not here, is in no such frame, or does not open: reading that alone tells what is wrong.
    pub(super) fn read_run(&self, parts: &[Part], out: &mut Vec<u8>) -> usize {
        let Some(Ok(Some(open))) = parts.first().map(|part| self.open_file(part.ptr.seq)) else { return 0 };
        let run = self.run_of(&open, parts);
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return 0 };
        let (range, mut opened) = (first.place.start..last.place.end, 0);
        open.file.show(&range, first.part.ptr.len >= LARGE, |sealed| {
            for placed in &run {
                let place =
                    (placed.place.start - range.start) as usize..(placed.place.end - range.start) as usize;
                placed.open(&open, sealed.get(place)?, out)?;
                opened += 1;
            }
            Some(())
        });
        if open.cached && opened > 0 {
            self.touch(first.part.ptr.seq);
        }
        opened
    }

    /// The first of `parts` that can be read at once.
    fn run_of(&self, open: &OpenFile, parts: &[Part]) -> Vec<Placed> {
        let mut run: Vec<Placed> = Vec::new();
        for part in parts {
            let Some(placed) = Placed::of(*part).filter(|placed| self.here(open, placed.part.ptr)) else {
                break;
            };
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                let follows = part.ptr.seq == last.part.ptr.seq
                    && (last.place.end..=last.place.end + GAP_MAX).contains(&placed.place.start);
                if !follows || placed.place.end - first.place.start > RUN_MAX {
                    break;
                }
            }
            run.push(placed);
        }
        run
    }
}

impl Placed {
    /// Nothing when the part's frame cannot be one in blocks, or does not reach so far.
    fn of(part: Part) -> Option<Placed> {
        let layout = Layout::of(part.ptr.len as usize)?;
        let range = part.range();
        if range.end > layout.plain_len() {
            return None;
        }
        let which = layout.holding(&range);
        let sealed = layout.sealed(&which);
        let base = u64::from(part.ptr.offset);
        Some(Placed { part, layout, which, place: base + sealed.start as u64..base + sealed.end as u64 })
    }

    /// Opens the blocks, and keeps what was asked for.
    fn open(&self, open: &OpenFile, sealed: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let (begin, range) = (out.len(), self.part.range());
        open.cipher.open_blocks(self.part.ptr, self.layout, &self.which, sealed, out).ok()?;
        out.drain(begin..begin + range.start - self.layout.plain(&self.which).start);
        out.truncate(begin + range.len());
        Some(())
    }
}
