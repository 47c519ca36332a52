//! The log of a volume: segments, the spool they grow in, the chain that binds them, reading them back, recovery.
//! Invariant: what is recovered is a prefix of what was appended; a frame opens only at the place and as the kind
//! it was sealed for. The bytes are described in `docs/format.md` and nowhere else.

mod ahead;
pub mod audit;
mod blocks;
pub mod chain;
pub mod claim;
mod closing;
pub mod follow;
mod frame;
mod gather;
mod in_flight;
mod index;
pub mod listing;
mod parts;
pub mod reader;
pub mod recovery;
pub mod segment;
pub mod statedir;
mod steps;
#[cfg(test)]
mod testing;
mod torn;
pub mod volume;
pub mod writer;

pub use blocks::BLOCK_LEN;
pub use steps::LAID_OUT;

use crate::store::StoreError;
use crate::types::{CommitNo, FrameKind, FramePtr, Head, Seq, Timestamp};
use bytes::Bytes;
use std::ops::Range;

/// What can go wrong in the log and in everything that stands on it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// These frames are not on this host; fetch them from the store and try again. Never shown to a user.
    #[error("{} frame(s) must be fetched from the store first", .0.len())]
    Missing(Vec<FramePtr>),
    /// An object is damaged, foreign, or from a newer version. `object` names the object or file, `detail` what is
    /// wrong with it and the way out.
    #[error("{object}: {detail}")]
    Corrupt {
        /// Object or file name.
        object: String,
        /// What is wrong.
        detail: String,
    },
    /// The local disk failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done to which file.
        what: String,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
    /// There is no volume where one was looked for.
    #[error("{store} holds no volume: there is no volume.json")]
    NoVolume {
        /// The store that was asked.
        store: String,
    },
    /// Another writer owns the chain from here; this one must not write any more.
    #[error("fenced: {detail}")]
    Fenced {
        /// Who or what was found.
        detail: String,
    },
    /// The writer has failed before and is latched; nothing more is written in this process.
    #[error("the log stopped after an earlier failure: {0}")]
    Latched(String),
    /// The request cannot be met: not in the history, wrong role, wrong volume.
    #[error("{0}")]
    Refused(String),
}

impl From<StoreError> for Error {
    /// What has an object's name and is none is damage: passed over, found and told of like any other.
    fn from(error: StoreError) -> Error {
        match error {
            StoreError::NotAnObject { name, detail } => Error::Corrupt { object: name, detail },
            error => Error::Store(error),
        }
    }
}

/// Result of the log and of everything that stands on it.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Corrupt`] about `object`.
    pub fn corrupt(object: impl ToString, detail: impl ToString) -> Error {
        Error::Corrupt { object: object.to_string(), detail: detail.to_string() }
    }

    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl ToString) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { what: what.to_string(), source }
    }

    /// True when the local disk has no room.
    pub fn is_no_space(&self) -> bool {
        let full = [Some(libc::ENOSPC), Some(libc::EDQUOT)];
        matches!(self, Error::Io { source, .. } if full.contains(&source.raw_os_error()))
    }
}

/// A fuzz target: a segment's file that a crash left, with anything in it.
#[cfg(feature = "fuzzing")]
pub fn fuzz_torn(ctx: &segment::VolumeContext, seq: Seq, bytes: &[u8]) {
    if let Ok(torn) = torn::scan(ctx, seq, bytes, std::path::Path::new("log/1")) {
        torn.fuzz_check(bytes);
    }
    if let Some((trailer, _)) = chain::trailer_of(ctx, seq, bytes) {
        let range = trailer.index_offset as usize..trailer.body_len() as usize;
        let sealed = bytes.get(range).unwrap_or_default().to_vec();
        let _ = (torn::body_holds(&trailer, bytes), chain::open_index(ctx, &trailer, sealed));
    }
}

/// A fuzz target: the name of an object that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz_name(name: &str) {
    if let Some(seq) = segment::seq_of_name(name) {
        assert!(segment::segment_name(seq).ends_with(name.rsplit('/').next().unwrap_or_default()));
    }
}

/// Reads opened frames. It never waits for the network: what is only in the store is [`Error::Missing`], and the
/// caller has it fetched and tries again.
pub trait Frames: Send + Sync {
    /// The plain bytes of the frame at `ptr`, which must be of `kind`.
    fn get(&self, ptr: FramePtr, kind: FrameKind) -> Result<Bytes>;

    /// Appends the first of `parts` to `out`, as many as cost less together than one by one, and less than all of their
    /// frames; says how many.
    fn run_onto(&self, _parts: &[Part], _out: &mut Vec<u8>) -> usize {
        0
    }

    /// Appends parts of data frames to `out`, one after the other. On an error `out` has some of them. When frames are
    /// [`Error::Missing`], all of them are named.
    fn parts_onto(&self, mut parts: &[Part], out: &mut Vec<u8>) -> Result<()> {
        let mut missing = Vec::new();
        while let Some((part, rest)) = parts.split_first() {
            let read = self.run_onto(parts, out);
            if read > 0 {
                parts = parts.get(read..).unwrap_or_default();
                continue;
            }
            match self.get(part.ptr, FrameKind::Data) {
                Ok(plain) => out.extend_from_slice(part.of(&plain)?),
                Err(Error::Missing(ptrs)) => missing.extend(ptrs),
                Err(e) => return Err(e),
            }
            parts = rest;
        }
        if missing.is_empty() { Ok(()) } else { Err(Error::Missing(missing)) }
    }
}

/// The part of a data frame that an extent refers to: `len` plain bytes from `from` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The frame.
    pub ptr: FramePtr,
    /// The first byte.
    pub from: u32,
    /// Bytes.
    pub len: u64,
}

impl Part {
    fn range(&self) -> Range<usize> {
        self.from as usize..(self.from as usize).saturating_add(self.len as usize)
    }

    /// Cuts it out of the opened frame; the lengths come from the tree and are checked here.
    fn of<'a>(&self, plain: &'a Bytes) -> Result<&'a [u8]> {
        let (Part { ptr, from, len }, all) = (self, plain.len());
        plain.get(self.range()).ok_or_else(|| {
            let detail = format!("an extent refers to {len} bytes at {from} of a frame of {all} bytes");
            Error::corrupt(format!("frame {ptr:?}"), detail)
        })
    }
}

/// Appends frames to the open segment.
pub trait Append {
    /// Seals `plain` as a frame of `kind` behind what was appended before, and says where it lies. The frame can be
    /// read through [`Frames`] at once; it is durable after the next sync.
    fn append(&mut self, kind: FrameKind, plain: &[u8]) -> Result<FramePtr>;
}

/// Where one commit lies in the log and when it was made; the index of a segment lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitInfo {
    /// Number of the commit.
    pub no: CommitNo,
    /// When it was made (home's clock).
    pub time: Timestamp,
    /// Segment that holds it.
    pub seq: Seq,
    /// That segment's number and hash.
    pub head: Head,
}

/// A segment that is complete, signed and durable on the local disk, ready to be uploaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedSegment {
    /// Its file in the spool.
    pub file: crate::disk::FileRef,
    /// Its size in bytes.
    pub len: u64,
    /// Its number and the hash of its trailer.
    pub head: crate::types::Head,
    /// The newest commit in it, or before it when it holds none.
    pub last_commit: CommitNo,
    /// What its trailer says the store was known to hold when it was closed; 0 when nothing was known.
    pub stored: Seq,
    /// When this process closed it (monotonic); `None`: it was found on the disk.
    pub closed_at: Option<std::time::Duration>,
}
