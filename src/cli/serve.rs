//! The life of a daemon: open, mount, serve, ship, close.
//! Invariant: whatever way serving ends, no dead mount is left behind, and the volume is closed before the process
//! ends; every wait on the way out has a bound.

use super::daemon::{self, ReadyPipe};
use super::exit::{ExitCode, Failure, Outcome};
use super::logging::{self, Target};
use super::mount::MountPlan;
use super::mounted;
use super::relay::{Handed, Interlude, Relay};
use super::seam::{self, Served};
use super::signals;
use crate::clock::{Clock, Env};
use crate::fuse::adapter::{Ended, Ready};
use crate::fuse::beneath;
use crate::fuse::connection::{Connection, Greeting};
use crate::fuse::identity::MountIdentity;
use crate::fuse::mount::{self as kernel, MountSettings, own_ids};
use crate::ops::control::{Control, Server, socket_path};
use crate::ops::receipt::Asked;
use crate::ops::status::{Ending, Status};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a daemon that is told to stop, or whose mount was taken away by umount(8), goes on shipping.
const STOP_SHIPPING: Duration = Duration::from_secs(20);
/// A shipping as recent as this is not repeated at the end.
const SHIPPED_RECENTLY: Duration = Duration::from_secs(60);

/// Opens, mounts and serves until the volume is unmounted.
pub(super) fn serve(plan: &MountPlan, pipe: ReadyPipe) -> Outcome {
    let mut daemon = Daemon::new(plan)?;
    ::log::info!("mounting {} at {}", plan.request.store_url, plan.settings.mountpoint.display());
    let volume = seam::open(plan.request.clone())?;
    daemon.mount(volume, pipe)
}

/// The process of one mount.
pub(super) struct Daemon {
    plan: MountPlan,
    stopper: Arc<Stopper>,
    relay: Arc<Relay>,
    /// It outlives serving, for those who wait to hear how it ended.
    server: Arc<Mutex<Option<Server>>>,
}

impl Daemon {
    /// Makes this process one that serves according to `plan`.
    pub fn new(plan: &MountPlan) -> Result<Daemon, Failure> {
        let stopper = Arc::new(Stopper::default());
        prepare_process(plan, &stopper)?;
        Ok(Daemon { plan: plan.clone(), stopper, relay: Arc::default(), server: Arc::default() })
    }

    /// Mounts, and serves to the end.
    fn mount(&mut self, volume: Box<dyn Served>, pipe: ReadyPipe) -> Outcome {
        if self.plan.settings.fsname.is_empty() {
            self.plan.settings.fsname = format!("embassyfs:{}", volume.name());
        }
        let control = self.control(&*volume);
        let settings = self.plan.settings.clone();
        // Held while mounting, so that a signal finds either nothing or all it needs to unmount.
        let mut target = self.stopper.lock();
        let made = if self.plan.replace { mount_over_dead(&settings) } else { kernel::mount(&settings) };
        let fd = match made {
            Ok(fd) => fd,
            Err(e) => {
                drop(target);
                let what = format!("cannot mount at {}", settings.mountpoint.display());
                let failure = Failure::from_error(ExitCode::Failed, what, &e);
                return self.close(volume, &control, Err(failure));
            }
        };
        let mounted = MountIdentity::at(&settings.mountpoint);
        *target = Some(StopTarget { control: control.clone(), mounted: mounted.clone() });
        drop(target);
        if let Err(failure) = self.listen(&control) {
            detach(mounted.as_ref());
            return self.close(volume, &control, Err(failure));
        }
        let (stopper, relay, shown) = (self.stopper.clone(), self.relay.clone(), volume.shown());
        let device = mounted.as_ref().map(|mounted| mounted.entry().device);
        let ready = Box::new(move |greeting: &Greeting| {
            relay.serving(greeting.clone(), shown);
            if let (Some(device), kib @ 1..) = (device, settings.read_ahead_kib)
                && let Err(e) = kernel::set_read_ahead(device, kib)
            {
                ::log::debug!("the kernel's read-ahead stays at its default: {e}");
            }
            ::log::info!("ready");
            daemon::notify_service_manager();
            if pipe.ready().is_err() {
                ::log::warn!("who asked for the mount is gone; unmounting");
                stopper.stop(1);
            }
            Ok(())
        });
        self.run(volume, Connection::new(fd), &control, mounted, ready)
    }

    /// Serves a mount to the end that another process has served, as soon as `agreed` returns.
    pub fn take_over(
        &mut self,
        volume: Box<dyn Served>,
        connection: Connection,
        agreed: Box<dyn FnOnce() -> io::Result<()> + Send>,
    ) -> Outcome {
        let control = self.control(&*volume);
        let mounted = MountIdentity::at(&self.plan.settings.mountpoint);
        let (relay, stopper, shown) = (self.relay.clone(), self.stopper.clone(), volume.shown());
        let (server, heard, here) = (self.server.clone(), control.clone(), mounted.clone());
        let socket = socket_path(own_ids().0, &self.plan.settings.mountpoint);
        let ready = Box::new(move |greeting: &Greeting| {
            agreed()?;
            // From here on the mount is ours, and nothing may end it.
            relay.serving(greeting.clone(), shown);
            *stopper.lock() = Some(StopTarget { control: heard.clone(), mounted: here.clone() });
            match Server::start(&socket, heard) {
                Ok(started) => *lock(&server) = Some(started),
                Err(e) => ::log::error!("commands cannot reach this daemon: {e}"),
            }
            ::log::info!("ready");
            Ok(())
        });
        self.run(volume, connection, &control, mounted, ready)
    }

    fn control(&self, volume: &dyn Served) -> Arc<Framed> {
        Arc::new(Framed::new(volume.control(), &self.plan, self.relay.clone()))
    }

    fn listen(&self, control: &Arc<Framed>) -> Result<(), Failure> {
        let socket = socket_path(own_ids().0, &self.plan.settings.mountpoint);
        let started = Server::start(&socket, control.clone()).map_err(|e| {
            Failure::from_error(ExitCode::Failed, format!("cannot listen on {}", socket.display()), &e)
        })?;
        *lock(&self.server) = Some(started);
        Ok(())
    }

    /// Serves until the mount is gone or somebody else's.
    fn run(
        &mut self,
        mut volume: Box<dyn Served>,
        mut connection: Connection,
        control: &Arc<Framed>,
        mounted: Option<MountIdentity>,
        mut ready: Ready,
    ) -> Outcome {
        let taken_over = connection.greeting.is_some();
        let guard = UnmountOnDrop { mounted, supervised: self.plan.supervise };
        let outcome = loop {
            let (relay, shown) = (self.relay.clone(), volume.shown());
            let ended = volume.serve(&mut connection, &self.relay.switch, control.clone(), ready);
            match ended {
                Ok(Ended::Unmounted) => break Ok(()),
                Err(e) if taken_over && !self.relay.is_serving() => {
                    // It never was ours.
                    std::mem::forget(guard);
                    drop(volume.pass_on());
                    return Err(e);
                }
                Err(e) => break Err(e),
                Ok(Ended::Stopped) => {}
            }
            match self.relay.hand_over(&self.plan, volume, &connection, || control.leave()) {
                Ok(Handed::Over) => {
                    std::mem::forget(guard);
                    if let Some(server) = lock(&self.server).take() {
                        server.drain();
                        std::mem::forget(server); // the name of its socket is the successor's by now
                    }
                    return Ok(ExitCode::Ok);
                }
                Ok(Handed::Back(back)) => volume = back,
                Err(e) => {
                    if self.plan.supervise {
                        std::mem::forget(guard); // the dead mount keeps its place until the supervisor comes
                    }
                    return Err(e);
                }
            }
            control.enter(volume.control());
            ready = Box::new(move |greeting: &Greeting| {
                relay.serving(greeting.clone(), shown);
                Ok(())
            });
        };
        // Users of a mount that nobody serves get errors.
        drop(connection);
        match (&outcome, self.plan.supervise) {
            (Err(_), true) => std::mem::forget(guard),
            _ => drop(guard),
        }
        self.close(volume, control, outcome)
    }

    fn close(&self, volume: Box<dyn Served>, control: &Framed, outcome: Result<(), Failure>) -> Outcome {
        // What was written last is committed, and shipped within a bound unless that was just done.
        if let Err(e) = control.shutdown(control.shipping_left()) {
            ::log::warn!("at the end: {e}");
        }
        // Closing makes the last checkpoint and ships it too; only then is it known what stays behind.
        let closed = volume.close();
        let last = control.status();
        if let Some(words) = last.ending_in_words() {
            match last.ending() {
                Ending::Lost => ::log::error!("closed; {words}"),
                _ => ::log::warn!("closed; {words}"),
            }
        }
        if let Some(server) = lock(&self.server).take() {
            server.finish(last);
        }
        outcome?;
        closed?;
        ::log::info!("closed");
        Ok(ExitCode::Ok)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the log that `plan` asks for.
pub(super) fn log_to(plan: &MountPlan) -> io::Result<()> {
    let target = match (&plan.log_file, plan.foreground) {
        (Some(path), _) => Target::File { path: path.clone(), take_stderr: !plan.foreground },
        (None, true) => Target::Stderr,
        (None, false) => Target::File { path: plan.request.state.join("embassyfs.log"), take_stderr: true },
    };
    logging::init(&target, plan.log_level)
}

fn prepare_process(plan: &MountPlan, stopper: &Arc<Stopper>) -> Result<(), Failure> {
    let fail = |what: &'static str| move |e: io::Error| Failure::from_error(ExitCode::Failed, what, &e);
    signals::block().map_err(fail("cannot block signals"))?;
    daemon::leave_surroundings().map_err(fail("cannot leave the directory"))?;
    log_to(plan).map_err(fail("cannot open the log"))?;
    daemon::protect_process();
    let stopper = stopper.clone();
    signals::watch(move |count| stopper.stop(count)).map_err(fail("cannot watch for signals"))
}

/// Takes a mount of this process out of the tree if it is still there.
fn detach(mounted: Option<&MountIdentity>) {
    if let Some(mounted) = mounted
        && let Err(e) = mounted.detach()
    {
        ::log::error!("cannot unmount {}: {e}", mounted.entry().mount_point.display());
    }
}

/// Mounts where a daemon has died: whoever comes by finds the dead mount or the new one.
fn mount_over_dead(settings: &MountSettings) -> io::Result<OwnedFd> {
    let Some(dead) = mounted::dead_at(&settings.mountpoint) else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the dead mount was taken away meanwhile"));
    };
    beneath::replace(settings).or_else(|e| {
        ::log::info!("for a moment nothing is mounted at {}: {e}", settings.mountpoint.display());
        detach(Some(&dead.identity));
        kernel::mount(settings)
    })
}

/// Detaches a mount whose serving has ended, so that it is not left dead.
struct UnmountOnDrop {
    mounted: Option<MountIdentity>,
    /// After a failure somebody mounts again.
    supervised: bool,
}

impl Drop for UnmountOnDrop {
    fn drop(&mut self) {
        if !(self.supervised && std::thread::panicking()) {
            detach(self.mounted.as_ref());
        }
    }
}

/// What a stop signal needs.
struct StopTarget {
    control: Arc<Framed>,
    mounted: Option<MountIdentity>,
}

/// Ends the daemon when a signal asks for it.
#[derive(Default)]
struct Stopper(Mutex<Option<StopTarget>>);

impl Stopper {
    fn lock(&self) -> MutexGuard<'_, Option<StopTarget>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first time: ship within a bound, then unmount. Again: unmount at once, and give up on who still uses it.
    fn stop(&self, count: u32) {
        let target = self.lock();
        let Some(StopTarget { control, mounted }) = &*target else {
            // Nothing is mounted yet; what is on disk is as after a crash, which is recovered from.
            ::log::info!("stopped before the volume was mounted");
            std::process::exit(ExitCode::Failed as i32);
        };
        let (control, mounted) = (control.clone(), mounted.clone());
        if count > 1 {
            ::log::warn!("asked again: unmounting at once");
            detach(mounted.as_ref());
            if let Some(Err(e)) = mounted.map(|mounted| mounted.abort()) {
                ::log::warn!("cannot break the connection of processes that still use the mount: {e}");
            }
            return;
        }
        // Not on the signal thread, which must hear the second signal.
        let work = move || {
            if let Err(e) = control.shutdown(STOP_SHIPPING) {
                ::log::warn!("before unmounting: {e}");
            }
            detach(mounted.as_ref());
        };
        if let Err(e) = std::thread::Builder::new().name("stop".into()).spawn(work) {
            ::log::error!("cannot start the thread that stops: {e}");
        }
    }
}

/// A volume's control with what only the frame knows filled in.
struct Framed {
    inner: Mutex<Arc<dyn Control>>,
    relay: Arc<Relay>,
    plan: MountPlan,
    clock: Arc<dyn Clock>,
    started: Duration,
    /// When shipping was last tried to the end.
    shipped: Mutex<Option<Duration>>,
    mountpoint: String,
    state: String,
    store: String,
}

impl Framed {
    fn new(inner: Arc<dyn Control>, plan: &MountPlan, relay: Arc<Relay>) -> Framed {
        let clock = Env::system().clock;
        Framed {
            inner: Mutex::new(inner),
            relay,
            plan: plan.clone(),
            started: clock.monotonic(),
            clock,
            shipped: Mutex::default(),
            mountpoint: plan.settings.mountpoint.display().to_string(),
            state: plan.request.state.display().to_string(),
            store: plan.request.store_url.clone(),
        }
    }

    fn inner(&self) -> Arc<dyn Control> {
        lock(&self.inner).clone()
    }

    /// The volume is about to be closed for a successor: nothing of it is held any more.
    fn leave(&self) {
        let last = self.inner().status();
        self.enter(Arc::new(Interlude(last)));
    }

    fn enter(&self, inner: Arc<dyn Control>) {
        *lock(&self.inner) = inner;
    }

    fn fill(&self, mut status: Status) -> Status {
        status.pid = std::process::id();
        status.version = env!("CARGO_PKG_VERSION").into();
        status.uptime = (self.clock.monotonic() - self.started).as_secs_f64();
        status.mountpoint = self.mountpoint.clone();
        status.state = self.state.clone();
        if status.store.is_empty() {
            status.store = self.store.clone();
        }
        status
    }

    /// How long the end may still ship.
    fn shipping_left(&self) -> Duration {
        let shipped = *lock(&self.shipped);
        match shipped {
            Some(at) if self.clock.monotonic() - at < SHIPPED_RECENTLY => Duration::ZERO,
            _ => STOP_SHIPPING,
        }
    }
}

impl Control for Framed {
    fn status(&self) -> Status {
        self.fill(self.inner().status())
    }

    fn sync(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<Status, String> {
        let done = self.inner().sync(timeout, &mut |status| progress(&self.fill(status.clone())));
        done.map(|status| self.fill(status))
    }

    fn shutdown(&self, timeout: Duration) -> Result<Status, String> {
        let done = self.inner().shutdown(timeout);
        *lock(&self.shipped) = Some(self.clock.monotonic());
        done.map(|status| self.fill(status))
    }

    fn hand_over(
        &self,
        to: Option<&str>,
        timeout: Duration,
        progress: &mut dyn FnMut(&Status),
    ) -> Result<Status, String> {
        let done = self.inner().hand_over(to, timeout, &mut |status| progress(&self.fill(status.clone())));
        *lock(&self.shipped) = Some(self.clock.monotonic());
        done.map(|status| self.fill(status))
    }

    fn sign(&self, asked: &Asked, timeout: Duration) -> Result<String, String> {
        self.inner().sign(asked, timeout)
    }

    fn upgrade(&self, program: &Path, _: Duration) -> Result<Status, String> {
        // The volume's own control is not held meanwhile: it keeps the state directory locked.
        self.relay.ask(&self.plan, program, || self.inner())?;
        Ok(self.status())
    }
}
