//! The room that is left on the spool's disk.
//! Invariant: writers are refused before the disk cannot take what memory holds.

use super::io::Io;
use crate::fs::Fs;
use crate::log::statedir::StateDir;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often the spool's free space is looked at; and how often when less than so many bytes are left, for a fast disk
/// fills in less than a second.
const SPACE_INTERVAL: Duration = Duration::from_secs(1);
const SPACE_INTERVAL_NEAR: Duration = Duration::from_millis(20);
const SPACE_NEAR: u64 = 8 << 30;

/// Keeps the file system told whether the spool's disk has room for what memory may still hold, and `last` what is left.
pub(super) fn watch(fs: &Arc<Fs>, dir: &Arc<StateDir>, runtime: &Io, dirty_max: u64, last: Arc<AtomicU64>) {
    let (fs, dir) = (Arc::downgrade(fs), Arc::downgrade(dir)); // the task must not keep the volume open
    let reserve = 2 * dirty_max + (64 << 20);
    runtime.spawn(async move {
        while let (Some(fs), Some(dir)) = (fs.upgrade(), dir.upgrade()) {
            let mut pause = SPACE_INTERVAL;
            match dir.free_bytes() {
                Ok(free) => {
                    last.store(free, Ordering::Relaxed);
                    fs.set_no_space(free < reserve);
                    if free < reserve + SPACE_NEAR {
                        pause = SPACE_INTERVAL_NEAR;
                    }
                }
                Err(e) => ::log::warn!("free space of the spool: {e}"),
            }
            drop((fs, dir));
            tokio::time::sleep(pause).await;
        }
    });
}
