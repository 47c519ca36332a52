//! A bucket behind the network (S3 and what speaks like it, Azure, Google), through the `object_store` crate.
//! Invariant: an answer is passed on as known only if the store gave it. `object_store` does not repeat requests
//! here, so that every ambiguous answer is seen by [`super::retry`], which reads back.

use super::{ObjectInfo, Store, StoreError, check_name, check_range, listing_bytes, transfer_time};
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, FutureExt};
use futures::{Stream, StreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio::time::timeout_at;

/// How long a request may take; [`transfer_time`] is added for its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the answer to a get may stay away, and how far it may fall behind the slowest of links. Half of the time
/// in which a read is repeated: a link that went silent costs one repetition on a new connection.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// The longest part of a store's words that is shown.
const DETAIL_LEN_MAX: usize = 400;

/// See the module.
pub struct RemoteStore {
    inner: Arc<dyn ObjectStore>,
    /// Empty, or the volume's place in the bucket, ending with `/`.
    prefix: String,
    url: String,
    /// The store knows no put if absent, and its user has said that he knows: look, then put.
    looks_first: bool,
}

impl RemoteStore {
    /// The objects below `prefix` in the bucket `inner`. `url` is what messages call it.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: &str, url: String) -> Result<RemoteStore, StoreError> {
        let prefix = prefix.trim_matches('/');
        let path = Path::parse(prefix).map_err(|error| StoreError::denied(&url, error))?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{path}/") };
        Ok(RemoteStore { inner, prefix, url, looks_first: false })
    }

    /// For a store without put if absent: whether the name is free is looked up before each put. Of two writers that put
    /// the same name within that moment both are told that they were first; everything else holds.
    pub fn look_first(self) -> RemoteStore {
        RemoteStore { looks_first: true, ..self }
    }

    fn path(&self, name: &str) -> Result<Path, StoreError> {
        check_name(name)?;
        self.parse(name)
    }

    fn parse(&self, name: &str) -> Result<Path, StoreError> {
        Path::parse(format!("{}{name}", self.prefix)).map_err(|error| StoreError::denied(name, error))
    }

    async fn put(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let path = self.path(name)?;
        let len = body.len() as u64;
        let mode = if self.looks_first { PutMode::Overwrite } else { PutMode::Create };
        if self.looks_first {
            match self.size(name, &path).await {
                Ok(_) => return Err(StoreError::already_exists(name)),
                Err(StoreError::NotFound { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        let options = PutOptions { mode, ..PutOptions::default() };
        let put = self.inner.put_opts(&path, PutPayload::from(body), options);
        match bounded(name, len, put).await? {
            Ok(_) => Ok(()),
            // S3 also answers "conflict" to a put that raced another: then the name may still be free.
            Err(error) if status(&error) == Some(409) => match self.size(name, &path).await {
                Ok(_) => Err(StoreError::already_exists(name)),
                Err(StoreError::NotFound { .. }) => {
                    Err(StoreError::unavailable(name, "the store reported a conflict with another request"))
                }
                Err(other) => Err(other),
            },
            Err(error) => Err(match convert(name, error) {
                // A put finds nothing missing but the bucket.
                StoreError::NotFound { name } => StoreError::denied(&name, no_bucket()),
                other => other,
            }),
        }
    }

    async fn size(&self, name: &str, path: &Path) -> Result<u64, StoreError> {
        let meta = bounded(name, 0, self.inner.head(path)).await?;
        Ok(meta.map_err(|error| convert(name, error))?.size)
    }

    /// Gets `range` (or all) of an object; the answer is what the store sent and the object's size. Given up as soon as
    /// it is silent for too long, or slower than the slowest of links, however much was asked for, and however fast it
    /// came before: what arrived early buys no longer silence.
    async fn get(&self, name: &str, path: &Path, range: Option<GetRange>) -> Result<(Bytes, u64), GetError> {
        let due = Instant::now() + SILENCE_MAX;
        let options = GetOptions { range, ..GetOptions::default() };
        let answer = timeout_at(due, self.inner.get_opts(path, options)).await;
        let answer = answer.map_err(|_| late(name))?.map_err(|error| failed(name, error))?;
        let (size, promised) = (answer.meta.size, answer.range.end.saturating_sub(answer.range.start));
        Ok((body(name, answer.into_stream(), promised, due).await?, size))
    }

    async fn range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let path = self.path(name)?;
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            check_range(name, &range, self.size(name, &path).await?)?;
            return Ok(Bytes::new());
        }
        match self.get(name, &path, Some(GetRange::Bounded(range.clone()))).await {
            Ok((data, _)) if data.len() as u64 == len => Ok(data),
            Ok((data, size)) => {
                check_range(name, &range, size)?;
                Err(StoreError::unavailable(name, format!("{} of {len} bytes arrived", data.len())))
            }
            Err(GetError::Range) => {
                check_range(name, &range, self.size(name, &path).await?)?;
                Err(StoreError::denied(name, "the store does not serve ranges of an object"))
            }
            Err(GetError::Store(error)) => Err(error),
        }
    }

    async fn suffix(&self, name: &str, len: u64) -> Result<(Bytes, u64), StoreError> {
        let path = self.path(name)?;
        if len == 0 {
            return Ok((Bytes::new(), self.size(name, &path).await?));
        }
        let (data, size) = match self.get(name, &path, Some(GetRange::Suffix(len))).await {
            // Azure knows no suffix ranges, an empty object has none, some servers answer with the whole, and s3s-fs
            // breaks down when the suffix is longer than the object.
            Err(error) if error.may_be_the_range() => {
                let size = self.size(name, &path).await?;
                let start = size.saturating_sub(len);
                let range = (start > 0).then_some(GetRange::Bounded(start..size));
                self.get(name, &path, range).await
            }
            answer => answer,
        }
        .map_err(|error| match error {
            GetError::Range => StoreError::denied(name, "the store does not serve ranges of an object"),
            GetError::Store(error) => error,
        })?;
        if data.len() as u64 != len.min(size) {
            return Err(StoreError::unavailable(name, format!("{} bytes of {size} arrived", data.len())));
        }
        Ok((data, size))
    }

    async fn names(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ObjectInfo>, StoreError> {
        let mut found: Vec<ObjectInfo> = Vec::new();
        if limit == 0 {
            return Ok(found);
        }
        // `object_store` lists whole directories: the rest of the prefix becomes a place to start from.
        let (dir, rest) = prefix.rsplit_once('/').unwrap_or(("", prefix));
        let dir = self.parse(dir)?;
        let before = match after {
            Some(after) if after >= prefix => Some(after),
            _ if rest.len() > 1 => prefix.get(..prefix.len() - 1),
            _ => None,
        };
        let dir = (!dir.as_ref().is_empty()).then_some(&dir);
        let mut stream = match before {
            Some(before) => self.inner.list_with_offset(dir, &self.parse(before)?),
            None => self.inner.list(dir),
        };
        while let Some(meta) = stream.next().await {
            let meta = meta.map_err(|error| match convert(prefix, error) {
                StoreError::NotFound { name } => StoreError::denied(&name, no_bucket()),
                other => other,
            })?;
            let Some(name) = meta.location.as_ref().strip_prefix(&self.prefix) else { continue };
            if found.last().is_some_and(|last| last.name.as_str() >= name) {
                // S3 "directory buckets" do so; half a list taken for the whole would hide the newest segments.
                return Err(StoreError::denied(
                    name,
                    "the store does not list objects in the order of names",
                ));
            }
            if !name.starts_with(prefix) {
                if name > prefix {
                    break;
                }
                continue;
            }
            if check_name(name).is_ok() && after.is_none_or(|after| name > after) {
                found.push(ObjectInfo { name: name.to_owned(), size: meta.size });
                if found.len() == limit {
                    break;
                }
            }
        }
        Ok(found)
    }
}

/// What arrives as a body of `promised` bytes, whose first is due at `due`.
async fn body(
    name: &str,
    mut pieces: impl Stream<Item = object_store::Result<Bytes>> + Unpin,
    promised: u64,
    mut due: Instant,
) -> Result<Bytes, GetError> {
    let mut data = BytesMut::new();
    while let Some(piece) = timeout_at(due, pieces.next()).await.map_err(|_| late(name))? {
        let piece = piece.map_err(|error| failed(name, error))?;
        data.extend_from_slice(&piece);
        if data.len() as u64 > promised {
            return Err(GetError::Store(StoreError::unavailable(name, "more arrives than was promised")));
        }
        due = (due + transfer_time(piece.len() as u64)).min(Instant::now() + SILENCE_MAX);
    }
    Ok(data.freeze())
}

fn late(name: &str) -> GetError {
    GetError::Store(StoreError::unavailable(name, "the answer stays away"))
}

fn failed(name: &str, error: Error) -> GetError {
    match status(&error) {
        Some(416) => GetError::Range,
        _ if error.to_string().contains("non-partial response") => GetError::Range,
        _ if matches!(error, Error::NotSupported { .. }) => GetError::Range,
        _ => GetError::Store(convert(name, error)),
    }
}

/// Why a get failed: the range could not be served as asked, or something else.
enum GetError {
    Range,
    Store(StoreError),
}

impl GetError {
    fn may_be_the_range(&self) -> bool {
        match self {
            GetError::Range => true,
            GetError::Store(StoreError::Unavailable { detail, .. }) => detail.starts_with("InternalError"),
            GetError::Store(_) => false,
        }
    }
}

/// Bounds a request that moves `body_len` bytes.
async fn bounded<T>(name: &str, body_len: u64, request: impl Future<Output = T>) -> Result<T, StoreError> {
    let limit = REQUEST_TIMEOUT + transfer_time(body_len);
    let late = |_| StoreError::unavailable(name, format!("no answer within {} s", limit.as_secs()));
    tokio::time::timeout(limit, request).await.map_err(late)
}

fn no_bucket() -> &'static str {
    "the bucket does not exist; create it, or correct the URL, the endpoint or the region"
}

/// The HTTP status that an error stands for, from its words (`object_store` does not export the type that has it).
fn status(error: &Error) -> Option<u16> {
    let text = chain(error);
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The error with its causes, each said once.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    text
}

/// The part of the error a person needs: the code and message of an XML answer, else the words, shortened.
fn detail(text: &str) -> String {
    let tag = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>"))?;
        Some(rest.split_once("</")?.0.to_owned())
    };
    let mut short = match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => text.replace('\n', " "),
    };
    if let Some((end, _)) = short.char_indices().nth(DETAIL_LEN_MAX) {
        short.truncate(end);
        short.push_str("...");
    }
    if text.contains("169.254.169.254") || text.contains("metadata.google") {
        short.push_str(" (no credentials were given, so the cloud's metadata service was asked for them)");
    }
    short
}

/// Words of S3 and of servers like it for "no room".
const FULL: &[&str] = &["QuotaExceeded", "InsufficientStorage", "StorageFull"];

/// What an error of `object_store` means in the contract's terms.
fn convert(name: &str, error: Error) -> StoreError {
    let text = chain(&error);
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match error {
        Error::NotFound { .. } if says(&["NoSuchBucket", "ContainerNotFound"]) => {
            StoreError::denied(name, no_bucket())
        }
        Error::NotFound { .. } => StoreError::not_found(name),
        Error::AlreadyExists { .. } | Error::Precondition { .. } => StoreError::already_exists(name),
        _ if says(FULL) || status(&error) == Some(507) => {
            let detail = format!("{}; the store is full or over its quota: make room there", detail(&text));
            StoreError::denied(name, detail)
        }
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            StoreError::denied(name, format!("{}; check the credentials and their rights", detail(&text)))
        }
        Error::NotSupported { .. } | Error::NotImplemented { .. } | Error::InvalidPath { .. } => {
            StoreError::denied(name, detail(&text))
        }
        _ => match status(&error) {
            // Words of S3 for a body that was late or damaged on its way.
            Some(400) if says(&["RequestTimeout", "BadDigest", "IncompleteBody", "SHA256Mismatch"]) => {
                StoreError::unavailable(name, detail(&text))
            }
            Some(408 | 409 | 425 | 429) => StoreError::unavailable(name, detail(&text)),
            Some(300..=499 | 501) => StoreError::denied(name, detail(&text)),
            _ if says(&["Received redirect without LOCATION"]) => StoreError::denied(name, detail(&text)),
            _ => StoreError::unavailable(name, detail(&text)),
        },
    }
}

impl Store for RemoteStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.put(&name, body).await }.boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        let name = name.to_owned();
        async move { self.range(&name, range).await }.boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let name = name.to_owned();
        async move { self.suffix(&name, len).await }.boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        async move {
            bounded(&prefix, listing_bytes(limit), self.names(&prefix, after.as_deref(), limit)).await?
        }
        .boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move {
            let path = self.path(&name)?;
            match bounded(&name, 0, self.inner.delete(&path)).await? {
                Ok(()) => Ok(()),
                Err(error) => match convert(&name, error) {
                    StoreError::NotFound { .. } => Ok(()),
                    other => Err(other),
                },
            }
        }
        .boxed()
    }

    fn describe(&self) -> String {
        match self.looks_first {
            true => format!("{} (put if absent is emulated)", self.url),
            false => self.url.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Error {
        let source = format!("Server returned non-2xx status code: {status} Words: {body}").into();
        Error::Generic { store: "S3", source }
    }

    #[test]
    fn statuses_become_the_contracts_errors() {
        let denied = |e| matches!(convert("log/1", e), StoreError::Denied { .. });
        assert!(denied(answer(400, "<Error><Code>ExpiredToken</Code></Error>")));
        assert!(denied(answer(301, "")) && denied(answer(501, "")));
        let full = |e| convert("log/1", e).to_string().contains("make room");
        assert!(denied(answer(507, "")) && full(answer(507, "")));
        assert!(full(answer(400, "<Error><Code>XMinioStorageFull</Code></Error>")));
        let quota = Error::PermissionDenied { path: "x".into(), source: "<Code>QuotaExceeded</Code>".into() };
        assert!(full(quota));
        for error in
            [answer(500, ""), answer(503, "SlowDown"), answer(429, ""), answer(400, "RequestTimeout")]
        {
            assert!(convert("log/1", error).is_transient());
        }
        let gone = Error::NotFound { path: "x".into(), source: "<Code>NoSuchBucket</Code>".into() };
        assert!(denied(gone));
        let forbidden = Error::PermissionDenied { path: "x".into(), source: "403".into() };
        assert!(convert("log/1", forbidden).to_string().contains("credentials"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_get_is_given_up_when_it_is_silent_and_not_while_it_is_only_slow() {
        use object_store::memory::InMemory;
        use object_store::throttle::{ThrottleConfig, ThrottledStore};
        let store = |config| {
            let inner = Arc::new(ThrottledStore::new(InMemory::new(), config));
            RemoteStore::new(inner, "", "memory:".into()).expect("a store")
        };
        let len = 4 << 20;
        let body = Bytes::from(vec![7; len as usize]);
        let silent = store(ThrottleConfig { wait_get_per_call: Duration::MAX, ..ThrottleConfig::default() });
        silent.put_new("log/1", body.clone()).await.expect("put");
        let begin = Instant::now();
        assert!(silent.get_range("log/1", 0..len).await.unwrap_err().is_transient());
        assert!(begin.elapsed() <= SILENCE_MAX, "{:?}", begin.elapsed());
        // Its first byte comes in time, then nothing does.
        let stuck = store(ThrottleConfig {
            wait_get_per_byte: Duration::from_secs(600),
            ..ThrottleConfig::default()
        });
        stuck.put_new("log/1", body.clone()).await.expect("put");
        let begin = Instant::now();
        assert!(stuck.get_range("log/1", 0..len).await.unwrap_err().is_transient());
        assert!(begin.elapsed() <= SILENCE_MAX, "{:?}", begin.elapsed());
        let quick = store(ThrottleConfig { wait_get_per_call: SILENCE_MAX / 2, ..ThrottleConfig::default() });
        quick.put_new("log/1", body.clone()).await.expect("put");
        assert_eq!(quick.get_range("log/1", 0..len).await.expect("get"), body);
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_fast_buys_no_longer_silence() {
        // The time before each piece, in milliseconds, and its length. When is the body given up?
        let given_up = async |pieces: &[(u64, usize)]| {
            let promised = pieces.iter().map(|(_, len)| *len as u64).sum();
            let stream = futures::stream::iter(pieces.to_vec()).then(async |(pause, len)| {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                Ok(Bytes::from(vec![7; len]))
            });
            let begin = Instant::now();
            let arrived = body("log/1", Box::pin(stream), promised, begin + SILENCE_MAX).await;
            arrived.is_err().then(|| begin.elapsed())
        };
        let stalls = given_up(&[(1000, 3 << 20), (600_000, 1 << 20)]).await;
        assert_eq!(stalls, Some(Duration::from_secs(1) + SILENCE_MAX));
        // Most of it in a second, and then a few bytes a second.
        let mut trickles = vec![(1000, 3 << 20)];
        trickles.extend([(1000, 20); 100]);
        let end = given_up(&trickles).await.expect("is given up");
        assert!(end < SILENCE_MAX + Duration::from_secs(2), "{end:?}");
        // A little more than the slowest of links, in small pieces, with the longest pause that is borne at its end.
        let mut slow = vec![(250, 9 << 10); 400];
        slow.push((SILENCE_MAX.as_millis() as u64 - 500, 20));
        assert_eq!(given_up(&slow).await, None);
        assert!(given_up(&[(250, 7 << 10); 1000]).await.is_some());
    }

    #[test]
    fn details_are_short_and_name_the_stores_own_words() {
        let xml = "...<Error><Code>AccessDenied</Code><Message>no</Message><Other>long</Other></Error>";
        assert_eq!(detail(xml), "AccessDenied: no");
        assert!(detail(&"x".repeat(10_000)).len() <= DETAIL_LEN_MAX + 3);
    }
}
