//! The store's contract as one suite, run over every adapter and decorator.
//! Invariant: what a layer above may rely on is asserted here and nowhere else.

use bytes::Bytes;
use embassyfs::clock::Env;
use embassyfs::disk::FileRef;
use embassyfs::store::fault::{FaultStore, Faults};
use embassyfs::store::local::LocalStore;
use embassyfs::store::memory::MemoryStore;
use embassyfs::store::retry::{RetryPolicy, RetryStore};
use embassyfs::store::{ObjectInfo, Store, StoreError, open, reachable};
use embassyfs::types::hex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// What may be less than the contract in the store under test.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Nothing.
    Full,
    /// The put of what is there already may answer `Ok`: after a lost answer it cannot be told from one's own.
    Retrying,
    /// Two racing puts may both win, and directories shine through: `s3s-fs` checks and then writes, in two steps.
    TestServer,
}

fn bytes(n: usize, seed: u8) -> Bytes {
    (0..n).map(|i| (i * 31) as u8 ^ seed).collect::<Vec<_>>().into()
}

fn names(found: &[ObjectInfo]) -> Vec<&str> {
    found.iter().map(|object| object.name.as_str()).collect()
}

async fn put_and_get(store: &dyn Store, kind: Kind) {
    let body = bytes(100_000, 1);
    store.put_new("log/0000000000000001", body.clone()).await.expect("first put");
    let again = store.put_new("log/0000000000000001", bytes(5, 2)).await;
    assert!(matches!(again, Err(StoreError::AlreadyExists { .. })), "{again:?}");
    let same = store.put_new("log/0000000000000001", body.clone()).await;
    let taken = matches!(same, Err(StoreError::AlreadyExists { .. }));
    assert!(taken || (kind == Kind::Retrying && same.is_ok()), "also the same body: {same:?}");

    for range in [0..100_000, 0..1, 99_999..100_000, 4096..70_000] {
        let part = store.get_range("log/0000000000000001", range.clone()).await.expect("range");
        assert_eq!(part, body[range.start as usize..range.end as usize]);
    }
    assert_eq!(store.get_range("log/0000000000000001", 7..7).await.expect("empty range"), Bytes::new());
    for range in [0..100_001, 99_999..100_001, 100_000..100_001, 200_000..200_001, 100_001..100_001] {
        let answer = store.get_range("log/0000000000000001", range.clone()).await;
        assert!(matches!(answer, Err(StoreError::OutOfRange { .. })), "{range:?}: {answer:?}");
    }
    for len in [1, 4096, 99_999, 100_000, 100_001, 1 << 40] {
        let (tail, size) = store.get_suffix("log/0000000000000001", len).await.expect("suffix");
        assert_eq!((size, &tail[..]), (100_000, &body[100_000 - len.min(100_000) as usize..]));
    }
    assert_eq!(
        store.get_suffix("log/0000000000000001", 0).await.expect("no suffix"),
        (Bytes::new(), 100_000)
    );
}

async fn what_is_missing(store: &dyn Store, kind: Kind) {
    let missing = "log/00000000000000ff";
    assert!(matches!(store.get_range(missing, 0..1).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.get_range(missing, 0..0).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.get_suffix(missing, 10).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.get_suffix(missing, 0).await, Err(StoreError::NotFound { .. })));
    if kind != Kind::TestServer {
        assert!(matches!(store.get_suffix("log", 1).await, Err(StoreError::NotFound { .. })));
    }
    store.delete(missing).await.expect("deleting what is missing");
    assert!(store.list("nothing/", None, 10).await.expect("empty list").is_empty());
}

async fn bad_names(store: &dyn Store) {
    for name in ["", "/", "a/", "/a", "../x", "a/../b", "a/b/c", "UPPER", ".tmp/x", "a b", "a/.b", "a\0"] {
        let answer = store.put_new(name, Bytes::from_static(b"x")).await;
        assert!(matches!(answer, Err(StoreError::Denied { .. })), "{name:?}: {answer:?}");
        let answer = store.get_suffix(name, 1).await;
        assert!(matches!(answer, Err(StoreError::Denied { .. })), "{name:?}: {answer:?}");
    }
}

async fn small_objects(store: &dyn Store) {
    store.put_new("empty", Bytes::new()).await.expect("empty object");
    assert_eq!(store.get_suffix("empty", 10).await.expect("suffix of nothing"), (Bytes::new(), 0));
    assert_eq!(store.get_range("empty", 0..0).await.expect("range of nothing"), Bytes::new());
    assert!(matches!(store.get_range("empty", 0..1).await, Err(StoreError::OutOfRange { .. })));
    store.put_new("a~b-c.d", bytes(3, 0)).await.expect("all signs");
    assert_eq!(store.get_suffix("a~b-c.d", 10).await.expect("read back").0, bytes(3, 0));
    store.delete("a~b-c.d").await.expect("delete");
    store.delete("empty").await.expect("delete");
    assert!(matches!(store.get_suffix("empty", 1).await, Err(StoreError::NotFound { .. })));
    store.put_new("empty", bytes(1, 0)).await.expect("a deleted name is free");
    store.delete("empty").await.expect("delete");
}

async fn listing(store: &dyn Store) {
    for n in [3_usize, 1, 2, 0x10, 0x1f, 0x20] {
        store.put_new(&format!("pack/{n:04x}"), bytes(n, 0)).await.expect("put");
    }
    store.put_new("pack-x", bytes(1, 0)).await.expect("put");
    store.put_new("volume.json", bytes(2, 0)).await.expect("put");
    let all = store.list("pack/", None, 100).await.expect("list");
    assert_eq!(names(&all), ["pack/0001", "pack/0002", "pack/0003", "pack/0010", "pack/001f", "pack/0020"]);
    assert_eq!(all[3].size, 16);
    let after = store.list("pack/", Some("pack/0002"), 2).await.expect("list");
    assert_eq!(names(&after), ["pack/0003", "pack/0010"]);
    // `after` need not exist, may be before the prefix, and may be behind all.
    let after = store.list("pack/", Some("pack/0004"), 1).await.expect("list");
    assert_eq!(names(&after), ["pack/0010"]);
    assert_eq!(store.list("pack/", Some("a"), 100).await.expect("list"), all);
    assert!(store.list("pack/", Some("pack/0020"), 9).await.expect("list").is_empty());
    assert!(store.list("pack/", Some("z"), 9).await.expect("list").is_empty());
    assert!(store.list("pack/", None, 0).await.expect("list").is_empty());
    let part = store.list("pack/001", None, 9).await.expect("list");
    assert_eq!(names(&part), ["pack/0010", "pack/001f"]);
    let part = store.list("pack/001", Some("pack/0010"), 9).await.expect("list");
    assert_eq!(names(&part), ["pack/001f"]);
    let exact = store.list("pack/0010", None, 9).await.expect("list");
    assert_eq!(names(&exact), ["pack/0010"]);
    let top = store.list("pack", None, 3).await.expect("list");
    assert_eq!(names(&top), ["pack-x", "pack/0001", "pack/0002"]);
    let whole = store.list("", None, 100).await.expect("list");
    let mut sorted = names(&whole);
    sorted.sort_unstable();
    assert_eq!(names(&whole), sorted);
    assert!(whole.len() >= 9 && sorted.contains(&"volume.json") && sorted.contains(&"log/0000000000000001"));
    let single = store.list("vol", None, 100).await.expect("list");
    assert_eq!(single, [ObjectInfo { name: "volume.json".into(), size: 2 }]);
}

async fn racing(store: &Arc<dyn Store>, kind: Kind) {
    for round in 0..8 {
        let name = format!("race/{round}");
        let tasks: Vec<_> = (0..16_u8)
            .map(|task| {
                let (store, name) = (store.clone(), name.clone());
                tokio::spawn(async move { (task, store.put_new(&name, bytes(20_000, task)).await) })
            })
            .collect();
        let mut winners = Vec::new();
        for task in tasks {
            match task.await.expect("no task panics") {
                (task, Ok(())) => winners.push(task),
                (_, Err(StoreError::AlreadyExists { .. })) => (),
                (_, Err(error)) => panic!("{error}"),
            }
        }
        assert!(!winners.is_empty(), "round {round}: nobody won");
        let (there, _) = store.get_suffix(&name, 1 << 20).await.expect("the winner's object");
        assert!(
            winners.iter().any(|task| there == bytes(20_000, *task)),
            "round {round}: not a winner's bytes"
        );
        if kind != Kind::TestServer {
            assert_eq!(winners.len(), 1, "round {round}");
        } else if winners.len() > 1 {
            println!("round {round}: {} puts won; this server is good for tests only", winners.len());
        }
    }
}

/// A file is put as its bytes are: the same object, the same answer when the name is taken.
async fn files(store: &dyn Store, kind: Kind) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = FileRef::system(&dir.path().join("source"));
    for (n, len) in [0, 1, 70_000, (3 << 20) + 1].into_iter().enumerate() {
        let body = bytes(len, n as u8);
        std::fs::write(&file.path, &body).expect("write");
        let name = format!("file/{n}");
        store.put_file(&name, &file).await.expect("put of a file");
        let (there, size) = store.get_suffix(&name, 1 << 40).await.expect("read back");
        assert!(size == len as u64 && there == body, "{len} bytes");
        let again = store.put_file(&name, &file).await;
        let taken = matches!(again, Err(StoreError::AlreadyExists { .. }));
        // Behind retries, "it is there, and it is mine" is an answer too.
        assert!(taken || (kind != Kind::Full && again.is_ok()), "{again:?}");
        std::fs::write(&file.path, bytes(len + 1, 9)).expect("write");
        let other = store.put_file(&name, &file).await;
        assert!(matches!(other, Err(StoreError::AlreadyExists { .. })), "{len}: {other:?}");
        let (there, _) = store.get_suffix(&name, 1 << 40).await.expect("read back");
        assert!(there == body, "a put never changes what is there");
        store.delete(&name).await.expect("delete");
    }
    let missing = store.put_file("file/x", &FileRef::system(&dir.path().join("missing"))).await;
    assert!(matches!(missing, Err(StoreError::Denied { .. })), "{missing:?}");
    let bad = store.put_file("../x", &file).await;
    assert!(matches!(bad, Err(StoreError::Denied { .. })), "{bad:?}");
    assert!(store.list("file/", None, 9).await.expect("list").is_empty());
}

async fn suite(store: Arc<dyn Store>, kind: Kind) {
    // A volume begins so, and a directory takes nothing else before.
    store.put_new("probe/1", bytes(9, 0)).await.expect("trial");
    store.delete("probe/1").await.expect("delete");
    reachable(&*store, Duration::from_secs(300)).await.expect("it is there");
    put_and_get(&*store, kind).await;
    what_is_missing(&*store, kind).await;
    bad_names(&*store).await;
    small_objects(&*store).await;
    listing(&*store).await;
    files(&*store, kind).await;
    racing(&store, kind).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_keeps_the_contract() {
    suite(Arc::new(MemoryStore::new()), Kind::Full).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("temporary directory");
    suite(Arc::new(LocalStore::new(dir.path())), Kind::Full).await;
    let left = std::fs::read_dir(dir.path().join(".tmp")).expect("temporary files").count();
    assert_eq!(left, 0, "no temporary file stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_opened_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let url = format!("file://{}/not/yet/there", dir.path().display());
    suite(open(&url, &BTreeMap::new()).expect("open"), Kind::Full).await;
}

#[tokio::test(start_paused = true)]
async fn retries_keep_the_contract_over_a_faulty_store() {
    for seed in 0..20 {
        let faults = Faults {
            lost_requests: 150,
            lost_answers: 150,
            delays: 100,
            delay_max: Duration::from_millis(300),
            corrupt_reads: 0,
        };
        let memory = Arc::new(MemoryStore::new());
        let policy = RetryPolicy {
            put_deadline: Duration::from_secs(300),
            read_deadline: Duration::from_secs(300),
            ..RetryPolicy::default()
        };
        let fault = Arc::new(FaultStore::new(memory, seed, faults));
        let retry = Arc::new(RetryStore::new(fault.clone(), Env::system(), policy));
        suite(retry.clone(), Kind::Retrying).await;
        assert!(fault.injected() > 20 && retry.retries() > 20);
    }
}

/// A server started for one test; it ends with it.
struct Server {
    child: Child,
    endpoint: String,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const BUCKET: &str = "contract";

async fn start(binary: &Path) -> Server {
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::create_dir(dir.path().join(BUCKET)).expect("bucket");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let child = Command::new(binary)
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .args(["--access-key", "test", "--secret-key", "testtest"])
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server starts");
    let server = Server { child, endpoint: format!("http://127.0.0.1:{port}"), _dir: dir };
    for _ in 0..200 {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return server;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the server did not come up");
}

fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// With `EMBASSYFS_TEST_S3` (an endpoint; bucket `EMBASSYFS_TEST_S3_BUCKET` or `contract`; keys from `AWS_*`) the
/// suite runs there and expects the full contract, unless `EMBASSYFS_TEST_S3_LAX` is set; else over the server that `scripts/test.sh` puts in place.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_s3_server_keeps_the_contract() {
    // A fresh prefix, for a real bucket is not emptied between runs.
    let prefix = hex(&Env::system().random_bytes::<8>());
    if let Ok(endpoint) = std::env::var("EMBASSYFS_TEST_S3") {
        let bucket = std::env::var("EMBASSYFS_TEST_S3_BUCKET").unwrap_or_else(|_| BUCKET.to_owned());
        let url = format!("s3://{bucket}/{prefix}");
        let store = open(&url, &options(&[("endpoint", &endpoint), ("allow_http", "true")])).expect("open");
        let kind = match std::env::var("EMBASSYFS_TEST_S3_LAX") {
            Ok(_) => Kind::TestServer,
            Err(_) => Kind::Full,
        };
        return suite(store, kind).await;
    }
    let binary = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/s3s-fs");
    if !binary.exists() {
        println!("skipped: no S3 server; `scripts/test.sh` puts one in place");
        return;
    }
    let server = start(&binary).await;
    let keys = [
        ("endpoint", server.endpoint.as_str()),
        ("access_key_id", "test"),
        ("secret_access_key", "testtest"),
    ];
    for url in [format!("s3://{BUCKET}/{prefix}/deep"), format!("s3://{BUCKET}")] {
        let store = open(&url, &options(&keys)).expect("open");
        suite(store, Kind::TestServer).await;
    }
    // Who looks before he puts keeps all of it but the race.
    let emulated = [&keys[..], &[("put_if_absent", "emulated")]].concat();
    suite(
        open(&format!("s3://{BUCKET}/{prefix}/looks"), &options(&emulated)).expect("open"),
        Kind::TestServer,
    )
    .await;

    let wrong = [keys[0], keys[1], ("secret_access_key", "wrong")];
    let store = open(&format!("s3://{BUCKET}"), &options(&wrong)).expect("open");
    let answer = store.get_suffix("volume.json", 1).await;
    assert!(matches!(answer, Err(StoreError::Denied { .. })), "{answer:?}");
    let answer = store.list("log/", None, 1).await;
    assert!(matches!(answer, Err(StoreError::Denied { .. })), "{answer:?}");

    let store = open("s3://no-such-bucket", &options(&keys)).expect("open");
    let answer = store.list("log/", None, 1).await;
    assert!(matches!(answer, Err(StoreError::Denied { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_not_there_is_unavailable() {
    let keys = [("endpoint", "http://127.0.0.1:1"), ("access_key_id", "k"), ("secret_access_key", "s")];
    let store = open("s3://bucket", &options(&keys)).expect("open");
    let error = store.get_suffix("volume.json", 1).await.expect_err("nobody listens");
    assert!(error.is_transient(), "{error}");
    println!("{error}");
}
