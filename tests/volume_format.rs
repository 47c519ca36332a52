//! The golden superblock and key files of format version 1: what is written today is, byte for byte, what was
//! written when the format was fixed, and what was written then can be read today.
//! Run with `EMBASSYFS_BLESS=1` to write the fixtures anew; that is a change of the format.

#![allow(clippy::unwrap_used)] // a helper that fails here fails the test

use embassyfs::clock::{Clock, Env, Random};
use embassyfs::crypto::keyfile::{KeyFile, KeySet, Role, StewardKeyFile};
use embassyfs::crypto::keys::VolumeKey;
use embassyfs::crypto::sign::SecretKey;
use embassyfs::crypto::slots::{Argon2Params, wrap_passphrase};
use embassyfs::log::volume::{Parameters, Superblock, UnverifiedSuperblock, open_with_passphrase};
use embassyfs::types::{Timestamp, VolumeId};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const PASSPHRASE: &[u8] = b"a passphrase for the fixture";

struct Fixed;

impl Clock for Fixed {
    fn now(&self) -> Timestamp {
        Timestamp { secs: 1_767_225_600, nanos: 500_000_000 }
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

impl Random for Fixed {
    fn fill(&self, out: &mut [u8]) {
        out.fill(0x55);
    }
}

fn keys() -> KeySet {
    KeySet::assemble(
        VolumeId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"),
        "Land register",
        VolumeKey::from_bytes([0x11; 32]),
        SecretKey::from_bytes(&[0x22; 32]),
        SecretKey::from_bytes(&[0x33; 32]),
    )
}

fn superblock(env: &Env, keys: &KeySet) -> Superblock {
    let writer = &keys.writer;
    let params = Argon2Params { m_cost_kib: 64, t_cost: 2, p_cost: 2 };
    let key = writer.volume_key().unwrap();
    Superblock {
        volume: writer.volume,
        name: writer.name.clone(),
        key_id: writer.key_id,
        writer_public: writer.writer_public,
        steward_public: writer.steward_public,
        slots: vec![wrap_passphrase(env, &writer.volume, 1, key, PASSPHRASE, params).unwrap()],
        created: env.clock.now(),
        parameters: Parameters::default(),
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1").join(name)
}

fn compare(name: &str, bytes: &[u8]) {
    let path = fixture(name);
    if std::env::var_os("EMBASSYFS_BLESS").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert_eq!(
        String::from_utf8_lossy(bytes),
        String::from_utf8_lossy(&golden),
        "{name} is written differently"
    );
}

#[test]
fn what_is_written_is_the_golden_fixture() {
    let env = Env { clock: Arc::new(Fixed), random: Arc::new(Fixed), ..Env::system() };
    let keys = keys();
    let superblock = superblock(&env, &keys);
    let writer = &keys.writer;
    let bytes = superblock.encode(writer.volume_key().unwrap(), writer.signing_key().unwrap()).unwrap();
    compare("volume.json", &bytes);

    let dir = tempfile::tempdir().unwrap();
    keys.writer.save(&dir.path().join("writer.key")).unwrap();
    keys.reader.save(&dir.path().join("reader.key")).unwrap();
    keys.auditor.save(&dir.path().join("auditor.key")).unwrap();
    keys.steward.save(&dir.path().join("steward.key")).unwrap();
    for name in ["writer.key", "reader.key", "auditor.key", "steward.key"] {
        compare(name, &std::fs::read(dir.path().join(name)).unwrap());
    }
}

#[test]
fn the_golden_superblock_opens_with_each_golden_key_file_and_with_the_passphrase() {
    let volume_json = std::fs::read(fixture("volume.json")).unwrap();
    let meant =
        superblock(&Env { clock: Arc::new(Fixed), random: Arc::new(Fixed), ..Env::system() }, &keys());
    for (name, role) in
        [("writer.key", Role::Writer), ("reader.key", Role::Reader), ("auditor.key", Role::Auditor)]
    {
        // Not `load`: a checked-out file may have any mode.
        let key = KeyFile::parse(&std::fs::read(fixture(name)).unwrap(), name).unwrap();
        assert_eq!(key.role, role);
        assert_eq!(UnverifiedSuperblock::parse(&volume_json).unwrap().verify(&key).unwrap(), meant);
    }
    let steward = std::fs::read(fixture("steward.key")).unwrap();
    let steward = StewardKeyFile::parse(&steward, "steward.key").unwrap();
    assert_eq!(steward.signing.public(), meant.steward_public);

    let (found, key) = open_with_passphrase(&volume_json, PASSPHRASE).unwrap();
    assert_eq!(found, meant);
    assert_eq!(key.volume_key().unwrap().expose(), &[0x11; 32]);
}
