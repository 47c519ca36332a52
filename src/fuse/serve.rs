//! Carrying a request to its reply: at once if it can be answered from here, else through the pool.
//! Invariant: every request is answered exactly once, within a bound, or, when the connection is handed over, has had
//! no effect and is left to who goes on; what fails is logged with its operation.

use super::gate::{Gate, What};
use crate::fs::{self, Changed, Fs, Seek, Strip};
use crate::log;
use crate::ops::requests::Watch;
use crate::types::{CommitNo, FramePtr, Ino};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// An operation's result as the kernel takes it: a value or an errno.
pub(super) type Served<T> = Result<T, i32>;

/// The kernel's unit of caching, in bytes.
const PAGE: u64 = 4096;
/// How often an operation is tried again with more frames; each time at least one more is here.
const FETCH_ROUNDS: usize = 4096;
/// How long a writer waits for room before it gets an error.
const SPACE_TIMEOUT: Duration = Duration::from_secs(300);
/// Reads of at least this many bytes are opened on the pool.
const POOL_READ: usize = 128 << 10;
/// Bytes fetched ahead of a sequential reader whose data is only in the store.
const READ_AHEAD: u64 = 8 << 20;

/// What the requests of a mount need from the layers that ship and fetch.
pub trait Backend: Send + Sync {
    /// Brings frames to this host; bounded in time.
    fn fetch(&self, ptrs: Vec<FramePtr>) -> BoxFuture<'_, log::Result<()>>;
    /// Calls `done` once, when the commit is durable at the mount's protection level or cannot be.
    fn when_durable(&self, commit: CommitNo, done: Box<dyn FnOnce(Result<(), String>) + Send>);
    /// True when an fsync must wait for the store.
    fn ships_on_fsync(&self) -> bool;
    /// Bytes the spool's disk has left.
    fn free_bytes(&self) -> u64;
    /// An application got an error that POSIX does not foresee: for the status.
    fn failed(&self, what: &str);
    /// Where requests are counted.
    fn watch(&self) -> &Arc<Watch>;
    /// Who is told of changes that did not come through the kernel; `None`: nobody any more.
    fn on_change(&self, _tell: Option<Box<dyn Fn(Changed) + Send + Sync>>) {}
}

/// Size of the volume, in blocks of `block_size` bytes.
pub struct StatFs {
    pub(super) blocks: u64,
    /// Not used yet.
    pub(super) free: u64,
    /// Of these, what can be written now.
    pub(super) available: u64,
    pub(super) files: u64,
    pub(super) files_free: u64,
    pub(super) block_size: u32,
}

/// The requests of one mount.
pub struct Requests {
    fs: Arc<Fs>,
    backend: Arc<dyn Backend>,
    pool: Handle,
    gate: Arc<Gate>,
}

/// A request on the pool.
struct Job<Op, Reply> {
    what: What,
    op: Op,
    reply: Reply,
}

impl Requests {
    /// Requests over `fs`, with waiting ones on `pool`.
    pub fn new(fs: Arc<Fs>, backend: Arc<dyn Backend>, pool: Handle) -> Arc<Requests> {
        Arc::new(Requests { fs, backend, pool, gate: Arc::new(Gate::new()) })
    }

    /// Requests over another file system of the same mount, behind the same gate: an older version.
    pub fn beside(&self, fs: Arc<Fs>) -> Arc<Requests> {
        let (backend, pool, gate) = (self.backend.clone(), self.pool.clone(), self.gate.clone());
        Arc::new(Requests { fs, backend, pool, gate })
    }

    /// Where what has to wait is carried out.
    pub(super) fn pool(&self) -> &Handle {
        &self.pool
    }

    /// True if the volume changes without the kernel.
    pub(super) fn follows(&self) -> bool {
        self.fs.settings.follow.is_some()
    }

    /// See [`Backend::on_change`].
    pub(super) fn on_change(&self, tell: Option<Box<dyn Fn(Changed) + Send + Sync>>) {
        self.backend.on_change(tell);
    }

    /// See [`Fs::everything_held`].
    pub(super) fn everything_held(&self) -> Changed {
        self.fs.everything_held()
    }

    /// See [`Fs::set_names_keep`].
    pub(super) fn set_names_keep(&self, keep: Duration) {
        self.fs.set_names_keep(keep);
    }

    /// The gate in front of them.
    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Runs `op`, and `reply` with its result, here or on the pool. The caller is inside the gate.
    pub(super) fn serve<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        mut op: impl FnMut(&Fs) -> fs::Result<T> + Send + 'static,
        reply: impl FnOnce(&Fs, Served<T>) + Send + 'static,
    ) {
        let open = self.backend.watch().begin(what);
        let reply = move |fs: &Fs, result: Served<T>| {
            open.answered(&result);
            reply(fs, result);
        };
        let what = What::current(what);
        match self.attempt(&what, &mut op) {
            Err(e) if wants_retry(&e) => {
                self.pool.spawn(self.clone().retry(Job { what, op, reply }, e));
            }
            result => reply(&self.fs, result.map_err(|e| self.report(&what, &e))),
        }
    }

    /// `reply`, with the request counted from now until it is called.
    fn counted<T, R: FnOnce(Served<T>) + Send + 'static>(
        &self,
        what: &'static str,
        reply: R,
    ) -> impl FnOnce(Served<T>) + Send + use<T, R> {
        let open = self.backend.watch().begin(what);
        move |result| {
            open.answered(&result);
            reply(result);
        }
    }

    /// Reads; what must come from the store brings what follows along. With `counts` it is an access.
    pub(super) fn read(
        self: &Arc<Self>,
        ino: Ino,
        offset: u64,
        len: usize,
        counts: bool,
        reply: impl FnOnce(Served<Bytes>) + Send + 'static,
    ) {
        let reply = self.counted("read", reply);
        let mut op = move |fs: &Fs| {
            let bytes = fs.read(ino, offset, len)?;
            if counts {
                fs.accessed(ino);
            }
            Ok(bytes)
        };
        let what = What::current("read");
        let reply = move |_: &Fs, result| reply(result);
        if len >= POOL_READ {
            // A streaming reader has several of these under way: they are opened side by side.
            let this = self.clone();
            self.pool.spawn(async move {
                if let Some((job, e)) = this.settle(Job { what, op, reply }) {
                    this.read_ahead(ino, offset + len as u64);
                    this.retry(job, e).await;
                }
            });
            return;
        }
        match self.attempt(&what, &mut op) {
            Err(e) if wants_retry(&e) => {
                self.read_ahead(ino, offset + len as u64);
                self.pool.spawn(self.clone().retry(Job { what, op, reply }, e));
            }
            result => reply(&self.fs, result.map_err(|e| self.report(&what, &e))),
        }
    }

    fn read_ahead(self: &Arc<Self>, ino: Ino, from: u64) {
        let this = self.clone();
        self.pool.spawn(async move {
            let Ok(ptrs) = this.fs.frames_of(ino, from..from.saturating_add(READ_AHEAD)) else { return };
            let fetched = tokio::select! {
                fetched = this.backend.fetch(ptrs) => fetched,
                () = this.gate.closed() => return,
            };
            if let Err(e) = fetched {
                ::log::debug!("read-ahead: {e}"); // the read itself will say it aloud
            }
        });
    }

    /// Writes; the bytes are copied only if the write has to wait.
    pub(super) fn write(
        self: &Arc<Self>,
        ino: Ino,
        offset: u64,
        data: &[u8],
        strip: Strip,
        reply: impl FnOnce(Served<usize>) + Send + 'static,
    ) {
        let reply = self.counted("write", reply);
        let what = What::current("write");
        match self.attempt(&what, &mut |fs| fs.write_as(ino, offset, data, strip)) {
            Err(e) if wants_retry(&e) => {
                let data = data.to_vec();
                let op = move |fs: &Fs| fs.write_as(ino, offset, &data, strip);
                let reply = move |_: &Fs, result| reply(result);
                self.pool.spawn(self.clone().retry(Job { what, op, reply }, e));
            }
            result => reply(result.map_err(|e| self.report(&what, &e))),
        }
    }

    /// Looks for data or a hole. Pages that were changed through a mapping may still be with the kernel alone, and fill
    /// what is a hole here: `write_back` has it write those of a stretch, given by offset and length.
    pub(super) fn seek(
        self: &Arc<Self>,
        ino: Ino,
        offset: u64,
        what: Seek,
        write_back: impl Fn(u64, u64) -> std::io::Result<()> + Send + 'static,
        reply: impl FnOnce(Served<u64>) + Send + 'static,
    ) {
        if self.fs.settings.read_only || matches!(self.fs.may_have_holes(ino), Ok(false)) {
            return self.serve("lseek", move |fs| fs.seek(ino, offset, what), move |_, result| reply(result));
        }
        let reply = self.counted("lseek", reply);
        let (this, pool) = (Arc::downgrade(self), self.pool.clone());
        let at = What::current("lseek");
        // Not on the dispatch thread: the kernel's writes come to it while this waits for them.
        self.pool.spawn_blocking(move || {
            seek_written_back(&this, &pool, at, (ino, offset, what), write_back, reply)
        });
    }

    /// Bytes that a mapping left to the kernel could not be taken: nobody waits for the answer, so it is said here.
    pub(super) fn mapped_write_failed(&self, ino: Ino, offset: u64, errno: i32) {
        let why = std::io::Error::from_raw_os_error(errno);
        let what =
            format!("bytes at {offset} of inode {}, changed through a mapping, are lost: {why}", ino.0);
        ::log::error!("{what}");
        self.backend.failed(&what);
    }

    /// Replies when everything written before is durable at the mount's protection level.
    pub(super) fn fsync(self: &Arc<Self>, reply: impl FnOnce(Served<()>) + Send + 'static) {
        let reply = self.counted("fsync", reply);
        if let Some(reason) = self.fs.failure() {
            ::log::error!("fsync: {reason}");
            return reply(Err(libc::EIO));
        }
        let commit = self.fs.sync_point();
        self.fs.request_commit(commit, self.backend.ships_on_fsync());
        // Called by whoever makes it durable, who must not suffer from a panic here.
        let at = What::current("fsync");
        let done = move |result: Result<(), String>| {
            let result = result.map_err(|reason| {
                ::log::error!("fsync of commit {}: {reason}", commit.0);
                libc::EIO
            });
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| reply(result))) {
                ::log::error!("{at}: panic in the reply: {}", panic_text(&*panic));
            }
        };
        self.backend.when_durable(commit, Box::new(done));
    }

    /// Whether reading changes access times.
    pub(super) fn counts_access(&self) -> bool {
        self.fs.settings.relatime
    }

    pub(super) fn statfs(&self) -> StatFs {
        const BLOCK: u64 = 4096;
        let usage = self.fs.usage();
        let room = self.backend.free_bytes();
        let total = self.fs.settings.size_limit.unwrap_or(usage.used.saturating_add(room));
        let free = total.saturating_sub(usage.used);
        // Inodes are never scarce; a large round number keeps tools that divide by it happy.
        let files_free = 1 << 40;
        StatFs {
            blocks: total / BLOCK,
            free: free / BLOCK,
            available: free.min(room) / BLOCK,
            files: usage.inodes + files_free,
            files_free,
            block_size: BLOCK as u32,
        }
    }

    /// One try. A panic inside becomes EIO: the mount goes on.
    fn attempt<T>(&self, what: &What, op: &mut impl FnMut(&Fs) -> fs::Result<T>) -> fs::Result<T> {
        catch_unwind(AssertUnwindSafe(|| op(&self.fs))).unwrap_or_else(|panic| {
            self.panicked(what, &*panic);
            Err(fs::Error::Os(libc::EIO))
        })
    }

    /// A bug: said in log and status, with what was asked but not what it carried.
    pub(super) fn panicked(&self, what: &What, panic: &(dyn Any + Send)) {
        let text = panic_text(panic);
        ::log::error!("{what}: panic: {text}; answered EIO");
        self.backend.failed(&format!("{}: panic: {text}", what.in_public()));
    }

    /// One try on the pool, and the reply if that settles it. Else the job comes back with what it wants. When the
    /// connection is being handed over the request is left to who goes on: it has had no effect.
    fn settle<T, Op, Reply>(&self, mut job: Job<Op, Reply>) -> Option<(Job<Op, Reply>, fs::Error)>
    where
        Op: FnMut(&Fs) -> fs::Result<T>,
        Reply: FnOnce(&Fs, Served<T>),
    {
        let Some(_inside) = self.gate.enter() else {
            std::mem::forget(job.reply); // dropped, it would answer EIO
            return None;
        };
        match self.attempt(&job.what, &mut job.op) {
            Err(e) if wants_retry(&e) => return Some((job, e)),
            result => {
                let result = result.map_err(|e| self.report(&job.what, &e));
                self.answer(job, result);
            }
        }
        None
    }

    fn answer<T, Op, Reply: FnOnce(&Fs, Served<T>)>(&self, job: Job<Op, Reply>, result: Served<T>) {
        let Job { what, reply, .. } = job;
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| reply(&self.fs, result))) {
            self.panicked(&what, &*panic);
        }
    }

    /// Tries again, each time with what was missing, until the request is answered.
    async fn retry<T, Op, Reply>(self: Arc<Self>, mut job: Job<Op, Reply>, mut error: fs::Error)
    where
        Op: FnMut(&Fs) -> fs::Result<T>,
        Reply: FnOnce(&Fs, Served<T>),
    {
        let mut waited_for_commit = false;
        for _ in 0..FETCH_ROUNDS {
            let waited = tokio::select! {
                waited = self.wait_for_what_is_missing(&job.what, &error, &mut waited_for_commit) => waited,
                () = self.gate.closed() => return std::mem::forget(job.reply),
            };
            if let Err(errno) = waited {
                return self.answer(job, Err(errno));
            }
            match self.settle(job) {
                Some(again) => (job, error) = again,
                None => return,
            }
        }
        let what = job.what;
        ::log::error!(
            "{what}: gave up after {FETCH_ROUNDS} rounds of fetching; is the frame cache too small?"
        );
        self.answer(job, Err(libc::EIO));
    }

    async fn wait_for_what_is_missing(
        &self,
        what: &What,
        error: &fs::Error,
        waited_for_commit: &mut bool,
    ) -> Served<()> {
        if let Some(ptrs) = error.missing() {
            let fetched = self.backend.fetch(ptrs.to_vec()).await;
            return fetched.map_err(|e| self.report(what, &fs::Error::Log(e)));
        }
        let over_limit = matches!(error, fs::Error::OverLimit);
        if matches!(error, fs::Error::Busy) || (over_limit && !*waited_for_commit) {
            *waited_for_commit |= over_limit;
            return self.wait_for_space(what).await;
        }
        Err(self.report(what, error))
    }

    /// The errno, and a line in log and status when the answer is not one that POSIX foresees.
    fn report(&self, what: &What, e: &fs::Error) -> i32 {
        if !matches!(e, fs::Error::Os(_) | fs::Error::OverLimit) {
            ::log::error!("{what}: {e}");
            self.backend.failed(&format!("{}: {e}", what.in_public()));
        }
        e.errno()
    }

    async fn wait_for_space(&self, what: &What) -> Served<()> {
        let (sender, receiver) = oneshot::channel();
        self.fs.when_space(Box::new(move || {
            let _ = sender.send(()); // the waiter may have given up
        }));
        match tokio::time::timeout(SPACE_TIMEOUT, receiver).await {
            Ok(_) => Ok(()),
            Err(_) => {
                ::log::error!(
                    "{what}: no room for {} s; is the spool's disk stuck?",
                    SPACE_TIMEOUT.as_secs()
                );
                Err(libc::EIO)
            }
        }
    }
}

fn wants_retry(e: &fs::Error) -> bool {
    e.missing().is_some() || matches!(e, fs::Error::Busy | fs::Error::OverLimit)
}

/// What a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// See [`Requests::seek`]. While the kernel writes back, nothing of the mount is held: if it is handed over meanwhile,
/// the kernel's writes are answered by who goes on, and so is this.
fn seek_written_back(
    requests: &Weak<Requests>,
    pool: &Handle,
    at: What,
    (ino, offset, what): (Ino, u64, Seek),
    write_back: impl Fn(u64, u64) -> std::io::Result<()>,
    reply: impl FnOnce(Served<u64>) + Send + 'static,
) {
    let mut cleaned = offset;
    loop {
        let (sender, receiver) = std::sync::mpsc::channel();
        let Some(this) = requests.upgrade() else { return std::mem::forget(reply) };
        let op = move |fs: &Fs| fs.seek(ino, offset, what);
        let found = move |_: &Fs, result: Served<u64>| {
            let _ = sender.send(result); // it is received below
        };
        if let Some((job, e)) = this.settle(Job { what: at, op, reply: found }) {
            pool.block_on(this.clone().retry(job, e));
        }
        drop(this);
        // No answer: the mount is being handed over, or it was a bug, and said.
        let Ok(found) = receiver.try_recv() else { return std::mem::forget(reply) };
        // The hole that was passed, or that was found, must be one for the kernel too.
        let suspect = match (what, &found) {
            (Seek::Data, Ok(at)) => offset..*at,
            (Seek::Data, Err(_)) => offset..u64::MAX,
            (Seek::Hole, Ok(at)) => *at..at.saturating_add(PAGE),
            (Seek::Hole, Err(_)) => return reply(found),
        };
        if suspect.is_empty() || suspect.end <= cleaned {
            return reply(found);
        }
        let len = if suspect.end == u64::MAX { 0 } else { suspect.end - suspect.start };
        if let Err(e) = write_back(suspect.start, len) {
            ::log::warn!("lseek: the kernel does not write back inode {}: {e}", ino.0);
            return reply(found);
        }
        cleaned = suspect.end;
    }
}
