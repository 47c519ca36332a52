//! What a store tells about its volume to somebody who does not mount it.
//! Invariant: only what is signed by the volume's writer is believed.

use super::opening::{context, list_checkpoints, stored_root};
use crate::crypto::keyfile::KeyFile;
use crate::log::chain::ChainStart;
use crate::log::listing::list_newest;
use crate::log::segment::VolumeContext;
use crate::log::{CommitInfo, Error, Result, chain};
use crate::ops::init::load_superblock;
use crate::store::Store;
use crate::tree::checkpoint;
use crate::types::{CommitNo, Head, Timestamp, VolumeId};
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
        None => ChainStart::default(),
    };
    let commits = list_newest(&ctx, store, from, since, limit).await?;
    Ok(commits.into_iter().map(|commit| (commit, marked.contains(&commit.no))).collect())
}

/// The segment behind the newest checkpoint that is older than `since`: all commits from then on lie behind it. A few
/// requests among many checkpoints, for they are in the order of their times.
async fn checkpoint_before(
    ctx: &VolumeContext,
    store: &dyn Store,
    names: &[String],
    since: Timestamp,
) -> Result<ChainStart> {
    let (mut low, mut high, mut best) = (0, names.len(), ChainStart::default());
    while let Some(name) = names.get(usize::midpoint(low, high)).filter(|_| low < high) {
        let middle = usize::midpoint(low, high);
        match stored_root(ctx, store, name).await {
            Err(Error::Store(e)) => return Err(e.into()),
            Ok(root) if root.time < since => {
                best = root.chain_start();
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
            let root = stored_root(&ctx, store, name).await?;
            Some((root.commit, root.time, root.chain_start()))
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
        newest_segment: end.head,
        last_commit: behind.or(newest_checkpoint),
        newest_checkpoint,
    })
}
