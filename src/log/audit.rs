//! Looking through the log in a store for whatever is wrong with it, all of it and not only the first.
//! Invariant: what is believed is signed by the writer; memory follows the number of segments, not their size; an error
//! is returned only when the store could not be asked, damage is a finding.

use super::chain::{ChainStart, End, Place, Source, Walk, list_store, missing, select, windowed};
use super::frame::SegmentCipher;
use super::index::Index;
use super::segment::{Kind, VolumeContext, segment_name};
use super::{Error, Result};
use crate::crypto::Hasher;
use crate::store::{Store, StoreError};
use crate::types::{CommitNo, FrameKind, FramePtr, Head, Seq, Timestamp};
use futures::{FutureExt, StreamExt, TryStreamExt};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Segments whose ends are asked for before what came with them is let go.
const BATCH: usize = 256;
/// A segment is read in pieces of so many bytes, so many of them at a time.
const PIECE: u64 = 4 << 20;
const PIECES_AHEAD: usize = 4;

/// Something that is not as it must be: the object, and what it means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Finding {
    /// The object's name.
    pub object: String,
    /// What is wrong with it.
    pub detail: String,
}

impl Finding {
    /// A finding about `object`.
    pub fn new(object: impl ToString, detail: impl ToString) -> Finding {
        Finding { object: object.to_string(), detail: detail.to_string() }
    }

    /// Damage as a finding about `object`; an error when the store could not be asked.
    pub fn from_error(error: Error, object: &str) -> Result<Finding> {
        match error {
            Error::Corrupt { object, detail } => Ok(Finding { object, detail }),
            Error::Store(StoreError::NotFound { name }) => Ok(Finding::new(name, "is not in the store")),
            Error::Store(StoreError::OutOfRange { name, detail }) => {
                Ok(Finding::new(name, format!("is shorter than it says: {detail}")))
            }
            Error::Refused(detail) => Ok(Finding::new(object, detail)),
            other => Err(other),
        }
    }
}

/// What the chain looks like.
#[derive(Debug, Default)]
pub struct Chain {
    /// The segments of the chain, from the first to the newest, with their sizes.
    pub members: Vec<(Seq, u64)>,
    /// The newest of them.
    pub head: Option<Head>,
    /// The newest commit, and when it was made.
    pub commit: Option<(CommitNo, Timestamp)>,
    /// Commits in the chain.
    pub commits: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What is no damage: objects that are not part of the chain.
    pub notes: Vec<Finding>,
}

/// Follows the chain, by the trailers alone.
pub async fn chain(ctx: &VolumeContext, store: &dyn Store) -> Result<Chain> {
    let mut found = Chain::default();
    let listed = list_store(store, Seq(0)).await?;
    let mut ends: BTreeMap<Seq, End> = BTreeMap::new();
    for batch in listed.chunks(BATCH) {
        let sources: Vec<Source<'_>> =
            batch.iter().map(|seq| Source { seq: *seq, place: Place::Store(store) }).collect();
        let answers: Vec<_> =
            windowed(&sources, |source| source.trailer(ctx).map(Ok).boxed()).try_collect().await?;
        for (seq, answer) in batch.iter().zip(answers) {
            match answer {
                Ok(end) => drop(ends.insert(*seq, end.alone())),
                Err(e) => found.findings.push(Finding::from_error(e, &segment_name(*seq))?),
            }
        }
    }
    let (members, damage) = select(&ends, &ChainStart::default());
    let damaged: BTreeSet<String> = found.findings.iter().map(|finding| finding.object.clone()).collect();
    // Behind damage there is no one chain any more: then every link that there is is looked at.
    let members = match damage.is_some() || !damaged.is_empty() {
        true => ends.keys().copied().collect(),
        false => members,
    };
    if let Some(damage) = damage {
        found.findings.push(Finding::from_error(damage, "log/")?);
    }
    follow(&ends, &members, &mut found)?;
    // A damaged object is not missing too.
    let mut seen = BTreeSet::new();
    found.findings.retain(|f| !(damaged.contains(&f.object) && f.detail.starts_with("missing")));
    found.findings.retain(|finding| seen.insert(finding.clone()));
    let member: BTreeSet<Seq> = members.iter().copied().collect();
    for seq in ends.keys().filter(|seq| !member.contains(seq)) {
        found.notes.push(Finding::new(segment_name(*seq), "not part of the chain; nobody reads it"));
    }
    Ok(found)
}

/// Looks at the links between `members`.
fn follow(ends: &BTreeMap<Seq, End>, members: &[Seq], found: &mut Chain) -> Result<()> {
    let mut walk = Walk::begin(&ChainStart::default());
    for (seq, end) in members.iter().filter_map(|seq| ends.get_key_value(seq)) {
        let object = segment_name(*seq);
        // Among all that there is: what an overtaken writer left, and what stopped him.
        let aside = end.trailer.header.epoch < walk.epoch || end.trailer.kind == Kind::Barrier;
        if aside && walk.place != *seq {
            continue;
        }
        if let Err(e) = walk.step(end, &object) {
            let prev = end.trailer.prev.map(|prev| prev.seq);
            let error = match prev.filter(|prev| !ends.contains_key(prev)) {
                Some(prev) => missing(prev, *seq),
                None => e,
            };
            found.findings.push(Finding::from_error(error, &object)?);
            walk = Walk::before(end);
            walk.step(end, &object)?;
        }
        if end.trailer.kind == Kind::Barrier {
            continue;
        }
        found.members.push((*seq, end.size));
        found.head = Some(end.head);
        found.commits += u64::from(end.trailer.commit_count);
        if end.trailer.commit_count > 0 {
            found.commit = Some((end.trailer.last_commit, end.trailer.last_time));
        }
    }
    Ok(())
}

/// Whether the chain that the store holds now contains this head.
pub async fn contains(ctx: &VolumeContext, store: &dyn Store, head: Head) -> Result<bool> {
    Ok(super::chain::stored_head(ctx, store, head.seq).await? == head)
}

/// The segment of that number as the store holds it now, and its writer's epoch.
pub async fn stored(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<(Head, crate::types::Epoch)> {
    let end = Source { seq, place: Place::Store(store) }.trailer(ctx).await?;
    Ok((end.head, end.trailer.header.epoch))
}

/// What became of one segment's body.
#[derive(Debug, Default)]
pub struct Body {
    /// Bytes read.
    pub bytes: u64,
    /// Frames that were opened.
    pub frames: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Told of each frame that opened: where it lies, its kind, the length of its plain contents.
pub type OnFrame<'a> = &'a mut (dyn FnMut(FramePtr, FrameKind, usize) + Send);

/// Reads a whole segment, compares its hash with what was signed and, with `on_frame`, opens every frame of it.
pub async fn body(
    ctx: &VolumeContext,
    store: &dyn Store,
    seq: Seq,
    mut on_frame: Option<OnFrame<'_>>,
) -> Result<Body> {
    let (source, object) = (Source { seq, place: Place::Store(store) }, segment_name(seq));
    let mut out = Body::default();
    let damaged = |e: Error| Finding::from_error(e, &object);
    let (end, index) = match on_frame.is_some() {
        true => match source.indexed(ctx).await {
            Ok((end, index)) => (Ok(end), Some(index)),
            Err(e) => {
                out.findings.push(damaged(e)?);
                (source.trailer(ctx).await, None)
            }
        },
        false => (source.trailer(ctx).await, None),
    };
    let end = match end {
        Ok(end) => end,
        Err(e) => {
            out.findings.push(damaged(e)?);
            out.findings.dedup();
            return Ok(out);
        }
    };
    let body_len = end.trailer.body_len();
    let ranges: Vec<Range<u64>> =
        (0..body_len.div_ceil(PIECE)).map(|i| i * PIECE..body_len.min((i + 1) * PIECE)).collect();
    let mut pieces =
        futures::stream::iter(ranges).map(|range| store.get_range(&object, range)).buffered(PIECES_AHEAD);
    let (mut hasher, mut opening) = (Hasher::default(), index.map(|index| Opening::new(ctx, &end, index)));
    while let Some(piece) = pieces.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(e) => {
                out.findings.push(damaged(e.into())?);
                return Ok(out);
            }
        };
        hasher.update(&piece);
        out.bytes += piece.len() as u64;
        if let (Some(opening), Some(on_frame)) = (&mut opening, &mut on_frame) {
            opening.take(&piece, &mut out, on_frame);
        }
    }
    if hasher.finish() != end.trailer.body_hash {
        out.findings.push(Finding::new(&object, "its bytes are not those that the writer signed"));
    }
    Ok(out)
}

/// Opens the frames of a segment as its bytes come.
struct Opening {
    cipher: SegmentCipher,
    index: Index,
    next: usize,
    /// Bytes that came and are not opened yet, and the offset of the first.
    held: Vec<u8>,
    at: u64,
}

impl Opening {
    fn new(ctx: &VolumeContext, end: &End, index: Index) -> Opening {
        let cipher = SegmentCipher::new(ctx, end.trailer.header);
        Opening { cipher, index, next: 0, held: Vec::new(), at: 0 }
    }

    fn take(&mut self, piece: &[u8], out: &mut Body, on_frame: OnFrame<'_>) {
        self.held.extend_from_slice(piece);
        let seq = self.cipher.header().seq;
        while let (Some(ptr), Some((kind, ..))) =
            (self.index.ptr(seq, self.next), self.index.frames.get(self.next))
        {
            let range = ptr.range();
            let place = (range.start - self.at) as usize..(range.end - self.at) as usize;
            let Some(sealed) = self.held.get(place) else { break };
            match self.cipher.open(ptr, *kind, sealed.to_vec()) {
                Ok(plain) => {
                    out.frames += 1;
                    on_frame(ptr, *kind, plain.len());
                }
                Err(Error::Corrupt { object, detail }) => out.findings.push(Finding { object, detail }),
                Err(e) => out.findings.push(Finding::new(segment_name(seq), e)),
            }
            self.next += 1;
        }
        let done =
            self.index.ptr(seq, self.next).map_or(self.at + self.held.len() as u64, |ptr| ptr.range().start);
        let drop = (done - self.at).min(self.held.len() as u64);
        self.held.drain(..drop as usize);
        self.at += drop;
    }
}
