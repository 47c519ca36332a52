//! Small steps: how the end of an open segment gets to the disk when there is a sync after every few bytes. Zeros are laid
//! out ahead, so that a sync writes the data and not the file's new size and blocks as well; and what comes into them goes
//! to the disk as whole blocks past the kernel's cache, whose handling of a page takes longer than the copy.
//! Invariant: what is written past the cache lies within what was laid out, repeats what the file holds of its first block,
//! and ends in zeros: the file is the same as if only the new bytes had been written.

use crate::disk::{ALIGN, DiskFile, aligned, is_refused};
use std::io::{self, ErrorKind};
use std::sync::Arc;

/// So many zeros are laid out at once.
pub const LAID_OUT: usize = 256 << 10;
/// Steps of more bytes than this are not small: laying out would write them twice and save next to nothing.
const SMALL: u64 = 64 << 10;
/// Errors that say nothing of the disk.
const PASSING: [ErrorKind; 4] =
    [ErrorKind::Interrupted, ErrorKind::WouldBlock, ErrorKind::OutOfMemory, ErrorKind::ResourceBusy];
const ZEROS: [u8; ALIGN] = [0; ALIGN];

/// The end of one segment's file.
#[derive(Default)]
pub(super) struct Steps {
    /// The file is at least so long; behind what is written it holds zeros.
    laid_out: u64,
    /// The same file, past the cache; none where that is not possible.
    direct: Option<Arc<dyn DiskFile>>,
    /// Whether it was asked for.
    asked: bool,
    /// What is written of the block in which the segment goes on.
    last: Vec<u8>,
    /// Where blocks are put together.
    blocks: Vec<u8>,
}

impl Steps {
    /// Behind this there is nothing in the file.
    pub fn laid_out(&self) -> u64 {
        self.laid_out
    }

    /// The file was cut off at `end`.
    pub fn cut(&mut self, end: u64) {
        self.laid_out = end;
    }

    /// Takes note of `bytes`, which were written up to `end`.
    pub fn wrote(&mut self, bytes: &[u8], end: u64) {
        let len = (end % ALIGN as u64) as usize;
        match bytes.len().checked_sub(len) {
            Some(before) => {
                self.last.clear();
                self.last.extend_from_slice(&bytes[before..]);
            }
            None => self.last.extend_from_slice(bytes),
        }
    }

    /// Lays out zeros behind `written` if what was written since `synced` was a small step. `open` opens the file past the
    /// cache. That the disk has no room for them is not yet an error.
    pub fn lay_out(
        &mut self,
        file: &dyn DiskFile,
        (synced, written): (u64, u64),
        open: impl FnOnce() -> io::Result<Arc<dyn DiskFile>>,
    ) {
        let step = written - synced;
        if synced == 0 || written <= self.laid_out || step == 0 || step > SMALL {
            return;
        }
        if !std::mem::replace(&mut self.asked, true) {
            self.direct = open().ok();
        }
        // Page by page: what is written at once may become one folio of the kernel's, which is then accounted for, and
        // handled, as a whole for each small step within it.
        let mut end = written;
        let to = (end + LAID_OUT as u64) / ALIGN as u64 * ALIGN as u64;
        while end < to {
            let piece = ALIGN - (end % ALIGN as u64) as usize;
            match file.write_all_at(&ZEROS[..piece], end) {
                Ok(()) => end += piece as u64,
                Err((done, _)) => {
                    end += done as u64;
                    break;
                }
            }
        }
        self.laid_out = end;
    }

    /// Writes `bytes` at `written`, where the file goes on, past the cache. False when they are to be written as usual.
    pub fn write(&mut self, bytes: &[u8], (synced, written): (u64, u64)) -> io::Result<bool> {
        let (begin, end) = (written - self.last.len() as u64, written + bytes.len() as u64);
        let whole = end.next_multiple_of(ALIGN as u64);
        let Some(direct) = &self.direct else { return Ok(false) };
        if bytes.is_empty() || end - synced > SMALL || whole > self.laid_out {
            return Ok(false);
        }
        let len = (whole - begin) as usize;
        let (_, blocks) = aligned(&mut self.blocks, len);
        let (old, rest) = blocks.split_at_mut(self.last.len());
        let (new, zeros) = rest.split_at_mut(bytes.len());
        old.copy_from_slice(&self.last);
        new.copy_from_slice(bytes);
        zeros.fill(0);
        match direct.write_at(blocks, begin) {
            Ok(n) => Ok(n == len), // what is missing is written again, and the usual way tells why
            // A disk with longer sectors, or a file system that minds only now.
            Err(e) if is_refused(&e) => {
                self.direct = None;
                Ok(false)
            }
            // What the usual way may not need: it tells.
            Err(e) if PASSING.contains(&e.kind()) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{SmallDisk, noise};
    use super::*;
    use crate::disk::{Disk, Mode, SystemDisk};
    use parking_lot::Mutex;
    use std::cell::Cell;

    #[test]
    fn small_steps_past_the_cache_leave_the_file_that_one_write_would() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("file");
        let file = SystemDisk.open(&path, Mode::CreateNew).unwrap();
        // Where the test's disk has no way past its cache, blocks are written all the same.
        let direct = || SystemDisk.open(&path, Mode::Direct).or_else(|_| SystemDisk.open(&path, Mode::Write));
        let (mut steps, mut wanted, mut past) = (Steps::default(), Vec::new(), 0);
        let lens = [40, 4_000, 5, 20_000, 8_192, 70_000, 1, 300_000, 7, 4_096];
        for (i, len) in lens.into_iter().cycle().take(300).enumerate() {
            let (bytes, written) = (noise(i as u64, len), wanted.len() as u64);
            if steps.write(&bytes, (written, written)).unwrap() {
                past += 1;
            } else {
                file.write_all_at(&bytes, written).unwrap();
            }
            wanted.extend_from_slice(&bytes);
            let end = wanted.len() as u64;
            steps.wrote(&bytes, end);
            steps.lay_out(&*file, (written, end), direct);
            let found = std::fs::read(&path).unwrap();
            assert!(found[..wanted.len()] == wanted, "step {i} of {len} bytes");
            assert!(found[wanted.len()..].iter().all(|byte| *byte == 0), "step {i} of {len} bytes");
        }
        // Of ten lengths two are too long, and what follows the longest finds nothing laid out.
        assert_eq!(past, 300 / 10 * 7 - 2);
    }

    #[test]
    fn what_only_the_way_past_the_cache_minds_is_written_as_usual() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("file");
        let file = SystemDisk.open(&path, Mode::CreateNew).unwrap();
        let (room, refused) = (Arc::new(Mutex::new(u64::MAX)), Arc::new(Mutex::new(None)));
        let direct = SmallDisk {
            file: SystemDisk.open(&path, Mode::Write).unwrap(),
            room: room.clone(),
            broken: Arc::default(),
            refused: refused.clone(),
        };
        let (mut steps, written, mut direct) = (Steps::default(), Cell::new(0), Some(Arc::new(direct)));
        let mut step = |errno| {
            *refused.lock() = errno;
            let (bytes, before) = (noise(written.get(), 700), written.get());
            let way = steps.write(&bytes, (before, before)).map_err(|e| e.raw_os_error());
            if way != Ok(true) {
                file.write_all_at(&bytes, before).unwrap();
            }
            let end = before + 700;
            written.set(end);
            steps.wrote(&bytes, end);
            steps.lay_out(&*file, (before, end), || Ok(direct.take().unwrap()));
            let found = std::fs::read(&path).unwrap();
            assert!(found[before as usize..][..700] == bytes);
            way
        };
        step(None).unwrap();
        assert_eq!((step(None), step(None)), (Ok(false), Ok(true)), "before there are zeros, and after");
        for errno in [libc::EINTR, libc::EAGAIN, libc::ENOMEM, libc::EBUSY] {
            assert_eq!((step(Some(errno)), step(None)), (Ok(false), Ok(true)), "{errno}");
        }
        for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
            assert_eq!(step(Some(errno)), Err(Some(errno)));
        }
        *room.lock() = written.get() / ALIGN as u64 * ALIGN as u64 + 512;
        assert_eq!(step(None), Ok(false), "a piece of it was written");
        *room.lock() = u64::MAX;
        assert_eq!((step(None), step(Some(libc::EINVAL)), step(None)), (Ok(true), Ok(false), Ok(false)));
    }
}
