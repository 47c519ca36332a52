//! The segment that a crash left without a trailer that holds: how much of it is whole, and closing it there.
//! Invariant: kept is a prefix of the frames that ends with a complete commit (or a root, which a checkpoint may
//! stand on); bytes that were known durable are never cut off as a torn tail: if they do not open, that is damage.

use super::chain::{Commit, trailer_of};
use super::closing::Ending;
use super::frame::{DeltaHeader, FRAME_OVERHEAD, PREFIX_LEN, Prefix};
use super::recovery::settle;
use super::segment::{
    HEADER_LEN, Header, Index, IndexedCommit, Kind, SegmentCipher, TRAILER_LEN, Trailer, UncheckedHeader,
    VolumeContext,
};
use super::statedir::StateDir;
use super::writer::written_len;
use super::{ClosedSegment, Error, Result};
use crate::clock::Env;
use crate::crypto::{Hasher, hash};
use crate::disk::Mode;
use crate::types::{CommitNo, Epoch, FrameKind, FramePtr, Head, Seq};
use bytes::Bytes;
use std::path::Path;

/// So many zero bytes in a row do not occur in sealed frames; where they do, the disk never got the bytes.
const HOLE_LEN: usize = 16;
/// What a disk writes whole: where only the end of a sector is missing, the hole can be shorter, but ends with it.
const SECTOR: usize = 512;
const SECTOR_HOLE_LEN: usize = 4;

/// What is whole of a segment that was not closed.
pub(super) struct Torn {
    header: Option<Header>,
    index: Index,
    end: usize,
    pub commits: Vec<Commit>,
}

impl Torn {
    fn nothing() -> Torn {
        Torn { header: None, index: Index::default(), end: 0, commits: Vec::new() }
    }

    /// What is kept lies within the bytes and ends where its frames end.
    #[cfg(feature = "fuzzing")]
    pub fn fuzz_check(&self, bytes: &[u8]) {
        let end = self.index.frames.last().map_or(0, |(_, offset, len)| (offset + len) as usize);
        assert!(end == self.end && end <= bytes.len());
        assert_eq!(self.index.commits.len(), self.commits.len());
    }

    /// Epoch of the segment, if anything of it is kept.
    pub fn epoch(&self) -> Option<Epoch> {
        self.header.map(|header| header.epoch)
    }

    /// Cuts the segment `seq`, whose file holds `bytes`, off behind what is whole and closes it, durably; removes
    /// it if nothing is.
    #[allow(clippy::too_many_arguments)] // all different things, and one caller
    pub fn close(
        self,
        ctx: &VolumeContext,
        dir: &StateDir,
        env: &Env,
        seq: Seq,
        bytes: Vec<u8>,
        prev: Option<Head>,
        last_commit: CommitNo,
    ) -> Result<Option<ClosedSegment>> {
        let path = dir.log_path(seq);
        let shown = path.display().to_string();
        let wrap = |e| Error::io(format!("close {shown}"))(e);
        let Some(header) = self.header else {
            // Moved aside first: a half removed file must not be taken for a segment.
            let aside = path.with_extension("void");
            let disk = dir.disk();
            disk.rename(&path, &aside).and_then(|()| disk.remove(&aside)).map_err(wrap)?;
            dir.sync_dir("log")?;
            return Ok(None);
        };
        let written = written_len(&bytes);
        ::log::info!("{}: closed after a crash, {} of {written} bytes kept", path.display(), self.end);
        let mut hasher = Hasher::default();
        hasher.update(bytes.get(..self.end).unwrap_or_default());
        let end = self.end as u64;
        let ending = Ending { ctx, kind: Kind::Ordinary, prev, last_commit, stored: Seq(0) };
        let closing = ending.bytes(header, &self.index, hasher, end, 0, env.random_bytes())?;
        let mut whole = bytes;
        whole.truncate(self.end);
        whole.extend_from_slice(&closing.bytes);
        // What lies behind the end goes first, and for good: it must not be taken for more of the segment, nor come back
        // in the block that the end lies in, below a new trailer that reached the disk before the rest.
        let cut =
            dir.disk().open(&path, Mode::Write).and_then(|file| file.set_len(end).and_then(|()| file.sync()));
        cut.map_err(wrap)?;
        let file = dir.file(path);
        settle(dir, &file, &whole)?;
        let len = whole.len() as u64;
        Ok(Some(ClosedSegment {
            file,
            len,
            head: closing.head,
            last_commit,
            stored: Seq(0),
            closed_at: None,
        }))
    }
}

/// True when the body is what the trailer says.
pub(super) fn body_holds(trailer: &Trailer, bytes: &[u8]) -> bool {
    bytes.len().checked_sub(TRAILER_LEN).and_then(|len| bytes.get(..len)).map(hash) == Some(trailer.body_hash)
}

/// Finds what is whole of the segment in `bytes`, the contents of `path`.
pub(super) fn scan(ctx: &VolumeContext, seq: Seq, bytes: &[u8], path: &Path) -> Result<Torn> {
    let object = path.display().to_string();
    let head = bytes.get(..bytes.len().min(HEADER_LEN + HOLE_LEN)).unwrap_or_default();
    let header = match UncheckedHeader::parse(head, &object) {
        Ok(header) => header.verify(ctx, seq, &object)?,
        // The first write never reached the disk, or not whole.
        Err(_) if head.len() < HEADER_LEN || has_hole(head, 0) => return Ok(Torn::nothing()),
        Err(e) => return Err(e),
    };
    let mut scan = Scan {
        cipher: SegmentCipher::new(ctx, header),
        bytes,
        torn: Torn::nothing(),
        pending: None,
        frames_kept: 0,
        object,
    };
    let stopped = scan.frames()?;
    scan.check_damage(ctx, seq, stopped)?;
    let mut torn = scan.torn;
    torn.index.frames.truncate(scan.frames_kept);
    torn.header = (scan.frames_kept > 0).then_some(header);
    Ok(torn)
}

/// Whether bytes that never reached the disk are among `bytes`, which lie at `offset` of the file.
fn has_hole(bytes: &[u8], offset: usize) -> bool {
    let zeros = |window: &[u8]| window.iter().all(|b| *b == 0);
    let first = SECTOR - offset % SECTOR;
    let sector_ends = (first..=bytes.len()).step_by(SECTOR).filter_map(|end| bytes.get(..end));
    bytes.windows(HOLE_LEN).any(zeros)
        || sector_ends.filter_map(|head| head.last_chunk::<SECTOR_HOLE_LEN>()).any(|end| zeros(end))
}

struct Scan<'a> {
    cipher: SegmentCipher,
    bytes: &'a [u8],
    torn: Torn,
    /// The parts so far of a commit whose last part has not come yet, and the first one's place in the index.
    pending: Option<(usize, DeltaHeader, Vec<Bytes>)>,
    frames_kept: usize,
    object: String,
}

impl Scan<'_> {
    /// Takes frames as long as they open; returns the offset of the first that does not.
    fn frames(&mut self) -> Result<usize> {
        let mut offset = HEADER_LEN;
        while let Some((ptr, kind, plain)) = self.frame_at(offset) {
            self.torn.index.frames.push((kind, ptr.offset, ptr.len));
            offset += ptr.len as usize;
            let complete = match kind {
                FrameKind::Delta => self.delta(&plain)?,
                FrameKind::Root | FrameKind::Mark => true,
                FrameKind::Data | FrameKind::Page | FrameKind::Index => false,
            };
            if complete {
                self.frames_kept = self.torn.index.frames.len();
                self.torn.end = offset;
            }
        }
        Ok(offset)
    }

    fn frame_at(&self, offset: usize) -> Option<(FramePtr, FrameKind, Bytes)> {
        let rest = self.bytes.get(offset..)?;
        let prefix = Prefix::parse(rest).filter(|prefix| prefix.kind != FrameKind::Index)?;
        let sealed = rest.get(..prefix.len as usize)?.to_vec();
        let seq = self.cipher.header().seq;
        let ptr = FramePtr { seq, offset: u32::try_from(offset).ok()?, len: prefix.len };
        let plain = self.cipher.open(ptr, prefix.kind, sealed).ok()?;
        Some((ptr, prefix.kind, plain))
    }

    /// Takes a part of a commit; true when the commit is complete with it.
    fn delta(&mut self, plain: &Bytes) -> Result<bool> {
        let place = self.torn.index.frames.len() - 1;
        let strange = || Error::corrupt(&self.object, "a delta this build cannot make sense of");
        let (header, body) = DeltaHeader::split(plain).ok_or_else(strange)?;
        let (first, begun, mut bodies) = match self.pending.take() {
            Some(pending) => pending,
            None => (place, header, Vec::new()),
        };
        let contiguous = first + bodies.len() == place && header.part as usize == bodies.len();
        if !contiguous || (header.no, header.time) != (begun.no, begun.time) {
            return Err(strange());
        }
        bodies.push(body);
        if !header.last {
            self.pending = Some((first, begun, bodies));
            return Ok(false);
        }
        let (no, time) = (header.no, header.time);
        self.torn.index.commits.push(IndexedCommit { no, time, deltas: first..place + 1 });
        self.torn.commits.push(Commit { no, time, bodies });
        Ok(true)
    }

    /// Tells a torn tail from damage: nothing at or behind `stopped` may be known to have been durable.
    fn check_damage(&self, ctx: &VolumeContext, seq: Seq, stopped: usize) -> Result<()> {
        let damage = |detail: &str| {
            Err(Error::corrupt(
                &self.object,
                format!("damaged at byte {stopped}: {detail}; restore the file, or take over from the store"),
            ))
        };
        if let Some((trailer, _)) = trailer_of(ctx, seq, self.bytes) {
            let body = self.bytes.get(stopped..trailer.body_len() as usize).unwrap_or_default();
            // Writes end where frames do, or, when the disk is full, where sectors do: the sector that one ended in can be as
            // it left it, however little is missing.
            let edge = self.bytes.get(stopped..(stopped / SECTOR + 1) * SECTOR).unwrap_or_default();
            let old_edge = !edge.is_empty() && edge.iter().all(|b| *b == 0);
            if trailer.synced as usize > stopped || !(has_hole(body, stopped) || old_edge) {
                return damage("the segment was closed, and its bytes have changed since");
            }
        }
        // Only a delta tells how much was durable; its prefix gives it away.
        let last = self.bytes.len().saturating_sub(FRAME_OVERHEAD + DeltaHeader::LEN);
        for offset in stopped + 1..=last {
            let prefix = self.bytes.get(offset..).and_then(|rest| rest.get(..PREFIX_LEN));
            if prefix.and_then(Prefix::parse).is_none_or(|prefix| prefix.kind != FrameKind::Delta) {
                continue;
            }
            let delta = self.frame_at(offset).and_then(|(_, _, plain)| DeltaHeader::split(&plain));
            if delta.is_some_and(|(header, _)| header.synced as usize > stopped) {
                return damage("a later commit says that these bytes had reached the disk");
            }
        }
        Ok(())
    }
}
