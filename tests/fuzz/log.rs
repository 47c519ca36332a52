//! Targets for what lies in the log: segments, frames, indexes, torn segments, checkpoints.
//! Invariant: what is sealed or signed is sealed and signed anew over the input's bytes, so that the parsers behind the
//! authentication are reached too; the bytes as they came are tried first.

use crate::forge::{Segment, TIME, fix_header, seal_raw, volume};
use bytes::Bytes;
use embassyfs::crypto::keys::Purpose;
use embassyfs::crypto::seal::Sealer;
use embassyfs::log::segment::{
    DeltaHeader, HEADER_LEN, Index, SegmentCipher, TRAILER_LEN, UncheckedHeader, UncheckedTrailer,
};
use embassyfs::tree::checkpoint::{self, Root};
use embassyfs::types::{CommitNo, Epoch, FrameKind, FramePtr, Seq};

/// Where the header begins in a trailer, and the signature.
const TRAILER_HEADER: usize = 184;
const TRAILER_SIGNED: usize = 280;

pub fn segment(data: &[u8]) {
    let ctx = volume();
    header_and_trailer(data);
    let Some(start) = data.len().checked_sub(TRAILER_LEN) else { return };
    let mut fixed = data.to_vec();
    let header = &mut fixed[start + TRAILER_HEADER..];
    fix_header(header.first_chunk_mut::<HEADER_LEN>().expect("a trailer holds a header"));
    let message = [b"embassyfs v1 segment trailer", &fixed[start..start + TRAILER_SIGNED]].concat();
    let signature = ctx.signer.expect("a writer's").sign(&message);
    fixed[start + TRAILER_SIGNED..].copy_from_slice(&signature);
    if let Some(header) = fixed.first_chunk_mut::<HEADER_LEN>() {
        fix_header(header);
    }
    header_and_trailer(&fixed);
}

fn header_and_trailer(bytes: &[u8]) {
    let ctx = volume();
    if let Ok(header) = UncheckedHeader::parse(bytes, "log/1")
        && let Ok(header) = header.verify(&ctx, Seq(1), "log/1")
    {
        assert_eq!(header.encode(), bytes[..HEADER_LEN]);
    }
    let size = bytes.len() as u64;
    if let Ok(trailer) = UncheckedTrailer::parse(bytes, "log/1")
        && let Ok((trailer, head)) = trailer.verify(&ctx, Seq(1), size, "log/1")
    {
        let again = trailer.encode(ctx.signer.as_ref().expect("a writer's"));
        assert_eq!(again, bytes[bytes.len() - TRAILER_LEN..]);
        assert_eq!((head.seq, trailer.seq()), (Seq(1), Seq(1)));
        assert_eq!(trailer.body_len() + TRAILER_LEN as u64, size);
    }
}

/// The first two bytes are kind and flags of the frame, the rest its contents.
pub fn frame(data: &[u8]) {
    let ctx = volume();
    let header = Segment::new(&ctx, Seq(1), Epoch(1)).header;
    let cipher = SegmentCipher::new(&ctx, header);
    let ptr = |len: usize| FramePtr { seq: Seq(1), offset: 96, len: len as u32 };
    let _ = cipher.open_any(ptr(data.len()), data.to_vec());
    let [kind, flags, contents @ ..] = data else { return };
    let sealed = seal_raw(&ctx, &header, 96, *kind, *flags, contents);
    if let Ok((kind, plain)) = cipher.open_any(ptr(sealed.len()), sealed) {
        let mut again = Vec::new();
        let ptr = cipher.seal_into(96, kind, &plain, &mut again);
        assert_eq!(cipher.open(ptr, kind, again).expect("sealed a moment ago"), plain);
        if kind == FrameKind::Delta {
            delta_header(&plain);
        }
    }
    delta_header(&Bytes::copy_from_slice(contents));
}

fn delta_header(plain: &Bytes) {
    if let Some((header, body)) = DeltaHeader::split(plain) {
        let mut again = Vec::new();
        header.encode_onto(&mut again);
        again.extend_from_slice(&body);
        assert_eq!(again, &plain[..]);
    }
}

/// The first four bytes are where the segment says that its index lies.
pub fn index(data: &[u8]) {
    let Some((offset, plain)) = data.split_first_chunk() else { return };
    let _ = Index::decode(plain, u32::from_le_bytes(*offset));
    // The same frames in a segment that they fill.
    let mut end = HEADER_LEN as u32;
    let frames = plain.get(1..5).map_or(0, |n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]));
    for entry in plain.get(9..).unwrap_or_default().chunks_exact(5).take(frames as usize) {
        end = end.wrapping_add(u32::from_le_bytes([entry[1], entry[2], entry[3], entry[4]]));
    }
    if let Some(index) = Index::decode(plain, end) {
        assert_eq!(index.encode(), plain);
        let last = index.frames.len().checked_sub(1).and_then(|i| index.ptr(Seq(1), i));
        assert_eq!(last.map_or(HEADER_LEN as u64, |ptr| ptr.range().end), u64::from(end));
        assert!(index.commits.iter().all(|commit| commit.deltas.end <= index.frames.len()));
    }
}

/// A plan of frames (kind, flags, length, contents) that are sealed into a segment without an end, and how much of it
/// reached the disk.
pub fn torn(data: &[u8]) {
    let ctx = volume();
    embassyfs::log::fuzz_torn(&ctx, Seq(1), data);
    let Some((cut, mut plan)) = data.split_first_chunk::<2>() else { return };
    let mut segment = Segment::new(&ctx, Seq(1), Epoch(1));
    while let [kind, flags, len, rest @ ..] = plan {
        let (contents, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        let kind = FrameKind::from_u8(kind % 7).unwrap_or(FrameKind::Delta);
        segment.raw_frame(kind, flags & 1, contents);
        plan = rest;
    }
    let cut = usize::from(u16::from_le_bytes(*cut));
    let (keep, hole) = (segment.bytes.len().saturating_sub(cut % 512), cut / 512);
    let mut bytes = segment.bytes.clone();
    bytes.truncate(keep);
    embassyfs::log::fuzz_torn(&ctx, Seq(1), &bytes);
    let end = bytes.len();
    bytes[end.saturating_sub(16 * hole)..].fill(0);
    embassyfs::log::fuzz_torn(&ctx, Seq(1), &bytes);
    let (closed, _) = segment.close(None);
    embassyfs::log::fuzz_torn(&ctx, Seq(1), &closed);
}

pub fn checkpoint(data: &[u8]) {
    let ctx = volume();
    let public = &ctx.writer_public;
    let name = checkpoint::name(CommitNo(1));
    let _ = checkpoint::open(data, &name, ctx.id, &ctx.key, public);
    if let Ok(text) = std::str::from_utf8(data)
        && let Some(commit) = checkpoint::commit_of(text)
    {
        assert_eq!(checkpoint::name(commit), text);
    }
    if let Ok(root) = Root::decode(data, "root") {
        assert_eq!(root.encode(), data);
    }
    // The first 69 bytes are the header, the rest is what is sealed.
    let Some((header, body)) = data.split_at_checked(69) else { return };
    let mut sealed = body.to_vec();
    let tag = Sealer::new(&ctx.key.derive(Purpose::Checkpoint, header)).seal(0, header, &mut sealed);
    let signed = [header, &sealed, &tag].concat();
    let signature = ctx.signer.as_ref().expect("a writer's").sign(&signed);
    let bytes = [&signed[..], &signature].concat();
    if let Ok(root) = checkpoint::open(&bytes, &name, ctx.id, &ctx.key, public) {
        assert_eq!((root.encode().as_slice(), root.commit), (body, CommitNo(1)));
    }
}

/// Inputs that are good, or nearly.
pub fn seeds(mut put: impl FnMut(&str, &[u8])) {
    let ctx = volume();
    let mut segment = Segment::new(&ctx, Seq(1), Epoch(1));
    segment.frame(FrameKind::Data, b"Every state keeps registers.");
    segment.commit(1, &[b"first part".to_vec(), b"second part".to_vec()]);
    segment.frame(FrameKind::Page, &b"land, business, population; ".repeat(40));
    segment.commit(3, &[b"another".to_vec()]);
    let index = segment.index.encode();
    put("index", &[&(segment.bytes.len() as u32).to_le_bytes()[..], &index].concat());
    let (bytes, _) = segment.close(None);
    put("segment", &bytes);
    put("torn", &bytes);
    for name in ["segment-1", "segment-2"] {
        put("segment", &crate::seeds::fixture(name));
        put("torn", &crate::seeds::fixture(name));
    }
    put("frame", &[&[1, 0][..], b"plain"].concat());
    let block = [&[0x1f, b'a', 1, 0][..], &[0xff, 100, 0x50], b"aaaaa"].concat();
    put("frame", &[&[2, 1][..], &380u32.to_le_bytes(), &block].concat());
    let mut delta = Vec::new();
    let header = DeltaHeader { no: CommitNo(1), time: TIME, part: 0, last: true, synced: 0 };
    header.encode_onto(&mut delta);
    put("frame", &[&[3, 0][..], &delta, b"body"].concat());
    let plan = |delta: &[u8]| [&[3, 0, delta.len() as u8][..], delta].concat();
    let data = [&[1, 0, 4][..], b"data"].concat();
    put("torn", &[&[0, 0][..], &data, &plan(&delta), &data, &plan(&delta)].concat());
    put("torn", &[&[60, 2][..], &plan(&delta), &data, &plan(&delta)].concat());
}
