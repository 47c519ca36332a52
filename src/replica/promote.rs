//! Taking a volume over: the claim at the one place where the chain goes on, and the barrier that stops a home which is
//! faster than that.
//! Invariant: a claim goes only into the next place behind the newest segment of the chain, so that nothing which home
//! was told is stored is lost; who has put it, and nobody else, is the writer. It lies in `log/` before it is put, and
//! as long as it may have been put no other takes its number.

use super::divergent::{FENCED, Standing, marked, newest_end, set_aside};
use super::held;
use super::opening::{self, Version, context};
use super::proof::{ProvenStore, Put};
use super::trust::{self, Trust};
use crate::clock::Env;
use crate::crypto::keyfile::{KeyFile, Role as KeyRole};
use crate::log::chain::{self, Walk};
use crate::log::claim::{self, About, Mark};
use crate::log::recovery::Role;
use crate::log::segment::{Kind, VolumeContext, segment_name};
use crate::log::statedir::StateDir;
use crate::log::{self, Error, Result};
use crate::store::Store;
use crate::types::{CommitNo, Epoch, Head, Seq, Timestamp};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// So many times the place is lost to home before a barrier is put.
const TRIES_BEFORE_BARRIER: u32 = 2;
/// How far ahead of the end a barrier is put: at least this, and twice what home went on by during the try before; doubled
/// while home is there first. The nearer, the sooner home stops. Less than the jump behind a claim.
const BARRIER_AHEAD_MIN: u64 = 8;
const BARRIER_AHEAD_MAX: u64 = 512;
/// Behind a barrier the places end: nobody loses so often.
const TRIES_MAX: u32 = 2000;

/// Who takes over, and how.
pub struct Promotion {
    /// Where the volume lies.
    pub store: Arc<dyn Store>,
    /// The writer's key file.
    pub key: KeyFile,
    /// State directory: a reader's, an empty one, or that of a home that was fenced.
    pub state: PathBuf,
    /// Time and randomness.
    pub env: Env,
    /// Name of this host.
    pub host: String,
    /// Why, for those who are fenced.
    pub reason: String,
    /// Only if the writer before has handed the volume over to this name.
    pub accept: Option<String>,
    /// What the chain must hold, and how old its newest commit may be.
    pub trust: Trust,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// This host is the writer from here on.
    Promoted,
    /// It was already, by an earlier try of the same.
    Before,
    /// It was already, as the writer that it has been.
    Writer,
}

/// How things stand now.
#[derive(Clone, Debug)]
pub struct Report {
    /// What came of it.
    pub came: Came,
    /// The volume's name.
    pub volume: String,
    /// The epoch now.
    pub epoch: Epoch,
    /// Where the claim lies; of a writer that has been, the end of the chain.
    pub place: Option<Seq>,
    /// The newest commit of the chain, and when it was made.
    pub commit: CommitNo,
    /// When it was made, if there is one.
    pub time: Option<Timestamp>,
    /// When this was over.
    pub now: Timestamp,
    /// How long it took.
    pub took: Duration,
    /// Home put something while this went on.
    pub home_alive: bool,
    /// Places lost to home.
    pub lost_places: u32,
    /// A barrier had to be put.
    pub barriers: u32,
    /// Where this host's own tail lies that is in nobody's history.
    pub set_aside: Option<PathBuf>,
    /// Segments of this host that the store does not have yet, for a writer that has been.
    pub unsent: usize,
}

struct Taking<'a> {
    options: &'a Promotion,
    ctx: VolumeContext,
    dir: StateDir,
    store: ProvenStore,
    walk: Walk,
    report: Report,
}

/// Takes the volume over, or says who else has.
pub async fn promote(options: &Promotion) -> Result<Report> {
    options.key.require(KeyRole::Writer).map_err(|e| Error::Refused(e.to_string()))?;
    let began = options.env.clock.monotonic();
    let dir = StateDir::open_on(options.env.disk.clone(), &options.state)?;
    let (superblock, to_pin) = opening::superblock(Some(&*options.store), &dir, &options.key).await?;
    if let Some(bytes) = to_pin {
        dir.write_atomic(log::volume::NAME, &bytes)?;
    }
    let ctx = context(&options.key, &superblock)?;
    let known = dir.read(log::volume::NAME)?.unwrap_or_default().into();
    let store = ProvenStore::new(options.store.clone(), known, options.env.clock.clone());
    store.require().await?;
    let (root, mut walk) = held::chain_in_store(&ctx, &*options.store).await?;
    walk.last_time = walk.last_time.or(root.map(|root| root.time));
    trust::check_pin(&ctx, &dir, &*options.store, walk.head).await?;
    options.trust.check_expected(&ctx, &*options.store, walk.head).await?;
    options.trust.check_age(walk.last_time, options.env.clock.now())?;
    let report = Report {
        came: Came::Promoted,
        volume: superblock.name,
        epoch: walk.epoch,
        place: walk.head.map(|head| head.seq),
        commit: walk.last_commit,
        time: walk.last_time,
        now: options.env.clock.now(),
        took: Duration::ZERO,
        home_alive: false,
        lost_places: 0,
        barriers: 0,
        set_aside: None,
        unsent: 0,
    };
    let mut taking = Taking { options, ctx, dir, store, walk, report };
    taking.take().await?;
    let mut report = taking.report;
    report.now = options.env.clock.now();
    report.took = options.env.clock.monotonic().saturating_sub(began);
    Ok(report)
}

impl Taking<'_> {
    async fn take(&mut self) -> Result<()> {
        let mut standing = Standing::find(&self.ctx, &self.dir, &*self.options.store).await?;
        if standing.tail.last().is_some_and(|last| last.head.is_none()) {
            self.close_tail().await;
            standing = Standing::find(&self.ctx, &self.dir, &*self.options.store).await?;
        }
        let fenced = self.dir.read(FENCED)?;
        let ends_here = match (&standing.common, standing.tail.first()) {
            (Some(common), _) => common.head == self.walk.head,
            (None, Some(first)) => first.head.is_none() || first.prev == self.walk.head,
            (None, None) => false,
        };
        let tail = standing.tail;
        if let [one] = &tail[..]
            && let Some(claim) = self.own_claim(one.seq)?
        {
            return self.go_on_with(claim, one.seq).await;
        }
        if ends_here && !self.walk.barred && tail.first().is_none_or(|first| first.seq == self.walk.place) {
            // What a fence was for is past: the chain ends with this host's own.
            let claimed =
                standing.common.and_then(|common| self.own_claim(common.seq).transpose()).transpose()?;
            if claimed.is_some() || fenced.is_none() {
                if let Some(head) =
                    standing.common.and_then(|common| common.head).filter(|_| claimed.is_some())
                {
                    trust::write_pin_if_newer(&self.dir, head)?; // that it won is known now
                }
                self.drop_fence()?;
                let before = claimed.is_some() && tail.is_empty();
                self.report.came = if before { Came::Before } else { Came::Writer };
                self.report.unsent = tail.len();
                return Ok(());
            }
        }
        self.may_accept().await?;
        if !tail.is_empty() {
            let why = fenced.map(|reason| String::from_utf8_lossy(&reason).into_owned());
            let why = why.unwrap_or_else(|| "the volume was taken over".into());
            self.report.set_aside = Some(set_aside(&self.dir, &tail, &why)?);
        }
        self.claim().await
    }

    /// Gives the segment that a crash left open its end, as the next start of that writer would, so that what is whole of
    /// it can be read wherever it is set aside.
    async fn close_tail(&self) {
        let (ctx, dir, env) = (&self.ctx, &self.dir, &self.options.env);
        let closed = opening::recover(ctx, dir, env, None, Role::Writer, Version::Newest).await;
        if let Err(e) = closed {
            ::log::warn!("the newest segment here is kept as the crash left it: {e}");
        }
    }

    /// The claim in `log/`, if that is what lies there.
    fn own_claim(&self, seq: Seq) -> Result<Option<Bytes>> {
        let Some(bytes) = self.dir.read(&segment_name(seq))? else { return Ok(None) };
        let claim = claim::read_marked(&self.ctx, seq, &bytes).ok();
        Ok(claim.filter(|claim| claim.kind == Kind::Claim).map(|_| bytes.into()))
    }

    /// An earlier try got to its claim, and no further that is known of.
    async fn go_on_with(&mut self, claim: Bytes, seq: Seq) -> Result<()> {
        let marked = claim::read_marked(&self.ctx, seq, &claim)?;
        if seq == self.walk.place && marked.prev == self.walk.head {
            if self.put(seq, claim).await? {
                self.won(seq, marked.head, marked.epoch)?;
                self.report.came = Came::Before;
                return Ok(());
            }
            chain::take_next(&self.ctx, &*self.options.store, &mut self.walk).await?;
        } else {
            // Taken by other bytes for certain, before its number is given up.
            stored(&self.ctx, &*self.options.store, seq).await?;
        }
        let taken = marked_or_none(&self.ctx, &*self.options.store, seq).await?;
        self.dir.remove(segment_name(seq))?;
        self.dir.sync_dir("log")?;
        match taken {
            Some(taken) if taken.kind == Kind::Claim => Err(lost(&taken, seq)),
            _ => {
                self.report.home_alive = true;
                self.may_accept().await?;
                newest_end(&self.ctx, &*self.options.store, &mut self.walk).await?;
                self.claim().await
            }
        }
    }

    /// Puts claims until one is there, and a barrier in home's way when that takes too long.
    async fn claim(&mut self) -> Result<()> {
        let store = self.options.store.clone();
        let began = self.walk.epoch;
        for n in 0..TRIES_MAX {
            let seq = self.walk.place;
            let (bytes, head) = self.segment(Kind::Claim, seq)?;
            let epoch = Epoch(self.walk.epoch.0 + 1);
            let name = segment_name(seq);
            self.dir.write_atomic(&name, &bytes)?;
            if self.put(seq, bytes.into()).await? {
                return self.won(seq, head, epoch);
            }
            self.dir.remove(&name)?;
            self.dir.sync_dir("log")?;
            self.report.lost_places += 1;
            let head_before = self.walk.head;
            // One look: what it misses the next claim finds out, and each look more gives home time to go on.
            if chain::take_next(&self.ctx, &*store, &mut self.walk).await?.is_some() {
                chain::go_on(&self.ctx, &*store, &mut self.walk).await?;
            }
            self.report.home_alive |= self.walk.head != head_before;
            let number = |head: Option<Head>| head.map_or(0, |head| head.seq.0);
            let gone_on = number(self.walk.head).saturating_sub(number(head_before));
            if self.walk.epoch > began {
                let at = self.walk.claim.unwrap_or(seq);
                return Err(lost(&marked(&self.ctx, &*store, at).await?, at));
            }
            if self.options.accept.is_some() && self.walk.head != head_before {
                return Err(Error::Refused("the volume was handed over, and yet something was put".into()));
            }
            if n + 1 >= TRIES_BEFORE_BARRIER && self.report.barriers == 0 {
                self.bar(gone_on).await?;
            }
        }
        Err(Error::Refused("the next place in the chain is taken again and again; try once more".into()))
    }

    /// Puts a barrier ahead of home, which went on by `gone_on` places while one claim was tried. What comes of one try is not waited for: the next claim shows it.
    async fn bar(&mut self, gone_on: u64) -> Result<()> {
        let end = self.walk.head.map_or(0, |head| head.seq.0);
        let mut ahead = gone_on.saturating_mul(2).clamp(BARRIER_AHEAD_MIN, BARRIER_AHEAD_MAX);
        while ahead <= BARRIER_AHEAD_MAX {
            let seq = Seq(end + ahead);
            let (bytes, _) = self.segment(Kind::Barrier, seq)?;
            if self.put(seq, bytes.into()).await? {
                ::log::warn!("{}: put in the way of the writer before", segment_name(seq));
                self.report.barriers += 1;
                return Ok(());
            }
            ahead *= 2;
        }
        newest_end(&self.ctx, &*self.options.store, &mut self.walk).await
    }

    fn segment(&self, kind: Kind, seq: Seq) -> Result<(Vec<u8>, Head)> {
        let about = if kind == Kind::Claim { About::Claim } else { About::Barrier };
        let (host, text) = (self.options.host.clone(), self.options.reason.clone());
        let mark = Mark { about, time: self.options.env.clock.now(), host, text };
        let put = claim::Put {
            kind,
            seq,
            epoch: Epoch(self.walk.epoch.0 + 1),
            prev: self.walk.head,
            last_commit: self.walk.last_commit,
            mark: &mark,
        };
        put.bytes(&self.ctx, &self.options.env)
    }

    /// True when the store holds these bytes under that number; false when it holds others.
    async fn put(&self, seq: Seq, bytes: Bytes) -> Result<bool> {
        Ok(self.store.put_ours(&segment_name(seq), bytes).await? == Put::Ours)
    }

    fn won(&mut self, seq: Seq, head: Head, epoch: Epoch) -> Result<()> {
        self.drop_fence()?;
        trust::write_pin(&self.dir, head)?;
        (self.report.place, self.report.epoch) = (Some(seq), epoch);
        // As of the place that was won, and not of the one that was tried first.
        let (commit, time) = (self.walk.last_commit, self.walk.last_time);
        (self.report.commit, self.report.time) = (commit, time.or(self.report.time));
        Ok(())
    }

    /// The fence was for the writer before; only now is this host another.
    fn drop_fence(&self) -> Result<()> {
        if self.dir.read(FENCED)?.is_some() {
            self.dir.remove(FENCED)?;
            self.dir.sync_dir("")?;
        }
        Ok(())
    }

    /// Whether the writer before has handed the volume over to this host, where that is asked for.
    async fn may_accept(&self) -> Result<()> {
        let Some(name) = &self.options.accept else { return Ok(()) };
        let refuse = |why: String| {
            Err(Error::Refused(format!(
                "{why}; nothing was changed. To take over all the same, without its consent: promote"
            )))
        };
        let Some(head) = self.walk.head else { return refuse("the volume has no writer yet".into()) };
        match marked_or_none(&self.ctx, &*self.options.store, head.seq).await?.and_then(|found| found.mark) {
            Some(mark) if mark.about == About::Handover && mark.text == *name => Ok(()),
            Some(mark) if mark.about == About::Handover => refuse(format!(
                "{} has handed the volume over to `{}`, not to `{name}`",
                mark.host, mark.text
            )),
            _ => refuse("the volume's writer has not handed it over".into()),
        }
    }
}

/// What the segment says about the log; nothing if it is more than a mark.
async fn marked_or_none(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<Option<claim::Marked>> {
    match marked(ctx, store, seq).await {
        Ok(found) => Ok(Some(found)),
        Err(Error::Refused(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Fails when nothing lies there.
async fn stored(ctx: &VolumeContext, store: &dyn Store, seq: Seq) -> Result<Head> {
    chain::stored_head(ctx, store, seq).await
}

fn lost(to: &claim::Marked, seq: Seq) -> Error {
    let who = match &to.mark {
        Some(mark) => format!("{} ({})", mark.host, mark.text),
        None => "another host".into(),
    };
    Error::Fenced {
        detail: format!(
            "the volume was taken over by {who} at the same time: epoch {}, {}. This host is not its writer",
            to.epoch.0,
            segment_name(seq)
        ),
    }
}
