//! The changes of commits: the map that holds them in memory, and the bytes of one commit in DELTA frames.
//! Invariant: the keys of a commit are written and read in strictly ascending order; the frame's own header (commit
//! number, time, part number) belongs to the log.

use super::codec::Reader;
use super::key::Key;
use crate::log::Result;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A value as it is stored; see [`super::value`].
pub type Value = Arc<[u8]>;

/// Changed keys with their new values; `None` is a deletion.
pub type Delta = BTreeMap<Key, Option<Value>>;

/// One entry of a [`Delta`].
pub type Change = (Key, Option<Value>);

const VERSION: u8 = 1;

/// A part is closed before it would grow beyond this; one larger entry gets a part of its own.
pub const PART_BYTES_MAX: usize = 1 << 20;

/// In place of a value's length: the key is deleted.
const DELETED: u32 = u32::MAX;

const HEADER_LEN: usize = 1 + COUNTERS_LEN + 4;
const ENTRY_HEADER_LEN: usize = 6;
pub(super) const COUNTERS_LEN: usize = 24;

/// Facts about the whole volume that every commit carries, so that nobody must count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Number of the next inode to be created.
    pub next_ino: u64,
    /// Bytes of file contents that can be read (holes do not count).
    pub live_bytes: u64,
    /// Inodes there are.
    pub inodes: u64,
}

impl Counters {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        for number in [self.next_ino, self.live_bytes, self.inodes] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }

    pub(super) fn take(r: &mut Reader<'_>) -> Result<Counters> {
        Ok(Counters { next_ino: r.number()?, live_bytes: r.number()?, inodes: r.number()? })
    }
}

/// The bodies of the DELTA frames of one commit: at least one. The changes must come in the order of their keys.
pub fn encode<'a>(
    counters: &Counters,
    changes: impl IntoIterator<Item = (&'a Key, &'a Option<Value>)>,
) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut part = Part::new(counters);
    for (key, value) in changes {
        let len = ENTRY_HEADER_LEN + key.len() + value.as_ref().map_or(0, |v| v.len());
        if part.count > 0 && part.bytes.len() + len > PART_BYTES_MAX {
            parts.push(std::mem::replace(&mut part, Part::new(counters)).finish());
        }
        part.push(key, value.as_deref());
    }
    parts.push(part.finish());
    parts
}

struct Part {
    bytes: Vec<u8>,
    count: u32,
}

impl Part {
    fn new(counters: &Counters) -> Part {
        let mut bytes = Vec::with_capacity(4096);
        bytes.push(VERSION);
        counters.put(&mut bytes);
        bytes.extend_from_slice(&[0; 4]); // the count, when it is known
        Part { bytes, count: 0 }
    }

    fn push(&mut self, key: &[u8], value: Option<&[u8]>) {
        let key_len = u16::try_from(key.len()).expect("a key is a number and a name, names are short");
        let value_len = match value {
            Some(value) => u32::try_from(value.len()).ok().filter(|n| *n != DELETED),
            None => Some(DELETED),
        };
        let value_len = value_len.expect("a value is far below 4 GiB");
        self.bytes.extend_from_slice(&key_len.to_le_bytes());
        self.bytes.extend_from_slice(&value_len.to_le_bytes());
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value.unwrap_or_default());
        self.count += 1;
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&self.count.to_le_bytes());
        self.bytes
    }
}

/// The commit in the bodies of all its DELTA frames, its changes in the order of their keys.
pub fn decode(parts: &[impl AsRef<[u8]>]) -> Result<(Counters, Vec<Change>)> {
    let mut changes: Vec<Change> = Vec::new();
    let mut counters = None;
    for part in parts {
        let mut r = Reader::versioned(part.as_ref(), "delta", VERSION)?;
        let own = Counters::take(&mut r)?;
        if *counters.get_or_insert(own) != own {
            return Err(r.bad("its parts are of different commits"));
        }
        let count = r.u32()? as usize;
        // A count is not believed before the entries are there.
        changes.reserve(count.min(r.left() / ENTRY_HEADER_LEN));
        for _ in 0..count {
            let (key_len, value_len) = (r.u16()?, r.u32()?);
            let key = r.take(usize::from(key_len))?;
            let value = if value_len == DELETED { None } else { Some(r.take(value_len as usize)?) };
            if key.is_empty() || changes.last().is_some_and(|(last, _)| last.as_slice() >= key) {
                return Err(r.bad("its keys are not in order"));
            }
            changes.push((key.to_vec(), value.map(Value::from)));
        }
        r.finish()?;
    }
    match counters {
        Some(counters) => Ok((counters, changes)),
        None => Err(crate::log::Error::corrupt("delta", "a commit without parts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(n: u64, value_len: usize) -> Delta {
        let change = |i: u64| {
            let value = (!i.is_multiple_of(3)).then(|| Value::from(vec![i as u8; value_len]));
            (i.to_be_bytes().to_vec(), value)
        };
        (0..n).map(change).collect()
    }

    #[test]
    fn a_commit_round_trips_in_parts_of_bounded_size() {
        let counters = Counters { next_ino: 9, live_bytes: 1 << 40, inodes: 7 };
        for (n, value_len, parts) in [(0, 0, 1), (1000, 10, 1), (3000, 1000, 2), (10, 2 << 20, 10)] {
            let changes = changes(n, value_len);
            let encoded = encode(&counters, &changes);
            assert_eq!(encoded.len(), parts);
            assert!(value_len > PART_BYTES_MAX || encoded.iter().all(|p| p.len() <= PART_BYTES_MAX));
            let (found, decoded) = decode(&encoded).unwrap();
            assert_eq!(found, counters);
            assert!(decoded.into_iter().eq(changes));
        }
    }

    #[test]
    fn parts_out_of_order_or_missing_altogether_are_refused() {
        let mut parts = encode(&Counters::default(), &changes(3000, 1000));
        parts.reverse();
        assert!(decode(&parts).is_err());
        assert!(decode(&[] as &[Vec<u8>]).is_err());
    }
}
