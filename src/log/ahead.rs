//! Reading ahead in archive order: a walk meets the frames of a segment about in the order they were written, so
//! that what lies behind the frame that is fetched will be wanted next. No I/O.
//! Invariant: a plan only grows, never past the end of its segment, and only for those who read little at a time.

use crate::types::Seq;
use lru::LruCache;
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::ops::Range;

/// What a first or a random fetch takes along, in bytes.
const WINDOW_MIN: u64 = 128 << 10;
/// What a fetch takes along after several in order.
const WINDOW_MAX: u64 = 4 << 20;
/// Who asks for more than this knows what he wants.
const SMALL: u64 = 512 << 10;
/// A fetch this near to where the last one ended goes on from it.
const NEAR: u64 = 1 << 20;
const SEGMENTS_KEPT: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

#[derive(Clone, Copy, Default)]
struct Stream {
    size: Option<u64>,
    next: u64,
    window: u64,
}

/// How each segment was last read from the store.
pub(super) struct ReadAhead(Mutex<LruCache<Seq, Stream>>);

impl ReadAhead {
    pub fn new() -> ReadAhead {
        ReadAhead(Mutex::new(LruCache::new(SEGMENTS_KEPT)))
    }

    /// Lengthens the last of the `planned` ranges of a segment. True when the segment's size should be asked for
    /// along the way: without it nothing can be taken along.
    pub fn extend(&self, seq: Seq, planned: &mut [Range<u64>]) -> bool {
        let total: u64 = planned.iter().map(|range| range.end - range.start).sum();
        let Some(last) = planned.last_mut().filter(|_| total <= SMALL) else { return false };
        let mut streams = self.0.lock();
        let stream = streams.get_or_insert_mut(seq, Stream::default);
        let in_order = stream.next > 0 && last.end + NEAR > stream.next && last.start < stream.next + NEAR;
        stream.window = if in_order { (2 * stream.window).min(WINDOW_MAX) } else { WINDOW_MIN };
        if let Some(size) = stream.size {
            last.end = last.end.max((last.start + stream.window).min(size));
        }
        stream.next = last.end;
        stream.size.is_none()
    }

    /// The size of a segment, as the store said.
    pub fn learned(&self, seq: Seq, size: u64) {
        self.0.lock().get_or_insert_mut(seq, Stream::default).size = Some(size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn a_walk_takes_ever_more_along_and_a_random_reader_little() {
        let ahead = ReadAhead::new();
        let size = 16 << 20;
        assert!(ahead.extend(Seq(1), &mut [0..4096]), "the size is asked for");
        ahead.learned(Seq(1), size);
        let (mut at, mut requests) = (4096, 0);
        while at < size {
            let mut planned = [at..(at + 4096).min(size)];
            assert!(!ahead.extend(Seq(1), &mut planned));
            assert!(planned[0].end <= size);
            at = planned[0].end;
            requests += 1;
        }
        assert!(requests <= 10, "{requests} requests for 16 MiB");
        for at in [9 << 20, 1 << 20, 12 << 20, 3 << 20] {
            let mut planned = [at..at + 4096];
            ahead.extend(Seq(1), &mut planned);
            assert_eq!(planned[0], at..at + WINDOW_MIN);
        }
        let mut large = [0..SMALL + 1];
        ahead.extend(Seq(1), &mut large);
        assert_eq!(large[0], 0..SMALL + 1);
    }
}
