//! Copying a file past the page cache: what goes to the store is not read again on this host.
//! Invariant: the copy is whole or an error; where the file system knows no O_DIRECT, it is an ordinary copy.

use crate::disk::{ALIGN, aligned};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Size of the pieces; a multiple of every block size there is.
const PIECE: usize = 1 << 20;

/// Copies `source` to the empty file `target`; returns the bytes copied. Not synced.
pub(super) fn copy(source: &File, target: &File) -> io::Result<u64> {
    let mut memory = Vec::new();
    let (_, piece) = aligned(&mut memory, PIECE);
    let mut direct = set_direct(target, true);
    let mut done = 0u64;
    loop {
        let len = fill(source, piece, done)?;
        if len == 0 {
            set_direct(target, false);
            return Ok(done);
        }
        // Only whole blocks can go past the page cache; the last piece is rarely made of them.
        if direct && !len.is_multiple_of(ALIGN) {
            direct = !set_direct(target, false);
        }
        match target.write_all_at(&piece[..len], done) {
            Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => {
                set_direct(target, false);
                direct = false;
                target.write_all_at(&piece[..len], done)?;
            }
            other => other?,
        }
        done += len as u64;
    }
}

/// Reads until `piece` is full or the file ends.
fn fill(source: &File, piece: &mut [u8], from: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < piece.len() {
        match source.read_at(&mut piece[len..], from + len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

/// Switches O_DIRECT on or off; true if that was done.
fn set_direct(file: &File, on: bool) -> bool {
    let flags = if on { libc::O_DIRECT } else { 0 };
    // SAFETY: sets a flag of a descriptor that is open as long as `file` is borrowed; no pointers.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn every_length_is_copied_to_the_byte() {
        for len in [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 4096, 3 * PIECE + 77] {
            let bytes: Vec<u8> = (0..len).map(|i| (i / 7 + i) as u8).collect();
            let mut source = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            source.write_all(&bytes).unwrap();
            source.seek(SeekFrom::End(0)).unwrap();
            let target = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            assert_eq!(copy(&source, &target).unwrap(), len as u64);
            let mut there = vec![0; len];
            target.read_exact_at(&mut there, 0).unwrap();
            assert!(there == bytes && target.metadata().unwrap().len() == len as u64, "{len} bytes");
        }
    }
}
