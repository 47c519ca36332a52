//! Which ranges to ask for when several are wanted: neighbours travel together. No I/O.
//! Invariant: every wanted range lies whole within one of the planned ones.

use std::ops::Range;

/// Ranges with at most this many unwanted bytes between them are fetched as one: cheaper than another request.
pub(super) const GAP_MAX: u64 = 64 << 10;
/// One request asks for at most this many bytes, unless a single wanted range is longer.
pub(super) const REQUEST_MAX: u64 = 4 << 20;

/// Plans requests that cover `wanted`.
pub(super) fn coalesce(mut wanted: Vec<Range<u64>>) -> Vec<Range<u64>> {
    wanted.sort_unstable_by_key(|range| (range.start, range.end));
    let mut planned: Vec<Range<u64>> = Vec::new();
    for range in wanted {
        match planned.last_mut() {
            Some(last)
                if range.end <= last.end
                    || (range.start <= last.end + GAP_MAX && range.end - last.start <= REQUEST_MAX) =>
            {
                last.end = last.end.max(range.end);
            }
            _ => planned.push(range),
        }
    }
    planned
}

/// The bytes `range` out of pieces that begin at the given offsets, if one of them holds it.
pub(super) fn cut(pieces: &[(u64, bytes::Bytes)], range: &Range<u64>) -> Option<bytes::Bytes> {
    pieces.iter().find_map(|(start, piece)| {
        let from = usize::try_from(range.start.checked_sub(*start)?).ok()?;
        let to = usize::try_from(range.end.checked_sub(*start)?).ok()?;
        (from <= to && to <= piece.len()).then(|| piece.slice(from..to))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn neighbours_travel_together_up_to_the_gap_and_the_size() {
        assert_eq!(coalesce(vec![100..200, 0..96, 150..160]), [0..200]);
        assert_eq!(coalesce(vec![0..10, GAP_MAX + 10..GAP_MAX + 20]), [0..GAP_MAX + 20]);
        assert_eq!(coalesce(vec![0..10, GAP_MAX + 11..GAP_MAX + 20]).len(), 2);
        assert_eq!(coalesce(vec![0..REQUEST_MAX, REQUEST_MAX..REQUEST_MAX + 1]).len(), 2);
        assert_eq!(coalesce(vec![0..3 * REQUEST_MAX]), [0..3 * REQUEST_MAX]);
    }
}
