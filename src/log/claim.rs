//! Marks: what a writer says about the log itself; and the segments that consist of nothing else, claims and barriers.
//! Invariant: such a segment is made whole in memory under a salt of its own, and the same number is never offered with
//! other bytes by who still may have offered it before. The bytes: `docs/format.md`, Mark frame.

use super::Result;
use super::closing::Ending;
use super::frame::Prefix;
use super::segment::{
    Fields, HEADER_LEN, Header, Index, Kind, SegmentCipher, UncheckedTrailer, VolumeContext, put_time,
    segment_name,
};
use crate::clock::Env;
use crate::crypto::Hasher;
use crate::types::{CommitNo, Epoch, FrameKind, FramePtr, Head, Seq, Timestamp};
use std::fmt;

/// Version of a mark.
const MARK_VERSION: u8 = 1;
/// No text of a mark is longer, in bytes.
const TEXT_MAX: usize = 1024;

/// What a mark says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum About {
    /// An epoch begins with this segment.
    Claim = 1,
    /// An epoch is to begin; nothing of the one before goes beyond this place.
    Barrier = 2,
    /// The epoch ends here of its writer's own will; `text` names who is to begin the next.
    Handover = 3,
}

/// A statement of a writer about the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    /// What it says.
    pub about: About,
    /// When.
    pub time: Timestamp,
    /// On which host.
    pub host: String,
    /// The reason; for a handover, the name of the host it is for.
    pub text: String,
}

impl Mark {
    /// The plain contents of the mark frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![MARK_VERSION, self.about as u8];
        put_time(&mut out, self.time);
        for text in [&self.host, &self.text] {
            let text = cut(text);
            out.extend_from_slice(&(text.len() as u16).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out
    }

    /// The mark that the bytes are, if this build knows it.
    pub fn decode(plain: &[u8]) -> Option<Mark> {
        let mut fields = Fields(plain);
        if fields.u8()? != MARK_VERSION {
            return None;
        }
        let about = fields.u8()?;
        let about =
            [About::Claim, About::Barrier, About::Handover].into_iter().find(|a| *a as u8 == about)?;
        let time = fields.time()?;
        let mut text = || {
            let len = usize::from(fields.u16()?);
            let (text, rest) = fields.0.split_at_checked(len)?;
            fields.0 = rest;
            String::from_utf8(text.to_vec()).ok()
        };
        let (host, said) = (text()?, text()?);
        fields.0.is_empty().then_some(Mark { about, time, host, text: said })
    }
}

/// As much of the text as a mark holds.
fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(TEXT_MAX)).rev().find(|at| text.is_char_boundary(*at));
    text.get(..end.unwrap_or(0)).unwrap_or_default()
}

/// Where a claim or a barrier goes, and what it says.
pub struct Put<'a> {
    /// Claim or barrier.
    pub kind: Kind,
    /// Its number.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: Epoch,
    /// The end of the chain.
    pub prev: Option<Head>,
    /// The newest commit of the chain.
    pub last_commit: CommitNo,
    /// What it says.
    pub mark: &'a Mark,
}

impl Put<'_> {
    /// The whole segment, and the head that it is.
    pub fn bytes(&self, ctx: &VolumeContext, env: &Env) -> Result<(Vec<u8>, Head)> {
        let header = Header {
            volume: ctx.id,
            seq: self.seq,
            epoch: self.epoch,
            key_id: ctx.key_id,
            salt: env.random_bytes(),
        };
        let mut bytes = header.encode().to_vec();
        let cipher = SegmentCipher::new(ctx, header);
        let ptr = cipher.seal_into(HEADER_LEN as u32, FrameKind::Mark, &self.mark.encode(), &mut bytes);
        let index = Index { frames: vec![(FrameKind::Mark, ptr.offset, ptr.len)], commits: Vec::new() };
        let mut hasher = Hasher::default();
        hasher.update(&bytes);
        let ending = Ending {
            ctx,
            kind: self.kind,
            prev: self.prev,
            last_commit: self.last_commit,
            stored: self.prev.map_or(Seq(0), |prev| prev.seq),
        };
        let end = bytes.len() as u64;
        let closing = ending.bytes(header, &index, hasher, end, end, env.random_bytes())?;
        bytes.extend_from_slice(&closing.bytes);
        Ok((bytes, closing.head))
    }
}

/// A segment that consists of a mark, as it was put: whose it is.
#[derive(Clone, Debug)]
pub struct Marked {
    /// Claim, barrier, or an ordinary segment.
    pub kind: Kind,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its head.
    pub head: Head,
    /// The segment before it.
    pub prev: Option<Head>,
    /// The newest commit before it.
    pub last_commit: CommitNo,
    /// What it says, if its first frame says something that this build knows.
    pub mark: Option<Mark>,
}

impl fmt::Display for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let epoch = self.epoch.0;
        match self.kind {
            Kind::Ordinary => write!(f, "is another writer's of epoch {epoch}")?,
            Kind::Claim => write!(f, "is the claim of another writer, who began epoch {epoch}")?,
            Kind::Barrier => write!(f, "is the barrier of another host, which begins epoch {epoch}")?,
        }
        let Some(mark) = &self.mark else { return Ok(()) };
        write!(f, " (host `{}`, reason: {})", mark.host, mark.text)
    }
}

/// What the whole segment `seq` says about the log.
pub fn read_marked(ctx: &VolumeContext, seq: Seq, bytes: &[u8]) -> Result<Marked> {
    let object = segment_name(seq);
    let (trailer, head) =
        UncheckedTrailer::parse(bytes, &object)?.verify(ctx, seq, bytes.len() as u64, &object)?;
    let cipher = SegmentCipher::new(ctx, trailer.header);
    let rest = bytes.get(HEADER_LEN..).unwrap_or_default();
    let mark = Prefix::parse(rest).filter(|prefix| prefix.kind == FrameKind::Mark).and_then(|prefix| {
        let sealed = rest.get(..prefix.len as usize)?.to_vec();
        let ptr = FramePtr { seq, offset: HEADER_LEN as u32, len: prefix.len };
        Mark::decode(&cipher.open(ptr, FrameKind::Mark, sealed).ok()?)
    });
    Ok(Marked {
        kind: trailer.kind,
        epoch: trailer.header.epoch,
        head,
        prev: trailer.prev,
        last_commit: trailer.last_commit,
        mark,
    })
}
