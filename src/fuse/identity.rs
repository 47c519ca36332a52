//! Which mount is which: one that was found once is told apart from all that come after it.
//! Invariant: path, mount number and device number are not enough for that, the kernel gives each to the next one as
//! soon as it is free. Where fusectl is mounted, the connection itself decides; else the volume's name helps.

use super::fusectl::ControlFiles;
use super::mount::{Unmount, unmount};
use super::table::{self, MountEntry};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// One mount of this program.
#[derive(Clone, Debug)]
pub struct MountIdentity {
    entry: MountEntry,
    /// None where fusectl was not mounted.
    control: Option<Arc<ControlFiles>>,
}

impl MountIdentity {
    /// Of the mount that the table has just shown.
    pub fn of(entry: MountEntry) -> MountIdentity {
        let control = ControlFiles::open(entry.device.1).ok().map(Arc::new);
        MountIdentity { entry, control }
    }

    /// Of the topmost mount at `path` (normalised), if it is one of this program.
    pub fn at(path: &Path) -> Option<MountIdentity> {
        table::find(path).ok().flatten().filter(MountEntry::is_ours).map(MountIdentity::of)
    }

    /// What the table showed.
    pub fn entry(&self) -> &MountEntry {
        &self.entry
    }

    /// Whether it is still the topmost mount at its place.
    pub fn is_there(&self) -> bool {
        let there = table::find(&self.entry.mount_point).ok().flatten();
        there.is_some_and(|entry| entry.id == self.entry.id && self.shows_same(&entry)) && !self.is_gone()
    }

    /// Whether its file system is surely unmounted everywhere.
    pub fn is_gone(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.is_gone())
    }

    /// The mounts among `all` that show the same file system, itself among them.
    pub fn shown_in(&self, all: Vec<MountEntry>) -> Vec<MountEntry> {
        all.into_iter().filter(|entry| self.shows_same(entry)).collect()
    }

    fn shows_same(&self, entry: &MountEntry) -> bool {
        entry.is_ours() && entry.device == self.entry.device && entry.source == self.entry.source
    }

    /// Takes it out of the tree if it is still there; who uses it goes on.
    pub fn detach(&self) -> io::Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        unmount(&self.entry.mount_point, Unmount::Lazy)
    }

    /// Breaks its connection, in the tree or not, so that everybody who waits for its daemon gets an error.
    pub fn abort(&self) -> io::Result<()> {
        match &self.control {
            Some(control) => control.abort(),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "the kernel's fusectl was not mounted")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_volume_with_the_same_numbers_is_another_mount() {
        let line = |source: &str, at: &str| {
            let text = format!("90 27 0:52 / {at} rw - fuse.embassyfs {source} rw,user_id=0");
            table::parse(text.as_bytes()).remove(0)
        };
        let land = MountIdentity { entry: line("embassyfs:land", "/srv/land"), control: None };
        let all = vec![
            line("embassyfs:land", "/srv/land"),
            line("embassyfs:taxes", "/srv/taxes"),
            line("embassyfs:land", "/srv/bound"),
        ];
        let places: Vec<_> = land.shown_in(all).into_iter().map(|entry| entry.mount_point).collect();
        assert_eq!(places, [Path::new("/srv/land"), Path::new("/srv/bound")]);
        assert!(!land.is_there(), "the table of this process does not show it");
    }
}
