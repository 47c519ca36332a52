//! Segments as somebody makes them who has the keys and means harm: whatever is asked for is sealed, indexed and signed.
//! Invariant: what comes out authenticates; that it makes no sense is the caller's wish. Bytes: `docs/format.md`.
#![allow(dead_code)] // no user uses all of it
use embassyfs::crypto::hash;
use embassyfs::crypto::keys::VolumeKey;
use embassyfs::crypto::seal::BulkSealer;
use embassyfs::crypto::sign::SecretKey;
use embassyfs::log::segment::{
    DeltaHeader, HEADER_LEN, Header, Index, IndexedCommit, Kind, SegmentCipher, TRAILER_LEN, Trailer,
    VolumeContext, head_of,
};
use embassyfs::types::{CommitNo, Epoch, FrameKind, FramePtr, Hash, Head, Seq, Timestamp, VolumeId};

pub const TIME: Timestamp = Timestamp { secs: 1_700_000_000, nanos: 0 };

/// A volume with known keys.
pub fn volume() -> VolumeContext {
    let signer = SecretKey::from_bytes(&[0x5e; 32]);
    VolumeContext {
        id: VolumeId(*b"embassyfs-volume"),
        key: VolumeKey::from_bytes([0x4b; 32]),
        key_id: 7,
        writer_public: signer.public(),
        signer: Some(signer),
    }
}

/// A segment in the making.
pub struct Segment {
    pub header: Header,
    pub bytes: Vec<u8>,
    pub index: Index,
    ctx: VolumeContext,
    cipher: SegmentCipher,
}

impl Segment {
    pub fn new(ctx: &VolumeContext, seq: Seq, epoch: Epoch) -> Segment {
        let header = Header { volume: ctx.id, seq, epoch, key_id: ctx.key_id, salt: [seq.0 as u8; 32] };
        let cipher = SegmentCipher::new(ctx, header);
        let (bytes, index) = (header.encode().to_vec(), Index::default());
        Segment { header, bytes, index, ctx: ctx.clone(), cipher }
    }

    /// A frame as the program itself makes it.
    pub fn frame(&mut self, kind: FrameKind, plain: &[u8]) -> FramePtr {
        let offset = self.bytes.len() as u32;
        let ptr = self.cipher.seal_into(offset, kind, plain, &mut self.bytes);
        self.index.frames.push((kind, offset, ptr.len));
        ptr
    }

    /// A frame with these contents behind a prefix that says what it likes, but for its length.
    pub fn raw_frame(&mut self, kind: FrameKind, flags: u8, contents: &[u8]) -> FramePtr {
        let offset = self.bytes.len() as u32;
        let len = (contents.len() + 24) as u32;
        let frame = seal_raw(&self.ctx, &self.header, offset, kind as u8, flags, contents);
        self.bytes.extend_from_slice(&frame);
        self.index.frames.push((kind, offset, len));
        FramePtr { seq: self.header.seq, offset, len }
    }

    /// A commit of these delta bodies.
    pub fn commit(&mut self, no: u64, parts: &[Vec<u8>]) {
        let first = self.index.frames.len();
        for (i, body) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let header = DeltaHeader { no: CommitNo(no), time: TIME, part: i as u32, last, synced: 0 };
            let mut plain = Vec::new();
            header.encode_onto(&mut plain);
            plain.extend_from_slice(body);
            self.frame(FrameKind::Delta, &plain);
        }
        let deltas = first..self.index.frames.len();
        self.index.commits.push(IndexedCommit { no: CommitNo(no), time: TIME, deltas });
    }

    /// The closed segment and its head.
    pub fn close(self, prev: Option<Head>) -> (Vec<u8>, Head) {
        let index = self.index.encode();
        self.close_with(prev, &index, |_| {})
    }

    /// The same with another index, and a trailer that was bent before it was signed.
    pub fn close_with(
        self,
        prev: Option<Head>,
        index: &[u8],
        bend: impl FnOnce(&mut Trailer),
    ) -> (Vec<u8>, Head) {
        let Segment { header, mut bytes, index: honest, ctx, .. } = self;
        let index_salt = [9; 32];
        let index_offset = bytes.len() as u32;
        let sealer = SegmentCipher::for_index(&ctx, header, &index_salt);
        let index_len = sealer.seal_into(index_offset, FrameKind::Index, index, &mut bytes).len;
        let (first, last) = (honest.commits.first(), honest.commits.last());
        let mut trailer = Trailer {
            kind: Kind::Ordinary,
            header,
            prev,
            body_hash: hash(&bytes),
            index_offset,
            index_len,
            index_salt,
            frame_count: honest.frames.len() as u32,
            commit_count: honest.commits.len() as u32,
            first_commit: first.map(|c| c.no).unwrap_or_default(),
            last_commit: last.map(|c| c.no).unwrap_or_default(),
            first_time: first.map(|c| c.time).unwrap_or_default(),
            last_time: last.map(|c| c.time).unwrap_or_default(),
            synced: 0,
            stored: Seq(0),
        };
        bend(&mut trailer);
        let trailer: [u8; TRAILER_LEN] = trailer.encode(ctx.signer.as_ref().expect("a writer's"));
        bytes.extend_from_slice(&trailer);
        (bytes, head_of(header.seq, &trailer))
    }
}

/// A sealed frame whose prefix may be anything, made without the program's own writer.
pub fn seal_raw(
    ctx: &VolumeContext,
    header: &Header,
    offset: u32,
    kind: u8,
    flags: u8,
    contents: &[u8],
) -> Vec<u8> {
    let len = (contents.len() + 24) as u32;
    let prefix = [&len.to_le_bytes()[..], &[kind, flags, 0, 0]].concat();
    let place = [
        &header.volume.0[..],
        &header.seq.0.to_le_bytes(),
        &header.epoch.0.to_le_bytes(),
        &offset.to_le_bytes(),
    ];
    let associated = [&place.concat()[..], &prefix].concat();
    let mut sealed = contents.to_vec();
    let tag = BulkSealer::new(&header.frame_key(&ctx.key)).seal(offset.into(), &associated, &mut sealed);
    [&prefix[..], &sealed, &tag].concat()
}

/// A header's 96 bytes with a check value that fits what was changed in them.
pub fn fix_header(header: &mut [u8; HEADER_LEN]) {
    let check = hash(&header[..80]);
    header[80..].copy_from_slice(&check.0[..16]);
}

pub fn no_hash() -> Hash {
    Hash([0; 32])
}
