//! What the tests of this module share: a store in memory that counts, fixed time and randomness, a volume.

use super::segment::VolumeContext;
use crate::clock::{Clock, Env, Random};
use crate::crypto::keys::VolumeKey;
use crate::crypto::sign::SecretKey;
use crate::disk::DiskFile;
use crate::store::{ObjectInfo, Store, StoreError};
use crate::types::{Timestamp, VolumeId};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

pub(super) struct MemoryStore {
    pub objects: Mutex<BTreeMap<String, Bytes>>,
    pub gets: AtomicUsize,
    pub unavailable: std::sync::atomic::AtomicBool,
}

impl MemoryStore {
    pub fn new() -> Arc<MemoryStore> {
        let (objects, gets) = (Mutex::default(), AtomicUsize::new(0));
        Arc::new(MemoryStore { objects, gets, unavailable: Default::default() })
    }

    fn answer<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce(&mut BTreeMap<String, Bytes>) -> Option<T>,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        let name = name.to_owned();
        let answer = if self.unavailable.load(Relaxed) {
            Err(StoreError::Unavailable { name, detail: "switched off".into() })
        } else {
            f(&mut self.objects.lock()).ok_or(StoreError::NotFound { name })
        };
        // Gives way once, so that requests really are in flight together.
        async move {
            tokio::task::yield_now().await;
            answer
        }
        .boxed()
    }
}

impl Store for MemoryStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        self.answer(name, |all| {
            all.insert(name.to_owned(), body);
            Some(())
        })
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        self.gets.fetch_add(1, Relaxed);
        self.answer(name, |all| {
            let object = all.get(name)?;
            (range.end <= object.len() as u64).then(|| object.slice(range.start as usize..range.end as usize))
        })
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        if len > 1 {
            // The question for a segment's size travels beside the requests that are counted.
            self.gets.fetch_add(1, Relaxed);
        }
        self.answer(name, |all| {
            let object = all.get(name)?;
            let start = (object.len() as u64).saturating_sub(len) as usize;
            Some((object.slice(start..), object.len() as u64))
        })
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<ObjectInfo>, StoreError>> {
        self.answer(prefix, |all| {
            let wanted = all.iter().filter(|(name, _)| {
                name.starts_with(prefix) && after.is_none_or(|after| name.as_str() > after)
            });
            let info =
                |(name, body): (&String, &Bytes)| ObjectInfo { name: name.clone(), size: body.len() as u64 };
            Some(wanted.take(limit).map(info).collect())
        })
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        self.answer(name, |all| {
            all.remove(name);
            Some(())
        })
    }

    fn describe(&self) -> String {
        "memory".into()
    }
}

struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn now(&self) -> Timestamp {
        Timestamp { secs: 1_700_000_000 + self.0.fetch_add(1, Relaxed).cast_signed(), nanos: 5 }
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.load(Relaxed))
    }
}

impl Random for Ticks {
    fn fill(&self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let n = self.0.fetch_add(1, Relaxed).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            chunk.copy_from_slice(&n.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Time and randomness that begin at `seed` and go on by counting.
pub(super) fn env(seed: u64) -> Env {
    Env {
        clock: Arc::new(Ticks(AtomicU64::new(seed))),
        random: Arc::new(Ticks(AtomicU64::new(seed << 32))),
        ..Env::system()
    }
}

/// A volume that can be written.
pub(super) fn volume() -> Arc<VolumeContext> {
    let signer = SecretKey::from_bytes(&[3; 32]);
    Arc::new(VolumeContext {
        id: VolumeId([1; 16]),
        key: VolumeKey::from_bytes([2; 32]),
        key_id: 1,
        writer_public: signer.public(),
        signer: Some(signer),
    })
}

/// A file on a disk with so much room for each, and whose calls to sync and to cut may fail.
pub(super) struct SmallDisk {
    pub file: Arc<dyn DiskFile>,
    pub room: Arc<Mutex<u64>>,
    /// With this error.
    pub broken: Arc<Mutex<Option<i32>>>,
    /// With this error the next write fails.
    pub refused: Arc<Mutex<Option<i32>>>,
}

impl SmallDisk {
    fn whole(&self) -> io::Result<&dyn DiskFile> {
        self.broken.lock().map_or(Ok(&*self.file), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

impl DiskFile for SmallDisk {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        if let Some(errno) = self.refused.lock().take() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let fits = self.room.lock().saturating_sub(offset).min(bytes.len() as u64) as usize;
        if fits == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.file.write_at(&bytes[..fits], offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.whole()?.sync()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.whole()?.set_len(len)
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch(range)
    }

    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        self.file.data_ranges()
    }
}

/// Bytes that do not compress, different for every `seed`.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in &mut out {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    out
}
