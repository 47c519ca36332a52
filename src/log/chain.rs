//! The chain of segments: reading their ends from the spool or the store, and which of them belong to the chain.
//! Invariant: a segment counts only if it lies in the one place that the one before it leaves for it, its trailer is the
//! writer's and names that one by hash, and no epoch goes back. What an overtaken writer left in the store lies in no
//! such place, whatever its numbers.

use super::frame::DeltaHeader;
use super::gather::{coalesce, cut};
use super::recovery::Recovered;
use super::segment::{
    HEADER_LEN, Index, IndexedCommit, Kind, SegmentCipher, TRAILER_LEN, Trailer, UncheckedTrailer,
    VolumeContext, place_after, segment_name, seq_of_name,
};
use super::{Error, Result};
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

    /// The trailer alone, for [`follow`].
    pub fn bare<'a>(&'a self, ctx: &'a VolumeContext) -> BoxFuture<'a, Result<(End, ())>> {
        async move { Ok((self.trailer(ctx).await?, ())) }.boxed()
    }

    /// Asks the store once more for what does not verify: of a long chain some answer is damaged on the way, and to begin
    /// with all of it again would not end.
    async fn end(&self, ctx: &VolumeContext, len: u64) -> Result<End> {
        match (self.end_once(ctx, len).await, &self.place) {
            (Err(Error::Store(e)), _) => Err(e.into()),
            (Err(e), Place::Store(_)) => {
                ::log::warn!("{e}; it is asked for once more");
                self.end_once(ctx, len).await
            }
            (end, _) => end,
        }
    }

    async fn end_once(&self, ctx: &VolumeContext, len: u64) -> Result<End> {
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
pub(crate) struct Walk {
    pub head: Option<Head>,
    /// Where the next segment is, if there is one.
    pub place: Seq,
    /// Not less than 1; that of the newest segment once there was one.
    pub epoch: Epoch,
    pub last_commit: CommitNo,
    /// When the last commit was made, if a segment said so.
    pub last_time: Option<Timestamp>,
    /// A barrier was passed over behind the newest segment.
    pub barred: bool,
    /// The newest claim.
    pub claim: Option<Seq>,
}

impl Walk {
    /// Before the first segment of `start`.
    pub fn begin(start: &ChainStart) -> Walk {
        Walk {
            head: start.prev,
            place: start.replay_seq,
            epoch: Epoch(1),
            last_commit: CommitNo(0),
            last_time: None,
            barred: false,
            claim: None,
        }
    }

    /// Before a segment that is in the chain, wherever that begins.
    pub(super) fn before(first: &End) -> Walk {
        let start = ChainStart { replay_seq: first.head.seq, prev: first.trailer.prev };
        Walk { epoch: first.trailer.header.epoch, ..Walk::begin(&start) }
    }

    /// At the end that recovery found.
    pub(super) fn at(end: &Recovered) -> Walk {
        let start = ChainStart { replay_seq: end.next_seq, prev: end.head };
        Walk { epoch: end.epoch, last_commit: end.last_commit, ..Walk::begin(&start) }
    }

    /// Takes the next segment, if it continues the chain. A barrier in its place moves the place.
    pub(super) fn step(&mut self, end: &End, object: &str) -> Result<()> {
        let (trailer, at) = (&end.trailer, self.head.map(|head| head.seq).unwrap_or_default());
        if trailer.kind == Kind::Barrier {
            self.place = place_after(trailer.seq(), Kind::Barrier);
            self.barred = true;
            return Ok(());
        }
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
        self.place = place_after(end.head.seq, trailer.kind);
        self.epoch = trailer.header.epoch;
        self.last_commit = self.last_commit.max(trailer.last_commit);
        if trailer.commit_count > 0 {
            self.last_time = Some(trailer.last_time);
        }
        self.barred = false;
        if trailer.kind == Kind::Claim {
            self.claim = Some(end.head.seq);
        }
        Ok(())
    }

    /// What to say where no segment is in the next place, and `behind` are those that lie behind it: nothing, when
    /// the chain ends there.
    fn gap<'e>(&self, behind: impl Iterator<Item = &'e End>) -> Option<Error> {
        let belongs = |end: &&End| {
            end.trailer.kind != Kind::Barrier
                && end.trailer.seq() > self.place
                && end.trailer.header.epoch >= self.epoch
        };
        let behind: Vec<&End> = behind.filter(belongs).collect();
        let first = behind.first()?;
        if behind.iter().all(|end| end.trailer.header.epoch == self.epoch)
            && was_in_flight(self.place, &behind)
        {
            ::log::warn!("{}: its upload was cut off; the history ends before it", segment_name(self.place));
            return None;
        }
        Some(missing(self.place, first.trailer.seq()))
    }
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

/// Follows the chain over `sources`, in order of their numbers, as far as it goes. Each is loaded once, some at a time.
/// `take` gets what was loaded of each segment of the chain, with the walk behind it and the newest commit before it; it
/// says whether to go on. What does not lie in its place is left aside: what an old writer had on its way when it lost
/// the volume, and barriers. Gives the damage that lies behind the last one, for those who want more than it holds.
pub(super) async fn follow<'a, 's, T: Send + 'a>(
    ctx: &'a VolumeContext,
    sources: &'a [Source<'s>],
    walk: &mut Walk,
    load: impl FnMut(&'a Source<'s>) -> BoxFuture<'a, Result<(End, T)>>,
    take: &mut (dyn FnMut(&mut Walk, CommitNo, &End, T) -> Result<bool> + Send),
) -> Result<Option<Error>> {
    let mut loaded = windowed(sources, load);
    for (i, source) in sources.iter().enumerate() {
        let Some(found) = loaded.next().await else { break };
        if source.seq < walk.place {
            ::log::warn!("{}: not part of the chain; left aside", source.object());
            continue;
        }
        if source.seq > walk.place {
            drop(loaded);
            let rest = sources.get(i..).unwrap_or_default();
            // More than can have been in flight: the newest tell enough.
            let rest = rest.get(rest.len().saturating_sub(2 * IN_FLIGHT_MAX)..).unwrap_or_default();
            let behind: Vec<End> = windowed(rest, |source| source.trailer(ctx).boxed()).try_collect().await?;
            return Ok(walk.gap(behind.iter()));
        }
        let (end, found) = found?;
        let before = walk.last_commit;
        walk.step(&end, &segment_name(source.seq))?;
        if end.trailer.kind != Kind::Barrier && !take(walk, before, &end, found)? {
            break;
        }
    }
    Ok(None)
}

/// Which of `ends` make up the chain from `start` on, and the damage that lies behind the last of them.
pub(super) fn select(ends: &BTreeMap<Seq, End>, start: &ChainStart) -> (Vec<Seq>, Option<Error>) {
    let (mut walk, mut chain) = (Walk::begin(start), Vec::new());
    for (seq, end) in ends {
        if *seq > walk.place {
            return (chain, walk.gap(ends.range(seq..).map(|(_, end)| end)));
        }
        if *seq < walk.place {
            continue;
        }
        if let Err(e) = walk.step(end, &segment_name(*seq)) {
            return (chain, Some(e));
        }
        if end.trailer.kind != Kind::Barrier {
            chain.push(*seq);
        }
    }
    (chain, None)
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

/// The trailer at the end of a whole local file and what it says, if there is one and it holds.
pub(super) fn trailer_of(ctx: &VolumeContext, seq: Seq, bytes: &[u8]) -> Option<(Trailer, Head)> {
    let object = segment_name(seq);
    let size = bytes.len() as u64;
    (bytes.len() >= HEADER_LEN + TRAILER_LEN)
        .then(|| UncheckedTrailer::parse(bytes, &object).and_then(|t| t.verify(ctx, seq, size, &object)).ok())
        .flatten()
}

/// The head that a whole segment is and that of the one before it, if these are the bytes of one.
pub fn whole(ctx: &VolumeContext, seq: Seq, bytes: &[u8]) -> Option<(Head, Option<Head>)> {
    let (trailer, head) = trailer_of(ctx, seq, bytes)?;
    super::torn::body_holds(&trailer, bytes).then_some((head, trailer.prev))
}

/// The head that segment `seq` in the store is, verified.
pub async fn stored_head(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<Head> {
    Ok(Source { seq, place: Place::Store(store) }.trailer(ctx).await?.head)
}

/// Follows the chain in the store behind `walk` to its end, by the trailers alone.
pub(crate) async fn go_on(ctx: &VolumeContext, store: &dyn Store, walk: &mut Walk) -> Result<()> {
    let found = list_store(store, walk.place).await?;
    let sources: Vec<_> = found.into_iter().map(|seq| Source { seq, place: Place::Store(store) }).collect();
    let load = |source| Source::bare(source, ctx);
    let damage = follow(ctx, &sources, walk, load, &mut |_, _, _, ()| Ok(true)).await?;
    damage.map_or(Ok(()), Err)
}

/// The end of the chain in the store that begins at `start`.
pub(crate) async fn end_in_store(ctx: &VolumeContext, store: &dyn Store, start: &ChainStart) -> Result<Walk> {
    let mut walk = Walk::begin(start);
    if let Some(prev) = start.prev {
        let end = Source { seq: prev.seq, place: Place::Store(store) }.trailer(ctx).await?;
        if end.head != prev {
            return Err(Error::corrupt(
                segment_name(prev.seq),
                "is another segment than the one the checkpoint names",
            ));
        }
        walk.epoch = end.trailer.header.epoch;
        walk.last_commit = end.trailer.last_commit;
        walk.last_time = Some(end.trailer.last_time).filter(|_| end.trailer.commit_count > 0);
    }
    go_on(ctx, store, &mut walk).await?;
    Ok(walk)
}

/// Takes the one segment in the store that `walk` waits for, without asking for a list. What lies there, or nothing.
pub(crate) async fn take_next(
    ctx: &VolumeContext,
    store: &dyn Store,
    walk: &mut Walk,
) -> Result<Option<(Trailer, Head)>> {
    let source = Source { seq: walk.place, place: Place::Store(store) };
    let end = match source.trailer(ctx).await {
        Err(Error::Store(crate::store::StoreError::NotFound { .. })) => return Ok(None),
        found => found?,
    };
    walk.step(&end, &source.object())?;
    Ok(Some((end.trailer, end.head)))
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
