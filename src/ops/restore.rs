//! Copying out of a volume into a directory: with owners, modes, times, attributes, links and holes.
//! Invariant: a file has its name only when it is whole, has its attributes and is on the disk, so that a copy that was
//! interrupted goes on where it was; what was written is read back before; what is there and differs stays unless it may
//! be overwritten; nothing is written outside of the directory.

mod same;

use super::names::shown;
use super::place::Dir;
use super::reader::{Reader, Xattr};
use crate::fs::{self, Attr};
use crate::log;
use crate::tree::value::{Body, FileType};
use crate::types::Ino;
use same::{Written, difference, is_counted, kernel_device, same_contents};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Files that wait for one sync of the disk together: so many, or so many bytes.
const BATCH_FILES: usize = 128;
const BATCH_BYTES: u64 = 64 << 20;
/// What a file is called that is not whole yet: with its inode's number between.
const PART: (&str, &str) = (".embassyfs-restore-", ".part");
/// Problems that are kept; more are only counted.
const PROBLEMS_MAX: usize = 1000;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Files copied now and read back, and their bytes (holes count as nothing).
    pub files: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Directories made or filled.
    pub directories: u64,
    /// Symbolic links, devices, pipes and sockets made.
    pub others: u64,
    /// Further names of files.
    pub links: u64,
    /// What was there already, as it is in the volume: not copied again. Known by type, owner, mode, size, time of
    /// modification, target and extended attributes.
    pub present: u64,
    /// Files among them whose contents were compared, too.
    pub compared: u64,
    /// What could not be restored, or not as it was: paths with the reason. At most a thousand.
    pub problems: Vec<(String, String)>,
    /// How many such there were.
    pub problem_count: u64,
}

impl Report {
    /// Adds what another copy did.
    pub fn add(&mut self, other: Report) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.directories += other.directories;
        self.others += other.others;
        self.links += other.links;
        self.present += other.present;
        self.compared += other.compared;
        self.problems.extend(other.problems);
        self.problems.truncate(PROBLEMS_MAX);
        self.problem_count += other.problem_count;
    }
}

/// Why a restore ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// The volume or its store.
    #[error(transparent)]
    Volume(#[from] fs::Error),
    /// The place it is copied to.
    #[error("{what}: {source}")]
    Place {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, Stopped>;

/// Why one file, directory or other thing is not as it should be.
enum Trouble {
    /// Told of; the rest goes on.
    One(String),
    /// Nothing can go on.
    All(Stopped),
}

impl From<io::Error> for Trouble {
    fn from(e: io::Error) -> Trouble {
        match e.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EROFS | libc::EIO) => {
                Trouble::All(Stopped::Place { what: "writing".into(), source: e })
            }
            _ => Trouble::One(e.to_string()),
        }
    }
}

impl From<fs::Error> for Trouble {
    fn from(e: fs::Error) -> Trouble {
        match e {
            // Damage in one file says nothing of the others.
            fs::Error::Log(log::Error::Corrupt { .. }) | fs::Error::Os(_) => Trouble::One(e.to_string()),
            other => Trouble::All(other.into()),
        }
    }
}

/// A copy under way.
pub struct Restore<'a> {
    reader: Reader<'a>,
    dest: Dir,
    overwrite: bool,
    compare: bool,
    report: Report,
    /// Files that are whole under their temporary names, and wait for the disk; and further names, which wait for them.
    waiting: Vec<Waiting>,
    waiting_bytes: u64,
    /// Where the first name of a file with several lies.
    first_names: HashMap<Ino, FirstName>,
    /// Inodes of which something waits.
    pending: HashSet<Ino>,
    /// Directories, which get their attributes at the end: path of the one they lie in, name, attributes.
    directories: Vec<(Vec<u8>, Vec<u8>, Attr)>,
    progress: &'a mut dyn FnMut(&Report),
}

/// The path of the directory it lies in, and the name.
type FirstName = (Vec<u8>, Vec<u8>);

struct Waiting {
    dir: Dir,
    ino: Ino,
    part: Vec<u8>,
    name: Vec<u8>,
    /// For messages.
    path: Vec<u8>,
    what: Made,
}

/// What waits for its name.
enum Made {
    File(Box<Written>),
    Other,
    /// A further name of what has this one by then.
    Link(FirstName),
}

impl<'a> Restore<'a> {
    /// Copies into `dest`.
    pub fn new(
        reader: Reader<'a>,
        dest: Dir,
        overwrite: bool,
        progress: &'a mut dyn FnMut(&Report),
    ) -> Restore<'a> {
        Restore {
            reader,
            dest,
            overwrite,
            compare: false,
            report: Report::default(),
            waiting: Vec::new(),
            waiting_bytes: 0,
            first_names: HashMap::new(),
            pending: HashSet::new(),
            directories: Vec::new(),
            progress,
        }
    }

    /// With `compare` the contents of what is there already are compared as well, which reads them on both sides.
    pub fn comparing(mut self, compare: bool) -> Restore<'a> {
        self.compare = compare;
        self
    }

    /// Copies what lies at `path` (a plain one) under its last name; of the root, what it holds.
    pub fn copy(&mut self, path: &[u8]) -> Result<()> {
        let found = match self.reader.find(path) {
            Err(fs::Error::Os(errno)) => {
                let why = io::Error::from_raw_os_error(errno).to_string();
                self.problem(path, why);
                return Ok(());
            }
            found => found?,
        };
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        let top = self.dest.clone();
        if name.is_empty() {
            self.directories.push((Vec::new(), b".".to_vec(), found.clone()));
            return self.fill(top, Vec::new(), found.ino);
        }
        self.one(&top, &[], name, &found)
    }

    /// Gives everything its name and the directories their attributes.
    pub fn finish(mut self) -> Result<Report> {
        self.settle()?;
        // Those below first: what is done in a directory changes its times.
        for (parent, name, attr) in std::mem::take(&mut self.directories).into_iter().rev() {
            let done = self.reader.xattrs(attr.ino).map_err(Trouble::from).and_then(|xattrs| {
                let dir = self.dest.below(&parent)?;
                self.attributes(&dir, &name, &attr, &xattrs)
            });
            self.told(&join(&parent, &name), done)?;
        }
        self.sync()?;
        Ok(self.report)
    }

    fn problem(&mut self, path: &[u8], why: String) {
        self.report.problem_count += 1;
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push((shown(path), why));
        }
    }

    fn told(&mut self, path: &[u8], done: std::result::Result<(), Trouble>) -> Result<()> {
        match done {
            Ok(()) => Ok(()),
            Err(Trouble::One(why)) => {
                self.problem(path, why);
                Ok(())
            }
            Err(Trouble::All(Stopped::Place { source, .. })) => {
                Err(Stopped::Place { what: format!("restoring {}", shown(path)), source })
            }
            Err(Trouble::All(stopped)) => Err(stopped),
        }
    }

    /// Copies all that the directory `ino` holds into `dir`, which lies at `path`; then what lies below.
    fn fill(&mut self, dir: Dir, path: Vec<u8>, ino: Ino) -> Result<()> {
        let mut todo = vec![(dir, path, ino)];
        while let Some((dir, path, ino)) = todo.pop() {
            let (mut cookie, mut below) = (0, Vec::new());
            loop {
                let entries = match self.reader.entries(ino, cookie).map_err(Trouble::from) {
                    Ok(entries) => entries,
                    Err(trouble) => {
                        self.told(&path, Err(trouble))?;
                        break;
                    }
                };
                let Some((last, _)) = entries.last() else { break };
                cookie = last.cookie;
                let small = entries.iter().filter(|(item, _)| item.kind == FileType::Regular);
                if let Err(trouble) =
                    self.reader.prefetch(small.map(|(item, _)| item.ino)).map_err(Trouble::from)
                {
                    self.told(&path, Err(trouble))?;
                }
                for (item, attr) in entries {
                    if attr.inode.kind() != FileType::Directory {
                        self.one(&dir, &path, &item.name, &attr)?;
                    } else if let Some(child) = self.directory(&dir, &path, &item.name, &attr)? {
                        below.push((child, join(&path, &item.name), attr.ino));
                    }
                }
            }
            // Each open directory is a handle, and a directory may hold very many: they are opened again in their turn.
            let dest = self.dest.clone();
            for (_, path, ino) in below {
                match dest.below(&path) {
                    Ok(dir) if todo.len() < 256 => todo.push((dir, path, ino)),
                    Ok(dir) => self.fill(dir, path, ino)?,
                    Err(e) => self.problem(&path, e.to_string()),
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, dir: &Dir, parent: &[u8], name: &[u8], attr: &Attr) -> Result<()> {
        let path = join(parent, name);
        if attr.inode.kind() == FileType::Directory {
            return match self.directory(dir, parent, name, attr)? {
                Some(child) => self.fill(child, path, attr.ino),
                None => Ok(()),
            };
        }
        let done = self.entry(dir, parent, name, attr);
        self.told(&path, done)?;
        (self.progress)(&self.report);
        Ok(())
    }

    /// Makes the directory, or takes the one that is there.
    fn directory(&mut self, dir: &Dir, parent: &[u8], name: &[u8], attr: &Attr) -> Result<Option<Dir>> {
        let made = match dir.mkdir(name) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => dir.child(name),
        };
        match made {
            Ok(child) => {
                self.report.directories += 1;
                self.directories.push((parent.to_vec(), name.to_vec(), attr.clone()));
                Ok(Some(child))
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                self.problem(&join(parent, name), "something that is no directory has its name there".into());
                Ok(None)
            }
            Err(e) => self.told(&join(parent, name), Err(e.into())).map(|()| None),
        }
    }

    /// Copies what is no directory.
    fn entry(
        &mut self,
        dir: &Dir,
        parent: &[u8],
        name: &[u8],
        attr: &Attr,
    ) -> std::result::Result<(), Trouble> {
        let path = join(parent, name);
        let mut first = self.first_names.get(&attr.ino).cloned();
        if first.is_none() && self.pending.contains(&attr.ino) {
            // Asked for twice, and of one name: it may be this one that waits.
            self.settle().map_err(Trouble::All)?;
            first = self.first_names.get(&attr.ino).cloned();
        }
        if let Some(there) = dir.stat(name)? {
            let Some(what) = self.differs(dir, name, attr, &there, first.as_ref())? else {
                self.report.present += 1;
                self.is_named(parent, name, attr);
                return Ok(());
            };
            if there.st_mode & libc::S_IFMT == libc::S_IFDIR {
                return Err(Trouble::One("a directory has its name there".into()));
            }
            if !self.overwrite {
                let why = format!("is there already and differs ({what}); --overwrite replaces it");
                return Err(Trouble::One(why));
            }
        }
        let part = format!("{}{:x}{}", PART.0, attr.ino.0, PART.1).into_bytes();
        let what = match first {
            // It may be the first name that waits under `part`.
            Some(first) => Made::Link(first),
            None => {
                dir.unlink(&part)?; // left by one that was interrupted
                let made = self.make(dir, &part, attr);
                if made.is_err() {
                    let _ = dir.unlink(&part); // what is wrong has been found already
                }
                made?
            }
        };
        self.is_named(parent, name, attr);
        self.pending.insert(attr.ino);
        let waiting = Waiting { dir: dir.clone(), ino: attr.ino, part, name: name.to_vec(), path, what };
        self.waiting.push(waiting);
        if self.waiting.len() >= BATCH_FILES || self.waiting_bytes >= BATCH_BYTES {
            self.settle().map_err(Trouble::All)?;
        }
        Ok(())
    }

    /// Its further names, if it has some, are links to this one.
    fn is_named(&mut self, parent: &[u8], name: &[u8], attr: &Attr) {
        if attr.inode.nlink > 1 {
            self.first_names.entry(attr.ino).or_insert_with(|| (parent.to_vec(), name.to_vec()));
        }
    }

    /// In what the thing there differs from the one of the volume; `None`: in nothing.
    fn differs(
        &mut self,
        dir: &Dir,
        name: &[u8],
        attr: &Attr,
        there: &libc::stat,
        first: Option<&FirstName>,
    ) -> std::result::Result<Option<&'static str>, Trouble> {
        let xattrs = self.reader.xattrs(attr.ino)?;
        if let Some(what) = difference(dir, name, attr, there, &xattrs)? {
            return Ok(Some(what));
        }
        if !self.is_same_link(first, there)? {
            return Ok(Some("is another file than its other name"));
        }
        // Under its first name it was compared already.
        if self.compare && first.is_none() && attr.inode.kind() == FileType::Regular {
            if !same_contents(self.reader, &dir.read(name)?, attr)? {
                return Ok(Some("contents"));
            }
            self.report.compared += 1;
        }
        Ok(None)
    }

    /// Whether what is there is the same file as its first name, if it has one.
    fn is_same_link(&self, first: Option<&FirstName>, there: &libc::stat) -> io::Result<bool> {
        let Some((parent, name)) = first else { return Ok(true) };
        let other = self.dest.below(parent)?.stat(name)?;
        Ok(other.is_some_and(|other| (other.st_dev, other.st_ino) == (there.st_dev, there.st_ino)))
    }

    /// Makes it under a temporary name, with its attributes.
    fn make(&mut self, dir: &Dir, part: &[u8], attr: &Attr) -> std::result::Result<Made, Trouble> {
        let xattrs = self.reader.xattrs(attr.ino)?;
        let mut made = Made::Other;
        match &attr.inode.body {
            Body::Regular => {
                let written = self.contents(&dir.create(part)?, attr)?;
                self.waiting_bytes += written.bytes;
                made = Made::File(Box::new(written));
            }
            Body::Symlink { target } => dir.symlink(target, part)?,
            body => {
                let (kind, rdev) = match body {
                    Body::Fifo => (libc::S_IFIFO, 0),
                    Body::Socket => (libc::S_IFSOCK, 0),
                    Body::CharDevice(rdev) => (libc::S_IFCHR, *rdev),
                    Body::BlockDevice(rdev) => (libc::S_IFBLK, *rdev),
                    _ => return Err(Trouble::One("is of no kind that can be made".into())),
                };
                dir.mknod(part, kind | 0o600, kernel_device(rdev))?;
            }
        }
        self.attributes(dir, part, attr, &xattrs)?;
        Ok(made)
    }

    fn contents(&self, file: &File, attr: &Attr) -> std::result::Result<Written, Trouble> {
        let (mut written, mut failed) = (Written::default(), None);
        let copied = self.reader.data(attr, &mut |at, bytes| {
            file.write_all_at(bytes, at).map_err(|e| {
                let errno = e.raw_os_error().unwrap_or(libc::EIO);
                failed = Some(e);
                fs::Error::Os(errno)
            })?;
            written.note(at, bytes);
            Ok(())
        });
        if let Some(e) = failed {
            return Err(e.into());
        }
        copied?;
        file.set_len(attr.inode.size)?;
        written.ends(attr.inode.size);
        Ok(written)
    }

    /// Owner first, for it takes set-id bits and capabilities away; times last.
    fn attributes(
        &self,
        dir: &Dir,
        name: &[u8],
        attr: &Attr,
        xattrs: &[Xattr],
    ) -> std::result::Result<(), Trouble> {
        let inode = &attr.inode;
        let what = |what: &str, e: io::Error| match Trouble::from(e) {
            Trouble::One(why) => Trouble::One(format!("{what}: {why}")),
            all => all,
        };
        let there = dir.stat(name)?;
        if there.is_some_and(|there| (there.st_uid, there.st_gid) != (inode.uid, inode.gid)) {
            let owner = format!("owner {}:{}", inode.uid, inode.gid);
            dir.chown(name, inode.uid, inode.gid).map_err(|e| what(&owner, e))?;
        }
        // What a directory hands down to what is made in it, or what was there before.
        for (attribute, _) in dir.xattrs(name)? {
            if is_counted(&attribute) && !xattrs.iter().any(|(name, _)| *name == attribute) {
                let named = format!("attribute {}", shown(&attribute));
                dir.remove_xattr(name, &attribute).map_err(|e| what(&named, e))?;
            }
        }
        if inode.kind() != FileType::Symlink {
            dir.chmod(name, inode.mode).map_err(|e| what("mode", e))?;
        }
        for (attribute, value) in xattrs {
            let named = format!("attribute {}", shown(attribute));
            dir.set_xattr(name, attribute, value).map_err(|e| what(&named, e))?;
        }
        dir.set_times(name, inode.atime, inode.mtime).map_err(|e| what("times", e))
    }

    fn sync(&self) -> Result<()> {
        let sync = self.dest.sync_all();
        sync.map_err(|source| Stopped::Place { what: "waiting for the disk".into(), source })
    }

    /// Waits for the disk, then gives the files that wait for it their names.
    fn settle(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.sync()?;
        self.waiting_bytes = 0;
        self.pending.clear();
        for Waiting { dir, ino, part, name, path, what } in std::mem::take(&mut self.waiting) {
            let is_first = !matches!(what, Made::Link(_));
            let done = self.name(&dir, &part, &name, what);
            if done.is_err() {
                let _ = dir.unlink(&part); // what is wrong has been found already
                if is_first {
                    self.first_names.remove(&ino);
                }
            }
            self.told(&path, done)?;
        }
        Ok(())
    }

    /// Gives one its name, after what was written has been read back.
    fn name(&mut self, dir: &Dir, part: &[u8], name: &[u8], what: Made) -> std::result::Result<(), Trouble> {
        match what {
            Made::File(written) => {
                let bytes = written.bytes;
                if !written.is_in(&dir.read(part)?)? {
                    let why = "read back it is not what was written: the disk there is not to be trusted";
                    return Err(Trouble::One(why.into()));
                }
                dir.rename(part, name)?;
                self.report.files += 1;
                self.report.bytes += bytes;
            }
            Made::Other => {
                dir.rename(part, name)?;
                self.report.others += 1;
            }
            Made::Link((parent, first)) => {
                let there = self.dest.below(&parent)?;
                if there.stat(&first)?.is_none() {
                    let first = shown(&join(&parent, &first));
                    return Err(Trouble::One(format!(
                        "is another name of {first}, which could not be restored"
                    )));
                }
                dir.unlink(part)?; // left by one that was interrupted
                dir.link(&there, &first, part)?;
                dir.rename(part, name)?;
                self.report.links += 1;
            }
        }
        Ok(())
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}
