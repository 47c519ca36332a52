//! The list of commits in a store, the newest first.
//! Invariant: what is listed lies in the chain; each batch of segments continues the one before it.

use super::chain::{ChainStart, End, Place, Source, Walk, follow, list_store, windowed};
use super::segment::{Index, VolumeContext, segment_name};
use super::{CommitInfo, Error, Result};
use crate::store::Store;
use crate::types::{Head, Seq, Timestamp};
use futures::{FutureExt, TryStreamExt};

/// Segments whose commits are listed at once.
const LISTED_AT_ONCE: usize = 32;

/// Every commit that the store holds, in order.
#[cfg(test)]
pub(super) async fn list_commits(ctx: &VolumeContext, store: &dyn Store) -> Result<Vec<CommitInfo>> {
    let mut commits = list_newest(ctx, store, ChainStart::default(), None, usize::MAX).await?;
    commits.reverse();
    Ok(commits)
}

/// The newest commits in the store, the newest first: at most `limit`, and none from before `since`. Segments before
/// `start` are not looked at. Each segment that is read costs a request, or two where it is large; the others only their
/// place in a list, and a small request where the volume was taken over since then.
pub async fn list_newest(
    ctx: &VolumeContext,
    store: &dyn Store,
    start: ChainStart,
    since: Option<Timestamp>,
    limit: usize,
) -> Result<Vec<CommitInfo>> {
    let found = list_store(store, start.replay_seq).await?;
    let sources: Vec<_> = found.into_iter().map(|seq| Source { seq, place: Place::Store(store) }).collect();
    // Within an epoch the numbers are without gaps, so that the list alone tells what is the chain. Where the volume was
    // taken over it does not, and then the links do not fit.
    let unbroken =
        |(first, last): (&Source<'_>, &Source<'_>)| last.seq.0 - first.seq.0 == sources.len() as u64 - 1;
    if sources.first().zip(sources.last()).is_none_or(unbroken) {
        match newest_of(ctx, &sources, since, limit).await {
            Err(Error::Corrupt { .. }) => {}
            found => return found,
        }
    }
    let sources = members(ctx, sources, &start).await?;
    newest_of(ctx, &sources, since, limit).await
}

/// The commits of `sources`, which make up a chain.
async fn newest_of(
    ctx: &VolumeContext,
    sources: &[Source<'_>],
    since: Option<Timestamp>,
    limit: usize,
) -> Result<Vec<CommitInfo>> {
    let mut commits = Vec::new();
    let mut behind: Option<(Option<Head>, Seq)> = None;
    for sources in sources.rchunks(LISTED_AT_ONCE) {
        let ends: Vec<(End, Index)> =
            windowed(sources, |source| source.indexed(ctx).boxed()).try_collect().await?;
        let Some((oldest, _)) = ends.first() else { break };
        let mut walk = Walk::before(oldest);
        for (end, _) in &ends {
            walk.step(end, &segment_name(end.head.seq))?;
        }
        if let Some((prev, seq)) = behind
            && prev != walk.head
        {
            return Err(Error::corrupt(segment_name(seq), "does not continue the segment before it"));
        }
        behind = Some((oldest.trailer.prev, oldest.head.seq));
        let mut passed = false;
        for (end, index) in ends.iter().rev() {
            for commit in index.commits.iter().rev() {
                passed |= since.is_some_and(|since| commit.time < since) || commits.len() >= limit;
                if !passed {
                    let (no, time, head) = (commit.no, commit.time, end.head);
                    commits.push(CommitInfo { no, time, seq: head.seq, head });
                }
            }
        }
        if passed || commits.len() >= limit {
            break;
        }
    }
    Ok(commits)
}

/// Those of `sources` that belong to the chain.
async fn members<'a>(
    ctx: &VolumeContext,
    sources: Vec<Source<'a>>,
    start: &ChainStart,
) -> Result<Vec<Source<'a>>> {
    let Some(first) = sources.first() else { return Ok(sources) };
    let oldest = first.trailer(ctx).await?;
    // The collector may have taken the beginning of the chain away: the first one left is where we start.
    let mut walk = if start.prev.is_none() { Walk::before(&oldest) } else { Walk::begin(start) };
    let mut chain = Vec::new();
    let mut take = |_: &mut Walk, _, end: &End, ()| {
        chain.push(end.head.seq);
        Ok(true)
    };
    let damage = follow(ctx, &sources, &mut walk, |source| source.bare(ctx), &mut take).await?;
    if let Some(damage) = damage {
        ::log::warn!("the list of versions ends early: {damage}");
    }
    Ok(sources.into_iter().filter(|source| chain.binary_search(&source.seq).is_ok()).collect())
}
