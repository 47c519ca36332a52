//! A bucket: the contract that every store, real or for tests, keeps. The layers above know nothing else of it.
//! Invariant: an object, once there, never changes; only the collector's identity deletes.

use bytes::Bytes;
use futures::future::BoxFuture;
use std::ops::Range;

/// Why a store did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No object has this name.
    #[error("{name}: no such object in the store")]
    NotFound {
        /// Object name.
        name: String,
    },
    /// `put_new` found the name taken (by us or by another: after an ambiguous answer the caller reads back).
    #[error("{name}: already exists in the store")]
    AlreadyExists {
        /// Object name.
        name: String,
    },
    /// The store refused for good (credentials, permission, bad configuration): retrying does not help.
    #[error("{name}: the store refused: {detail}")]
    Denied {
        /// Object name.
        name: String,
        /// The store's words and what to do.
        detail: String,
    },
    /// The store did not answer, answered late, or answered with a fault: retrying may help. Whether the request
    /// took effect is unknown.
    #[error("{name}: the store is unavailable: {detail}")]
    Unavailable {
        /// Object name.
        name: String,
        /// What happened.
        detail: String,
    },
}

/// Name and size of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Name below the volume's prefix, such as `log/0000000000000001`.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
}

/// The contract. Names are relative to the volume's prefix, of `[a-z0-9/.~-]`. Every call ends within the adapter's
/// own bound (see [`crate::store::retry`] for retries on top); a dropped future may or may not have taken effect.
pub trait Store: Send + Sync {
    /// Creates `name` with `body` if no object has that name; durable in the store when it returns `Ok`.
    /// Never overwrites, also when two race: exactly one wins, the other gets `AlreadyExists`.
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>>;
    /// Bytes `range` of the object. A range that reaches past the end is an error (`Unavailable` never: `NotFound`
    /// when the object is missing, `Denied` when it is too short), never short data.
    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>>;
    /// The last `len` bytes of the object (all of it when it is shorter), and its whole size in bytes.
    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>>;
    /// At most `limit` objects whose names start with `prefix` and are greater than `after`, in name order.
    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>>;
    /// Deletes the object; it is no error if it is missing.
    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>>;
    /// What to call this store in messages: its URL, never a secret.
    fn describe(&self) -> String;
}
