//! A store whose requests and received bytes are counted, for reports.
//! Invariant: changes no answer.

use super::{ObjectInfo, Store, StoreError};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
pub struct CountedStore {
    inner: Arc<dyn Store>,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl CountedStore {
    /// Nothing counted yet.
    pub fn new(inner: Arc<dyn Store>) -> CountedStore {
        CountedStore { inner, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    /// Requests made, and bytes of objects received.
    pub fn counts(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    fn asked(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    fn got(&self, bytes: &Bytes) {
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

impl Store for CountedStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        self.asked();
        self.inner.put_new(name, body)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.asked();
        self.inner.get_range(name, range).map(|got| got.inspect(|bytes| self.got(bytes))).boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.asked();
        self.inner.get_suffix(name, len).map(|got| got.inspect(|(bytes, _)| self.got(bytes))).boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        self.asked();
        self.inner.list(prefix, after, limit)
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.asked();
        self.inner.delete(name)
    }

    fn device(&self) -> Option<u64> {
        self.inner.device()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
