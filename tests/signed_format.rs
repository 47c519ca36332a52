//! The golden receipt, manifest, drill report and drill key of format version 1: what is written today is, byte for byte,
//! what was written when the format was fixed, and it is taken apart here by `docs/format.md` and not by the program.
//! Run with `EMBASSYFS_BLESS=1` to write the fixtures anew; that is a change of the format.

#![allow(clippy::unwrap_used)] // a helper that fails here fails the test

use embassyfs::crypto::hash;
use embassyfs::crypto::keyfile::DrillKeyFile;
use embassyfs::crypto::sign::{PublicKey, SecretKey};
use embassyfs::ops::drill::{self, Against, Counts, ReadTotals, Report, Rpo, Rto};
use embassyfs::ops::manifest::{self, Difference, Writer};
use embassyfs::ops::receipt::{Manifest, Receipt, Stand, believe};
use embassyfs::ops::signed::{Kind, open, seal};
use embassyfs::ops::status::CommitPoint;
use embassyfs::ops::walk::Entry;
use embassyfs::types::{Hash, Timestamp, unhex};
use std::path::{Path, PathBuf};

/// The writer's key of the other fixtures, and that of a drill.
const WRITER: [u8; 32] = [0x22; 32];
const DRILL: [u8; 32] = [0x44; 32];
const VOLUME: &str = "00112233445566778899aabbccddeeff";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

fn compare(name: &str, bytes: &[u8]) {
    if std::env::var_os("EMBASSYFS_BLESS").is_some() {
        std::fs::write(fixture(name), bytes).unwrap();
    }
    let golden = std::fs::read(fixture(name)).unwrap();
    assert_eq!(
        String::from_utf8_lossy(bytes),
        String::from_utf8_lossy(&golden),
        "{name} is written differently"
    );
}

fn at(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 250_000_000 }
}

fn stand() -> Stand {
    Stand {
        format: 1,
        volume: VOLUME.into(),
        name: "Land register".into(),
        commit: CommitPoint { no: 1041, time: at(1_767_225_600) },
        head: format!("{:016x}:{}", 77, Hash([0xab; 32])),
        epoch: 1,
        durable: at(1_767_225_602),
    }
}

fn receipt() -> Receipt {
    Receipt {
        stand: stand(),
        path: "deeds/17 \\x0a.pdf".into(),
        size: 3,
        blake3: hash(b"abc").to_string(),
        mtime: at(1_767_225_599),
    }
}

fn entries() -> Vec<Entry> {
    let entry = |path: &str, kind, size, hash| Entry {
        path: path.into(),
        kind,
        mode: 0o640,
        uid: 1000,
        gid: 1001,
        size,
        mtime: Timestamp { secs: -2, nanos: 5 },
        hash,
        xattrs: None,
    };
    vec![
        entry(".", 'd', 0, None),
        entry("a b", 'f', 3, Some(hash(b"abc"))),
        Entry { xattrs: Some(hash(b"\x06\0\0\0user.a\x01\0\0\0b")), ..entry("dir", 'd', 0, None) },
        entry("dir/\\\\\\xff", 'l', 3, Some(hash(b"a b"))),
        entry("disk", 'b', 0x801, None),
    ]
}

fn report() -> Report {
    Report {
        format: 1,
        name: "Land register".into(),
        volume: VOLUME.into(),
        store: "s3://embassy/land".into(),
        host: "embassy-1".into(),
        program: "0.1.0".into(),
        signed_by: "unused".into(),
        began: at(1_767_230_000),
        ended: at(1_767_230_009),
        manifest: Against {
            commit: stand().commit,
            head: stand().head,
            blake3: hash(b"lines").to_string(),
            entries: 5,
            compared: "newest".into(),
        },
        newest: Some(stand().commit),
        head: Some(stand().head),
        rto: Rto { mounted_ms: Some(30), first_byte_ms: Some(40), find_ms: Some(50), read_ms: Some(60) },
        rpo: Rpo { newest_age_ms: Some(4_400_000), commits_ahead: Some(0), ahead_ms: Some(0) },
        read: ReadTotals { names: 5, entries: 5, files: 1, bytes: 3 },
        differences: Counts { missing: 1, ..Counts::default() },
        listed: vec![Difference::new("a b", "missing", "")],
        ..Report::default()
    }
}

/// Body and signature of a signed document, by counting; and that the signature is the key's over what format.md says.
fn taken_apart(word: &str, text: &[u8], key: &PublicKey) -> serde_json::Value {
    let opening = format!("{{\n\"{word}\": ");
    assert_eq!(&text[..opening.len()], opening.as_bytes());
    let end = text.len() - 148;
    let body = &text[opening.len()..end];
    assert_eq!(&text[end..end + 16], b",\n\"signature\": \"");
    assert_eq!(&text[text.len() - 4..], b"\"\n}\n");
    let signature = unhex(std::str::from_utf8(&text[end + 16..end + 144]).unwrap()).unwrap();
    let message = [format!("embassyfs v1 {word} signature\0").as_bytes(), body].concat();
    key.verify(&message, &signature).unwrap();
    serde_json::from_slice(body).unwrap()
}

#[test]
fn a_receipt_is_the_golden_one_and_reads_by_the_format() {
    let key = SecretKey::from_bytes(&WRITER);
    let text = seal(Kind::Receipt, &receipt(), &key).unwrap();
    compare("receipt.json", text.as_bytes());
    let golden = std::fs::read(fixture("receipt.json")).unwrap();
    let read: Receipt = believe(Kind::Receipt, &golden, &key.public(), Some(VOLUME)).unwrap();
    assert_eq!(read, receipt());
    let body = taken_apart("receipt", &golden, &key.public());
    let said = |name: &str| body[name].as_str().unwrap().to_string();
    assert_eq!((body["format"].as_u64(), said("volume").as_str()), (Some(1), VOLUME));
    assert_eq!((said("path").as_str(), body["size"].as_u64()), ("deeds/17 \\x0a.pdf", Some(3)));
    assert_eq!(said("durable"), "2026-01-01T00:00:02.25Z");
    assert_eq!(body["commit"]["no"].as_u64(), Some(1041));
    assert_eq!(said("head").split_once(':').unwrap().0, "000000000000004d");
    assert_eq!(said("blake3"), hash(b"abc").to_string());
}

#[test]
fn a_manifest_is_the_golden_one_and_reads_by_the_format() {
    let (dir, key) = (tempfile::tempdir().unwrap(), SecretKey::from_bytes(&WRITER));
    let path = dir.path().join("manifest");
    let mut writer = Writer::begin(&path, "version").unwrap();
    entries().iter().for_each(|entry| writer.entry(entry).unwrap());
    let holds = writer.lines_end().clone();
    let signed = seal(Kind::Manifest, &Manifest { stand: stand(), holds }, &key).unwrap();
    writer.finish(&signed).unwrap();
    compare("manifest.txt", &std::fs::read(&path).unwrap());

    let (_, mut lines) = manifest::open(&fixture("manifest.txt"), &key.public(), Some(VOLUME)).unwrap();
    let mut read = Vec::new();
    while let Some(entry) = lines.entry().unwrap() {
        read.push(entry);
    }
    assert_eq!(read, entries());

    let text = std::fs::read(fixture("manifest.txt")).unwrap();
    let end = text.windows(2).position(|pair| pair == b"\n{").unwrap() + 1;
    let body = taken_apart("manifest", &text[end..], &key.public());
    assert_eq!(body["blake3"].as_str(), Some(hash(&text[..end]).to_string().as_str()));
    assert_eq!((body["entries"].as_u64(), body["files"].as_u64()), (Some(5), Some(1)));
    let lines: Vec<&str> = std::str::from_utf8(&text[..end]).unwrap().lines().collect();
    assert_eq!(lines[0], "embassyfs manifest 1");
    assert_eq!(lines[2], format!("f 0640 1000 1001 3 -2.000000005 {} - a b", hash(b"abc")));
    assert_eq!(lines.len(), 6);
}

#[test]
fn the_report_and_the_key_of_a_drill_are_the_golden_ones() {
    let key = DrillKeyFile { signing: SecretKey::from_bytes(&DRILL) };
    let text = seal(Kind::Drill, &report(), &key.signing).unwrap();
    compare("drill.json", text.as_bytes());
    let golden = std::fs::read(fixture("drill.json")).unwrap();
    assert_eq!(open::<Report>(Kind::Drill, &golden, &key.public()).unwrap(), report());
    let body = taken_apart("drill", &golden, &key.public());
    assert_eq!(body["rto"]["mounted_ms"].as_u64(), Some(30));
    assert_eq!(body["passed"].as_bool(), Some(false));
    assert_eq!(body["format"].as_u64(), Some(u64::from(drill::FORMAT)));

    let dir = tempfile::tempdir().unwrap();
    key.save(&dir.path().join("drill.key")).unwrap();
    compare("drill.key", &std::fs::read(dir.path().join("drill.key")).unwrap());
    let golden = std::fs::read(fixture("drill.key")).unwrap();
    assert_eq!(DrillKeyFile::parse(&golden, "drill.key").unwrap().public(), key.public());
}
