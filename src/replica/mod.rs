//! What leads the copy in the embassy after the log at home: the uploader, and the account of what is durable where.
//! Invariant: the remote log is a prefix of the local one, and nobody is told that a commit is durable before it is.

pub mod audit;
pub mod divergent;
pub mod durable;
mod figures;
pub mod follow;
mod handover;
mod held;
mod hold;
mod io;
pub mod listing;
mod opening;
mod orphans;
mod past;
mod predecessor;
pub mod promote;
mod proof;
pub mod receipt;
mod space;
mod trust;
pub mod uploader;
pub mod views;
pub mod volume;

pub use opening::{Version, context_of};
pub use predecessor::Predecessor;
pub use trust::{Trust, parse_head};

pub use io::Io;

/// A fuzz target: a pin that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz_pin(bytes: &[u8]) {
    let _ = trust::parse_pin(bytes);
}

pub use durable::{Durable, Position, Protection, Snapshot, WaitError};
pub use uploader::{Upload, Uploader};
