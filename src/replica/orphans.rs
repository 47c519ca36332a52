//! Inodes that were unlinked but open when home went down.
//! Invariant: one that cannot be freed now stays an orphan in the log, and the next mount finds it again.

use super::io::Io;
use super::opening::Opened;
use crate::fs::Fs;
use crate::log::reader::FrameReader;
use crate::log::{Error, Result};
use crate::tree::key::{self, KeyRef};
use crate::types::Ino;
use std::time::Duration;

/// Inodes that were unlinked but open when home went down.
pub(super) async fn find(opened: &Opened, reader: &FrameReader, patience: Duration) -> Result<Vec<Ino>> {
    let maps = [&opened.recovery.replayed];
    let levels = crate::tree::Levels { maps: &maps, tree: &opened.recovery.tree, frames: reader };
    let range = key::orphans();
    loop {
        match levels.range(&range.start, &range.end, usize::MAX) {
            Err(Error::Missing(ptrs)) => {
                let why = match tokio::time::timeout(patience, reader.fetch(&ptrs)).await {
                    Ok(Err(Error::Store(e))) if e.may_pass() => e.to_string(),
                    Err(_) => "it does not answer".to_string(),
                    Ok(fetched) => {
                        fetched?;
                        continue;
                    }
                };
                ::log::warn!("inodes without names wait for a mount at which the store answers: {why}");
                return Ok(Vec::new());
            }
            found => {
                return Ok(found?
                    .iter()
                    .filter_map(|(key, _)| match key::parse(key) {
                        Some(KeyRef::Orphan(ino)) => Some(ino),
                        _ => None,
                    })
                    .collect());
            }
        }
    }
}

/// Frees an inode that was unlinked but open when home went down. If it cannot be freed now, it stays an orphan, and
/// the next mount tries again.
pub(super) fn free(fs: &Fs, ino: Ino, reader: &FrameReader, runtime: &Io) {
    loop {
        let error = match fs.release_orphan(ino) {
            Ok(()) => return,
            Err(e) => match e.missing() {
                Some(ptrs) => match runtime.block_on(reader.fetch(ptrs)) {
                    Ok(()) => continue,
                    Err(e) => e.to_string(),
                },
                None => e.to_string(),
            },
        };
        ::log::warn!("inode {}, unlinked but open when home went down, is not freed yet: {error}", ino.0);
        return;
    }
}
