//! Where a state directory stands beside the chain in the store: which of its segments are in it, and which are not; and
//! moving aside what is not, so that the host can go on with the chain.
//! Invariant: nothing is deleted. What is moved lies in `divergent/EPOCH/`, and until the last of it has been moved, what
//! is left in `log/` is the older part of it.

use crate::log::chain::{self, stored_head};
use crate::log::claim::{self, Marked};
use crate::log::segment::{TRAILER_LEN, UncheckedTrailer, VolumeContext, segment_name};
use crate::log::statedir::StateDir;
use crate::log::{Error, Result};
use crate::store::{Store, StoreError};
use crate::types::{Epoch, Head, Seq};
use std::path::PathBuf;

/// Directory of the state directory for what is in nobody's history.
pub const DIVERGENT: &str = "divergent";
/// File in the state directory that says why this host must not write any more. A fence is for good, also when the next
/// start cannot ask the store.
pub(super) const FENCED: &str = "fenced";

/// A segment in `log/`; one that a crash left open has no head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here {
    pub seq: Seq,
    pub head: Option<Head>,
    pub prev: Option<Head>,
    pub epoch: Epoch,
    pub stored: Seq,
}

/// See the module.
pub(super) struct Standing {
    /// The newest segment in `log/` that the store's chain has too.
    pub common: Option<Here>,
    /// Those behind it, in order.
    pub tail: Vec<Here>,
}

fn here(ctx: &VolumeContext, dir: &StateDir, seq: Seq, size: u64) -> Result<Here> {
    let file = dir.file(dir.log_path(seq));
    let (tail, _) =
        file.suffix(TRAILER_LEN as u64).map_err(Error::io(format!("read {}", file.path.display())))?;
    let object = file.path.display().to_string();
    let closed = UncheckedTrailer::parse(&tail, &object).and_then(|t| t.verify(ctx, seq, size, &object));
    Ok(match closed {
        Ok((trailer, head)) => Here {
            seq,
            head: Some(head),
            prev: trailer.prev,
            epoch: trailer.header.epoch,
            stored: trailer.stored,
        },
        Err(_) => Here { seq, head: None, prev: None, epoch: Epoch(0), stored: Seq(0) },
    })
}

impl Standing {
    /// Compares `log/` with the store. What a trailer here says was stored is not asked for.
    pub async fn find(ctx: &VolumeContext, dir: &StateDir, store: &dyn Store) -> Result<Standing> {
        let mut all = Vec::new();
        for (seq, size) in dir.log_segments()? {
            all.push(here(ctx, dir, seq, size)?);
        }
        let stored = all.iter().map(|segment| segment.stored).max().unwrap_or_default();
        let mut common = None;
        let mut at = 0;
        for segment in &all {
            if segment.seq > stored {
                let there = match stored_head(ctx, store, segment.seq).await {
                    Err(Error::Store(StoreError::NotFound { .. })) => None,
                    found => Some(found?),
                };
                if segment.head.is_none() || there != segment.head {
                    break;
                }
            }
            common = Some(*segment);
            at += 1;
        }
        Ok(Standing { common, tail: all.split_off(at) })
    }
}

/// What lies in the store as segment `seq` and says something about the log.
pub(super) async fn marked(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<Marked> {
    let (bytes, size) = store.get_suffix(&segment_name(seq), 64 << 10).await?;
    if bytes.len() as u64 != size {
        return Err(Error::Refused(format!("{}: too long for a mark alone", segment_name(seq))));
    }
    claim::read_marked(ctx, seq, &bytes)
}

/// Moves what is not in the chain out of the way: local checkpoints, which may stand on it, and `tail`. Gives the
/// directory that holds it. Done again after a crash, it goes on.
pub(super) fn set_aside(dir: &StateDir, tail: &[Here], note: &str) -> Result<PathBuf> {
    let epoch = tail.iter().map(|segment| segment.epoch).max().unwrap_or_default();
    let to = format!("{DIVERGENT}/{:08x}", epoch.0);
    let at = dir.root().join(&to);
    dir.make_dirs(&to)?;
    dir.write_atomic(&format!("{to}/note.txt"), note.as_bytes())?;
    // Checkpoints first: without them nobody starts from a state that the chain does not have.
    for name in dir.checkpoints()? {
        let last = name.rsplit('/').next().unwrap_or(&name);
        dir.move_to(&name, &format!("{to}/checkpoint-{last}"))?;
    }
    dir.sync_dir(&to)?;
    dir.sync_dir("checkpoint")?;
    for segment in tail.iter().rev() {
        dir.move_to(&format!("log/{}", segment.seq), &format!("{to}/{}", segment.seq))?;
        dir.sync_dir(&to)?;
        dir.sync_dir("log")?;
    }
    ::log::warn!("{} segments that are in nobody's history lie in {}", tail.len(), at.display());
    Ok(at)
}

/// The end of the chain as it is at this moment: also when a listing is old.
pub(super) async fn newest_end(ctx: &VolumeContext, store: &dyn Store, walk: &mut chain::Walk) -> Result<()> {
    while chain::take_next(ctx, store, walk).await?.is_some() {
        chain::go_on(ctx, store, walk).await?;
    }
    Ok(())
}
