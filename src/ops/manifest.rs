//! Manifests: what a version of a volume holds, a line for each path, and the writer's signature at the end.
//! Invariant: no line is given out before all of them were held against what was signed; memory does not follow the
//! number of lines. Bytes: `docs/format.md`, "Manifest".

use super::newfile::NewFile;
use super::receipt::{Holds, Manifest, Untrue, believe};
use super::signed::Kind;
use super::walk::{Entry, order};
use crate::crypto::Hasher;
use crate::crypto::sign::PublicKey;
use crate::types::{Hash, Timestamp, unhex};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Take, Write};
use std::path::Path;

/// The first line.
const OPENING: &str = "embassyfs manifest 1\n";
/// The signed end is shorter.
const END_MAX: u64 = 64 << 10;
/// No line is longer: a path of 4095 bytes, each shown as four, and the numbers.
const LINE_MAX: u64 = 64 << 10;

/// Writes the lines of a manifest.
pub struct Writer {
    out: BufWriter<NewFile>,
    hasher: Hasher,
    /// What was written so far.
    pub holds: Holds,
}

impl Writer {
    /// Begins a file that is there when it is finished.
    pub fn begin(path: &Path, source: &str) -> io::Result<Writer> {
        let out = BufWriter::with_capacity(1 << 20, NewFile::begin(path)?);
        let holds = Holds { source: source.into(), ..Holds::default() };
        let mut writer = Writer { out, hasher: Hasher::default(), holds };
        writer.text(OPENING)?;
        Ok(writer)
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        self.hasher.update(text.as_bytes());
        self.out.write_all(text.as_bytes())
    }

    /// Adds an entry; they come in the order of [`order`].
    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        self.holds.entries += 1;
        if entry.kind == 'f' {
            self.holds.files += 1;
            self.holds.bytes += entry.size;
        }
        self.text(&line(entry))
    }

    /// Ends the lines; what they hold is to be signed.
    pub fn lines_end(&mut self) -> &Holds {
        self.holds.blake3 = self.hasher.finish().to_string();
        &self.holds
    }

    /// Adds the signed end; durable when this returns.
    pub fn finish(mut self, signed: &str) -> io::Result<()> {
        self.out.write_all(signed.as_bytes())?;
        self.out.into_inner().map_err(io::IntoInnerError::into_error)?.finish()
    }
}

fn line(entry: &Entry) -> String {
    let hash = |hash: Option<Hash>| hash.map_or_else(|| "-".into(), |hash| hash.to_string());
    let Entry { kind, mode, uid, gid, size, mtime, path, .. } = entry;
    let (secs, nanos) = (mtime.secs, mtime.nanos);
    let (content, xattrs) = (hash(entry.hash), hash(entry.xattrs));
    format!("{kind} {mode:04o} {uid} {gid} {size} {secs}.{nanos:09} {content} {xattrs} {path}\n")
}

fn parse(line: &str) -> Option<Entry> {
    let mut words = line.splitn(9, ' ');
    let mut word = || words.next();
    let kind = word().filter(|w| w.len() == 1)?.chars().next().filter(|c| "fdlpscb".contains(*c))?;
    let mode = u32::from_str_radix(word()?, 8).ok()?;
    let (uid, gid, size) = (word()?.parse().ok()?, word()?.parse().ok()?, word()?.parse().ok()?);
    let (secs, nanos) = word()?.split_once('.').filter(|(_, nanos)| nanos.len() == 9)?;
    let mtime = Timestamp { secs: secs.parse().ok()?, nanos: nanos.parse().ok()? };
    let hash = |word: &str| match word {
        "-" => Some(None),
        hex => unhex(hex).map(|bytes| Some(Hash(bytes))),
    };
    let (content, xattrs) = (hash(word()?)?, hash(word()?)?);
    Some(Entry { path: word()?.to_string(), kind, mode, uid, gid, size, mtime, hash: content, xattrs })
}

/// Why a manifest is not used.
#[derive(Debug, thiserror::Error)]
pub enum Bad {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its end is not what the writer signed.
    #[error(transparent)]
    Untrue(#[from] Untrue),
    /// Its lines are not those that the writer signed.
    #[error("ALTERED: {0}")]
    Lines(String),
}

/// The lines of a manifest whose signature holds.
pub struct Lines {
    file: BufReader<Take<File>>,
    left: u64,
    last: Option<String>,
}

/// Opens a manifest that the volume's writer signed: its end, and its lines.
pub fn open(path: &Path, key: &PublicKey, volume: Option<&str>) -> Result<(Manifest, Lines), Bad> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let tail = len.min(END_MAX);
    file.seek(SeekFrom::Start(len - tail))?;
    let mut end = Vec::new();
    (&file).take(tail).read_to_end(&mut end)?;
    let mark = format!("\n{}", Kind::Manifest.opening());
    let at = end.windows(mark.len()).rposition(|window| window == mark.as_bytes());
    let at = at.ok_or_else(|| Bad::Lines("this is no manifest, or its signed end was cut off".into()))? + 1;
    let manifest: Manifest = believe(Kind::Manifest, &end[at..], key, volume)?;
    let lines = len - tail + at as u64;
    if hash_of(&mut file, lines)?.to_string() != manifest.holds.blake3 {
        return Err(Bad::Lines("its lines are not those that were signed".into()));
    }
    file.seek(SeekFrom::Start(0))?;
    let mut file = BufReader::with_capacity(1 << 20, file.take(lines));
    let mut first = String::new();
    file.read_line(&mut first)?;
    match first == OPENING {
        true => Ok((manifest.clone(), Lines { file, left: manifest.holds.entries, last: None })),
        false => Err(Bad::Lines("its first line is of another version".into())),
    }
}

fn hash_of(file: &mut File, len: u64) -> io::Result<Hash> {
    file.seek(SeekFrom::Start(0))?;
    let (mut hasher, mut buffer, mut rest) = (Hasher::default(), vec![0; 1 << 20], file.take(len));
    loop {
        match rest.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

impl Lines {
    /// The next entry.
    pub fn entry(&mut self) -> Result<Option<Entry>, Bad> {
        let mut text = String::new();
        (&mut self.file).take(LINE_MAX).read_line(&mut text)?;
        let bad = |why: &str| Bad::Lines(format!("{why}: '{}'", text.trim_end()));
        if text.is_empty() {
            return if self.left == 0 { Ok(None) } else { Err(bad("lines are missing")) };
        }
        let line = text.strip_suffix('\n').and_then(parse).ok_or_else(|| bad("a line that does not read"))?;
        self.left = self.left.checked_sub(1).ok_or_else(|| bad("more lines than it says"))?;
        if self.last.as_ref().is_some_and(|last| order(last, &line.path).is_ge()) {
            return Err(bad("a line out of order"));
        }
        self.last = Some(line.path.clone());
        Ok(Some(line))
    }
}

/// How what is there differs from what should be there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Difference {
    /// The path, as [`super::names::shown`] writes it.
    pub path: String,
    /// `missing`, `extra`, `differs` or `unreadable`.
    pub kind: String,
    /// What differs, or why it is not readable.
    pub detail: String,
}

impl Difference {
    /// A difference of a path.
    pub fn new(path: &str, kind: &str, detail: impl Into<String>) -> Difference {
        Difference { path: path.into(), kind: kind.into(), detail: detail.into() }
    }
}

/// What of two entries of the same path differs, if anything.
pub fn differs(want: &Entry, got: &Entry) -> Option<Difference> {
    let short = |hash: Option<Hash>| hash.map_or_else(|| "none".into(), |h| h.to_string()[..16].to_string());
    let time = |t: Timestamp| format!("{}.{:09}", t.secs, t.nanos);
    let fields = [
        ("kind", want.kind.to_string(), got.kind.to_string()),
        ("mode", format!("{:04o}", want.mode), format!("{:04o}", got.mode)),
        ("owner", want.uid.to_string(), got.uid.to_string()),
        ("group", want.gid.to_string(), got.gid.to_string()),
        ("size", want.size.to_string(), got.size.to_string()),
        ("mtime", time(want.mtime), time(got.mtime)),
        ("content", short(want.hash), short(got.hash)),
        ("attributes", short(want.xattrs), short(got.xattrs)),
    ];
    let different: Vec<String> = fields
        .into_iter()
        .filter(|(_, want, got)| want != got)
        .map(|(name, want, got)| format!("{name} {got} instead of {want}"))
        .collect();
    (!different.is_empty()).then(|| Difference::new(&want.path, "differs", different.join(", ")))
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
