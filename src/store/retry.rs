//! A decorator that asks again: bounded exponential backoff with jitter, within a total deadline.
//! Invariant: it never turns an unknown outcome into a known one. A put that was answered ambiguously and then finds
//! its name taken is ours only if what is there has been read back and is the same. (Two writers of the same bytes may
//! then both be told `Ok`; segments are never the same, for each has its own salt.)

use super::{ObjectInfo, Store, StoreError, file_suffix, listing_bytes, transfer_time};
use crate::clock::Env;
use crate::disk::FileRef;
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
/// The largest answer that is given time to arrive; who asks for more asks for "all of it", which is less.
const ANSWER_LEN_MAX: u64 = 4 << 30;
/// An attempt that took longer than half of the time for reads by this was being answered: silence is given up before
/// ([`super::remote`]), also on a busy host.
const MORE_THAN_SILENCE: Duration = Duration::from_secs(5);

/// The bounds of asking again.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Pause after the first failure; it doubles with each further one.
    pub first_delay: Duration,
    /// The longest pause.
    pub delay_max: Duration,
    /// No new attempt of a read, list or delete begins later than this, unless an answer was under way meanwhile: then
    /// not later than half of this after its end. All is over at this time and that in which the bytes that were asked
    /// for arrive over the slowest of links.
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

/// What a put puts.
enum Source {
    Bytes(Bytes),
    File(FileRef),
}

impl Source {
    fn put<'a>(&self, store: &'a dyn Store, name: &str) -> BoxFuture<'a, Result<(), StoreError>> {
        match self {
            Source::Bytes(body) => store.put_new(name, body.clone()),
            Source::File(file) => store.put_file(name, file),
        }
    }

    /// Whether the object `name` is this. Its size and its end are compared, what is small whole.
    async fn is_there(&self, store: &dyn Store, name: &str) -> Result<bool, StoreError> {
        let (ours, len) = match self {
            Source::Bytes(body) => (body.clone(), body.len() as u64),
            Source::File(file) => file_suffix(name, file, COMPARE_WHOLE_MAX).await?,
        };
        let compared = if len <= COMPARE_WHOLE_MAX { len } else { COMPARE_SUFFIX };
        let (tail, size) = store.get_suffix(name, compared.max(1)).await?;
        Ok(size == len && ours.ends_with(&tail))
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

    /// `len`: how many bytes the answer may have.
    async fn read<'a, T>(
        &'a self,
        name: &str,
        len: u64,
        mut request: impl FnMut() -> BoxFuture<'a, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let (mut deadline, half) =
            (Instant::now() + self.policy.read_deadline, self.policy.read_deadline / 2);
        let cut_off = deadline + transfer_time(len.min(ANSWER_LEN_MAX));
        let mut backoff = self.backoff();
        for tries in 1.. {
            let begun = Instant::now();
            let error = match tokio::time::timeout_at(cut_off, request()).await {
                Ok(Err(error)) if error.is_transient() => error,
                Ok(answer) => return answer,
                Err(_) => StoreError::unavailable(name, "no answer in time"),
            };
            if begun.elapsed() > half + MORE_THAN_SILENCE {
                deadline = deadline.max(Instant::now() + half).min(cut_off);
            }
            self.pause(&mut backoff, deadline, tries, error).await?;
        }
        Err(StoreError::unavailable(name, "too many attempts"))
    }

    async fn put(&self, name: &str, source: Source) -> Result<(), StoreError> {
        let deadline = Instant::now() + self.policy.put_deadline;
        let mut backoff = self.backoff();
        let mut ambiguous = false;
        for tries in 1.. {
            let error = match source.put(&*self.inner, name).await {
                Err(StoreError::AlreadyExists { .. }) if ambiguous => {
                    match source.is_there(&*self.inner, name).await {
                        Ok(true) => return Ok(()),
                        Ok(false) => return Err(StoreError::already_exists(name)),
                        // Gone again (a store may answer "conflict" before it has decided): as if nothing was known.
                        Err(StoreError::NotFound { .. }) => {
                            StoreError::unavailable(name, "taken, but not there")
                        }
                        Err(error) => error,
                    }
                }
                // A server may refuse a taken name before it has read the body, and what arrives here is a broken
                // connection, each time: so from the second time on it is asked what is there.
                Err(error) if error.is_transient() && ambiguous => {
                    match source.is_there(&*self.inner, name).await {
                        Ok(true) => return Ok(()),
                        Ok(false) => return Err(StoreError::already_exists(name)),
                        Err(_) => error,
                    }
                }
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
        async move { self.put(&name, Source::Bytes(body)).await }.boxed()
    }

    fn put_once(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.put_once(name, body)
    }

    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let (name, source) = (name.to_owned(), Source::File(file.clone()));
        async move { self.put(&name, source).await }.boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        let name = name.to_owned();
        let len = range.end.saturating_sub(range.start);
        async move { self.read(&name, len, || self.inner.get_range(&name, range.clone())).await }.boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let name = name.to_owned();
        async move { self.read(&name, len, || self.inner.get_suffix(&name, len)).await }.boxed()
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        let len = listing_bytes(limit);
        async move { self.read(&prefix, len, || self.inner.list(&prefix, after.as_deref(), limit)).await }
            .boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move { self.read(&name, 0, || self.inner.delete(&name)).await }.boxed()
    }

    fn device(&self) -> Option<u64> {
        self.inner.device()
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
    async fn a_large_answer_has_time_on_a_slow_link_and_silence_has_an_end() {
        let (memory, fault, retry) = faulty(Faults::default());
        memory.put_new("log/1", Bytes::from(vec![1; 4 << 20])).await.unwrap();
        let delay_max = Duration::from_secs(150);
        fault.set_faults(Faults { delays: 1000, delay_max, ..Faults::default() });
        let start = Instant::now();
        for _ in 0..20 {
            assert_eq!(retry.get_range("log/1", 0..4 << 20).await.unwrap().len(), 4 << 20);
        }
        assert!(start.elapsed() > 20 * RetryPolicy::default().read_deadline);
        assert_eq!(retry.retries(), 0);
        fault.set_faults(Faults { delays: 1000, delay_max: Duration::MAX, ..Faults::default() });
        let start = Instant::now();
        retry.get_range("log/1", 0..4 << 20).await.unwrap_err();
        assert!(start.elapsed() <= Duration::from_secs(159), "{:?}", start.elapsed());
        let start = Instant::now();
        super::super::reachable(&retry, Duration::from_secs(10)).await.unwrap_err();
        assert!(start.elapsed() <= Duration::from_secs(11), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_breaks_off_late_is_asked_for_again_and_silence_is_not_for_longer() {
        let (_, _, retry) = faulty(Faults::default());
        // Attempts that take so many seconds each, of which the last succeeds.
        let read = async |attempts: &[u64]| {
            let mut left = attempts.iter().rev().copied().collect::<Vec<u64>>();
            let begin = Instant::now();
            let answer = retry.read("log/1", 4 << 20, || {
                let (takes, last) = (left.pop().unwrap_or(0), left.is_empty());
                async move {
                    tokio::time::sleep(Duration::from_secs(takes)).await;
                    if last { Ok(()) } else { Err(StoreError::unavailable("log/1", "broken off")) }
                }
                .boxed()
            });
            (answer.await.is_ok(), begin.elapsed())
        };
        assert!(read(&[40, 40, 40]).await.0, "each was under way");
        let (served, took) = read(&[15; 9]).await;
        assert!(!served && took < Duration::from_secs(31), "{took:?}");
        let (served, took) = read(&[40, 15, 15]).await;
        assert!(!served && took < Duration::from_secs(56), "{took:?}");
        let (served, took) = read(&[40; 9]).await;
        assert!(!served && took < Duration::from_secs(159), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_whose_answer_was_lost_is_known_as_ours_and_anothers_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = FileRef::system(&dir.path().join("segment"));
        let (_, fault, retry) = faulty(Faults { lost_answers: 600, ..Faults::default() });
        for n in 0..30 {
            std::fs::write(&file.path, vec![n; usize::from(n) * 5000]).unwrap();
            retry.put_file(&format!("log/{n:04}"), &file).await.unwrap();
        }
        assert!(fault.injected() > 10);
        let (memory, _, retry) = faulty(Faults { lost_answers: 500, ..Faults::default() });
        memory.put_new("log/1", Bytes::from(vec![9; 29 * 5000])).await.unwrap();
        for _ in 0..20 {
            let answer = retry.put_file("log/1", &file).await;
            assert!(!matches!(answer, Ok(())), "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_help_is_not_repeated() {
        let (_, _, retry) = faulty(Faults::default());
        assert!(matches!(retry.get_range("log/9", 0..1).await, Err(StoreError::NotFound { .. })));
        assert!(matches!(retry.put_new("../x", Bytes::new()).await, Err(StoreError::Denied { .. })));
        assert_eq!(retry.retries(), 0);
    }
}
