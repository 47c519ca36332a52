//! What the store must still hold: the segment that its newest checkpoint stands on, and what this host has sent.
//! Invariant: nothing is shown, put or claimed over a hole that can be known of here. What the store has lost is sent
//! again where it lies whole on this host; else it is named, with the way out.

use super::divergent::{MARK_MAX, newest_end};
use super::durable::Position;
use super::opening::{self, Opened};
use super::proof::ProvenStore;
use super::trust;
use crate::log::chain::{self, ChainStart, Walk};
use crate::log::claim;
use crate::log::follow::{Witness, rolled_back};
use crate::log::recovery::Recovered;
use crate::log::segment::{Kind, VolumeContext, segment_name};
use crate::log::statedir::StateDir;
use crate::log::{ClosedSegment, Error, Result};
use crate::store::{Store, StoreError};
use crate::tree::checkpoint::{self, Root};
use crate::types::{CommitNo, Head};

/// A checkpoint is put after the segments that it stands on: one that stands on a segment behind the end of the chain says
/// that the store has lost that segment.
pub(super) fn stands(root: Option<&Root>, end: Option<Head>) -> Result<()> {
    let Some(root) = root.filter(|root| end.is_none_or(|end| end.seq < root.root_seq)) else { return Ok(()) };
    let (checkpoint, segment) = (checkpoint::name(root.commit), segment_name(root.root_seq));
    Err(Error::corrupt(
        &segment,
        format!(
            "ROLLBACK: {checkpoint} stands on this segment, and the store's newest is {}: the store was rolled back, or lost \
             it. Ask the store's operator for it. Until then earlier versions can be mounted (--at). If it is lost for good, \
             take {checkpoint} out of the store: what is left then ends where the log does",
            end.map_or_else(|| "none".into(), |end| segment_name(end.seq))
        ),
    ))
}

/// Whether the segment that a checkpoint stands on is here or in the store.
pub(super) async fn has_root(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    root: &Root,
) -> Result<bool> {
    let Some(store) = store.filter(|_| dir.disk().size(&dir.log_path(root.root_seq)).is_err()) else {
        return Ok(true);
    };
    match chain::stored_head(ctx, store, root.root_seq).await {
        Ok(_) => Ok(true),
        Err(Error::Store(StoreError::NotFound { .. })) => {
            let (checkpoint, segment) = (checkpoint::name(root.commit), segment_name(root.root_seq));
            ::log::error!(
                "{segment}: missing, though {checkpoint} stands on it; passing over to an older checkpoint"
            );
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// The newest checkpoint in the store, and the end of the chain behind it.
pub(super) async fn chain_in_store(ctx: &VolumeContext, store: &dyn Store) -> Result<(Option<Root>, Walk)> {
    let root = opening::stored_checkpoint(ctx, store).await?;
    let start = root.map_or_else(ChainStart::default, |root| root.chain_start());
    let mut walk = chain::end_in_store(ctx, store, &start).await?;
    newest_end(ctx, store, &mut walk).await?;
    stands(root.as_ref(), walk.head)?;
    Ok((root, walk))
}

/// A writer whose store ends before what this host knows was stored there: what is missing is sent again.
pub(super) async fn send_again(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: &ProvenStore,
    opened: &Opened,
) -> Result<()> {
    let Some(newest) = opened.recovered.store_newest else { return Ok(()) };
    let local = &opened.recovered.local;
    let before = left(opened, local.iter());
    let stored = local.iter().map(|segment| segment.stored).chain(before.map(|prev| prev.seq)).max();
    if stored.is_none_or(|stored| stored <= newest) {
        return Ok(());
    }
    let mut lost = Vec::new();
    let mut at = before.or(opened.recovered.head);
    while let Some(head) = at {
        match chain::stored_head(ctx, store, head.seq).await {
            Ok(there) if there == head => break,
            Ok(there) => return Err(crate::log::follow::forked(Witness::Seen, head, there)),
            Err(Error::Store(StoreError::NotFound { .. })) => {}
            Err(e) => return Err(e),
        }
        let places = [dir.log_path(head.seq), dir.cache_path(head.seq)];
        let whole = places.into_iter().map(|path| dir.file(path)).find_map(|file| {
            let (found, prev) = chain::whole(ctx, head.seq, &file.read().ok()?)?;
            (found == head).then_some((file, prev))
        });
        let Some((file, prev)) = whole else { return Err(rolled_back(Witness::Seen, head, Some(newest))) };
        lost.push((head.seq, file));
        at = prev;
    }
    if !lost.is_empty() {
        let (first, last) = (lost.last().map(|(seq, _)| *seq), lost.first().map(|(seq, _)| *seq));
        ::log::error!(
            "ROLLBACK: the store has lost {} segments that this host had sent, {} to {}: they are here, and are sent again. \
             Ask the store's operator how they were lost, and run 'embassyfs verify'",
            lost.len(),
            segment_name(first.unwrap_or_default()),
            segment_name(last.unwrap_or_default())
        );
    }
    for (seq, file) in lost.into_iter().rev() {
        match store.put_file(&segment_name(seq), &file).await {
            Ok(()) | Err(StoreError::AlreadyExists { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// What is durable where when a writer begins, whose segments in `log/` are `sent` or `unsent`.
pub(super) fn position(opened: &Opened, sent: &[ClosedSegment], unsent: &[ClosedSegment]) -> Position {
    let local = opened.recovery.last_commit;
    let remote = unsent.first().map_or(local, |first| {
        sent.iter().rev().find(|s| s.head.seq < first.head.seq).map_or(CommitNo(0), |s| s.last_commit)
    });
    let left = left(opened, sent.iter().chain(unsent));
    Position { local, remote, remote_head: sent.last().map(|segment| segment.head).or(left) }
}

/// The segment that the replay began behind, if it is not among those in `log/`: then it was sent, for nothing else leaves.
fn left<'a>(opened: &Opened, mut here: impl Iterator<Item = &'a ClosedSegment>) -> Option<Head> {
    let prev = opened.root.and_then(|root| root.replay_prev)?;
    (!here.any(|segment| segment.head.seq == prev.seq)).then_some(prev)
}

/// A claim that a `promote` has left in `log/`, and of which it is not known here whether it won. To go on with it is
/// not a mount's to do.
pub(super) fn refuse_unfinished(ctx: &VolumeContext, dir: &StateDir, recovered: &Recovered) -> Result<()> {
    let Some(last) = recovered.local.last().filter(|last| last.len <= MARK_MAX) else { return Ok(()) };
    let name = segment_name(last.head.seq);
    let Some(bytes) = dir.read(&name)? else { return Ok(()) };
    let claim = claim::read_marked(ctx, last.head.seq, &bytes).is_ok_and(|mark| mark.kind == Kind::Claim);
    if !claim || trust::read_pin(dir)?.is_some_and(|pin| pin.seq >= last.head.seq) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "a 'promote' or 'accept' with {} did not come to its end: its claim is {name}, and whether the store has taken it is \
         not known. Run it again with the same --state: it goes on where it stopped. A mount takes no volume over",
        dir.root().display()
    )))
}
