//! What a store tells about its volume to somebody who does not mount it.
//! Invariant: only what is signed by the volume's writer is believed.

use super::opening::context;
use super::opening::list_checkpoints;
use crate::crypto::keyfile::KeyFile;
use crate::log::segment::VolumeContext;
use crate::log::{CommitInfo, Error, Result, chain};
use crate::ops::init::load_superblock;
use crate::store::Store;
use crate::tree::checkpoint;
use crate::types::{CommitNo, Head, Seq, Timestamp, VolumeId};
use std::collections::HashSet;

/// A volume as its store shows it.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: VolumeId,
    /// The newest segment.
    pub newest_segment: Option<Head>,
    /// Newest commit and its time.
    pub last_commit: Option<(CommitNo, Timestamp)>,
    /// Newest checkpoint and its commit's time.
    pub newest_checkpoint: Option<(CommitNo, Timestamp)>,
}

/// The newest commits in the store, the newest first, and whether a checkpoint stands at each: at most `limit`, and none
/// from before `since`.
pub async fn versions(
    store: &dyn Store,
    key: &KeyFile,
    since: Option<Timestamp>,
    limit: usize,
) -> Result<Vec<(CommitInfo, bool)>> {
    let (superblock, _) = load_superblock(store, key).await?;
    let ctx = context(key, &superblock)?;
    let names = list_checkpoints(store).await?;
    let marked: HashSet<CommitNo> = names.iter().filter_map(|name| checkpoint::commit_of(name)).collect();
    let from = match since {
        Some(since) => checkpoint_before(&ctx, store, &names, since).await?,
        None => Seq(0),
    };
    let commits = chain::list_newest(&ctx, store, from, since, limit).await?;
    Ok(commits.into_iter().map(|commit| (commit, marked.contains(&commit.no))).collect())
}

/// The segment behind the newest checkpoint that is older than `since`: all commits from then on lie behind it. A few
/// requests among many checkpoints, for they are in the order of their times.
async fn checkpoint_before(
    ctx: &VolumeContext,
    store: &dyn Store,
    names: &[String],
    since: Timestamp,
) -> Result<Seq> {
    let (mut low, mut high, mut best) = (0, names.len(), Seq(0));
    while let Some(name) = names.get(usize::midpoint(low, high)).filter(|_| low < high) {
        let middle = usize::midpoint(low, high);
        let (bytes, _) = store.get_suffix(name, 64 << 10).await.map_err(Error::Store)?;
        match checkpoint::open(&bytes, name, ctx.id, &ctx.key, &ctx.writer_public) {
            Ok(root) if root.time < since => {
                best = root.replay_seq;
                high = middle;
            }
            Ok(_) => low = middle + 1,
            Err(e) => {
                // It only tells where to begin: from the beginning, then.
                ::log::warn!("{e}");
                return Ok(best);
            }
        }
    }
    Ok(best)
}

/// The volume's name and newest points.
pub async fn summary(store: &dyn Store, key: &KeyFile) -> Result<Summary> {
    let (superblock, _) = load_superblock(store, key).await?;
    let ctx = context(key, &superblock)?;
    let newest_checkpoint = match list_checkpoints(store).await?.first() {
        Some(name) => {
            let (bytes, _) = store.get_suffix(name, 64 << 10).await.map_err(Error::Store)?;
            let root = checkpoint::open(&bytes, name, ctx.id, &ctx.key, &ctx.writer_public)?;
            Some((root.commit, root.time, root.replay_seq))
        }
        None => None,
    };
    let from = newest_checkpoint.map_or(Seq(1), |(_, _, seq)| seq);
    let newest = chain::newest(&ctx, store, from).await?;
    let behind = newest.and_then(|newest| newest.commit);
    let at_checkpoint = newest_checkpoint.map(|(no, time, _)| (no, time));
    Ok(Summary {
        name: superblock.name,
        id: superblock.volume,
        newest_segment: newest.map(|newest| newest.head),
        last_commit: behind.or(at_checkpoint),
        newest_checkpoint: at_checkpoint,
    })
}
