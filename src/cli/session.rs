//! A mounted volume: the kernel's requests on one side, the volume on the other, and what operators ask of both.
//! Invariant: `status` never waits; what else is asked ends within the time it is given.

use super::exit::{ExitCode, Failure};
use super::options::{At, is_to_come, parse_at};
use super::seam::{OpenRequest, Served};
use crate::clock::{Clock, Env};
use crate::fs::Changed;
use crate::fuse::adapter::{self, Ended, Ready};
use crate::fuse::connection::{Connection, Switch};
use crate::fuse::control_dir::ControlDir;
use crate::fuse::past::Past;
use crate::fuse::serve::{Backend, Requests};
use crate::log::{self, Error};
use crate::ops::control::Control;
use crate::ops::receipt::Asked;
use crate::ops::requests::Watch;
use crate::ops::status::{CommitPoint, FollowStatus, Status};
use crate::replica::durable::Protection;
use crate::replica::follow::{Standing, Trouble};
use crate::replica::receipt::Patience;
use crate::replica::volume::Volume;
use crate::replica::{Predecessor, Version};
use crate::types::{CommitNo, FramePtr, Timestamp};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use tokio::runtime::Runtime;

/// How often a waiting caller is told how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked whether a commit is done.
const COMMIT_LOOK: Duration = Duration::from_millis(2);
/// How long what is on the pool may take to end when the mount is handed over.
const POOL_WAIT: Duration = Duration::from_secs(2);
/// A wish to hand over is forgotten when the mount is not gone after this: its owner has given up.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(120);
/// How long closing waits for what the last checkpoint added; the rest has been shipped before.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// What operators can ask of a mounted volume.
pub(super) struct MountControl {
    volume: Arc<Volume>,
    store: String,
    state: String,
    protection: Protection,
    /// The last error that an application was given and that POSIX does not foresee.
    failed: Mutex<Option<String>>,
    /// The mount is being handed over: nobody waits for the store any more.
    leaving: AtomicBool,
    /// To whom the volume is to be handed over when it is closed, and when that was asked.
    to: Mutex<Option<(String, Duration)>>,
    /// What came of it.
    handed_over: Mutex<Option<Result<String, String>>>,
    watch: Arc<Watch>,
    clock: Arc<dyn Clock>,
}

impl MountControl {
    pub fn new(volume: Arc<Volume>, request: &OpenRequest) -> MountControl {
        // One for the life of the mount: each `Env::system()` counts from a moment of its own.
        let clock = Env::system().clock;
        MountControl {
            store: volume.store.describe(),
            state: request.state.display().to_string(),
            protection: request.protection,
            failed: Mutex::new(None),
            leaving: AtomicBool::new(false),
            to: Mutex::new(None),
            handed_over: Mutex::new(None),
            watch: Watch::new(clock.clone()),
            clock,
            volume,
        }
    }

    fn following(&self, status: &mut Status, standing: Standing) {
        let (state, trouble) = match standing.trouble {
            None => ("following", None),
            Some(Trouble::Away(e)) => ("store away", Some(e)),
            Some(Trouble::Wrong(e)) => ("stopped", Some(e)),
        };
        status.in_sync = state == "following" && standing.too_old.is_none();
        status.lag_seconds = standing.lag.as_secs_f64();
        status.store_error.clone_from(&trouble);
        if state == "stopped" {
            status.last_error.clone_from(&trouble);
        }
        if let (None, Some(old)) = (&status.last_error, &standing.too_old) {
            status.last_error = Some(old.clone());
        }
        status.head = standing.head.map(|head| format!("{}:{}", head.seq, head.hash));
        status.follow = Some(FollowStatus {
            too_old: standing.too_old.is_some(),
            state: state.into(),
            contact_seconds: standing.contact.as_secs_f64(),
            jumps: standing.jumps,
            error: trouble,
        });
    }

    /// Hands the volume over that has just been closed, if that was asked for.
    fn give_away(&self) {
        let asked = self.to.lock().take();
        let now = self.clock.monotonic();
        if let Some((to, _)) = asked.filter(|(_, when)| now.saturating_sub(*when) < HAND_OVER_WITHIN) {
            let done = self.volume.hand_over(&super::seam::host_name(), &to);
            if let Err(e) = &done {
                ::log::error!("not handed over to {to}: {e}");
            }
            *self.handed_over.lock() = Some(done.map(|_| to).map_err(|e| e.to_string()));
        }
    }

    fn wait_remote(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<(), String> {
        let (sender, receiver) = channel();
        self.volume.when_remote(
            timeout,
            Box::new(move |result| {
                let _ = sender.send(result); // the caller may have given up
            }),
        );
        // The account answers within `timeout`; the margin only guards against a thread that has died.
        let rounds = (timeout + Duration::from_secs(5)).as_millis() / PROGRESS_EVERY.as_millis();
        for _ in 0..=rounds {
            match receiver.recv_timeout(PROGRESS_EVERY) {
                Ok(result) => return result.map_err(|e| e.to_string()),
                Err(RecvTimeoutError::Timeout) if self.leaving.load(Ordering::Acquire) => {
                    return Err("another process goes on with the mount; ask again".into());
                }
                Err(RecvTimeoutError::Timeout) => progress(&self.status()),
                Err(RecvTimeoutError::Disconnected) => return Err("the volume is being closed".into()),
            }
        }
        Err("the volume does not answer; see its log".into())
    }
}

impl Control for MountControl {
    fn status(&self) -> Status {
        let volume = &self.volume;
        let mut status = Status {
            volume: volume.superblock.name.clone(),
            volume_id: volume.superblock.volume.to_string(),
            store: self.store.clone(),
            state: self.state.clone(),
            protection: self.protection.to_string(),
            cache_bytes: volume.cache_bytes(),
            dirty_bytes: volume.fs.dirty_bytes(),
            spool_free_bytes: volume.spool_free_bytes(),
            requests: self.watch.figures(),
            failed: volume.fs.failure().is_some(),
            ..Status::default()
        };
        let point = |no: CommitNo, time| Some(CommitPoint { no: no.0, time }).filter(|p| p.no > 0);
        let (newest, remote) = volume.commit_times();
        let Some(durable) = volume.durable() else {
            status.role = "reader".into();
            status.head = volume.head.map(|head| format!("{}:{}", head.seq, head.hash));
            status.in_sync = true;
            status.last_commit = volume.shown().and_then(|(no, time)| point(no, time));
            status.last_durable = status.last_commit;
            status.last_error = self.failed.lock().clone();
            if let Some(follower) = volume.follower() {
                self.following(&mut status, follower.standing());
            }
            return status;
        };
        let account = durable.snapshot();
        status.role = "writer".into();
        status.in_sync = account.in_sync && account.fenced.is_none() && account.latched.is_none();
        status.head = account.remote_head.map(|head| format!("{}:{}", head.seq, head.hash));
        status.lag_seconds = account.lag.as_secs_f64();
        status.unsent_bytes = account.unsent_bytes;
        status.unsent_segments = account.unsent_segments;
        status.last_commit = newest.and_then(|time| point(account.local, time));
        status.last_durable = remote.and_then(|time| point(account.remote, time));
        status.fallbacks = account.fallbacks;
        status.fenced = account.fenced.is_some();
        status.failed = !status.fenced && (status.failed || account.latched.is_some());
        status.out_of_sync_seconds = account.out_of_sync.map(|since| since.as_secs_f64());
        status.store_error = account.last_error.clone();
        status.waiting = account.waiters as u64;
        status.uploads = volume.uploads();
        match self.handed_over.lock().clone() {
            Some(Ok(to)) => status.handed_over = Some(to),
            Some(Err(why)) => *self.failed.lock() = Some(why),
            None => {}
        }
        let latched = account.fenced.or(account.latched).or(volume.fs.failure());
        status.last_error = latched.or_else(|| self.failed.lock().clone()).or(account.last_error);
        // What is committed in the segment that is still open is on this host only, like a closed one.
        let open = volume.fs.open_segment_bytes();
        if open > 0 && account.local > account.remote {
            status.unsent_bytes += open;
            status.unsent_segments += 1;
        }
        status
    }

    fn commit(&self, timeout: Duration) -> Result<(), String> {
        let fs = &self.volume.fs;
        let Some(durable) = self.volume.durable() else { return Ok(()) };
        let commit = fs.sync_point();
        fs.request_commit(commit, false);
        for _ in 0..=timeout.as_millis() / COMMIT_LOOK.as_millis() {
            if let Some(reason) = fs.failure() {
                return Err(reason);
            }
            if durable.snapshot().local >= commit {
                return Ok(());
            }
            std::thread::sleep(COMMIT_LOOK);
        }
        Err(format!("what was written is not committed within {} s", timeout.as_secs()))
    }

    fn let_go(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    fn sync(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<Status, String> {
        self.wait_remote(timeout, progress)?;
        Ok(self.status())
    }

    fn hand_over(
        &self,
        to: Option<&str>,
        timeout: Duration,
        progress: &mut dyn FnMut(&Status),
    ) -> Result<Status, String> {
        *self.to.lock() = None;
        let Some(to) = to else { return Ok(self.status()) };
        let Some(durable) = self.volume.durable() else {
            return Err("it is mounted for reading; only the writer can hand the volume over".into());
        };
        if let Some(reason) = durable.fenced().or(self.volume.fs.failure()) {
            return Err(reason);
        }
        self.wait_remote(timeout, progress)?;
        *self.to.lock() = Some((to.to_owned(), self.clock.monotonic()));
        Ok(self.status())
    }

    fn sign(&self, asked: &Asked, timeout: Duration) -> Result<String, String> {
        let leaving = || self.leaving.load(Ordering::Acquire);
        self.volume.sign(asked, &Patience { timeout, leaving: &leaving })
    }

    fn shutdown(&self, timeout: Duration) -> Result<Status, String> {
        // What cannot be shipped in time stays in the state directory, and the status says how much.
        if let Err(e) = self.wait_remote(timeout, &mut |_| ()) {
            ::log::warn!("not everything is in the embassy yet: {e}");
        }
        Ok(self.status())
    }
}

impl Backend for MountControl {
    fn fetch(&self, ptrs: Vec<FramePtr>) -> BoxFuture<'_, log::Result<()>> {
        Box::pin(async move {
            let _counted = self.watch.fetching();
            self.volume.fetch(&ptrs).await
        })
    }

    fn when_durable(&self, commit: CommitNo, done: Box<dyn FnOnce(Result<(), String>) + Send>) {
        match self.volume.durable() {
            Some(durable) => durable.wait(commit, Box::new(move |r| done(r.map_err(|e| e.to_string())))),
            None => done(Ok(())),
        }
    }

    fn ships_on_fsync(&self) -> bool {
        self.volume.durable().is_some_and(|durable| durable.waits_for_remote())
    }

    fn free_bytes(&self) -> u64 {
        self.volume.dir.free_bytes().unwrap_or(0)
    }

    fn failed(&self, what: &str) {
        *self.failed.lock() = Some(what.to_string());
    }

    fn on_change(&self, tell: Option<Box<dyn Fn(Changed) + Send + Sync>>) {
        if let Some(follower) = self.volume.follower() {
            follower.on_change(tell);
        }
    }

    fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }
}

/// An open volume and the runtime it lives on.
pub(super) struct Session {
    control: Arc<MountControl>,
    runtime: Runtime,
}

impl Session {
    pub fn new(control: Arc<MountControl>, runtime: Runtime) -> Session {
        Session { control, runtime }
    }

    /// How older versions are opened beside the one that is mounted.
    fn past(&self, requests: &Arc<Requests>) -> Past {
        // What is open must not keep the volume from being closed.
        let (volume, requests) = (Arc::downgrade(&self.control.volume), Arc::downgrade(requests));
        let clock = self.control.clock.clone();
        Past::new(Box::new(move |name| {
            let (volume, requests) = (volume.upgrade(), requests.upgrade());
            let (name, clock) = (name.to_owned(), clock.clone());
            Box::pin(async move {
                let (Some(volume), Some(requests)) = (volume, requests) else { return Err(libc::ESTALE) };
                let version = past_version(&name, clock.now())?;
                match volume.version(version).await {
                    Ok((fs, commit, _)) => {
                        ::log::info!("at/{name}: commit {}", commit.0);
                        Ok(requests.beside(fs))
                    }
                    Err(Error::Refused(why)) => {
                        ::log::info!("at/{name}: {why}");
                        Err(libc::ENOENT)
                    }
                    Err(e) => {
                        ::log::error!("at/{name}: {e}");
                        Err(libc::EIO)
                    }
                }
            })
        }))
    }
}

/// What a name in `at` means. A time to come has no version yet, and would have another one later.
fn past_version(name: &str, now: Timestamp) -> Result<Version, i32> {
    match parse_at(name) {
        Ok(At::Commit(no)) => Ok(Version::Commit(no)),
        Ok(At::Time(time)) if !is_to_come(time, now) => Ok(Version::Time(time)),
        _ => Err(libc::ENOENT),
    }
}

impl Served for Session {
    fn name(&self) -> String {
        self.control.volume.superblock.name.clone()
    }

    fn control(&self) -> Arc<dyn Control> {
        self.control.clone()
    }

    fn serve(
        &mut self,
        connection: &mut Connection,
        switch: &Switch,
        control: Arc<dyn Control>,
        ready: Ready,
    ) -> Result<Ended, Failure> {
        let backend: Arc<dyn Backend> = self.control.clone();
        let requests = Requests::new(self.control.volume.fs.clone(), backend, self.runtime.handle().clone());
        let clock = self.control.clock.clone();
        let past = self.past(&requests);
        let shown = (ControlDir::new(control, clock.clone()), past);
        adapter::serve(requests, connection, switch, clock, shown, ready)
            .map_err(|e| Failure::from_error(ExitCode::Failed, "serving the kernel", &e))
    }

    fn shown(&self) -> Option<CommitNo> {
        let volume = &self.control.volume;
        // A follower's successor goes on with the newest, as it does itself.
        let fixed = volume.durable().is_none() && volume.follower().is_none();
        volume.opened.filter(|_| fixed).map(|(no, _)| no)
    }

    fn pass_on(self: Box<Self>) -> Predecessor {
        let Session { control, runtime } = *self;
        let volume = control.volume.clone();
        drop(control);
        volume.close(Duration::ZERO);
        let before = volume.predecessor();
        let dir = Arc::downgrade(&volume.dir);
        drop(volume);
        // What still waits on the pool holds the volume, and with it the state directory's lock.
        runtime.shutdown_timeout(POOL_WAIT);
        for _ in 0..POOL_WAIT.as_millis() {
            if dir.strong_count() == 0 {
                return before;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        ::log::error!("something still holds the state directory, though the volume is closed");
        before
    }

    fn close(self: Box<Self>) -> Result<Status, Failure> {
        // Shipping has been tried within its bound before; here the log is ended cleanly.
        self.control.volume.close(CLOSE_WAIT);
        self.control.give_away();
        let status = self.control.status();
        match self.control.volume.fs.failure() {
            Some(reason) => Err(Failure::new(ExitCode::Failed, format!("the volume had failed: {reason}"))),
            None => Ok(status),
        }
    }
}
