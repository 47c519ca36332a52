//! Handing a mount over to a successor: what the daemon that has it does.
//! Invariant: until it has said [`passing::Serve`] this process keeps the connection, and goes on with the mount itself
//! if anything fails; by then every request that took effect is committed and answered, and the kernel asks for the
//! others again.

use super::daemon;
use super::exit::Failure;
use super::mount::MountPlan;
use super::passing::{self, Answer, Hello, Serve, Take};
use super::seam::{self, Served};
use crate::clock::Env;
use crate::fuse::connection::{Connection, Greeting, Switch};
use crate::fuse::mount::Pidfd;
use crate::fuse::pass::send_fd;
use crate::ops::control::Control;
use crate::ops::receipt::Asked;
use crate::ops::status::Status;
use crate::replica::Predecessor;
use crate::types::CommitNo;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a commit may take, before the gate is closed and after it.
const COMMIT_WAIT: Duration = Duration::from_secs(30);
const LAST_COMMIT_WAIT: Duration = Duration::from_secs(10);
/// How long a successor may take to start, and to open the volume. Applications wait for the second.
const PREPARE_WAIT: Duration = Duration::from_secs(30);
const OPEN_WAIT: Duration = Duration::from_secs(20);
/// How long it may take to end after SIGKILL.
const KILLED_WAIT: Duration = Duration::from_secs(10);
/// How often the volume is opened again after a handover that failed, and the pause between.
const REOPENINGS: u32 = 20;
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

/// Where the thread that was asked to hand over and the thread that serves meet.
#[derive(Default)]
pub(super) struct Relay {
    /// Stops serving.
    pub switch: Switch,
    /// How the connection began, and which commit a reader shows; there while it is served.
    served: Mutex<Option<(Greeting, Option<CommitNo>)>>,
    /// Held by who hands over.
    busy: Mutex<()>,
    next: Mutex<Option<Next>>,
}

/// A successor that is ready, and who waits to hear how it went.
struct Next {
    successor: Successor,
    answer: Sender<Result<(), String>>,
}

/// How handing over went.
pub(super) enum Handed {
    /// The mount is somebody else's.
    Over,
    /// It is still ours.
    Back(Box<dyn Served>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// From now on the connection can be handed over.
    pub fn serving(&self, greeting: Greeting, shown: Option<CommitNo>) {
        *lock(&self.served) = Some((greeting, shown));
    }

    /// True once requests are answered.
    pub fn is_serving(&self) -> bool {
        lock(&self.served).is_some()
    }

    /// Hands over to `program`; called by the thread that was asked to. `control` gives the volume's.
    pub fn ask(
        &self,
        plan: &MountPlan,
        program: &Path,
        control: impl Fn() -> Arc<dyn Control>,
    ) -> Result<(), String> {
        let Ok(_busy) = self.busy.try_lock() else { return Err("it is being handed over already".into()) };
        let Some((greeting, shown)) = lock(&self.served).clone() else {
            return Err("the mount is not served yet".into());
        };
        let words = |e: io::Error| e.to_string();
        Connection::check_can_be_handed_over(&greeting).map_err(words)?;
        if program.starts_with(&plan.settings.mountpoint) {
            return Err(format!("{} lies on the mount that it is to serve", program.display()));
        }
        if plan.request.read_only {
            // If the successor fails, the volume must be opened again, which a reader does from the store.
            seam::check_store(&plan.request).map_err(|e| e.to_string())?;
        }
        let hello = Hello::new(plan, shown, &greeting).map_err(words)?;
        let successor = Successor::start(program, &hello)?;
        // What can be done while applications work shall not keep them waiting.
        control().commit(COMMIT_WAIT)?;
        let (answer, inbox) = channel();
        *lock(&self.next) = Some(Next { successor, answer });
        if let Err(e) = self.switch.stop() {
            *lock(&self.next) = None;
            return Err(e.to_string());
        }
        self.hear(&inbox)
    }

    fn hear(&self, inbox: &Receiver<Result<(), String>>) -> Result<(), String> {
        inbox.recv().unwrap_or_else(|_| Err("the daemon failed on this; see its log".into()))
    }

    /// Hands over what is no longer served; called by the thread that served it. `leave` drops all control of the
    /// volume but its own. An error means that the volume could not be opened again.
    pub fn hand_over(
        &self,
        plan: &MountPlan,
        volume: Box<dyn Served>,
        connection: &Connection,
        leave: impl FnOnce(),
    ) -> Result<Handed, Failure> {
        let next = lock(&self.next).take();
        let Some(Next { mut successor, answer }) = next else { return Ok(Handed::Back(volume)) };
        let clock = Env::system().clock;
        let begun = clock.monotonic();
        let since = || (clock.monotonic() - begun).as_millis();
        // Only what came in since the last commit, but not to be lost either.
        if let Err(e) = volume.control().commit(LAST_COMMIT_WAIT) {
            ::log::error!("not handed over: {e}");
            successor.end();
            let _ = answer.send(Err(e)); // who asked may have gone
            return Ok(Handed::Back(volume));
        }
        volume.control().let_go();
        leave();
        let shown = volume.shown();
        let committed = since();
        let before = volume.pass_on();
        let closed = since();
        match successor.take(&before, connection.fd.as_fd()) {
            Ok(()) => {
                ::log::info!(
                    "process {} goes on with the mount; committed after {committed} ms, closed after {closed} ms, \
                     handed over after {} ms",
                    successor.child.id(),
                    since()
                );
                daemon::notify_new_main_process(successor.child.id());
                let _ = answer.send(Ok(()));
                Ok(Handed::Over)
            }
            Err(e) => {
                ::log::error!("not handed over, going on ({} ms): {e}", since());
                successor.end();
                let volume = reopen(plan, shown, &before)?;
                let _ = answer.send(Err(e));
                Ok(Handed::Back(volume))
            }
        }
    }
}

/// Opens again what was closed for a successor that failed.
fn reopen(
    plan: &MountPlan,
    shown: Option<CommitNo>,
    before: &Predecessor,
) -> Result<Box<dyn Served>, Failure> {
    let mut request = plan.request.clone();
    if let Some(no) = shown.filter(|no| no.0 > 0) {
        request.at = Some(super::options::At::Commit(no));
    }
    let mut left = REOPENINGS;
    loop {
        match seam::prepare(request.clone()).and_then(|prepared| prepared.open(Some(before))) {
            Err(e) if left > 0 => {
                ::log::error!("the volume cannot be opened again yet: {e}");
                left -= 1;
                std::thread::sleep(REOPEN_PAUSE);
            }
            done => return done,
        }
    }
}

/// A process that is to go on.
struct Successor {
    child: Child,
    socket: UnixStream,
}

impl Successor {
    /// Starts it, and returns when it has understood what the mount is.
    fn start(program: &Path, hello: &Hello) -> Result<Successor, String> {
        let cannot = |e: io::Error| format!("{} cannot take over: {e}", program.display());
        let (socket, theirs) = UnixStream::pair().map_err(cannot)?;
        let stderr = if hello.foreground { Stdio::inherit() } else { Stdio::null() };
        let child = Command::new(program)
            .arg("take-over")
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(cannot)?;
        let mut successor = Successor { child, socket };
        let prepared = successor.prepare(hello);
        if prepared.is_err() {
            successor.end();
        }
        prepared.map(|()| successor).map_err(|e| format!("{} cannot take over: {e}", program.display()))
    }

    fn prepare(&mut self, hello: &Hello) -> Result<(), String> {
        let words = |e: io::Error| format!("it does not answer as a successor does ({e})");
        self.socket.set_write_timeout(Some(PREPARE_WAIT)).map_err(words)?;
        passing::send(&self.socket, hello).map_err(words)?;
        match passing::receive(&self.socket, Some(PREPARE_WAIT)).map_err(words)? {
            Answer::Prepared { version } => {
                ::log::info!("version {version} is ready to go on, as process {}", self.child.id());
                Ok(())
            }
            Answer::Failed { message } => Err(message),
            Answer::Opened {} => Err("it answers what was not asked".into()),
        }
    }

    /// Gives it all; after an `Ok` the mount is its own.
    fn take(&mut self, before: &Predecessor, connection: std::os::fd::BorrowedFd<'_>) -> Result<(), String> {
        let words = |e: io::Error| format!("the successor does not answer: {e}");
        passing::send(&self.socket, &Take::new(before)).map_err(words)?;
        (&self.socket).write_all(&before.held).map_err(words)?;
        send_fd(&self.socket, connection).map_err(words)?;
        match passing::receive(&self.socket, Some(OPEN_WAIT)).map_err(words)? {
            Answer::Opened {} => passing::send(&self.socket, &Serve {}).map_err(words),
            Answer::Failed { message } => Err(format!("the successor failed: {message}")),
            Answer::Prepared { .. } => Err("the successor answers what was not asked".into()),
        }
    }

    /// Makes sure that it holds nothing any more.
    fn end(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let ended = Pidfd::open(self.child.id()).and_then(|p| p.wait(KILLED_WAIT));
        if ended.is_ok_and(|ended| ended) {
            let _ = self.child.wait();
        }
    }
}

/// What is answered while no volume is open: how it stood last.
pub(super) struct Interlude(pub Status);

impl Control for Interlude {
    fn status(&self) -> Status {
        self.0.clone()
    }

    fn sync(&self, _: Duration, _: &mut dyn FnMut(&Status)) -> Result<Status, String> {
        Err("another process goes on with the mount; ask again".into())
    }

    fn sign(&self, _: &Asked, _: Duration) -> Result<String, String> {
        Err("another process goes on with the mount; ask again".into())
    }

    fn shutdown(&self, _: Duration) -> Result<Status, String> {
        Ok(self.0.clone())
    }
}
