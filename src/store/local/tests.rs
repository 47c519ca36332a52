//! Tests of the store in a directory.

use super::*;

#[tokio::test]
async fn leftovers_are_not_listed_and_old_ones_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    let temps = dir.path().join(TEMP_DIR);
    fs::create_dir(&temps).unwrap();
    let old = File::create(temps.join("1-0")).unwrap();
    fs::write(temps.join("1-1"), "in flight").unwrap();
    old.set_modified(old.metadata().unwrap().modified().unwrap() - TEMP_AGE_MAX * 2).unwrap();

    let store = LocalStore::new(dir.path());
    store.put_new("volume.json", Bytes::from_static(b"x")).await.unwrap();
    let listed = store.list("", None, 10).await.unwrap();
    assert_eq!(listed, [ObjectInfo { name: "volume.json".into(), size: 1 }]);
    let left: Vec<_> = fs::read_dir(&temps).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["1-1"]);
}

#[tokio::test]
async fn a_missing_root_reads_as_empty_and_is_made_by_a_volumes_first_put() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::new(dir.path().join("a/b"));
    is_away(&store, "a/b is not there").await;
    assert!(!dir.path().join("a").exists());
    assert!(store.list("log/", None, 9).await.unwrap().is_empty());
    assert!(matches!(store.get_suffix("volume.json", 1).await, Err(StoreError::NotFound { .. })));
    store.put_new("volume.json", Bytes::from_static(b"{}")).await.unwrap();
    assert_eq!(store.get_suffix("volume.json", 1).await.unwrap(), (Bytes::from_static(b"}"), 2));
}

#[tokio::test]
async fn what_is_no_file_is_told_of_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    fs::create_dir(&log).unwrap();
    fs::write(dir.path().join("volume.json"), "{}").unwrap();
    let pipe = log.join("0000000000000001");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: `name` is a string that ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    std::os::unix::fs::symlink("0000000000000002", log.join("0000000000000002")).unwrap();
    std::os::unix::fs::symlink("nowhere", log.join("0000000000000003")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(log.join("0000000000000004")).unwrap();
    std::os::unix::fs::symlink("/dev/null", log.join("0000000000000005")).unwrap();
    std::os::unix::fs::symlink("..", log.join("0000000000000006")).unwrap();
    fs::create_dir(log.join("0000000000000007")).unwrap();

    let store = LocalStore::new(dir.path());
    let asked = async {
        let listed = store.list("log/", None, 99).await.unwrap();
        assert_eq!(listed.len(), 6, "all but the directory are listed: {listed:?}");
        for (n, what) in [(1, "a pipe"), (2, "to itself"), (3, "nowhere"), (4, "a socket"), (5, "a device")] {
            let name = format!("log/{n:016}");
            for error in [
                store.get_suffix(&name, 9).await.unwrap_err(),
                store.get_range(&name, 0..1).await.unwrap_err(),
                store.put_new(&name, Bytes::from_static(b"x")).await.unwrap_err(),
            ] {
                let text = error.to_string();
                assert!(text.starts_with(&name) && text.contains(what) && !error.is_transient(), "{text}");
            }
        }
        for n in [6, 7] {
            let answer = store.get_suffix(&format!("log/{n:016}"), 9).await;
            assert!(matches!(answer, Err(StoreError::NotFound { .. })), "{answer:?}");
        }
        // The directory is known by its superblock.
        fs::remove_file(dir.path().join("volume.json")).unwrap();
        fs::rename(&pipe, dir.path().join("volume.json")).unwrap();
        let store = LocalStore::new(dir.path());
        assert_eq!(store.list("log/", None, 9).await.unwrap().len(), 5);
        for error in [
            store.get_suffix("volume.json", 9).await.unwrap_err(),
            store.put_new(SEGMENT, Bytes::from_static(b"x")).await.unwrap_err(),
        ] {
            assert!(error.to_string().contains("volume.json is a pipe"), "{error}");
        }
    };
    tokio::time::timeout(Duration::from_secs(20), asked).await.expect("nothing waits");
    drop(socket);
}

const SEGMENT: &str = "log/0000000000000001";

/// Puts of segments are refused in words that name `what` and ask about the mount.
async fn is_away(store: &LocalStore, what: &str) {
    let error = store.put_new(SEGMENT, Bytes::from_static(b"x")).await.unwrap_err();
    let text = error.to_string();
    assert!(error.is_transient() && text.contains(what) && text.contains("still mounted?"), "{text}");
}

#[tokio::test]
async fn while_the_share_is_away_nothing_is_put_on_the_disk_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let (root, aside) = (dir.path().join("share/store"), dir.path().join("aside"));
    let store = LocalStore::new(&root);
    store.put_new("volume.json", Bytes::from_static(b"{}")).await.unwrap();
    drop(store);
    let store = LocalStore::existing(&root);
    assert_eq!(store.list("", None, 9).await.unwrap().len(), 1);
    let source = FileRef::system(&dir.path().join("segment"));
    fs::write(&source.path, "x").unwrap();

    fs::rename(&root, &aside).unwrap();
    is_away(&store, "share/store is not there").await;
    assert!(store.put_file(SEGMENT, &source).await.unwrap_err().is_transient());
    assert!(store.put_new("volume.json", Bytes::new()).await.unwrap_err().is_transient());
    assert!(store.get_suffix("volume.json", 1).await.unwrap_err().is_transient());
    assert!(store.list("", None, 9).await.unwrap_err().is_transient());
    assert!(!root.exists());

    fs::create_dir(&root).unwrap();
    is_away(&store, "another directory").await;
    assert!(store.get_suffix("volume.json", 1).await.unwrap_err().is_transient(), "not: no such object");
    fs::write(root.join("volume.json"), "[]").unwrap();
    is_away(&store, "another directory").await;
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1);

    // Mounted anew it may be another device, and is known by its superblock.
    fs::remove_dir_all(&root).unwrap();
    fs::create_dir(&root).unwrap();
    fs::copy(aside.join("volume.json"), root.join("volume.json")).unwrap();
    store.put_file(SEGMENT, &source).await.unwrap();
    assert_eq!(store.get_suffix(SEGMENT, 9).await.unwrap().0, Bytes::from_static(b"x"));
}

#[tokio::test]
async fn a_store_that_was_away_from_the_start_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = LocalStore::existing(&root);
    is_away(&store, "is not there").await;
    assert!(store.get_suffix("volume.json", 1).await.unwrap_err().is_transient());
    assert!(crate::store::reachable(&store, Duration::from_secs(10)).await.unwrap_err().is_transient());
    fs::create_dir(&root).unwrap();
    is_away(&store, "holds no volume.json").await;
    fs::write(root.join("volume.json"), "{}").unwrap();
    crate::store::reachable(&store, Duration::from_secs(10)).await.unwrap();
    store.put_new(SEGMENT, Bytes::from_static(b"x")).await.unwrap();
}
