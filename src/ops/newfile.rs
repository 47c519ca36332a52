//! A file that is there as a whole or not at all, and never over another.
//! Invariant: its name is taken when everything in it is on the disk. Until then the file has none, so that whatever ends
//! the program, SIGKILL included, leaves nothing; where the file system has no files without a name it has one beside, that
//! begins with a dot.

use crate::clock::Env;
use crate::types::hex;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// See the module.
pub struct NewFile {
    file: File,
    path: PathBuf,
    /// Its name until it is whole, where it needs one.
    part: Option<PathBuf>,
}

impl NewFile {
    /// Begins a file that is to be `path`, which nothing may have as its name.
    pub fn begin(path: &Path) -> io::Result<NewFile> {
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(exists());
        }
        let nameless = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(directory(path));
        match nameless {
            Ok(file) => Ok(NewFile { file, path: path.into(), part: None }),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(e),
            // The errors for "not here" differ between file systems; if it is another trouble, this one has it too.
            Err(_) => NewFile::begin_beside(path),
        }
    }

    fn begin_beside(path: &Path) -> io::Result<NewFile> {
        let Some(name) = path.file_name() else { return Err(ErrorKind::InvalidInput.into()) };
        let random: [u8; 4] = Env::system().random_bytes();
        let mut part = std::ffi::OsString::from(".");
        part.push(name);
        part.push(format!(".{}.part", hex(&random)));
        let part = path.with_file_name(part);
        let file = File::create_new(&part)?;
        Ok(NewFile { file, path: path.into(), part: Some(part) })
    }

    /// Gives it its name; durable when this returns.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let named = match &self.part {
            None => link(&format!("/proc/self/fd/{}", self.file.as_raw_fd()), &self.path),
            Some(part) => rename(part, &self.path),
        };
        named.map_err(|e| if e.kind() == ErrorKind::AlreadyExists { exists() } else { e })?;
        self.part = None;
        File::open(directory(&self.path))?.sync_all()
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            let _ = std::fs::remove_file(part); // the error that left it unfinished is the one to tell
        }
    }
}

fn exists() -> io::Error {
    let what =
        "a file of this name exists already, and none is written over: move it away, or choose another name";
    io::Error::new(ErrorKind::AlreadyExists, what)
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the file that a link of /proc leads to a name.
fn link(from: &str, to: &Path) -> io::Result<()> {
    let (from, to) = (CString::new(from)?, CString::new(to.as_os_str().as_bytes())?);
    let here = libc::AT_FDCWD;
    // SAFETY: both are strings that end with a zero and outlive the call.
    checked(unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
}

/// Renames without writing over anything; where the file system cannot, by a second name.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let (old, new) = (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let here = libc::AT_FDCWD;
    // SAFETY: both are strings that end with a zero and outlive the call.
    let done = unsafe { libc::renameat2(here, old.as_ptr(), here, new.as_ptr(), libc::RENAME_NOREPLACE) };
    match checked(done) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).expect("a directory");
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_is_whole_or_not_there_and_never_over_another() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("out");
        for begin in [NewFile::begin, NewFile::begin_beside] {
            let mut file = begin(&path).expect("begun");
            file.write_all(b"half").expect("written");
            assert!(!path.exists());
            drop(file);
            assert_eq!(names(dir.path()), [""; 0], "given up, it leaves nothing");
            let mut file = begin(&path).expect("begun");
            file.write_all(b"whole").expect("written");
            file.finish().expect("finished");
            assert_eq!(std::fs::read(&path).expect("there"), b"whole");
            assert!(NewFile::begin(&path).is_err_and(|e| e.to_string().contains("choose another name")));
            std::fs::remove_file(&path).expect("there");
            let file = begin(&path).expect("begun");
            std::fs::write(&path, "another's").expect("written");
            assert_eq!(file.finish().expect_err("taken").kind(), ErrorKind::AlreadyExists);
            assert_eq!(std::fs::read(&path).expect("there"), b"another's");
            assert_eq!(names(dir.path()), ["out"]);
            std::fs::remove_file(&path).expect("there");
        }
        assert!(NewFile::begin(&dir.path().join("no/out")).is_err_and(|e| e.kind() == ErrorKind::NotFound));
    }
}
