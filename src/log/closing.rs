//! The bytes that close a segment: sealed index and signed trailer. Used by the writer, and by recovery for what a
//! crash left open. No I/O.
//! Invariant: what is handed out has been read back and says what was meant.

use super::segment::{
    Header, Index, Kind, SegmentCipher, Trailer, UncheckedTrailer, VolumeContext, segment_name,
};
use super::{Error, Result};
use crate::crypto::Hasher;
use crate::types::{CommitNo, FrameKind, Head, Seq};

/// What a closed segment says beside its own frames.
pub(super) struct Ending<'a> {
    pub ctx: &'a VolumeContext,
    pub kind: Kind,
    pub prev: Option<Head>,
    pub last_commit: CommitNo,
    pub stored: Seq,
}

/// The bytes that close a segment, and the head they make.
pub(super) struct Closing {
    pub bytes: Vec<u8>,
    pub head: Head,
}

impl Ending<'_> {
    /// Index frame and trailer for a segment of `header` whose first `end` bytes hold the frames of `index` and
    /// have gone through `hasher`. `index_salt` has never been used before.
    pub fn bytes(
        &self,
        header: Header,
        index: &Index,
        mut hasher: Hasher,
        end: u64,
        synced: u64,
        index_salt: [u8; 32],
    ) -> Result<Closing> {
        let object = segment_name(header.seq);
        let refuse = |why: &str| Error::Refused(format!("{object} cannot be closed: {why}"));
        let signer = self.ctx.signer.as_ref().ok_or_else(|| refuse("no signing key"))?;
        let index_offset = u32::try_from(end).map_err(|_| refuse("too long"))?;
        let cipher = SegmentCipher::for_index(self.ctx, header, &index_salt);
        let mut bytes = Vec::new();
        let index_len = cipher.seal_into(index_offset, FrameKind::Index, &index.encode(), &mut bytes).len;
        hasher.update(&bytes);
        let (first, last) = (index.commits.first(), index.commits.last());
        let trailer = Trailer {
            kind: self.kind,
            header,
            prev: self.prev,
            body_hash: hasher.finish(),
            index_offset,
            index_len,
            index_salt,
            frame_count: index.frames.len() as u32,
            commit_count: index.commits.len() as u32,
            first_commit: first.map(|c| c.no).unwrap_or_default(),
            last_commit: last.map_or(self.last_commit, |c| c.no),
            first_time: first.map(|c| c.time).unwrap_or_default(),
            last_time: last.map(|c| c.time).unwrap_or_default(),
            synced: synced.min(end) as u32,
            stored: self.stored,
        };
        bytes.extend_from_slice(&trailer.encode(signer));
        // What leaves this host is what we meant: a key file whose halves do not match is found out here.
        let size = end + bytes.len() as u64;
        let (read_back, head) =
            UncheckedTrailer::parse(&bytes, &object)?.verify(self.ctx, header.seq, size, &object)?;
        if read_back != trailer {
            return Err(refuse("its trailer does not read back"));
        }
        Ok(Closing { bytes, head })
    }
}
