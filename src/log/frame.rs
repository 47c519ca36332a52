//! Frames: one sealed item of a segment, as bytes and back; and the header log puts before the body of a delta.
//! No I/O (`docs/format.md`, Frame).
//! Invariant: the nonce of a frame is its offset, so a cipher seals each offset at most once; a frame opens only in
//! the volume, segment, epoch, offset, length and kind it was sealed for.

use super::blocks::{self, BLOCK_LEN, Layout};
use super::segment::{Fields, Header, VolumeContext, put_time, segment_name};
use super::{Error, Result};
use crate::crypto::keys::DerivedKey;
use crate::crypto::seal::{BulkSealer, NotAuthentic, TAG_LEN};
use crate::types::{CommitNo, FrameKind, FramePtr, Timestamp};
use bytes::Bytes;
use std::ops::Range;

/// Length of a frame's plain prefix in bytes.
pub const PREFIX_LEN: usize = 8;
/// Bytes a frame has beside its (compressed) contents, if it is not in blocks.
pub const FRAME_OVERHEAD: usize = PREFIX_LEN + TAG_LEN;
/// Longest plain contents of a frame other than an index, in bytes. Far more than a record, a page or a delta takes.
pub const FRAME_PLAIN_MAX: usize = 16 << 20;
/// Longest frame that is no index, in bytes.
pub const FRAME_SEALED_MAX: usize = blocks::sealed_len(FRAME_PLAIN_MAX);
/// Longest plain contents of an index, in bytes.
const INDEX_PLAIN_MAX: usize = 256 << 20;
/// An LZ4 block does not grow by more than this factor: a byte of it stands for 255 bytes at most.
const LZ4_FACTOR_MAX: usize = 255;

const FLAG_LZ4: u8 = 1;
const FLAG_BLOCKS: u8 = 2;
/// Below this many bytes compression is not tried.
const COMPRESS_MIN: usize = 64;
/// Contents longer than this are compressed only when their first [`PROBE_LEN`] bytes shrink.
const PROBE_ABOVE: usize = 16 << 10;
const PROBE_LEN: usize = 4 << 10;
const ASSOCIATED_LEN: usize = 40;

/// Seals and opens the frames of one segment.
#[derive(Debug)]
pub struct SegmentCipher {
    header: Header,
    sealer: BulkSealer,
}

impl SegmentCipher {
    /// The cipher of the segment that begins with `header`.
    pub fn new(ctx: &VolumeContext, header: Header) -> SegmentCipher {
        SegmentCipher::with_key(header, &header.frame_key(&ctx.key))
    }

    /// The cipher of that segment's index.
    pub fn for_index(ctx: &VolumeContext, header: Header, index_salt: &[u8; 32]) -> SegmentCipher {
        SegmentCipher::with_key(header, &header.index_key(&ctx.key, index_salt))
    }

    fn with_key(header: Header, key: &DerivedKey) -> SegmentCipher {
        SegmentCipher { header, sealer: BulkSealer::new(key) }
    }

    /// The header this cipher is bound to.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Appends `plain`, sealed as the frame of `kind` at `offset`, to `out`. The caller has made sure that `offset`
    /// was never sealed before under this cipher, and that `plain` is not longer than a frame of its kind may be.
    pub fn seal_into(&self, offset: u32, kind: FrameKind, plain: &[u8], out: &mut Vec<u8>) -> FramePtr {
        assert!(plain.len() <= plain_max(kind), "a frame of {} bytes", plain.len());
        let start = out.len();
        out.extend_from_slice(&[0; PREFIX_LEN]);
        let flags = if compress_onto(plain, out) {
            FLAG_LZ4
        } else if kind == FrameKind::Data && plain.len() > BLOCK_LEN {
            return self.seal_blocks(offset, plain, out, start);
        } else {
            out.extend_from_slice(plain);
            0
        };
        let len = (out.len() - start + TAG_LEN) as u32;
        let prefix = Prefix { len, kind, flags }.encode();
        let (head, contents) = out[start..].split_at_mut(PREFIX_LEN);
        head.copy_from_slice(&prefix);
        let tag = self.sealer.seal(offset.into(), &self.associated(offset, &prefix), contents);
        out.extend_from_slice(&tag);
        FramePtr { seq: self.header.seq, offset, len }
    }

    /// Goes on with a data frame that begins at `start` of `out`, in blocks. Their nonces follow each other from the
    /// offset on: a frame has more bytes than blocks, so that the next frame's nonces begin behind them.
    fn seal_blocks(&self, offset: u32, plain: &[u8], out: &mut Vec<u8>, start: usize) -> FramePtr {
        let len = blocks::sealed_len(plain.len()) as u32;
        let prefix = Prefix { len, kind: FrameKind::Data, flags: FLAG_BLOCKS }.encode();
        let associated = self.associated(offset, &prefix);
        out[start..].copy_from_slice(&prefix);
        out.reserve(len as usize);
        for (n, block) in (u64::from(offset)..).zip(plain.chunks(BLOCK_LEN)) {
            let at = out.len();
            out.extend_from_slice(block);
            let tag = self.sealer.seal(n, &associated, &mut out[at..]);
            out.extend_from_slice(&tag);
        }
        FramePtr { seq: self.header.seq, offset, len }
    }

    /// Appends the plain bytes of some blocks of the frame at `ptr`, which lie in `sealed`, to `out`; on an error nothing. It
    /// fails, too, where the frame is not one in blocks.
    pub fn open_blocks(
        &self,
        ptr: FramePtr,
        layout: Layout,
        which: &Range<usize>,
        sealed: &[u8],
        out: &mut Vec<u8>,
    ) -> std::result::Result<(), NotAuthentic> {
        let prefix = Prefix { len: ptr.len, kind: FrameKind::Data, flags: FLAG_BLOCKS }.encode();
        let associated = self.associated(ptr.offset, &prefix);
        if ptr.seq != self.header.seq || sealed.len() != layout.sealed(which).len() {
            return Err(NotAuthentic);
        }
        let begin = out.len();
        out.reserve(layout.plain(which).len());
        let nonces = u64::from(ptr.offset) + which.start as u64..;
        for (n, (block, tag)) in nonces.zip(blocks::split(sealed)) {
            let at = out.len();
            out.resize(at + block.len(), 0);
            let opened = self.sealer.open_onto(n, &associated, block, tag, &mut out[at..]);
            opened.inspect_err(|_| out.truncate(begin))?;
        }
        Ok(())
    }

    /// The plain contents of the frame at `ptr`, which must be of `kind`. `sealed` is opened in place.
    pub fn open(&self, ptr: FramePtr, kind: FrameKind, mut sealed: Vec<u8>) -> Result<Bytes> {
        let bad = |detail: &str| {
            Error::corrupt(segment_name(ptr.seq), format!("frame at {}+{}: {detail}", ptr.offset, ptr.len))
        };
        if ptr.seq != self.header.seq || sealed.len() != ptr.len as usize {
            return Err(bad("not the bytes that were asked for"));
        }
        let prefix = Prefix::parse(&sealed).ok_or_else(|| bad("damaged prefix"))?;
        if prefix.len != ptr.len || prefix.kind != kind {
            return Err(bad("another frame lies there"));
        }
        if prefix.flags & FLAG_BLOCKS != 0 {
            let layout = Layout::of(sealed.len()).ok_or_else(|| bad("damaged prefix"))?;
            let mut plain = Vec::new();
            let opened = self.open_blocks(ptr, layout, &layout.all(), &sealed[PREFIX_LEN..], &mut plain);
            return opened.map(|()| plain.into()).map_err(|_| bad("authentication failed"));
        }
        let associated = self.associated(ptr.offset, &prefix.encode());
        let end = sealed.len() - TAG_LEN;
        let contents = sealed.get_mut(PREFIX_LEN..).ok_or_else(|| bad("damaged prefix"))?;
        self.sealer
            .open(ptr.offset.into(), &associated, contents)
            .map_err(|_| bad("authentication failed"))?;
        if prefix.flags & FLAG_LZ4 != 0 {
            return decompress(&sealed[PREFIX_LEN..end], plain_max(kind))
                .map(Bytes::from)
                .ok_or_else(|| bad("does not decompress"));
        }
        Ok(Bytes::from(sealed).slice(PREFIX_LEN..end))
    }

    /// As [`Self::open`], for a frame of whatever kind it says it is.
    pub fn open_any(&self, ptr: FramePtr, sealed: Vec<u8>) -> Result<(FrameKind, Bytes)> {
        // A prefix that lies is found out by the seal, which covers it.
        let kind = Prefix::parse(&sealed).map_or(FrameKind::Data, |prefix| prefix.kind);
        Ok((kind, self.open(ptr, kind, sealed)?))
    }

    fn associated(&self, offset: u32, prefix: &[u8; PREFIX_LEN]) -> [u8; ASSOCIATED_LEN] {
        let mut out = [0; ASSOCIATED_LEN];
        out[..16].copy_from_slice(&self.header.volume.0);
        out[16..24].copy_from_slice(&self.header.seq.0.to_le_bytes());
        out[24..28].copy_from_slice(&self.header.epoch.0.to_le_bytes());
        out[28..32].copy_from_slice(&offset.to_le_bytes());
        out[32..].copy_from_slice(prefix);
        out
    }
}

/// The plain bytes a frame begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Prefix {
    /// Length of the whole frame.
    pub len: u32,
    pub kind: FrameKind,
    flags: u8,
}

impl Prefix {
    fn encode(self) -> [u8; PREFIX_LEN] {
        let [a, b, c, d] = self.len.to_le_bytes();
        [a, b, c, d, self.kind as u8, self.flags, 0, 0]
    }

    /// The prefix, when the bytes can be one.
    pub fn parse(bytes: &[u8]) -> Option<Prefix> {
        let mut fields = Fields(bytes);
        let len = fields.u32()?;
        let kind = FrameKind::from_u8(fields.u8()?)?;
        let flags = fields.u8()?;
        let in_blocks = || kind == FrameKind::Data && Layout::of(len as usize).is_some();
        let plausible = fields.u16()? == 0
            && (flags & !FLAG_LZ4 == 0 || flags == FLAG_BLOCKS && in_blocks())
            && (FRAME_OVERHEAD..=blocks::sealed_len(plain_max(kind))).contains(&(len as usize));
        plausible.then_some(Prefix { len, kind, flags })
    }
}

/// Appends `plain` to `out` as a u32 of its length and an LZ4 block, if that saves at least a sixteenth.
fn compress_onto(plain: &[u8], out: &mut Vec<u8>) -> bool {
    if plain.len() < COMPRESS_MIN {
        return false;
    }
    if plain.len() > PROBE_ABOVE {
        let mut scratch = [0; PROBE_LEN + PROBE_LEN / 8];
        let probe = lz4_flex::block::compress_into(&plain[..PROBE_LEN], &mut scratch);
        if !probe.is_ok_and(|len| len < PROBE_LEN - PROBE_LEN / 16) {
            return false;
        }
    }
    let start = out.len();
    out.extend_from_slice(&(plain.len() as u32).to_le_bytes());
    let block = out.len();
    out.resize(block + lz4_flex::block::get_maximum_output_size(plain.len()), 0);
    match lz4_flex::block::compress_into(plain, &mut out[block..]) {
        Ok(len) if len + 4 < plain.len() - plain.len() / 16 => {
            out.truncate(block + len);
            true
        }
        _ => {
            out.truncate(start);
            false
        }
    }
}

fn plain_max(kind: FrameKind) -> usize {
    if kind == FrameKind::Index { INDEX_PLAIN_MAX } else { FRAME_PLAIN_MAX }
}

/// The plain bytes, if they are at most `max`. What is claimed is not allocated unless the block can be so long.
fn decompress(contents: &[u8], max: usize) -> Option<Vec<u8>> {
    let mut fields = Fields(contents);
    let len = fields.u32()? as usize;
    if len > max || len > fields.0.len().saturating_mul(LZ4_FACTOR_MAX) {
        return None;
    }
    let mut plain = vec![0; len];
    let filled = lz4_flex::block::decompress_into(fields.0, &mut plain).ok()?;
    (filled == len).then_some(plain)
}

/// What log puts before the body of a delta: which commit, which part of it, and how much was durable by then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeltaHeader {
    /// The commit.
    pub no: CommitNo,
    /// When it was made.
    pub time: Timestamp,
    /// Number of this part, from 0.
    pub part: u32,
    /// True for the commit's last part, with which it takes effect.
    pub last: bool,
    /// Bytes of this segment known durable when the part was sealed: damage before it is not a torn tail.
    pub synced: u32,
}

impl DeltaHeader {
    /// Length in bytes.
    pub const LEN: usize = 30;
    const VERSION: u8 = 1;

    /// Appends the bytes of the format to `out`.
    pub fn encode_onto(&self, out: &mut Vec<u8>) {
        out.push(Self::VERSION);
        out.extend_from_slice(&self.no.0.to_le_bytes());
        put_time(out, self.time);
        out.extend_from_slice(&self.part.to_le_bytes());
        out.push(self.last.into());
        out.extend_from_slice(&self.synced.to_le_bytes());
    }

    /// Takes the plain contents of a delta frame apart into its header and its body.
    pub fn split(plain: &Bytes) -> Option<(DeltaHeader, Bytes)> {
        let mut fields = Fields(plain);
        if fields.u8()? != Self::VERSION {
            return None;
        }
        let no = fields.commit()?;
        let time = fields.time()?;
        let part = fields.u32()?;
        let last = match fields.u8()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let synced = fields.u32()?;
        Some((DeltaHeader { no, time, part, last, synced }, plain.slice(Self::LEN..)))
    }
}
