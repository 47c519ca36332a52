//! File bytes: read, write, holes, shared copies.
//! Invariant: no byte beyond the size is ever kept, so extending a file shows zeros.

use super::dirty::Run;
use super::error::{Error, Result, os};
use super::extents::{Piece, Source};
use super::inode::clear_set_id;
use super::state::Tx;
use super::{Fs, MAX_FILE_SIZE};
use crate::log::{self, BLOCK_LEN, Part};
use crate::tree::value::{FileType, SPARSE};
use crate::types::{FramePtr, Ino};
use bytes::Bytes;
use std::ops::Range;

/// Longest change, in bytes, for which the count of a sparse file's bytes is kept instead of made anew.
const COUNT_MAX: u64 = 16 << 20;

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next hole; the end of the file counts as one.
    Hole,
}

/// What a write takes off a file besides changing it (chmod(2), capabilities(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strip {
    /// Nothing: pages that were changed through a mapping.
    Nothing,
    /// Its capabilities: the writer is privileged.
    Capability,
    /// Its capabilities and set-id bits.
    All,
}

impl Strip {
    fn of(kill: bool) -> Strip {
        if kill { Strip::All } else { Strip::Capability }
    }
}

impl Fs {
    /// At most `len` bytes at `offset`; fewer only at the end of the file.
    pub fn read(&self, ino: Ino, offset: u64, len: usize) -> Result<Bytes> {
        let pieces = {
            let state = self.state.lock();
            let inode = state.inode(&*self.frames, ino)?;
            if inode.kind() != FileType::Regular {
                return os(if inode.kind() == FileType::Directory { libc::EISDIR } else { libc::EINVAL });
            }
            let end = inode.size.min(offset.saturating_add(len as u64));
            if offset >= end {
                return Ok(Bytes::new());
            }
            self.pieces(&state, ino, offset..end)?
        };
        self.assemble(&pieces)
    }

    /// Puts pieces together.
    fn assemble(&self, pieces: &[Piece]) -> Result<Bytes> {
        let total: u64 = pieces.iter().map(|p| p.len).sum();
        // A frame opens its last block whole before what was not asked for is cut off.
        let (mut out, mut missing) = (Vec::with_capacity(total as usize + BLOCK_LEN), Vec::new());
        for run in pieces.chunk_by(|a, b| a.part().is_some() && b.part().is_some()) {
            let parts: Vec<Part> = run.iter().filter_map(Piece::part).collect();
            match self.frames.parts_onto(&parts, &mut out) {
                Ok(()) => {}
                // All of them are asked for at once.
                Err(log::Error::Missing(ptrs)) => missing.extend(ptrs),
                Err(e) => return Err(e.into()),
            }
            for piece in run {
                let len = piece.len as usize;
                match &piece.source {
                    Source::Memory(data, from) => out.extend_from_slice(&data[*from..from + len]),
                    Source::Hole => out.resize(out.len() + len, 0),
                    Source::Frame(..) => {}
                }
            }
        }
        if !missing.is_empty() {
            return Err(Error::Log(log::Error::Missing(missing)));
        }
        Ok(Bytes::from(out))
    }

    /// The frames that hold `range` of a file (clamped to its size): what a reader will want next.
    pub fn frames_of(&self, ino: Ino, range: Range<u64>) -> Result<Vec<FramePtr>> {
        let state = self.state.lock();
        let inode = state.inode(&*self.frames, ino)?;
        let range = range.start..range.end.min(inode.size);
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let pieces = self.pieces(&state, ino, range)?;
        Ok(pieces.iter().filter_map(|piece| piece.part().map(|part| part.ptr)).collect())
    }

    /// Writes `data` at `offset`. `kill` clears set-id bits (the writer lacks CAP_FSETID).
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8], kill: bool) -> Result<usize> {
        self.write_as(ino, offset, data, Strip::of(kill))
    }

    /// Writes `data` at `offset`.
    pub fn write_as(&self, ino: Ino, offset: u64, data: &[u8], strip: Strip) -> Result<usize> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= MAX_FILE_SIZE);
        let Some(end) = end else { return os(libc::EFBIG) };
        let mut tx = self.begin_growing()?;
        tx.open_for_write(ino, strip)?;
        if data.is_empty() {
            return Ok(0);
        }
        tx.check_limit(ino, offset..end, data.len() as u64)?;
        let now = tx.now;
        let inode = tx.inode(ino)?;
        if offset > inode.size {
            inode.flags |= SPARSE;
        }
        inode.size = inode.size.max(end);
        (inode.mtime, inode.ctime) = (now, now);
        tx.count_allocated(ino, offset..end, data.len() as u64);
        let record = self.settings.record_size;
        tx.st.edit_dirty(ino, |file, full| {
            file.write(offset, data, record, |start| full.push_back((ino, start)));
        });
        let seal_early = tx.st.full.len() as u64 * record >= super::commit::SEAL_EARLY_BYTES;
        tx.apply();
        if seal_early {
            self.wake.notify_one();
        }
        Ok(data.len())
    }

    /// fallocate(2): plain and keep-size only move the size (space is promised by the volume, not by blocks);
    /// punch and zero make holes. `kill` as for [`Fs::write`].
    pub fn fallocate(&self, ino: Ino, offset: u64, len: u64, mode: i32, kill: bool) -> Result<()> {
        let known = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !known != 0 {
            return os(libc::EOPNOTSUPP);
        }
        let Some(end) = offset.checked_add(len).filter(|e| len > 0 && *e <= MAX_FILE_SIZE) else {
            return os(if len == 0 { libc::EINVAL } else { libc::EFBIG });
        };
        let mut tx = self.begin_growing()?;
        tx.open_for_write(ino, Strip::of(kill))?;
        let now = tx.now;
        let inode = tx.inode(ino)?;
        let old = inode.size;
        (inode.mtime, inode.ctime) = (now, now);
        if mode & !libc::FALLOC_FL_KEEP_SIZE == 0 {
            // Nothing is reserved, but what could never be written is refused now.
            tx.check_limit(ino, offset..end, len)?;
        }
        let inode = tx.inode(ino)?;
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > old {
            inode.size = end;
            inode.flags |= SPARSE;
        }
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 && offset < old {
            inode.flags |= SPARSE;
            tx.count_allocated(ino, offset..end.min(old), 0);
            tx.punch(ino, offset..end.min(old));
        }
        tx.apply();
        Ok(())
    }

    /// False of a file that certainly has none.
    pub fn may_have_holes(&self, ino: Ino) -> Result<bool> {
        Ok(self.state.lock().inode(&*self.frames, ino)?.flags & SPARSE != 0)
    }

    /// The next data or hole at or after `offset`; `ENXIO` past the end.
    pub fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let state = self.state.lock();
        let inode = state.inode(&*self.frames, ino)?;
        if offset >= inode.size {
            return os(libc::ENXIO);
        }
        if inode.flags & SPARSE == 0 {
            return Ok(if what == Seek::Data { offset } else { inode.size });
        }
        let mut at = offset;
        while at < inode.size {
            let (is_data, end) = self.stretch(&state, ino, at, inode.size)?;
            if is_data == (what == Seek::Data) {
                return Ok(at);
            }
            at = end;
        }
        if what == Seek::Data { os(libc::ENXIO) } else { Ok(inode.size) }
    }

    /// copy_file_range(2): what is sealed is shared, only what is still in memory is copied. Returns the bytes
    /// copied, fewer than `len` at the end of the source. `kill` as for [`Fs::write`].
    pub fn copy_range(&self, from: (Ino, u64), to: (Ino, u64), len: u64, kill: bool) -> Result<u64> {
        let mut tx = self.begin_growing()?;
        let source = tx.inode(from.0)?;
        if source.kind() != FileType::Regular {
            return os(libc::EINVAL);
        }
        let source_end = source.size.min(from.1.saturating_add(len));
        if source_end <= from.1 {
            return Ok(0);
        }
        // Bounded work in one critical section; the caller comes again for the rest.
        let len = (source_end - from.1).min(1 << 30);
        let Some(end) = to.1.checked_add(len).filter(|e| *e <= MAX_FILE_SIZE) else {
            return os(libc::EFBIG);
        };
        let overlap = from.0 == to.0 && from.1 < to.1 + len && to.1 < from.1 + len;
        if overlap {
            return os(libc::EINVAL);
        }
        tx.open_for_write(to.0, Strip::of(kill))?;
        let pieces = self.pieces(&tx.st, from.0, from.1..from.1 + len)?;
        let stored: u64 = pieces.iter().filter(|p| !matches!(p.source, Source::Hole)).map(|p| p.len).sum();
        tx.check_limit(to.0, to.1..end, stored)?;
        let now = tx.now;
        let target = tx.inode(to.0)?;
        if to.1 > target.size || stored < len {
            target.flags |= SPARSE;
        }
        target.size = target.size.max(end);
        (target.mtime, target.ctime) = (now, now);
        tx.count_allocated(to.0, to.1..end, stored);
        for piece in &pieces {
            tx.place(to.0, piece.start - from.1 + to.1, piece);
        }
        tx.apply();
        Ok(len)
    }
}

impl Tx<'_> {
    /// The file may be written: it exists and is a regular file.
    fn open_for_write(&mut self, ino: Ino, strip: Strip) -> Result<()> {
        let inode = self.inode(ino)?;
        if inode.kind() != FileType::Regular {
            return os(libc::EINVAL);
        }
        if strip == Strip::All {
            clear_set_id(inode);
        }
        if strip == Strip::Nothing { Ok(()) } else { self.drop_capability(ino) }
    }

    /// Refuses what would pass the volume's size limit: `range` of the file is to hold `bytes` that are no hole. What
    /// only takes the place of bytes that are there is never refused.
    fn check_limit(&mut self, ino: Ino, range: Range<u64>, bytes: u64) -> Result<()> {
        let Some(limit) = self.fs.settings.size_limit else { return Ok(()) };
        if self.st.used().saturating_add(bytes) <= limit {
            return Ok(());
        }
        let more = bytes.saturating_sub(self.fs.allocated_bytes(&self.st, ino, range)?);
        if more == 0 || self.st.used().saturating_add(more) <= limit {
            return Ok(());
        }
        // Not committed yet means not counted exactly yet.
        if self.st.changed_at.is_none() && self.st.sealing.is_none() {
            return os(libc::ENOSPC);
        }
        self.st.over_limit = Some(self.st.newest_change());
        Err(Error::OverLimit)
    }

    /// Keeps the count of a sparse file's bytes: `range` is about to hold `bytes` that are no hole. A count that
    /// cannot be kept is dropped; the next `stat` makes a new one.
    fn count_allocated(&mut self, ino: Ino, range: Range<u64>, bytes: u64) {
        let Some(count) = self.st.allocated.get(&ino).copied() else { return };
        let before = match range.end - range.start {
            0..=COUNT_MAX => self.fs.allocated_bytes(&self.st, ino, range).ok(),
            _ => None,
        };
        match before.and_then(|before| count.checked_sub(before)) {
            Some(rest) => self.st.allocated.insert(ino, rest + bytes),
            None => self.st.allocated.remove(&ino),
        };
    }

    /// Makes `range` of a file a hole.
    pub fn punch(&mut self, ino: Ino, range: Range<u64>) {
        let below = self.st.has_past(ino);
        self.st.edit_dirty(ino, |file, _| file.punch(range, below));
    }

    /// Puts a piece of another file at `offset`, cut at record boundaries.
    fn place(&mut self, ino: Ino, offset: u64, piece: &Piece) {
        let record = self.fs.settings.record_size;
        let len = piece.len as usize;
        if matches!(piece.source, Source::Hole) {
            return self.punch(ino, offset..offset + piece.len);
        }
        self.st.edit_dirty(ino, |file, _| match &piece.source {
            Source::Memory(data, from) => file.write(offset, &data[*from..from + len], record, |_| {}),
            Source::Frame(ptr, from) => {
                let mut done = 0;
                while done < piece.len {
                    let at = offset + done;
                    let part = (record - at % record).min(piece.len - done);
                    let run = Run::Stored { ptr: *ptr, from: from + done as u32, len: part as u32 };
                    file.share(at, run);
                    done += part;
                }
            }
            Source::Hole => {}
        });
        if matches!(piece.source, Source::Frame(..)) {
            self.st.growth += piece.len;
        }
    }
}
