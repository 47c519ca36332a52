//! What a drill finds in a directory that is not as the manifest says.

use super::*;
use crate::crypto::sign::SecretKey;
use crate::ops::manifest::{self, Writer};
use crate::ops::receipt::{Manifest, Stand};
use crate::ops::signed::{Kind, seal};
use std::fs;

fn manifest_of(top: &Path, file: &Path, key: &SecretKey) {
    let mut writer = Writer::begin(file, "live").expect("a new file");
    let stop = AtomicBool::new(false);
    walk::read_all(top, &stop, &mut |entry| writer.entry(&entry.expect("readable"))).expect("read");
    let holds = writer.lines_end().clone();
    let stand = Stand {
        format: crate::ops::receipt::FORMAT,
        volume: String::new(),
        name: String::new(),
        commit: CommitPoint::default(),
        head: String::new(),
        epoch: 1,
        durable: Timestamp::default(),
    };
    let signed = seal(Kind::Manifest, &Manifest { stand, holds }, key).expect("plain data");
    writer.finish(&signed).expect("written");
}

fn drilled(top: &Path, file: &Path, key: &SecretKey) -> Report {
    let mut report = Report::default();
    let (_, mut lines) = manifest::open(file, &key.public(), None).expect("whole");
    let stop = AtomicBool::new(false);
    report.compare(top, &mut lines, &stop, &mut |_| ()).expect("compared");
    report.rto.read_ms = Some(1);
    report.judge();
    report
}

#[test]
fn each_kind_of_difference_is_found_and_a_whole_tree_passes() {
    let dir = tempfile::tempdir().expect("a directory");
    let (top, file, key) =
        (dir.path().join("top"), dir.path().join("manifest"), SecretKey::from_bytes(&[7; 32]));
    fs::create_dir_all(top.join("d/e")).expect("made");
    for name in ["a", "d/b", "d/e/c", "z"] {
        fs::write(top.join(name), name).expect("written");
    }
    manifest_of(&top, &file, &key);
    let report = drilled(&top, &file, &key);
    assert!(report.passed && report.read.files == 4, "{report:?}");

    let found = |report: &Report| {
        let listed = report.listed.iter();
        listed.map(|d| format!("{} {}", d.kind, d.path)).collect::<Vec<_>>()
    };
    let stamp = fs::metadata(top.join("d")).expect("there").modified().expect("known");
    fs::write(top.join("d/new"), "new").expect("written");
    fs::remove_file(top.join("d/b")).expect("removed");
    fs::File::open(top.join("d")).expect("there").set_modified(stamp).expect("set");
    let report = drilled(&top, &file, &key);
    assert_eq!(found(&report), ["missing d/b", "extra d/new"]);
    assert!(!report.passed);
    assert!(report.page("h").contains("<td>d/b<td>missing"));

    fs::remove_dir_all(top.join("d")).expect("removed");
    let report = drilled(&top, &file, &key);
    let missing: Vec<_> = report.listed.iter().filter(|d| d.kind == "missing").map(|d| &*d.path).collect();
    assert_eq!(missing, ["d", "d/b", "d/e", "d/e/c"]);
    assert_eq!(report.differences.missing, 4);
}

#[test]
fn a_drill_that_did_not_end_or_found_something_has_not_passed() {
    let mut report = Report::default();
    report.judge();
    assert!(!report.passed, "nothing was read");
    report.rto.read_ms = Some(1);
    report.judge();
    assert!(report.passed);
    report.findings.push("<b>".into());
    report.judge();
    assert!(!report.passed && report.page("h").contains("&lt;b&gt;"));
    assert_eq!(ms_between(Timestamp { secs: 1, nanos: 0 }, Timestamp { secs: 0, nanos: 5_000_000 }), -995);
}

#[test]
fn a_report_of_another_host_stays_within_its_lines() {
    let bad = || String::from("x\x1b[2J\n  differences                  0 missing");
    let mut report = Report { name: bad(), host: bad(), store: bad(), ..Report::default() };
    report.findings.push(bad());
    report.listed.push(Difference::new(&bad(), "missing", bad()));
    let text = report.text();
    assert!(!text.contains('\x1b'), "{text}");
    assert_eq!(text.matches("\n  differences").count(), 1, "{text}");
}
