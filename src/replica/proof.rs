//! A store that is written to only while it is known to keep put-if-absent, on which one writer is told from another.
//! Invariant: nothing is put into a store that has been seen to overwrite, and the proof itself changes no object: it
//! offers `volume.json` once more, with the bytes that are there. A good store refuses that; a bad one takes it, and
//! is found out without harm. Nothing has to be deleted.

use super::durable::Durable;
use crate::clock::Clock;
use crate::disk::FileRef;
use crate::log::chain::stored_head;
use crate::log::segment::{VolumeContext, segment_name};
use crate::log::{self, volume};
use crate::store::{ObjectInfo, Store, StoreError};
use ::log::{info, warn};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// How long a proof counts. A store may change behind its address: another server, other settings.
const VALID: Duration = Duration::from_secs(3600);
/// How long one trial may take.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long opening a volume waits for it; the uploader asks again.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);

/// What the store showed.
#[derive(Debug)]
enum Verdict {
    /// It keeps put-if-absent.
    Kept,
    /// It overwrites what is there, or has lost what it had confirmed: nothing may be put.
    Unfit(StoreError),
    /// It could not be tried out.
    Unknown(StoreError),
}

/// See the module.
pub(super) struct ProvenStore {
    inner: Arc<dyn Store>,
    /// `volume.json`, as this host knows it.
    superblock: Bytes,
    clock: Arc<dyn Clock>,
    /// What it was asked to keep, and with what that is read: it is looked at with each proof.
    kept: Option<(Arc<VolumeContext>, Arc<Durable>)>,
    /// When it was proven last. Held over the proof, so that many uploads make one.
    proven: Mutex<Option<Duration>>,
}

/// What lies in a place after a put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Put {
    /// What was put.
    Ours,
    /// Something else.
    Taken,
}

impl ProvenStore {
    pub fn new(inner: Arc<dyn Store>, superblock: Bytes, clock: Arc<dyn Clock>) -> ProvenStore {
        ProvenStore { inner, superblock, clock, kept: None, proven: Mutex::new(None) }
    }

    /// The same, for who keeps account of what the store has confirmed: nothing is put behind a newest segment that is gone.
    pub fn keeping(self, ctx: Arc<VolumeContext>, durable: Arc<Durable>) -> ProvenStore {
        ProvenStore { kept: Some((ctx, durable)), ..self }
    }

    /// Tries the store out, unless that was done not long ago.
    async fn verdict(&self) -> Verdict {
        let mut proven = self.proven.lock().await;
        let now = self.clock.monotonic();
        if proven.is_some_and(|at| now < at + VALID) {
            return Verdict::Kept;
        }
        let silent =
            |_| Err(StoreError::unavailable(volume::NAME, "no answer to the trial of put-if-absent"));
        let verdict = tokio::time::timeout(TRIAL_TIMEOUT, self.try_out()).await.unwrap_or_else(silent);
        let verdict = match verdict.unwrap_or_else(Verdict::Unknown) {
            // One that has kept it is believed for another while: a bad moment of the link must not stop the uploads.
            Verdict::Unknown(error) if error.is_transient() && proven.is_some() => {
                ::log::debug!("{error}; asked again later");
                Verdict::Kept
            }
            verdict => verdict,
        };
        if matches!(verdict, Verdict::Kept) {
            if proven.is_none() {
                info!("{}: keeps put-if-absent", self.inner.describe());
            }
            *proven = Some(now);
        } else if proven.take().is_some() {
            warn!("{}: it is no longer known whether it keeps put-if-absent", self.inner.describe());
        }
        verdict
    }

    /// A writer does not begin on a store that overwrites. What cannot be told now, the uploader finds out.
    pub async fn refuse_to_begin(&self) -> log::Result<()> {
        match tokio::time::timeout(OPENING_TIMEOUT, self.verdict()).await {
            Ok(Verdict::Unfit(error)) => return Err(log::Error::Refused(error.to_string())),
            Ok(Verdict::Unknown(error)) => warn!("{error}; the store is tried out before the first upload"),
            Ok(Verdict::Kept) | Err(_) => {}
        }
        Ok(())
    }

    /// Puts a segment that consists of a mark, and says whose the object is that then lies there.
    pub async fn put_ours(&self, name: &str, bytes: Bytes) -> log::Result<Put> {
        match self.put_new(name, bytes.clone()).await {
            Ok(()) => Ok(Put::Ours),
            // By an earlier try of ours whose answer was lost, or by another.
            Err(StoreError::AlreadyExists { .. }) => {
                let (there, size) = self.get_suffix(name, bytes.len() as u64).await?;
                let ours = size == bytes.len() as u64 && there == bytes;
                Ok(if ours { Put::Ours } else { Put::Taken })
            }
            Err(e) => Err(e.into()),
        }
    }

    /// For who begins something that only put-if-absent makes safe.
    pub async fn require(&self) -> log::Result<()> {
        match self.verdict().await {
            Verdict::Kept => Ok(()),
            // Nothing that could be put right here; all else is what the store said, and its user's to mend.
            Verdict::Unfit(error) => Err(log::Error::Refused(error.to_string())),
            Verdict::Unknown(error) => Err(log::Error::Store(error)),
        }
    }

    async fn try_out(&self) -> Result<Verdict, StoreError> {
        let name = volume::NAME;
        let (there, size) = self.inner.get_suffix(name, self.superblock.len() as u64).await?;
        // Put only where it is, and is the same: this must never make or change one.
        if size != self.superblock.len() as u64 || there != self.superblock {
            let detail = "is not the one this host knows: the store may have been exchanged, or damages data";
            return Err(StoreError::unavailable(name, detail));
        }
        if let Some(lost) = self.lost().await? {
            return Ok(Verdict::Unfit(lost));
        }
        Ok(match self.inner.put_once(name, self.superblock.clone()).await {
            Err(StoreError::AlreadyExists { .. }) => Verdict::Kept,
            Ok(()) => Verdict::Unfit(StoreError::denied(
                name,
                "the store overwrites objects that are to be created only if absent (it took this one, which is \
                 there, a second time), so two writers could destroy each other's data. Nothing is written to it; \
                 use a store with conditional writes (If-None-Match), or switch them on; where there are none, the store \
                 option put_if_absent=emulated says that you know what is weaker then (operations.md)",
            )),
            Err(error) => return Err(error),
        })
    }

    /// What to say when the newest segment that it has confirmed is not there any more.
    async fn lost(&self) -> Result<Option<StoreError>, StoreError> {
        let Some((ctx, durable)) = &self.kept else { return Ok(None) };
        let Some(head) = durable.snapshot().remote_head else { return Ok(None) };
        let name = segment_name(head.seq);
        let rolled_back = |what: &str| {
            let detail = format!(
                "ROLLBACK: the store had confirmed this segment, and {what}: it was rolled back, or lost it. Nothing more is \
                 put over the hole. Ask the store's operator; when the volume is mounted anew, what lies whole on this host \
                 is sent again"
            );
            Ok(Some(StoreError::denied(&name, detail)))
        };
        match stored_head(ctx, &*self.inner, head.seq).await {
            Ok(there) if there == head => Ok(None),
            Ok(_) => rolled_back("has another one now"),
            Err(log::Error::Store(StoreError::NotFound { .. })) => rolled_back("does not hold it any more"),
            Err(log::Error::Store(e)) => Err(e),
            Err(e) => Err(StoreError::unavailable(&name, e)),
        }
    }

    async fn prove(&self) -> Result<(), StoreError> {
        match self.verdict().await {
            Verdict::Kept => Ok(()),
            Verdict::Unfit(error) | Verdict::Unknown(error) => Err(error),
        }
    }
}

impl Store for ProvenStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        let name = name.to_owned();
        async move {
            self.prove().await?;
            self.inner.put_new(&name, body).await
        }
        .boxed()
    }

    fn put_file(&self, name: &str, file: &FileRef) -> BoxFuture<'_, Result<(), StoreError>> {
        let (name, file) = (name.to_owned(), file.clone());
        async move {
            self.prove().await?;
            self.inner.put_file(&name, &file).await
        }
        .boxed()
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.inner.get_range(name, range)
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        self.inner.get_suffix(name, len)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        self.inner.list(prefix, after, limit)
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.delete(name)
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
    use crate::clock::Env;
    use crate::store::counted::CountedStore;
    use crate::store::fault::{FaultStore, Faults};
    use crate::store::local::LocalStore;
    use crate::store::memory::MemoryStore;
    use crate::store::retry::{RetryPolicy, RetryStore};
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Forgets what "if absent" means, when told to.
    struct Forgetful(MemoryStore, AtomicBool);

    impl Store for Forgetful {
        fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
            if self.1.load(Ordering::SeqCst) {
                self.0.tamper(name, body);
                return std::future::ready(Ok(())).boxed();
            }
            self.0.put_new(name, body)
        }

        fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
            self.0.get_range(name, range)
        }

        fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
            self.0.get_suffix(name, len)
        }

        fn list(
            &self,
            prefix: &str,
            after: Option<&str>,
            limit: usize,
        ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
            self.0.list(prefix, after, limit)
        }

        fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
            self.0.delete(name)
        }

        fn describe(&self) -> String {
            "forgetful:".into()
        }
    }

    const SUPERBLOCK: &[u8] = b"{the volume}";

    fn proven(inner: Arc<dyn Store>) -> ProvenStore {
        ProvenStore::new(inner, Bytes::from_static(SUPERBLOCK), Env::system().clock)
    }

    async fn forgetful(on: bool) -> (Arc<Forgetful>, ProvenStore) {
        let store = Arc::new(Forgetful(MemoryStore::new(), AtomicBool::new(on)));
        store.0.put_new(volume::NAME, Bytes::from_static(SUPERBLOCK)).await.unwrap();
        (store.clone(), proven(store))
    }

    #[tokio::test]
    async fn nothing_is_put_into_a_store_that_overwrites_until_it_is_put_right() {
        let (store, proven) = forgetful(true).await;
        let refused = proven.put_new("log/1", Bytes::from_static(b"x")).await.unwrap_err();
        assert!(!refused.is_transient() && refused.to_string().contains("two writers"), "{refused}");
        assert!(store.0.get_suffix("log/1", 1).await.is_err());
        assert_eq!(store.0.get_suffix(volume::NAME, 99).await.unwrap().0, SUPERBLOCK);
        store.1.store(false, Ordering::SeqCst);
        proven.put_new("log/1", Bytes::from_static(b"x")).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_missing_or_different_is_never_made() {
        let memory = Arc::new(MemoryStore::new());
        let proven = proven(memory.clone());
        assert!(matches!(proven.verdict().await, Verdict::Unknown(_)));
        assert!(memory.get_suffix(volume::NAME, 1).await.is_err(), "not made");
        memory.put_new(volume::NAME, Bytes::from_static(b"{another}!!!")).await.unwrap();
        assert!(matches!(proven.verdict().await, Verdict::Unknown(_)));
        assert_eq!(memory.get_suffix(volume::NAME, 99).await.unwrap().0, &b"{another}!!!"[..]);
    }

    #[tokio::test]
    async fn the_stores_device_is_told_through_what_stands_before_it() {
        let place = tempfile::tempdir().unwrap();
        let local = Arc::new(LocalStore::new(place.path()));
        let retry = Arc::new(RetryStore::new(local.clone(), Env::system(), RetryPolicy::default()));
        let all = CountedStore::new(Arc::new(proven(retry)));
        assert_eq!(all.device(), None, "not seen yet to be a volume's");
        local.put_new(volume::NAME, Bytes::from_static(SUPERBLOCK)).await.unwrap();
        all.get_suffix(volume::NAME, 1).await.unwrap();
        let device = std::fs::metadata(place.path()).unwrap().dev();
        assert_eq!(all.device(), Some(device));
        drop(place);
        // Asked itself: what stands before it would ask again for half a minute.
        assert!(local.get_suffix(volume::NAME, 1).await.is_err());
        assert_eq!(all.device(), Some(device), "where it was; what shows under the path now is not it");
        assert_eq!(proven(Arc::new(MemoryStore::new())).device(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn lost_answers_never_make_a_good_store_look_bad() {
        for seed in 0..200 {
            let memory = Arc::new(MemoryStore::new());
            memory.put_new(volume::NAME, Bytes::from_static(SUPERBLOCK)).await.unwrap();
            let faults = Faults { lost_answers: 400, lost_requests: 100, ..Faults::default() };
            let fault = Arc::new(FaultStore::new(memory, seed, faults));
            let retry = RetryStore::new(fault, Env::system(), RetryPolicy::default());
            let verdict = proven(Arc::new(retry)).verdict().await;
            assert!(!matches!(verdict, Verdict::Unfit(_)), "seed {seed}");
        }
    }
}
