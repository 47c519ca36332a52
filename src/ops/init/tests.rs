//! Tests of `init`: what it refuses, and that no volume ever exists without its keys.

use super::*;
use crate::crypto::keyfile::{Role, StewardKeyFile};
use crate::types::Timestamp;
use futures::FutureExt;
use futures::executor::block_on;
use futures::future::{BoxFuture, ready};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

/// What the store does wrong.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    None,
    Overwrites,
    LosesWhatItTook,
    NoDelete,
    DeniesVolume,
    /// `volume.json` is taken, but the answer is lost.
    LosesAnswer,
    /// `volume.json` is taken, and the repeated request finds it.
    AnswersTwice,
    /// Neither the request nor the read-back gets through.
    GoesAway,
    /// Another `init` wins the race.
    AnotherWins,
}

struct TinyStore {
    objects: Mutex<BTreeMap<String, Bytes>>,
    fault: Fault,
}

impl TinyStore {
    fn new(fault: Fault) -> TinyStore {
        TinyStore { objects: Mutex::default(), fault }
    }

    fn names(&self) -> Vec<String> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }

    fn set(&self, name: &str, body: &[u8]) {
        self.objects.lock().unwrap().insert(name.into(), Bytes::copy_from_slice(body));
    }

    fn put(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let gone = || StoreError::Unavailable { name: name.into(), detail: "link down".into() };
        let taken = || StoreError::AlreadyExists { name: name.into() };
        let mut objects = self.objects.lock().unwrap();
        match (self.fault, name) {
            (Fault::LosesWhatItTook, _) if objects.contains_key(name) => {
                objects.remove(name);
                return Err(taken());
            }
            (Fault::DeniesVolume, "volume.json") => {
                return Err(StoreError::Denied { name: name.into(), detail: "quota".into() });
            }
            (Fault::GoesAway, "volume.json") => return Err(gone()),
            (Fault::AnotherWins, "volume.json") => {
                objects.insert(name.into(), Bytes::from_static(b"another"));
            }
            _ => {}
        }
        if objects.contains_key(name) && self.fault != Fault::Overwrites {
            return Err(taken());
        }
        objects.insert(name.into(), body);
        match (self.fault, name) {
            (Fault::LosesAnswer, "volume.json") => Err(gone()),
            (Fault::AnswersTwice, "volume.json") => Err(taken()),
            _ => Ok(()),
        }
    }
}

impl Store for TinyStore {
    fn put_new(&self, name: &str, body: Bytes) -> BoxFuture<'_, Result<(), StoreError>> {
        ready(self.put(name, body)).boxed()
    }

    fn get_range(&self, name: &str, _: Range<u64>) -> BoxFuture<'_, Result<Bytes, StoreError>> {
        ready(Err(StoreError::NotFound { name: name.into() })).boxed()
    }

    fn get_suffix(&self, name: &str, len: u64) -> BoxFuture<'_, Result<(Bytes, u64), StoreError>> {
        let found = self.objects.lock().unwrap().get(name).cloned();
        let found = found.ok_or(StoreError::NotFound { name: name.into() });
        ready(found.map(|body| {
            let start = body.len().saturating_sub(len as usize);
            (body.slice(start..), body.len() as u64)
        }))
        .boxed()
    }

    fn list(
        &self,
        prefix: &str,
        _: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<crate::store::ObjectInfo>, StoreError>> {
        let objects = self.objects.lock().unwrap();
        let found = objects.iter().filter(|(name, _)| name.starts_with(prefix)).take(limit);
        let found = found
            .map(|(name, body)| crate::store::ObjectInfo { name: name.clone(), size: body.len() as u64 });
        ready(Ok(found.collect())).boxed()
    }

    fn delete(&self, name: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        if self.fault == Fault::NoDelete {
            let (name, detail) = (name.into(), "no delete right".into());
            return ready(Err(StoreError::Denied { name, detail })).boxed();
        }
        self.objects.lock().unwrap().remove(name);
        ready(Ok(())).boxed()
    }

    fn describe(&self) -> String {
        "memory://test".into()
    }
}

fn params(dir: &Path) -> InitParams {
    InitParams {
        name: "land".into(),
        passphrase: None,
        argon: Argon2Params { m_cost_kib: 32, t_cost: 1, p_cost: 1 },
        parameters: Parameters::default(),
        keys_dir: dir.join("keys"),
    }
}

fn run(store: &TinyStore, params: InitParams) -> Result<InitReport, InitError> {
    block_on(init(store, &Env::system(), params))
}

#[test]
fn a_new_volume_opens_with_each_of_its_key_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = TinyStore::new(Fault::None);
    let report = run(&store, params(dir.path())).unwrap();
    assert_eq!(store.names(), ["volume.json"], "the scratch object is gone");
    assert!(report.warnings.is_empty());
    let keys = dir.path().join("keys");
    assert_eq!(std::fs::metadata(&keys).unwrap().permissions().mode() & 0o777, 0o700);
    for (name, role) in [(WRITER_KEY, Role::Writer), (READER_KEY, Role::Reader), (AUDITOR_KEY, Role::Auditor)]
    {
        let key = KeyFile::load(&keys.join(name)).unwrap();
        assert_eq!(key.role, role);
        let (superblock, bytes) = block_on(load_superblock(&store, &key)).unwrap();
        assert_eq!(superblock, report.superblock);
        assert_eq!(bytes, report.volume_json);
        assert_eq!(superblock.volume, report.volume);
    }
    let steward = StewardKeyFile::load(&keys.join(STEWARD_KEY)).unwrap();
    assert_eq!(steward.signing.public(), report.superblock.steward_public);
    assert_eq!(report.key_files.len(), 4);
    assert!(report.superblock.created > Timestamp::default());
}

#[test]
fn a_passphrase_slot_is_there_only_when_asked_for_and_is_warned_about() {
    let dir = tempfile::tempdir().unwrap();
    let store = TinyStore::new(Fault::None);
    let passphrase = Some(Zeroizing::new(b"correct horse".to_vec()));
    let report = run(&store, InitParams { passphrase, ..params(dir.path()) }).unwrap();
    assert!(report.warnings.iter().any(|w| w.contains("passphrase")));
    let (superblock, key) = volume::open_with_passphrase(&report.volume_json, b"correct horse").unwrap();
    assert_eq!(superblock, report.superblock);
    assert!(block_on(load_superblock(&store, &key)).is_ok());
}

#[test]
fn a_store_that_holds_anything_of_a_volume_is_refused_and_left_alone() {
    for name in ["volume.json", "log/0000000000000001", "checkpoint/fffffffffffffffe"] {
        let dir = tempfile::tempdir().unwrap();
        let store = TinyStore::new(Fault::None);
        store.set(name, b"x");
        let error = run(&store, params(dir.path())).unwrap_err();
        assert!(matches!(&error, InitError::VolumeExists { object, .. } if object == name), "{error}");
        assert_eq!(store.names(), [name]);
        assert!(!dir.path().join("keys").exists());
    }
}

#[test]
fn a_store_that_overwrites_or_loses_is_refused_before_any_key_is_made() {
    for (fault, word) in [(Fault::Overwrites, "overwrote"), (Fault::LosesWhatItTook, "not there")] {
        let dir = tempfile::tempdir().unwrap();
        let store = TinyStore::new(fault);
        let error = run(&store, params(dir.path())).unwrap_err();
        assert!(matches!(error, InitError::StoreUnfit { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(store.names().is_empty());
        assert!(!dir.path().join("keys").exists());
    }
}

#[test]
fn a_missing_right_to_delete_is_only_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let store = TinyStore::new(Fault::NoDelete);
    let report = run(&store, params(dir.path())).unwrap();
    assert!(report.warnings.iter().any(|w| w.contains("probe/")), "{:?}", report.warnings);
}

#[test]
fn a_key_file_that_is_there_stops_init_before_the_store_is_touched() {
    for name in [WRITER_KEY, READER_KEY, AUDITOR_KEY, STEWARD_KEY] {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        std::fs::create_dir(&keys).unwrap();
        std::fs::write(keys.join(name), "old").unwrap();
        let store = TinyStore::new(Fault::None);
        let error = run(&store, params(dir.path())).unwrap_err();
        assert!(matches!(error, InitError::KeyFile(KeyFileError::Exists { .. })), "{error}");
        assert!(store.names().is_empty());
        assert_eq!(std::fs::read_dir(&keys).unwrap().count(), 1);
        assert_eq!(std::fs::read(keys.join(name)).unwrap(), b"old");
    }
}

#[test]
fn key_files_that_cannot_all_be_written_are_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let keys_dir = dir.path().join("keys");
    let keys = KeySet::generate(&Env::system(), "land");
    let free = KeyDir::check(&keys_dir).unwrap();
    std::fs::create_dir(&keys_dir).unwrap();
    std::fs::write(keys_dir.join(AUDITOR_KEY), "appeared meanwhile").unwrap();
    assert!(matches!(free.write(&keys), Err(InitError::KeyFile(KeyFileError::Exists { .. }))));
    let left: Vec<_> = std::fs::read_dir(&keys_dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [AUDITOR_KEY]);
}

#[test]
fn a_refused_volume_leaves_no_key_files_and_another_attempt_succeeds() {
    for fault in [Fault::DeniesVolume, Fault::AnotherWins] {
        let dir = tempfile::tempdir().unwrap();
        let error = run(&TinyStore::new(fault), params(dir.path())).unwrap_err();
        match fault {
            Fault::DeniesVolume => assert!(matches!(error, InitError::Store(_)), "{error}"),
            _ => assert!(matches!(error, InitError::VolumeExists { .. }), "{error}"),
        }
        assert!(!dir.path().join("keys").exists(), "{fault:?}");
        assert!(run(&TinyStore::new(Fault::None), params(dir.path())).is_ok());
    }
}

#[test]
fn a_lost_answer_is_resolved_by_reading_back() {
    for fault in [Fault::LosesAnswer, Fault::AnswersTwice] {
        let dir = tempfile::tempdir().unwrap();
        let store = TinyStore::new(fault);
        run(&store, params(dir.path())).unwrap();
        let key = KeyFile::load(&dir.path().join("keys").join(WRITER_KEY)).unwrap();
        assert!(block_on(load_superblock(&store, &key)).is_ok());
    }
}

#[test]
fn when_the_store_goes_away_the_key_files_are_kept_and_the_way_out_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let error = run(&TinyStore::new(Fault::GoesAway), params(dir.path())).unwrap_err();
    assert!(matches!(error, InitError::Unknown { .. }), "{error}");
    assert!(error.to_string().contains("run init again"), "{error}");
    let keys = dir.path().join("keys");
    assert!(error.to_string().contains(&keys.display().to_string()), "{error}");
    assert!(KeyFile::load(&keys.join(WRITER_KEY)).is_ok());
    assert!(StewardKeyFile::load(&keys.join(STEWARD_KEY)).is_ok());
}

#[test]
fn bad_parameters_are_refused_before_anything_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let store = TinyStore::new(Fault::None);
    let page_size = Parameters { page_size: 1, ..Parameters::default() };
    let empty = Some(Zeroizing::new(Vec::new()));
    for bad in [
        InitParams { name: "a\nb".into(), ..params(dir.path()) },
        InitParams { parameters: page_size, ..params(dir.path()) },
        InitParams { passphrase: empty, ..params(dir.path()) },
    ] {
        assert!(matches!(run(&store, bad), Err(InitError::Refused(_))));
    }
    assert!(store.names().is_empty());
    assert!(!dir.path().join("keys").exists());
}

#[test]
fn both_calls_can_run_on_any_thread() {
    fn sendable<T: Send>(_: T) {}
    let store = TinyStore::new(Fault::None);
    let key = KeySet::generate(&Env::system(), "land").reader;
    sendable(init(&store, &Env::system(), params(Path::new("never-used"))));
    sendable(load_superblock(&store, &key));
}

#[test]
fn an_empty_store_and_an_oversized_superblock_are_told_apart() {
    let store = TinyStore::new(Fault::None);
    let key = KeySet::generate(&Env::system(), "land").reader;
    let message = block_on(load_superblock(&store, &key)).unwrap_err().to_string();
    assert!(message.contains("memory://test holds no volume"), "{message}");
    store.set("checkpoint/ffffffffffffffff", b"x");
    let message = block_on(load_superblock(&store, &key)).unwrap_err().to_string();
    assert!(message.contains("though checkpoint/ffffffffffffffff is there"), "{message}");
    store.set("volume.json", &vec![b' '; volume::LEN_MAX as usize + 1]);
    let message = block_on(load_superblock(&store, &key)).unwrap_err().to_string();
    assert!(message.contains("volume.json: is too large"), "{message}");
}
