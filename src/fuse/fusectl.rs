//! The kernel's control files for FUSE connections (fusectl, below `/sys/fs/fuse/connections`): breaking one.
//! Invariant: never another connection than the one that was meant. The kernel names them by the device number of the
//! file system, and gives a number away again as soon as its file system is gone; the inode number of the control file
//! is the connection's own.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A way to break one connection, and no other, as long as fusectl stays mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    minor: u32,
    inode: u64,
}

fn path(minor: u32) -> PathBuf {
    PathBuf::from(format!("/sys/fs/fuse/connections/{minor}/abort"))
}

impl Breaker {
    /// The connection of the FUSE file system that has this minor device number now.
    pub fn of(minor: u32) -> io::Result<Breaker> {
        Ok(Breaker { minor, inode: std::fs::metadata(path(minor))?.ino() })
    }

    /// Breaks it, so that everybody who waits for its daemon gets an error. `NotFound` when it is gone.
    pub fn abort(&self) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path(self.minor))?;
        self.abort_by(file)
    }

    fn abort_by(&self, mut file: File) -> io::Result<()> {
        if file.metadata()?.ino() != self.inode {
            let text = format!("connection {} is another one by now", self.minor);
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        file.write_all(b"1")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_connection_that_was_meant_is_broken() {
        let mut was = tempfile::NamedTempFile::new().expect("temporary file");
        let other = tempfile::NamedTempFile::new().expect("temporary file");
        let inode = was.as_file().metadata().expect("it exists").ino();
        let meant = Breaker { minor: 7, inode };
        let reopened = |file: &tempfile::NamedTempFile| file.reopen().expect("it exists");
        let refused = meant.abort_by(reopened(&other)).expect_err("not the one");
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        assert_eq!(other.as_file().metadata().expect("it exists").len(), 0);
        meant.abort_by(reopened(&was)).expect("the one");
        let mut text = String::new();
        io::Read::read_to_string(&mut was, &mut text).expect("readable");
        assert_eq!(text, "1");
    }
}
