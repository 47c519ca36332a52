//! EmbassyFS: a file system whose every write goes through, sealed, to an object store abroad.
//!
//! The modules are layers; a module uses only what stands below it in this list (`tests/tidy.rs` checks it):
//!
//! | layer | room for |
//! |---|---|
//! | `cli` | one file per command; the only place that prints, and that knows clap |
//! | `fuse` | requests and replies, mount(2), invalidation; no file-system logic |
//! | `replica` | uploader, durable position, fencing |
//! | `ops` | status and the control channel |
//! | `fs` | the file system without a kernel |
//! | `tree` | keys, pages, memtable, checkpoints |
//! | `log` | segments, spool, reading, recovery |
//! | `cache` | opened frames, cached ranges |
//! | `store` | the bucket |
//! | `crypto` | keys, slots, sealing, signing, hashing |
//! | `clock`, `disk`, `types` | time, randomness, threads; files of the state directory; the shared vocabulary |

pub mod cache;
pub mod cli;
pub mod clock;
pub mod crypto;
pub mod disk;
pub mod fs;
pub mod fuse;
pub mod log;
pub mod ops;
pub mod replica;
pub mod store;
pub mod tree;
pub mod types;
