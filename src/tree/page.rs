//! One page of the tree: its bytes, read where they lie, and the buffer that new pages are made in.
//! Invariant: a page is never empty and its keys ascend strictly. [`Page::parse`] looks only at the header, for it is
//! on the way of every lookup; every access checks its own bounds, and [`Page::verify`] checks all of a page before
//! its entries go into another one.

use super::codec::{PTR_LEN, Reader};
use crate::log::{Error, Result};
use crate::types::FramePtr;
use bytes::Bytes;
use std::ops::Range;

const VERSION: u8 = 1;

/// Version, level, two bytes of zero, count.
const HEADER_LEN: usize = 8;
/// An entry in the table of offsets.
const SLOT_LEN: usize = 4;
/// Key length and value length.
const ENTRY_HEADER_LEN: usize = 6;

/// No tree is higher; a page that says so is damaged.
pub(super) const LEVEL_MAX: u8 = 40;

/// A page, as a view on the plain bytes of its frame.
#[derive(Clone)]
pub struct Page {
    bytes: Bytes,
    at: FramePtr,
    level: u8,
    count: usize,
}

impl Page {
    /// The page in the frame `at` whose plain bytes these are.
    pub fn parse(bytes: Bytes, at: FramePtr) -> Result<Page> {
        let header = bytes.first_chunk::<HEADER_LEN>();
        let Some([VERSION, level, 0, 0, count @ ..]) = header else {
            return Err(damaged(at, "no page header of a format version that this program knows"));
        };
        let (level, count) = (*level, u32::from_le_bytes(*count) as usize);
        if level > LEVEL_MAX
            || count == 0
            || count > (bytes.len() - HEADER_LEN) / (SLOT_LEN + ENTRY_HEADER_LEN)
        {
            return Err(damaged(at, format!("a page of level {level} with {count} entries")));
        }
        Ok(Page { bytes, at, level, count })
    }

    /// 0 for a leaf, whose values are those of the tree; else the values are pointers to pages one level below, and
    /// each key is not greater than any key below it.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// How many entries there are, at least one.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The key of entry `i`.
    pub fn key(&self, i: usize) -> Result<&[u8]> {
        Ok(self.entry(i)?.0)
    }

    /// The key and the value of entry `i`.
    pub fn entry(&self, i: usize) -> Result<(&[u8], &[u8])> {
        self.entry_if_there(i).ok_or_else(|| damaged(self.at, format!("entry {i} is not within the page")))
    }

    /// The value of entry `i`, sharing the page's bytes.
    pub fn value(&self, i: usize) -> Result<Bytes> {
        Ok(self.bytes.slice_ref(self.entry(i)?.1))
    }

    /// The page that entry `i` points to.
    pub fn child(&self, i: usize) -> Result<FramePtr> {
        let (_, value) = self.entry(i)?;
        if self.level == 0 || value.len() != PTR_LEN {
            return Err(damaged(self.at, format!("entry {i} does not point to a page")));
        }
        // Its name is made only for an error: this is on the way of every lookup.
        Reader::new(value, "entry").ptr().map_err(|e| damaged(self.at, format!("entry {i}: {e}")))
    }

    /// The entry with `key` (`Ok`), or the place where it would be (`Err`).
    pub fn search(&self, key: &[u8]) -> Result<std::result::Result<usize, usize>> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            match self.key(middle)?.cmp(key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(Ok(middle)),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    /// The entry of an inner page below which `key` is if it is anywhere.
    pub fn child_of(&self, key: &[u8]) -> Result<Option<usize>> {
        Ok(match self.search(key)? {
            Ok(i) => Some(i),
            Err(i) => i.checked_sub(1),
        })
    }

    /// Checks everything that one page can be asked alone.
    pub fn verify(&self) -> Result<()> {
        let mut end = HEADER_LEN + SLOT_LEN * self.count;
        let mut last: &[u8] = &[];
        for i in 0..self.count {
            let (key, value) = self.entry(i)?;
            if self.slot(i) != Some(end) || key <= last || (self.level > 0 && value.len() != PTR_LEN) {
                return Err(damaged(self.at, format!("entry {i} is out of its place or order")));
            }
            end += ENTRY_HEADER_LEN + key.len() + value.len();
            last = key;
        }
        if end == self.bytes.len() { Ok(()) } else { Err(damaged(self.at, "bytes after the last entry")) }
    }

    fn slot(&self, i: usize) -> Option<usize> {
        let slot = self.bytes.get(HEADER_LEN..)?.get(SLOT_LEN * i..)?.first_chunk()?;
        Some(u32::from_le_bytes(*slot) as usize)
    }

    fn entry_if_there(&self, i: usize) -> Option<(&[u8], &[u8])> {
        if i >= self.count {
            return None;
        }
        let ([k0, k1, v0, v1, v2, v3], rest) = self.bytes.get(self.slot(i)?..)?.split_first_chunk()?;
        let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([*k0, *k1])))?;
        Some((key, rest.get(..u32::from_le_bytes([*v0, *v1, *v2, *v3]) as usize)?))
    }
}

pub(super) fn damaged(at: FramePtr, detail: impl ToString) -> Error {
    Error::corrupt(name_of(at), detail)
}

fn name_of(at: FramePtr) -> String {
    format!("tree page {at:?}")
}

/// Entries in order, on their way into pages.
#[derive(Default, Debug)]
pub struct Run {
    body: Vec<u8>,
    starts: Vec<u32>,
}

impl Run {
    /// Bytes that an entry takes in a page.
    pub fn entry_len(key: &[u8], value: &[u8]) -> usize {
        SLOT_LEN + ENTRY_HEADER_LEN + key.len() + value.len()
    }

    /// Appends an entry, which must be greater than all before it.
    pub fn push(&mut self, key: &[u8], value: &[u8]) {
        let key_len = u16::try_from(key.len()).expect("a key is a number and a name, names are short");
        let value_len = u32::try_from(value.len()).expect("a value is far below 4 GiB");
        self.starts.push(u32::try_from(self.body.len()).expect("a page and a value are far below 4 GiB"));
        self.body.extend_from_slice(&key_len.to_le_bytes());
        self.body.extend_from_slice(&value_len.to_le_bytes());
        self.body.extend_from_slice(key);
        self.body.extend_from_slice(value);
    }

    /// Moves all entries of `other`, which follow those here, to the end.
    pub fn append(&mut self, other: &mut Run) {
        let shift = self.body.len() as u32;
        self.starts.extend(other.starts.drain(..).map(|start| start + shift));
        self.body.append(&mut other.body);
    }

    /// The key of the last entry.
    pub fn last_key(&self) -> Option<&[u8]> {
        self.count().checked_sub(1).map(|i| self.entry(i).0)
    }

    /// Number of entries.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// True when there are no entries.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Length of a page of all entries.
    pub fn page_len(&self) -> usize {
        HEADER_LEN + SLOT_LEN * self.starts.len() + self.body.len()
    }

    /// Forgets the entries and keeps the room.
    pub fn clear(&mut self) {
        self.starts.clear();
        self.body.clear();
    }

    /// The key and the value of entry `i`.
    pub fn entry(&self, i: usize) -> (&[u8], &[u8]) {
        let entry = &self.body[self.start(i)..self.start(i + 1)];
        let key_end = ENTRY_HEADER_LEN + usize::from(u16::from_le_bytes([entry[0], entry[1]]));
        (&entry[ENTRY_HEADER_LEN..key_end], &entry[key_end..])
    }

    /// Where to cut so that both sides are about equally long: the number of entries of the first side.
    pub fn middle(&self) -> usize {
        let half = self.body.len() / 2;
        let cut = self.starts.partition_point(|start| (*start as usize) < half);
        // The entry that lies across the middle goes to the side that it makes less uneven.
        let before = cut.saturating_sub(1);
        let closer =
            if self.start(before).abs_diff(half) < self.start(cut).abs_diff(half) { before } else { cut };
        closer.clamp(1, self.count().max(2) - 1)
    }

    /// Writes the page of `entries` into `out`, in place of what is there.
    pub fn encode(&self, level: u8, entries: Range<usize>, out: &mut Vec<u8>) {
        let first = self.start(entries.start);
        let body = &self.body[first..self.start(entries.end)];
        let table_end = HEADER_LEN + SLOT_LEN * entries.len();
        out.clear();
        out.reserve(table_end + body.len());
        out.extend_from_slice(&[VERSION, level, 0, 0]);
        out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
        for start in &self.starts[entries] {
            out.extend_from_slice(&((*start as usize - first + table_end) as u32).to_le_bytes());
        }
        out.extend_from_slice(body);
    }

    fn start(&self, i: usize) -> usize {
        self.starts.get(i).map_or(self.body.len(), |start| *start as usize)
    }
}
