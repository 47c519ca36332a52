//! Versions of a volume to look into without a mount: several of them over one cache, so that what they share is
//! fetched once.
//! Invariant: nothing here changes the volume; a version is what a mount of it would show.

use super::opening;
use super::volume::OPEN_FILES;
use super::{Io, Version};
use crate::clock::Env;
use crate::crypto::keyfile::KeyFile;
use crate::log::reader::{FrameReader, ReaderLimits};
use crate::log::recovery::Role;
use crate::log::segment::VolumeContext;
use crate::log::statedir::StateDir;
use crate::log::volume::Superblock;
use crate::log::{self, Frames, Result};
use crate::store::Store;
use crate::tree::{Counters, Delta, Levels, Tree};
use crate::types::{CommitNo, FramePtr, Head, Timestamp};
use std::path::Path;
use std::sync::Arc;

/// Opened frames in memory, and copies on the local disk, in bytes.
const FRAME_CACHE: usize = 64 << 20;
const DISK_CACHE: u64 = 1 << 30;

/// Where the volume lies, and what opens it.
#[derive(Clone)]
pub struct Place {
    /// The store.
    pub store: Arc<dyn Store>,
    /// A reader's key.
    pub key: KeyFile,
    /// Time and randomness.
    pub env: Env,
}

/// Opened versions of a volume.
pub struct Views {
    /// What the volume is.
    pub superblock: Superblock,
    /// For the log below.
    pub ctx: Arc<VolumeContext>,
    /// The versions, in the order they were asked for.
    pub views: Vec<View>,
    reader: FrameReader,
    runtime: Io,
}

/// One version.
pub struct View {
    /// Its newest commit; 0 for a volume without any.
    pub commit: CommitNo,
    /// When that was made.
    pub time: Option<Timestamp>,
    /// The newest segment that was read for it.
    pub head: Option<Head>,
    /// The volume's counters as of it.
    pub counters: Counters,
    tree: Tree,
    changes: Delta,
}

impl Views {
    /// Opens `versions`, with `state` as the place for copies.
    pub fn open(place: Place, state: &Path, versions: &[Version], runtime: &Io) -> Result<Views> {
        let Place { store, key, env } = place;
        let dir = Arc::new(StateDir::open_on(env.disk.clone(), state)?);
        let (superblock, to_pin) = runtime.block_on(opening::superblock(Some(&*store), &dir, &key))?;
        let ctx = Arc::new(opening::context(&key, &superblock)?);
        let mut views = Vec::with_capacity(versions.len());
        for version in versions {
            let found = opening::recover(&ctx, &dir, &env, Some(&*store), Role::Reader, *version);
            let opened = runtime.block_on(found)?;
            let recovery = opened.recovery;
            views.push(View {
                commit: recovery.last_commit,
                time: opened.time,
                head: opened.recovered.head,
                counters: Counters {
                    next_ino: recovery.next_ino,
                    live_bytes: recovery.live_bytes,
                    inodes: recovery.inodes,
                },
                tree: recovery.tree,
                changes: recovery.replayed,
            });
        }
        if let Some(bytes) = to_pin {
            dir.write_atomic(log::volume::NAME, &bytes)?; // only a volume that could be opened is pinned
        }
        let limits = ReaderLimits {
            frame_cache_bytes: FRAME_CACHE,
            disk_cache_bytes: DISK_CACHE,
            open_files: OPEN_FILES,
        };
        let reader = FrameReader::new(dir, ctx.clone(), Some(store), env, limits)?;
        Ok(Views { superblock, ctx, views, reader, runtime: runtime.clone() })
    }

    /// Calls `look` with what a version holds.
    pub fn with<T>(&self, view: &View, look: impl FnOnce(&Levels<'_>) -> T) -> T {
        look(&Levels { maps: &[&view.changes], tree: &view.tree, frames: &self.reader })
    }

    /// Brings frames to this host.
    pub fn fetch(&self, ptrs: &[FramePtr]) -> Result<()> {
        self.runtime.block_on(self.reader.fetch(ptrs))
    }

    /// What is on this host.
    pub fn frames(&self) -> &dyn Frames {
        &self.reader
    }
}
