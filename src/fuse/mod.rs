//! The kernel's side: requests and replies, mount(2), the mount table. No file-system logic; the only user of
//! `fuser`.
//! Invariant: nothing here waits on the dispatch thread, and nothing below here knows that there is a kernel.

pub mod adapter;
mod convert;
pub mod mount;
mod pace;
mod reply;
pub mod serve;
pub mod table;
