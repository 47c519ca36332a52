//! The tree of a volume: an ordered map of byte keys to values, as a copy-on-write B+tree in the log, with the
//! changes since the last checkpoint in memory above it.
//! Invariant: a root refers only to frames in segments at or before its own; nothing here changes a page in place.
