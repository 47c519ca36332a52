//! Written bytes that are not in the log yet: per file an ordered map of runs.
//! Invariant: runs do not overlap; a data run never crosses a record boundary of the file, so that whatever way
//! the bytes came in, they leave as whole records.

use crate::types::FramePtr;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// One stretch of changed bytes of a file.
#[derive(Clone, Debug)]
pub enum Run {
    /// Bytes in memory.
    Data(Arc<Vec<u8>>),
    /// This many bytes that read as zero and hold no space (truncated or punched).
    Hole(u64),
    /// Bytes sealed already: `len` plain bytes of the frame, from `from` on.
    Stored {
        /// The frame.
        ptr: FramePtr,
        /// First plain byte of the frame that belongs to the run.
        from: u32,
        /// Number of bytes.
        len: u32,
    },
}

impl Run {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Run::Data(bytes) => bytes.len() as u64,
            Run::Hole(len) => *len,
            Run::Stored { len, .. } => u64::from(*len),
        }
    }

    /// The part `range` of the run (offsets within it).
    fn part(&self, range: Range<u64>) -> Run {
        match self {
            Run::Data(bytes) => Run::Data(Arc::new(bytes[range.start as usize..range.end as usize].to_vec())),
            Run::Hole(_) => Run::Hole(range.end - range.start),
            Run::Stored { ptr, from, .. } => Run::Stored {
                ptr: *ptr,
                from: from + range.start as u32,
                len: (range.end - range.start) as u32,
            },
        }
    }

    fn memory(&self) -> u64 {
        match self {
            Run::Data(bytes) => bytes.len() as u64,
            _ => 0,
        }
    }
}

/// The changed runs of one file, by file offset.
#[derive(Clone, Debug, Default)]
pub struct DirtyFile {
    runs: BTreeMap<u64, Run>,
    bytes: u64,
}

impl DirtyFile {
    /// Bytes held in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All runs in file order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, &Run)> {
        self.runs.iter().map(|(start, run)| (*start, run))
    }

    /// The run that starts at `start`.
    pub fn run_at(&self, start: u64) -> Option<&Run> {
        self.runs.get(&start)
    }

    /// Runs that touch `range`, in file order.
    pub fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Run)> {
        let first = match self.runs.range(..=range.start).next_back() {
            Some((start, run)) if start + run.len() > range.start => *start,
            _ => range.start,
        };
        self.runs.range(first..range.end).map(|(start, run)| (*start, run))
    }

    /// Takes `data` at `offset`; calls `full` with the start of each run that has become a whole record.
    pub fn write(&mut self, offset: u64, data: &[u8], record: u64, mut full: impl FnMut(u64)) {
        let (mut offset, mut data) = (offset, data);
        while !data.is_empty() {
            let room = (record - offset % record) as usize;
            let (piece, rest) = data.split_at(room.min(data.len()));
            let (start, len) = self.write_piece(offset, piece, record);
            if len == record {
                full(start);
            }
            offset += piece.len() as u64;
            data = rest;
        }
    }

    /// Writes within one record; returns start and length of the run the bytes ended in.
    fn write_piece(&mut self, offset: u64, piece: &[u8], record: u64) -> (u64, u64) {
        let end = offset + piece.len() as u64;
        let home = offset - offset % record;
        let joins = match self.runs.range(home..=offset).next_back() {
            Some((start, Run::Data(bytes))) if start + bytes.len() as u64 >= offset => Some(*start),
            _ => None,
        };
        let Some(start) = joins else {
            self.cut(offset..end);
            let mut bytes = Vec::with_capacity(piece.len());
            bytes.extend_from_slice(piece);
            self.put(offset, Run::Data(Arc::new(bytes)));
            return self.join_next(offset, record);
        };
        let old_end = start + self.runs[&start].len();
        if end > old_end {
            self.cut(old_end..end);
        }
        let Some(Run::Data(bytes)) = self.runs.get_mut(&start) else {
            unreachable!("the run was found above");
        };
        let bytes = Arc::make_mut(bytes);
        let at = (offset - start) as usize;
        let inside = piece.len().min(bytes.len() - at);
        bytes[at..at + inside].copy_from_slice(&piece[..inside]);
        if bytes.capacity() < at + piece.len() {
            // Grow by doubling, but never past the record: a full run wastes nothing.
            let target = (2 * bytes.capacity()).clamp(at + piece.len(), record as usize);
            bytes.reserve_exact(target - bytes.len());
        }
        bytes.extend_from_slice(&piece[inside..]);
        self.bytes += (piece.len() - inside) as u64;
        self.join_next(start, record)
    }

    /// Joins the data run at `start` with a data run that begins where it ends, within the record.
    fn join_next(&mut self, start: u64, record: u64) -> (u64, u64) {
        let end = start + self.runs[&start].len();
        if !end.is_multiple_of(record)
            && let Some(Run::Data(_)) = self.runs.get(&end)
            && let Some(Run::Data(next)) = self.runs.remove(&end)
            && let Some(Run::Data(bytes)) = self.runs.get_mut(&start)
        {
            Arc::make_mut(bytes).extend_from_slice(&next);
        }
        (start, self.runs[&start].len())
    }

    /// Makes `range` a hole. When `below` is false nothing older can show through, so forgetting is enough.
    pub fn punch(&mut self, range: Range<u64>, below: bool) {
        self.cut(range.clone());
        if below && range.end > range.start {
            self.put(range.start, Run::Hole(range.end - range.start));
        }
    }

    /// Puts bytes that lie sealed in the log (a shared copy).
    pub fn share(&mut self, offset: u64, run: Run) {
        self.cut(offset..offset + run.len());
        self.put(offset, run);
    }

    /// Replaces the in-memory run at `start` by its sealed form, if it is still the same bytes. True if it was.
    pub fn sealed(&mut self, start: u64, same: &Arc<Vec<u8>>, ptr: FramePtr) -> bool {
        match self.runs.get(&start) {
            Some(Run::Data(bytes)) if Arc::ptr_eq(bytes, same) => {
                let len = bytes.len() as u32;
                self.bytes -= u64::from(len);
                self.runs.insert(start, Run::Stored { ptr, from: 0, len });
                true
            }
            _ => false,
        }
    }

    fn put(&mut self, start: u64, run: Run) {
        self.bytes += run.memory();
        self.runs.insert(start, run);
    }

    /// Removes everything within `range`, trimming runs that reach over its ends.
    fn cut(&mut self, range: Range<u64>) {
        let touched: Vec<u64> = self.overlapping(range.clone()).map(|(start, _)| start).collect();
        for start in touched {
            let Some(run) = self.runs.remove(&start) else { continue };
            self.bytes -= run.memory();
            let end = start + run.len();
            if start < range.start {
                self.put(start, run.part(0..range.start - start));
            }
            if end > range.end {
                self.put(range.end, run.part(range.end - start..end - start));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: u64 = 64;

    fn read(file: &DirtyFile, len: usize) -> Vec<Option<u8>> {
        let mut out = vec![None; len];
        for (start, run) in file.overlapping(0..len as u64) {
            for i in 0..run.len() {
                let Some(cell) = out.get_mut((start + i) as usize) else { break };
                assert!(cell.is_none(), "runs overlap at {}", start + i);
                *cell = match run {
                    Run::Data(bytes) => Some(bytes[i as usize]),
                    _ => Some(0),
                };
            }
        }
        out
    }

    #[test]
    fn small_sequential_writes_leave_as_whole_records() {
        let mut file = DirtyFile::default();
        let mut full = Vec::new();
        for i in 0..64u64 {
            file.write(i * 4, &[i as u8; 4], RECORD, |start| full.push(start));
        }
        assert_eq!(full, vec![0, 64, 128, 192]);
        assert_eq!(file.runs().count(), 4);
        assert_eq!(file.bytes(), 256);
    }

    #[test]
    fn random_writes_and_holes_equal_a_plain_array() {
        let mut state = 88172645463325252u64;
        let mut next = |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % n
        };
        for _ in 0..200 {
            let mut file = DirtyFile::default();
            let mut model = vec![None; 400];
            for step in 1..40u8 {
                let start = next(300);
                let len = next(100) + 1;
                if next(4) == 0 {
                    file.punch(start..start + len, true);
                    model[start as usize..(start + len) as usize].fill(Some(0));
                } else {
                    file.write(start, &vec![step; len as usize], RECORD, |_| {});
                    model[start as usize..(start + len) as usize].fill(Some(step));
                }
                assert_eq!(read(&file, 400), model);
                let held: u64 = file.runs().map(|(_, r)| r.memory()).sum();
                assert_eq!(held, file.bytes());
                assert!(
                    file.runs()
                        .all(|(s, r)| matches!(r, Run::Hole(_)) || s / RECORD == (s + r.len() - 1) / RECORD)
                );
            }
        }
    }

    #[test]
    fn a_rewritten_run_is_not_replaced_by_its_old_seal() {
        let mut file = DirtyFile::default();
        file.write(0, &[1; 64], RECORD, |_| {});
        let Some(Run::Data(old)) = file.run_at(0).cloned() else { panic!() };
        file.write(3, &[2], RECORD, |_| {});
        let ptr = FramePtr { seq: crate::types::Seq(1), offset: 0, len: 88 };
        assert!(!file.sealed(0, &old, ptr));
        assert_eq!(read(&file, 4)[3], Some(2));
    }
}
