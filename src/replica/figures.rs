//! The figures of an open volume, for its status.
//! Invariant: none of them waits.

use super::uploader::Uploader;
use super::volume::Volume;
use crate::ops::status::UploadFigures;
use std::sync::atomic::Ordering;

impl Volume {
    /// Bytes of the local disk used as cache.
    pub fn cache_bytes(&self) -> u64 {
        self.reader.disk_cache_bytes()
    }

    /// What was sent to the store; all zero for a reader, and once the volume is closed.
    pub fn uploads(&self) -> UploadFigures {
        let Some(home) = &self.home else { return UploadFigures::default() };
        home.shipper.uploader.lock().as_ref().map(Uploader::figures).unwrap_or_default()
    }

    /// Bytes that the spool's disk had left when a writer last looked.
    pub fn spool_free_bytes(&self) -> Option<u64> {
        self.home
            .as_ref()
            .map(|home| home.shipper.free_bytes.load(Ordering::Relaxed))
            .filter(|n| *n != u64::MAX)
    }
}
