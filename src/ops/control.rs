//! The control channel of a daemon: a unix socket on which `status`, `sync`, `upgrade` and `umount` ask it things.
//! One JSON line asks; the answer is any number of `{"progress":...}` lines and then one `{"ok":...}` or `{"error":...}`.
//! Invariant: only the owner of the daemon and root are answered, and no call here waits without a bound.

use super::receipt::Asked;
use super::status::Status;
use crate::clock::Clock;
use crate::types::hex;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest line either side accepts.
const LINE_BYTES_MAX: u64 = 256 << 10;
/// How long one read of a request or one write of an answer may take.
const IO_WAIT: Duration = Duration::from_secs(5);
/// How often a waiting client is told how far it is, and how long it may hear nothing.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// What the client grants on top of the time it asked for.
const GRACE: Duration = Duration::from_secs(15);
/// Connections served at once; more are turned away.
const CONNECTIONS_MAX: usize = 32;

/// What the daemon can be asked to do. Implementations end within the time they are given.
pub trait Control: Send + Sync {
    /// How things stand. Must not wait for the store, nor for a commit in progress.
    fn status(&self) -> Status;
    /// Returns when everything written before the call is durable in the store, or with an error when that was not
    /// so within `timeout`.
    fn sync(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<Status, String>;
    /// Commits, and ships what can be shipped within `timeout`. The mount must keep working afterwards: the kernel
    /// may refuse to unmount it.
    fn shutdown(&self, timeout: Duration) -> Result<Status, String>;
    /// Commits everything applied before the call on this host.
    fn commit(&self, _timeout: Duration) -> Result<(), String> {
        Ok(())
    }
    /// Signs a statement about what the store holds. Contents are read from a commit there, never through the mount.
    fn sign(&self, _asked: &Asked, _timeout: Duration) -> Result<String, String> {
        Err("this daemon signs nothing".into())
    }
    /// Answers those who wait in [`Control::sync`] and [`Control::shutdown`] at once: nobody here will be able to.
    fn let_go(&self) {}
    /// Ships everything written before the call, and notes that the volume is to be handed over to `to` when it is closed
    /// soon; with `None` nobody is to get it any more.
    fn hand_over(
        &self,
        _to: Option<&str>,
        _timeout: Duration,
        _progress: &mut dyn FnMut(&Status),
    ) -> Result<Status, String> {
        Err("this daemon has nothing to hand over".into())
    }
    /// Lets `program` go on with the mount, in a process of its own. An error means that all is as it was.
    fn upgrade(&self, _program: &Path, _timeout: Duration) -> Result<Status, String> {
        Err("this daemon cannot hand its mount over".into())
    }
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// [`Control::status`].
    Status {},
    /// [`Control::sync`].
    Sync {
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
    /// [`Control::shutdown`].
    Shutdown {
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
    /// [`Control::upgrade`].
    Upgrade {
        /// What goes on.
        program: PathBuf,
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
    /// [`Control::hand_over`].
    HandOver {
        /// To whom; nobody takes an earlier one back.
        to: Option<String>,
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
    /// [`Control::sign`].
    Sign {
        /// What.
        asked: Asked,
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
    /// Answers with the last status when the daemon has closed the volume, right before it exits.
    Farewell {
        /// Bound, in milliseconds.
        timeout_ms: u64,
    },
}

impl Request {
    fn timeout(&self) -> Duration {
        match self {
            Request::Status {} => Duration::ZERO,
            Request::Sync { timeout_ms }
            | Request::Shutdown { timeout_ms }
            | Request::Upgrade { timeout_ms, .. }
            | Request::HandOver { timeout_ms, .. }
            | Request::Sign { timeout_ms, .. }
            | Request::Farewell { timeout_ms } => Duration::from_millis(*timeout_ms),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Progress(Status),
    Ok(Status),
    Signed(String),
    Error { message: String, status: Option<Status> },
}

/// A fuzz target: an answer that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz_reply(line: &[u8]) {
    if let Ok(reply) = serde_json::from_slice::<Reply>(line) {
        let again = serde_json::to_vec(&reply).expect("plain data");
        assert!(serde_json::from_slice::<Reply>(&again).is_ok());
        if let Reply::Ok(status) = reply {
            let _ =
                (status.to_string(), status.headline(), status.unsent_in_words(), status.ending_in_words());
        }
    }
}

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers, or not in time, or not in our language.
    #[error("{0}")]
    NoAnswer(String),
    /// The daemon answered that it could not.
    #[error("{message}")]
    Failed {
        /// Why.
        message: String,
        /// How things stood then.
        status: Option<Box<Status>>,
    },
}

/// The directory that holds the sockets of the daemons of user `uid`.
pub fn directory(uid: u32) -> PathBuf {
    if let Some(dir) = std::env::var_os("EMBASSYFS_RUN_DIR").filter(|d| !d.is_empty()) {
        return dir.into();
    }
    match uid {
        0 => "/run/embassyfs".into(),
        _ => match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
            Some(dir) if uid == own_uid() => Path::new(&dir).join("embassyfs"),
            _ if Path::new(&format!("/run/user/{uid}")).is_dir() => {
                format!("/run/user/{uid}/embassyfs").into()
            }
            _ => format!("/tmp/embassyfs-{uid}").into(),
        },
    }
}

/// The socket of the daemon that user `uid` runs for the mount at `mountpoint` (a normalised path).
pub fn socket_path(uid: u32, mountpoint: &Path) -> PathBuf {
    let hash = crate::crypto::hash(mountpoint.as_os_str().as_bytes());
    let name = hex(hash.0.first_chunk::<16>().expect("a hash has 32 bytes"));
    directory(uid).join(format!("{name}.sock"))
}

fn own_uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// The listening side. It ends with the process, or when dropped.
pub struct Server {
    path: PathBuf,
    inode: u64,
    shared: Arc<Shared>,
}

struct Shared {
    control: Arc<dyn Control>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: usize,
    /// Set when the volume is closed; those who wait for the end get it.
    last: Option<Status>,
    /// Clients that unmount and have not heard yet how it ended.
    leaving: usize,
}

/// A client's place among those that wait for the end; given back when it has heard, or is gone.
struct Leaving<'a> {
    shared: &'a Shared,
    counted: bool,
}

impl Leaving<'_> {
    fn set(&mut self, leaving: bool) {
        if self.counted != leaving {
            self.counted = leaving;
            let mut state = self.shared.lock();
            state.leaving = if leaving { state.leaving + 1 } else { state.leaving - 1 };
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves plain counters behind, which are still true enough.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Listens on `path`, replacing a socket that an earlier daemon left there.
    pub fn start(path: &Path, control: Arc<dyn Control>) -> io::Result<Server> {
        let dir = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        private_directory(dir)?;
        // Bound under another name first, so that no one meets the socket before its mode is set.
        let fresh = path.with_extension(format!("new{}", std::process::id()));
        let _ = std::fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&fresh, path)?;
        let inode = std::fs::symlink_metadata(path)?.ino();
        let shared = Arc::new(Shared { control, state: Mutex::default(), changed: Condvar::new() });
        let for_thread = shared.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_loop(&listener, &for_thread))?;
        Ok(Server { path: path.into(), inode, shared })
    }

    /// Waits a moment until those who are being answered have heard it: this process is about to end.
    pub fn drain(&self) {
        let state = self.shared.lock();
        drop(self.shared.changed.wait_timeout_while(state, IO_WAIT / 5, |s| s.connections > 0));
    }

    /// Tells those who wait for the end how it ended, and waits a moment until they have heard it. Who has begun an
    /// unmount counts among them from the beginning: it asks when the mount is gone, and by then the volume may be closed.
    pub fn finish(self, last: Status) {
        let mut state = self.shared.lock();
        state.last = Some(last);
        self.shared.changed.notify_all();
        let waited = self.shared.changed.wait_timeout_while(state, IO_WAIT, |s| s.leaving > 0);
        drop(waited);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not if another daemon has taken the name meanwhile.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes sure that `dir` exists, is ours, and that nobody else can put sockets into it.
fn private_directory(dir: &Path) -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = std::fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.uid() != own_uid() || meta.mode() & 0o022 != 0 {
        let text =
            format!("{}: must be a directory that only its owner, this user, can write", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

fn accept_loop(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => continue,
            Err(e) => {
                // Out of descriptors or memory; a pause lets others end, instead of spinning.
                ::log::warn!("control channel: {e}");
                std::thread::park_timeout(Duration::from_secs(1));
                continue;
            }
        };
        {
            let mut state = shared.lock();
            if state.connections >= CONNECTIONS_MAX {
                continue;
            }
            state.connections += 1;
        }
        let for_thread = shared.clone();
        let spawned = std::thread::Builder::new().name("control-client".into()).spawn(move || {
            if let Err(e) = serve(&stream, &for_thread) {
                ::log::debug!("control channel: {e}");
            }
            for_thread.lock().connections -= 1;
            for_thread.changed.notify_all();
        });
        if spawned.is_err() {
            shared.lock().connections -= 1;
        }
    }
}

/// Answers one connection with `control`; what [`Server`] does for each, here for a stream that is already there.
pub fn serve_one(stream: &UnixStream, control: Arc<dyn Control>) -> io::Result<()> {
    serve(stream, &Arc::new(Shared { control, state: Mutex::default(), changed: Condvar::new() }))
}

fn serve(stream: &UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let (peer, _) = peer(stream)?;
    stream.set_write_timeout(Some(IO_WAIT))?;
    if peer != 0 && peer != own_uid() {
        return send(
            stream,
            &Reply::Error { message: "only the owner and root may ask".into(), status: None },
        );
    }
    stream.set_read_timeout(Some(IO_WAIT))?;
    let mut reader = BufReader::new(stream.take(LINE_BYTES_MAX));
    let mut line = String::new();
    let mut leaving = Leaving { shared, counted: false };
    while {
        line.clear();
        reader.read_line(&mut line)?
    } > 0
    {
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                match &request {
                    Request::Shutdown { .. } | Request::Farewell { .. } => leaving.set(true),
                    Request::HandOver { to, .. } => leaving.set(to.is_some()),
                    _ => {}
                }
                let farewell = matches!(request, Request::Farewell { .. });
                send(stream, &answer(stream, shared, request)?)?;
                if farewell {
                    leaving.set(false);
                }
            }
            Err(e) => {
                let message = format!("not a request this daemon knows: {e}");
                return send(stream, &Reply::Error { message, status: None });
            }
        }
        reader.get_mut().set_limit(LINE_BYTES_MAX);
    }
    Ok(())
}

enum Step {
    Progress(Status),
    Done(Result<Reply, String>),
}

fn answer(stream: &UnixStream, shared: &Arc<Shared>, request: Request) -> io::Result<Reply> {
    let timeout = request.timeout();
    match request {
        Request::Status {} => return Ok(Reply::Ok(shared.control.status())),
        Request::Farewell { .. } => return Ok(farewell(shared, timeout)),
        Request::Sync { .. }
        | Request::Shutdown { .. }
        | Request::Upgrade { .. }
        | Request::HandOver { .. }
        | Request::Sign { .. } => {}
    }
    let (steps, inbox) = mpsc::sync_channel(16);
    let control = shared.control.clone();
    // A thread of its own, so that the client hears of progress however the work is done, and so that a client that
    // hangs up does not stop the work.
    std::thread::Builder::new().name("control-work".into()).spawn(move || {
        let mut progress = |s: &Status| {
            let _ = steps.try_send(Step::Progress(s.clone()));
        };
        let result = match request {
            Request::Sync { .. } => control.sync(timeout, &mut progress).map(Reply::Ok),
            Request::HandOver { to, .. } => {
                control.hand_over(to.as_deref(), timeout, &mut progress).map(Reply::Ok)
            }
            Request::Upgrade { program, .. } => control.upgrade(&program, timeout).map(Reply::Ok),
            Request::Sign { asked, .. } => control.sign(&asked, timeout).map(Reply::Signed),
            _ => control.shutdown(timeout).map(Reply::Ok),
        };
        let _ = steps.send(Step::Done(result));
    })?;
    loop {
        match inbox.recv_timeout(PROGRESS_EVERY) {
            Ok(Step::Progress(status)) => send(stream, &Reply::Progress(status))?,
            Err(RecvTimeoutError::Timeout) => send(stream, &Reply::Progress(shared.control.status()))?,
            Ok(Step::Done(Ok(reply))) => return Ok(reply),
            Ok(Step::Done(Err(message))) => {
                return Ok(Reply::Error { message, status: Some(shared.control.status()) });
            }
            Err(RecvTimeoutError::Disconnected) => {
                let message = "the daemon failed on this request; see its log".into();
                return Ok(Reply::Error { message, status: None });
            }
        }
    }
}

fn farewell(shared: &Shared, timeout: Duration) -> Reply {
    let state = shared.lock();
    let waited = shared.changed.wait_timeout_while(state, timeout, |s| s.last.is_none());
    let last = waited.unwrap_or_else(PoisonError::into_inner).0.last.clone();
    match last {
        Some(status) => Reply::Ok(status),
        None => Reply::Error { message: "still mounted".into(), status: None },
    }
}

fn send(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// User and process at the other end.
fn peer(stream: &UnixStream) -> io::Result<(u32, u32)> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` is a valid place of `len` bytes for the answer.
    let failed = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((cred.uid, cred.pid as u32))
}

/// The asking side.
pub struct Client {
    stream: BufReader<UnixStream>,
    pid: u32,
    clock: Arc<dyn Clock>,
}

impl Client {
    /// Connects to the daemon that listens on `path`, without waiting for ever when it is stuck.
    pub fn connect(path: &Path, clock: Arc<dyn Clock>) -> io::Result<Client> {
        // SAFETY: takes integers only; returns a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        // It also bounds connect(2), which waits while a stuck daemon's queue is full.
        stream.set_write_timeout(Some(IO_WAIT))?;
        // SAFETY: sockaddr_un is plain data for which all zeroes is a valid value.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let name = path.as_os_str().as_bytes();
        if name.len() >= address.sun_path.len() {
            let text = format!("{}: too long for a socket; set EMBASSYFS_RUN_DIR", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        for (to, from) in address.sun_path.iter_mut().zip(name) {
            *to = *from as libc::c_char;
        }
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        // SAFETY: `address` is a valid sockaddr_un of `len` bytes.
        if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Client::over(stream, clock)
    }

    /// A client on a stream that is already connected.
    pub fn over(stream: UnixStream, clock: Arc<dyn Clock>) -> io::Result<Client> {
        stream.set_write_timeout(Some(IO_WAIT))?;
        let (_, pid) = peer(&stream)?;
        Ok(Client { stream: BufReader::new(stream), pid, clock })
    }

    /// The daemon's process number, as the kernel says.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks, reports progress, and returns the answer; ends at the latest a little after the request's own bound.
    pub fn ask(
        &mut self,
        request: Request,
        progress: &mut dyn FnMut(&Status),
    ) -> Result<Status, ControlError> {
        match self.exchange(request, progress)? {
            Reply::Ok(status) => Ok(status),
            _ => Err(ControlError::NoAnswer("the daemon answers something else".into())),
        }
    }

    /// Has the daemon sign something; like [`Client::ask`].
    pub fn signed(&mut self, asked: Asked, timeout: Duration) -> Result<String, ControlError> {
        let request = Request::Sign { asked, timeout_ms: timeout.as_millis() as u64 };
        match self.exchange(request, &mut |_| {})? {
            Reply::Signed(text) => Ok(text),
            _ => Err(ControlError::NoAnswer("the daemon answers something else".into())),
        }
    }

    fn exchange(
        &mut self,
        request: Request,
        progress: &mut dyn FnMut(&Status),
    ) -> Result<Reply, ControlError> {
        let no_answer = |e: io::Error| {
            ControlError::NoAnswer(match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    "the daemon does not answer in time".into()
                }
                _ => format!("the daemon does not answer: {e}"),
            })
        };
        let mut line = serde_json::to_vec(&request).map_err(|e| no_answer(e.into()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(no_answer)?;
        let deadline = self.clock.monotonic() + request.timeout() + GRACE;
        loop {
            // A daemon at work says so twice a second; one that is silent for long is stuck.
            let silence = match request {
                Request::Farewell { .. } => deadline,
                _ => deadline.min(self.clock.monotonic() + GRACE),
            };
            match self.reply(silence).map_err(no_answer)? {
                Reply::Progress(status) => progress(&status),
                reply @ (Reply::Ok(_) | Reply::Signed(_)) => return Ok(reply),
                Reply::Error { message, status } => {
                    return Err(ControlError::Failed { message, status: status.map(Box::new) });
                }
            }
        }
    }

    fn reply(&mut self, deadline: Duration) -> io::Result<Reply> {
        let left = deadline.checked_sub(self.clock.monotonic()).filter(|d| !d.is_zero());
        let left = left.ok_or(io::ErrorKind::TimedOut)?;
        self.stream.get_ref().set_read_timeout(Some(left))?;
        let mut line = String::new();
        let n = (&mut self.stream).take(LINE_BYTES_MAX).read_line(&mut line)?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
