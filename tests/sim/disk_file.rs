//! An open file of the simulated disk.
//! Invariant: what goes past the cache is of whole blocks or sectors, in aligned memory, as a real disk demands.

use super::{Change, SECTOR, SimDisk, State, apply, in_log, missing};
use embassyfs::disk::{ALIGN, DiskFile, Mode};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::PathBuf;

pub(super) struct SimFile {
    pub disk: SimDisk,
    pub node: u64,
    pub path: PathBuf,
    pub mode: Mode,
}

/// What may go wrong with a write past the cache and says nothing of the disk.
const PASSING: [i32; 6] =
    [libc::EINTR, libc::EAGAIN, libc::EBUSY, libc::ENOMEM, libc::EINVAL, libc::EOPNOTSUPP];

/// Whether a piece of memory, for this place of a file, is one that goes past the cache in such units.
fn is_whole(unit: usize, memory: &[u8], offset: u64) -> bool {
    let at = [offset, memory.len() as u64, memory.as_ptr().addr() as u64];
    at.iter().all(|n| n.checked_rem(unit as u64) == Some(0))
}

impl SimFile {
    /// What the file reads past the cache at once: files differ, and there are some that refuse it.
    fn unit(&self) -> usize {
        [SECTOR as usize, ALIGN, 0][(self.node % 3) as usize]
    }

    fn change(&self, state: &mut State, change: Change) -> io::Result<()> {
        let node = state.nodes.get_mut(&self.node).ok_or_else(missing)?;
        apply(&mut node.seen, &change);
        node.pending.push(change);
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let direct = self.mode == Mode::Direct;
        // An error would only be taken for that of a disk which has no such way.
        assert!(!direct || is_whole(ALIGN, bytes, offset), "a piece past the cache at {offset}");
        let refused = direct && self.disk.chance.one_in(8);
        let mut state = self.disk.call("write", &self.path, bytes)?;
        let mut taken = bytes;
        if self.disk.full(&state) {
            self.disk.chance.fault("no room for a write");
            let most = self.disk.chance.below(bytes.len() as u64 + 1).min(bytes.len() as u64 / 2);
            // Room is given by the block: what there is none for begins where a sector does.
            let end = (offset + most) / SECTOR * SECTOR;
            taken = &bytes[..end.saturating_sub(offset) as usize];
            if taken.is_empty() {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        if refused {
            self.disk.chance.fault("refused write past the cache");
            let most = self.disk.chance.below(1 + taken.len() as u64);
            taken = &taken[..(most / SECTOR * SECTOR) as usize];
        }
        if in_log(&self.path) {
            self.disk.nonces.written(self.node, &state.nodes[&self.node].seen, offset, taken);
        }
        self.change(&mut state, Change::Write(offset, taken.to_vec()))?;
        if refused {
            let which = self.disk.chance.below(PASSING.len() as u64);
            return Err(io::Error::from_raw_os_error(PASSING[which as usize]));
        }
        Ok(taken.len())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.call("sync", &self.path, &[])?;
        let fails = std::mem::take(&mut state.sync_fails);
        let node = state.nodes.get_mut(&self.node).ok_or_else(missing)?;
        if fails {
            self.disk.chance.fault("failing sync");
            node.durable = node.torn(&self.disk.chance);
            node.pending.clear();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        for change in std::mem::take(&mut node.pending) {
            apply(&mut node.durable, &change);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.call("set the length of", &self.path, &len.to_le_bytes())?;
        self.change(&mut state, Change::Len(len))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.mode == Mode::ReadDirect {
            assert!(is_whole(SECTOR as usize, into, offset), "a piece past the cache at {offset}");
            let whole = is_whole(self.unit(), into, offset);
            self.disk.chance.fault(if whole { "read past the cache" } else { "refused read past the cache" });
            if !whole {
                return Err(ErrorKind::InvalidInput.into());
            }
        }
        let state = self.disk.look()?;
        let node = state.nodes.get(&self.node).ok_or_else(missing)?;
        let rest = node.seen.get(offset as usize..).unwrap_or_default();
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn size(&self) -> io::Result<u64> {
        let state = self.disk.look()?;
        Ok(state.nodes.get(&self.node).ok_or_else(missing)?.seen.len() as u64)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let mut state = self.disk.call("punch", &self.path, &range.start.to_le_bytes())?;
        self.change(&mut state, Change::Punch(range))
    }

    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        let state = self.disk.look()?;
        let bytes = &state.nodes.get(&self.node).ok_or_else(missing)?.seen;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (n, block) in bytes.chunks(4096).enumerate() {
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            let start = n as u64 * 4096;
            let end = start + block.len() as u64;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        Ok(ranges)
    }

    /// One half is, and not the next.
    fn is_cached(&self, range: &Range<u64>) -> bool {
        (range.start / (64 << 10) + self.node).is_multiple_of(2)
    }
}
