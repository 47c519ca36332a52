//! The index of a closed segment: which frames and commits lie where. It is sealed as the segment's last frame.
//! No I/O (`docs/format.md`, Index frame).
//! Invariant: the frames of an index that was decoded lie end to end between the header and the index, and every
//! commit's parts are delta frames among them.

use super::frame::FRAME_OVERHEAD;
use super::segment::{Fields, HEADER_LEN, put_time};
use crate::types::{CommitNo, FrameKind, FramePtr, Seq, Timestamp};
use std::ops::Range;

const VERSION: u8 = 1;

/// One complete commit of a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexedCommit {
    /// The commit.
    pub no: CommitNo,
    /// When it was made.
    pub time: Timestamp,
    /// Its delta frames: positions in [`Index::frames`].
    pub deltas: Range<usize>,
}

/// Which frames and commits a segment holds, in the order they were appended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Index {
    /// Kind, offset and length of every frame before the index.
    pub frames: Vec<(FrameKind, u32, u32)>,
    /// The complete commits.
    pub commits: Vec<IndexedCommit>,
}

impl Index {
    /// The plain bytes of the format.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(9 + 5 * self.frames.len() + 28 * self.commits.len());
        out.push(VERSION);
        out.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.commits.len() as u32).to_le_bytes());
        for (kind, _, len) in &self.frames {
            out.push(*kind as u8);
            out.extend_from_slice(&len.to_le_bytes());
        }
        for commit in &self.commits {
            out.extend_from_slice(&commit.no.0.to_le_bytes());
            put_time(&mut out, commit.time);
            out.extend_from_slice(&(commit.deltas.start as u32).to_le_bytes());
            out.extend_from_slice(&(commit.deltas.len() as u32).to_le_bytes());
        }
        out
    }

    /// The index in `plain`, if its frames fill the segment exactly up to `index_offset` and its commits are in
    /// order and made of delta frames.
    pub fn decode(plain: &[u8], index_offset: u32) -> Option<Index> {
        let mut fields = Fields(plain);
        if fields.u8()? != VERSION {
            return None;
        }
        let (frame_count, commit_count) = (fields.u32()? as usize, fields.u32()? as usize);
        // Counts come from the bytes: what they make us allocate is bounded by the bytes there are.
        let mut frames = Vec::with_capacity(frame_count.min(plain.len() / 5));
        let mut offset = HEADER_LEN as u32;
        for _ in 0..frame_count {
            let kind = FrameKind::from_u8(fields.u8()?).filter(|k| *k != FrameKind::Index)?;
            let len = fields.u32().filter(|len| *len as usize >= FRAME_OVERHEAD)?;
            frames.push((kind, offset, len));
            offset = offset.checked_add(len)?;
        }
        let mut commits: Vec<IndexedCommit> = Vec::with_capacity(commit_count.min(plain.len() / 28));
        for _ in 0..commit_count {
            let no = fields.commit()?;
            let time = fields.time()?;
            let start = fields.u32()? as usize;
            let deltas = start..start.checked_add(fields.u32()? as usize)?;
            let whole = frames.get(deltas.clone()).is_some_and(|frames| {
                !frames.is_empty() && frames.iter().all(|(kind, ..)| *kind == FrameKind::Delta)
            });
            let in_order = commits.last().is_none_or(|c| c.no < no && c.deltas.end <= start);
            if !whole || !in_order {
                return None;
            }
            commits.push(IndexedCommit { no, time, deltas });
        }
        (offset == index_offset && fields.0.is_empty()).then_some(Index { frames, commits })
    }

    /// Where frame number `i` of segment `seq` lies.
    pub fn ptr(&self, seq: Seq, i: usize) -> Option<FramePtr> {
        self.frames.get(i).map(|(_, offset, len)| FramePtr { seq, offset: *offset, len: *len })
    }
}
