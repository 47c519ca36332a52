//! The kernel's side: mount(2) and the mount table.
//! Invariant: no file-system logic here.

pub mod mount;
pub mod table;
