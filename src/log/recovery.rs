//! Recovery: the one way into a volume's history, for a restart at home, a mount abroad and a mount of the past.
//! Newest checkpoint plus replay of the segments behind it, over the spool, the store, or both.
//! Invariant: what is replayed is a prefix of the history, in order, and ends at a complete commit; only a writer
//! changes anything on disk, only the newest local segment, and only after it is certain that this host holds the
//! end of the chain.

use super::chain::{ChainStart, Commit, End, Place, Source, Walk, follow, list_store, trailer_of, windowed};
use super::segment::{Kind, VolumeContext, segment_name};
use super::statedir::StateDir;
use super::torn::{Torn, scan};
use super::{ClosedSegment, Error, Result};
use crate::clock::Env;
use crate::disk::{FileRef, Mode};
use crate::store::Store;
use crate::types::{CommitNo, Epoch, Head, Seq, Timestamp};
use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use std::collections::BTreeMap;

/// What the one who recovers means to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Append to the log: this host must hold its end.
    Writer,
    /// Only read; nothing on disk changes.
    Reader,
}

/// What to do after a commit has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was applied; the next one please.
    Continue,
    /// It was applied, and the version that was asked for ends with it.
    Last,
    /// It was not applied: the version that was asked for ends before it.
    Stop,
}

/// Takes the delta bodies of one complete commit, in order.
pub type Apply<'a> = &'a mut (dyn FnMut(CommitNo, Timestamp, Seq, &[Bytes]) -> Result<Step> + Send);

/// What recovery found.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The newest closed segment that was replayed, or the one before replay began.
    pub head: Option<Head>,
    /// Number for the next segment.
    pub next_seq: Seq,
    /// The newest epoch seen.
    pub epoch: Epoch,
    /// The last commit that was applied, or that the checkpoint holds.
    pub last_commit: CommitNo,
    /// Every segment in `log/`, in order, all closed; also those before the checkpoint that may not be sent yet.
    pub local: Vec<ClosedSegment>,
    /// The newest segment in the store, 0 when it holds none; older ones may be missing there when uploads were cut off.
    /// `None` when it was not asked.
    pub store_newest: Option<Seq>,
    /// Segments whose commits were looked at.
    pub segments_read: usize,
}

/// What lies in the spool: closed segments, and perhaps a newest one that a crash left without a trailer.
struct Spool {
    closed: Vec<ClosedSegment>,
    /// The newest epoch of those.
    epoch: Epoch,
    /// The contents of the newest one, if it is closed.
    newest: Vec<u8>,
    torn: Option<(Seq, Vec<u8>)>,
}

impl Spool {
    fn newest(&self) -> Option<Seq> {
        let torn = self.torn.as_ref().map(|(seq, _)| *seq);
        torn.or_else(|| self.closed.last().map(|segment| segment.head.seq))
    }

    fn head_of(&self, seq: Seq) -> Option<Head> {
        self.closed.iter().map(|segment| segment.head).find(|head| head.seq == seq)
    }
}

/// Replays the history behind `start` through `apply`, up to its end or to where `apply` stops. For a writer it
/// also closes the segment that a crash left open, so that the log can be continued.
pub async fn recover(
    ctx: &VolumeContext,
    dir: &StateDir,
    env: &Env,
    store: Option<&dyn Store>,
    start: ChainStart,
    role: Role,
    apply: Apply<'_>,
) -> Result<Recovered> {
    let mut spool = read_spool(ctx, dir).await?;
    let listed = list(store, &spool, &start, role).await?;
    if role == Role::Writer && listed.is_none() && spool.newest().is_none() && start.prev.is_none() {
        return Err(Error::Refused(
            "nothing of the volume is in the state directory and the store does not answer, so what is there cannot \
             be known: mount again when it answers"
                .into(),
        ));
    }
    if let (Role::Writer, Some(store)) = (role, store) {
        refuse_takeover(ctx, dir, store, &spool, listed.as_deref(), &start).await?;
    }
    let store_newest = listed.as_ref().map(|seqs| seqs.last().copied().unwrap_or_default());
    if let Some((seq, _)) = spool.torn.as_ref().filter(|(seq, _)| *seq < start.replay_seq) {
        return Err(Error::corrupt(
            dir.log_path(*seq).display(),
            "has no trailer that holds, though a checkpoint stands on it",
        ));
    }
    let mut found = BTreeMap::new();
    for seq in listed.into_iter().flatten().filter(|seq| *seq >= start.replay_seq) {
        if let Some(store) = store {
            found.insert(seq, Place::Store(store));
        }
    }
    // A reader prefers the whole segment in the store to the torn one here; a writer was refused above.
    spool.torn = spool.torn.filter(|(seq, _)| !found.contains_key(seq));
    for segment in spool.closed.iter().filter(|segment| segment.head.seq >= start.replay_seq) {
        found.insert(segment.head.seq, Place::File(segment.file.clone()));
    }
    let sources: Vec<Source<'_>> = found.into_iter().map(|(seq, place)| Source { seq, place }).collect();
    let mut replay = Replay::begin(ctx, dir, store, &start, &sources).await?;
    replay.closed(ctx, &sources, apply).await?;
    if let Some(newest) = spool.closed.last()
        && role == Role::Writer
        && spool.torn.is_none()
    {
        settle(dir, &newest.file, &spool.newest)?;
    }
    if let Some((seq, bytes)) = spool.torn.filter(|_| !replay.stopped) {
        let scanned = scan(ctx, seq, &bytes, &dir.log_path(seq))?;
        replay.torn(seq, &scanned, apply)?;
        if role == Role::Writer && !replay.stopped {
            let closed =
                scanned.close(ctx, dir, env, seq, bytes, replay.walk.head, replay.walk.last_commit)?;
            if let Some(closed) = closed {
                replay.walk.head = Some(closed.head);
                replay.walk.place = Seq(seq.0 + 1);
                spool.closed.push(closed);
            }
        }
    }
    if role == Role::Writer && replay.stopped {
        return Err(Error::Refused("a version of the past cannot be written to".into()));
    }
    Ok(Recovered {
        head: replay.walk.head,
        next_seq: replay.walk.place,
        epoch: replay.walk.epoch,
        last_commit: replay.walk.last_commit,
        local: spool.closed,
        store_newest,
        segments_read: replay.segments_read,
    })
}

/// Writes the newest segment once more, as it is, and waits for the disk. That it can be read does not say that it is
/// durable: a process that was killed may have left it in the page cache, and after a sync that failed the kernel keeps
/// what it never wrote, and takes it for written. Older ones were durable before it was begun.
pub(super) fn settle(dir: &StateDir, file: &FileRef, bytes: &[u8]) -> Result<()> {
    let write = || {
        let open = file.disk.open(&file.path, Mode::Write)?;
        open.write_all_at(bytes, 0).map_err(|(_, e)| e)?;
        open.set_len(bytes.len() as u64)?; // the sync that failed may have lost that what was laid out behind it goes
        open.sync()
    };
    write().map_err(Error::io(format!("write {}", file.path.display())))?;
    dir.sync_dir("log")
}

async fn read_spool(ctx: &VolumeContext, dir: &StateDir) -> Result<Spool> {
    let mut spool = Spool { closed: Vec::new(), epoch: Epoch(1), newest: Vec::new(), torn: None };
    let mut found = dir.log_segments()?;
    if let Some((seq, len)) = found.pop() {
        let file = dir.file(dir.log_path(seq));
        let bytes = file.read().map_err(Error::io(format!("read {}", file.path.display())))?;
        let trailer = trailer_of(ctx, seq, &bytes);
        match trailer {
            // Only here the body is looked at: the others were durable before their successors were begun.
            Some((trailer, head)) if super::torn::body_holds(&trailer, &bytes) => {
                let (last_commit, stored) = (trailer.last_commit, trailer.stored);
                spool.epoch = trailer.header.epoch;
                spool.closed.push(ClosedSegment { file, len, head, last_commit, stored, closed_at: None });
                spool.newest = bytes;
            }
            _ => spool.torn = Some((seq, bytes)),
        }
    }
    let mut older = Vec::with_capacity(found.len() + 1);
    for (seq, len) in found {
        let file = dir.file(dir.log_path(seq));
        let end = Source { seq, place: Place::File(file.clone()) }.trailer(ctx).await?;
        let (last_commit, stored) = (end.trailer.last_commit, end.trailer.stored);
        spool.epoch = spool.epoch.max(end.trailer.header.epoch);
        older.push(ClosedSegment { file, len, head: end.head, last_commit, stored, closed_at: None });
    }
    older.append(&mut spool.closed);
    spool.closed = older;
    Ok(spool)
}

/// The segments in the store that matter: those to replay, and those that the spool holds too.
async fn list(
    store: Option<&dyn Store>,
    spool: &Spool,
    start: &ChainStart,
    role: Role,
) -> Result<Option<Vec<Seq>>> {
    let Some(store) = store else { return Ok(None) };
    let oldest = spool.closed.first().map_or(start.replay_seq, |segment| segment.head.seq);
    let from = start.prev.map_or(start.replay_seq, |prev| prev.seq).min(oldest);
    match list_store(store, from).await {
        Ok(listed) => Ok(Some(listed)),
        Err(Error::Store(e))
            if e.may_pass() && role == Role::Writer && (spool.newest().is_some() || start.prev.is_some()) =>
        {
            ::log::warn!("{} does not serve ({e}); going on with what is here", store.describe());
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Behind a claim in the store lie at most so many of the old writer's segments, and a few barriers.
const STRAYS_MAX: usize = 72;

/// The newest segment in the store that is not this host's, though it is the newest in `listed` that counts; what this
/// host has of the chain is compared where it is not known to have been stored.
async fn not_ours(
    ctx: &VolumeContext,
    store: &dyn Store,
    spool: &Spool,
    listed: &[Seq],
    start: &ChainStart,
) -> Result<Option<Head>> {
    let ours = |seq: Seq| spool.head_of(seq).or(start.prev.filter(|prev| prev.seq == seq));
    let source = |seq: &Seq| Source { seq: *seq, place: Place::Store(store) };
    let stored = spool.closed.iter().map(|segment| segment.stored).max().unwrap_or_default();
    let common: Vec<Seq> = listed.iter().copied().filter(|seq| ours(*seq).is_some()).collect();
    let newest = common.last().copied();
    let recent = common.iter().rev().take(STRAYS_MAX).filter(|seq| **seq > stored || Some(**seq) == newest);
    let mut recent: Vec<Source<'_>> = recent.map(source).collect();
    recent.reverse();
    let mut epoch = spool.epoch;
    let ends: Vec<End> = windowed(&recent, |source| source.trailer(ctx).boxed()).try_collect().await?;
    for end in ends {
        if ours(end.head.seq) != Some(end.head) {
            return Ok(Some(end.head));
        }
        epoch = epoch.max(end.trailer.header.epoch);
    }
    // Torn here and whole there: a writer who has lost bytes that he had sent, or another one's.
    let from = newest.map_or(start.replay_seq, |newest| Seq(newest.0 + 1));
    let behind: Vec<_> =
        listed.iter().rev().take_while(|seq| **seq >= from).take(STRAYS_MAX).map(source).collect();
    let ends: Vec<End> = windowed(&behind, |source| source.trailer(ctx).boxed()).try_collect().await?;
    let beside = |end: &&End| match end.trailer.kind {
        Kind::Barrier => end.trailer.header.epoch <= epoch,
        _ => end.trailer.header.epoch < epoch,
    };
    let torn = spool.torn.as_ref().map(|(seq, _)| *seq);
    Ok(ends.iter().find(|end| !beside(end) || Some(end.head.seq) == torn).map(|end| end.head))
}

/// A writer continues only a chain whose end is in its own state directory. Anything else is a takeover.
async fn refuse_takeover(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: &dyn Store,
    spool: &Spool,
    listed: Option<&[Seq]>,
    start: &ChainStart,
) -> Result<()> {
    let here = spool.newest().or(start.prev.map(|prev| prev.seq)).unwrap_or_default();
    let ours = |seq: Seq| spool.head_of(seq).or(start.prev.filter(|prev| prev.seq == seq));
    let fresh = spool.newest().is_none() && dir.checkpoints()?.is_empty();
    let theirs = match listed {
        Some(listed) => not_ours(ctx, store, spool, listed, start).await?,
        None => None,
    };
    let theirs = theirs.or(start.prev.filter(|_| fresh));
    if theirs.is_none() {
        return Ok(());
    }
    let name = |head: Option<Head>| match head {
        Some(head) => format!("{}:{}", head.seq, head.hash),
        None => "nothing".to_owned(),
    };
    let local = match ours(here) {
        None if here != Seq(0) => format!("{here} (not closed)"),
        head => name(head.filter(|_| !fresh)),
    };
    Err(Error::Refused(format!(
        "this state directory does not hold the end of the volume's log: it ends at {local}, the store at {}. \
         To write from here all the same is a takeover: promote",
        name(theirs),
    )))
}

/// Replay in progress.
struct Replay {
    walk: Walk,
    segments_read: usize,
    stopped: bool,
}

impl Replay {
    async fn begin(
        ctx: &VolumeContext,
        dir: &StateDir,
        store: Option<&dyn Store>,
        start: &ChainStart,
        sources: &[Source<'_>],
    ) -> Result<Replay> {
        let mut walk = Walk::begin(start);
        // The end of the segment before tells epoch and commit; needed only if no later segment does.
        let nothing_follows = sources.first().is_none_or(|first| first.seq > start.replay_seq);
        if let Some(prev) = start.prev.filter(|_| nothing_follows) {
            let end = end_of(ctx, dir, store, prev).await?;
            walk.epoch = end.0;
            walk.last_commit = end.1;
        }
        Ok(Replay { walk, segments_read: 0, stopped: false })
    }

    async fn closed(&mut self, ctx: &VolumeContext, sources: &[Source<'_>], apply: Apply<'_>) -> Result<()> {
        let Replay { walk, segments_read, stopped } = self;
        let mut take = |walk: &mut Walk, before: CommitNo, end: &End, commits: Vec<Commit>| {
            *segments_read += 1;
            let (seq, last_commit) = (end.trailer.seq(), walk.last_commit);
            walk.last_commit = before;
            *stopped = apply_all(walk, seq, &commits, apply)?;
            if !*stopped {
                walk.last_commit = last_commit;
            }
            Ok(!*stopped)
        };
        let damage = follow(ctx, sources, walk, |source| source.commits(ctx).boxed(), &mut take).await?;
        damage.map_or(Ok(()), Err)
    }

    fn torn(&mut self, seq: Seq, torn: &Torn, apply: Apply<'_>) -> Result<()> {
        let Some(epoch) = torn.epoch() else { return Ok(()) };
        if epoch < self.walk.epoch {
            return Err(Error::corrupt(segment_name(seq), "its epoch goes back"));
        }
        self.segments_read += 1;
        self.walk.epoch = epoch;
        self.stopped = apply_all(&mut self.walk, seq, &torn.commits, apply)?;
        Ok(())
    }
}

/// Hands the commits of segment `seq` on. True when the version that was asked for has ended.
fn apply_all(walk: &mut Walk, seq: Seq, commits: &[Commit], apply: Apply<'_>) -> Result<bool> {
    for commit in commits {
        if commit.no <= walk.last_commit {
            return Err(Error::corrupt(segment_name(seq), format!("commit {} comes twice", commit.no.0)));
        }
        match apply(commit.no, commit.time, seq, &commit.bodies)? {
            Step::Continue => walk.last_commit = commit.no,
            Step::Last => {
                walk.last_commit = commit.no;
                return Ok(true);
            }
            Step::Stop => return Ok(true),
        }
    }
    Ok(false)
}

/// Epoch and newest commit as of the closed segment `head`, from wherever it can be had.
async fn end_of(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    head: Head,
) -> Result<(Epoch, CommitNo)> {
    let seq = head.seq;
    let mut places: Vec<Place<'_>> =
        [dir.log_path(seq), dir.cache_path(seq)].map(|path| Place::File(dir.file(path))).into();
    places.extend(store.map(Place::Store));
    let mut outcome = Err(Error::corrupt(
        segment_name(seq),
        "the checkpoint stands on it, but it is not on this host, and no store was given",
    ));
    for place in places {
        outcome = Source { seq, place }.trailer(ctx).await;
        if let Ok(end) = &outcome
            && end.head == head
        {
            return Ok((end.trailer.header.epoch, end.trailer.last_commit));
        }
    }
    Err(match outcome {
        Ok(_) => Error::corrupt(segment_name(seq), "is another segment than the one the checkpoint names"),
        Err(e) => e,
    })
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
