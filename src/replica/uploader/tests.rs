//! The uploader over a faulty store in memory, in paused time.

use super::*;
use crate::clock::Clock;
use crate::disk::FileRef;
use crate::replica::durable::{Position, Protection, WaitError};
use crate::store::fault::{FaultStore, Faults};
use crate::store::memory::MemoryStore;
use crate::store::{ObjectInfo, local::LocalStore};
use crate::types::{CommitNo, Hash, Head, Timestamp};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use tokio::time::{Instant, sleep, timeout};

/// The runtime's clock, which the tests pause.
struct TokioClock(Instant);

impl Clock for TokioClock {
    fn now(&self) -> Timestamp {
        Timestamp::default()
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

struct Rig {
    dir: tempfile::TempDir,
    memory: Arc<MemoryStore>,
    fault: Arc<FaultStore>,
    durable: Arc<Durable>,
    sent: Arc<Mutex<Vec<u64>>>,
    env: Env,
}

impl Rig {
    fn new(protection: Protection) -> Rig {
        let memory = Arc::new(MemoryStore::new());
        let fault = Arc::new(FaultStore::new(memory.clone(), 11, Faults::default()));
        let env = Env { clock: Arc::new(TokioClock(Instant::now())), ..Env::system() };
        let durable =
            Arc::new(Durable::new(protection, Duration::from_secs(3), env.clone(), Position::default()));
        durable.start_ticker(&tokio::runtime::Handle::current());
        Rig { dir: tempfile::tempdir().unwrap(), memory, fault, durable, sent: Arc::default(), env }
    }

    fn start(&self, store: Arc<dyn Store>) -> Uploader {
        self.start_held(store, Box::new(|| Duration::ZERO))
    }

    fn start_held(&self, store: Arc<dyn Store>, hold: Hold) -> Uploader {
        let sent = self.sent.clone();
        let on_sent = Box::new(move |segment: &ClosedSegment| sent.lock().push(segment.head.seq.0));
        let handle = tokio::runtime::Handle::current();
        let hooks = Hooks { on_sent, hold, whose: Box::new(|_, _| None) };
        Uploader::start(handle, store, self.durable.clone(), self.env.clone(), 4, hooks)
    }

    fn segment(&self, n: u64) -> ClosedSegment {
        let body: Vec<u8> = (0..5000 + n * 7).map(|i| (i * n) as u8).collect();
        let path = self.dir.path().join(Seq(n).to_string());
        std::fs::write(&path, &body).unwrap();
        let head = Head { seq: Seq(n), hash: Hash::default() };
        ClosedSegment {
            file: FileRef::system(&path),
            len: body.len() as u64,
            head,
            last_commit: CommitNo(n * 10),
            stored: Seq(n.max(1) - 1).max(Seq(1)),
            closed_at: Some(Duration::from_secs(1 << 40)), // never long ago: these are no real segments
        }
    }

    fn push(&self, uploader: &Uploader, n: u64) {
        self.durable.set_local(CommitNo(n * 10));
        uploader.push(Upload::Segment(self.segment(n)));
    }

    async fn wait(&self, n: u64) -> Result<(), WaitError> {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.durable.wait(CommitNo(n * 10), Box::new(move |result| drop(tell.send(result))));
        told.await.unwrap()
    }
}

async fn until_idle(uploader: &Uploader) {
    timeout(Duration::from_secs(3600), async {
        while !uploader.idle() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
}

/// Makes each put take the longer, the lower its number: later segments are done first.
struct Backwards(Arc<MemoryStore>, Mutex<Vec<String>>);

impl Store for Backwards {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move {
            let number = u64::from_str_radix(&name[name.len() - 1..], 16).unwrap();
            sleep(Duration::from_millis(1000 - number * 100)).await;
            self.1.lock().push(name.clone());
            self.0.put_new(&name, body).await
        }
        .boxed()
    }
    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.0.get_range(name, range)
    }
    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.0.get_suffix(name, len)
    }
    fn list(&self, p: &str, a: Option<&str>, n: usize) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        self.0.list(p, a, n)
    }
    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.0.delete(name)
    }
    fn describe(&self) -> String {
        "backwards:".to_owned()
    }
}

#[tokio::test(start_paused = true)]
async fn the_position_advances_in_order_over_segments_done_out_of_order() {
    let rig = Rig::new(Protection::Strict);
    let store = Arc::new(Backwards(rig.memory.clone(), Mutex::default()));
    let uploader = rig.start(store.clone());
    (1..=4).for_each(|n| rig.push(&uploader, n));
    // Reading the files takes real time, which a paused clock does not know.
    while store.1.lock().len() < 3 {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(rig.durable.snapshot().remote, CommitNo(0), "segment 1 is not there yet");
    until_idle(&uploader).await;
    assert_eq!(*rig.sent.lock(), [1, 2, 3, 4]);
    assert_eq!(rig.durable.snapshot().remote, CommitNo(40));
    assert_ne!(store.1.lock()[0], format!("log/{}", Seq(1)));
}

#[tokio::test(start_paused = true)]
async fn lost_requests_and_answers_delay_but_lose_and_repeat_nothing() {
    let rig = Rig::new(Protection::Strict);
    let delay_max = Duration::from_secs(1);
    rig.fault.set_faults(Faults {
        lost_requests: 200,
        lost_answers: 300,
        delays: 300,
        delay_max,
        corrupt_reads: 100,
    });
    let uploader = rig.start(rig.fault.clone());
    (1..=40).for_each(|n| rig.push(&uploader, n));
    until_idle(&uploader).await;
    assert_eq!(*rig.sent.lock(), (1..=40).collect::<Vec<_>>());
    assert_eq!(rig.durable.fenced(), None);
    let seen = rig.durable.snapshot();
    assert_eq!((seen.remote, seen.unsent_bytes, seen.last_error), (CommitNo(400), 0, None));
    assert!(uploader.figures().failures > 5);
    for n in 1..=40 {
        let (body, _) = rig.memory.get_suffix(&format!("log/{}", Seq(n)), u64::MAX).await.unwrap();
        assert_eq!(body, std::fs::read(rig.segment(n).file.path).unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn segments_are_held_back_as_long_as_they_are_to_be_but_for_the_first() {
    let rig = Rig::new(Protection::Local);
    let (limit, held) = (Duration::from_secs(3), Arc::new(AtomicBool::new(true)));
    let says = held.clone();
    let hold = move || if says.load(Ordering::SeqCst) { limit } else { Duration::ZERO };
    let uploader = rig.start_held(rig.memory.clone(), Box::new(hold));
    let sent = || rig.sent.lock().clone();
    let begin = Instant::now();
    uploader.push(Upload::Segment(ClosedSegment { stored: Seq(0), ..rig.segment(1) }));
    until_idle(&uploader).await;
    assert!(begin.elapsed() < 2 * HOLD_TICK, "the store holds nothing yet");
    let begin = Instant::now();
    rig.push(&uploader, 2);
    sleep(limit - HOLD_TICK).await;
    assert_eq!(sent(), [1], "held back");
    until_idle(&uploader).await;
    assert!(begin.elapsed() < limit + 2 * HOLD_TICK, "{:?}", begin.elapsed());
    rig.push(&uploader, 3);
    sleep(2 * HOLD_TICK).await;
    assert_eq!(sent(), [1, 2], "held back again");
    held.store(false, Ordering::SeqCst);
    until_idle(&uploader).await;
    assert!(begin.elapsed() < limit + 6 * HOLD_TICK, "{:?}", begin.elapsed());
    assert_eq!(sent(), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_foreign_segment_fences_for_good_and_keeps_the_files() {
    let rig = Rig::new(Protection::Available);
    let foreign = format!("log/{}", Seq(2));
    // As long as ours: only the bytes differ.
    let len = rig.segment(2).len as usize;
    rig.memory.put_new(&foreign, Bytes::from(vec![9; len])).await.unwrap();
    let uploader = rig.start(rig.fault.clone());
    (1..=8).for_each(|n| rig.push(&uploader, n));
    let message = match rig.wait(2).await {
        Err(WaitError::Failed(message)) => message,
        other => panic!("{other:?}"),
    };
    assert!(message.starts_with("FENCED") && message.contains(&foreign), "{message}");
    let before = rig.memory.list("log/", None, 99).await.unwrap().len();
    rig.push(&uploader, 9);
    sleep(Duration::from_secs(600)).await;
    assert_eq!(rig.memory.list("log/", None, 99).await.unwrap().len(), before, "nothing is sent any more");
    assert!(rig.durable.fenced().is_some());
    for n in 2..=9 {
        assert!(rig.dir.path().join(Seq(n).to_string()).exists());
    }
    assert!(rig.sent.lock().iter().all(|n| *n < 2));
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_run_sent_is_known_as_ours() {
    let rig = Rig::new(Protection::Strict);
    let segment = rig.segment(1);
    let body = std::fs::read(&segment.file.path).unwrap();
    rig.memory.put_new(&format!("log/{}", Seq(1)), body.into()).await.unwrap();
    let uploader = rig.start(rig.fault.clone());
    rig.push(&uploader, 1);
    assert_eq!(rig.wait(1).await, Ok(()));
    until_idle(&uploader).await;
    assert_eq!(rig.durable.fenced(), None);
}

#[tokio::test(start_paused = true)]
async fn an_outage_falls_back_and_its_end_brings_back_the_sync() {
    let rig = Rig::new(Protection::Available);
    let uploader = rig.start(rig.fault.clone());
    rig.push(&uploader, 1);
    assert_eq!(rig.wait(1).await, Ok(()));
    rig.fault.set_outage(true);
    rig.push(&uploader, 2);
    let start = Instant::now();
    assert_eq!(rig.wait(2).await, Ok(()));
    assert!(start.elapsed() >= Duration::from_secs(3) && start.elapsed() < Duration::from_secs(4));
    let seen = rig.durable.snapshot();
    assert!(!seen.in_sync && seen.remote == CommitNo(10));
    assert!(seen.last_error.is_some_and(|error| error.contains("outage")));
    sleep(Duration::from_secs(3600)).await;
    rig.push(&uploader, 3);
    assert_eq!(rig.wait(3).await, Ok(()));
    rig.fault.set_outage(false);
    // The longest pause between attempts is 5 s.
    sleep(Duration::from_secs(6)).await;
    until_idle(&uploader).await;
    let seen = rig.durable.snapshot();
    assert!(seen.in_sync && seen.remote == CommitNo(30) && seen.fallbacks == 1 && seen.last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn strict_times_out_during_an_outage() {
    let rig = Rig::new(Protection::Strict);
    rig.fault.set_outage(true);
    let uploader = rig.start(rig.fault.clone());
    rig.push(&uploader, 1);
    assert_eq!(rig.wait(1).await, Err(WaitError::TimedOut));
    assert!(!uploader.idle());
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_waits_for_the_segments_that_it_needs() {
    let rig = Rig::new(Protection::Local);
    let uploader = rig.start(rig.fault.clone());
    let body = Bytes::from_static(b"root");
    let checkpoint = |after| Upload::Checkpoint {
        name: format!("checkpoint/{after}"),
        body: body.clone(),
        after: Seq(after),
    };
    rig.push(&uploader, 1);
    uploader.push(checkpoint(2));
    sleep(Duration::from_secs(60)).await;
    assert!(rig.memory.list("checkpoint/", None, 9).await.unwrap().is_empty());
    rig.push(&uploader, 2);
    // One that is there already is fine.
    uploader.push(checkpoint(2));
    until_idle(&uploader).await;
    assert_eq!(rig.memory.list("checkpoint/", None, 9).await.unwrap().len(), 1);
    assert_eq!(uploader.figures().sent_checkpoints, 2);
}

#[tokio::test(start_paused = true)]
async fn a_missing_spool_file_is_said_and_tried_again() {
    let rig = Rig::new(Protection::Local);
    let uploader = rig.start(rig.fault.clone());
    let segment = rig.segment(1);
    let aside = segment.file.path.with_extension("aside");
    std::fs::rename(&segment.file.path, &aside).unwrap();
    uploader.push(Upload::Segment(segment.clone()));
    while rig.durable.snapshot().last_error.is_none() {
        sleep(Duration::from_millis(1)).await;
    }
    std::fs::rename(&aside, &segment.file.path).unwrap();
    until_idle(&uploader).await;
    assert_eq!(*rig.sent.lock(), [1]);
}

#[tokio::test]
async fn a_stop_leaves_the_rest_to_the_next_start() {
    let rig = Rig::new(Protection::Local);
    let store: Arc<dyn Store> = Arc::new(LocalStore::new(rig.dir.path().join("store")));
    store.put_new("volume.json", Bytes::from_static(b"{}")).await.unwrap();
    let first = rig.start(store.clone());
    first.stop();
    (1..=3).for_each(|n| rig.push(&first, n));
    sleep(Duration::from_millis(50)).await;
    assert!(!first.idle() && rig.sent.lock().is_empty());
    drop(first);
    let second = rig.start(store.clone());
    (1..=3).for_each(|n| second.push(Upload::Segment(rig.segment(n))));
    until_idle(&second).await;
    assert_eq!(store.list("log/", None, 9).await.unwrap().len(), 3);
}

#[test]
fn many_small_segments_are_under_way_at_once_and_few_large_ones() {
    let waiting = |lens: &[u64]| -> VecDeque<(ClosedSegment, Duration)> {
        let segment = |len| ClosedSegment {
            file: FileRef::system(std::path::Path::new("nowhere")),
            len,
            head: Head { seq: Seq(2), hash: Hash([0; 32]) },
            last_commit: CommitNo(1),
            stored: Seq(1),
            closed_at: None,
        };
        lens.iter().map(|len| (segment(*len), Duration::ZERO)).collect()
    };
    let sent = |most, lens: &[u64]| {
        let mut under_way = UnderWay { most, count: 0, bytes: 0, alone: false };
        let mut segments = waiting(lens);
        std::iter::from_fn(|| under_way.next(&mut segments)).count()
    };
    assert_eq!(sent(3, &[1000; 10]), 3);
    assert_eq!(sent(32, &[16 << 20; 10]), 4);
    assert_eq!(sent(32, &[3 << 30, 1]), 1, "one goes whatever its size");
    let mut under_way = UnderWay { most: 2, count: 0, bytes: 0, alone: false };
    let mut segments = waiting(&[5, 6, 7]);
    let first = under_way.next(&mut segments).unwrap();
    assert!(under_way.next(&mut segments).is_some() && under_way.next(&mut segments).is_none());
    under_way.arrived(&first);
    assert_eq!(under_way.next(&mut segments).map(|s| s.len), Some(7));
}
