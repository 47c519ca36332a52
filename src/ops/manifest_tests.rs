//! Manifests that are written, read, and bent.

use super::*;
use crate::crypto::sign::SecretKey;
use crate::ops::receipt::{FORMAT, Stand};
use crate::ops::signed::seal;

fn entry(path: &str, kind: char) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o640,
        uid: 1,
        gid: 2,
        size: 3,
        mtime: Timestamp { secs: -7, nanos: 8 },
        hash: (kind == 'f').then_some(Hash([9; 32])),
        xattrs: None,
    }
}

fn stand() -> Stand {
    Stand {
        format: FORMAT,
        volume: "00".repeat(16),
        name: "land".into(),
        commit: Default::default(),
        head: String::new(),
        epoch: 1,
        durable: Timestamp::default(),
    }
}

fn written(path: &Path, entries: &[Entry], key: &SecretKey) {
    let mut writer = Writer::begin(path, "version").expect("a new file");
    entries.iter().for_each(|entry| writer.entry(entry).expect("written"));
    let holds = writer.lines_end().clone();
    let signed = seal(Kind::Manifest, &Manifest { stand: stand(), holds }, key).expect("plain data");
    writer.finish(&signed).expect("written");
}

fn read(path: &Path, key: &SecretKey) -> Result<Vec<Entry>, Bad> {
    let (_, mut lines) = open(path, &key.public(), None)?;
    let mut all = Vec::new();
    while let Some(entry) = lines.entry()? {
        all.push(entry);
    }
    Ok(all)
}

#[test]
fn a_manifest_reads_as_it_was_written_and_not_when_a_byte_is_bent() {
    let (dir, key) = (tempfile::tempdir().expect("a directory"), SecretKey::from_bytes(&[7; 32]));
    let path = dir.path().join("manifest");
    let entries = [entry(".", 'd'), entry("a b", 'f'), entry("a b/\\x0a c", 'l'), entry("b", 'c')];
    written(&path, &entries, &key);
    assert_eq!(read(&path, &key).expect("whole"), entries);
    let text = std::fs::read(&path).expect("readable");
    for at in 0..text.len() {
        let mut bent = text.clone();
        bent[at] ^= 1;
        std::fs::write(&path, bent).expect("written");
        assert!(read(&path, &key).is_err(), "byte {at}");
    }
    for len in 0..text.len() {
        std::fs::write(&path, &text[..len]).expect("written");
        assert!(read(&path, &key).is_err(), "cut at {len}");
    }
    let other = SecretKey::from_bytes(&[8; 32]);
    std::fs::write(&path, &text).expect("written");
    assert!(matches!(read(&path, &other), Err(Bad::Untrue(_))));
}

#[test]
fn lines_out_of_order_are_refused_though_signed() {
    let (dir, key) = (tempfile::tempdir().expect("a directory"), SecretKey::from_bytes(&[7; 32]));
    let path = dir.path().join("manifest");
    written(&path, &[entry("b", 'f'), entry("a", 'f')], &key);
    assert!(matches!(read(&path, &key), Err(Bad::Lines(_))));
}

#[test]
fn each_field_that_differs_is_named() {
    let want = entry("a", 'f');
    assert_eq!(differs(&want, &want.clone()), None);
    let bent = [
        Entry { kind: 'd', ..want.clone() },
        Entry { mode: 0o641, ..want.clone() },
        Entry { uid: 9, ..want.clone() },
        Entry { gid: 9, ..want.clone() },
        Entry { size: 9, ..want.clone() },
        Entry { mtime: Timestamp { secs: -7, nanos: 9 }, ..want.clone() },
        Entry { hash: Some(Hash([8; 32])), ..want.clone() },
        Entry { xattrs: Some(Hash([8; 32])), ..want.clone() },
    ];
    let names = ["kind", "mode", "owner", "group", "size", "mtime", "content", "attributes"];
    for (name, bent) in names.iter().zip(&bent) {
        let found = differs(&want, bent).expect(name);
        assert!(found.detail.starts_with(name), "{found:?}");
    }
}
