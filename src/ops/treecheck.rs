//! Walking through the whole tree of a version and holding its parts against each other: names by name and by id,
//! link counts, parents, sizes, counters, and that the frames it refers to are there.
//! Invariant: everything that is wrong is told of, not only the first; memory follows the number of inodes (about 12
//! bytes each, more for directories), not what they hold.

use super::names::{Fetch, Names, shown};
use crate::crypto;
use crate::log::audit::Finding;
use crate::log::{Error, Result};
use crate::tree::diff::Diff;
use crate::tree::key::{self, KeyRef};
use crate::tree::value::{Body, Dirent, Entry, Extent, FileType, Inode, SPARSE, decode_orphan, decode_xattr};
use crate::tree::{Counters, Levels, Tree};
use crate::types::{FramePtr, Ino};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Keys taken at once.
const BATCH: usize = 1024;
/// Findings that are kept.
const FINDINGS_MAX: usize = 10_000;
/// Damaged files whose paths are looked for.
const NAMED_MAX: usize = 200;
/// What a finding about the tree as a whole is said of.
const TREE: &str = "the tree";

/// What was seen, and what is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Keys looked at.
    pub keys: u64,
    /// Inodes among them.
    pub inodes: u64,
    /// Pieces of files whose frames were looked for.
    pub extents: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// The length of what the DATA frame at a place holds; an error when it is not there or does not open.
pub type FrameLen<'a> = &'a mut dyn FnMut(FramePtr) -> Result<u64>;

/// What is known of an inode: how many more names it says it has than were met, and its type.
#[derive(Clone, Copy, Default)]
struct Cell {
    balance: i64,
    kind: u8,
    named_as: u8,
}

/// The inode whose keys are being gone through.
#[derive(Default)]
struct Current {
    ino: u64,
    inode: Option<Inode>,
    by_name: (u64, u128),
    by_id: (u64, u128),
    xattrs: u64,
    /// Where the last extent ended.
    end: u64,
    gap: bool,
    overlap: bool,
}

struct Check<'a> {
    frame: FrameLen<'a>,
    out: Checked,
    cells: BTreeMap<u64, Cell>,
    /// Where directories say they lie, and where a name of them was met.
    parents: HashMap<Ino, Ino>,
    named_in: HashMap<Ino, Ino>,
    damaged_files: HashSet<Ino>,
    live_bytes: u64,
    now: Current,
}

/// Checks the version that `levels` shows, with its counters.
pub fn check(
    levels: &Levels<'_>,
    counters: Counters,
    fetch: Fetch<'_>,
    frame: FrameLen<'_>,
    progress: &mut dyn FnMut(&Checked),
) -> Result<Checked> {
    let nothing = Tree::default();
    let empty = Levels { maps: &[], tree: &nothing, frames: levels.frames };
    let mut check = Check {
        frame,
        out: Checked::default(),
        cells: BTreeMap::new(),
        parents: HashMap::new(),
        named_in: HashMap::new(),
        damaged_files: HashSet::new(),
        live_bytes: 0,
        now: Current::default(),
    };
    let (mut diff, mut whole) = (Diff::new(&empty, levels), true);
    loop {
        let batch = match diff.next_batch(&empty, levels, BATCH) {
            Ok(batch) => batch,
            Err(e) => {
                let failed = match e {
                    Error::Missing(ptrs) => match fetch(&ptrs) {
                        Ok(()) => continue,
                        // Of several pages that were asked for together the next one may be whole.
                        Err(e) if is_damage(&e) => match fetch(&ptrs[..1]) {
                            Ok(()) => continue,
                            Err(_) => e,
                        },
                        Err(e) => return Err(e),
                    },
                    e => e,
                };
                check.find(Finding::from_error(failed, TREE)?);
                whole = false;
                if !diff.skip_damaged(&empty, levels) {
                    break;
                }
                continue;
            }
        };
        if batch.is_empty() {
            break;
        }
        for changed in &batch {
            check.out.keys += 1;
            if let Some(value) = &changed.new
                && let Err(e) = check.key(&changed.key, value)
            {
                check.find(Finding::from_error(e, TREE)?);
            }
        }
        progress(&check.out);
    }
    check.leave();
    if whole {
        check.balance(counters);
    } else {
        let detail = "not all of it can be read, so link counts and counters were not compared";
        check.find(Finding::new(TREE, detail));
    }
    check.name_files(levels, fetch);
    Ok(check.out)
}

/// Says something of the volume, not of the way to its store. A segment that is gone takes only its own pages along.
fn is_damage(error: &Error) -> bool {
    use crate::store::StoreError::{NotFound, OutOfRange};
    matches!(error, Error::Corrupt { .. } | Error::Store(NotFound { .. } | OutOfRange { .. }))
}

impl Check<'_> {
    fn find(&mut self, finding: Finding) {
        if self.out.findings.len() < FINDINGS_MAX {
            self.out.findings.push(finding);
        }
    }

    fn wrong(&mut self, ino: u64, detail: impl ToString) {
        self.find(Finding::new(format!("inode {ino}"), detail));
    }

    fn cell(&mut self, ino: Ino) -> &mut Cell {
        self.cells.entry(ino.0).or_default()
    }

    fn key(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let named = key::parse(key).ok_or_else(|| Error::corrupt(TREE, "holds a key of no known form"))?;
        let ino = match named {
            KeyRef::Orphan(_) => 0,
            KeyRef::Inode(ino) | KeyRef::Xattr { ino, .. } | KeyRef::Extent { ino, .. } => ino.0,
            KeyRef::Dirent { dir, .. } | KeyRef::Entry { dir, .. } => dir.0,
        };
        if ino != self.now.ino {
            self.leave();
            self.now = Current { ino, ..Current::default() };
        }
        match named {
            KeyRef::Orphan(_) => decode_orphan(value)?,
            KeyRef::Inode(ino) => self.inode(ino, Inode::decode(value)?),
            KeyRef::Dirent { dir, name } => {
                let dirent = Dirent::decode(value)?;
                add(&mut self.now.by_name, dirent.entry, dirent.ino, dirent.kind, name);
                self.name(dir, dirent.ino, dirent.kind);
            }
            KeyRef::Entry { id, .. } => {
                let entry = Entry::decode(value)?;
                add(&mut self.now.by_id, id, entry.ino, entry.kind, entry.name);
                if let Some(Body::Directory { next_entry, .. }) =
                    self.now.inode.as_ref().map(|inode| &inode.body)
                    && id >= *next_entry
                {
                    self.wrong(ino, format!("holds entry {id}, which its counter would give out again"));
                }
            }
            KeyRef::Xattr { .. } => {
                decode_xattr(value)?;
                self.now.xattrs += 1;
            }
            KeyRef::Extent { ino, off } => self.extent(ino, off, &Extent::decode(value)?)?,
        }
        Ok(())
    }

    fn inode(&mut self, ino: Ino, inode: Inode) {
        self.out.inodes += 1;
        let is_directory = inode.kind() == FileType::Directory;
        // A directory is named by its own `.` too; the root by nobody else, so its `..` stands for a name.
        let own = if inode.nlink == 0 { 0 } else { i64::from(is_directory) + i64::from(ino == Ino::ROOT) };
        let cell = self.cell(ino);
        cell.balance += own - i64::from(inode.nlink);
        cell.kind = inode.kind() as u8;
        if let Body::Directory { parent, .. } = inode.body {
            self.parents.insert(ino, parent);
        }
        self.now.inode = Some(inode);
    }

    /// A name of `ino` was met in `dir`.
    fn name(&mut self, dir: Ino, ino: Ino, kind: FileType) {
        let cell = self.cell(ino);
        cell.balance += 1;
        cell.named_as = kind as u8;
        if kind == FileType::Directory {
            self.cell(dir).balance += 1;
            self.named_in.insert(ino, dir);
        }
    }

    fn extent(&mut self, ino: Ino, off: u64, extent: &Extent<'_>) -> Result<()> {
        self.now.overlap |= off < self.now.end;
        self.now.gap |= off > self.now.end;
        self.now.end = off.saturating_add(extent.len());
        self.live_bytes = self.live_bytes.saturating_add(extent.len());
        if let Extent::Stored { ptr, from, len } = extent {
            self.out.extents += 1;
            let end = u64::from(*from) + u64::from(*len);
            let detail = match (self.frame)(*ptr) {
                Ok(there) if there >= end => return Ok(()),
                Ok(there) => format!("{there} bytes where {end} are referred to"),
                Err(Error::Corrupt { detail, .. }) => detail,
                Err(e) => Finding::from_error(e, TREE)?.detail,
            };
            self.damaged_files.insert(ino);
            let object = crate::log::segment::segment_name(ptr.seq);
            self.find(Finding::new(object, format!("holds bytes {off} and on of inode {}: {detail}", ino.0)));
        }
        Ok(())
    }

    /// All keys of an inode have been seen.
    fn leave(&mut self) {
        let now = std::mem::take(&mut self.now);
        if now.ino == 0 {
            return;
        }
        let Some(inode) = now.inode else {
            return self.wrong(now.ino, "has parts, but is not there itself");
        };
        if now.by_name != now.by_id {
            self.wrong(now.ino, "its names by name and by id do not agree");
        }
        match inode.body {
            Body::Directory { entries, .. } if entries != now.by_id.0 => {
                self.wrong(now.ino, format!("says it has {entries} entries, and has {}", now.by_id.0));
            }
            Body::Directory { .. } => {}
            _ if now.by_id.0 + now.by_name.0 > 0 => self.wrong(now.ino, "has entries, but is no directory"),
            _ => {}
        }
        if inode.kind() != FileType::Regular && now.end > 0 {
            self.wrong(now.ino, "has contents, but is no regular file");
        }
        if inode.kind() == FileType::Regular {
            let holes = now.gap || now.end < inode.size;
            if now.overlap || now.end > inode.size {
                self.wrong(now.ino, "its pieces lie over each other, or beyond its end");
            } else if holes && inode.flags & SPARSE == 0 {
                self.wrong(now.ino, "has a hole, and says that it has none");
            }
        }
        if now.xattrs > 0 && inode.flags & crate::tree::value::HAS_XATTR == 0 {
            self.wrong(now.ino, "has extended attributes, and says that it has none");
        }
    }

    /// What only the whole tree shows.
    fn balance(&mut self, counters: Counters) {
        let cells = std::mem::take(&mut self.cells);
        for (ino, cell) in &cells {
            if cell.kind == 0 {
                self.wrong(*ino, "has a name, but is not there");
            } else if cell.balance != 0 {
                self.wrong(
                    *ino,
                    format!("its link count differs by {} from the names it has", -cell.balance),
                );
            } else if cell.named_as != 0 && cell.named_as != cell.kind {
                self.wrong(*ino, "is of another type than its name says");
            }
        }
        let parents = std::mem::take(&mut self.parents);
        let named_in = std::mem::take(&mut self.named_in);
        let mut rooted = HashSet::from([Ino::ROOT]);
        for (ino, parent) in &parents {
            if *ino != Ino::ROOT && named_in.get(ino).is_some_and(|dir| dir != parent) {
                self.wrong(ino.0, format!("says it lies in inode {}, and has its name elsewhere", parent.0));
            }
            let (mut way, mut at) = (Vec::new(), *ino);
            while !rooted.contains(&at) && way.len() <= parents.len() {
                way.push(at);
                match parents.get(&at) {
                    Some(parent) => at = *parent,
                    None => break,
                }
            }
            if rooted.contains(&at) {
                rooted.extend(way);
            } else if cells.get(&ino.0).is_some_and(|cell| cell.named_as != 0) {
                self.wrong(ino.0, "cannot be reached from the root");
            }
        }
        let greatest = cells.keys().next_back().copied().unwrap_or(0);
        let wrong = [
            (
                counters.inodes != self.out.inodes,
                format!("{} inodes, and {} are there", counters.inodes, self.out.inodes),
            ),
            (
                counters.live_bytes != self.live_bytes,
                format!("{} bytes, and {} are there", counters.live_bytes, self.live_bytes),
            ),
            (
                counters.next_ino <= greatest,
                format!("the next inode is {}, and {greatest} is there", counters.next_ino),
            ),
        ];
        for (_, what) in wrong.into_iter().filter(|(wrong, _)| *wrong && !cells.is_empty()) {
            self.find(Finding::new(TREE, format!("its counters say {what}")));
        }
    }

    /// Says under which path the files lie whose contents are damaged.
    fn name_files(&mut self, levels: &Levels<'_>, fetch: Fetch<'_>) {
        let files: Vec<Ino> = self.damaged_files.iter().copied().take(NAMED_MAX).collect();
        let named = Names::new(levels, fetch).of_files(files, []);
        // Where names cannot be read that is a finding already.
        for (ino, path) in named.into_iter().flatten() {
            self.find(Finding::new(format!("inode {}", ino.0), format!("damaged: it is {}", shown(&path))));
        }
    }
}

/// Takes a name into a sum that does not depend on the order.
fn add(sum: &mut (u64, u128), id: u64, ino: Ino, kind: FileType, name: &[u8]) {
    let bytes = [&id.to_le_bytes(), &ino.0.to_le_bytes(), &[kind as u8][..], name].concat();
    let hash = crypto::hash(&bytes);
    let half = hash.0.first_chunk::<16>().copied().unwrap_or_default();
    sum.0 += 1;
    sum.1 = sum.1.wrapping_add(u128::from_le_bytes(half));
}

#[cfg(test)]
mod tests;
