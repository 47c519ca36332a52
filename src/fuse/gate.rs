//! The gate in front of all requests, and what a request is called in the log.
//! Invariant: whoever changes something passes the gate and stays inside until the kernel has the answer. So once it
//! is closed, every request that took effect has been answered, and every other one can be asked again.

use parking_lot::{RwLock, RwLockReadGuard};
use std::cell::Cell;
use std::fmt;
use tokio::sync::watch;

/// Open while requests are served; closed for good when the connection is handed over.
pub struct Gate {
    open: RwLock<bool>,
    closed: watch::Sender<bool>,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate { open: RwLock::new(true), closed: watch::Sender::new(false) }
    }

    /// Lets a request in until the pass is dropped; none when the gate is closed. Nobody waits while holding one.
    pub(super) fn enter(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.open.read()).filter(|open| **open)
    }

    /// Returns when everybody has left who is inside now.
    pub(super) fn pass_by(&self) {
        drop(self.open.write());
    }

    /// Returns when nobody is inside any more, and nobody comes in.
    pub fn close(&self) {
        *self.open.write() = false;
        self.closed.send_replace(true);
    }

    /// Returns when the gate is closed.
    pub(super) async fn closed(&self) {
        // An error would mean that the gate is gone, and with it who asks.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }
}

/// As much of a name as the log shows, in bytes.
const NAME_SHOWN: usize = 48;

/// A request as the log names it: operation, inode, name. Never what it carries.
#[derive(Clone, Copy)]
pub(super) struct What {
    /// The operation.
    pub op: &'static str,
    ino: u64,
    name: [u8; NAME_SHOWN],
    /// Of the whole name; 0 where there is none.
    len: usize,
}

thread_local! {
    /// The request that this thread is at.
    static CURRENT: Cell<What> = const { Cell::new(What { op: "", ino: 0, name: [0; NAME_SHOWN], len: 0 }) };
}

impl What {
    pub fn new(op: &'static str, ino: u64, name: &[u8]) -> What {
        let mut what = What { op, ino, name: [0; NAME_SHOWN], len: name.len() };
        let shown = name.len().min(NAME_SHOWN);
        what.name[..shown].copy_from_slice(&name[..shown]);
        what
    }

    /// Notes that this thread is at this request.
    pub fn enter(self) {
        CURRENT.set(self);
    }

    /// The request that this thread is at, or, away from the dispatch thread, just the operation.
    pub fn current(op: &'static str) -> What {
        let what = CURRENT.get();
        if what.op.is_empty() { What::new(op, 0, b"") } else { what }
    }
}

impl What {
    /// Without the name, for those who may not see the directory.
    pub fn in_public(&self) -> String {
        match self.ino {
            0 => self.op.to_string(),
            ino => format!("{} at inode {ino}", self.op),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.in_public())?;
        if self.len > 0 {
            let cut = if self.len > NAME_SHOWN { "..." } else { "" };
            write!(f, ", name '{}{cut}'", self.name[..self.len.min(NAME_SHOWN)].escape_ascii())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_without_what_it_carries() {
        assert_eq!(What::new("write", 7, b"").to_string(), "write at inode 7");
        assert_eq!(What::new("create", 1, b"a\nb").to_string(), "create at inode 1, name 'a\\nb'");
        let long = What::new("mkdir", 1, &[b'x'; 255]).to_string();
        assert!(long.ends_with("xxx...'") && long.len() < 100, "{long}");
    }

    #[test]
    fn a_closed_gate_lets_nobody_in_and_waits_for_who_is_inside() {
        let gate = std::sync::Arc::new(Gate::new());
        let inside = gate.enter().expect("open");
        let closing = std::thread::spawn({
            let gate = gate.clone();
            move || gate.close()
        });
        std::thread::park_timeout(std::time::Duration::from_millis(50));
        assert!(!closing.is_finished(), "somebody is inside");
        drop(inside);
        closing.join().expect("no panic");
        assert!(gate.enter().is_none());
    }
}
