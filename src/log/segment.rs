//! The fixed parts of a segment: header and trailer, as bytes and back. No I/O (`docs/format.md`, Segment).
//! Invariant: a [`Header`] or [`Trailer`] in hand has been verified; what was only parsed is of another type and
//! gives nothing away. The trailer repeats the header, so that the end of an object alone is enough to open it.

use super::{Error, Result};
use crate::crypto::Hasher;
use crate::crypto::keys::{DerivedKey, Purpose, VolumeKey};
use crate::crypto::sign::{PublicKey, SIGNATURE_LEN, SecretKey};
use crate::disk::{FileRef, Mode};
use crate::types::{CommitNo, Epoch, Hash, Head, Seq, Timestamp, VolumeId};

pub use super::frame::{DeltaHeader, FRAME_OVERHEAD, FRAME_PLAIN_MAX, FRAME_SEALED_MAX, SegmentCipher};
pub use super::index::{Index, IndexedCommit};

/// Version of the segment format this build writes, and the only one it reads.
pub const SEGMENT_VERSION: u16 = 1;
/// Length of a segment's header in bytes; the first frame follows.
pub const HEADER_LEN: usize = 96;
/// Length of a segment's trailer in bytes; the object ends with it.
pub const TRAILER_LEN: usize = 344;
/// No segment grows beyond this many bytes, so that every offset in it fits 32 bits with room to spare.
pub const SEGMENT_LEN_MAX: u64 = 3 << 30;

/// No segment and no commit has a higher number: who counts on from one never comes to the end of the numbers.
pub const NUMBER_MAX: u64 = i64::MAX as u64;

const HEADER_MAGIC: [u8; 8] = *b"EMBFSSEG";
const HEADER_CHECKED: usize = 80;
const TRAILER_MAGIC: [u8; 8] = *b"EMBFSEND";
/// A segment is read through in pieces of so many bytes.
const PIECE: usize = 1 << 20;
const TRAILER_SIGNED: usize = TRAILER_LEN - SIGNATURE_LEN;
const SIGNATURE_CONTEXT: &[u8] = b"embassyfs v1 segment trailer";

/// What is needed to read a volume's log, and with `signer` to write it.
#[derive(Debug, Clone)]
pub struct VolumeContext {
    /// The volume.
    pub id: VolumeId,
    /// Its key.
    pub key: VolumeKey,
    /// Number of that key; segments name the key they are sealed under.
    pub key_id: u32,
    /// Who may have signed a segment.
    pub writer_public: PublicKey,
    /// The signing key, for a writer.
    pub signer: Option<SecretKey>,
}

/// Name of segment `seq` in the store, and in messages.
pub fn segment_name(seq: Seq) -> String {
    format!("log/{seq}")
}

/// The segment that an object or file name's last part spells.
pub(crate) fn seq_of_name(name: &str) -> Option<Seq> {
    let digits = name.rsplit('/').next()?;
    if digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    crate::types::unhex::<8>(digits).map(|bytes| Seq(u64::from_be_bytes(bytes)))
}

/// Takes fixed-size fields off the front of bytes that may be anything.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.bytes::<1>().map(|b| b[0])
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// The number of a commit: not 0, and never so high that those behind it have none.
    pub fn commit(&mut self) -> Option<CommitNo> {
        self.u64().filter(|no| (1..=NUMBER_MAX).contains(no)).map(CommitNo)
    }

    pub fn time(&mut self) -> Option<Timestamp> {
        let secs = self.u64()?.cast_signed();
        let nanos = self.u32()?;
        (nanos < 1_000_000_000).then_some(Timestamp { secs, nanos })
    }
}

/// Appends a time stamp as the formats have it: seconds, then nanoseconds.
pub(crate) fn put_time(out: &mut Vec<u8>, time: Timestamp) {
    out.extend_from_slice(&time.secs.to_le_bytes());
    out.extend_from_slice(&time.nanos.to_le_bytes());
}

/// The plain bytes a segment begins with; every key of the segment is bound to all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The volume.
    pub volume: VolumeId,
    /// Number of the segment.
    pub seq: Seq,
    /// Reign of the writer that made it.
    pub epoch: Epoch,
    /// Which volume key it is sealed under.
    pub key_id: u32,
    /// Drawn once per segment file, so that no two files ever share a key.
    pub salt: [u8; 32],
}

/// A header whose volume, number and key have not been looked at yet.
pub struct UncheckedHeader(Header);

impl Header {
    /// The bytes of the format.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&HEADER_MAGIC);
        out.extend_from_slice(&SEGMENT_VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.key_id.to_le_bytes());
        out.extend_from_slice(&self.volume.0);
        out.extend_from_slice(&self.seq.0.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.salt);
        let check = crate::crypto::hash(&out);
        out.extend_from_slice(&check.0[..HEADER_LEN - HEADER_CHECKED]);
        out.try_into().expect("the fields add up to the header's length")
    }

    /// The key that frames of this segment are sealed under.
    pub fn frame_key(&self, key: &VolumeKey) -> DerivedKey {
        key.derive(Purpose::SegmentFrames, &self.encode())
    }

    /// The key that the segment's index is sealed under: its own, so that closing what a crash left behind cannot
    /// meet a nonce of a torn frame.
    pub fn index_key(&self, key: &VolumeKey, index_salt: &[u8; 32]) -> DerivedKey {
        let mut material = self.encode().to_vec();
        material.extend_from_slice(index_salt);
        key.derive(Purpose::SegmentIndex, &material)
    }
}

impl UncheckedHeader {
    /// Takes the first [`HEADER_LEN`] bytes of `bytes` apart; `object` is for the message.
    pub fn parse(bytes: &[u8], object: &str) -> Result<UncheckedHeader> {
        let bad = |detail| Error::corrupt(object, detail);
        let header =
            bytes.first_chunk::<HEADER_LEN>().ok_or_else(|| bad("too short for a segment header"))?;
        let mut fields = Fields(header);
        if fields.bytes() != Some(HEADER_MAGIC) {
            return Err(bad("not a segment (wrong magic)"));
        }
        check_version(fields.u16(), object)?;
        let header = Self::fields(&mut fields).ok_or_else(|| bad("damaged segment header"))?;
        let check = fields.0;
        if crate::crypto::hash(&bytes[..HEADER_CHECKED]).0.get(..check.len()) != Some(check) {
            return Err(bad("damaged segment header (check sum)"));
        }
        Ok(UncheckedHeader(header))
    }

    fn fields(fields: &mut Fields<'_>) -> Option<Header> {
        let zero = fields.u16()?;
        let key_id = fields.u32()?;
        let volume = VolumeId(fields.bytes()?);
        let seq = Seq(fields.u64()?);
        let epoch = Epoch(fields.u32()?);
        let zero = u32::from(zero) | fields.u32()?;
        let salt = fields.bytes()?;
        (zero == 0).then_some(Header { volume, seq, epoch, key_id, salt })
    }

    /// The header, once it is known to be of this volume, of segment `seq` and of a key we hold.
    pub fn verify(self, ctx: &VolumeContext, seq: Seq, object: &str) -> Result<Header> {
        let header = self.0;
        let bad = |detail: String| Err(Error::corrupt(object, detail));
        if header.volume != ctx.id {
            return bad(format!("belongs to volume {}, not to {}", header.volume, ctx.id));
        }
        if header.seq != seq || !(1..=NUMBER_MAX).contains(&seq.0) || header.epoch.0 == 0 {
            return bad(format!("says it is segment {} of epoch {}", header.seq, header.epoch.0));
        }
        if header.key_id != ctx.key_id {
            return bad(format!("sealed under key {}; the key file holds key {}", header.key_id, ctx.key_id));
        }
        Ok(header)
    }
}

fn check_version(version: Option<u16>, object: &str) -> Result<()> {
    match version {
        Some(SEGMENT_VERSION) => Ok(()),
        other => Err(Error::corrupt(
            object,
            format!(
                "segment format version {} is not known to this build (it reads {SEGMENT_VERSION}); a newer build is needed",
                other.unwrap_or(0)
            ),
        )),
    }
}

/// How far the number behind a claim, or behind a barrier in the way, lies. More than what an old writer can have on its
/// way to the store, so that nothing of that ever lies in the place of a segment behind the claim.
pub const JUMP: u64 = 1024;

/// What a segment is for the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u16)]
pub enum Kind {
    /// One of many of an epoch.
    #[default]
    Ordinary = 0,
    /// The first of an epoch: who put it is the writer from there on.
    Claim = 1,
    /// No part of the chain: it only keeps an old writer from going beyond its place.
    Barrier = 2,
}

impl Kind {
    fn from_u16(n: u16) -> Option<Kind> {
        [Kind::Ordinary, Kind::Claim, Kind::Barrier].into_iter().find(|kind| *kind as u16 == n)
    }
}

/// The place of the segment behind `seq`, unless a barrier lies there: then it is so far again behind that.
pub fn place_after(seq: Seq, kind: Kind) -> Seq {
    match kind {
        Kind::Ordinary => Seq(seq.0 + 1),
        Kind::Claim | Kind::Barrier => Seq(seq.0 + JUMP),
    }
}

/// The plain, signed bytes a segment ends with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// What the segment is for the chain.
    pub kind: Kind,
    /// The segment's header, repeated.
    pub header: Header,
    /// Number and trailer hash of the segment before this one; none for the first of a volume.
    pub prev: Option<Head>,
    /// BLAKE3 of everything before the trailer.
    pub body_hash: Hash,
    /// Where the index frame begins.
    pub index_offset: u32,
    /// Length of the index frame; the trailer follows it.
    pub index_len: u32,
    /// What the index's key is bound to beside the header.
    pub index_salt: [u8; 32],
    /// Frames before the index.
    pub frame_count: u32,
    /// Complete commits in the segment.
    pub commit_count: u32,
    /// First commit in the segment; 0 when it holds none.
    pub first_commit: CommitNo,
    /// Newest commit in the segment, or before it when it holds none.
    pub last_commit: CommitNo,
    /// Time of the first commit.
    pub first_time: Timestamp,
    /// Time of the last commit.
    pub last_time: Timestamp,
    /// Bytes of the segment known durable at home before it was closed.
    pub synced: u32,
    /// Newest segment that was, with all before it, known to be in the store when this one was closed; 0: not known.
    pub stored: Seq,
}

/// A trailer whose signature and place have not been looked at yet.
pub struct UncheckedTrailer {
    bytes: [u8; TRAILER_LEN],
    trailer: Trailer,
}

impl Trailer {
    /// The bytes of the format, signed by `signer`.
    pub fn encode(&self, signer: &SecretKey) -> [u8; TRAILER_LEN] {
        let mut out = Vec::with_capacity(TRAILER_LEN);
        out.extend_from_slice(&TRAILER_MAGIC);
        out.extend_from_slice(&SEGMENT_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.kind as u16).to_le_bytes());
        for n in [self.index_offset, self.index_len, self.frame_count, self.commit_count, self.synced] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&self.first_commit.0.to_le_bytes());
        out.extend_from_slice(&self.last_commit.0.to_le_bytes());
        put_time(&mut out, self.first_time);
        put_time(&mut out, self.last_time);
        out.extend_from_slice(&self.stored.0.to_le_bytes());
        let prev = self.prev.unwrap_or(Head { seq: Seq(0), hash: Hash::default() });
        out.extend_from_slice(&prev.seq.0.to_le_bytes());
        out.extend_from_slice(&prev.hash.0);
        out.extend_from_slice(&self.body_hash.0);
        out.extend_from_slice(&self.index_salt);
        out.extend_from_slice(&self.header.encode());
        let signature = signer.sign(&signed_message(&out));
        out.extend_from_slice(&signature);
        out.try_into().expect("the fields add up to the trailer's length")
    }

    /// Where the trailer begins: the length of the body.
    pub fn body_len(&self) -> u64 {
        u64::from(self.index_offset) + u64::from(self.index_len)
    }

    /// Number of the segment.
    pub fn seq(&self) -> Seq {
        self.header.seq
    }
}

fn signed_message(trailer: &[u8]) -> Vec<u8> {
    [SIGNATURE_CONTEXT, trailer].concat()
}

/// The head that a trailer's bytes make.
pub fn head_of(seq: Seq, trailer: &[u8; TRAILER_LEN]) -> Head {
    Head { seq, hash: crate::crypto::hash(trailer) }
}

/// Whether the file still holds the segment that ends with `head`: read through, its hashes compared.
pub fn is_whole(file: &FileRef, head: Head) -> std::io::Result<bool> {
    let (tail, size) = file.suffix(TRAILER_LEN as u64)?;
    let Ok(UncheckedTrailer { bytes, trailer }) = UncheckedTrailer::parse(&tail, "") else {
        return Ok(false);
    };
    if head_of(head.seq, &bytes) != head {
        return Ok(false);
    }
    let open = file.disk.open(&file.path, Mode::Read)?;
    let (mut hasher, mut piece, mut at) = (Hasher::default(), vec![0; PIECE], 0);
    let end = size - TRAILER_LEN as u64;
    while at < end {
        let len = (end - at).min(PIECE as u64);
        let Some(piece) = piece.get_mut(..len as usize) else { break };
        open.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += len;
    }
    Ok(hasher.finish() == trailer.body_hash)
}

impl UncheckedTrailer {
    /// What it says, believed by nobody: to show what lies on this host's own disk to who has no key.
    pub fn unverified(&self) -> &Trailer {
        &self.trailer
    }

    /// Takes the last [`TRAILER_LEN`] bytes of `tail` apart; `object` is for the message.
    pub fn parse(tail: &[u8], object: &str) -> Result<UncheckedTrailer> {
        let bad = |detail| Error::corrupt(object, detail);
        let bytes = tail
            .last_chunk::<TRAILER_LEN>()
            .ok_or_else(|| bad("too short for a segment; if it is there by mistake, take it out of log/"))?;
        let mut fields = Fields(bytes);
        if fields.bytes() != Some(TRAILER_MAGIC) {
            return Err(bad("has no segment trailer"));
        }
        check_version(fields.u16(), object)?;
        let trailer = Self::fields(&mut fields, object)?.ok_or_else(|| bad("damaged segment trailer"))?;
        Ok(UncheckedTrailer { bytes: *bytes, trailer })
    }

    fn fields(fields: &mut Fields<'_>, object: &str) -> Result<Option<Trailer>> {
        let mut plain = || {
            let kind = Kind::from_u16(fields.u16()?)?;
            let [index_offset, index_len, frame_count, commit_count, synced] =
                [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
            let first_commit = CommitNo(fields.u64()?);
            let last_commit = CommitNo(fields.u64()?);
            let first_time = fields.time()?;
            let last_time = fields.time()?;
            let stored = Seq(fields.u64()?);
            let prev = Head { seq: Seq(fields.u64()?), hash: Hash(fields.bytes()?) };
            if prev.seq.0 == 0 && prev.hash != Hash::default() {
                return None;
            }
            if first_commit > last_commit || last_commit.0 > NUMBER_MAX {
                return None;
            }
            Some(Trailer {
                kind,
                header: Header {
                    volume: VolumeId([0; 16]),
                    seq: Seq(0),
                    epoch: Epoch(0),
                    key_id: 0,
                    salt: [0; 32],
                },
                prev: (prev.seq.0 != 0).then_some(prev),
                body_hash: Hash(fields.bytes()?),
                index_offset,
                index_len,
                index_salt: fields.bytes()?,
                frame_count,
                commit_count,
                first_commit,
                last_commit,
                first_time,
                last_time,
                synced,
                stored,
            })
        };
        let Some(mut trailer) = plain() else { return Ok(None) };
        trailer.header = UncheckedHeader::parse(fields.0, object)?.0;
        Ok(Some(trailer))
    }

    /// The trailer and the head it makes, once its signature is the writer's and it says of the object (its name's
    /// `seq`, its `size` in bytes) what is the case.
    pub fn verify(self, ctx: &VolumeContext, seq: Seq, size: u64, object: &str) -> Result<(Trailer, Head)> {
        let (signed, signature) = self.bytes.split_at(TRAILER_SIGNED);
        let signature = signature.first_chunk().expect("the trailer ends with a signature");
        if ctx.writer_public.verify(&signed_message(signed), signature).is_err() {
            return Err(Error::corrupt(object, "the trailer's signature is not the writer's"));
        }
        let trailer = self.trailer;
        UncheckedHeader(trailer.header).verify(ctx, seq, object)?;
        if trailer.body_len() + TRAILER_LEN as u64 != size || (trailer.index_offset as usize) < HEADER_LEN {
            return Err(Error::corrupt(
                object,
                format!("is {size} bytes, its trailer says {}", trailer.body_len() + TRAILER_LEN as u64),
            ));
        }
        if trailer.prev.is_some_and(|p| p.seq >= seq) {
            return Err(Error::corrupt(object, "names a later segment as the one before it"));
        }
        Ok((trailer, head_of(seq, &self.bytes)))
    }
}
