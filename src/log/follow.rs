//! Following a chain that grows: what comes behind its known end in the store, verified as recovery does.
//! Invariant: the end moves by whole segments that continue it; what does not continue it moves nothing and is told.

use super::chain::{Commit, End, Place, Source, Walk, follow, list_store, windowed};
use super::recovery::Recovered;
use super::segment::Kind;
use super::segment::{VolumeContext, segment_name};
use super::{Error, Result};
use crate::store::{Store, StoreError};
use crate::types::{CommitNo, Hash, Head, Seq, Timestamp};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use std::collections::BTreeMap;

/// Most segments asked for at a time. Bounds what is in memory: each brings its deltas.
const WINDOW_MAX: usize = 8;
/// Heads remembered, to find out whether a checkpoint stands on the chain that was followed.
const HEADS_MAX: usize = 4096;
/// So many of them are looked for in the store's list: with what is behind, a page of it as a rule.
const LOOKED_FOR: usize = 512;

/// A commit that was followed to.
pub struct FollowedCommit {
    /// Its number.
    pub no: CommitNo,
    /// When it was made, by home's clock.
    pub time: Timestamp,
    /// The bodies of its deltas.
    pub bodies: Vec<Bytes>,
}

/// A segment that was followed to.
pub struct Followed {
    /// Its number and trailer's hash: the new end of the chain.
    pub head: Head,
    /// Its commits, in order.
    pub commits: Vec<FollowedCommit>,
}

/// The known end of a chain.
pub struct Tail {
    walk: Walk,
    /// Segments to ask for at a time: more while they are there.
    window: usize,
    heads: BTreeMap<Seq, Hash>,
}

impl Tail {
    /// The end that recovery found.
    pub fn new(recovered: &Recovered) -> Tail {
        let walk = Walk::at(recovered);
        let heads = recovered.head.iter().map(|head| (head.seq, head.hash)).collect();
        Tail { walk, window: 1, heads }
    }

    /// The newest segment of the chain that is known.
    pub fn head(&self) -> Option<Head> {
        self.walk.head
    }

    /// True when `head` was an end of this chain, as far as is remembered.
    pub fn passed(&self, head: Option<Head>) -> bool {
        head.is_some_and(|head| self.heads.get(&head.seq) == Some(&head.hash))
    }

    /// True when the last answers were all full: home is further than can be told from here.
    pub fn is_behind(&self) -> bool {
        self.window >= WINDOW_MAX
    }

    /// Asks for the next places; gives what continues the chain, in order. An idle call costs one request, and what is
    /// there comes with the asking. With the segments before it an error comes next time.
    pub async fn next(&mut self, ctx: &VolumeContext, store: &dyn Store) -> Result<Vec<Followed>> {
        let places = (0..self.window as u64).map(|n| Source {
            seq: Seq(self.walk.place.0 + n), // beyond a gap nothing is taken, so that a guess does no harm
            place: Place::Store(store),
        });
        let sources: Vec<Source<'_>> = places.collect();
        let mut answers = windowed(&sources, |source| source.commits(ctx).boxed());
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer {
                Ok((end, commits)) if end.head.seq == self.walk.place => match self.take(&end, commits) {
                    Ok(followed) => found.extend(followed),
                    Err(_) if !found.is_empty() => break,
                    Err(e) => return Err(e),
                },
                Ok(_) => break, // the place jumped: it is asked for at its own next time
                Err(Error::Store(StoreError::NotFound { .. })) => break,
                Err(_) if !found.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        self.window = match found.len() == sources.len() {
            true => (2 * self.window).min(WINDOW_MAX),
            false => 1,
        };
        Ok(found)
    }

    /// Nothing, where a barrier lies in the place.
    fn take(&mut self, end: &End, commits: Vec<Commit>) -> Result<Option<Followed>> {
        let object = segment_name(end.trailer.seq());
        let mut walk = self.walk;
        walk.step(end, &object)?;
        let mut last = self.walk.last_commit;
        for commit in &commits {
            if commit.no <= last {
                return Err(Error::corrupt(object, format!("commit {} comes twice", commit.no.0)));
            }
            last = commit.no;
        }
        self.walk = walk;
        if end.trailer.kind == Kind::Barrier {
            return Ok(None);
        }
        self.heads.insert(end.head.seq, end.head.hash);
        if self.heads.len() > HEADS_MAX {
            self.heads.pop_first();
        }
        let commits = commits
            .into_iter()
            .map(|Commit { no, time, bodies }| FollowedCommit { no, time, bodies })
            .collect();
        Ok(Some(Followed { head: end.head, commits }))
    }

    /// Looks for what asking for the next place cannot find: a store that was rolled back or forked behind our back, and
    /// segments behind a place that stays empty. Says how many segments are in the store behind the known end.
    pub async fn audit(&mut self, ctx: &VolumeContext, store: &dyn Store) -> Result<usize> {
        let seen: Vec<(Seq, Hash)> =
            self.heads.iter().rev().take(LOOKED_FOR).map(|(s, h)| (*s, *h)).collect();
        let from = seen.last().map_or(Seq(1), |(seq, _)| *seq);
        let listed = list_store(store, from).await?;
        // Not the newest alone: home may have put another behind a hole before anybody looked.
        let gone = seen.iter().find(|(seq, _)| listed.binary_search(seq).is_err());
        if let Some((seq, hash)) = gone {
            let newest = listed.last().copied();
            return Err(rolled_back(Witness::Seen, Head { seq: *seq, hash: *hash }, newest));
        }
        if let Some(head) = self.walk.head {
            let there = Source { seq: head.seq, place: Place::Store(store) }.trailer(ctx).await?.head;
            if there != head {
                return Err(forked(Witness::Seen, head, there));
            }
        }
        let behind = listed.into_iter().filter(|seq| *seq >= self.walk.place);
        let sources: Vec<_> = behind.map(|seq| Source { seq, place: Place::Store(store) }).collect();
        if sources.first().is_none_or(|first| first.seq == self.walk.place) {
            return Ok(sources.len());
        }
        let mut walk = self.walk;
        let mut take = |_: &mut Walk, _, _: &End, ()| Ok(true);
        let damage = follow(ctx, &sources, &mut walk, |source| source.bare(ctx), &mut take).await?;
        damage.map_or(Ok(0), Err)
    }
}

/// Who says that the store has held a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// This host, which notes in its state directory what it has seen.
    Seen,
    /// The one who gave `--expect`.
    Expected,
}

impl Witness {
    fn says(self) -> &'static str {
        match self {
            Witness::Seen => "this host has seen this segment with",
            Witness::Expected => "--expect names this segment with",
        }
    }

    fn way_out(self) -> &'static str {
        match self {
            Witness::Seen => "a new state directory forgets what was seen",
            Witness::Expected => "without --expect it is not asked for",
        }
    }
}

/// The store ends before a segment that it has held.
pub fn rolled_back(by: Witness, seen: Head, newest: Option<Seq>) -> Error {
    Error::corrupt(
        segment_name(seen.seq),
        format!(
            "ROLLBACK: {} hash {}, but the store's newest is {}: the store was rolled back, or lost it. Ask the store's \
             operator for what is missing; {}",
            by.says(),
            seen.hash,
            newest.map_or_else(|| "none".into(), segment_name),
            by.way_out()
        ),
    )
}

/// The store has another segment under the number of one that it has held.
pub fn forked(by: Witness, seen: Head, there: Head) -> Error {
    Error::corrupt(
        segment_name(seen.seq),
        format!(
            "FORK: {} hash {}, and the store has one with hash {} under that number: the history was forked, or exchanged. \
             Find out who else writes with the writer's key; only if that was meant, go on: {}",
            by.says(),
            seen.hash,
            there.hash,
            by.way_out()
        ),
    )
}
