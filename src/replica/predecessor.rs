//! What a process that goes on with the connection to the kernel, and with the state directory, learns from the one
//! before it, so that it asks the store for nothing and frees no inode that is still open.
//! Invariant: it holds nothing that recovery needs; a successor that knows less is slower, or keeps an inode longer.

use super::durable::{Durable, Position};
use super::opening::Opened;
use crate::fs::Fs;
use crate::log::{ClosedSegment, Error, Result};
use crate::types::{CommitNo, Head};
use std::sync::Arc;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Predecessor {
    /// What the kernel holds, see [`Fs::held`].
    pub held: Vec<u8>,
    /// Newest commit that the store held.
    pub remote: CommitNo,
    /// The newest segment that the store held with all before it.
    pub remote_head: Option<Head>,
    /// The level had fallen back to the local disk.
    pub fallen_back: bool,
}

impl Predecessor {
    pub(super) fn of(fs: &Fs, durable: Option<&Arc<Durable>>) -> Predecessor {
        let held = fs.held();
        match durable.map(|durable| durable.snapshot()) {
            Some(account) => Predecessor {
                held,
                remote: account.remote,
                remote_head: account.remote_head,
                fallen_back: !account.in_sync,
            },
            None => Predecessor { held, ..Predecessor::default() },
        }
    }

    /// Which of the local segments the store has, and which it has not.
    pub(super) fn split_sent(&self, opened: &Opened) -> (Vec<ClosedSegment>, Vec<ClosedSegment>) {
        let local = opened.recovered.local.clone();
        local
            .into_iter()
            .partition(|segment| self.remote_head.is_some_and(|head| segment.head.seq <= head.seq))
    }

    /// The account may know more than the segments that are still here.
    pub(super) fn position(&self, at: Position) -> Position {
        let remote = at.remote.max(self.remote).min(at.local);
        Position { remote, remote_head: at.remote_head.or(self.remote_head), ..at }
    }

    pub(super) fn hand_on(&self, fs: &Fs, durable: &Durable) -> Result<()> {
        if !fs.take_held(&self.held) {
            return Err(Error::Refused("the account of what the kernel holds cannot be read".into()));
        }
        durable.take_over(self.fallen_back);
        Ok(())
    }
}
