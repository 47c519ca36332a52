//! From inodes to paths: an inode does not know its names, so they are looked for where they can be.
//! Invariant: a path is one that leads to the inode in the state that is looked at; bytes that are no plain text are
//! shown so that two paths never look alike.

use crate::log::{Error, Result};
use crate::tree::key::{self, KeyRef};
use crate::tree::value::{Body, Dirent, Entry, FileType, Inode};
use crate::tree::{Levels, Value};
use crate::types::{FramePtr, Ino};
use std::collections::{HashMap, HashSet};

/// Brings frames to this host.
pub type Fetch<'a> = &'a dyn Fn(&[FramePtr]) -> Result<()>;

/// A directory's file has mostly a number not much greater than its own: so many numbers, and keys, are looked through
/// for a directory before all of them are.
const NEAR: u64 = 1024;
const NEAR_KEYS: usize = 4096;
/// Entries of a directory read at once.
const BATCH: usize = 1024;
/// A path of more directories is a circle, which only damage can make.
const DEPTH_MAX: usize = 1 << 16;

/// Asks until nothing is missing any more.
pub fn fetching<T>(fetch: Fetch<'_>, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match ask() {
            Err(Error::Missing(ptrs)) => fetch(&ptrs)?,
            done => return done,
        }
    }
}

/// The paths of one state of a volume.
pub struct Names<'a> {
    levels: &'a Levels<'a>,
    fetch: Fetch<'a>,
    directories: HashMap<Ino, Vec<u8>>,
    /// Names of the directories in a directory, once it was looked through.
    children: HashMap<Ino, HashMap<Ino, Vec<u8>>>,
}

impl<'a> Names<'a> {
    /// Nothing known yet.
    pub fn new(levels: &'a Levels<'a>, fetch: Fetch<'a>) -> Names<'a> {
        Names { levels, fetch, directories: HashMap::new(), children: HashMap::new() }
    }

    /// The inode, if there is one of that number.
    pub fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        let value = fetching(self.fetch, || self.levels.get(&key::inode(ino)))?;
        value.map(|value| Inode::decode(&value)).transpose()
    }

    /// The inode that a plain path leads to, if it leads anywhere.
    pub fn find(&self, path: &[u8]) -> Result<Option<Ino>> {
        let mut at = Ino::ROOT;
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
            match fetching(self.fetch, || self.levels.get(&key::dirent(at, name)))? {
                Some(value) => at = Dirent::decode(&value)?.ino,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// The path of `name` in directory `dir`, without a slash at its beginning.
    pub fn path(&mut self, dir: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let mut path = self.directory(dir)?;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Ok(path)
    }

    /// The path of a directory; empty for the root.
    pub fn directory(&mut self, dir: Ino) -> Result<Vec<u8>> {
        let (mut at, mut above) = (dir, Vec::new());
        while at != Ino::ROOT && !self.directories.contains_key(&at) {
            let parent = match self.inode(at)?.map(|inode| inode.body) {
                Some(Body::Directory { parent, .. }) if above.len() < DEPTH_MAX => parent,
                _ => {
                    return Err(Error::corrupt(format!("inode {}", at.0), "is no directory that has a path"));
                }
            };
            above.push((at, parent));
            at = parent;
        }
        let mut path = self.directories.get(&at).cloned().unwrap_or_default();
        for (ino, parent) in above.into_iter().rev() {
            let name = self.name_in(parent, ino)?.ok_or_else(|| {
                Error::corrupt(format!("directory {}", parent.0), format!("has no name for inode {}", ino.0))
            })?;
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            self.directories.insert(ino, path.clone());
        }
        Ok(path)
    }

    fn name_in(&mut self, parent: Ino, child: Ino) -> Result<Option<Vec<u8>>> {
        if !self.children.contains_key(&parent) {
            let mut found = HashMap::new();
            self.entries(parent, &mut |entry| {
                if entry.kind == FileType::Directory {
                    found.insert(entry.ino, entry.name.to_vec());
                }
                true
            })?;
            self.children.insert(parent, found);
        }
        Ok(self.children.get(&parent).and_then(|names| names.get(&child)).cloned())
    }

    /// Calls `each` with the entries of a directory until it says false.
    fn entries(&self, dir: Ino, each: &mut dyn FnMut(&Entry<'_>) -> bool) -> Result<()> {
        let mut range = key::entries_after(dir, 0);
        loop {
            let batch = fetching(self.fetch, || self.levels.range(&range.start, &range.end, BATCH))?;
            let Some((last, _)) = batch.last() else { return Ok(()) };
            range.start.clone_from(last);
            range.start.push(0);
            for (_, value) in &batch {
                if !each(&Entry::decode(value)?) {
                    return Ok(());
                }
            }
        }
    }

    /// One path for each of `files` that has a name: first looked for near to them and in `likely` directories, then
    /// everywhere.
    pub fn of_files(
        &mut self,
        files: impl IntoIterator<Item = Ino>,
        likely: impl IntoIterator<Item = Ino>,
    ) -> Result<HashMap<Ino, Vec<u8>>> {
        let mut search =
            Search { left: files.into_iter().collect(), found: Vec::new(), seen: HashSet::new() };
        for dir in likely {
            search.look(self, dir)?;
        }
        let mut numbers: Vec<Ino> = search.left.iter().copied().collect();
        numbers.sort_unstable();
        for ino in numbers {
            if !search.left.contains(&ino) {
                continue;
            }
            for dir in self.directories_near(ino)? {
                search.look(self, dir)?;
                if !search.left.contains(&ino) {
                    break;
                }
            }
        }
        let mut todo = vec![Ino::ROOT];
        while let Some(dir) = todo.pop().filter(|_| !search.left.is_empty()) {
            let mut below = Vec::new();
            self.entries(dir, &mut |entry| {
                if entry.kind == FileType::Directory {
                    below.push(entry.ino);
                }
                true
            })?;
            search.look(self, dir)?;
            todo.extend(below);
        }
        search.found.into_iter().map(|(ino, dir, name)| Ok((ino, self.path(dir, &name)?))).collect()
    }

    /// The directories whose numbers are a little less than this one, the nearest first.
    fn directories_near(&self, ino: Ino) -> Result<Vec<Ino>> {
        let from = key::inode(Ino(ino.0.saturating_sub(NEAR).max(Ino::ROOT.0)));
        let keys = fetching(self.fetch, || self.levels.range(&from, &key::inode(ino), NEAR_KEYS))?;
        let directory = |(key, value): &(Vec<u8>, Value)| match key::parse(key) {
            Some(KeyRef::Inode(ino))
                if Inode::decode(value).is_ok_and(|i| i.kind() == FileType::Directory) =>
            {
                Some(ino)
            }
            _ => None,
        };
        Ok(keys.iter().rev().filter_map(directory).collect())
    }
}

/// Looks for the names of some inodes.
struct Search {
    left: HashSet<Ino>,
    found: Vec<(Ino, Ino, Vec<u8>)>,
    seen: HashSet<Ino>,
}

impl Search {
    fn look(&mut self, names: &Names<'_>, dir: Ino) -> Result<()> {
        if self.left.is_empty() || !self.seen.insert(dir) {
            return Ok(());
        }
        names.entries(dir, &mut |entry| {
            if self.left.remove(&entry.ino) {
                self.found.push((entry.ino, dir, entry.name.to_vec()));
            }
            !self.left.is_empty()
        })
    }
}

/// A path for people and for JSON: what is no printable text is written as `\xNN`, and a backslash as two.
pub fn shown(path: &[u8]) -> String {
    let out = escaped(path, &|c| c == '\\' || c.is_control());
    if out.is_empty() { ".".into() } else { out }
}

/// Words for people that may hold what another host, a store or a name says, as part of one line: nothing in them ends
/// the line or speaks to the terminal. Unlike [`shown`] it leaves a backslash, for paths in the words may be shown
/// already, and what it has been through it does not change again.
pub fn told(words: &str) -> String {
    escaped(words.as_bytes(), &is_unsafe)
}

/// JSON as a terminal may see it. The text has such characters only within strings, where `\u` means the same.
pub fn json_told(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push(c), // between the values
            c if is_unsafe(c) => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// Control characters, what ends a line, and what turns the direction of reading, so that words stand in another order
/// than they are said. All are below U+10000.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &[u8], escape: &dyn Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' if escape(c) => out.push_str("\\\\"),
                c if escape(c) => c.to_string().bytes().for_each(|b| out.push_str(&format!("\\x{b:02x}"))),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|b| out.push_str(&format!("\\x{b:02x}")));
    }
    out
}

/// True if `path` is `top` or lies below it; everything lies below an empty one.
pub fn is_within(path: &[u8], top: &[u8]) -> bool {
    top.is_empty() || path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// A path as the user gives it, without slashes at its ends and without empty or `.` parts.
pub fn plain_path(path: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let parts: Vec<&[u8]> =
        path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    match parts.contains(&b"..".as_slice()) {
        true => Err(format!("'{}' holds '..': give the path from the volume's root", shown(path))),
        false => Ok(parts.join(&b'/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_shown_so_that_no_two_look_alike() {
        assert_eq!(shown(b"a\\x0a"), "a\\\\x0a");
        assert_eq!(shown(b"a\n\xff"), "a\\x0a\\xff");
        assert_eq!(shown(b""), ".");
    }

    #[test]
    fn words_of_others_stay_one_line_and_do_not_speak_to_the_terminal() {
        let words = "fire\x1b[31m\x1b]0;pwn\x07\nline2 \u{9b}2J \u{202e}c\\x0a \u{e4}";
        let told_once = told(words);
        assert_eq!(
            told_once,
            "fire\\x1b[31m\\x1b]0;pwn\\x07\\x0aline2 \\xc2\\x9b2J \\xe2\\x80\\xaec\\x0a \u{e4}"
        );
        assert_eq!(told(&told_once), told_once);
    }

    #[test]
    fn json_for_a_terminal_means_the_same() {
        let text = serde_json::to_string_pretty(&vec!["\x1b\n\u{7f}\u{9b}\u{2028}\u{e4}"]).expect("JSON");
        let told = json_told(&text);
        assert!(told.contains("\\u009b\\u2028\u{e4}") && !told.contains(['\u{7f}', '\u{9b}']), "{told}");
        let back: Vec<String> = serde_json::from_str(&told).expect("JSON");
        assert_eq!(back, ["\x1b\n\u{7f}\u{9b}\u{2028}\u{e4}"]);
    }

    #[test]
    fn a_path_lies_within_another_at_whole_names_only() {
        assert!(is_within(b"a/b", b"a") && is_within(b"a", b"a") && is_within(b"x", b""));
        assert!(!is_within(b"ab", b"a"));
        assert_eq!(plain_path(b"/a//./b/"), Ok(b"a/b".to_vec()));
        assert!(plain_path(b"a/../b").is_err());
    }
}
