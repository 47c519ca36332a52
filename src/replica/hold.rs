//! For how long closed segments are held back for the local disk's sake: to read the spool and, where the store is a
//! directory, to write it again takes the disk from commits that applications wait for.
//! Invariant: nobody who waits for the store, and no disk that is full, waits for this; what is held back is bounded in time
//! and, where that is long, in bytes and by the room there is.

use super::durable::{Durable, Protection};
use crate::fs::Fs;
use crate::log::statedir::StateDir;
use crate::store::Store;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// For how long at most.
const HOLD_MAX: Duration = Duration::from_secs(1);
/// The same where the store lies on the spool's disk, and no `fsync` waits for it: until a copy leaves that disk it protects
/// from nothing from which the spool does not.
const HOLD_MAX_SAME_DISK: Duration = Duration::from_secs(10);
/// Not for so long when more bytes than this are unsent already: they delay the end of the mount.
const UNSENT_MAX: u64 = 4 << 30;
/// Nor when fewer bytes than this are left on the disk: room for what is unsent, and for its copies.
const ROOM_MIN: u64 = 4 * UNSENT_MAX;

/// What is asked.
pub(super) struct Holding {
    /// The device on which the spool lies.
    spool: Option<u64>,
    store: Arc<dyn Store>,
    durable: Arc<Durable>,
    /// Bytes that are left on the spool's disk; the greatest number while that is not known.
    room: Arc<AtomicU64>,
}

impl Holding {
    pub fn new(
        dir: &StateDir,
        store: &Arc<dyn Store>,
        durable: &Arc<Durable>,
        room: &Arc<AtomicU64>,
    ) -> Holding {
        let (store, durable, room) = (store.clone(), durable.clone(), room.clone());
        Holding { spool: dir.log_device(), store, durable, room }
    }

    /// How old a segment may become before it is sent.
    pub fn longest(&self, fs: &Fs) -> Duration {
        longest(Weather {
            behind: fs.is_behind(),
            waited_for: self.durable.has_waiters(),
            protection: self.durable.protection(),
            devices: (self.spool, self.store.device()),
            unsent: self.durable.unsent_bytes(),
            room: self.room.load(Ordering::Relaxed),
        })
    }
}

/// What it depends on.
#[derive(Clone, Copy, Debug)]
struct Weather {
    /// Applications write faster than the local disk takes it.
    behind: bool,
    /// Somebody waits in `fsync` or `sync`.
    waited_for: bool,
    protection: Protection,
    /// The devices on which spool and store lie, as far as known.
    devices: (Option<u64>, Option<u64>),
    /// Bytes in closed segments that the store is not known to hold.
    unsent: u64,
    /// As in [`Holding`].
    room: u64,
}

fn longest(now: Weather) -> Duration {
    let Weather { behind, waited_for, protection, devices: (spool, store), unsent, room } = now;
    if !behind || waited_for {
        return Duration::ZERO;
    }
    let ample = unsent < UNSENT_MAX && room > ROOM_MIN && room != u64::MAX;
    if protection == Protection::Local && spool.is_some() && spool == store && ample {
        HOLD_MAX_SAME_DISK
    } else {
        HOLD_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_store_that_protects_no_more_than_the_spool_waits_for_long() {
        let ample = Weather {
            behind: true,
            waited_for: false,
            protection: Protection::Local,
            devices: (Some(7), Some(7)),
            unsent: UNSENT_MAX - 1,
            room: ROOM_MIN + 1,
        };
        assert_eq!(longest(ample), HOLD_MAX_SAME_DISK);
        assert_eq!(longest(Weather { behind: false, ..ample }), Duration::ZERO);
        assert_eq!(longest(Weather { waited_for: true, ..ample }), Duration::ZERO);
        let short = [
            Weather { protection: Protection::Available, ..ample },
            Weather { protection: Protection::Strict, ..ample },
            Weather { devices: (Some(7), Some(8)), ..ample },
            Weather { devices: (Some(7), None), ..ample },
            Weather { devices: (None, None), ..ample },
            Weather { unsent: UNSENT_MAX, ..ample },
            Weather { room: ROOM_MIN, ..ample },
            Weather { room: u64::MAX, ..ample },
        ];
        for weather in short {
            assert_eq!(longest(weather), HOLD_MAX, "{weather:?}");
        }
    }
}
