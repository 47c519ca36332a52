//! A bucket: the contract that every store, real or for tests, keeps. The layers above know nothing else of it.
//! Invariant: an object, once there, never changes; only the collector's identity deletes.

pub mod counted;
mod credentials;
mod direct;
mod entry;
pub mod fault;
pub mod local;
pub mod memory;
pub mod open;
pub mod overlay;
pub mod remote;
pub mod retry;

#[cfg(feature = "fuzzing")]
pub use open::fuzz_url;
pub use open::{open, open_existing};

use crate::disk::FileRef;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use std::ops::Range;
use std::time::Duration;

/// The slowest link, for each of the requests that share it, on which a body still gets through.
pub(crate) const SLOWEST_BYTES_PER_SECOND: u64 = 32 * 1024;
/// How much of the transfer an entry of a listing is, in an answer of XML.
pub(crate) const LISTED_BYTES: u64 = 400;

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
    /// Something has this name that is no object (a pipe in a directory store, a link that leads nowhere).
    #[error("{name}: {detail}")]
    NotAnObject {
        /// Object name.
        name: String,
        /// What it is instead, and where.
        detail: String,
    },
    /// Refused for good (credentials, permission, a full bucket, bad configuration): retrying does not help until
    /// somebody changes something.
    #[error("{name}: refused: {detail}")]
    Denied {
        /// Object name.
        name: String,
        /// The store's words and what to do.
        detail: String,
    },
    /// The range that was asked for reaches past the end of the object.
    #[error("{name}: {detail}")]
    OutOfRange {
        /// Object name.
        name: String,
        /// What was asked for, and what there is.
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

impl StoreError {
    /// A [`StoreError::NotFound`] about `name`.
    pub fn not_found(name: &str) -> StoreError {
        StoreError::NotFound { name: name.to_owned() }
    }

    /// A [`StoreError::AlreadyExists`] about `name`.
    pub fn already_exists(name: &str) -> StoreError {
        StoreError::AlreadyExists { name: name.to_owned() }
    }

    /// A [`StoreError::NotAnObject`] about `name`.
    pub fn not_an_object(name: &str, detail: impl ToString) -> StoreError {
        StoreError::NotAnObject { name: name.to_owned(), detail: detail.to_string() }
    }

    /// A [`StoreError::Denied`] about `name`.
    pub fn denied(name: &str, detail: impl ToString) -> StoreError {
        StoreError::Denied { name: name.to_owned(), detail: detail.to_string() }
    }

    /// A [`StoreError::Unavailable`] about `name`.
    pub fn unavailable(name: &str, detail: impl ToString) -> StoreError {
        StoreError::Unavailable { name: name.to_owned(), detail: detail.to_string() }
    }

    /// True when the same request may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. })
    }

    /// True when the same request may succeed later: by itself, or because somebody puts right what the store refuses
    /// it for (credentials that have expired, say). False when what is asked for is not there.
    pub fn may_pass(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. } | StoreError::Denied { .. })
    }
}

/// Refuses a name that is not an object's: one or two parts of `[a-z0-9.~-]`, none of them empty or opening with a
/// dot (such names are the adapters' own: `.tmp`, and nothing climbs with `..`).
pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    let good_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'~' | b'-'))
    };
    if name.split('/').count() <= 2 && name.split('/').all(good_part) {
        return Ok(());
    }
    Err(StoreError::denied(
        name,
        "not an object name: one or two parts of [a-z0-9.~-], none opening with a dot",
    ))
}

/// Refuses a range that does not lie within an object of `size` bytes: [`Store::get_range`] never answers short.
pub(crate) fn check_range(name: &str, range: &Range<u64>, size: u64) -> Result<(), StoreError> {
    if range.start <= range.end && range.end <= size {
        return Ok(());
    }
    let detail = format!("bytes {}..{} were asked for; the object has {size}", range.start, range.end);
    Err(StoreError::OutOfRange { name: name.to_owned(), detail })
}

/// How long `bytes` may be under way, beside the time that any request may take.
pub(crate) fn transfer_time(bytes: u64) -> Duration {
    let rest = bytes % SLOWEST_BYTES_PER_SECOND;
    Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
        + Duration::from_nanos(rest * 1_000_000_000 / SLOWEST_BYTES_PER_SECOND)
}

/// What a listing of at most `limit` objects moves.
pub(crate) fn listing_bytes(limit: usize) -> u64 {
    (limit as u64).saturating_mul(LISTED_BYTES).min(1 << 30)
}

/// Asks the store one cheap question and gives it `limit` to answer, whatever bounds the adapter has of its own: for
/// callers that have many questions and something else to do when nobody answers. `Ok` says that the store answers,
/// not that it holds a volume.
pub async fn reachable(store: &dyn Store, limit: Duration) -> Result<(), StoreError> {
    // Where `init` tries the store out: as good as empty, so that no store has much to look through.
    match tokio::time::timeout(limit, store.list("probe/", None, 1)).await {
        Ok(answer) => answer.map(drop),
        Err(_) => {
            let detail = format!("no answer within {} s", limit.as_secs_f64());
            Err(StoreError::unavailable(&store.describe(), detail))
        }
    }
}

/// The last `len` bytes of the file to be put as `name` (all of it when it is shorter), and its size in bytes: what
/// [`Store::get_suffix`] answers when the object is that file.
pub(crate) async fn file_suffix(name: &str, file: &FileRef, len: u64) -> Result<(Bytes, u64), StoreError> {
    let read = {
        let file = file.clone();
        move || file.suffix(len)
    };
    let found = match file.disk.is_real() {
        true => tokio::task::spawn_blocking(read).await.map_err(|e| StoreError::unavailable(name, e))?,
        false => read(),
    };
    let (tail, size) = found.map_err(|error| unreadable(name, file, &error))?;
    Ok((tail.into(), size))
}

/// The file to be put cannot be read: nothing the store can mend.
pub(crate) fn unreadable(name: &str, file: &FileRef, error: &std::io::Error) -> StoreError {
    StoreError::denied(name, format!("cannot read {} to send it: {error}", file.path.display()))
}

/// Name and size of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Name below the volume's prefix, such as `log/0000000000000001`.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
}

/// The contract. Names are relative to the volume's prefix: one or two parts of `[a-z0-9.~-]` with `/` between them,
/// no part opening with a dot; any other name is `Denied`, and an object with such a name is not listed. Every call
/// ends within the adapter's own bound (see [`crate::store::retry`] for retries on top); a dropped future may or may
/// not have taken effect. Futures are polled on a tokio runtime.
pub trait Store: Send + Sync {
    /// Creates `name` with `body` if no object has that name; durable in the store when it returns `Ok`.
    /// Never overwrites, also when two race: exactly one wins, the other gets `AlreadyExists`.
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>>;
    /// [`Store::put_new`] with the contents of `file`, which nobody changes meanwhile. `Denied` when it
    /// cannot be read. This default holds the contents in memory; a store that can do without does.
    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let (name, file) = (name.to_owned(), file.clone());
        async move {
            let (body, _) = file_suffix(&name, &file, u64::MAX).await?;
            self.put_new(&name, body).await
        }
        .boxed()
    }
    /// [`Store::put_new`], asked once: the answer is the store's own word. What repeats requests takes an object that is
    /// there for one that an earlier attempt has put; this says `AlreadyExists`.
    fn put_once(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        self.put_new(name, body)
    }
    /// Bytes `range` of the object: all of them or an error, never short data. `NotFound` when the object is missing,
    /// `OutOfRange` when the range reaches past its end. An empty range only asks whether it would be met.
    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>>;
    /// The last `len` bytes of the object (all of it when it is shorter), and its whole size in bytes.
    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>>;
    /// At most `limit` objects whose names start with `prefix` and are greater than `after`, in the order of
    /// their names' bytes. Fewer than `limit` means that there are no more.
    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>>;
    /// Deletes the object; it is no error if it is missing.
    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>>;
    /// The device (`st_dev`) on which objects come to lie, as last seen; none where it is not one of this host's, or not
    /// known. Asks nobody.
    fn device(&self) -> Option<u64> {
        None
    }
    /// What to call this store in messages: its URL, never a secret.
    fn describe(&self) -> String;
}
