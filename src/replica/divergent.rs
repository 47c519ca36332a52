//! Where a state directory stands beside the chain in the store: which of its segments are in it, and which are not; and
//! moving aside what is not, so that the host can go on with the chain.
//! Invariant: nothing is deleted. What is moved lies in `divergent/EPOCH/`, and until the last of it has been moved, what
//! is left in `log/` is the older part of it.

use super::opening::{list_checkpoints, stored_root};
use crate::disk::FileRef;
use crate::log::chain::{self, stored_head};
use crate::log::claim::{self, Marked};
use crate::log::segment::{
    TRAILER_LEN, Trailer, UncheckedTrailer, VolumeContext, head_of, segment_name, seq_of_name,
};
use crate::log::statedir::StateDir;
use crate::log::{Error, Result};
use crate::log::{LAID_OUT, writer::written_len};
use crate::ops::names::told;
use crate::store::overlay::OverlayStore;
use crate::store::{Store, StoreError};
use crate::tree::checkpoint;
use crate::types::{CommitNo, Epoch, Head, Seq};
use std::path::PathBuf;
use std::sync::Arc;

/// A segment that is no more than a mark is not longer, in bytes.
pub(super) const MARK_MAX: u64 = 64 << 10;

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
    let (bytes, size) = store.get_suffix(&segment_name(seq), MARK_MAX).await?;
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
    dir.write_atomic(&format!("{to}/note.txt"), told(note).as_bytes())?;
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

/// Lists and looks so often for the end of a chain that a fast home moves on.
const ROUNDS_MAX: u32 = 4;

/// The end of the chain as it is at this moment, also when a listing is old. A home that is faster than this is not
/// followed for ever: the place that is found is then taken, which the next claim finds out.
pub(super) async fn newest_end(ctx: &VolumeContext, store: &dyn Store, walk: &mut chain::Walk) -> Result<()> {
    for _ in 0..ROUNDS_MAX {
        if chain::take_next(ctx, store, walk).await?.is_none() {
            break;
        }
        chain::go_on(ctx, store, walk).await?;
    }
    Ok(())
}

/// Refuses to read with a state directory whose own log is not what the chain goes on with: its files would stand in the
/// way of the store's of the same number.
pub(super) async fn refuse_reader(ctx: &VolumeContext, dir: &StateDir, store: &dyn Store) -> Result<()> {
    let standing = Standing::find(ctx, dir, store).await?;
    let Some(first) = standing.tail.first() else { return Ok(()) };
    let there = match stored_head(ctx, store, first.seq).await {
        Err(Error::Store(StoreError::NotFound { .. })) => return Ok(()),
        found => found?,
    };
    Err(Error::Refused(format!(
        "{} holds what a writer here had written when the volume was taken over ({} in the store is hash {}), and none \
         of it is in the volume's history. Mount with another --state; 'embassyfs divergence' shows what it is, and \
         'accept' or 'promote' sets it aside",
        dir.root().display(),
        segment_name(first.seq),
        there.hash
    )))
}

/// What a host had written when the volume was taken over, in a state directory.
#[derive(Clone, Debug)]
pub struct Divergence {
    /// The epoch it was written in; 0 where no segment says so.
    pub epoch: Epoch,
    /// Set aside; otherwise it lies in `log/` still, among what the store has.
    pub set_aside: bool,
    /// Where its segments lie.
    pub at: PathBuf,
    /// Why this host lost the volume.
    pub note: String,
    /// Its segments, in order.
    pub segments: Vec<Part>,
}

/// One of its segments, as its own trailer says.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its number.
    pub seq: Seq,
    /// Its file.
    pub file: FileRef,
    /// Bytes; of one that a crash left open those that were written.
    pub size: u64,
    /// What its end says; nothing of one that a crash left open.
    pub trailer: Option<Trailer>,
}

impl Part {
    fn read(dir: &StateDir, path: PathBuf, seq: Seq) -> Result<Part> {
        let file = dir.file(path);
        let suffix =
            |len| file.suffix(len).map_err(|e| Error::io(format!("read {}", file.path.display()))(e));
        let (tail, size) = suffix(TRAILER_LEN as u64)?;
        if let Ok(end) = UncheckedTrailer::parse(&tail, "") {
            return Ok(Part { seq, file, size, trailer: Some(*end.unverified()) });
        }
        // Behind one that was left open lie zeros that were laid out.
        let (last, _) = suffix(LAID_OUT as u64)?;
        let zeros = last.len() - written_len(&last);
        Ok(Part { seq, file, size: size - zeros as u64, trailer: None })
    }
}

/// What the state directory holds that is in nobody's history, the oldest first; of a home that was fenced and has set
/// nothing aside yet, what is not known to be in the store. Asks no store, and believes what lies here.
pub fn divergences(dir: &StateDir) -> Result<Vec<Divergence>> {
    let mut found = Vec::new();
    for name in dir.entries(DIVERGENT)? {
        let (sub, mut segments) = (format!("{DIVERGENT}/{name}"), Vec::new());
        for file in dir.entries(&sub)? {
            if let Some(seq) = seq_of_name(&file) {
                segments.push(Part::read(dir, dir.root().join(&sub).join(&file), seq)?);
            }
        }
        let note = dir.read(&format!("{sub}/note.txt"))?;
        found.push(divergence(true, dir.root().join(&sub), note, segments));
    }
    if let Some(reason) = dir.read(FENCED)? {
        let mut segments = Vec::new();
        for (seq, _) in dir.log_segments()? {
            segments.push(Part::read(dir, dir.log_path(seq), seq)?);
        }
        let stored = segments.iter().filter_map(|part| Some(part.trailer?.stored)).max().unwrap_or_default();
        segments.retain(|part| part.seq > stored);
        found.push(divergence(false, dir.root().join("log"), Some(reason), segments));
    }
    found.retain(|divergence| !divergence.segments.is_empty());
    Ok(found)
}

fn divergence(set_aside: bool, at: PathBuf, note: Option<Vec<u8>>, mut segments: Vec<Part>) -> Divergence {
    segments.sort_by_key(|part| part.seq);
    let epochs = segments.iter().filter_map(|part| Some(part.trailer?.header.epoch));
    let epoch = epochs.max().unwrap_or_default();
    let note = String::from_utf8_lossy(&note.unwrap_or_default()).into_owned();
    Divergence { epoch, set_aside, at, note, segments }
}

impl Divergence {
    /// The store as it would be if this had gone on: up to where it begins, and then this. With it the number of the last
    /// commit that both histories share. What `store` has as the first of it is compared, for those that lie in `log/`
    /// may have got there.
    pub async fn beside(
        &self,
        ctx: &VolumeContext,
        store: Arc<dyn Store>,
    ) -> Result<(OverlayStore, CommitNo)> {
        let closed: Vec<(&Part, Trailer)> =
            self.segments.iter().filter_map(|part| Some((part, part.trailer?))).collect();
        let mut at = 0;
        for (part, _) in closed.iter().filter(|_| !self.set_aside) {
            let (tail, _) = part.file.suffix(TRAILER_LEN as u64).map_err(Error::io("read a segment"))?;
            let ours = tail.first_chunk().map(|bytes| head_of(part.seq, bytes));
            match stored_head(ctx, &*store, part.seq).await {
                Ok(there) if Some(there) == ours => at += 1,
                Ok(_) | Err(Error::Store(StoreError::NotFound { .. })) => break,
                Err(e) => return Err(e),
            }
        }
        let Some((first, trailer)) = closed.get(at) else {
            return Err(Error::Refused(format!(
                "{}: nothing of it is whole and not in the store; what a crash left open is closed by 'accept' or \
                 'promote'",
                self.at.display()
            )));
        };
        let shared = match trailer.commit_count {
            0 => trailer.last_commit,
            _ => CommitNo(trailer.first_commit.0 - 1),
        };
        let front = closed.iter().skip(at).map(|(part, _)| (segment_name(part.seq), part.file.clone()));
        // A checkpoint of what both share may have been made by the other writer, and then lies in the other history.
        let mut usable = None;
        for name in list_checkpoints(&*store).await? {
            let old = checkpoint::commit_of(&name).is_some_and(|no| no <= shared);
            if old
                && let Ok(root) = stored_root(ctx, &*store, &name).await
                && root.root_seq < first.seq
            {
                usable = checkpoint::commit_of(&name);
                break;
            }
        }
        let begin = segment_name(first.seq);
        let hidden = move |name: &str| {
            (name.starts_with("log/") && name >= begin.as_str())
                || checkpoint::commit_of(name).is_some_and(|no| Some(no) > usable)
        };
        Ok((OverlayStore::new(store, front.collect(), Box::new(hidden)), shared))
    }
}
