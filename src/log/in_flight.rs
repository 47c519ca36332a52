//! Which frames are being fetched from the store, so that two that want the same ask once.
//! Invariant: a frame is in one claim at most, and in none as soon as its fetch ended, however it did.

use crate::types::FramePtr;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use tokio::sync::Notify;

/// Frames that some fetch is asking the store for.
#[derive(Default)]
pub(super) struct InFlight {
    claimed: Mutex<Claimed>,
    released: Notify,
}

#[derive(Default)]
struct Claimed {
    /// By which claim each is.
    by: HashMap<FramePtr, u64>,
    claims: u64,
}

/// Frames that one fetch asks for; released when it is done, has failed, or was given up.
pub(super) struct Claim<'a> {
    in_flight: &'a InFlight,
    pub ptrs: BTreeSet<FramePtr>,
}

impl InFlight {
    /// Claims those of `wanted` that nobody else asks for.
    pub fn claim(&self, wanted: &[FramePtr]) -> Claim<'_> {
        let mut all = self.claimed.lock();
        all.claims += 1;
        let free: BTreeSet<FramePtr> =
            wanted.iter().copied().filter(|ptr| !all.by.contains_key(ptr)).collect();
        let claim = all.claims;
        all.by.extend(free.iter().map(|ptr| (*ptr, claim)));
        Claim { in_flight: self, ptrs: free }
    }

    /// By which claim each of `wanted` is; nothing when one is not claimed, or none is wanted.
    fn claims_of(&self, wanted: &[FramePtr]) -> Option<Vec<u64>> {
        let all = self.claimed.lock();
        wanted
            .iter()
            .map(|ptr| all.by.get(ptr).copied())
            .collect::<Option<Vec<u64>>>()
            .filter(|c| !c.is_empty())
    }

    /// Waits until one of the claims ends by which `wanted` are, if all of them are. Whether another fetch claims the
    /// same at once makes no difference.
    pub async fn wait_for_one(&self, wanted: &[FramePtr]) {
        let Some(claims) = self.claims_of(wanted) else { return };
        loop {
            let released = self.released.notified();
            let mut released = std::pin::pin!(released);
            // Listens before it looks, so that no release falls in between.
            released.as_mut().enable();
            if self.claims_of(wanted).as_ref() != Some(&claims) {
                return;
            }
            released.await;
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut all = self.in_flight.claimed.lock();
        self.ptrs.iter().for_each(|ptr| {
            all.by.remove(ptr);
        });
        drop(all);
        self.in_flight.released.notify_waiters();
    }
}
