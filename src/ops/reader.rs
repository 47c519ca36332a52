//! A file system that is read without a kernel: by its core, fetching what is missing.
//! Invariant: what is read is what a mount of the same version shows; no symbolic link is followed.

use super::names::Fetch;
use crate::fs::{self, Attr, DirItem, Fs, Seek};
use crate::log::Error;
use crate::tree::value::{FileType, SPARSE};
use crate::types::{FramePtr, Ino};

/// Bytes of a file that are fetched together, and read at once.
const WINDOW: u64 = 16 << 20;
const PIECE: usize = 1 << 20;
/// Entries of a directory read at once.
const BATCH: usize = 512;

/// An extended attribute: its name and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// See the module.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// The file system.
    pub fs: &'a Fs,
    /// Brings frames to this host.
    pub fetch: Fetch<'a>,
}

impl Reader<'_> {
    /// Does `op`, fetching what it misses.
    pub fn run<T>(&self, mut op: impl FnMut(&Fs) -> fs::Result<T>) -> fs::Result<T> {
        loop {
            match op(self.fs) {
                Err(e) => match e.missing() {
                    Some(ptrs) => (self.fetch)(ptrs)?,
                    None => return Err(e),
                },
                done => return done,
            }
        }
    }

    /// What a plain path (see [`super::names::plain_path`]) leads to.
    pub fn find(&self, path: &[u8]) -> fs::Result<Attr> {
        let mut at = self.run(|fs| fs.getattr(Ino::ROOT))?;
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
            if at.inode.kind() != FileType::Directory {
                return Err(fs::Error::Os(libc::ENOTDIR));
            }
            at = self.run(|fs| fs.lookup(at.ino, name))?;
        }
        Ok(at)
    }

    /// The next entries of a directory behind `cookie` (0: from the first), with their attributes; none at its end.
    pub fn entries(&self, dir: Ino, cookie: u64) -> fs::Result<Vec<(DirItem, Attr)>> {
        self.run(|fs| fs.readdir_plus(dir, cookie.max(2), BATCH))
    }

    /// The extended attributes of an inode, access control lists among them.
    pub fn xattrs(&self, ino: Ino) -> fs::Result<Vec<Xattr>> {
        let names = self.run(|fs| fs.listxattr(ino))?;
        let names = names.split(|b| *b == 0).filter(|name| !name.is_empty());
        names.map(|name| Ok((name.to_vec(), self.run(|fs| fs.getxattr(ino, name))?))).collect()
    }

    /// Fetches the beginnings of these files together: many small ones in few requests.
    pub fn prefetch(&self, files: impl Iterator<Item = Ino>) -> fs::Result<()> {
        let (mut wanted, mut bytes): (Vec<FramePtr>, u64) = (Vec::new(), 0);
        for ino in files {
            let frames = self.run(|fs| fs.frames_of(ino, 0..PIECE as u64))?;
            bytes += frames.iter().map(|ptr| u64::from(ptr.len)).sum::<u64>();
            wanted.extend(frames);
            if bytes > WINDOW / 4 {
                break;
            }
        }
        // What is damaged is met again, and told of, when its file is read.
        match (self.fetch)(&wanted) {
            Err(Error::Corrupt { .. }) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Gives `each` what a file holds, in order, without its holes: offset and bytes.
    pub fn data(&self, file: &Attr, each: &mut dyn FnMut(u64, &[u8]) -> fs::Result<()>) -> fs::Result<()> {
        let size = file.inode.size;
        let (mut at, mut fetched) = (0, 0);
        while at < size {
            let mut end = size;
            if file.inode.flags & SPARSE != 0 {
                at = match self.run(|fs| fs.seek(file.ino, at, Seek::Data)) {
                    Err(fs::Error::Os(libc::ENXIO)) => return Ok(()),
                    at => at?,
                };
                end = self.run(|fs| fs.seek(file.ino, at, Seek::Hole))?;
            }
            while at < end {
                if at >= fetched {
                    let window = at..end.min(at + WINDOW);
                    fetched = window.end;
                    (self.fetch)(&self.run(|fs| fs.frames_of(file.ino, window.clone()))?)?;
                }
                let len = (end - at).min(PIECE as u64) as usize;
                let bytes = self.run(|fs| fs.read(file.ino, at, len))?;
                if bytes.is_empty() {
                    return Err(Error::corrupt(format!("inode {}", file.ino.0), "ends early").into());
                }
                each(at, &bytes)?;
                at += bytes.len() as u64;
            }
        }
        Ok(())
    }
}
