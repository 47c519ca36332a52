//! The kernel's side: requests and replies, mount(2), the mount table. No file-system logic. `adapter` is
//! all that knows `fuser`: another transport, or a later version, is a change there.
//! Invariant: nothing here waits on the dispatch thread, and nothing below here knows that there is a kernel.

pub mod adapter;
pub mod beneath;
pub mod connection;
pub mod control_dir;
pub mod fusectl;
pub mod gate;
pub mod identity;
pub mod mount;
mod pace;
pub mod pass;
pub mod past;
pub mod serve;
pub mod table;
