//! The chain of segments: reading their ends from the spool or the store, which of them belong to the chain, and
//! the list of commits in them.
//! Invariant: a segment counts only if its trailer is the writer's, names the one before it by hash, and no epoch
//! goes back. What an overtaken writer left in the store is not part of the chain, whatever its numbers.

use super::frame::DeltaHeader;
use super::gather::{coalesce, cut};
use super::segment::{
    HEADER_LEN, Index, IndexedCommit, SegmentCipher, TRAILER_LEN, Trailer, UncheckedTrailer, VolumeContext,
    segment_name, seq_of_name,
};
use super::{CommitInfo, Error, Result};
use crate::disk::FileRef;
use crate::store::Store;
use crate::types::{CommitNo, Epoch, FrameKind, Head, Seq, Timestamp};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ops::Range;

/// Requests to the store in flight at a time while the chain is read: as many segments as there are behind a
/// checkpoint at most are read in a few round trips.
pub(super) const WINDOW: usize = 128;
/// A segment's end is asked for in one request of this many bytes: trailer, index, and often the deltas.
const TAIL_LEN: u64 = 64 << 10;
const LIST_PAGE: usize = 1000;
/// Segments whose commits are listed at once.
const LISTED_AT_ONCE: usize = 32;
/// The deltas of a segment may unpack to so many bytes, and to so many for each byte of the segment. A writer's small
/// segments are closed long before; in large ones (the removal of a huge file) deltas shrink to a quarter.
const UNPACKED_FREE: u64 = 256 << 20;
const UNPACKED_PER_BYTE: u64 = 16;
/// More segments than this behind a missing one were not in flight together.
const IN_FLIGHT_MAX: usize = 256;

/// Where replay begins, as a checkpoint says; the default is the beginning of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainStart {
    /// Segments from this number on hold what is to be replayed.
    pub replay_seq: Seq,
    /// The segment before them; none at the beginning of a volume.
    pub prev: Option<Head>,
}

impl Default for ChainStart {
    fn default() -> ChainStart {
        ChainStart { replay_seq: Seq(1), prev: None }
    }
}

/// Where a segment's bytes are read from.
#[derive(Clone)]
pub(super) enum Place<'a> {
    File(FileRef),
    Store(&'a dyn Store),
}

/// A segment that is closed, wherever it lies.
#[derive(Clone)]
pub(super) struct Source<'a> {
    pub seq: Seq,
    pub place: Place<'a>,
}

/// A verified trailer and the last bytes of the segment, as they came with it.
pub(super) struct End {
    pub trailer: Trailer,
    pub head: Head,
    pub size: u64,
    tail: Bytes,
}

/// One complete commit, opened.
pub(super) struct Commit {
    pub no: CommitNo,
    pub time: Timestamp,
    pub bodies: Vec<Bytes>,
}

impl Source<'_> {
    /// What to call the segment in messages.
    pub fn object(&self) -> String {
        match &self.place {
            Place::File(file) => file.path.display().to_string(),
            Place::Store(_) => segment_name(self.seq),
        }
    }

    async fn suffix(&self, len: u64) -> Result<(Bytes, u64)> {
        match &self.place {
            Place::Store(store) => Ok(store.get_suffix(&segment_name(self.seq), len).await?),
            Place::File(file) => {
                let (tail, size) =
                    file.suffix(len).map_err(Error::io(format!("read {}", file.path.display())))?;
                Ok((Bytes::from(tail), size))
            }
        }
    }

    async fn range(&self, range: Range<u64>) -> Result<Bytes> {
        match &self.place {
            Place::Store(store) => Ok(store.get_range(&segment_name(self.seq), range).await?),
            Place::File(file) => {
                let read = file.range(range);
                Ok(read.map_err(Error::io(format!("read {}", file.path.display())))?.into())
            }
        }
    }

    /// The segment's trailer alone.
    pub async fn trailer(&self, ctx: &VolumeContext) -> Result<End> {
        self.end(ctx, TRAILER_LEN as u64).await
    }

    async fn end(&self, ctx: &VolumeContext, len: u64) -> Result<End> {
        let (tail, size) = self.suffix(len).await?;
        let object = self.object();
        if tail.len() as u64 > size {
            return Err(Error::corrupt(object, "the store sent more bytes than it says the object has"));
        }
        let (trailer, head) =
            UncheckedTrailer::parse(&tail, &object)?.verify(ctx, self.seq, size, &object)?;
        Ok(End { trailer, head, size, tail })
    }

    /// The segment's trailer, index, and the tail they came in.
    pub async fn indexed(&self, ctx: &VolumeContext) -> Result<(End, Index)> {
        let end = self.end(ctx, TAIL_LEN).await?;
        let at = u64::from(end.trailer.index_offset)..end.trailer.body_len();
        let sealed = match end.cut(&at) {
            Some(sealed) => sealed,
            None => self.range(at).await?,
        };
        let index = open_index(ctx, &end.trailer, sealed.to_vec())
            .ok_or_else(|| Error::corrupt(self.object(), "damaged segment index"))?;
        Ok((end, index))
    }

    /// The commits of the segment.
    pub async fn commits(&self, ctx: &VolumeContext) -> Result<(End, Vec<Commit>)> {
        let (end, index) = self.indexed(ctx).await?;
        let deltas = index.commits.iter().flat_map(|commit| commit.deltas.clone());
        let outside = deltas.filter_map(|i| index.ptr(self.seq, i)).map(|ptr| ptr.range());
        let outside: Vec<_> = outside.filter(|range| end.cut(range).is_none()).collect();
        let mut pieces: Vec<(u64, Bytes)> = futures::stream::iter(coalesce(outside))
            .map(|range| async move { Ok::<_, Error>((range.start, self.range(range).await?)) })
            .buffered(4)
            .try_collect()
            .await?;
        pieces.push((end.size - end.tail.len() as u64, end.tail.clone()));
        let cipher = SegmentCipher::new(ctx, end.trailer.header);
        let mut commits = Vec::with_capacity(index.commits.len());
        let mut room = UNPACKED_FREE + UNPACKED_PER_BYTE * end.size;
        for commit in &index.commits {
            let mut parts = Vec::with_capacity(commit.deltas.len());
            for ptr in commit.deltas.clone().filter_map(|i| index.ptr(self.seq, i)) {
                let sealed = cut(&pieces, &ptr.range()).map(|sealed| sealed.to_vec()).unwrap_or_default();
                let plain = cipher.open(ptr, FrameKind::Delta, sealed).map_err(|e| self.blame(e))?;
                let left = room.checked_sub(plain.len() as u64);
                room = left.ok_or_else(|| Error::corrupt(self.object(), "its deltas unpack to too much"))?;
                parts.push(plain);
            }
            let opened = assemble(commit, &parts);
            commits.push(opened.ok_or_else(|| Error::corrupt(self.object(), "deltas do not fit the index"))?);
        }
        Ok((end, commits))
    }

    /// Puts this source's own name on damage that was found by a layer that knows only the segment's.
    fn blame(&self, error: Error) -> Error {
        match error {
            Error::Corrupt { detail, .. } => Error::corrupt(self.object(), detail),
            other => other,
        }
    }
}

impl End {
    /// Without the bytes that came with it, for who keeps very many.
    pub fn alone(self) -> End {
        End { tail: Bytes::new(), ..self }
    }

    fn cut(&self, range: &Range<u64>) -> Option<Bytes> {
        cut(&[(self.size - self.tail.len() as u64, self.tail.clone())], range)
    }
}

/// Opens the sealed index of a segment and compares it with the trailer.
pub(super) fn open_index(ctx: &VolumeContext, trailer: &Trailer, sealed: Vec<u8>) -> Option<Index> {
    let cipher = SegmentCipher::for_index(ctx, trailer.header, &trailer.index_salt);
    let ptr =
        crate::types::FramePtr { seq: trailer.seq(), offset: trailer.index_offset, len: trailer.index_len };
    let plain = cipher.open(ptr, FrameKind::Index, sealed).ok()?;
    let index = Index::decode(&plain, trailer.index_offset)?;
    let agrees = index.frames.len() == trailer.frame_count as usize
        && index.commits.len() == trailer.commit_count as usize
        && index.commits.first().is_none_or(|c| c.no == trailer.first_commit)
        && index.commits.last().is_none_or(|c| c.no == trailer.last_commit);
    agrees.then_some(index)
}

fn assemble(commit: &IndexedCommit, parts: &[Bytes]) -> Option<Commit> {
    let mut bodies = Vec::with_capacity(parts.len());
    for (i, plain) in parts.iter().enumerate() {
        let (header, body) = DeltaHeader::split(plain)?;
        let fits = header.no == commit.no
            && header.time == commit.time
            && header.part as usize == i
            && header.last == (i + 1 == parts.len());
        if !fits {
            return None;
        }
        bodies.push(body);
    }
    Some(Commit { no: commit.no, time: commit.time, bodies })
}

/// How far the chain has been followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub head: Option<Head>,
    pub epoch: Epoch,
    pub last_commit: CommitNo,
}

impl Walk {
    /// Takes the next segment, if it continues the chain.
    pub fn step(&mut self, end: &End, object: &str) -> Result<()> {
        let (trailer, at) = (&end.trailer, self.head.map(|head| head.seq).unwrap_or_default());
        if trailer.prev != self.head {
            return Err(match trailer.prev {
                Some(prev) if prev.seq > at => missing(prev.seq, trailer.seq()),
                Some(prev) if prev.seq == at => Error::corrupt(
                    object,
                    format!(
                        "continues another segment {at} than the one we have (a fork, or an object put back)"
                    ),
                ),
                _ => Error::corrupt(object, format!("does not continue segment {at}")),
            });
        }
        let first = trailer.first_commit;
        if trailer.header.epoch < self.epoch || (trailer.commit_count > 0 && first <= self.last_commit) {
            return Err(Error::corrupt(object, "goes back behind the segment before it (epoch or commit)"));
        }
        self.head = Some(end.head);
        self.epoch = trailer.header.epoch;
        self.last_commit = self.last_commit.max(trailer.last_commit);
        Ok(())
    }
}

/// Where the segment behind this one lies.
pub(super) fn next_place(trailer: &Trailer) -> Seq {
    Seq(trailer.seq().0 + 1)
}

pub(super) fn missing(seq: Seq, after: Seq) -> Error {
    Error::corrupt(
        segment_name(seq),
        format!(
            "missing, though {} continues it; an earlier version can still be mounted",
            segment_name(after)
        ),
    )
}

/// Runs `ask` for all of `sources`, some of them at a time; the answers come in order.
pub(super) fn windowed<'a, 's, T: Send + 'a>(
    sources: &'a [Source<'s>],
    ask: impl FnMut(&'a Source<'s>) -> BoxFuture<'a, Result<T>>,
) -> BoxStream<'a, Result<T>> {
    // Made here and not as they are polled: a closure kept in a stream would make the caller's future not `Send`.
    let asked: Vec<_> = sources.iter().map(ask).collect();
    futures::stream::iter(asked).buffered(WINDOW).boxed()
}

/// Which segments make up the chain, and what to say when it is followed to their end.
pub(super) struct Members<'a> {
    pub sources: Vec<Source<'a>>,
    /// The damage that lies behind them, for those who want more than they hold.
    pub damage: Option<Error>,
}

/// Finds out which of `found` belong to the chain that begins at `start`.
pub(super) async fn members<'a>(
    ctx: &VolumeContext,
    found: BTreeMap<Seq, Place<'a>>,
    start: &ChainStart,
) -> Result<Members<'a>> {
    let sources: Vec<Source<'a>> = found.into_iter().map(|(seq, place)| Source { seq, place }).collect();
    let (Some(first), Some(last)) = (sources.first(), sources.last()) else {
        return Ok(Members { sources, damage: None });
    };
    // Within an epoch the numbers are without gaps, so that the list alone tells. Only a promotion skips numbers,
    // and only it can leave segments in the store that are not part of the chain.
    let unbroken = first.seq == start.replay_seq && last.seq.0 - first.seq.0 == sources.len() as u64 - 1;
    let one_epoch = match unbroken && sources.len() > 1 {
        true => {
            let (first, last) = futures::try_join!(first.trailer(ctx), last.trailer(ctx))?;
            first.trailer.header.epoch == last.trailer.header.epoch
        }
        false => unbroken,
    };
    if one_epoch {
        return Ok(Members { sources, damage: None });
    }
    let ends: Vec<End> = windowed(&sources, |source| source.trailer(ctx).boxed()).try_collect().await?;
    let ends: BTreeMap<Seq, End> = ends.into_iter().map(|end| (end.trailer.seq(), end)).collect();
    let (chain, damage) = select(&ends, start);
    let sources = sources.into_iter().filter(|source| {
        let belongs = chain.contains(&source.seq);
        if !belongs {
            ::log::warn!("{}: not part of the chain; left aside", source.object());
        }
        belongs
    });
    Ok(Members { sources: sources.collect(), damage })
}

/// Follows the chain back from its newest segment. A segment that is missing on the way ends the chain before it:
/// quietly if it was never known to be in the store, otherwise as damage.
pub(super) fn select(ends: &BTreeMap<Seq, End>, start: &ChainStart) -> (Vec<Seq>, Option<Error>) {
    let mut damage = None;
    let mut chain: Vec<Seq> = Vec::new();
    let mut seen: Vec<&End> = Vec::new();
    let mut next = ends.keys().next_back().copied();
    while let Some((seq, end)) = next.and_then(|seq| ends.get_key_value(&seq)) {
        chain.push(*seq);
        seen.push(end);
        next = end.trailer.prev.map(|prev| prev.seq).filter(|prev| *prev >= start.replay_seq);
        if let Some(prev) = next.filter(|prev| !ends.contains_key(prev)) {
            if was_in_flight(prev, &seen) {
                ::log::warn!("{}: its upload was cut off; the history ends before it", segment_name(prev));
                damage = None;
            } else {
                damage = Some(missing(prev, *seq));
            }
            chain.clear();
            next = ends.range(..prev).next_back().map(|(seq, _)| *seq);
        }
    }
    chain.reverse();
    (chain, damage)
}

/// True when every segment behind `seq` says that `seq` was not yet known to be in the store: they were uploaded at
/// the same time, and only they arrived. Nobody was told that `seq` is safe.
fn was_in_flight(seq: Seq, behind: &[&End]) -> bool {
    behind.len() <= IN_FLIGHT_MAX
        && behind.iter().all(|end| end.trailer.stored != Seq(0) && end.trailer.stored < seq)
}

/// The segments in the store from number `from` on. A listing takes time while home goes on: it may hold what was put
/// late and lack what was put before it. So where one is missing, what follows is asked for once more: now that is
/// there, too. (After a promotion numbers are missing for good, which costs a request.)
pub(super) async fn list_store(store: &dyn Store, from: Seq) -> Result<Vec<Seq>> {
    let mut found = list_once(store, from).await?;
    if let Some(gap) = first_gap(from, &found) {
        found.extend(list_once(store, gap).await?);
        found.sort_unstable();
        found.dedup();
    }
    Ok(found)
}

/// The first number from `from` on (0: wherever they begin) that is missing before others.
fn first_gap(from: Seq, found: &[Seq]) -> Option<Seq> {
    let mut next = if from.0 > 0 { from.0 } else { found.first()?.0 };
    for seq in found {
        if seq.0 > next {
            return Some(Seq(next));
        }
        next = seq.0 + 1;
    }
    None
}

async fn list_once(store: &dyn Store, from: Seq) -> Result<Vec<Seq>> {
    let mut after = from.0.checked_sub(1).map(|n| segment_name(Seq(n)));
    let mut found = Vec::new();
    loop {
        let page = store.list("log/", after.as_deref(), LIST_PAGE).await?;
        let Some(last) = page.last() else { return Ok(found) };
        let more = page.len() >= LIST_PAGE;
        for object in &page {
            match seq_of_name(&object.name) {
                Some(seq) => found.push(seq),
                None => ::log::warn!("{}: not a segment's name; left alone", object.name),
            }
        }
        if !more {
            return Ok(found);
        }
        after = Some(last.name.clone());
    }
}

/// Every commit that the store holds, in order.
#[cfg(test)]
pub(super) async fn list_commits(ctx: &VolumeContext, store: &dyn Store) -> Result<Vec<CommitInfo>> {
    let mut commits = list_newest(ctx, store, Seq(0), None, usize::MAX).await?;
    commits.reverse();
    Ok(commits)
}

/// The newest commits in the store, the newest first: at most `limit`, and none from before `since`. Segments before
/// number `from` are not looked at. Each segment that is read costs a request, or two where it is large; the others
/// only their place in a list.
pub async fn list_newest(
    ctx: &VolumeContext,
    store: &dyn Store,
    from: Seq,
    since: Option<Timestamp>,
    limit: usize,
) -> Result<Vec<CommitInfo>> {
    let found = list_store(store, from).await?;
    let Some(first) = found.first() else { return Ok(Vec::new()) };
    let start = ChainStart { replay_seq: *first, prev: None };
    let found = found.into_iter().map(|seq| (seq, Place::Store(store))).collect();
    let members = members(ctx, found, &start).await?;
    if let Some(damage) = &members.damage {
        ::log::warn!("the list of versions ends early: {damage}");
    }
    let mut commits = Vec::new();
    let mut behind: Option<(Option<Head>, Seq)> = None;
    for sources in members.sources.rchunks(LISTED_AT_ONCE) {
        let ends: Vec<(End, Index)> =
            windowed(sources, |source| source.indexed(ctx).boxed()).try_collect().await?;
        let Some((oldest, _)) = ends.first() else { break };
        let (prev, epoch) = (oldest.trailer.prev, oldest.trailer.header.epoch);
        let mut walk = Walk { head: prev, epoch, last_commit: CommitNo(0) };
        for (end, _) in &ends {
            walk.step(end, &segment_name(end.trailer.seq()))?;
        }
        if let Some((prev, seq)) = behind
            && prev != walk.head
        {
            return Err(Error::corrupt(segment_name(seq), "does not continue the segment before it"));
        }
        behind = Some((prev, oldest.trailer.seq()));
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

/// The trailer at the end of a whole local file and what it says, if there is one and it holds.
pub(super) fn trailer_of(ctx: &VolumeContext, seq: Seq, bytes: &[u8]) -> Option<(Trailer, Head)> {
    let object = segment_name(seq);
    let size = bytes.len() as u64;
    (bytes.len() >= HEADER_LEN + TRAILER_LEN)
        .then(|| UncheckedTrailer::parse(bytes, &object).and_then(|t| t.verify(ctx, seq, size, &object)).ok())
        .flatten()
}

/// The head that segment `seq` in the store is, verified.
pub async fn stored_head(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<Head> {
    Ok(Source { seq, place: Place::Store(store) }.trailer(ctx).await?.head)
}

/// The newest segment in the store and the last commit at its end.
#[derive(Clone, Copy, Debug)]
pub struct Newest {
    /// Its number and hash.
    pub head: Head,
    /// The newest commit in the segments looked at, with its time.
    pub commit: Option<(CommitNo, Timestamp)>,
}

/// The newest segment from number `from` on, and the last commit in it or before it, not behind `from`.
pub async fn newest(ctx: &VolumeContext, store: &dyn Store, from: Seq) -> Result<Option<Newest>> {
    let found = list_store(store, from).await?;
    let mut newest: Option<Newest> = None;
    for seq in found.into_iter().rev() {
        let End { trailer, head, .. } = Source { seq, place: Place::Store(store) }.trailer(ctx).await?;
        let newest = newest.get_or_insert(Newest { head, commit: None });
        if trailer.commit_count > 0 {
            newest.commit = Some((trailer.last_commit, trailer.last_time));
            break;
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::store::{ObjectInfo, StoreError};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A store whose first listing lacks a segment that was put while it went on.
    struct Unsteady {
        inner: MemoryStore,
        listed: AtomicBool,
    }

    impl Store for Unsteady {
        fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, std::result::Result<(), StoreError>> {
            self.inner.put_new(name, body)
        }
        fn get_range(
            &self,
            name: &str,
            range: Range<u64>,
        ) -> BoxFuture<'_, std::result::Result<Bytes, StoreError>> {
            self.inner.get_range(name, range)
        }
        fn get_suffix(
            &self,
            name: &str,
            len: u64,
        ) -> BoxFuture<'_, std::result::Result<(Bytes, u64), StoreError>> {
            self.inner.get_suffix(name, len)
        }
        fn list(
            &self,
            prefix: &str,
            after: Option<&str>,
            limit: usize,
        ) -> BoxFuture<'_, std::result::Result<Vec<ObjectInfo>, StoreError>> {
            let all = self.inner.list(prefix, after, limit);
            async move {
                let mut all = all.await?;
                if !self.listed.swap(true, Ordering::Relaxed) {
                    all.retain(|object| object.name != segment_name(Seq(6)));
                }
                Ok(all)
            }
            .boxed()
        }
        fn delete(&self, name: &str) -> BoxFuture<'_, std::result::Result<(), StoreError>> {
            self.inner.delete(name)
        }
        fn describe(&self) -> String {
            self.inner.describe()
        }
    }

    #[tokio::test]
    async fn a_listing_that_was_overtaken_by_home_is_asked_for_again() {
        for from in [0, 5, 6] {
            let store = Unsteady { inner: MemoryStore::new(), listed: AtomicBool::new(false) };
            for seq in 5..9 {
                store.put_new(&segment_name(Seq(seq)), Bytes::new()).await.expect("put");
            }
            let found = list_store(&store, Seq(from)).await.expect("list");
            assert_eq!(found, (from.max(5)..9).map(Seq).collect::<Vec<_>>());
        }
    }
}
