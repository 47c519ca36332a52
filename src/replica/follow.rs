//! The follower: a reader's file system is moved forward as home ships.
//! Invariant: it moves by whole commits, in order, verified; what is wrong with the store stops it where it is, and
//! it goes on serving that state and says why. It holds the volume only while it works.

use super::held;
use super::io::Io;
use super::opening::{self, Opened, Version};
use super::trust::{too_old, write_pin_if_newer};
use crate::clock::Env;
use crate::fs::{self, Changed, Fs};
use crate::log::follow::Tail;
use crate::log::reader::FrameReader;
use crate::log::recovery::Role;
use crate::log::segment::VolumeContext;
use crate::log::statedir::StateDir;
use crate::log::{Error, Result};
use crate::store::Store;
use crate::tree::{Tree, delta};
use crate::types::{CommitNo, Head, Timestamp};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often the store's list is looked at: for a rollback, for a place that stays empty, for a new checkpoint.
const AUDIT_EVERY: Duration = Duration::from_secs(10);
/// Segments behind home at which a newer checkpoint is gone to instead of taking each commit.
const FAR_SEGMENTS: usize = 128;
/// Changes in memory above which a newer checkpoint's tree takes their place, in bytes.
const REBASE_ABOVE: usize = 4 << 20;
/// Changes in memory beyond which the follower stops for want of a checkpoint, in bytes, and at most a part of memory.
const CHANGES_MAX: usize = 1 << 30;
/// A store that has not answered for so long, while it is asked more often, is said to be away.
const SILENT: Duration = Duration::from_secs(5);
/// Pause after an answer that is wrong: it is asked again, for the store may be put right.
const STOPPED_PAUSE: Duration = Duration::from_secs(5);
/// The head is noted in the state directory at most this often.
const PIN_EVERY: Duration = Duration::from_secs(1);

/// Takes what a step has changed; called without any lock, after the step is visible.
pub type Tell = Box<dyn Fn(Changed) + Send + Sync>;

/// What keeps a follower from going on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The store does not serve; it goes on when it does.
    Away(String),
    /// The store shows what cannot be: it stays where it is.
    Wrong(String),
}

/// How a follower stands.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The newest commit that is shown, and when it was made.
    pub commit: Option<(CommitNo, Timestamp)>,
    /// The segment that it stands on.
    pub head: Option<Head>,
    /// Seconds between that commit and now, by the two hosts' clocks.
    pub lag: Duration,
    /// Since the store last answered.
    pub contact: Duration,
    /// What is wrong, if something is.
    pub trouble: Option<Trouble>,
    /// Jumps to a newer checkpoint so far.
    pub jumps: u64,
    /// The newest commit is older than is allowed: what to say of it.
    pub too_old: Option<String>,
}

struct Account {
    commit: Option<(CommitNo, Timestamp)>,
    head: Option<Head>,
    contact: Duration,
    trouble: Option<Trouble>,
    jumps: u64,
    /// It was said that the newest commit is too old.
    said_old: bool,
}

/// What a follower works with.
pub(super) struct Parts {
    pub ctx: Arc<VolumeContext>,
    pub dir: Arc<StateDir>,
    pub store: Arc<dyn Store>,
    pub reader: Arc<FrameReader>,
    pub env: Env,
    pub fs: Arc<Fs>,
    /// The newest commit should not be older.
    pub max_age: Option<Duration>,
}

/// See the module.
pub struct Follower {
    parts: Parts,
    /// Held by the one step that is under way.
    at: tokio::sync::Mutex<Position>,
    account: Mutex<Account>,
    tell: Mutex<Option<Arc<Tell>>>,
}

struct Position {
    tail: Tail,
    audited: Option<Duration>,
    pinned: Option<Duration>,
    /// The newest commit whose checkpoint was looked at.
    checkpoint: CommitNo,
    /// The last answers were all full.
    behind: bool,
    /// Why it can never go on: a commit that was passed could not be taken.
    broken: Option<String>,
    /// After a jump: some inodes that the kernel holds are not looked at yet.
    unsettled: bool,
}

impl Follower {
    /// Follows from where the volume was opened, looking each time `every` has passed, for as long as it is held.
    pub(super) fn start(
        parts: Parts,
        start: (Tail, Option<(CommitNo, Timestamp)>),
        every: Duration,
        runtime: &Io,
    ) -> Arc<Follower> {
        let follower = Follower::new(parts, start);
        runtime.spawn(Follower::run(Arc::downgrade(&follower), every));
        follower
    }

    fn new(parts: Parts, start: (Tail, Option<(CommitNo, Timestamp)>)) -> Arc<Follower> {
        let (tail, commit) = start;
        let account = Account {
            commit,
            head: tail.head(),
            contact: parts.env.clock.monotonic(),
            trouble: None,
            jumps: 0,
            said_old: false,
        };
        let at = Position {
            tail,
            audited: None,
            pinned: None,
            checkpoint: CommitNo(0),
            behind: false,
            broken: None,
            unsettled: false,
        };
        Arc::new(Follower {
            parts,
            at: tokio::sync::Mutex::new(at),
            account: Mutex::new(account),
            tell: Mutex::new(None),
        })
    }

    /// Follows until the volume is gone.
    async fn run(this: Weak<Follower>, every: Duration) {
        let mut pause = every; // it was opened just now
        loop {
            tokio::time::sleep(pause).await;
            let Some(follower) = this.upgrade() else { return };
            pause = match follower.step().await {
                Ok(true) => Duration::ZERO,
                Ok(false) => every,
                Err(e) if matches!(&e, Error::Store(e) if e.may_pass()) => every.max(Duration::from_secs(1)),
                Err(_) => STOPPED_PAUSE,
            };
        }
    }

    fn too_old(&self, account: &Account, now: Timestamp) -> Option<String> {
        let newest = account.commit.map(|(_, time)| time);
        let limit = self.parts.max_age?;
        newest.is_none_or(|time| age(time, now) > limit).then(|| too_old(newest, now, limit))
    }

    /// Who is told what each step has changed; `None`: nobody any more.
    pub fn on_change(&self, tell: Option<Tell>) {
        *self.tell.lock() = tell.map(Arc::new);
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        let (now, monotonic) = (self.parts.env.clock.now(), self.parts.env.clock.monotonic());
        let account = self.account.lock();
        // A request is tried again for half a minute before it fails.
        let every = self.parts.fs.settings.follow.unwrap_or_default();
        let silent = monotonic.saturating_sub(account.contact) > SILENT.max(2 * every);
        Standing {
            commit: account.commit,
            head: account.head,
            lag: account.commit.map_or(Duration::ZERO, |(_, time)| age(time, now)),
            contact: monotonic.saturating_sub(account.contact),
            trouble: account
                .trouble
                .clone()
                .or_else(|| silent.then(|| Trouble::Away("no answer yet".into()))),
            jumps: account.jumps,
            too_old: self.too_old(&account, now),
        }
    }

    /// Goes as far as the store has it now in one round of requests. True if there may be more at once.
    pub async fn step(&self) -> Result<bool> {
        let mut at = self.at.lock().await;
        let stepped = self.step_from(&mut at).await;
        let mut account = self.account.lock();
        let trouble = match &stepped {
            Ok(_) => None,
            Err(Error::Store(e)) if e.may_pass() => Some(Trouble::Away(e.to_string())),
            Err(e) => Some(Trouble::Wrong(e.to_string())),
        };
        if !matches!(trouble, Some(Trouble::Away(_))) {
            account.contact = self.parts.env.clock.monotonic();
        }
        if account.trouble != trouble {
            let no = account.commit.map_or(0, |(no, _)| no.0);
            match &trouble {
                None => ::log::info!("following again, from commit {no}"),
                Some(Trouble::Away(e)) => ::log::warn!("stays at commit {no} while the store is away: {e}"),
                Some(Trouble::Wrong(e)) => ::log::error!("STOPPED at commit {no}, which is served on: {e}"),
            }
            account.trouble = trouble;
        }
        let old = self.too_old(&account, self.parts.env.clock.now());
        if old.is_some() != account.said_old {
            match &old {
                Some(words) => ::log::warn!("{words}"),
                None => ::log::info!("home is heard of again"),
            }
            account.said_old = old.is_some();
        }
        drop(account);
        stepped
    }

    async fn step_from(&self, at: &mut Position) -> Result<bool> {
        if let Some(why) = &at.broken {
            return Err(Error::Latched(why.clone()));
        }
        if matches!(self.account.lock().trouble, Some(Trouble::Wrong(_))) {
            // What was wrong must be right again before anything is taken: home may put more over a hole.
            at.tail.audit(&self.parts.ctx, &*self.parts.store).await?;
        }
        let found = at.tail.next(&self.parts.ctx, &*self.parts.store).await?;
        let more = !found.is_empty();
        self.account.lock().contact = self.parts.env.clock.monotonic();
        for segment in found {
            for commit in segment.commits {
                let decoded = delta::decode(&commit.bodies);
                let decoded = decoded.map_err(|e| opening::of_commit(commit.no, segment.head.seq, e));
                // The chain's end has moved on; without this commit nothing behind it may be shown.
                let (counters, changes) = decoded.inspect_err(|e| at.broken = Some(e.to_string()))?;
                let changed = self.parts.fs.advance(commit.no, counters, changes);
                self.account.lock().commit = Some((commit.no, commit.time));
                self.say(changed);
            }
            self.account.lock().head = Some(segment.head);
        }
        let now = self.parts.env.clock.monotonic();
        let due = |last: Option<Duration>, every| last.is_none_or(|last| now >= last + every);
        if more && due(at.pinned, PIN_EVERY) {
            self.pin(at, now)?;
        }
        if at.unsettled {
            self.settle().await?;
            at.unsettled = false;
        }
        let behind = at.tail.is_behind();
        let falls_behind = behind && !std::mem::replace(&mut at.behind, behind);
        at.behind = behind;
        if falls_behind || due(at.audited, if behind { AUDIT_EVERY / 5 } else { AUDIT_EVERY }) {
            if !more {
                self.pin(at, now)?;
            }
            at.audited = Some(now);
            let count = at.tail.audit(&self.parts.ctx, &*self.parts.store).await?;
            if self.parts.fs.position().0 > REBASE_ABOVE || count > FAR_SEGMENTS {
                self.checkpoint(at, count > FAR_SEGMENTS).await?;
            }
        }
        if self.parts.fs.position().0 > CHANGES_MAX.min(opening::memory() / 2) {
            return Err(Error::Refused(
                "the changes since home's newest checkpoint take too much memory here".into(),
            ));
        }
        Ok(more)
    }

    fn say(&self, changed: Changed) {
        let tell = self.tell.lock().clone();
        if let Some(tell) = tell.filter(|_| !changed.is_empty()) {
            tell(changed);
        }
    }

    fn pin(&self, at: &mut Position, now: Duration) -> Result<()> {
        at.pinned = Some(now);
        match at.tail.head() {
            Some(head) => write_pin_if_newer(&self.parts.dir, head),
            None => Ok(()),
        }
    }

    /// Looks at the newest checkpoint. One of a commit that is shown takes the place of changes in memory; when far
    /// behind, a newer one is gone to.
    async fn checkpoint(&self, at: &mut Position, far: bool) -> Result<()> {
        let Some(name) = self.parts.store.list("checkpoint/", None, 1).await?.pop().map(|object| object.name)
        else {
            return Ok(());
        };
        let Some(commit) = crate::tree::checkpoint::commit_of(&name) else { return Ok(()) };
        let (_, shown) = self.parts.fs.position();
        if commit > shown {
            return if far { self.jump(at).await } else { Ok(()) };
        }
        if commit <= at.checkpoint {
            return Ok(());
        }
        at.checkpoint = commit;
        let root =
            opening::usable_checkpoint(&self.parts.ctx, &self.parts.dir, Some(&*self.parts.store), &name)
                .await?;
        // Only one that stands on the very chain that was followed; an overtaken writer may have left others.
        if let Some(root) = root.filter(|root| at.tail.passed(root.replay_prev)) {
            self.parts.fs.rebase(Tree { root: root.tree }, root.commit);
        }
        Ok(())
    }

    /// Opens the newest state as a mount does, and goes on from there.
    async fn jump(&self, at: &mut Position) -> Result<()> {
        let store = Some(&*self.parts.store);
        self.pin(at, self.parts.env.clock.monotonic())?; // what is gone to must hold what was seen
        let opened = opening::recover(
            &self.parts.ctx,
            &self.parts.dir,
            &self.parts.env,
            store,
            Role::Reader,
            Version::Newest,
        )
        .await?;
        let Opened { recovery, recovered, time, root, .. } = opened;
        held::stands(root.as_ref(), recovered.head)?;
        let (no, before) = (recovery.last_commit, self.parts.fs.position().1);
        if no <= before {
            return Ok(());
        }
        ::log::info!("from commit {} to {} by home's newest checkpoint", before.0, no.0);
        let changed = self.parts.fs.jump(recovery);
        at.tail = Tail::new(&recovered);
        at.unsettled = true;
        {
            let mut account = self.account.lock();
            account.commit = time.map(|time| (no, time));
            account.head = at.tail.head();
            account.jumps += 1;
        }
        self.say(changed);
        self.settle().await?;
        at.unsettled = false;
        Ok(())
    }

    /// Finds out which of the inodes that the kernel holds a jump has lost, and keeps them.
    async fn settle(&self) -> Result<()> {
        for ino in self.parts.fs.unsettled() {
            loop {
                match self.parts.fs.settle(ino) {
                    Ok(()) => break,
                    Err(fs::Error::Log(Error::Missing(ptrs))) => self.parts.reader.fetch(&ptrs).await?,
                    Err(fs::Error::Log(e)) => return Err(e),
                    Err(e) => return Err(Error::Refused(e.to_string())),
                }
            }
        }
        self.parts.fs.settled();
        Ok(())
    }
}

/// How old a time stamp is; not negative, whatever the clocks say.
pub(super) fn age(time: Timestamp, now: Timestamp) -> Duration {
    let nanos = |t: Timestamp| i128::from(t.secs) * 1_000_000_000 + i128::from(t.nanos);
    let age = nanos(now).saturating_sub(nanos(time)).max(0);
    Duration::from_nanos(u64::try_from(age).unwrap_or(u64::MAX))
}
