//! A store that does its worst, short of breaking its contract for good.
//! Invariant: of two puts under one name one wins, and what was acknowledged is there. The fault model:
//!
//! - **Delays** of each request and each answer, so that they overtake each other.
//! - **Lost requests** (nothing happened) and **lost answers** (it happened): the caller hears of a time-out, late.
//! - **Late and double effects**: a put takes effect long after its caller was told of a time-out, or a second time.
//! - **Outages** of the whole store, or of puts alone; **throttling**: one request in two is refused for a while.
//! - **Refusals** as with expired credentials, for a while.
//! - **Stale lists**: a list as it was up to a minute ago.
//! - **Damage on the way**: a bit of an answer is another.
//!
//! It also watches what is put: under one name one writer offers one object, for ever.

use super::chance::Chance;
use bytes::Bytes;
use embassyfs::clock::Clock;
use embassyfs::disk::FileRef;
use embassyfs::store::memory::MemoryStore;
use embassyfs::store::{ObjectInfo, Store, StoreError};
use futures::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often what happens, in requests of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Temper {
    pub lost: u64,
    pub late: u64,
    pub stale: u64,
    pub damaged: u64,
}

impl Temper {
    pub const CALM: Temper = Temper { lost: 0, late: 0, stale: 0, damaged: 0 };
    pub const ROUGH: Temper = Temper { lost: 60, late: 30, stale: 100, damaged: 10 };
}

/// A weather: until when it lasts.
#[derive(Clone, Copy, Debug, Default)]
struct Until {
    silent: Duration,
    no_puts: Duration,
    throttled: Duration,
    refused: Duration,
}

struct Inner {
    /// What the store holds, truly.
    truth: MemoryStore,
    chance: Chance,
    clock: Arc<dyn Clock>,
    temper: Mutex<Temper>,
    until: Mutex<Until>,
    /// When each object came.
    came: Mutex<BTreeMap<String, Duration>>,
    /// What was ever offered under each name, by writer.
    offered: Mutex<BTreeMap<(u32, String), u64>>,
}

/// See the module. Clones are the same store.
#[derive(Clone)]
pub struct SimStore(Arc<Inner>);

/// A host's way to the store.
pub struct Link {
    store: SimStore,
    /// Who puts.
    writer: u32,
    cut: AtomicBool,
}

impl SimStore {
    pub fn new(chance: Chance, clock: Arc<dyn Clock>) -> SimStore {
        SimStore(Arc::new(Inner {
            truth: MemoryStore::new(),
            chance,
            clock,
            temper: Mutex::new(Temper::CALM),
            until: Mutex::default(),
            came: Mutex::default(),
            offered: Mutex::default(),
        }))
    }

    /// What the store holds, with nothing in the way.
    pub fn truth(&self) -> &MemoryStore {
        &self.0.truth
    }

    pub fn set_temper(&self, temper: Temper) {
        *self.0.temper.lock().unwrap() = temper;
    }

    /// The weather changes, for a while.
    pub fn weather(&self) {
        let chance = &self.0.chance;
        let end = self.0.clock.monotonic() + chance.millis(100, [1_000, 10_000, 90_000][chance.below(3) as usize]);
        let mut until = self.0.until.lock().unwrap();
        match chance.below(4) {
            0 => (until.silent, _) = (end, chance.fault("outage")),
            1 => (until.no_puts, _) = (end, chance.fault("outage of puts")),
            2 => (until.throttled, _) = (end, chance.fault("throttling")),
            _ => (until.refused, _) = (end, chance.fault("refused credentials")),
        }
    }

    pub fn link(&self, writer: u32) -> Arc<Link> {
        Arc::new(Link { store: self.clone(), writer, cut: AtomicBool::new(false) })
    }

    async fn put(&self, writer: u32, name: &str, body: Bytes) -> Result<(), StoreError> {
        self.offer(writer, name, &body);
        let answer = self.0.truth.put_new(name, body.clone()).await;
        if answer.is_ok() {
            self.0.came.lock().unwrap().insert(name.to_owned(), self.0.clock.monotonic());
        }
        self.0.chance.event(&format!("the store: put {name}: {}", answer.is_ok()), &body);
        answer
    }

    /// One writer never has two segments of one number.
    fn offer(&self, writer: u32, name: &str, body: &Bytes) {
        if !name.starts_with("log/") {
            return;
        }
        let mut hasher = DefaultHasher::new();
        body.hash(&mut hasher);
        let hash = hasher.finish();
        let mut offered = self.0.offered.lock().unwrap();
        let first = *offered.entry((writer, name.to_owned())).or_insert(hash);
        assert_eq!(first, hash, "{name} was offered to the store with two contents");
    }
}

impl Link {
    /// The host is gone: nothing of it gets through any more, but for what is under way.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
    }

    fn chance(&self) -> &Chance {
        &self.store.0.chance
    }

    async fn time_out(&self, name: &str, fault: &'static str) -> StoreError {
        self.chance().fault(fault);
        let time = self.chance().millis(50, [500, 5_000, 20_000][self.chance().below(3) as usize]);
        tokio::time::sleep(time).await;
        StoreError::unavailable(name, fault)
    }

    /// The way there. Says whether the answer will be lost.
    async fn there(&self, name: &str, put: bool) -> Result<bool, StoreError> {
        tokio::time::sleep(self.chance().millis(1, 60)).await;
        if self.cut.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable(name, "the host is down"));
        }
        let now = self.store.0.clock.monotonic();
        let (until, temper) = (*self.store.0.until.lock().unwrap(), *self.store.0.temper.lock().unwrap());
        if now < until.silent || (put && now < until.no_puts) {
            return Err(self.time_out(name, "no answer").await);
        }
        if now < until.throttled && self.chance().one_in(2) {
            self.chance().fault("throttled request");
            return Err(StoreError::unavailable(name, "slow down"));
        }
        if now < until.refused {
            return Err(StoreError::denied(name, "the credentials have expired"));
        }
        if self.chance().per_mille(temper.lost) {
            return Err(self.time_out(name, "lost request").await);
        }
        Ok(self.chance().per_mille(temper.lost))
    }

    /// The way back.
    async fn back<T>(&self, name: &str, lost: bool, answer: T) -> Result<T, StoreError> {
        if lost {
            return Err(self.time_out(name, "lost answer").await);
        }
        tokio::time::sleep(self.chance().millis(1, 60)).await;
        Ok(answer)
    }

    async fn put(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let lost = self.there(name, true).await?;
        let temper = *self.store.0.temper.lock().unwrap();
        let (store, writer) = (self.store.clone(), self.writer);
        if self.chance().per_mille(temper.late) {
            self.chance().fault("late put");
            let (wait, copy, name) = (self.chance().millis(100, 40_000), body.clone(), name.to_owned());
            let twice = self.chance().one_in(2);
            tokio::spawn({
                let (store, name) = (store.clone(), name.clone());
                async move {
                    tokio::time::sleep(wait).await;
                    let _ = store.put(writer, &name, copy).await; // nobody waits for it any more
                }
            });
            if !twice {
                return Err(self.time_out(&name, "late put").await);
            }
        }
        let answer = store.put(writer, name, body).await;
        self.back(name, lost, answer).await?
    }

    fn damaged(&self, bytes: Bytes) -> Bytes {
        let temper = *self.store.0.temper.lock().unwrap();
        if bytes.is_empty() || !self.chance().per_mille(temper.damaged) {
            return bytes;
        }
        self.chance().fault("damaged answer");
        let mut bytes = bytes.to_vec();
        let bit = self.chance().below(bytes.len() as u64 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes.into()
    }

    /// Drops what came lately: the store shows an older list.
    fn stale(&self, found: Vec<ObjectInfo>) -> Vec<ObjectInfo> {
        let temper = *self.store.0.temper.lock().unwrap();
        if !self.chance().per_mille(temper.stale) {
            return found;
        }
        let shown = self.store.0.clock.monotonic().saturating_sub(self.chance().millis(1, 60_000));
        let came = self.store.0.came.lock().unwrap();
        let kept: Vec<ObjectInfo> =
            found.iter().filter(|object| came.get(&object.name).is_none_or(|at| *at <= shown)).cloned().collect();
        if kept.len() < found.len() {
            self.chance().fault("stale list");
        }
        kept
    }
}

impl Store for Link {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.put(&name, body).await }.boxed()
    }

    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let (name, file) = (name.to_owned(), file.clone());
        async move {
            let read = file.read().map_err(|e| StoreError::denied(&name, format!("cannot read it: {e}")));
            self.put(&name, read?.into()).await
        }
        .boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        let name = name.to_owned();
        async move {
            let lost = self.there(&name, false).await?;
            let answer = self.store.0.truth.get_range(&name, range).await;
            Ok(self.damaged(self.back(&name, lost, answer).await??))
        }
        .boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let name = name.to_owned();
        async move {
            let lost = self.there(&name, false).await?;
            let answer = self.store.0.truth.get_suffix(&name, len).await;
            let (bytes, size) = self.back(&name, lost, answer).await??;
            Ok((self.damaged(bytes), size))
        }
        .boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        async move {
            let lost = self.there(&prefix, false).await?;
            let answer = self.store.0.truth.list(&prefix, after.as_deref(), limit).await;
            Ok(self.stale(self.back(&prefix, lost, answer).await??))
        }
        .boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        panic!("{name} is to be deleted: home needs no right to that")
    }

    fn describe(&self) -> String {
        "simulated:".to_owned()
    }
}
