//! A decorator that makes a store misbehave the way networks and servers do, under a seed.
//! Invariant: it never invents an effect. A fault hides, delays or damages what the inner store did or would have
//! done, so that a run against it must still end in a state that the contract allows.

use super::{ObjectInfo, Store, StoreError};
use crate::disk::FileRef;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often each fault strikes, in requests of a thousand, and how long a delay may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The request never reaches the store.
    pub lost_requests: u32,
    /// The store does what was asked, but the answer is lost.
    pub lost_answers: u32,
    /// The request waits up to `delay_max` before it is sent.
    pub delays: u32,
    /// The longest delay.
    pub delay_max: Duration,
    /// One bit of what was read is flipped.
    pub corrupt_reads: u32,
}

/// See the module.
pub struct FaultStore {
    inner: Arc<dyn Store>,
    faults: Mutex<Faults>,
    /// State of the generator (splitmix64): the same seed and the same order of requests give the same faults.
    state: Mutex<u64>,
    outage: AtomicBool,
    injected: AtomicU64,
}

impl FaultStore {
    /// Wraps `inner`; `seed` decides when the `faults` strike.
    pub fn new(inner: Arc<dyn Store>, seed: u64, faults: Faults) -> FaultStore {
        FaultStore {
            inner,
            faults: Mutex::new(faults),
            state: Mutex::new(seed),
            outage: AtomicBool::new(false),
            injected: AtomicU64::new(0),
        }
    }

    /// While on, every request is lost.
    pub fn set_outage(&self, on: bool) {
        self.outage.store(on, Ordering::SeqCst);
    }

    /// Changes how often faults strike from now on.
    pub fn set_faults(&self, faults: Faults) {
        *self.faults.lock() = faults;
    }

    /// How many faults have struck (delays not counted).
    pub fn injected(&self) -> u64 {
        self.injected.load(Ordering::SeqCst)
    }

    fn draw(&self) -> u64 {
        let mut state = self.state.lock();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn strikes(&self, in_a_thousand: u32) -> bool {
        self.draw() % 1000 < u64::from(in_a_thousand)
    }

    fn fault(&self, name: &str, detail: &str) -> StoreError {
        self.injected.fetch_add(1, Ordering::SeqCst);
        StoreError::unavailable(name, detail)
    }

    /// Runs `request` with the faults that any request may meet.
    async fn through<T>(
        &self,
        name: &str,
        request: BoxFuture<'_, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let faults = *self.faults.lock();
        if self.strikes(faults.delays) {
            let longest = faults.delay_max.as_micros().max(1) as u64;
            tokio::time::sleep(Duration::from_micros(self.draw() % longest)).await;
        }
        if self.outage.load(Ordering::SeqCst) {
            return Err(self.fault(name, "injected: outage"));
        }
        if self.strikes(faults.lost_requests) {
            return Err(self.fault(name, "injected: the request was lost"));
        }
        let answer = request.await;
        if self.strikes(faults.lost_answers) {
            return Err(self.fault(name, "injected: the answer was lost"));
        }
        answer
    }

    fn maybe_corrupt(&self, data: Bytes) -> Bytes {
        if data.is_empty() || !self.strikes(self.faults.lock().corrupt_reads) {
            return data;
        }
        self.injected.fetch_add(1, Ordering::SeqCst);
        let mut bytes = data.to_vec();
        let bit = self.draw() as usize % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes.into()
    }
}

impl Store for FaultStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        // Lazily, so that a lost request has had no effect.
        async move { self.through(&name, async { self.inner.put_new(&name, body).await }.boxed()).await }
            .boxed()
    }

    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let (name, file) = (name.to_owned(), file.clone());
        async move { self.through(&name, async { self.inner.put_file(&name, &file).await }.boxed()).await }
            .boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        let name = name.to_owned();
        async move {
            let data = self.through(&name, self.inner.get_range(&name, range)).await?;
            Ok(self.maybe_corrupt(data))
        }
        .boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let name = name.to_owned();
        async move {
            let (data, size) = self.through(&name, self.inner.get_suffix(&name, len)).await?;
            Ok((self.maybe_corrupt(data), size))
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
        async move { self.through(&prefix, self.inner.list(&prefix, after.as_deref(), limit)).await }.boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.through(&name, async { self.inner.delete(&name).await }.boxed()).await }.boxed()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
