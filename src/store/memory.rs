//! A bucket in memory, for tests and simulations.
//! Invariant: it keeps the contract exactly, so that what is tested against it is tested against the contract.

use super::{ObjectInfo, Store, StoreError, check_name, check_range};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::{Bound, Range};

/// See the module. Share it with `Arc` to see one bucket from two writers.
#[derive(Default)]
pub struct MemoryStore {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl MemoryStore {
    /// An empty bucket.
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    /// Puts `body` in the place of `name` whatever is there: how a test plays a store that breaks the contract.
    pub fn tamper(&self, name: &str, body: Bytes) {
        self.objects.lock().insert(name.to_owned(), body);
    }

    fn object(&self, name: &str) -> Result<Bytes, StoreError> {
        check_name(name)?;
        self.objects.lock().get(name).cloned().ok_or_else(|| StoreError::not_found(name))
    }

    fn insert(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        check_name(name)?;
        let mut objects = self.objects.lock();
        if objects.contains_key(name) {
            return Err(StoreError::already_exists(name));
        }
        objects.insert(name.to_owned(), body);
        Ok(())
    }

    fn range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let object = self.object(name)?;
        check_range(name, &range, object.len() as u64)?;
        Ok(object.slice(range.start as usize..range.end as usize))
    }

    fn suffix(&self, name: &str, len: u64) -> Result<(Bytes, u64), StoreError> {
        let object = self.object(name)?;
        let size = object.len() as u64;
        Ok((object.slice(size.saturating_sub(len) as usize..), size))
    }
}

impl Store for MemoryStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        ready(self.insert(name, body)).boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        ready(self.range(name, range)).boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        ready(self.suffix(name, len)).boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let objects = self.objects.lock();
        let found = objects
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(name, _)| name.starts_with(prefix))
            .take(limit)
            .map(|(name, body)| ObjectInfo { name: name.clone(), size: body.len() as u64 })
            .collect();
        ready(Ok(found)).boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let answer = check_name(name).map(|()| drop(self.objects.lock().remove(name)));
        ready(answer).boxed()
    }

    fn describe(&self) -> String {
        "memory:".to_owned()
    }
}
