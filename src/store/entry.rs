//! What lies under a name in a directory: an object's file, nothing, or something that is no object.
//! Invariant: nothing that is no file is ever opened, so that none (a pipe without a writer) keeps us waiting.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// See the module.
pub(super) enum Entry {
    /// A file, opened, and its size in bytes.
    File(File, u64),
    /// Nothing, or a directory: these are the store's own.
    Nothing,
    /// What it is instead.
    Other(&'static str),
}

/// Opens what is at `path` for reading, if it is a file or a link to one.
pub(super) fn open(path: &Path) -> io::Result<Entry> {
    match look(path)? {
        Looked::File(_) => {}
        Looked::Nothing | Looked::Directory => return Ok(Entry::Nothing),
        Looked::Other(what) => return Ok(Entry::Other(what)),
    }
    // It may be another by now: this open does not wait, and what was opened is looked at again.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = match opened {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Entry::Nothing),
        file => file?,
    };
    let meta = file.metadata()?;
    Ok(match meta.is_file() {
        true => Entry::File(file, meta.len()),
        false => Entry::Other("no file"),
    })
}

/// The size of what is listed at `path`, 0 for what is no file; `None` when it is gone.
pub(super) fn size(path: &Path) -> io::Result<Option<u64>> {
    Ok(match look(path)? {
        Looked::File(size) => Some(size),
        Looked::Other(_) | Looked::Directory => Some(0),
        Looked::Nothing => None,
    })
}

/// What is at `path`, if it is there and can be no object.
pub(super) fn other(path: &Path) -> io::Result<Option<&'static str>> {
    Ok(match look(path)? {
        Looked::Other(what) => Some(what),
        Looked::File(_) | Looked::Directory | Looked::Nothing => None,
    })
}

enum Looked {
    File(u64),
    Directory,
    Nothing,
    Other(&'static str),
}

fn look(path: &Path) -> io::Result<Looked> {
    let meta = match fs::metadata(path) {
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            return Ok(Looked::Other("a symbolic link that leads to itself"));
        }
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            let link = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink());
            return Ok(if link {
                Looked::Other("a symbolic link that leads nowhere")
            } else {
                Looked::Nothing
            });
        }
        meta => meta?,
    };
    let kind = meta.file_type();
    Ok(if kind.is_file() {
        Looked::File(meta.len())
    } else if kind.is_dir() {
        Looked::Directory
    } else if kind.is_fifo() {
        Looked::Other("a pipe")
    } else if kind.is_socket() {
        Looked::Other("a socket")
    } else {
        Looked::Other("a device")
    })
}
