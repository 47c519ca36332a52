//! The command line from outside: exit codes, messages, precedence, the life of a mount; and the control protocol
//! against a control that is made up. Mounts need /dev/fuse and root; without them those tests say so and pass.

use embassyfs::clock::Env;
use embassyfs::ops::control::{Client, Control, ControlError, Request, Server, serve_one};
use embassyfs::ops::status::Status;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

#[path = "cli/unmounting.rs"]
mod unmounting;

const PROGRAM: &str = env!("CARGO_BIN_EXE_embassyfs");

/// A directory with a store, keys, a state directory and a mount point of its own; unmounts when dropped.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().expect("temporary directory"));
        std::fs::create_dir(place.path("m")).expect("writable");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().expect("it exists").join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn store(&self) -> String {
        format!("file://{}", self.text("store"))
    }

    fn run(&self, args: &[&str]) -> Answer {
        self.run_as(Command::new(PROGRAM).args(args))
    }

    fn run_as(&self, command: &mut Command) -> Answer {
        command
            .env("EMBASSYFS_RUN_DIR", self.path("run"))
            .env_remove("EMBASSYFS_LOG")
            .current_dir(self.0.path());
        Answer(command.output().expect("the program starts"))
    }

    fn init(&self) {
        self.run(&["init", "--store", &self.store(), "--keys", "keys", "--name", "land"]).expect(0);
    }

    /// The words that mount this place, before the mount point.
    fn mount_words(&self) -> Vec<String> {
        let words = ["mount", "--store", &self.store(), "--key", "keys/writer.key", "--state", "state"];
        words.map(String::from).to_vec()
    }

    fn mount(&self, more: &[&str]) -> Answer {
        let words = self.mount_words();
        let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
        args.extend(more);
        args.push("m");
        self.run(&args)
    }

    fn entry(&self) -> Option<embassyfs::fuse::table::MountEntry> {
        embassyfs::fuse::table::find(&self.path("m")).expect("the mount table")
    }

    fn status(&self) -> Status {
        let answer = self.run(&["status", "--json", "m"]);
        answer.expect(0);
        serde_json::from_str(&answer.out()).expect("status is JSON")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = embassyfs::fuse::mount::unmount(&self.path("m"), embassyfs::fuse::mount::Unmount::Force);
    }
}

struct Answer(Output);

impl Answer {
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    fn err(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    #[track_caller]
    fn expect(&self, code: i32) -> &Answer {
        assert_eq!(self.0.status.code(), Some(code), "stdout: {}\nstderr: {}", self.out(), self.err());
        self
    }

    /// Failed with this code, one line on standard error, and all of `words` in it.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        self.expect(code);
        let err = self.err();
        assert_eq!(err.lines().count(), 1, "{err}");
        for word in words {
            assert!(err.contains(word), "no '{word}' in: {err}");
        }
    }
}

fn can_mount() -> bool {
    let can = embassyfs::fuse::mount::own_ids().0 == 0 && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

fn kill(pid: u32, signal: &str) {
    let done = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill runs");
    assert!(done.success());
}

fn wait_for_end(pid: u32) {
    if let Ok(process) = embassyfs::fuse::mount::Pidfd::open(pid) {
        assert!(process.wait(Duration::from_secs(20)).expect("poll"), "process {pid} goes on");
    }
}

#[test]
fn help_version_and_manual() {
    let place = Place::new();
    assert!(place.run(&["--version"]).expect(0).out().starts_with("embassyfs "));
    assert!(place.run(&["--help"]).expect(0).out().contains("Examples:"));
    for command in [
        "init",
        "mount",
        "umount",
        "sync",
        "status",
        "versions",
        "diff",
        "restore",
        "verify",
        "receipt",
        "manifest",
        "drill",
        "recover-key",
    ] {
        assert!(place.run(&[command, "--help"]).expect(0).out().contains("Examples:"), "{command}");
    }
    assert!(place.run(&["mount", "--help"]).out().contains("protection=LEVEL"));
    assert!(place.run(&["init", "--help"]).out().contains("try passphrases"));
    assert!(place.run(&["--help"]).out().lines().any(|line| line.trim_start().starts_with("man ")));
    place.run(&["man", "--out", "new/man1"]).expect(0);
    let page = |name: &str| std::fs::read_to_string(place.path("new/man1").join(name)).expect("written");
    assert!(place.path("new/man1/embassyfs-recover-key.1").exists());
    for name in ["embassyfs.1", "embassyfs-mount.1", "embassyfs-receipt-check.1", "embassyfs-promote.1"] {
        let (_, examples) =
            page(name).split_once(".SH EXAMPLES\n.nf\n").map(|(a, b)| (a.len(), b.to_string())).expect(name);
        assert!(examples.trim_start().starts_with("embassyfs "), "{examples}");
    }
    assert!(page("embassyfs-promote.1").contains("key writer.key \\e\n    \\-\\-state"));
    assert!(page("embassyfs-mount.1").contains(".SH MOUNT OPTIONS (\\-o)"));
    std::fs::write(place.path("file"), "").expect("writable");
    place.run(&["man", "--out", "file"]).fails(1, &["manual pages into file", "directory"]);
    place.run(&[]).expect(2);
    place.run(&["frobnicate"]).expect(2);
}

#[test]
fn wrong_usage_is_refused_by_name() {
    let place = Place::new();
    place.run(&["mount", "m"]).fails(2, &["--store URL is missing", "--config FILE"]);
    place.mount(&["-o", "rw,cachesize=5"]).fails(2, &["'cachesize'", "cache_size=SIZE"]);
    place.mount(&["-o", "cache_size=lots"]).fails(2, &["'cache_size'", "10G"]);
    place.mount(&["--at", "17"]).fails(2, &["--read-only"]);
    let yesterday = place.mount(&["--read-only", "--at", "yesterday"]);
    assert!(yesterday.expect(2).err().contains("neither a commit number"));
    place.run(&["status", "m"]).fails(3, &["no EmbassyFS volume is mounted"]);
    place.run(&["sync", "/proc"]).fails(3, &["type proc"]);
    place.run(&["umount", "m"]).fails(3, &["m"]);
    let words = ["init", "--store", "file:///x", "--keys", "k", "--name"];
    place.run(&[&words[..], &["a,b"]].concat()).fails(2, &["'a,b'"]);
    place.run(&[&words[..], &["a\x1b[1m"]].concat()).fails(2, &["--name"]);
    // What other hosts will read is refused here when it would speak to their terminals.
    let store = ["--store", "file:///x", "--key", "k", "--state", "s"];
    for (command, flag) in
        [("promote", "--reason"), ("promote", "--host"), ("accept", "--name"), ("accept", "--host")]
    {
        for words in ["fire\x1b[31m", "a\nb", "\u{9b}2J"] {
            let answer = place.run(&[&[command], &store[..], &[flag, words]].concat());
            answer.fails(2, &[flag, "control characters"]);
            assert!(!answer.err().contains(['\x1b', '\u{9b}']));
        }
    }
    place.run(&["handover", "m", "--to", "a\nb"]).fails(2, &["--to", "control characters"]);
}

#[test]
fn mount_points_that_cannot_be_are_refused_before_anything_is_made() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").expect("writable");
    let words = place.mount_words();
    let mount_at = |dir: &str| {
        let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
        args.push(dir);
        place.run(&args)
    };
    mount_at("missing").fails(2, &["missing", "make the directory"]);
    mount_at("file").fails(2, &["not a directory"]);
    mount_at("/").fails(2, &["/"]);
    assert!(!place.path("state").exists());
    let inside = ["mount", "--store", "file:///x", "--key", "k", "--state", "m/state", "m"];
    place.run(&inside).fails(2, &["below the mount point"]);
}

#[test]
fn config_files_are_checked_and_flags_win() {
    let place = Place::new();
    let config = |text: &str| std::fs::write(place.path("c.toml"), text).expect("writable");
    config("stroe = 'x'");
    place.run(&["mount", "--config", "c.toml"]).fails(2, &["stroe", "c.toml", "known keys"]);
    config("store = 'file:///x'\noptions = 'ro,nonsense=1'");
    place.run(&["mount", "--config", "c.toml", "m"]).fails(2, &["c.toml", "nonsense"]);
    config("store = 'file:///x'\nkey = 'k'\nstate = 's'\nmountpoint = 'm'\nat = 5");
    // Everything but read-only is there; the flag makes it complete, and the missing store is what is left.
    place.run(&["mount", "--config", "c.toml"]).fails(2, &["add --read-only"]);
    place.run(&["mount", "--config", "missing.toml"]).fails(2, &["missing.toml"]);
    place.run(&["mount", "--config", "c.toml", "--at", "4", "-o", "protection=loose"]).fails(2, &["loose"]);
}

#[test]
fn init_makes_keys_for_their_owner_only_and_never_twice() {
    let place = Place::new();
    place.init();
    for name in ["writer.key", "reader.key", "auditor.key", "steward.key"] {
        let mode = std::fs::metadata(place.path("keys").join(name)).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let again = place.run(&["init", "--store", &place.store(), "--keys", "keys2"]);
    again.fails(8, &["store"]);
    // A path that is a mistake is no reason to close a file to others.
    let passwd = place.run(&["versions", "--store", &place.store(), "--key", "/etc/passwd"]);
    passwd.fails(8, &["/etc/passwd", "no key file"]);
    assert!(!passwd.err().contains("chmod"), "{}", passwd.err());
    std::fs::write(place.path("short"), "secret\n").expect("writable");
    let words = ["init", "--store", "file:///x", "--keys", "k", "--passphrase-file", "short"];
    place.run(&words).fails(2, &["shorter than"]);
}

#[test]
fn a_passphrase_brings_back_a_readers_key() {
    let place = Place::new();
    std::fs::write(place.path("words"), "correct horse battery staple\n").expect("writable");
    std::fs::write(place.path("others"), "correct horse battery stable\n").expect("writable");
    let store = place.store();
    let init = ["init", "--store", &store, "--keys", "keys", "--name", "land", "--passphrase-file", "words"];
    place.run(&init).expect(0);
    let recover = |words: &str, out: &str| {
        place.run(&["recover-key", "--store", &store, "--passphrase-file", words, out])
    };
    recover("others", "new.key").fails(8, &["passphrase does not open", "typing error"]);
    assert!(!place.path("new.key").exists());
    assert!(recover("words", "new.key").expect(0).out().contains("volume land"));
    let mode = std::fs::metadata(place.path("new.key")).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    recover("words", "new.key").fails(8, &["exists already"]);
    place.run(&["versions", "--store", &store, "--key", "new.key"]).expect(0);
    assert_eq!(
        std::fs::read(place.path("new.key")).expect("readable"),
        std::fs::read(place.path("keys/reader.key")).expect("readable")
    );
}

#[test]
fn a_key_is_not_recovered_from_what_has_no_passphrase() {
    let place = Place::new();
    std::fs::write(place.path("words"), "correct horse battery staple\n").expect("writable");
    let store = place.store();
    let recover = || place.run(&["recover-key", "--store", &store, "--passphrase-file", "words", "new.key"]);
    recover().fails(7, &["no volume in the store"]);
    place.init();
    recover().fails(8, &["no passphrase slot"]);
    assert!(!place.path("new.key").exists());
    place
        .run(&["recover-key", "--store", &store, "new.key"])
        .fails(2, &["--passphrase-file FILE is missing"]);
}

#[test]
fn a_mount_lives_and_ends_as_it_should() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    place.mount(&["-o", "allow_other,protection=local"]).expect(0);
    let entry = place.entry().expect("mounted");
    assert_eq!(entry.source, "embassyfs:land");
    assert!(entry.options.contains("nosuid,nodev") && entry.super_options.contains("allow_other"));
    let status = place.status();
    assert_eq!((status.protection.as_str(), status.volume.as_str()), ("local", "land"));
    assert_eq!(status.mountpoint, place.text("m"));
    // A fresh volume commits its root directory within a second, and says until it is shipped that it is not.
    place.run(&["sync", "m"]).expect(0);
    assert!(place.run(&["status", "m"]).expect(0).out().contains("in sync"));
    // Others may have mounts too, so only ours is looked for.
    assert!(place.run(&["status"]).out().contains(&place.text("m")));
    place.mount(&[]).fails(6, &["already mounted", "umount"]);

    let mut user = Command::new("sleep").arg("60").current_dir(place.path("m")).spawn().expect("sleep");
    place.run(&["umount", "m"]).fails(6, &["in use by sleep", "--lazy"]);
    assert_eq!(place.status().pid, status.pid, "a refused unmount leaves the daemon as it was");
    user.kill().expect("ours");
    user.wait().expect("ours");

    place.run(&["umount", "m"]).expect(0);
    assert!(place.entry().is_none());
    // It may still be listed in /proc, ended and not collected by its parent.
    let ended = embassyfs::fuse::mount::Pidfd::open(status.pid).and_then(|p| p.wait(Duration::ZERO));
    assert!(ended.unwrap_or(true), "umount waits for the daemon");
    let log = std::fs::read_to_string(place.path("state/embassyfs.log")).expect("the daemon logs");
    assert!(log.contains("ready") && log.contains("closed"));
}

#[test]
fn a_failing_mount_says_why_in_one_line() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.mount(&[]).fails(8, &["key file", "writer.key"]);
    place.init();
    std::fs::remove_dir_all(place.path("store")).expect("writable");
    let answer = place.mount(&[]);
    assert_ne!(answer.0.status.code(), Some(0));
    assert_eq!(answer.err().lines().count(), 1, "{}", answer.err());
    assert!(answer.err().contains("store"), "{}", answer.err());
    assert!(place.entry().is_none());
}

#[test]
fn a_killed_daemon_is_named_and_cleared() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    place.mount(&[]).expect(0);
    let pid = place.status().pid;
    kill(pid, "-9");
    wait_for_end(pid);
    place.run(&["status", "m"]).fails(4, &["cannot be reached", "umount --force"]);
    place.mount(&[]).fails(6, &["already mounted"]);
    place.run(&["umount", "m"]).fails(5, &["cannot be told", "same state directory"]);
    assert!(place.entry().is_none());
    place.mount(&[]).expect(0); // and its socket, left behind, is replaced
    place.status();
    place.run(&["umount", "--force", "m"]).expect(0);
}

#[test]
fn a_signal_unmounts_and_ends_the_daemon() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    for signal in ["-TERM", "-INT", "-HUP"] {
        place.mount(&[]).expect(0);
        let pid = place.status().pid;
        kill(pid, signal);
        wait_for_end(pid);
        assert!(place.entry().is_none(), "{signal}");
    }
}

#[test]
fn mount8_and_a_lazy_unmount() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    place.init();
    let helper = place.path("mount.embassyfs");
    std::os::unix::fs::symlink(PROGRAM, &helper).expect("writable");
    let options = format!(
        "rw,_netdev,x-systemd.requires=a,key={},state={},allow_other",
        place.text("keys/writer.key"),
        place.text("state")
    );
    let mount = |more: &[&str]| {
        place.run_as(
            Command::new(&helper)
                .args([&place.store(), &place.text("m")])
                .args(["-v", "-o", &options])
                .args(more),
        )
    };
    mount(&["-f"]).expect(0);
    assert!(place.entry().is_none(), "-f only looks");
    mount(&[]).expect(0);
    assert_eq!(place.entry().expect("mounted").source, place.store(), "as mount -a wants to find it");
    let pid = place.status().pid;
    let mut user = Command::new("sleep").arg("60").current_dir(place.path("m")).spawn().expect("sleep");
    let lazy = place.run(&["umount", "--lazy", "m"]);
    assert!(lazy.expect(0).err().contains("until the last user has left"), "{}", lazy.err());
    assert!(place.entry().is_none());
    user.kill().expect("ours");
    user.wait().expect("ours");
    wait_for_end(pid);
}

/// A control whose shipping never gets to its end.
struct Stuck;

impl Control for Stuck {
    fn status(&self) -> Status {
        Status { unsent_bytes: 1 << 20, unsent_segments: 2, state: "/s".into(), ..Status::default() }
    }

    fn sync(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<Status, String> {
        progress(&self.status());
        std::thread::park_timeout(timeout);
        Err(format!("not within {timeout:?}"))
    }

    fn shutdown(&self, _: Duration) -> Result<Status, String> {
        Ok(self.status())
    }
}

fn pair() -> (Client, std::thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let server = std::thread::spawn(move || serve_one(&theirs, Arc::new(Stuck)).expect("served"));
    (Client::over(ours, Env::system().clock).expect("client"), server)
}

#[test]
fn the_control_protocol_reports_progress_success_and_failure() {
    let (mut client, server) = pair();
    assert_eq!(client.pid(), std::process::id());
    let status = client.ask(Request::Status {}, &mut |_| {}).expect("status");
    assert_eq!(status.unsent_in_words(), "1.0 MiB in 2 segments");
    let mut heard = 0;
    let failed = client.ask(Request::Sync { timeout_ms: 1300 }, &mut |_| heard += 1);
    let Err(ControlError::Failed { message, status: Some(status) }) = failed else { panic!("{failed:?}") };
    assert!(message.contains("1.3s") && status.has_unsent());
    assert!(heard >= 2, "the control's own word and the regular ones: {heard}");
    assert!(client.ask(Request::Shutdown { timeout_ms: 10 }, &mut |_| {}).expect("done").has_unsent());
    let farewell = client.ask(Request::Farewell { timeout_ms: 10 }, &mut |_| {});
    assert!(matches!(farewell, Err(ControlError::Failed { .. })), "{farewell:?}");
    drop(client);
    server.join().expect("no panic");
}

#[test]
fn nonsense_on_the_control_channel_is_answered_and_harms_nothing() {
    for nonsense in
        [&b"hello\n"[..], b"{\"request\":\"explode\"}\n", b"{\"request\":\"status\",\"x\":1}\n", b"\xff\n"]
    {
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let server = std::thread::spawn(move || drop(serve_one(&theirs, Arc::new(Stuck))));
        ours.write_all(nonsense).expect("written");
        ours.shutdown(std::net::Shutdown::Write).expect("half closed");
        let mut line = String::new();
        let n = BufReader::new(&ours).read_line(&mut line).expect("an answer or the end");
        assert!(n == 0 || line.contains("error"), "{line}");
        server.join().expect("no panic");
    }
}

#[test]
fn a_server_replaces_a_stale_socket_and_says_farewell() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("run/x.sock");
    let first = Server::start(&path, Arc::new(Stuck)).expect("listens");
    let second = Server::start(&path, Arc::new(Stuck)).expect("replaces");
    drop(first);
    assert!(path.exists(), "the first leaves alone what is the second's");
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    let mut client = Client::connect(&path, Env::system().clock).expect("connects");
    client.ask(Request::Status {}, &mut |_| {}).expect("status");
    let waiting = std::thread::spawn(move || {
        client.ask(Request::Farewell { timeout_ms: 20_000 }, &mut |_| {}).expect("last")
    });
    std::thread::park_timeout(Duration::from_millis(100));
    second.finish(Status { pid: 99, ..Status::default() });
    assert_eq!(waiting.join().expect("no panic").pid, 99);
    assert!(!path.exists());
}

#[test]
fn a_run_directory_that_others_can_write_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let run = dir.path().join("run");
    std::fs::create_dir(&run).expect("writable");
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("ours");
    assert!(Server::start(&run.join("x.sock"), Arc::new(Stuck)).is_err());
}
