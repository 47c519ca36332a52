//! A decorator that asks again: bounded exponential backoff with jitter, within a total deadline.
//! Invariant: it never turns an unknown outcome into a known one. A put that was answered ambiguously and then finds
//! its name taken is ours only if what is there has been read back and is the same. (Two writers of the same bytes may
//! then both be told `Ok`; segments are never the same, for each has its own salt.)

use super::{ObjectInfo, Store, StoreError};
use crate::clock::Env;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How much of an object's end is compared to know one's own. A segment ends with its signed trailer, so no two
/// segments share it; what is smaller than [`COMPARE_WHOLE_MAX`] is compared whole.
pub const COMPARE_SUFFIX: u64 = 4096;
const COMPARE_WHOLE_MAX: u64 = 64 * 1024;

/// The bounds of asking again.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Pause after the first failure; it doubles with each further one.
    pub first_delay: Duration,
    /// The longest pause.
    pub delay_max: Duration,
    /// How long reads, lists and deletes may take in all; an attempt under way is cut off then.
    pub read_deadline: Duration,
    /// No new attempt of a put begins later than this. (An attempt under way is bounded by the adapter, by its size.)
    pub put_deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            first_delay: Duration::from_millis(100),
            delay_max: Duration::from_secs(3),
            read_deadline: Duration::from_secs(30),
            // Short: the uploader asks again for ever by itself and wants to say early why.
            put_deadline: Duration::from_secs(5),
        }
    }
}

/// Pauses that double up to a limit, each between a half and the whole of its nominal length, so that many clients
/// of a recovering server spread out.
pub struct Backoff {
    next: Duration,
    delay_max: Duration,
}

impl Backoff {
    /// Starts with `first`.
    pub fn new(first: Duration, delay_max: Duration) -> Backoff {
        Backoff { next: first.min(delay_max), delay_max }
    }

    /// The next pause.
    pub fn pause(&mut self, env: &Env) -> Duration {
        let nominal = self.next;
        self.next = (nominal * 2).min(self.delay_max);
        let half = nominal / 2;
        let share = f64::from(u32::from_le_bytes(env.random_bytes())) / f64::from(u32::MAX);
        half + half.mul_f64(share)
    }
}

/// See the module.
pub struct RetryStore {
    inner: Arc<dyn Store>,
    env: Env,
    policy: RetryPolicy,
    retries: AtomicU64,
}

impl RetryStore {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Store>, env: Env, policy: RetryPolicy) -> RetryStore {
        RetryStore { inner, env, policy, retries: AtomicU64::new(0) }
    }

    /// How many requests have been repeated, for metrics.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(self.policy.first_delay, self.policy.delay_max)
    }

    /// Sleeps before the next attempt, or gives the error back when there is no time left for one.
    async fn pause(
        &self,
        backoff: &mut Backoff,
        deadline: Instant,
        tries: u32,
        error: StoreError,
    ) -> Result<(), StoreError> {
        let wake = Instant::now() + backoff.pause(&self.env);
        if wake >= deadline {
            return Err(given_up(error, tries));
        }
        tokio::time::sleep_until(wake).await;
        self.retries.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn read<'a, T>(
        &'a self,
        name: &str,
        mut request: impl FnMut() -> BoxFuture<'a, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + self.policy.read_deadline;
        let mut backoff = self.backoff();
        for tries in 1.. {
            let error = match tokio::time::timeout_at(deadline, request()).await {
                Ok(Err(error)) if error.is_transient() => error,
                Ok(answer) => return answer,
                Err(_) => StoreError::unavailable(name, "no answer in time"),
            };
            self.pause(&mut backoff, deadline, tries, error).await?;
        }
        Err(StoreError::unavailable(name, "too many attempts"))
    }

    async fn put(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let deadline = Instant::now() + self.policy.put_deadline;
        let mut backoff = self.backoff();
        let mut ambiguous = false;
        for tries in 1.. {
            let error = match self.inner.put_new(name, body.clone()).await {
                Err(StoreError::AlreadyExists { .. }) if ambiguous => match self.is_ours(name, &body).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => return Err(StoreError::already_exists(name)),
                    // Gone again (a store may answer "conflict" before it has decided): as if nothing was known.
                    Err(StoreError::NotFound { .. }) => StoreError::unavailable(name, "taken, but not there"),
                    Err(error) => error,
                },
                Err(error) if error.is_transient() => {
                    ambiguous = true;
                    error
                }
                answer => return answer,
            };
            if !error.is_transient() {
                return Err(error);
            }
            self.pause(&mut backoff, deadline, tries, error).await?;
        }
        Err(StoreError::unavailable(name, "too many attempts"))
    }

    /// Whether the object `name` is what `body` is.
    async fn is_ours(&self, name: &str, body: &Bytes) -> Result<bool, StoreError> {
        let len = body.len() as u64;
        let compared = if len <= COMPARE_WHOLE_MAX { len } else { COMPARE_SUFFIX };
        let (tail, size) = self.inner.get_suffix(name, compared.max(1)).await?;
        Ok(size == len && body.ends_with(&tail))
    }
}

fn given_up(error: StoreError, tries: u32) -> StoreError {
    match error {
        StoreError::Unavailable { name, detail } if tries > 1 => {
            StoreError::Unavailable { name, detail: format!("{detail} (gave up after {tries} attempts)") }
        }
        other => other,
    }
}

impl Store for RetryStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.put(&name, body).await }.boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        let name = name.to_owned();
        async move { self.read(&name, || self.inner.get_range(&name, range.clone())).await }.boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let name = name.to_owned();
        async move { self.read(&name, || self.inner.get_suffix(&name, len)).await }.boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        async move { self.read(&prefix, || self.inner.list(&prefix, after.as_deref(), limit)).await }.boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.read(&name, || self.inner.delete(&name)).await }.boxed()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fault::{FaultStore, Faults};
    use crate::store::memory::MemoryStore;

    fn faulty(faults: Faults) -> (Arc<MemoryStore>, Arc<FaultStore>, RetryStore) {
        let memory = Arc::new(MemoryStore::new());
        let fault = Arc::new(FaultStore::new(memory.clone(), 7, faults));
        let policy = RetryPolicy { put_deadline: Duration::from_secs(600), ..RetryPolicy::default() };
        let retry = RetryStore::new(fault.clone(), Env::system(), policy);
        (memory, fault, retry)
    }

    #[tokio::test(start_paused = true)]
    async fn a_put_whose_answer_was_lost_is_known_as_ours() {
        let (_, fault, retry) = faulty(Faults { lost_answers: 600, ..Faults::default() });
        for n in 0..50 {
            let body = Bytes::from(vec![n; usize::from(n) * 3000]);
            retry.put_new(&format!("log/{n:04}"), body).await.unwrap();
        }
        assert!(fault.injected() > 10);
        assert!(retry.retries() > 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_another_took_is_never_called_ours() {
        let (memory, fault, retry) = faulty(Faults::default());
        memory.put_new("log/1", Bytes::from_static(b"theirs")).await.unwrap();
        let mine = Bytes::from_static(b"mine!!");
        assert!(matches!(retry.put_new("log/1", mine.clone()).await, Err(StoreError::AlreadyExists { .. })));
        // Also after an ambiguous answer.
        fault.set_faults(Faults { lost_answers: 500, ..Faults::default() });
        for _ in 0..20 {
            let answer = retry.put_new("log/1", mine.clone()).await;
            assert!(!matches!(answer, Ok(())), "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_ends_in_an_error_within_the_deadline() {
        let (_, fault, retry) = faulty(Faults::default());
        fault.set_outage(true);
        let start = Instant::now();
        let error = retry.get_suffix("volume.json", 1).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("gave up after"), "{error}");
        assert!(start.elapsed() <= RetryPolicy::default().read_deadline);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_help_is_not_repeated() {
        let (_, _, retry) = faulty(Faults::default());
        assert!(matches!(retry.get_range("log/9", 0..1).await, Err(StoreError::NotFound { .. })));
        assert!(matches!(retry.put_new("../x", Bytes::new()).await, Err(StoreError::Denied { .. })));
        assert_eq!(retry.retries(), 0);
    }
}
