//! What a store tells about its volume to somebody who does not mount it.
//! Invariant: only what is signed by the volume's writer is believed.

use super::opening::context;
use super::opening::list_checkpoints;
use crate::crypto::keyfile::KeyFile;
use crate::log::chain::ChainStart;
use crate::log::{CommitInfo, Error, Result, chain};
use crate::ops::init::load_superblock;
use crate::store::Store;
use crate::tree::checkpoint;
use crate::types::{CommitNo, Seq, Timestamp, VolumeId};
use std::collections::HashSet;

/// A volume as its store shows it.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: VolumeId,
    /// Number of the newest segment.
    pub newest_segment: Option<Seq>,
    /// Newest commit and its time.
    pub last_commit: Option<(CommitNo, Timestamp)>,
    /// Newest checkpoint and its commit's time.
    pub newest_checkpoint: Option<(CommitNo, Timestamp)>,
}

/// Every commit in the store, in order, and whether a checkpoint stands at it.
pub async fn versions(store: &dyn Store, key: &KeyFile) -> Result<Vec<(CommitInfo, bool)>> {
    let (superblock, _) = load_superblock(store, key).await?;
    let ctx = context(key, &superblock)?;
    let names = list_checkpoints(store).await?;
    let marked: HashSet<CommitNo> = names.iter().filter_map(|name| checkpoint::commit_of(name)).collect();
    let commits = chain::list_commits(&ctx, store).await?;
    Ok(commits.into_iter().map(|commit| (commit, marked.contains(&commit.no))).collect())
}

/// The volume's name and newest points.
pub async fn summary(store: &dyn Store, key: &KeyFile) -> Result<Summary> {
    let (superblock, _) = load_superblock(store, key).await?;
    let ctx = context(key, &superblock)?;
    let newest_checkpoint = match list_checkpoints(store).await?.first() {
        Some(name) => {
            let (bytes, _) = store.get_suffix(name, 64 << 10).await.map_err(Error::Store)?;
            let root = checkpoint::open(&bytes, name, ctx.id, &ctx.key, &ctx.writer_public)?;
            let start = ChainStart { replay_seq: root.replay_seq, prev: root.replay_prev };
            Some((root.commit, root.time, start))
        }
        None => None,
    };
    let start = newest_checkpoint.map_or_else(ChainStart::default, |(_, _, start)| start);
    let end = chain::end_in_store(&ctx, store, &start).await?;
    let behind = end.last_time.map(|time| (end.last_commit, time));
    let newest_checkpoint = newest_checkpoint.map(|(no, time, _)| (no, time));
    Ok(Summary {
        name: superblock.name,
        id: superblock.volume,
        newest_segment: end.head.map(|head| head.seq),
        last_commit: behind.or(newest_checkpoint),
        newest_checkpoint,
    })
}
