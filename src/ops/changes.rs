//! What changed between two versions, in names: the comparison of their trees, told in paths.
//! Invariant: each inode that differs is told of once for each name that came or went, and once for what it holds.

use super::names::{Fetch, Names, is_within};
use crate::log::{Error, Result};
use crate::tree::diff::{Changed, Diff};
use crate::tree::key::{self, KeyRef};
use crate::tree::value::{Body, Dirent, FileType, Inode};
use crate::tree::{Levels, Value};
use crate::types::Ino;
use std::collections::BTreeMap;

/// Differences taken from the trees at once.
const BATCH: usize = 512;

/// What happened to a path.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// It is there now.
    Added,
    /// It is not there any more.
    Deleted,
    /// What was there under another name is there now.
    Renamed,
    /// Other contents: bytes written, another size, target or device.
    Content,
    /// Only attributes: mode, owner, modification time, extended attributes.
    Attributes,
}

impl Kind {
    /// One letter, as `diff` prints it.
    pub fn letter(self) -> char {
        match self {
            Kind::Added => 'A',
            Kind::Deleted => 'D',
            Kind::Renamed => 'R',
            Kind::Content => 'M',
            Kind::Attributes => 'm',
        }
    }
}

/// One path that differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// What happened.
    pub kind: Kind,
    /// The path, without a slash at its beginning; empty for the root.
    pub path: Vec<u8>,
    /// Where it was, if it was renamed.
    pub from: Option<Vec<u8>>,
    /// What it is, or was.
    pub of: FileType,
}

/// What a comparison found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Changes {
    /// In the order of the paths.
    pub changes: Vec<Change>,
    /// Pages of the two trees that were looked at for it; those for names do not count.
    pub pages_read: u64,
    /// Keys that differ.
    pub keys: u64,
}

/// A place where a name stands: directory and name.
type Place = (Ino, Vec<u8>);

/// What is known of an inode that differs somehow.
#[derive(Default)]
struct Touched {
    inode: Option<(Option<Inode>, Option<Inode>)>,
    gone: Vec<Place>,
    new: Vec<Place>,
    content: bool,
    xattr: bool,
    /// Its type, from a name, if the inode itself is the same.
    of: Option<FileType>,
}

/// Compares two versions, of which only what is `within` that path (a plain one) is told.
pub fn compare(old: &Levels<'_>, new: &Levels<'_>, fetch: Fetch<'_>, within: &[u8]) -> Result<Changes> {
    let mut touched: BTreeMap<Ino, Touched> = BTreeMap::new();
    let (mut diff, mut keys) = (Diff::new(old, new), 0);
    loop {
        let batch = match diff.next_batch(old, new, BATCH) {
            Err(Error::Missing(ptrs)) => {
                fetch(&ptrs)?;
                continue;
            }
            batch => batch?,
        };
        if batch.is_empty() {
            break;
        }
        keys += batch.len() as u64;
        batch.iter().try_for_each(|changed| note(&mut touched, changed))?;
    }
    let mut told = Telling { old: Names::new(old, fetch), new: Names::new(new, fetch), out: Vec::new() };
    let mut unnamed = Vec::new();
    for (ino, touched) in &touched {
        told.names(touched)?;
        if let Some(kind) = what_changed(touched) {
            unnamed.push((*ino, kind, touched));
        }
    }
    told.contents(unnamed, &touched)?;
    let mut changes = told.out;
    let inside = |path: &[u8]| is_within(path, within);
    changes.retain(|change| inside(&change.path) || change.from.as_deref().is_some_and(inside));
    changes.sort_by(|a, b| (&a.path, a.kind).cmp(&(&b.path, b.kind)));
    Ok(Changes { changes, pages_read: diff.pages_read(), keys })
}

/// Puts a changed key where its inode is.
fn note(touched: &mut BTreeMap<Ino, Touched>, changed: &Changed) -> Result<()> {
    match key::parse(&changed.key) {
        Some(KeyRef::Inode(ino)) => {
            let decode = |value: &Option<Value>| value.as_ref().map(|value| Inode::decode(value)).transpose();
            touched.entry(ino).or_default().inode = Some((decode(&changed.old)?, decode(&changed.new)?));
        }
        Some(KeyRef::Dirent { dir, name }) => {
            let decode =
                |value: &Option<Value>| value.as_ref().map(|value| Dirent::decode(value)).transpose();
            let (old, new) = (decode(&changed.old)?, decode(&changed.new)?);
            if old.map(|d| d.ino) == new.map(|d| d.ino) {
                return Ok(()); // the same file in another place of the directory's order
            }
            for (dirent, is_new) in [(old, false), (new, true)] {
                let Some(dirent) = dirent else { continue };
                let named = touched.entry(dirent.ino).or_default();
                named.of = Some(dirent.kind);
                if is_new { &mut named.new } else { &mut named.gone }.push((dir, name.to_vec()));
            }
        }
        Some(KeyRef::Xattr { ino, .. }) => touched.entry(ino).or_default().xattr = true,
        Some(KeyRef::Extent { ino, .. }) => touched.entry(ino).or_default().content = true,
        Some(KeyRef::Entry { .. } | KeyRef::Orphan(_)) => {}
        None => return Err(Error::corrupt("the tree", "a key that this program does not know")),
    }
    Ok(())
}

/// What is different in an inode that was there and still is.
fn what_changed(touched: &Touched) -> Option<Kind> {
    let attributes = touched.xattr.then_some(Kind::Attributes);
    let (old, new) = match &touched.inode {
        Some((Some(old), Some(new))) => (old, new),
        Some(_) => return None, // made or gone: its names say so
        None => return if touched.content { Some(Kind::Content) } else { attributes },
    };
    let contents = |inode: &Inode| match &inode.body {
        Body::Directory { .. } => None,
        body => Some((inode.size, body.clone())),
    };
    if touched.content || contents(old) != contents(new) {
        return Some(Kind::Content);
    }
    let names_in = |inode: &Inode| match inode.body {
        Body::Directory { next_entry, entries, .. } => Some((next_entry, entries)),
        _ => None,
    };
    // A directory's time says that names came or went, which is told of them.
    let time = old.mtime != new.mtime && names_in(old) == names_in(new);
    let owner = |inode: &Inode| (inode.mode, inode.uid, inode.gid);
    if time || owner(old) != owner(new) { Some(Kind::Attributes) } else { attributes }
}

struct Telling<'a> {
    old: Names<'a>,
    new: Names<'a>,
    out: Vec<Change>,
}

impl Telling<'_> {
    /// Tells of names that came and went. Where one of an inode went and one came, it was renamed.
    fn names(&mut self, touched: &Touched) -> Result<()> {
        let Some(of) = touched.of else { return Ok(()) };
        let most = touched.gone.len().max(touched.new.len());
        for i in 0..most {
            let gone = touched.gone.get(i).map(|(dir, name)| self.old.path(*dir, name)).transpose()?;
            let new = touched.new.get(i).map(|(dir, name)| self.new.path(*dir, name)).transpose()?;
            self.out.push(match (gone, new) {
                (Some(from), Some(path)) => Change { kind: Kind::Renamed, path, from: Some(from), of },
                (Some(path), None) => Change { kind: Kind::Deleted, path, from: None, of },
                (None, Some(path)) => Change { kind: Kind::Added, path, from: None, of },
                (None, None) => continue,
            });
        }
        Ok(())
    }

    /// Tells of inodes that changed, under one of their names.
    fn contents(&mut self, todo: Vec<(Ino, Kind, &Touched)>, all: &BTreeMap<Ino, Touched>) -> Result<()> {
        let mut files = Vec::new();
        for (ino, kind, touched) in todo {
            let of = touched.inode.as_ref().and_then(|(_, new)| new.as_ref()).map(Inode::kind).or(touched.of);
            let of = match of {
                Some(of) => of,
                None => self.new.inode(ino)?.map_or(FileType::Regular, |inode| inode.kind()),
            };
            let path = match touched.new.first() {
                Some((dir, name)) => Some(self.new.path(*dir, name)?),
                None if of == FileType::Directory => Some(self.new.directory(ino)?),
                None => None,
            };
            match path {
                Some(path) => self.out.push(Change { kind, path, from: None, of }),
                None => files.push((ino, kind, of)),
            }
        }
        let is_directory = |touched: &Touched| {
            let new = touched.inode.as_ref().and_then(|(_, new)| new.as_ref());
            new.is_some_and(|inode| inode.kind() == FileType::Directory)
        };
        let likely: Vec<Ino> = all.iter().filter(|(_, t)| is_directory(t)).map(|(ino, _)| *ino).collect();
        let named = self.new.of_files(files.iter().map(|(ino, ..)| *ino), likely)?;
        for (ino, kind, of) in files {
            // Without a name it is an open file that was unlinked: nobody can see it.
            if let Some(path) = named.get(&ino) {
                self.out.push(Change { kind, path: path.clone(), from: None, of });
            }
        }
        Ok(())
    }
}
