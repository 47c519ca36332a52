//! An open volume: the file system with the log, the store and the threads behind it.
//! Invariant: a writer's log is continued only from its own end; whatever is acknowledged is on the way to the
//! store before anybody is told otherwise.

use super::divergent::FENCED;
use super::durable::{Durable, Protection, WaitError};
use super::follow::{Follower, Parts as Parted};
use super::held;
use super::hold::Holding;
use super::io::Io;
use super::opening::{self, Opened, Version};
use super::orphans;
use super::predecessor::Predecessor;
use super::proof::ProvenStore;
use super::space;
use super::trust::Trust;
use super::uploader::{Hooks, Upload, Uploader};
use crate::clock::{Env, Thread};
use crate::crypto::keyfile::{KeyFile, Role as KeyRole};
use crate::fs::{CheckpointOutcome, Checkpointer, Committer, Fs, Settings, Shipping};
use crate::log::follow::Tail;
use crate::log::reader::{FrameReader, ReaderLimits};
use crate::log::recovery::Role;
use crate::log::segment::VolumeContext;
use crate::log::statedir::StateDir;
use crate::log::volume::Superblock;
use crate::log::writer::LogWriter;
use crate::log::{self, ClosedSegment, Error, Result};
use crate::ops::names::told;
use crate::store::Store;
use crate::tree::checkpoint;
use crate::types::{CommitNo, Epoch, FramePtr, Head, Seq, Timestamp};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use tokio::runtime::Handle;

/// Local checkpoints kept: the newest, and one in case it is damaged.
const LOCAL_CHECKPOINTS: usize = 2;
/// How long inodes without names are looked for in the store, at a start and at a hand-over.
const FIND_TIMEOUT: Duration = Duration::from_secs(60);
const FIND_TIMEOUT_AFTER: Duration = Duration::from_secs(5);
/// Pause between two attempts of a commit that waits for the link or for room.
const PAUSE: Duration = Duration::from_secs(1);
/// An operation must be able to hold what it needs at once, in bytes.
const FRAME_CACHE_MIN: usize = 8 << 20;
/// Segment files kept open for reading.
pub(super) const OPEN_FILES: usize = 128;
/// How long a stop waits for an upload that cannot be stopped in the middle.
const STOP_WAIT: Duration = Duration::from_secs(2);
/// How to open a volume.
pub struct OpenOptions {
    /// Where the volume lies.
    pub store: Arc<dyn Store>,
    /// Key file: a writer's for read-write.
    pub key: KeyFile,
    /// State directory.
    pub state: PathBuf,
    /// Time and randomness.
    pub env: Env,
    /// Which version; a writer opens the newest.
    pub version: Version,
    /// What a reader demands of the store.
    pub trust: Trust,
    /// What fsync waits for.
    pub protection: Protection,
    /// How long fsync waits for the store.
    pub sync_timeout: Duration,
    /// Bound on copies of sent segments on the local disk, in bytes.
    pub disk_cache: u64,
    /// Bound on opened frames in memory, in bytes.
    pub frame_cache: usize,
    /// Segments uploaded at once.
    pub uploads: usize,
    /// How the file system behaves. The sizes of records, pages and segments are the volume's, whatever is said here.
    pub settings: Settings,
}

/// An open volume.
pub struct Volume {
    /// The file system.
    pub fs: Arc<Fs>,
    /// What the volume is.
    pub superblock: Superblock,
    /// The end of the chain that it was opened at.
    pub head: Option<Head>,
    /// Its state directory.
    pub dir: Arc<StateDir>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// Version shown, for a reader.
    pub opened: Option<(CommitNo, Timestamp)>,
    pub(super) reader: Arc<FrameReader>,
    pub(super) ctx: Arc<VolumeContext>,
    pub(super) env: Env,
    pub(super) runtime: Io,
    /// What only a writer has.
    pub(super) home: Option<Home>,
    /// What only a reader has that moves on.
    follower: Option<Arc<Follower>>,
}

pub(super) struct Home {
    pub(super) shipper: Arc<Shipper>,
    committer: Mutex<Option<Box<dyn Thread>>>,
}

impl Volume {
    /// Opens a volume: recovery, then the threads of a writer. Blocks; not to be called on the runtime.
    pub fn open(options: OpenOptions, runtime: &Handle) -> Result<Volume> {
        Volume::open_after(options, None, &Io::on(runtime))
    }

    /// Like [`Volume::open`], on a runtime that may have to be driven. With a predecessor, who has just closed the state
    /// directory, a writer asks the store for nothing, and frees no inode that is still open.
    pub fn open_after(options: OpenOptions, before: Option<&Predecessor>, runtime: &Io) -> Result<Volume> {
        let dir = admitted(&options)?;
        let store = options.store.clone();
        let role = if options.settings.read_only { Role::Reader } else { Role::Writer };
        let reached = match (before, role) {
            (Some(_), Role::Writer) => None,
            _ => runtime.block_on(opening::reach(&*store, &dir, role))?,
        };
        let found = runtime.block_on(opening::find(&options, &dir, reached, role));
        let (reached, found) = match found {
            // It answered, and then it did not: as if it had not answered at all.
            Err(Error::Store(e))
                if reached.is_some() && opening::works_alone(&dir, role)? && e.may_pass() =>
            {
                ::log::warn!("the store does not go on serving ({e}); opening from what this host holds");
                (None, runtime.block_on(opening::find(&options, &dir, None, role)))
            }
            found => (reached, found),
        };
        let opening::Found { superblock, to_pin, ctx, opened } = found?;
        // Who goes on with a mount shows what was shown.
        if before.is_none() && options.version == Version::Newest && role == Role::Reader {
            options.trust.check_age(opened.time, options.env.clock.now())?;
        }
        if let Some(bytes) = to_pin {
            dir.write_atomic(log::volume::NAME, &bytes)?; // only a volume that could be opened is pinned
        }
        let limits = ReaderLimits {
            frame_cache_bytes: options.frame_cache.max(FRAME_CACHE_MIN),
            disk_cache_bytes: options.disk_cache,
            open_files: OPEN_FILES,
        };
        let reader =
            FrameReader::new(dir.clone(), ctx.clone(), Some(store.clone()), options.env.clone(), limits)?;
        let reader = Arc::new(reader);
        let settings = Settings {
            record_size: u64::from(superblock.parameters.record_size),
            page_size: superblock.parameters.page_size as usize,
            segment_size: u64::from(superblock.parameters.segment_size),
            ..options.settings
        };
        let shown = opened.time.map(|time| (opened.recovery.last_commit, time));
        let (start, head) = ((Tail::new(&opened.recovered), shown), opened.recovered.head);
        let parts = Parts {
            options: &options,
            before,
            store: reached,
            dir: &dir,
            ctx: ctx.clone(),
            reader: &reader,
            runtime,
            settings,
        };
        let (fs, home) =
            if options.settings.read_only { parts.reader(opened)? } else { parts.writer(opened)? };
        let follower = settings.follow.filter(|_| settings.read_only && options.version == Version::Newest);
        let follower = follower.map(|every| {
            let (dir, store, reader, fs) = (dir.clone(), store.clone(), reader.clone(), fs.clone());
            let (ctx, env, max_age) = (ctx.clone(), options.env.clone(), options.trust.max_age);
            Follower::start(Parted { ctx, dir, store, reader, max_age, env, fs }, start, every, runtime)
        });
        let (runtime, env) = (runtime.clone(), options.env.clone());
        Ok(Volume {
            follower,
            head,
            fs,
            superblock,
            dir,
            store,
            opened: shown,
            reader,
            ctx,
            env,
            runtime,
            home,
        })
    }

    /// The account of what is durable where; none for a reader.
    pub fn durable(&self) -> Option<&Arc<Durable>> {
        self.home.as_ref().map(|home| &home.shipper.durable)
    }

    /// Time of the newest commit, and of the newest one that the embassy holds.
    pub fn commit_times(&self) -> (Option<Timestamp>, Option<Timestamp>) {
        match &self.home {
            Some(home) => {
                let times = home.shipper.times.lock();
                (times.newest, times.remote)
            }
            None => {
                let time = self.shown().map(|(_, time)| time);
                (time, time)
            }
        }
    }

    /// The one that moves a reader on, if it does.
    pub fn follower(&self) -> Option<&Arc<Follower>> {
        self.follower.as_ref()
    }

    /// The commit that a reader shows now.
    pub fn shown(&self) -> Option<(CommitNo, Timestamp)> {
        self.follower.as_ref().map_or(self.opened, |follower| follower.standing().commit)
    }

    /// What a process learns that goes on after this one.
    pub fn predecessor(&self) -> Predecessor {
        Predecessor::of(&self.fs, self.durable())
    }

    /// Brings frames to this host; bounded in time.
    pub async fn fetch(&self, ptrs: &[FramePtr]) -> Result<()> {
        self.reader.fetch(ptrs).await
    }

    /// Calls `done` when the commit is durable in the store, or cannot be within `timeout`.
    pub fn when_remote(
        &self,
        timeout: Duration,
        done: Box<dyn FnOnce(std::result::Result<(), WaitError>) + Send>,
    ) {
        let commit = self.fs.sync_point();
        match &self.home {
            Some(home) => {
                self.fs.request_commit(commit, true);
                home.shipper.durable.wait_remote(commit, timeout, done);
            }
            None => done(Ok(())),
        }
    }

    /// Commits what there is, ends the writer's threads and waits at most `timeout` until the store has it all.
    /// What is then unsent stays in the state directory. Later calls do nothing.
    pub fn close(&self, timeout: Duration) {
        self.reader.flush_index();
        let Some(home) = &self.home else { return };
        let Some(committer) = home.committer.lock().take() else { return };
        home.shipper.closing.store(true, Ordering::Release);
        self.fs.stop_commits();
        if !committer.join() {
            ::log::error!("the committer ended in a panic; what was not committed is lost");
        }
        let shipper = &home.shipper;
        let clock = &shipper.env.clock;
        let deadline = clock.monotonic() + timeout;
        self.runtime.block_on(async {
            while !shipper.uploader_idle() && clock.monotonic() < deadline {
                if shipper.durable.fenced().is_some() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        shipper.stop();
        self.reader.flush_index();
    }
}

/// The state directory, if it may be opened with this key in this way.
fn admitted(options: &OpenOptions) -> Result<Arc<StateDir>> {
    let read_only = options.settings.read_only;
    options
        .key
        .require(if read_only { KeyRole::Reader } else { KeyRole::Writer })
        .map_err(|e| Error::Refused(e.to_string()))?;
    if !read_only && options.version != Version::Newest {
        return Err(Error::Refused("an older version cannot be written".into())); // it would fork the log
    }
    let dir = Arc::new(StateDir::open_on(options.env.disk.clone(), &options.state)?);
    match dir.read(FENCED)?.filter(|_| !read_only) {
        Some(reason) => Err(Error::Refused(format!(
            "this host is no longer the volume's writer. Who took it over first was noted in {} (others may have since): \
             {}. From this state directory nothing is written any more. 'embassyfs divergence' shows what was not sent; \
             to write from here again, have the volume handed back and 'accept' it, or 'promote'",
            dir.root().join(FENCED).display(),
            String::from_utf8_lossy(&reason).trim_end_matches('.')
        ))),
        None => Ok(dir),
    }
}

/// What both kinds of volume are put together from.
struct Parts<'a> {
    options: &'a OpenOptions,
    before: Option<&'a Predecessor>,
    /// The store, if it answered.
    store: Option<&'a dyn Store>,
    dir: &'a Arc<StateDir>,
    ctx: Arc<VolumeContext>,
    reader: &'a Arc<FrameReader>,
    runtime: &'a Io,
    settings: Settings,
}

impl Parts<'_> {
    fn reader(self, opened: Opened) -> Result<(Arc<Fs>, Option<Home>)> {
        let env = self.options.env.clone();
        let fs = Arc::new(Fs::new(self.settings, env, self.reader.clone(), opened.recovery));
        // What the kernel holds, and what it has to be told.
        if let Some(before) = self.before.filter(|_| self.settings.follow.is_some())
            && !fs.take_held(&before.held)
        {
            return Err(Error::Refused("the account of what the kernel holds cannot be read".into()));
        }
        Ok((fs, None))
    }

    fn writer(self, mut opened: Opened) -> Result<(Arc<Fs>, Option<Home>)> {
        let env = self.options.env.clone();
        let recovered = &opened.recovered;
        let last_commit = opened.recovery.last_commit;
        let log = Arc::new(Mutex::new(LogWriter::new(
            self.dir.clone(),
            self.ctx.clone(),
            env.clone(),
            recovered.epoch.max(Epoch(1)),
            recovered.head,
            recovered.next_seq,
            recovered.last_commit,
        )));
        if self.before.is_none() {
            self.runtime.block_on(opening::check_next_ino(&opened, self.reader))?;
        }
        let superblock = self.dir.read(log::volume::NAME)?.unwrap_or_default().into();
        let proven = ProvenStore::new(self.options.store.clone(), superblock, env.clock.clone());
        if self.store.is_some() {
            self.runtime.block_on(proven.refuse_to_begin())?;
            self.runtime.block_on(held::send_again(&self.ctx, self.dir, &proven, &opened))?;
        }
        // Applications wait for a successor: it must not wait for the store.
        let patience = self.before.map_or(FIND_TIMEOUT, |_| FIND_TIMEOUT_AFTER);
        opened.recovery.orphans = self.runtime.block_on(orphans::find(&opened, self.reader, patience))?;
        let (sent, unsent) = match self.before {
            Some(before) => before.split_sent(&opened),
            None => self.runtime.block_on(opening::split_sent(&self.ctx, self.store, &opened)),
        };
        let checkpoint =
            self.runtime.block_on(opening::unsent_checkpoint(&self.ctx, self.dir, self.store))?;
        let at = held::position(&opened, &sent, &unsent);
        let at = self.before.map_or(at, |before| before.position(at));
        let (protection, sync_timeout) = (self.options.protection, self.options.sync_timeout);
        let durable = Arc::new(Durable::new(protection, sync_timeout, env.clone(), at));
        durable.start_ticker(self.runtime.handle());
        let replay_seq = opened.replay_seq;
        let last = (last_commit, opened.time.unwrap_or_else(|| env.clock.now()));
        let times = Times { newest: opened.time, remote: opened.time, recent: Default::default() };
        let shipper = Arc::new(Shipper {
            dir: self.dir.clone(),
            ctx: self.ctx,
            env: env.clone(),
            runtime: self.runtime.clone(),
            reader: self.reader.clone(),
            durable: durable.clone(),
            uploader: Mutex::new(None),
            covered: AtomicU64::new(replay_seq.0),
            sent: Mutex::new(sent.iter().map(|segment| segment.head.seq).collect()),
            times: Mutex::new(times),
            fs: OnceLock::new(),
            free_bytes: Arc::new(AtomicU64::new(u64::MAX)),
            closing: AtomicBool::new(false),
        });
        let proven = proven.keeping(shipper.ctx.clone(), durable.clone());
        shipper.start_uploader(Arc::new(proven), self.options.uploads);
        shipper.retire();
        unsent.into_iter().for_each(|segment| shipper.push(Upload::Segment(segment)));
        if let Some((name, body, after)) = checkpoint {
            shipper.push(Upload::Checkpoint { name, body, after });
        }
        let threads = env.threads.clone();
        let fs = Arc::new(Fs::new(self.settings, env, self.reader.clone(), opened.recovery));
        self.before.map_or(Ok(()), |before| before.hand_on(&fs, &durable))?;
        let dirty_max = self.options.settings.dirty_max;
        space::watch(&fs, self.dir, self.runtime, dirty_max, shipper.free_bytes.clone());
        let _ = shipper.fs.set(Arc::downgrade(&fs)); // set once, here
        let latched = Arc::downgrade(&fs);
        let dir = Arc::downgrade(self.dir); // the account can outlive the volume by a moment
        durable.on_fence(Box::new(move |reason| {
            let noted = dir.upgrade().map_or(Ok(()), |dir| dir.write_atomic(FENCED, told(reason).as_bytes()));
            if let Err(e) = noted {
                ::log::error!("that this host is fenced cannot be noted for the next start: {e}");
            }
            if let Some(fs) = latched.upgrade() {
                fs.fail(reason);
            }
        }));
        let checkpointer = Checkpointer::new(fs.clone(), log.clone(), shipper.clone(), replay_seq);
        let committer = Committer::new(fs.clone(), log, shipper.clone(), checkpointer, last);
        let thread = threads
            .spawn("committer", Box::new(move || committer.run()))
            .map_err(Error::io("start the committer's thread"))?;
        fs.abandoned().into_iter().for_each(|ino| orphans::free(&fs, ino, self.reader, self.runtime));
        Ok((fs, Some(Home { shipper, committer: Mutex::new(Some(thread)) })))
    }
}

/// Commits whose time is wanted until the store has them.
#[derive(Default)]
struct Times {
    newest: Option<Timestamp>,
    remote: Option<Timestamp>,
    recent: std::collections::VecDeque<(CommitNo, Timestamp)>,
}

/// Takes what the committer makes to the spool, the store and the account.
pub(super) struct Shipper {
    dir: Arc<StateDir>,
    ctx: Arc<VolumeContext>,
    env: Env,
    runtime: Io,
    reader: Arc<FrameReader>,
    durable: Arc<Durable>,
    pub(super) uploader: Mutex<Option<Uploader>>,
    /// Segments below this are covered by a local checkpoint.
    covered: AtomicU64,
    /// Sent segments that still lie in the spool.
    sent: Mutex<Vec<Seq>>,
    times: Mutex<Times>,
    /// The file system above, once there is one.
    fs: OnceLock<Weak<Fs>>,
    /// What the spool's disk has left, looked at each second; the greatest number while that is not known.
    pub(super) free_bytes: Arc<AtomicU64>,
    /// The volume is being closed: nothing is waited for any more.
    closing: AtomicBool,
}

impl Shipper {
    fn start_uploader(self: &Arc<Self>, store: Arc<dyn Store>, uploads: usize) {
        let this = Arc::downgrade(self);
        let on_sent = Box::new(move |segment: &ClosedSegment| {
            if let Some(this) = this.upgrade() {
                this.on_sent(segment);
            }
        });
        let this = Arc::downgrade(self);
        let fs = move || this.upgrade().and_then(|this| this.fs.get().and_then(Weak::upgrade));
        let holding = Holding::new(&self.dir, &store, &self.durable, &self.free_bytes);
        let hold = Box::new(move || fs().map_or(Duration::ZERO, |fs| holding.longest(&fs)));
        let ctx = self.ctx.clone();
        let whose = Box::new(move |seq, bytes: &[u8]| {
            log::claim::read_marked(&ctx, seq, bytes).ok().map(|found| found.to_string())
        });
        let uploader = Uploader::start(
            self.runtime.handle().clone(),
            store,
            self.durable.clone(),
            self.env.clone(),
            uploads,
            Hooks { on_sent, hold, whose },
        );
        *self.uploader.lock() = Some(uploader);
    }

    fn push(&self, upload: Upload) {
        if let Some(uploader) = &*self.uploader.lock() {
            uploader.push(upload);
        }
    }

    fn uploader_idle(&self) -> bool {
        self.uploader.lock().as_ref().is_none_or(Uploader::idle)
    }

    /// Stops the uploads, and waits a moment for the one that cannot be stopped in the middle.
    fn stop(&self) {
        let Some(mut uploader) = self.uploader.lock().take() else { return };
        uploader.stop();
        let ended = self.runtime.block_on(async { tokio::time::timeout(STOP_WAIT, uploader.ended()).await });
        if ended.is_err() {
            ::log::warn!("an upload is still on its way; it may yet arrive, which does no harm");
        }
    }

    fn on_sent(&self, segment: &ClosedSegment) {
        self.sent.lock().push(segment.head.seq);
        {
            let mut times = self.times.lock();
            while let Some((no, time)) = times.recent.front().copied()
                && no <= segment.last_commit
            {
                times.remote = Some(time);
                times.recent.pop_front();
            }
        }
        self.retire();
    }

    /// Sent segments that no replay from the local checkpoint needs become cache.
    fn retire(&self) {
        let covered = Seq(self.covered.load(Ordering::Acquire));
        let ready: Vec<Seq> = self.sent.lock().extract_if(.., |seq| *seq < covered).collect();
        if ready.is_empty() {
            return;
        }
        for seq in ready {
            if let Err(e) = self.reader.retire(seq) {
                ::log::warn!("segment {seq} stays in the spool: {e}");
            }
        }
        if let Err(e) = self.reader.evict() {
            ::log::warn!("the disk cache is over its limit: {e}");
        }
    }

    fn drop_old_checkpoints(&self) -> Result<()> {
        let mut names = self.dir.checkpoints()?;
        names.sort();
        for name in names.iter().skip(LOCAL_CHECKPOINTS) {
            self.dir.remove(name)?;
        }
        Ok(())
    }
}

impl Shipping for Shipper {
    fn committed(&self, commit: CommitNo) {
        let now = self.env.clock.now();
        {
            let mut times = self.times.lock();
            times.newest = Some(now);
            times.recent.push_back((commit, now));
        }
        self.durable.set_local(commit);
    }

    fn closed(&self, segment: ClosedSegment) {
        self.push(Upload::Segment(segment));
    }

    fn checkpoint(&self, checkpoint: CheckpointOutcome) -> Result<()> {
        let CheckpointOutcome { root, dead, .. } = checkpoint;
        let signer = self.ctx.signer.as_ref().ok_or_else(|| Error::Refused("no key to sign with".into()))?;
        let body = checkpoint::seal(&root, self.ctx.id, &self.ctx.key, self.ctx.key_id, signer, &self.env);
        let name = checkpoint::name(root.commit);
        self.dir.write_atomic(&name, &body)?;
        self.drop_old_checkpoints()?;
        self.covered.fetch_max(root.replay_seq.0, Ordering::AcqRel);
        self.push(Upload::Checkpoint { name, body: body.into(), after: root.root_seq });
        dead.into_iter().for_each(|ptr| self.reader.dead(ptr));
        self.retire();
        Ok(())
    }

    fn dead(&self, ptr: FramePtr) {
        self.reader.dead(ptr);
    }

    fn pause(&self) -> bool {
        if self.closing.load(Ordering::Acquire) {
            return false;
        }
        self.runtime.block_on(async { tokio::time::sleep(PAUSE).await });
        self.env.threads.turn();
        true
    }

    fn stored(&self) -> Seq {
        self.durable.remote_head().map_or(Seq(0), |head| head.seq)
    }

    fn fetch(&self, ptrs: &[FramePtr]) -> Result<()> {
        // A link that is down, or a store that refuses, holds commits up that need old pages; it must not end the
        // writer. Whoever waits for the commit has a bound of his own.
        self.runtime.block_on(async {
            loop {
                match self.reader.fetch(ptrs).await {
                    Err(Error::Store(e)) if e.may_pass() && !self.closing.load(Ordering::Acquire) => {
                        ::log::warn!("a commit waits for pages that only the store has: {e}");
                        tokio::time::sleep(PAUSE).await;
                    }
                    other => return other,
                }
            }
        })
    }

    fn failed(&self, reason: &str) {
        self.durable.latch(reason.to_string());
    }
}
