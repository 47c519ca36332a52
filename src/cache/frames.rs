//! Opened frames, bounded by bytes; the least recently used goes first.
//! Invariant: what is held has been authenticated at its pointer; the bytes held stay at or below the limit.

use crate::types::{FrameKind, FramePtr};
use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

/// What an entry costs beside its contents, in bytes (map, list and buffer headers; an estimate).
const ENTRY_COST: usize = 160;

/// The chunk cache.
pub struct FrameCache {
    limit: usize,
    inner: Mutex<Inner>,
}

struct Inner {
    frames: LruCache<FramePtr, (FrameKind, Bytes)>,
    bytes: usize,
}

impl FrameCache {
    /// A cache of at most `limit` bytes.
    pub fn new(limit: usize) -> FrameCache {
        FrameCache { limit, inner: Mutex::new(Inner { frames: LruCache::unbounded(), bytes: 0 }) }
    }

    /// The frame and its kind, if it is held; it becomes the most recently used.
    pub fn get(&self, ptr: FramePtr) -> Option<(FrameKind, Bytes)> {
        self.inner.lock().frames.get(&ptr).cloned()
    }

    /// True when the frame is held; leaves the order as it is.
    pub fn contains(&self, ptr: FramePtr) -> bool {
        self.inner.lock().frames.contains(&ptr)
    }

    /// Holds an opened frame; what is larger than the whole cache is not held.
    pub fn put(&self, ptr: FramePtr, kind: FrameKind, plain: Bytes) {
        let cost = plain.len() + ENTRY_COST;
        if cost > self.limit {
            return;
        }
        let mut inner = self.inner.lock();
        if let Some((_, old)) = inner.frames.put(ptr, (kind, plain)) {
            inner.bytes -= old.len() + ENTRY_COST;
        }
        inner.bytes += cost;
        while inner.bytes > self.limit {
            let Some((_, (_, old))) = inner.frames.pop_lru() else { break };
            inner.bytes -= old.len() + ENTRY_COST;
        }
    }

    /// Lets go of a frame.
    pub fn remove(&self, ptr: FramePtr) {
        let mut inner = self.inner.lock();
        if let Some((_, old)) = inner.frames.pop(&ptr) {
            inner.bytes -= old.len() + ENTRY_COST;
        }
    }

    /// Bytes held, overhead included.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Seq;

    fn ptr(n: u32) -> FramePtr {
        FramePtr { seq: Seq(1), offset: n, len: 1 }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_limit_holds() {
        let cache = FrameCache::new(3 * (100 + ENTRY_COST));
        let put = |n| cache.put(ptr(n), FrameKind::Data, Bytes::from(vec![n as u8; 100]));
        (1..=3).for_each(put);
        assert!(cache.get(ptr(1)).is_some());
        put(4);
        assert!(cache.contains(ptr(1)) && !cache.contains(ptr(2)));
        put(4);
        assert_eq!(cache.bytes(), 3 * (100 + ENTRY_COST));
        cache.put(ptr(9), FrameKind::Data, Bytes::from(vec![0; 10_000]));
        assert!(!cache.contains(ptr(9)) && cache.contains(ptr(4)));
        cache.remove(ptr(1));
        assert_eq!(cache.bytes(), 2 * (100 + ENTRY_COST));
    }
}
