//! What the operator does with a volume as a whole: make it, ask how it is, tell its daemon what to do.
//! Invariant: nothing here prints or knows the command line; every operation returns a report or an error that says
//! what was done, what was not, and the way out.

pub mod changes;
pub mod control;
pub mod drill;
pub mod init;
pub mod manifest;
pub mod metrics;
pub mod names;
pub mod newfile;
pub mod place;
pub mod protection;
pub mod reader;
pub mod receipt;
pub mod requests;
pub mod restore;
pub mod signed;
pub mod status;
pub mod treecheck;
pub mod walk;
