//! Which frames are being fetched from the store, so that two that want the same ask once, and for which it gave no
//! answer just now.
//! Invariant: a frame is in one claim at most, and in none as soon as its fetch ended, however it did. Only want of an
//! answer is shared with who did not ask himself: damage and refusals come fast, and may be another frame's.

use super::segment::segment_name;
use super::{Error, Result};
use crate::store::StoreError;
use crate::types::FramePtr;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// So long after a fetch without an answer another of the same frame is told the same. The kernel asks once more for a
/// page that could not be read ahead, and lets those that want the same page or the same name ask one after the other:
/// each of them would wait as long again.
const SHARED: Duration = Duration::from_secs(1);
/// A fetch that failed later than this had answers meanwhile, which came too slowly or broke off: it says too little about
/// the next one to speak for it. (Silence or errors from the beginning are given up after 30 s.)
const SILENT: Duration = Duration::from_secs(35);
/// Who waits for a fetch has heard how it ended after this time, however busy the host is.
const KEPT: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub(super) struct InFlight {
    claimed: Mutex<HashSet<FramePtr>>,
    released: Notify,
    /// When the store did not answer for a frame, and how that was told.
    unanswered: Mutex<HashMap<FramePtr, (Instant, String)>>,
}

/// Frames that one fetch asks for; released when it is done, has failed, or was given up.
pub(super) struct Claim<'a> {
    in_flight: &'a InFlight,
    begun: Instant,
    pub ptrs: BTreeSet<FramePtr>,
}

impl InFlight {
    /// Claims those of `wanted` that nobody else asks for.
    pub fn claim(&self, wanted: &[FramePtr]) -> Claim<'_> {
        let mut all = self.claimed.lock();
        let ptrs = wanted.iter().copied().filter(|ptr| all.insert(*ptr)).collect();
        Claim { in_flight: self, begun: Instant::now(), ptrs }
    }

    /// Waits until one of `wanted` is not asked for by anybody.
    pub async fn wait_for_one(&self, wanted: &[FramePtr]) {
        loop {
            let released = self.released.notified();
            let mut released = std::pin::pin!(released);
            // Listens before it looks, so that no release falls in between.
            released.as_mut().enable();
            let waiting = {
                let all = self.claimed.lock();
                !wanted.is_empty() && wanted.iter().all(|ptr| all.contains(ptr))
            };
            if !waiting {
                return;
            }
            released.await;
        }
    }

    /// The want of an answer for one of `wanted` that a fetch which began at `begun` shares.
    pub fn unanswered(&self, wanted: &[FramePtr], begun: Instant) -> Option<StoreError> {
        let all = self.unanswered.lock();
        let shares = |(when, _): &&(Instant, String)| *when >= begun || when.elapsed() < SHARED;
        let mut found = wanted.iter().filter_map(|ptr| Some((ptr, all.get(ptr).filter(shares)?)));
        found.next().map(|(ptr, (_, detail))| StoreError::unavailable(&segment_name(ptr.seq), detail))
    }
}

impl Claim<'_> {
    /// Takes note of how the fetch ended, before its frames are released. One that was answered shows that its segments
    /// are there again.
    pub fn ended(&self, fetched: &Result<()>) {
        let mut all = self.in_flight.unanswered.lock();
        match fetched {
            Ok(()) => all.retain(|ptr, _| !self.ptrs.iter().any(|answered| answered.seq == ptr.seq)),
            Err(Error::Store(StoreError::Unavailable { name, detail })) if self.begun.elapsed() < SILENT => {
                let now = Instant::now();
                all.retain(|_, (when, _)| now.duration_since(*when) < KEPT);
                let its_own = self.ptrs.iter().filter(|ptr| segment_name(ptr.seq) == *name);
                all.extend(its_own.map(|ptr| (*ptr, (now, detail.clone()))));
            }
            Err(_) => {}
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut all = self.in_flight.claimed.lock();
        self.ptrs.iter().for_each(|ptr| {
            all.remove(ptr);
        });
        drop(all);
        self.in_flight.released.notify_waiters();
    }
}
