//! The tree of a volume: an ordered map of byte keys to values, as a copy-on-write B+tree in the log, with the
//! changes since the last checkpoint in memory above it.
//! Invariant: a root refers only to frames in segments at or before its own; nothing here changes a page in place.
//! The bytes are described in `docs/format.md` and nowhere else.

pub mod btree;
pub mod checkpoint;
mod codec;
pub mod delta;
pub mod diff;
pub mod key;
pub mod memtable;
mod merge;
pub mod page;
pub mod value;

#[cfg(test)]
mod tests;

pub use btree::{Cursor, Tree};
pub use delta::{Counters, Delta, Value};
pub use diff::{Changed, Diff};
pub use key::{Key, KeyRange};
pub use memtable::Levels;
pub use merge::{MergeOutcome, Source};
