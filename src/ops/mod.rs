//! Operations on a running or stored volume: its status, and the control channel of its daemon.
//! Invariant: nothing here prints; what it finds out, it returns.

pub mod control;
pub mod status;
