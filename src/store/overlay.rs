//! A store as it would be if some of its objects were not there, and some from this host were.
//! Invariant: it changes nothing, neither here nor there.

use super::{ObjectInfo, Store, StoreError};
use crate::disk::FileRef;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Says of an object of the store that it is not there.
pub type Hidden = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// See the module.
pub struct OverlayStore {
    inner: Arc<dyn Store>,
    front: BTreeMap<String, FileRef>,
    hidden: Hidden,
}

impl OverlayStore {
    /// `front` are the objects from this host, by name.
    pub fn new(inner: Arc<dyn Store>, front: BTreeMap<String, FileRef>, hidden: Hidden) -> OverlayStore {
        OverlayStore { inner, front, hidden }
    }

    fn not_there(&self, name: &str) -> Option<StoreError> {
        (self.hidden)(name).then(|| StoreError::not_found(name))
    }
}

fn refused(name: &str) -> BoxFuture<'static, Result<(), StoreError>> {
    futures::future::ready(Err(StoreError::denied(name, "this view of the store is not to be changed")))
        .boxed()
}

fn unreadable(file: &FileRef) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = file.path.display().to_string();
    move |e| StoreError::unavailable(&path, e)
}

impl Store for OverlayStore {
    fn put_new(&self, name: &str, _: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        refused(name)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        if let Some(file) = self.front.get(name) {
            let read = file.range(range).map(Bytes::from).map_err(unreadable(file));
            return futures::future::ready(read).boxed();
        }
        match self.not_there(name) {
            Some(e) => futures::future::ready(Err(e)).boxed(),
            None => self.inner.get_range(name, range),
        }
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        if let Some(file) = self.front.get(name) {
            let read = file.suffix(len).map(|(tail, size)| (tail.into(), size)).map_err(unreadable(file));
            return futures::future::ready(read).boxed();
        }
        match self.not_there(name) {
            Some(e) => futures::future::ready(Err(e)).boxed(),
            None => self.inner.get_suffix(name, len),
        }
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let (prefix, mut after) = (prefix.to_owned(), after.map(str::to_owned));
        async move {
            loop {
                let page = self.inner.list(&prefix, after.as_deref(), limit).await?;
                // Beyond a page that is full more of the store follows, and what is here has its place among that.
                let last =
                    (page.len() >= limit).then(|| page.last().map(|object| object.name.clone())).flatten();
                let mut all: BTreeMap<String, ObjectInfo> = page
                    .into_iter()
                    .filter(|object| !(self.hidden)(&object.name))
                    .map(|object| (object.name.clone(), object))
                    .collect();
                for (name, file) in &self.front {
                    let behind = after.as_ref().is_none_or(|after| name > after);
                    let before = last.as_ref().is_none_or(|last| name <= last);
                    if name.starts_with(&prefix) && behind && before {
                        let (_, size) = file.suffix(0).map_err(unreadable(file))?;
                        all.insert(name.clone(), ObjectInfo { name: name.clone(), size });
                    }
                }
                match (all.is_empty(), last) {
                    (true, Some(last)) => after = Some(last),
                    _ => return Ok(all.into_values().take(limit).collect()),
                }
            }
        }
        .boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        refused(name)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
