//! Drills: a volume is read elsewhere, held against home's manifest, and what was found is written down and signed.
//! Invariant: a drill that did not get to its end, or met anything that is not as it should be, has not passed; the page
//! for people says nothing that the signed report does not say.

use super::manifest::{Bad, Difference, Lines, differs};
use super::names::told;
use super::status::{CommitPoint, bytes, rfc3339, seconds};
use super::walk::{self, Entry, Unreadable, order};
use crate::types::Timestamp;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// The version of the report.
pub const FORMAT: u32 = 1;
/// Differences that are listed; all are counted.
const LISTED: usize = 1000;
/// Rows of the page.
const SHOWN: usize = 200;

/// How a drill went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Everything was read, and is as home says.
    pub passed: bool,
    /// The volume's name.
    pub name: String,
    /// Its identity, hexadecimal.
    pub volume: String,
    /// The store, without secrets.
    pub store: String,
    /// Where the drill ran.
    pub host: String,
    /// The program's version.
    pub program: String,
    /// The public key of who signs this, hexadecimal.
    pub signed_by: String,
    /// When it began, by this host's clock.
    #[serde(with = "rfc3339")]
    pub began: Timestamp,
    /// When it ended.
    #[serde(with = "rfc3339")]
    pub ended: Timestamp,
    /// What it was held against.
    pub manifest: Against,
    /// The newest commit that was there, and its segment.
    pub newest: Option<CommitPoint>,
    /// See `newest`.
    pub head: Option<String>,
    /// How long it takes until the volume is of use.
    pub rto: Rto,
    /// What would have been lost.
    pub rpo: Rpo,
    /// What was read.
    pub read: ReadTotals,
    /// How many paths differ, by kind.
    pub differences: Counts,
    /// The first thousand of them.
    pub listed: Vec<Difference>,
    /// What else is wrong.
    pub findings: Vec<String>,
}

/// The manifest of a drill.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Against {
    /// Its commit.
    pub commit: CommitPoint,
    /// The newest segment when it was signed.
    pub head: String,
    /// The hash of its lines.
    pub blake3: String,
    /// Its lines.
    pub entries: u64,
    /// `newest` when the newest commit is the manifest's, else `past`: that version was read beside it.
    pub compared: String,
}

/// Milliseconds from the beginning of the drill; none for what was not reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rto {
    /// Until the volume was mounted and its root could be looked at.
    pub mounted_ms: Option<u64>,
    /// Until the first byte of a file was read.
    pub first_byte_ms: Option<u64>,
    /// Until every name had been listed.
    pub find_ms: Option<u64>,
    /// Until every byte had been read and compared.
    pub read_ms: Option<u64>,
}

/// What would have been lost, had home been lost when the drill began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rpo {
    /// Age of the newest commit when the drill began, in milliseconds: two hosts' clocks are compared.
    pub newest_age_ms: Option<i64>,
    /// Commits that the newest is ahead of the manifest's; negative: behind.
    pub commits_ahead: Option<i64>,
    /// Milliseconds that the newest is ahead of the manifest's, by home's clock.
    pub ahead_ms: Option<i64>,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadTotals {
    /// Names listed.
    pub names: u64,
    /// Entries compared.
    pub entries: u64,
    /// Regular files among them.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// How many paths differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// In the manifest, not there.
    pub missing: u64,
    /// There, not in the manifest.
    pub extra: u64,
    /// Not the same.
    pub differs: u64,
    /// Could not be read.
    pub unreadable: u64,
}

/// Milliseconds from one time to another.
pub fn ms_between(from: Timestamp, to: Timestamp) -> i64 {
    let ms = |t: Timestamp| i128::from(t.secs) * 1000 + i128::from(t.nanos / 1_000_000);
    i64::try_from(ms(to) - ms(from)).unwrap_or(i64::MAX)
}

impl Report {
    fn note(&mut self, difference: Difference) {
        match difference.kind.as_str() {
            "missing" => self.differences.missing += 1,
            "extra" => self.differences.extra += 1,
            "differs" => self.differences.differs += 1,
            _ => self.differences.unreadable += 1,
        }
        if self.listed.len() < LISTED {
            self.listed.push(difference);
        }
    }

    /// Whether all of it was done and nothing is wrong.
    pub fn judge(&mut self) {
        let reached = self.rto.read_ms.is_some();
        self.passed = reached && self.findings.is_empty() && self.differences == Counts::default();
    }

    /// Reads everything below `top` and holds it against the lines. An error when it was stopped, or the manifest ends
    /// wrongly.
    pub fn compare(
        &mut self,
        top: &Path,
        lines: &mut Lines,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&ReadTotals),
    ) -> io::Result<()> {
        let next = |lines: &mut Lines| lines.entry().map_err(|e: Bad| io::Error::other(e.to_string()));
        let mut want = next(lines)?;
        walk::read_all(top, stop, &mut |got| {
            let path = match &got {
                Ok(got) => &got.path,
                Err(got) => &got.path,
            };
            while let Some(missing) = want.take_if(|want| order(&want.path, path).is_lt()) {
                self.note(Difference::new(&missing.path, "missing", ""));
                want = next(lines)?;
            }
            let same = want.take_if(|want| want.path == *path);
            if same.is_some() {
                want = next(lines)?;
            }
            self.one(same, got);
            progress(&self.read);
            Ok(())
        })?;
        while let Some(missing) = want {
            self.note(Difference::new(&missing.path, "missing", ""));
            want = next(lines)?;
        }
        Ok(())
    }

    fn one(&mut self, want: Option<Entry>, got: Result<Entry, Unreadable>) {
        match (want, got) {
            (_, Err(e)) => self.note(Difference::new(&e.path, "unreadable", e.why)),
            (want, Ok(got)) => {
                self.read.entries += 1;
                if got.kind == 'f' {
                    self.read.files += 1;
                    self.read.bytes += got.size;
                }
                match want {
                    None => self.note(Difference::new(&got.path, "extra", "")),
                    Some(want) => differs(&want, &got).into_iter().for_each(|found| self.note(found)),
                }
            }
        }
    }

    /// In a few lines. The report may be another host's: what it says stays within its line.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let mut out = format!("{}: {}", self.verdict(), told(&self.name));
        rows.iter().for_each(|(name, value)| out += &format!("\n  {name:<28} {}", told(value)));
        for Difference { kind, path, detail } in self.listed.iter().take(20) {
            out += &format!("\n  {}", told(&format!("{kind} {path}  {detail}")));
        }
        self.findings.iter().for_each(|finding| out += &format!("\n  FOUND {}", told(finding)));
        out
    }

    fn verdict(&self) -> &'static str {
        if self.passed { "PASSED" } else { "NOT PASSED" }
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let took =
            |ms: Option<u64>| ms.map_or_else(|| "not reached".into(), |ms| seconds(ms as f64 / 1000.0));
        let lag = |ms: Option<i64>| ms.map_or_else(|| "not known".into(), |ms| seconds(ms as f64 / 1000.0));
        let commit = |point: &CommitPoint| format!("{} of {}", point.no, rfc3339::text(point.time));
        let counts = &self.differences;
        vec![
            ("volume", self.volume.clone()),
            ("store", self.store.clone()),
            (
                "drill",
                format!("{}, {} to {}", self.host, rfc3339::text(self.began), rfc3339::text(self.ended)),
            ),
            (
                "home's manifest",
                format!("commit {}, {} entries", commit(&self.manifest.commit), self.manifest.entries),
            ),
            ("newest commit there", self.newest.as_ref().map_or_else(|| "none".into(), commit)),
            ("version that was read", self.manifest.compared.clone()),
            ("RTO: mounted after", took(self.rto.mounted_ms)),
            ("RTO: first byte after", took(self.rto.first_byte_ms)),
            ("RTO: all names after", took(self.rto.find_ms)),
            ("RTO: everything read after", took(self.rto.read_ms)),
            ("RPO: age of newest commit", lag(self.rpo.newest_age_ms)),
            (
                "RPO: ahead of the manifest",
                format!("{} commits, {}", self.rpo.commits_ahead.unwrap_or(0), lag(self.rpo.ahead_ms)),
            ),
            (
                "read",
                format!(
                    "{} names, {} entries, {} files, {}",
                    self.read.names,
                    self.read.entries,
                    self.read.files,
                    bytes(self.read.bytes)
                ),
            ),
            (
                "differences",
                format!(
                    "{} missing, {} extra, {} differ, {} unreadable",
                    counts.missing, counts.extra, counts.differs, counts.unreadable
                ),
            ),
            ("signed by", self.signed_by.clone()),
        ]
    }

    /// The page for people; `hash` is that of the signed report's file.
    pub fn page(&self, hash: &str) -> String {
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Drill: {name}</title>\n<style>\n\
             body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}\n\
             table {{ border-collapse: collapse; width: 100% }}\n\
             td, th {{ border-bottom: 1px solid #ccc; padding: .3em .6em; text-align: left; overflow-wrap: anywhere }}\n\
             .verdict {{ padding: .6em 1em; color: #fff; background: {colour} }}\n\
             </style>\n<h1>Drill of {name}</h1>\n<p class=\"verdict\"><b>{verdict}</b></p>\n<table>\n",
            name = escaped(&self.name),
            verdict = self.verdict(),
            colour = if self.passed { "#186a3b" } else { "#a31515" },
        );
        for (name, value) in self.rows() {
            out += &format!("<tr><th>{}<td>{}\n", escaped(name), escaped(&value));
        }
        out += "</table>\n";
        if !self.findings.is_empty() {
            out += "<h2>Found</h2>\n<ul>\n";
            self.findings.iter().for_each(|finding| out += &format!("<li>{}\n", escaped(finding)));
            out += "</ul>\n";
        }
        if !self.listed.is_empty() {
            out += "<h2>Differences</h2>\n<table>\n<tr><th>path<th>what<th>detail\n";
            for Difference { path, kind, detail } in self.listed.iter().take(SHOWN) {
                let [path, kind, detail] = [path, kind, detail].map(|text| escaped(text));
                out += &format!("<tr><td>{path}<td>{kind}<td>{detail}\n");
            }
            out += "</table>\n";
            if self.listed.len() > SHOWN {
                out += "<p>The signed report lists more.\n";
            }
        }
        out + &format!(
            "<p>Made from the signed report with BLAKE3 {}; embassyfs drill check holds both against the key.\n</html>\n",
            escaped(hash)
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
#[path = "drill_tests.rs"]
mod tests;
