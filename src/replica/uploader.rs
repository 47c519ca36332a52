//! Sends closed segments and checkpoints to the store.
//! Invariant: the durable position advances in order over segments that the store is known to hold; an object that
//! is not ours under a name that we need fences this writer for good, and what it has not sent stays in the spool.

use super::durable::Durable;
use crate::clock::Env;
use crate::log::ClosedSegment;
use crate::log::segment::is_whole;
use crate::ops::status::UploadFigures;
use crate::store::retry::{Backoff, COMPARE_SUFFIX};
use crate::store::{Store, StoreError, file_suffix};
use crate::types::Seq;
use ::log::{error, info, warn};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::FuturesOrdered;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

const FIRST_DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);
/// Pauses after errors that go away only when somebody acts. Still asked again, for then nobody has to remount.
const DENIED_FIRST_DELAY: Duration = Duration::from_secs(1);
const DENIED_DELAY: Duration = Duration::from_secs(30);
/// How long the disk is trusted with a segment that was just written.
const TRUSTED_FOR: Duration = Duration::from_secs(60);
/// How often is looked at whether a segment is still held back.
const HOLD_TICK: Duration = Duration::from_millis(20);
/// Bytes of segments on their way at once, at most, if it is more than one.
const BYTES_MAX: u64 = 64 << 20;
/// One in so many failures of the same upload is logged; the status shows each.
const LOG_EVERY: u64 = 12;

/// What is to be sent. The queue is not bounded here: a segment in it is a path, and the spool's limit bounds those.
#[derive(Clone, Debug)]
pub enum Upload {
    /// A segment; pushed in the order of the chain.
    Segment(ClosedSegment),
    /// A checkpoint, put when the embassy holds all segments up to and with `after`, for it refers to them.
    Checkpoint {
        /// Object name.
        name: String,
        /// The object.
        body: Bytes,
        /// The newest segment that it needs.
        after: Seq,
    },
}

/// Says how old a segment may become before it is sent, as things are now: it is held back for the local disk's sake.
pub type Hold = Box<dyn Fn() -> Duration + Send + Sync>;

/// Says of a whole foreign segment whose it is, if it tells.
pub type Whose = Box<dyn Fn(Seq, &[u8]) -> Option<String> + Send + Sync>;

/// Called for each segment, in order, when the embassy holds it and all before it.
pub type OnSent = Box<dyn Fn(&ClosedSegment) + Send + Sync>;

/// What the uploader asks and tells those around it.
pub struct Hooks {
    /// See [`OnSent`].
    pub on_sent: OnSent,
    /// See [`Hold`].
    pub hold: Hold,
    /// See [`Whose`].
    pub whose: Whose,
}

/// See the module. Stops when it is dropped.
pub struct Uploader {
    queue: mpsc::UnboundedSender<Upload>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    store: Arc<dyn Store>,
    durable: Arc<Durable>,
    env: Env,
    on_sent: OnSent,
    hold: Hold,
    whose: Whose,
    /// Turns true once: at a stop or a fence.
    halt: watch::Sender<bool>,
    pending: AtomicU64,
    sent_segments: AtomicU64,
    sent_bytes: AtomicU64,
    sent_checkpoints: AtomicU64,
    failures: AtomicU64,
}

/// Why an attempt failed, by what to do about it.
enum Failure {
    /// Ask again soon.
    Transient(String),
    /// Ask again slowly, and say it loudly.
    Stuck(String),
    /// Never ask again.
    Fenced(String),
}

impl Uploader {
    /// Starts on the runtime, with at most `in_flight` segments at a time (and so as many bodies in memory, if the store
    /// needs them there).
    pub fn start(
        handle: tokio::runtime::Handle,
        store: Arc<dyn Store>,
        durable: Arc<Durable>,
        env: Env,
        in_flight: usize,
        hooks: Hooks,
    ) -> Uploader {
        let Hooks { on_sent, hold, whose } = hooks;
        let (queue, incoming) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            store,
            durable,
            env,
            on_sent,
            hold,
            whose,
            halt: watch::Sender::new(false),
            pending: AtomicU64::new(0),
            sent_segments: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            sent_checkpoints: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
        let task = handle.spawn(run(shared.clone(), incoming, in_flight.max(1)));
        Uploader { queue, shared, task }
    }

    /// Queues `upload`. Segments come in the order of the chain. After a stop or a fence it only counts as unsent.
    pub fn push(&self, upload: Upload) {
        if let Upload::Segment(segment) = &upload {
            self.shared.durable.queued(segment);
        }
        self.shared.pending.fetch_add(1, Ordering::SeqCst);
        // The receiver is gone only after a halt; then the segment stays in the spool, as it must.
        let _ = self.queue.send(upload);
    }

    /// True when all that was pushed has been sent.
    pub fn idle(&self) -> bool {
        self.shared.pending.load(Ordering::SeqCst) == 0
    }

    /// The counters.
    pub fn figures(&self) -> UploadFigures {
        let get = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        UploadFigures {
            pending: get(&self.shared.pending),
            sent_segments: get(&self.shared.sent_segments),
            sent_bytes: get(&self.shared.sent_bytes),
            sent_checkpoints: get(&self.shared.sent_checkpoints),
            failures: get(&self.shared.failures),
        }
    }

    /// Stops for good without waiting. What is under way may still take effect in the store; the next start finds
    /// it there. What was not sent stays in the spool.
    pub fn stop(&self) {
        self.shared.halt.send_replace(true);
    }

    /// Waits until a stop has taken effect, so that nothing of it holds the state directory any more.
    pub async fn ended(&mut self) {
        let _ = (&mut self.task).await; // it was told to end; how it did changes nothing
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The one task: keeps segments in flight, takes their results in order, and puts checkpoints between them.
async fn run(shared: Arc<Shared>, mut incoming: mpsc::UnboundedReceiver<Upload>, in_flight: usize) {
    let mut halt = shared.halt.subscribe();
    let mut segments = VecDeque::new();
    let mut under_way = UnderWay { most: in_flight, count: 0, bytes: 0, alone: false };
    let mut checkpoints: VecDeque<(String, Bytes, Seq)> = VecDeque::new();
    let mut flying = FuturesOrdered::new();
    let mut saving: Option<BoxFuture<'static, ()>> = None;
    loop {
        // The first of all is not held back: until it is in the store, each goes alone.
        let held = segments.front().is_some_and(|(front, since): &(ClosedSegment, Duration)| {
            front.stored != Seq(0) && shared.now() < *since + (shared.hold)()
        });
        while !held && let Some(segment) = under_way.next(&mut segments) {
            flying.push_back(send_segment(shared.clone(), segment));
        }
        if saving.is_none() {
            let sent = shared.durable.remote_head().map_or(Seq(0), |head| head.seq);
            if checkpoints.front().is_some_and(|(_, _, after)| *after <= sent) {
                let next = checkpoints.pop_front();
                saving = next.map(|(name, body, _)| send_checkpoint(shared.clone(), name, body).boxed());
            }
        }
        tokio::select! {
            biased;
            _ = halt.wait_for(|halted| *halted) => return,
            Some(segment) = flying.next(), if !flying.is_empty() => {
                under_way.arrived(&segment);
                shared.segment_sent(&segment);
            }
            () = tokio::time::sleep(HOLD_TICK), if held => (),
            () = finished(&mut saving) => {
                saving = None;
                shared.sent_checkpoints.fetch_add(1, Ordering::SeqCst);
                shared.pending.fetch_sub(1, Ordering::SeqCst);
            }
            upload = incoming.recv() => match upload {
                Some(Upload::Segment(segment)) => segments.push_back((segment, shared.now())),
                Some(Upload::Checkpoint { name, body, after }) => checkpoints.push_back((name, body, after)),
                None => return,
            },
        }
    }
}

/// What is on its way. Many small segments may be: each thread that waits in `fsync` makes one, and takes its turn only
/// when they share the round trip. Of large ones few fill the link, and each may be in memory.
struct UnderWay {
    most: usize,
    count: usize,
    bytes: u64,
    /// The one that is, must be the only one.
    alone: bool,
}

impl UnderWay {
    /// The segment to send now, if any. One whose trailer does not know what the store holds goes alone: a reader abroad
    /// could not tell a gap before it from a loss.
    fn next(&mut self, segments: &mut VecDeque<(ClosedSegment, Duration)>) -> Option<ClosedSegment> {
        let (front, _) = segments.front()?;
        let wants_alone = front.stored == Seq(0);
        let full = self.count >= self.most || self.bytes + front.len > BYTES_MAX;
        if self.count > 0 && (self.alone || wants_alone || full) {
            return None;
        }
        self.alone = wants_alone;
        self.count += 1;
        self.bytes += front.len;
        segments.pop_front().map(|(segment, _)| segment)
    }

    fn arrived(&mut self, segment: &ClosedSegment) {
        self.count -= 1;
        self.bytes -= segment.len;
    }
}

/// Waits for the future in `slot`; for ever when there is none.
async fn finished(slot: &mut Option<BoxFuture<'static, ()>>) {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Ends when the store holds the segment.
async fn send_segment(shared: Arc<Shared>, segment: ClosedSegment) -> ClosedSegment {
    let name = format!("log/{}", segment.head.seq);
    shared.insist(&name, || shared.attempt(&name, &segment).boxed()).await;
    segment
}

async fn send_checkpoint(shared: Arc<Shared>, name: String, body: Bytes) {
    let attempt = || {
        async {
            match shared.store.put_new(&name, body.clone()).await {
                // One commit has one tree: whoever put it, it says the same; and it is verified when it is read.
                Ok(()) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
                Err(error) => Err(failure(error)),
            }
        }
        .boxed()
    };
    shared.insist(&name, attempt).await;
}

fn failure(error: StoreError) -> Failure {
    if error.is_transient() {
        Failure::Transient(error.to_string())
    } else {
        Failure::Stuck(error.to_string())
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.env.clock.monotonic()
    }

    fn segment_sent(&self, segment: &ClosedSegment) {
        self.durable.sent(segment);
        (self.on_sent)(segment);
        self.sent_segments.fetch_add(1, Ordering::SeqCst);
        self.sent_bytes.fetch_add(segment.len, Ordering::SeqCst);
        self.pending.fetch_sub(1, Ordering::SeqCst);
    }

    /// Repeats `attempt` until it succeeds. Does not return after a fence: the halt ends it with everything else.
    async fn insist<'a>(&'a self, name: &str, attempt: impl Fn() -> BoxFuture<'a, Result<(), Failure>>) {
        let mut backoff = Backoff::new(FIRST_DELAY, DELAY_MAX);
        let mut denied = Backoff::new(DENIED_FIRST_DELAY, DENIED_DELAY);
        let mut failures = 0;
        loop {
            let (message, pause) = match attempt().await {
                Ok(()) => {
                    if failures > 0 {
                        info!("{name}: sent after {failures} failed attempts");
                        self.durable.set_error(None);
                    }
                    return;
                }
                Err(Failure::Transient(message)) => {
                    if failures % LOG_EVERY == 0 {
                        warn!("{message}; trying on");
                    }
                    (message, backoff.pause(&self.env))
                }
                Err(Failure::Stuck(message)) => {
                    error!("{message}; nothing reaches the embassy until this is put right");
                    (message, denied.pause(&self.env))
                }
                Err(Failure::Fenced(message)) => {
                    self.durable.fence(message);
                    self.halt.send_replace(true);
                    return std::future::pending().await;
                }
            };
            failures += 1;
            self.failures.fetch_add(1, Ordering::SeqCst);
            self.durable.set_error(Some(message));
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(&self, name: &str, segment: &ClosedSegment) -> Result<(), Failure> {
        // Looked at before each attempt: what is in the spool now must be the segment that was closed.
        spool_tail(name, segment, 0).await?;
        if segment.closed_at.is_none_or(|at| self.now() >= at + TRUSTED_FOR) {
            read_through(name, segment).await?;
        }
        match self.store.put_file(name, &segment.file).await {
            Ok(()) => Ok(()),
            Err(StoreError::AlreadyExists { .. }) => self.compare(name, segment).await,
            Err(error) => Err(failure(error)),
        }
    }

    /// The name is taken: by an earlier attempt of ours whose answer was lost, or by another writer. A fence is for
    /// good, so two readings must agree on what is there: one may have been damaged on its way.
    async fn compare(&self, name: &str, segment: &ClosedSegment) -> Result<(), Failure> {
        let ours = spool_tail(name, segment, COMPARE_SUFFIX).await?;
        let mut seen = None;
        let (tail, size) = loop {
            let (tail, size) = match self.store.get_suffix(name, COMPARE_SUFFIX).await {
                Ok(found) => found,
                // "Taken" was not the last word: the store was deciding between two requests.
                Err(StoreError::NotFound { .. }) => {
                    return Err(Failure::Transient(format!("{name}: taken, but not there")));
                }
                Err(error) => return Err(failure(error)),
            };
            if size == segment.len && tail == ours {
                return Ok(());
            }
            let found = (tail, size);
            match &seen {
                None => seen = Some(found),
                Some(before) if *before == found => break found,
                Some(_) => {
                    let message =
                        format!("{name}: two readings of it differ; the link or the store damages data");
                    return Err(Failure::Transient(message));
                }
            }
        };
        // A claim or a barrier is short, and says who has put it.
        let whole = size == tail.len() as u64;
        let whose = whole.then(|| (self.whose)(segment.head.seq, &tail)).flatten();
        let whose = whose.unwrap_or_else(|| "is another writer's".into());
        let path = &segment.file.path;
        let dir = path.parent().unwrap_or(path).display();
        Err(Failure::Fenced(format!(
            "FENCED: {name} in {} {whose}, so this host no longer owns the volume. Nothing more is sent; \
             what was not sent is kept in {dir}",
            self.store.describe()
        )))
    }
}

/// What has lain on the disk for long is read through before it goes: damage must not be sent for good, and then be all
/// that is left when the local copy is evicted.
async fn read_through(name: &str, segment: &ClosedSegment) -> Result<(), Failure> {
    let (file, head) = (segment.file.clone(), segment.head);
    let shown = file.path.display().to_string();
    let whole = match file.disk.is_real() {
        true => {
            tokio::task::spawn_blocking(move || is_whole(&file, head)).await.map_err(std::io::Error::other)
        }
        false => Ok(is_whole(&file, head)),
    };
    match whole.and_then(|whole| whole) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::Stuck(format!(
            "{name}: {shown} is damaged, so it is not sent; put it back from a copy of the state directory"
        ))),
        Err(e) => Err(Failure::Stuck(format!("{name}: cannot read {shown} to send it: {e}"))),
    }
}

/// The last `len` bytes of the segment in the spool, if it is as long as it was when it was closed.
async fn spool_tail(name: &str, segment: &ClosedSegment, len: u64) -> Result<Bytes, Failure> {
    let (tail, size) = file_suffix(name, &segment.file, len).await.map_err(failure)?;
    if size != segment.len {
        let shown = segment.file.path.display();
        let message = format!("{shown} has {size} bytes instead of {}; it is not sent", segment.len);
        return Err(Failure::Stuck(message));
    }
    Ok(tail)
}

#[cfg(test)]
mod tests;
