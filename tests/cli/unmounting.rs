//! Unmounting what somebody holds: a writer at work, another mount namespace.

use super::{Place, can_mount, wait_for_end};
use embassyfs::clock::Env;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Writes on and on, until it gets an error.
fn writes_on(file: &Path) -> std::process::Child {
    let script = format!("exec >>'{}'; while printf 0123456789; do :; done", file.display());
    Command::new("sh").args(["-c", &script]).stderr(std::process::Stdio::null()).spawn().expect("sh")
}

#[test]
fn a_forced_unmount_under_a_writer_says_how_the_volume_was_left() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    for _ in 0..5 {
        place.mount(&[]).expect(0);
        let size = || std::fs::metadata(place.path("m/grows")).map_or(0, |meta| meta.len());
        let before = size();
        let mut writer = writes_on(&place.path("m/grows"));
        for _ in 0..2000 {
            if size() > before + 1000 {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        let held = std::fs::File::open(place.path("m/grows")).expect("opens");
        let forced = place.run(&["umount", "--force", "m"]);
        // 1: what came after the last commit is lost; 5: sent by the next mount. Both are told.
        let code = forced.0.status.code();
        assert!(matches!(code, Some(0 | 1 | 5)), "{code:?}: {}", forced.err());
        assert!(!forced.err().contains("cannot unmount"), "{}", forced.err());
        assert!(code == Some(0) || forced.err().contains("is unmounted"), "{}", forced.err());
        assert!(place.entry().is_none());
        drop(held);
        let _ = writer.kill(); // it may have ended by its error
        writer.wait().expect("ours");
    }
}

#[test]
fn a_copy_in_another_mount_namespace_is_named_at_once() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    let clock = Env::system().clock;
    for command in [&["umount", "m"][..], &["handover", "m", "--to", "other"]] {
        place.mount(&[]).expect(0);
        let pid = place.status().pid;
        let mut other = Command::new("unshare");
        let mut other =
            other.args(["-m", "--propagation", "private", "sleep", "60"]).spawn().expect("unshare");
        let comm = format!("/proc/{}/comm", other.id());
        while std::fs::read_to_string(&comm).is_ok_and(|name| name.trim() != "sleep") {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        let begun = clock.monotonic();
        let answer = place.run(command);
        let named = format!("sleep ({})", other.id());
        answer.fails(6, &["unmounted here", "another mount namespace", &named, "nsenter -t"]);
        assert_eq!(answer.err().contains("not handed over"), command[0] == "handover", "{}", answer.err());
        assert!(clock.monotonic() - begun < Duration::from_secs(20), "{:?}", clock.monotonic() - begun);
        other.kill().expect("ours");
        other.wait().expect("ours");
        wait_for_end(pid);
        assert!(!place.path("state/fenced").exists(), "what is said not to be handed over is not");
    }
    // With --force its users get errors, and the daemon ends.
    place.mount(&[]).expect(0);
    let mut other = Command::new("unshare");
    let mut other = other.args(["-m", "--propagation", "private", "sleep", "60"]).spawn().expect("unshare");
    std::thread::park_timeout(Duration::from_millis(300));
    let forced = place.run(&["umount", "--force", "m"]);
    assert!(matches!(forced.0.status.code(), Some(0 | 5)), "{}", forced.err());
    other.kill().expect("ours");
    other.wait().expect("ours");
}
