//! The root record, and the checkpoint object in which it is published.
//! Invariant: a checkpoint opens only for the volume, the commit and the writer it was sealed for, under the name it
//! was published under; its root refers to no segment after the one that holds the record.

use super::codec::{PTR_LEN, Reader, put_ptr, put_time};
use super::delta::{COUNTERS_LEN, Counters};
use crate::clock::Env;
use crate::crypto::keys::{Purpose, VolumeKey};
use crate::crypto::seal::{Sealer, TAG_LEN};
use crate::crypto::sign::{PublicKey, SIGNATURE_LEN, SecretKey};
use crate::log::chain::ChainStart;
use crate::log::{Error, Result};
use crate::types::{CommitNo, FramePtr, Hash, Head, Seq, Timestamp, VolumeId};

const ROOT_VERSION: u8 = 1;
const HAS_TREE: u8 = 1;
const HAS_PREV: u8 = 1 << 1;
const ROOT_LEN: usize = 2 + 8 + 12 + COUNTERS_LEN + 8 + 8 + PTR_LEN + 8 + 32;

const MAGIC: &[u8; 8] = b"EmbFSckp";
const VERSION: u8 = 1;
const SALT_LEN: usize = 32;
const HEADER_LEN: usize = MAGIC.len() + 1 + 16 + 8 + 4 + SALT_LEN;

/// The key is derived with a fresh salt and seals once.
const NONCE: u64 = 0;

const PREFIX: &str = "checkpoint/";

/// The state of the volume as of one commit: where its tree is, and where the log goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Root {
    /// The root page; `None` when the tree is empty.
    pub tree: Option<FramePtr>,
    /// The newest commit that is in the tree.
    pub commit: CommitNo,
    /// When that commit was made.
    pub time: Timestamp,
    /// The volume's counters as of that commit.
    pub counters: Counters,
    /// The first segment with commits after it.
    pub replay_seq: Seq,
    /// The segment before that one and the hash of its trailer, if there is one: the chain goes on from there.
    pub replay_prev: Option<Head>,
    /// The segment that holds this record's ROOT frame.
    pub root_seq: Seq,
}

impl Root {
    /// Where the log goes on behind it.
    pub fn chain_start(&self) -> ChainStart {
        ChainStart { replay_seq: self.replay_seq, prev: self.replay_prev }
    }

    /// The body of the ROOT frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ROOT_LEN);
        let flag = |there, bit| if there { bit } else { 0 };
        let flags = flag(self.tree.is_some(), HAS_TREE) | flag(self.replay_prev.is_some(), HAS_PREV);
        out.extend_from_slice(&[ROOT_VERSION, flags]);
        out.extend_from_slice(&self.commit.0.to_le_bytes());
        put_time(&mut out, self.time);
        self.counters.put(&mut out);
        out.extend_from_slice(&self.root_seq.0.to_le_bytes());
        out.extend_from_slice(&self.replay_seq.0.to_le_bytes());
        match self.tree {
            Some(tree) => put_ptr(&mut out, tree),
            None => out.extend_from_slice(&[0; PTR_LEN]),
        }
        let prev = self.replay_prev.unwrap_or(Head { seq: Seq(0), hash: Hash::default() });
        out.extend_from_slice(&prev.seq.0.to_le_bytes());
        out.extend_from_slice(&prev.hash.0);
        out
    }

    /// The record in the body of a ROOT frame; errors name `object`.
    pub fn decode(bytes: &[u8], object: &str) -> Result<Root> {
        let mut r = Reader::versioned(bytes, object, ROOT_VERSION)?;
        let flags = r.u8()?;
        let (commit, time) = (CommitNo(r.number()?), r.time()?);
        let counters = Counters::take(&mut r)?;
        let (root_seq, replay_seq) = (Seq(r.number()?), Seq(r.number()?));
        let tree = r.ptr()?;
        let prev = Head { seq: Seq(r.number()?), hash: Hash(r.array()?) };
        r.finish()?;
        let root = Root {
            tree: (flags & HAS_TREE != 0).then_some(tree),
            commit,
            time,
            counters,
            replay_seq,
            replay_prev: (flags & HAS_PREV != 0).then_some(prev),
            root_seq,
        };
        // Also refuses unknown flags and bytes in the place of what is not there.
        if root.encode() != bytes {
            return Err(r.bad("the root record has parts that this program does not know"));
        }
        if root.tree.is_some_and(|tree| tree.seq > root_seq) {
            return Err(r.bad("the root refers to a segment after its own"));
        }
        if root.replay_prev.is_some_and(|prev| prev.seq >= replay_seq) {
            return Err(r.bad("the segments before and after the commit are not in order"));
        }
        if root.replay_prev.is_none() && replay_seq != Seq(1) {
            return Err(r.bad("the log goes on in the middle, behind nothing"));
        }
        Ok(root)
    }
}

/// What a checkpoint object says without a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Whose checkpoint it is.
    pub volume: VolumeId,
    /// The commit whose state it is.
    pub commit: CommitNo,
    /// The volume key it is sealed under.
    pub key_id: u32,
}

/// The name of the checkpoint of `commit`; the newest sorts first.
pub fn name(commit: CommitNo) -> String {
    format!("{PREFIX}{:016x}", u64::MAX - commit.0)
}

/// The commit whose checkpoint has this name, if it is such a name.
pub fn commit_of(object: &str) -> Option<CommitNo> {
    let digits = object.strip_prefix(PREFIX)?;
    let commit = CommitNo(u64::MAX - u64::from_str_radix(digits, 16).ok()?);
    (name(commit) == object).then_some(commit) // upper case, a sign or another length
}

/// The checkpoint object that publishes `root`, to be stored as [`name`]`(root.commit)`.
pub fn seal(
    root: &Root,
    volume: VolumeId,
    key: &VolumeKey,
    key_id: u32,
    signer: &SecretKey,
    env: &Env,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + ROOT_LEN + TAG_LEN + SIGNATURE_LEN);
    out.extend_from_slice(MAGIC);
    out.push(VERSION);
    out.extend_from_slice(&volume.0);
    out.extend_from_slice(&root.commit.0.to_le_bytes());
    out.extend_from_slice(&key_id.to_le_bytes());
    out.extend_from_slice(&env.random_bytes::<SALT_LEN>());
    let sealer = Sealer::new(&key.derive(Purpose::Checkpoint, &out));
    let mut body = root.encode();
    let tag = sealer.seal(NONCE, &out, &mut body);
    out.extend_from_slice(&body);
    out.extend_from_slice(&tag);
    let signature = signer.sign(&out);
    out.extend_from_slice(&signature);
    out
}

/// What the checkpoint that was stored as `object` says without a key, after its signature has been checked.
pub fn verify(bytes: &[u8], object: &str, volume: VolumeId, writer: &PublicKey) -> Result<Header> {
    let mut r = Reader::new(bytes, object);
    if r.array()? != *MAGIC {
        return Err(r.bad("not a checkpoint"));
    }
    let version = r.u8()?;
    if version != VERSION {
        return Err(r.bad(format!("format version {version}; this program knows {VERSION}")));
    }
    let header = Header { volume: VolumeId(r.array()?), commit: CommitNo(r.u64()?), key_id: r.u32()? };
    let signed = bytes.split_last_chunk::<SIGNATURE_LEN>();
    match signed {
        Some((signed, signature)) if writer.verify(signed, signature).is_ok() => {}
        _ => return Err(r.bad("not signed by the volume's writer, or damaged")),
    }
    if header.volume != volume {
        return Err(r.bad(format!("a checkpoint of volume {}", header.volume)));
    }
    if commit_of(object) != Some(header.commit) {
        return Err(r.bad(format!("the checkpoint of commit {} under another name", header.commit.0)));
    }
    Ok(header)
}

/// The root record in the checkpoint that was stored as `object`.
pub fn open(
    bytes: &[u8],
    object: &str,
    volume: VolumeId,
    key: &VolumeKey,
    writer: &PublicKey,
) -> Result<Root> {
    let header = verify(bytes, object, volume, writer)?;
    let mut r = Reader::new(bytes, object);
    let associated = r.take(HEADER_LEN)?;
    let mut body = r.array::<ROOT_LEN>()?;
    let tag = r.array::<TAG_LEN>()?;
    r.array::<SIGNATURE_LEN>()?;
    r.finish()?;
    let sealer = Sealer::new(&key.derive(Purpose::Checkpoint, associated));
    sealer.open(NONCE, associated, &mut body, &tag).map_err(|_| {
        Error::corrupt(object, format!("does not open under this volume key (key id {})", header.key_id))
    })?;
    let root = Root::decode(&body, object)?;
    if root.commit != header.commit {
        return Err(Error::corrupt(object, "header and record name different commits"));
    }
    Ok(root)
}
