//! Counts what the kernel asks of a mount and how it is answered, for status and metrics.
//! Invariant: costs a request next to nothing, and nobody who counts or looks waits for anything but another count.

use crate::clock::Clock;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the kernel has asked since the mount.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RequestFigures {
    /// Requests by operation.
    pub by_operation: BTreeMap<String, u64>,
    /// Requests that were answered with an error, by its name. Most are answers that POSIX foresees.
    pub errors: BTreeMap<String, u64>,
    /// Requests that have no answer yet.
    pub open: u64,
    /// For how long the oldest of these has been waiting, in seconds.
    pub oldest_seconds: f64,
    /// The longest that any request took, those without an answer included, in seconds.
    pub longest_seconds: f64,
    /// Fetches from the store that requests wait for.
    pub open_fetches: u64,
}

/// See the module.
pub struct Watch {
    clock: Arc<dyn Clock>,
    counts: Mutex<Counts>,
    fetches: AtomicU64,
}

#[derive(Default)]
struct Counts {
    /// A handful of names, in the order of their first use.
    operations: Vec<(&'static str, u64)>,
    errors: BTreeMap<i32, u64>,
    /// Those without an answer: ticket and time of arrival.
    open: Vec<(u64, Duration)>,
    tickets: u64,
    longest: Duration,
}

/// A request that has no answer yet. Dropping it counts it as gone.
pub struct Open {
    watch: Arc<Watch>,
    ticket: u64,
    began: Duration,
}

/// A fetch under way; it has ended when this is dropped.
pub struct Fetching<'a>(&'a AtomicU64);

impl Watch {
    /// Nothing counted yet.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Watch> {
        Arc::new(Watch { clock, counts: Mutex::default(), fetches: AtomicU64::new(0) })
    }

    /// A request has come.
    pub fn begin(self: &Arc<Self>, operation: &'static str) -> Open {
        let began = self.clock.monotonic();
        let mut counts = self.counts.lock();
        match counts.operations.iter_mut().find(|(name, _)| *name == operation) {
            Some((_, n)) => *n += 1,
            None => counts.operations.push((operation, 1)),
        }
        counts.tickets += 1;
        let ticket = counts.tickets;
        counts.open.push((ticket, began));
        Open { watch: self.clone(), ticket, began }
    }

    /// A fetch for a request begins.
    pub fn fetching(&self) -> Fetching<'_> {
        self.fetches.fetch_add(1, Ordering::Relaxed);
        Fetching(&self.fetches)
    }

    /// What has been counted.
    pub fn figures(&self) -> RequestFigures {
        let now = self.clock.monotonic();
        let counts = self.counts.lock();
        let oldest = counts.open.iter().map(|(_, began)| now.saturating_sub(*began)).max();
        let oldest = oldest.unwrap_or_default();
        RequestFigures {
            by_operation: counts.operations.iter().map(|(name, n)| (name.to_string(), *n)).collect(),
            errors: counts.errors.iter().map(|(errno, n)| (errno_name(*errno), *n)).collect(),
            open: counts.open.len() as u64,
            oldest_seconds: oldest.as_secs_f64(),
            longest_seconds: counts.longest.max(oldest).as_secs_f64(),
            open_fetches: self.fetches.load(Ordering::Relaxed),
        }
    }
}

impl Open {
    /// It was answered so.
    pub fn answered<T>(self, result: &Result<T, i32>) {
        if let Err(errno) = result {
            *self.watch.counts.lock().errors.entry(*errno).or_default() += 1;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let took = self.watch.clock.monotonic().saturating_sub(self.began);
        let mut counts = self.watch.counts.lock();
        if let Some(at) = counts.open.iter().rposition(|(ticket, _)| *ticket == self.ticket) {
            counts.open.swap_remove(at);
        }
        counts.longest = counts.longest.max(took);
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The name of an error number; the number itself where it is a rare one.
fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::E2BIG => "E2BIG",
        libc::EACCES => "EACCES",
        libc::EAGAIN => "EAGAIN",
        libc::EBUSY => "EBUSY",
        libc::EDQUOT => "EDQUOT",
        libc::EEXIST => "EEXIST",
        libc::EFBIG => "EFBIG",
        libc::EINVAL => "EINVAL",
        libc::EIO => "EIO",
        libc::EISDIR => "EISDIR",
        libc::ELOOP => "ELOOP",
        libc::EMLINK => "EMLINK",
        libc::ENAMETOOLONG => "ENAMETOOLONG",
        libc::ENODATA => "ENODATA",
        libc::ENOENT => "ENOENT",
        libc::ENOMEM => "ENOMEM",
        libc::ENOSPC => "ENOSPC",
        libc::ENOTDIR => "ENOTDIR",
        libc::ENOTEMPTY => "ENOTEMPTY",
        libc::ENXIO => "ENXIO",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EPERM => "EPERM",
        libc::ERANGE => "ERANGE",
        libc::EROFS => "EROFS",
        libc::ESTALE => "ESTALE",
        libc::EXDEV => "EXDEV",
        other => return other.to_string(),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Timestamp;

    struct Still(AtomicU64);

    impl Clock for Still {
        fn now(&self) -> Timestamp {
            Timestamp::default()
        }

        fn monotonic(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn requests_are_counted_by_name_answer_and_time() {
        let clock = Arc::new(Still(AtomicU64::new(0)));
        let watch = Watch::new(clock.clone());
        let (first, second) = (watch.begin("read"), watch.begin("lookup"));
        let dropped = watch.begin("read");
        clock.0.store(2500, Ordering::Relaxed);
        assert_eq!((watch.figures().open, watch.figures().oldest_seconds), (3, 2.5));
        first.answered(&Ok(()));
        second.answered::<()>(&Err(libc::ENOENT));
        clock.0.store(3000, Ordering::Relaxed);
        drop(dropped);
        let fetch = watch.fetching();
        let figures = watch.figures();
        assert_eq!((figures.by_operation["read"], figures.by_operation["lookup"]), (2, 1));
        assert_eq!(figures.errors, BTreeMap::from([("ENOENT".to_string(), 1)]));
        assert_eq!((figures.open, figures.oldest_seconds, figures.longest_seconds), (0, 0.0, 3.0));
        assert_eq!(figures.open_fetches, 1);
        drop(fetch);
        assert_eq!(watch.figures().open_fetches, 0);
    }
}
