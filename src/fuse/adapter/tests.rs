//! Handlers that panic, asked over a pair of sockets as the kernel asks over its descriptor.

use super::*;
use crate::clock::Env;
use crate::fs::{Recovery, Settings};
use crate::fuse::connection::{Greeting, message_pair, receive_message, send_message};
use crate::fuse::serve::Backend;
use crate::log::{self, Frames};
use crate::ops::requests::Watch;
use crate::types::{CommitNo, FrameKind, FramePtr, Timestamp};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const MKDIR: u32 = 9;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const EIO: i32 = -libc::EIO;
const EROFS: i32 = -libc::EROFS;

/// Time that panics when it is asked for the n-th time from now; 0 is never.
#[derive(Default)]
struct Fuse(AtomicUsize);

impl Fuse {
    fn burn(&self) {
        let left = self.0.load(Ordering::SeqCst);
        self.0.store(left.saturating_sub(1), Ordering::SeqCst);
        assert!(left != 1, "the fuse has burnt down");
    }
}

struct BadClock(Arc<Fuse>);

impl Clock for BadClock {
    fn now(&self) -> Timestamp {
        self.0.burn();
        Timestamp::default()
    }
    fn monotonic(&self) -> Duration {
        self.0.burn();
        Duration::from_secs(1)
    }
}

/// A backend whose every call panics when told to, and which remembers what it was told of failures.
struct BadBackend {
    watch: Arc<Watch>,
    panics: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

impl BadBackend {
    fn step(&self) {
        assert!(self.panics.load(Ordering::SeqCst) == 0, "the backend panics");
    }
}

impl Backend for BadBackend {
    fn fetch(&self, _: Vec<FramePtr>) -> BoxFuture<'_, log::Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn when_durable(&self, _: CommitNo, done: Box<dyn FnOnce(Result<(), String>) + Send>) {
        self.step();
        done(Ok(()));
    }
    fn ships_on_fsync(&self) -> bool {
        self.step();
        false
    }
    fn free_bytes(&self) -> u64 {
        self.step();
        1 << 30
    }
    fn failed(&self, what: &str) {
        self.failures.lock().push(what.to_string());
    }
    fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }
}

struct NoFrames;

impl Frames for NoFrames {
    fn get(&self, ptr: FramePtr, _: FrameKind) -> log::Result<Bytes> {
        Err(log::Error::Missing(vec![ptr]))
    }
}

/// A kernel that asks one thing after the other.
struct Kernel {
    socket: OwnedFd,
    backend: Arc<BadBackend>,
    /// Of the file system, and of the pace of requests.
    clocks: [Arc<Fuse>; 2],
    fs: Arc<Fs>,
    server: Option<std::thread::JoinHandle<io::Result<Ended>>>,
    _pool: Runtime,
}

impl Kernel {
    fn start() -> Kernel {
        let clocks = [Arc::new(Fuse::default()), Arc::new(Fuse::default())];
        let env = Env { clock: Arc::new(BadClock(clocks[0].clone())), ..Env::system() };
        let fs = Arc::new(Fs::new(Settings::default(), env, Arc::new(NoFrames), Recovery::empty()));
        let backend = Arc::new(BadBackend {
            watch: Watch::new(Env::system().clock),
            panics: AtomicUsize::default(),
            failures: Mutex::default(),
        });
        let pool = Runtime::new().expect("a runtime");
        let requests = Requests::new(fs.clone(), backend.clone(), pool.handle().clone());
        let (socket, theirs) = message_pair(0).expect("sockets");
        let clock = Arc::new(BadClock(clocks[1].clone()));
        let server = std::thread::spawn(move || {
            let mut connection = Connection::new(theirs);
            let ready = Box::new(|_: &Greeting| Ok(()));
            let control = ControlDir::of(Vec::new(), Env::system().clock);
            let past = Past::new(Box::new(|_| Box::pin(async { Err(libc::ENOENT) })));
            serve(requests, &mut connection, &Switch::default(), clock, (control, past), ready)
        });
        let kernel = Kernel { socket, backend, clocks, fs, server: Some(server), _pool: pool };
        let mut init = [0u8; 64];
        (init[0], init[4]) = (7, 40);
        assert_eq!(kernel.ask(INIT, 0, &init).0, 0);
        kernel
    }

    /// Asks, and gives the error number and the bytes of the answer.
    fn ask(&self, opcode: u32, ino: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let mut request = Vec::new();
        request.extend(((40 + body.len()) as u32).to_ne_bytes());
        request.extend(opcode.to_ne_bytes());
        request.extend(77u64.to_ne_bytes());
        request.extend(ino.to_ne_bytes());
        request.extend([0; 16]);
        request.extend_from_slice(body);
        send_message(&self.socket, &request).expect("asked");
        let answer = receive_message(&self.socket).expect("answered");
        assert_eq!(answer[8..16], 77u64.to_ne_bytes(), "the answer is to what was asked");
        (i32::from_ne_bytes(answer[4..8].try_into().expect("four bytes")), answer[16..].to_vec())
    }

    fn mkdir(&self, name: &str) -> i32 {
        let body = [&[0xed, 1, 0, 0, 0, 0, 0, 0][..], name.as_bytes(), b"\0"].concat();
        self.ask(MKDIR, 1, &body).0
    }

    /// Makes a file; gives its inode.
    fn create(&self, name: &str) -> Result<u64, i32> {
        let body = [&[0u8; 16][..], name.as_bytes(), b"\0"].concat();
        match self.ask(CREATE, 1, &body) {
            (0, answer) => Ok(u64::from_ne_bytes(answer[..8].try_into().expect("eight bytes"))),
            (error, _) => Err(error),
        }
    }

    fn write(&self, ino: u64, data: &[u8]) -> i32 {
        let mut body = vec![0u8; 40];
        body[16..20].copy_from_slice(&(data.len() as u32).to_ne_bytes());
        body.extend_from_slice(data);
        self.ask(WRITE, ino, &body).0
    }

    fn works(&self) {
        assert_eq!(self.ask(GETATTR, 1, &[0; 16]).0, 0, "the mount goes on");
    }

    /// Waits until a failure with all `words` has been said; the answer may come a moment before.
    fn said(&self, words: &[&str]) -> String {
        for _ in 0..5000 {
            let failures = self.backend.failures.lock();
            if let Some(found) = failures.iter().find(|text| words.iter().all(|word| text.contains(word))) {
                return found.clone();
            }
            drop(failures);
            std::thread::park_timeout(Duration::from_millis(1));
        }
        panic!("nobody said {words:?}, but {:?}", self.backend.failures.lock());
    }

    fn end(mut self) {
        assert_eq!(self.ask(DESTROY, 0, &[]).0, 0);
        let served =
            self.server.take().expect("running").join().expect("no panic reaches the dispatch thread");
        assert_eq!(served.expect("served to the end"), Ended::Unmounted);
    }
}

#[test]
fn a_panic_before_a_change_is_an_error_of_that_request_alone() {
    let kernel = Kernel::start();
    let ino = kernel.create("file").expect("made");
    // The clock is asked first when a change begins: nothing is changed yet.
    kernel.clocks[0].0.store(1, Ordering::SeqCst);
    assert_eq!(kernel.mkdir("a-name"), EIO);
    let said = kernel.said(&["mkdir at inode 1", "burnt down"]);
    assert!(!said.contains("a-name"), "names are not for everybody: {said}");
    kernel.works();
    assert_eq!(kernel.mkdir("a-name"), 0, "it did not happen, and can be asked again");
    kernel.clocks[0].0.store(1, Ordering::SeqCst);
    assert_eq!(kernel.write(ino, b"secret"), EIO);
    assert!(!kernel.said(&[&format!("write at inode {ino}")]).contains("secret"));
    assert_eq!(kernel.write(ino, b"secret"), 0);
    assert_eq!(kernel.fs.failure(), None);
    kernel.end();
}

#[test]
fn a_panic_in_the_middle_of_a_change_latches_the_volume_and_the_mount_goes_on() {
    let kernel = Kernel::start();
    assert_eq!(kernel.mkdir("before"), 0);
    // Asked for the second time when the changes have been made, but for the end.
    kernel.clocks[0].0.store(2, Ordering::SeqCst);
    assert_eq!(kernel.mkdir("half"), EIO);
    assert!(kernel.fs.failure().is_some_and(|why| why.contains("panic in the middle of a change")));
    assert_eq!(kernel.mkdir("after"), EROFS);
    assert_eq!(kernel.ask(FSYNC, 1, &[0; 16]).0, EIO);
    assert_eq!(kernel.ask(LOOKUP, 1, b"before\0").0, 0);
    kernel.works();
    kernel.end();
}

#[test]
fn panics_around_the_file_system_are_caught_as_well() {
    let kernel = Kernel::start();
    // In the adapter itself, before any operation begins.
    kernel.clocks[1].0.store(1, Ordering::SeqCst);
    assert_eq!(kernel.ask(LOOKUP, 1, b"name\0").0, EIO);
    kernel.said(&["lookup at inode 1"]);
    kernel.backend.panics.store(1, Ordering::SeqCst);
    for opcode in [STATFS, FSYNC] {
        assert_eq!(kernel.ask(opcode, 1, &[0; 16]).0, EIO);
    }
    kernel.said(&["fsync at inode 1: panic: the backend panics"]);
    kernel.backend.panics.store(0, Ordering::SeqCst);
    assert_eq!(kernel.ask(FSYNC, 1, &[0; 16]).0, 0);
    kernel.works();
    kernel.end();
}
