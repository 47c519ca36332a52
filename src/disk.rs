//! The local disk: the only door of the log to files of the state directory.
//! Invariant: a call does one thing to one file or directory, and nothing is durable before it was synced, so that a
//! simulation can lose, tear and reorder what a crash would.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Writes of at least this many bytes are on their way to the disk before anybody waits for them.
const WRITEBACK_MIN: usize = 512 << 10;

/// Past the kernel's cache a file is written in blocks of this length, at multiples of it, from memory at a multiple of it,
/// and read likewise: as much as any disk's sector.
pub const ALIGN: usize = 4096;

/// `len` bytes of `memory`, which grows if need be, from a multiple of [`ALIGN`] on, and where in it they begin.
pub fn aligned(memory: &mut Vec<u8>, len: usize) -> (usize, &mut [u8]) {
    memory.resize(memory.len().max(len + ALIGN), 0);
    let skip = memory.as_ptr().align_offset(ALIGN);
    (skip, &mut memory[skip..skip + len])
}

/// True for the error of a file system or a disk that has no way past the cache, or not for this piece.
pub fn is_refused(error: &io::Error) -> bool {
    error.kind() == ErrorKind::InvalidInput || error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// The number of cachestat(2), one of those that all of Linux's architectures but Alpha and MIPS share.
const CACHESTAT: libc::c_long = 451;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To be read; it is there.
    Read,
    /// To be changed; it is there.
    Write,
    /// To be changed; made if it is not there.
    WriteOrCreate,
    /// To be written from the beginning; made, or emptied.
    Replace,
    /// Made; an error if it is there.
    CreateNew,
    /// To be changed, past the kernel's cache, in whole blocks (see [`ALIGN`]); it is there.
    Direct,
    /// To be read, past the kernel's cache; sectors may do instead of blocks. It is there.
    ReadDirect,
}

/// Files and directories by their path.
pub trait Disk: Debug + Send + Sync {
    /// Opens a file.
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory and those above it; no error if it is there.
    fn create_dirs(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name, in one step, over a file that has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Takes a file's name away.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Names in a directory, those that are UTF-8, in no order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// A file's size in bytes.
    fn size(&self, path: &Path) -> io::Result<u64>;
    /// Makes creations, renames and removals in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Bytes that may still be written where the directory lies.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;
    /// The device (`st_dev`) on which the path lies, if it is known.
    fn device(&self, _path: &Path) -> Option<u64> {
        None
    }
    /// Locks the file, making it if need be, until the lock is dropped. `Err` names the holder, if it said who it is.
    fn lock(&self, path: &Path) -> io::Result<Result<Box<dyn Lock>, String>>;
    /// True for the machine's own disk: a call may take long, so that it must not be made where many wait, and others
    /// than this find the same files under its paths.
    fn is_real(&self) -> bool;
}

/// A lock that is held until it is dropped.
pub trait Lock: Debug + Send + Sync {}

/// An open file.
pub trait DiskFile: Send + Sync {
    /// Writes some of `bytes`; returns how many.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Makes what was written durable, and the size.
    fn sync(&self) -> io::Result<()>;
    /// Cuts off, or adds zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Reads some bytes; returns how many, 0 at the end.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Gives the blocks of `range` back to the disk; what is read there afterwards is zeros.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;
    /// The stretches that are not holes.
    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>>;
    /// False when the kernel's cache is known to hold less than half of `range`.
    fn is_cached(&self, _range: &Range<u64>) -> bool {
        true
    }
}

impl dyn DiskFile + '_ {
    /// Writes all of `bytes` at `offset`, or says how many were written before the error.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match self.write_at(rest, offset + done as u64) {
                Ok(0) => return Err((done, io::Error::from_raw_os_error(libc::ENOSPC))),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err((done, e)),
            }
        }
        Ok(())
    }

    /// Fills `into` from `offset` on; `UnexpectedEof` if the file ends before.
    pub fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// A file by its path, for those who read it later.
#[derive(Clone, Debug)]
pub struct FileRef {
    /// Where it lies.
    pub disk: Arc<dyn Disk>,
    /// Its path.
    pub path: PathBuf,
}

/// The path tells: a process works on one disk.
impl PartialEq for FileRef {
    fn eq(&self, other: &FileRef) -> bool {
        self.path == other.path
    }
}

impl Eq for FileRef {}

impl FileRef {
    /// A file of the machine's own disk.
    pub fn system(path: &Path) -> FileRef {
        FileRef { disk: Arc::new(SystemDisk), path: path.to_owned() }
    }

    /// The file's last `len` bytes, all of it when it is shorter, and its size.
    pub fn suffix(&self, len: u64) -> io::Result<(Vec<u8>, u64)> {
        let file = self.disk.open(&self.path, Mode::Read)?;
        let size = file.size()?;
        let len = len.min(size);
        let mut tail = vec![0; len as usize];
        file.read_exact_at(&mut tail, size - len)?;
        Ok((tail, size))
    }

    /// Bytes `range` of the file.
    pub fn range(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.disk.open(&self.path, Mode::Read)?.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// All of the file.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.suffix(u64::MAX)?.0)
    }
}

/// The machine's own disk.
#[derive(Debug)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        match mode {
            Mode::Read => options.read(true),
            Mode::Write => options.write(true),
            Mode::Direct => options.write(true).custom_flags(libc::O_DIRECT),
            Mode::ReadDirect => options.read(true).custom_flags(libc::O_DIRECT),
            Mode::WriteOrCreate => options.write(true).create(true).truncate(false),
            Mode::Replace => options.write(true).create(true).truncate(true),
            Mode::CreateNew => options.read(true).write(true).create_new(true),
        };
        Ok(Arc::new(options.open(path)?))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            found.extend(entry?.file_name().into_string());
        }
        Ok(found)
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(std::fs::metadata(path)?.len())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let dir = File::open(dir)?;
        // SAFETY: `statvfs` is plain data for which all zeros is a value, and `fstatvfs` only writes to it.
        let (result, stat) = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            (libc::fstatvfs(dir.as_raw_fd(), &raw mut stat), stat)
        };
        check(result)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn device(&self, path: &Path) -> Option<u64> {
        std::fs::metadata(path).map(|meta| meta.dev()).ok()
    }

    fn lock(&self, path: &Path) -> io::Result<Result<Box<dyn Lock>, String>> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        // SAFETY: a system call on a descriptor that `file` keeps open; no memory is passed.
        match check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let mut holder = String::new();
                // Only for the message: a holder that cannot be read is still a holder.
                let _ = (&mut file).take(20).read_to_string(&mut holder);
                return Ok(Err(holder.trim().to_owned()));
            }
            Err(e) => return Err(e),
        }
        file.set_len(0)?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes())?;
        Ok(Ok(Box::new(file)))
    }

    fn is_real(&self) -> bool {
        true
    }
}

impl Lock for File {}

impl DiskFile for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let written = FileExt::write_at(self, bytes, offset)?;
        if written >= WRITEBACK_MIN {
            // The disk begins at once instead of at the sync, which then waits for the last piece only.
            let (start, len) = (offset.cast_signed(), written as i64);
            // SAFETY: the descriptor is open, and no pointers are passed. Failure costs nothing but time.
            unsafe { libc::sync_file_range(self.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
        }
        Ok(written)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let (offset, len) = (range.start.cast_signed(), (range.end - range.start).cast_signed());
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a system call on a descriptor that `self` keeps open; no memory is passed.
        check(unsafe { libc::fallocate(self.as_raw_fd(), mode, offset, len) })
    }

    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        let len = DiskFile::size(self)?;
        let mut ranges = Vec::new();
        let mut at = 0;
        while let Some(start) = seek(self, at, libc::SEEK_DATA)?
            && start < len
        {
            let end = seek(self, start, libc::SEEK_HOLE)?.unwrap_or(len);
            ranges.push(start..end);
            at = end;
        }
        Ok(ranges)
    }

    /// cachestat(2), Linux 6.5.
    fn is_cached(&self, range: &Range<u64>) -> bool {
        let (asked, mut found) = ([range.start, range.end - range.start], [0u64; 5]);
        // SAFETY: the descriptor is open, and both arrays are laid out as, and as long as, the structures of the call.
        let result = unsafe {
            libc::syscall(CACHESTAT, self.as_raw_fd(), asked.as_ptr(), found.as_mut_ptr(), 0 as libc::c_uint)
        };
        // SAFETY: no pointers are passed.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.cast_unsigned();
        result != 0 || found[0].saturating_mul(2 * page) >= range.end - range.start
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// lseek(2) for data or a hole; `None` past the last one.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: lseek takes no pointers, and the descriptor is open for as long as `file` is borrowed.
    match unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } {
        found @ 0.. => Ok(Some(found.cast_unsigned())),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}
