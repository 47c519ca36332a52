//! Everything below a directory, through the kernel: by plain system calls, as any program sees it.
//! Invariant: the order is that of the names as they are shown, directories before what is in them, so that two walks
//! can be compared line by line; memory follows one directory, not the tree; no symbolic link is followed.

use super::names::shown;
use crate::crypto::Hasher;
use crate::types::{Hash, Timestamp};
use std::cmp::Ordering;
use std::ffi::{CString, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// So many entries are looked at together, by so many threads.
const BATCH: usize = 256;
const THREADS: usize = 8;
/// Bytes read at once.
const PIECE: usize = 256 << 10;
/// Attributes that the host puts there, not the volume.
const OF_THE_HOST: &[&[u8]] = &[b"security.selinux", b"security.SMACK64", b"security.ima", b"security.evm"];

/// A name that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its path from the top, as [`shown`] writes it; `.` for the top.
    pub path: String,
    /// The path to open.
    pub real: PathBuf,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The path as [`shown`] writes it; `.` for the top.
    pub path: String,
    /// `f` file, `d` directory, `l` symbolic link, `p` pipe, `s` socket, `c` and `b` devices.
    pub kind: char,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a file or a link's target; the number of a device; else 0.
    pub size: u64,
    /// When the contents were last modified.
    pub mtime: Timestamp,
    /// BLAKE3 of a file's contents or of a link's target.
    pub hash: Option<Hash>,
    /// BLAKE3 of the extended attributes, access control lists among them.
    pub xattrs: Option<Hash>,
}

/// What could not be looked at, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its path, as [`shown`] writes it.
    pub path: String,
    /// What the system said.
    pub why: String,
}

/// The order in which paths come.
pub fn order(a: &str, b: &str) -> Ordering {
    match (a == ".", b == ".") {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
        _ => a.as_bytes().split(|b| *b == b'/').cmp(b.as_bytes().split(|b| *b == b'/')),
    }
}

/// Walks through names alone, like `find`.
pub struct Walk {
    top: PathBuf,
    begun: bool,
    levels: Vec<Level>,
    /// The directory that was told of last, to be gone into.
    next: Option<Found>,
}

struct Level {
    /// The directory; its path is empty for the top.
    above: Found,
    names: std::vec::IntoIter<(String, OsString, bool)>,
}

impl Walk {
    /// Everything from `top` on.
    pub fn new(top: &Path) -> Walk {
        Walk { top: top.to_path_buf(), begun: false, levels: Vec::new(), next: None }
    }

    fn enter(&mut self, directory: Found) -> Result<(), Unreadable> {
        let unreadable = |e: io::Error| Unreadable { path: directory.path.clone(), why: e.to_string() };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&directory.real).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let is_dir = entry.file_type().map_err(unreadable)?.is_dir();
            let name = entry.file_name();
            names.push((shown(name.as_bytes()), name, is_dir));
        }
        names.sort_unstable();
        let Found { mut path, real } = directory;
        if path == "." {
            path.clear();
        }
        self.levels.push(Level { above: Found { path, real }, names: names.into_iter() });
        Ok(())
    }
}

impl Iterator for Walk {
    type Item = Result<Found, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.begun {
            self.begun = true;
            let top = Found { path: ".".into(), real: self.top.clone() };
            self.next = Some(top.clone());
            return Some(Ok(top));
        }
        if let Some(directory) = self.next.take()
            && let Err(e) = self.enter(directory)
        {
            return Some(Err(e));
        }
        loop {
            let level = self.levels.last_mut()?;
            let Some((name, real, is_dir)) = level.names.next() else {
                self.levels.pop();
                continue;
            };
            let above = &level.above;
            let path = if above.path.is_empty() { name } else { format!("{}/{name}", above.path) };
            let found = Found { path, real: above.real.join(real) };
            self.next = is_dir.then(|| found.clone());
            return Some(Ok(found));
        }
    }
}

/// Looks at everything from `top` on and gives `each` what is there, in order, until it
/// fails or `stop` is set.
pub fn read_all(
    top: &Path,
    stop: &AtomicBool,
    each: &mut dyn FnMut(Result<Entry, Unreadable>) -> io::Result<()>,
) -> io::Result<()> {
    let mut walk = Walk::new(top);
    loop {
        let batch: Vec<_> = walk.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(());
        }
        for looked in look_at(&batch, stop) {
            each(looked)?;
        }
        if stop.load(Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
}

type Looked = Result<Entry, Unreadable>;

fn look_at(batch: &[Result<Found, Unreadable>], stop: &AtomicBool) -> Vec<Looked> {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut done, mut buffer) = (Vec::new(), vec![0; PIECE]);
        loop {
            let at = next.fetch_add(1, Relaxed);
            let looked = match batch.get(at) {
                None => return done,
                Some(Err(e)) => Err(e.clone()),
                Some(Ok(found)) => entry(found, stop, &mut buffer)
                    .map_err(|e| Unreadable { path: found.path.clone(), why: e.to_string() }),
            };
            done.push((at, looked));
        }
    };
    let threads = THREADS.min(batch.len());
    let mut all: Vec<(usize, Looked)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        others.into_iter().for_each(|thread| all.extend(thread.join().unwrap_or_default()));
        all
    });
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, looked)| looked).collect()
}

fn entry(found: &Found, stop: &AtomicBool, buffer: &mut [u8]) -> io::Result<Entry> {
    let meta = std::fs::symlink_metadata(&found.real)?;
    let kind = kind(&meta);
    let (size, hash) = match kind {
        'f' => {
            let (size, hash) = contents(&found.real, stop, buffer)?;
            if size != meta.len() {
                return Err(io::Error::other(format!("{size} bytes were read, it has {}", meta.len())));
            }
            (size, Some(hash))
        }
        'l' => {
            let target = std::fs::read_link(&found.real)?;
            let target = target.as_os_str().as_bytes();
            (target.len() as u64, Some(crate::crypto::hash(target)))
        }
        'c' | 'b' => (meta.rdev(), None),
        _ => (0, None),
    };
    Ok(Entry {
        path: found.path.clone(),
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size,
        mtime: Timestamp { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 },
        hash,
        xattrs: xattrs(&found.real)?,
    })
}

fn kind(meta: &Metadata) -> char {
    let kind = meta.file_type();
    match () {
        () if kind.is_file() => 'f',
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_char_device() => 'c',
        () => 'b',
    }
}

fn contents(path: &Path, stop: &AtomicBool, buffer: &mut [u8]) -> io::Result<(u64, Hash)> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags).open(path)?;
    let (mut hasher, mut size) = (Hasher::default(), 0);
    loop {
        match file.read(buffer)? {
            0 => return Ok((size, hasher.finish())),
            n => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
        }
        if stop.load(Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
}

/// One hash of all extended attributes: of each, in the order of their names, the length (u32 LE) and the bytes of the
/// name and of the value.
fn xattrs(path: &Path) -> io::Result<Option<Hash>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path ends with NUL, and the buffer has the length that is given.
    let list = grown(|out| unsafe { libc::llistxattr(path.as_ptr(), out.as_mut_ptr().cast(), out.len()) })?;
    let mut names: Vec<&[u8]> =
        list.split(|b| *b == 0).filter(|name| !name.is_empty() && !OF_THE_HOST.contains(name)).collect();
    if names.is_empty() {
        return Ok(None);
    }
    names.sort_unstable();
    let mut hasher = Hasher::default();
    for name in names {
        let c_name = CString::new(name)?;
        let value = grown(|out| {
            // SAFETY: both strings end with NUL, and the buffer has the length that is given.
            unsafe { libc::lgetxattr(path.as_ptr(), c_name.as_ptr(), out.as_mut_ptr().cast(), out.len()) }
        })?;
        for part in [name, &value] {
            hasher.update(&(part.len() as u32).to_le_bytes());
            hasher.update(part);
        }
    }
    Ok(Some(hasher.finish()))
}

/// What a call writes into a buffer that is large enough: asked with none first, as most have nothing.
fn grown(mut call: impl FnMut(&mut [u8]) -> isize) -> io::Result<Vec<u8>> {
    loop {
        let Ok(len) = usize::try_from(call(&mut [])) else { return unsupported(io::Error::last_os_error()) };
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut out = vec![0; len];
        match usize::try_from(call(&mut out)) {
            Ok(len) => {
                out.truncate(len);
                return Ok(out);
            }
            // It grew meanwhile.
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ERANGE) => {}
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
}

fn unsupported(e: io::Error) -> io::Result<Vec<u8>> {
    match e.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        _ => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_comes_in_the_order_of_paths_and_sees_what_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let top = dir.path();
        for name in ["a/b", "a.b"] {
            let path = top.join(name);
            std::fs::create_dir_all(path.parent().expect("below the top")).expect("made");
            std::fs::write(path, name).expect("written");
        }
        std::os::unix::fs::symlink("nowhere", top.join("z")).expect("made");
        let paths: Vec<String> = Walk::new(top).map(|found| found.expect("readable").path).collect();
        assert_eq!(paths, [".", "a", "a/b", "a.b", "z"]);
        assert!(paths.windows(2).all(|pair| order(&pair[0], &pair[1]) == Ordering::Less));
        let mut entries = Vec::new();
        let stop = AtomicBool::new(false);
        read_all(top, &stop, &mut |entry| {
            entries.push(entry.expect("readable"));
            Ok(())
        })
        .expect("walked");
        assert_eq!(entries.iter().map(|e| e.kind).collect::<String>(), "ddffl");
        assert_eq!(entries[2].hash, Some(crate::crypto::hash(b"a/b")));
        assert_eq!((entries[4].size, entries[4].hash), (7, Some(crate::crypto::hash(b"nowhere"))));
        stop.store(true, Relaxed);
        assert!(read_all(top, &stop, &mut |_| Ok(())).is_err(), "it can be stopped");
        std::fs::remove_dir_all(top.join("a")).expect("removed");
        let gone = Walk::new(&top.join("a")).nth(1).expect("told of");
        assert_eq!(gone.expect_err("it is gone").path, ".");
    }
}
