//! The kernel's control files for a FUSE connection (fusectl, below `/sys/fs/fuse/connections`).
//! Invariant: what was opened belongs to one connection for ever. The kernel names the files' directory by the device
//! number of the file system, and gives that number to the next one as soon as it is free; so the directory is opened
//! while the number is surely the one that is meant, and the files are reached through its descriptor only.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// The control files of one connection.
#[derive(Debug)]
pub struct ControlFiles {
    directory: File,
}

impl ControlFiles {
    /// Of the FUSE file system that has this minor device number now. An error where fusectl is not mounted.
    pub fn open(minor: u32) -> io::Result<ControlFiles> {
        Ok(ControlFiles { directory: File::open(format!("/sys/fs/fuse/connections/{minor}"))? })
    }

    fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()))
    }

    /// Whether the file system is unmounted wherever it was: then the kernel has taken the files away.
    pub fn is_gone(&self) -> bool {
        std::fs::metadata(self.file("abort")).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    }

    /// Breaks the connection, so that everybody who waits for its daemon gets an error; nothing happens when it is gone.
    pub fn abort(&self) -> io::Result<()> {
        match OpenOptions::new().write(true).open(self.file("abort")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            file => file?.write_all(b"1"),
        }
    }
}
