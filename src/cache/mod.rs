//! What this host keeps close: opened frames in memory, and the index of the segment ranges cached on disk.
//! Invariant: everything here can be thrown away; it costs time, never data. Nothing here is trusted: what is read
//! from a cached range is authenticated like anything else.

pub mod frames;
pub mod ranges;
