//! A disk that does its worst.
//! Invariant: what was synced stays; what was not may be there after a power cut, or not, or in part, in any order. The
//! fault model:
//!
//! - **Data**: what a file was told since its last sync survives a power cut sector by sector (512 bytes), each write on
//!   its own, in any order; a sector is as it was at some moment, and a size without its data reads as zeros, or, in the
//!   block that a length was cut in, as what lay there.
//! - **Names**: what a directory was told since its last sync survives up to some point in its order; a rename happens
//!   whole or not at all, also between two directories.
//! - **Failing sync**: says `EIO` once. What it should have made durable is durable in part or not at all, and stays
//!   readable, and the next sync knows nothing of it (as Linux does it).
//! - **Past the cache**: a write is refused now and then, which may leave a part of it; reads of some files are always.
//! - **No room**: for a while writes take some bytes or none, with `ENOSPC`.
//! - **Bit rot**: at a restart one bit of one file is another.
//! - **Power cut**: at any call. From then on every call fails, and what is left is what [`SimDisk::after`] gives.
//! - **Kill**: the process ends, the disk stays as it is seen, durable or not.
//!
//! It also watches what the log writes: no two files share a salt, and no byte of a segment is sealed twice.

#[path = "disk_file.rs"]
mod file;

use super::chance::Chance;
use super::common::World;
use super::nonces::Nonces;
use super::threads::Turns;
use embassyfs::clock::Clock;
use embassyfs::disk::{Disk, DiskFile, Lock, Mode};
use file::SimFile;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SECTOR: u64 = 512;
/// What a file system allocates at once.
const BLOCK: usize = 4096;
/// Free room when there is no want of it.
const ROOM: u64 = 1 << 40;

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Len(u64),
    Punch(Range<u64>),
}

/// A file, as it is seen, as it is on the disk, and what lies between.
#[derive(Clone, Debug, Default)]
struct Node {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Make(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

#[derive(Clone, Default)]
struct State {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<NameChange>,
    dirs: BTreeSet<PathBuf>,
    locked: bool,
    /// Calls until the power is cut; `None`: it is not.
    cut_in: Option<u64>,
    down: bool,
    full_until: Duration,
    sync_fails: bool,
    /// What is left after the power cut.
    left: Option<Box<State>>,
}

/// See the module. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    root: PathBuf,
    state: Arc<Mutex<State>>,
    chance: Chance,
    clock: Arc<dyn Clock>,
    /// None: nobody rests at its calls.
    turns: Option<Turns>,
    nonces: Nonces,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimDisk")
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let (at, end) = (*at as usize, *at as usize + data.len());
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at..end].copy_from_slice(data);
        }
        Change::Len(len) => bytes.resize(*len as usize, 0),
        Change::Punch(range) => {
            let end = (range.end as usize).min(bytes.len());
            let start = (range.start as usize).min(end);
            bytes[start..end].fill(0);
        }
    }
}

fn rename_in(names: &mut BTreeMap<PathBuf, u64>, change: &NameChange) {
    match change {
        NameChange::Make(path, node) => drop(names.insert(path.clone(), *node)),
        NameChange::Remove(path) => drop(names.remove(path)),
        NameChange::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
    }
}

fn directories(change: &NameChange) -> Vec<&Path> {
    let paths = match change {
        NameChange::Make(path, _) | NameChange::Remove(path) => vec![path],
        NameChange::Rename(from, to) => vec![from, to],
    };
    paths.into_iter().filter_map(|path| path.parent()).collect()
}

/// What a file had behind a length that it was cut to: until the next sync it can come back, within the block that the
/// length lies in, with a size that grows over it.
#[derive(Default)]
struct Cut {
    at: usize,
    bytes: Vec<u8>,
}

impl Cut {
    fn by(change: &Change, bytes: &[u8]) -> Cut {
        let Change::Len(len) = change else { return Cut::default() };
        let at = *len as usize;
        let end = at.next_multiple_of(BLOCK).min(bytes.len());
        Cut { at, bytes: bytes.get(at..end).unwrap_or_default().to_vec() }
    }

    fn grow(&self, bytes: &mut Vec<u8>, to: u64) {
        let from = bytes.len();
        bytes.resize(from.max(to as usize), 0);
        for (i, byte) in bytes.iter_mut().enumerate().skip(from) {
            *byte = i.checked_sub(self.at).and_then(|i| self.bytes.get(i)).copied().unwrap_or(0);
        }
    }
}

impl Node {
    /// What a power cut leaves of it.
    fn torn(&self, chance: &Chance) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        // Mostly all of one kind, as disks are: all kept, none, or a mixture.
        let kept = [0, 1000, 500, 900][chance.below(4) as usize];
        // A sector is as it was at some moment: with what it was told until then.
        let mut old: BTreeSet<u64> = BTreeSet::new();
        let mut whole = true;
        let mut cut = Cut::default();
        for change in &self.pending {
            match change {
                Change::Write(at, data) => {
                    let end = at + data.len() as u64;
                    let mut from = *at;
                    while from < end {
                        let sector = from / SECTOR;
                        let to = ((sector + 1) * SECTOR).min(end);
                        if whole && !old.contains(&sector) && chance.per_mille(kept) {
                            let part = data[(from - at) as usize..(to - at) as usize].to_vec();
                            cut.grow(&mut bytes, from);
                            apply(&mut bytes, &Change::Write(from, part));
                        } else {
                            old.insert(sector);
                            if whole && bytes.len() < to as usize && chance.per_mille(kept) {
                                cut.grow(&mut bytes, to); // the size without the data
                            }
                        }
                        from = to;
                    }
                }
                other if whole && chance.per_mille(kept) => {
                    cut = Cut::by(other, &bytes);
                    apply(&mut bytes, other);
                }
                // A new length that did not come: nothing that came after it either.
                _ => whole = false,
            }
        }
        bytes
    }
}

impl State {
    fn turn(&mut self, rot: Rot, from: u8, to: u8) {
        if let Some(file) = self.nodes.get_mut(&rot.node) {
            for bytes in [&mut file.seen, &mut file.durable] {
                bytes.get_mut(rot.at).filter(|byte| **byte == from).into_iter().for_each(|byte| *byte = to);
            }
        }
    }

    /// What a power cut leaves.
    fn torn(&self, chance: &Chance) -> State {
        let mut names = self.durable_names.clone();
        let mut stopped: BTreeSet<PathBuf> = BTreeSet::new();
        let stop = [0, 1000, 200][chance.below(3) as usize];
        for change in &self.pending_names {
            let dirs = directories(change);
            if dirs.iter().any(|dir| stopped.contains(*dir)) || chance.per_mille(stop) {
                stopped.extend(dirs.into_iter().map(Path::to_owned));
            } else {
                rename_in(&mut names, change);
            }
        }
        let nodes: BTreeMap<u64, Node> = names
            .values()
            .map(|node| {
                let bytes = self.nodes[node].torn(chance);
                (*node, Node { seen: bytes.clone(), durable: bytes, pending: Vec::new() })
            })
            .collect();
        State {
            nodes,
            next: self.next,
            durable_names: names.clone(),
            names,
            dirs: self.dirs.clone(),
            ..State::default()
        }
    }
}

/// One bit that turned.
#[derive(Clone, Copy, Debug)]
pub struct Rot {
    node: u64,
    at: usize,
    good: u8,
    bad: u8,
}

impl SimDisk {
    pub fn new(root: &Path, world: &World) -> SimDisk {
        let state = Arc::new(Mutex::new(State::default()));
        let (clock, chance) = (world.clock.clone(), world.chance.clone());
        SimDisk {
            root: root.to_owned(),
            state,
            chance,
            clock,
            turns: Some(world.turns.clone()),
            nonces: world.nonces.clone(),
        }
    }

    /// For a task of the runtime: whichever thread drives it must not rest in the middle of it.
    pub fn without_rests(self) -> SimDisk {
        SimDisk { turns: None, ..self }
    }

    /// The power is cut at one of the next `calls` calls that change anything.
    pub fn cut_within(&self, calls: u64) {
        self.state.lock().unwrap().cut_in = Some(self.chance.below(calls));
    }

    pub fn cut_now(&self) {
        self.cut(&mut self.state.lock().unwrap());
    }

    pub fn is_down(&self) -> bool {
        self.state.lock().unwrap().down
    }

    /// There is no room for so long.
    pub fn fill(&self, time: Duration) {
        self.state.lock().unwrap().full_until = self.clock.monotonic() + time;
    }

    fn full(&self, state: &State) -> bool {
        self.clock.monotonic() < state.full_until
    }

    pub fn fail_next_sync(&self) {
        self.state.lock().unwrap().sync_fails = true;
    }

    fn cut(&self, state: &mut State) {
        if !state.down {
            state.left = Some(Box::new(state.torn(&self.chance)));
            state.down = true;
            self.chance.fault("power cut");
            self.chance.event("power cut", &[]);
        }
    }

    /// The disk that the next process finds: after a power cut what it left, else the same one. The old process reaches
    /// it no more.
    pub fn after(&self) -> SimDisk {
        let mut state = self.state.lock().unwrap();
        let left = match state.left.take() {
            Some(left) => *left,
            None => {
                state.down = true;
                State { down: false, cut_in: None, locked: false, sync_fails: false, ..state.clone() }
            }
        };
        SimDisk { state: Arc::new(Mutex::new(left)), ..self.clone() }
    }

    /// Flips a bit of a file; says what it was. Not in the newest segment: what no later commit vouches for cannot be told
    /// from a torn tail.
    pub fn rot(&self) -> Option<Rot> {
        let mut state = self.state.lock().unwrap();
        let newest = state.names.keys().filter(|path| in_log(path)).max().cloned();
        let files: Vec<(PathBuf, u64)> = state
            .names
            .iter()
            .filter(|(path, _)| Some(*path) != newest.as_ref())
            .filter(|(path, node)| !path.ends_with("lock") && !state.nodes[node].seen.is_empty())
            .map(|(path, node)| (path.clone(), *node))
            .collect();
        let (path, node) = files.get(self.chance.below(files.len().max(1) as u64) as usize)?.clone();
        let at = self.chance.below(state.nodes[&node].seen.len() as u64) as usize;
        let good = state.nodes[&node].seen[at];
        let rot = Rot { node, at, good, bad: good ^ (1 << self.chance.below(8)) };
        self.chance.event("bit rot", path.strip_prefix(&self.root).ok()?.as_os_str().as_encoded_bytes());
        state.turn(rot, rot.good, rot.bad);
        Some(rot)
    }

    /// What an operator would do: the file back from where it is whole.
    pub fn mend(&self, rot: Rot) {
        self.state.lock().unwrap().turn(rot, rot.bad, rot.good);
    }

    /// A call that changes something: told, and perhaps the last.
    fn call(&self, what: &str, path: &Path, bytes: &[u8]) -> io::Result<std::sync::MutexGuard<'_, State>> {
        if let Some(turns) = self.turns.as_ref().filter(|_| in_log(path) && matches!(what, "write" | "sync"))
        {
            turns.rest_locked();
        }
        let mut state = self.state.lock().unwrap();
        let shown = path.strip_prefix(&self.root).unwrap_or(path).display().to_string();
        // The reason of a fence names the directory, which is another one in each run.
        self.chance.event(&format!("{what} {shown}"), if shown.starts_with("fenced") { &[] } else { bytes });
        match &mut state.cut_in {
            Some(0) => self.cut(&mut state),
            Some(left) => *left -= 1,
            None => {}
        }
        self.up(&state)?;
        Ok(state)
    }

    fn up(&self, state: &State) -> io::Result<()> {
        if state.down { Err(io::Error::other("the machine is down")) } else { Ok(()) }
    }

    fn look(&self) -> io::Result<std::sync::MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap();
        self.up(&state)?;
        Ok(state)
    }
}

fn in_log(path: &Path) -> bool {
    path.parent().is_some_and(|dir| dir.ends_with("log"))
}

fn missing() -> io::Error {
    ErrorKind::NotFound.into()
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: Mode) -> io::Result<Arc<dyn DiskFile>> {
        let held = self.look()?.names.get(path).copied();
        let node = match (held, mode) {
            (Some(_), Mode::CreateNew) => return Err(ErrorKind::AlreadyExists.into()),
            (Some(node), Mode::Replace) => {
                let mut state = self.call("truncate", path, &[])?;
                let file = state.nodes.get_mut(&node).ok_or_else(missing)?;
                file.seen.clear();
                file.pending.push(Change::Len(0));
                node
            }
            (Some(node), _) => node,
            (None, Mode::Read | Mode::Write | Mode::Direct | Mode::ReadDirect) => return Err(missing()),
            (None, _) => {
                let mut state = self.call("create", path, &[])?;
                if !path.parent().is_some_and(|dir| state.dirs.contains(dir)) {
                    return Err(missing());
                }
                if self.full(&state) {
                    return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                }
                let node = state.next;
                state.next += 1;
                state.nodes.insert(node, Node::default());
                state.names.insert(path.to_owned(), node);
                state.pending_names.push(NameChange::Make(path.to_owned(), node));
                node
            }
        };
        if mode == Mode::ReadDirect && node.is_multiple_of(5) {
            self.chance.fault("refused read past the cache");
            return Err(ErrorKind::InvalidInput.into());
        }
        Ok(Arc::new(SimFile { disk: self.clone(), node, path: path.to_owned(), mode }))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        let mut state = self.look()?;
        // Directories are durable at once: the log makes none that it could not do without.
        state.dirs.extend(path.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.call("rename", from, to.file_name().unwrap_or_default().as_encoded_bytes())?;
        if !state.names.contains_key(from) {
            return Err(missing());
        }
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        rename_in(&mut state.names, &change);
        state.pending_names.push(change);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.call("remove", path, &[])?;
        state.names.remove(path).ok_or_else(missing)?;
        state.pending_names.push(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.look()?;
        let below = state.names.keys().chain(&state.dirs).filter(|path| path.parent() == Some(dir));
        Ok(below.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        let state = self.look()?;
        let node = state.names.get(path).ok_or_else(missing)?;
        Ok(state.nodes[node].seen.len() as u64)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.call("sync of a directory", dir, &[])?;
        let pending = std::mem::take(&mut state.pending_names);
        // What moves in or out of it goes with it, and what stood before that in the other directory.
        let mut durable: BTreeSet<PathBuf> = BTreeSet::from([dir.to_owned()]);
        for change in pending.iter().rev() {
            let dirs = directories(change);
            if dirs.iter().any(|dir| durable.contains(*dir)) {
                durable.extend(dirs.into_iter().map(Path::to_owned));
            }
        }
        for change in pending {
            if directories(&change).iter().any(|dir| durable.contains(*dir)) {
                rename_in(&mut state.durable_names, &change);
            } else {
                state.pending_names.push(change);
            }
        }
        Ok(())
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(if self.full(&*self.look()?) { 0 } else { ROOM })
    }

    fn lock(&self, _: &Path) -> io::Result<Result<Box<dyn Lock>, String>> {
        let mut state = self.look()?;
        if state.locked {
            return Ok(Err("another".into()));
        }
        state.locked = true;
        Ok(Ok(Box::new(SimLock(self.clone()))))
    }

    fn is_real(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct SimLock(SimDisk);

impl Lock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().locked = false;
    }
}
