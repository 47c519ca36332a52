//! Frames that are sealed in blocks: where the blocks of one lie. A little of a large record can then be read and
//! opened without the rest. No I/O, no sealing.
//! Invariant: a frame's length says where each of its blocks lies; whether it is one in blocks at all only its prefix
//! says, or a block that opens.

use super::frame::PREFIX_LEN;
use crate::crypto::seal::TAG_LEN;
use std::ops::Range;

/// Plain bytes that are sealed together; the last block of a frame may have fewer. A page of PostgreSQL.
pub const BLOCK_LEN: usize = 8 << 10;
const SEALED_LEN: usize = BLOCK_LEN + TAG_LEN;

/// The blocks of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    plain: usize,
}

impl Layout {
    /// Of a frame of `sealed` bytes, its prefix among them, if one in blocks can be so long. There are at least two.
    pub fn of(sealed: usize) -> Option<Layout> {
        let body = sealed.checked_sub(PREFIX_LEN)?;
        let plain = body.checked_sub(body.div_ceil(SEALED_LEN) * TAG_LEN)?;
        let layout = Layout { plain };
        (plain > BLOCK_LEN && sealed_len(plain) == sealed).then_some(layout)
    }

    /// Plain bytes of the whole frame.
    pub fn plain_len(&self) -> usize {
        self.plain
    }

    /// All blocks.
    pub fn all(&self) -> Range<usize> {
        0..self.plain.div_ceil(BLOCK_LEN)
    }

    /// The blocks that hold `range` of the plain bytes, which must lie within them.
    pub fn holding(&self, range: &Range<usize>) -> Range<usize> {
        range.start / BLOCK_LEN..range.end.div_ceil(BLOCK_LEN)
    }

    /// Where `blocks` lie in the frame.
    pub fn sealed(&self, blocks: &Range<usize>) -> Range<usize> {
        let end = PREFIX_LEN + blocks.end * SEALED_LEN;
        PREFIX_LEN + blocks.start * SEALED_LEN..end.min(sealed_len(self.plain))
    }

    /// Which plain bytes `blocks` hold.
    pub fn plain(&self, blocks: &Range<usize>) -> Range<usize> {
        blocks.start * BLOCK_LEN..(blocks.end * BLOCK_LEN).min(self.plain)
    }
}

/// Length of a frame of `plain` bytes in blocks. No frame of so many plain bytes is longer.
pub const fn sealed_len(plain: usize) -> usize {
    let blocks = plain.div_ceil(BLOCK_LEN);
    PREFIX_LEN + plain + TAG_LEN * if blocks == 0 { 1 } else { blocks }
}

/// The blocks of sealed bytes, each without its tag, and the tags.
pub fn split(sealed: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    sealed.chunks(SEALED_LEN).map(|block| block.split_at(block.len().saturating_sub(TAG_LEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_tells_where_the_blocks_are() {
        for plain in [BLOCK_LEN + 1, 2 * BLOCK_LEN, 2 * BLOCK_LEN + 1, 131_071, 131_072, 16 << 20] {
            let layout = Layout::of(sealed_len(plain)).unwrap();
            assert_eq!(layout.plain_len(), plain);
            assert_eq!(layout.sealed(&layout.all()), PREFIX_LEN..sealed_len(plain));
            assert_eq!(layout.plain(&layout.all()), 0..plain);
            let tail = plain - 1..plain;
            let last = layout.holding(&tail);
            assert_eq!(last.len(), 1);
            assert!(layout.plain(&last).start <= tail.start && layout.plain(&last).end == plain);
            assert_eq!(layout.sealed(&last).len(), layout.plain(&last).len() + TAG_LEN);
        }
        assert_eq!(Layout::of(131_336).map(|l| l.holding(&(8191..8193))), Some(0..2));
    }

    #[test]
    fn what_cannot_be_in_blocks_is_not() {
        for sealed in [0, 7, 24, PREFIX_LEN + BLOCK_LEN + TAG_LEN] {
            assert_eq!(Layout::of(sealed), None, "{sealed}");
        }
        // A last block of a tag and nothing.
        assert_eq!(Layout::of(PREFIX_LEN + 2 * SEALED_LEN + TAG_LEN), None);
        assert_eq!(Layout::of(PREFIX_LEN + 2 * SEALED_LEN + 3), None);
    }
}
