//! The life of a daemon: open, mount, serve, ship, close.
//! Invariant: whatever way serving ends, no dead mount is left behind, and the volume is closed before the process
//! ends; every wait on the way out has a bound.

use super::daemon::{self, ReadyPipe};
use super::exit::{ExitCode, Failure, Outcome};
use super::logging::{self, Target};
use super::mount::MountPlan;
use super::seam::{self, Served};
use super::signals;
use crate::clock::{Clock, Env};
use crate::fuse::mount::{self as kernel, MountSettings, Unmount, own_ids};
use crate::fuse::table;
use crate::ops::control::{Control, Server, socket_path};
use crate::ops::status::{Ending, Status};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a daemon that is told to stop, or whose mount was taken away by umount(8), goes on shipping.
const STOP_SHIPPING: Duration = Duration::from_secs(20);
/// A shipping as recent as this is not repeated at the end.
const SHIPPED_RECENTLY: Duration = Duration::from_secs(60);

/// Opens, mounts and serves until the volume is unmounted.
pub(super) fn serve(plan: &MountPlan, pipe: ReadyPipe) -> Outcome {
    let stopper = Arc::new(Stopper::default());
    prepare_process(plan, &stopper)?;
    ::log::info!("mounting {} at {}", plan.request.store_url, plan.settings.mountpoint.display());
    let mut volume = seam::open(plan.request.clone())?;
    let mut settings = plan.settings.clone();
    if settings.fsname.is_empty() {
        settings.fsname = format!("embassyfs:{}", volume.name());
    }
    let control = Arc::new(Framed::new(volume.control(), plan));
    let mut server = None;
    let outcome = serve_mounted(volume.as_mut(), &settings, &control, &stopper, pipe, &mut server);
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
    if let Some(server) = server {
        server.finish(last);
    }
    outcome?;
    closed?;
    ::log::info!("closed");
    Ok(ExitCode::Ok)
}

fn prepare_process(plan: &MountPlan, stopper: &Arc<Stopper>) -> Result<(), Failure> {
    let fail = |what: &'static str| move |e: io::Error| Failure::from_error(ExitCode::Failed, what, &e);
    signals::block().map_err(fail("cannot block signals"))?;
    daemon::leave_surroundings().map_err(fail("cannot leave the directory"))?;
    let target = match (&plan.log_file, plan.foreground) {
        (Some(path), _) => Target::File { path: path.clone(), take_stderr: !plan.foreground },
        (None, true) => Target::Stderr,
        (None, false) => Target::File { path: plan.request.state.join("embassyfs.log"), take_stderr: true },
    };
    logging::init(&target, plan.log_level).map_err(fail("cannot open the log"))?;
    daemon::protect_process();
    let stopper = stopper.clone();
    signals::watch(move |count| stopper.stop(count)).map_err(fail("cannot watch for signals"))
}

/// Mounts, listens and serves; `server` outlives it, for those who wait to hear how it ended.
fn serve_mounted(
    volume: &mut dyn Served,
    settings: &MountSettings,
    control: &Arc<Framed>,
    stopper: &Arc<Stopper>,
    pipe: ReadyPipe,
    server: &mut Option<Server>,
) -> Result<(), Failure> {
    let place = settings.mountpoint.display();
    let fail = |what: String| move |e: io::Error| Failure::from_error(ExitCode::Failed, what, &e);
    // Held while mounting, so that a signal finds either nothing or all it needs to unmount.
    let mut target = stopper.lock();
    let fd = kernel::mount(settings).map_err(fail(format!("cannot mount at {place}")))?;
    let mounted = MountedHere::find(&settings.mountpoint);
    *target = Some(StopTarget { control: control.clone(), mounted: mounted.clone() });
    drop(target);
    let _guard = UnmountOnDrop(mounted.clone());
    let socket = socket_path(own_ids().0, &settings.mountpoint);
    let listening = Server::start(&socket, control.clone());
    *server = Some(listening.map_err(fail(format!("cannot listen on {}", socket.display())))?);
    let read_ahead_kib = settings.read_ahead_kib;
    let for_ready = stopper.clone();
    let ready = Box::new(move || {
        if let (Some(device), 1..) = (mounted.device, read_ahead_kib)
            && let Err(e) = kernel::set_read_ahead(device, read_ahead_kib)
        {
            ::log::debug!("the kernel's read-ahead stays at its default: {e}");
        }
        ::log::info!("ready");
        daemon::notify_service_manager();
        if pipe.ready().is_err() {
            ::log::warn!("who asked for the mount is gone; unmounting");
            for_ready.stop(1);
        }
    });
    volume.serve(fd, settings, control.clone(), ready)
}

/// A mount of this process, told apart from others at the same place by its device number.
#[derive(Clone)]
struct MountedHere {
    path: PathBuf,
    device: Option<(u32, u32)>,
}

impl MountedHere {
    fn find(path: &Path) -> MountedHere {
        let device = table::find(path).ok().flatten().filter(|m| m.is_ours()).map(|m| m.device);
        MountedHere { path: path.into(), device }
    }

    /// Takes the mount out of the tree if it is still there.
    fn detach(&self) {
        let there = table::find(&self.path).ok().flatten();
        if there.is_none_or(|m| !m.is_ours() || Some(m.device) != self.device) {
            return;
        }
        if let Err(e) = kernel::unmount(&self.path, Unmount::Lazy) {
            ::log::error!("cannot unmount {}: {e}", self.path.display());
        }
    }
}

/// Detaches a mount whose serving has ended, so that it is not left dead.
struct UnmountOnDrop(MountedHere);

impl Drop for UnmountOnDrop {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// What a stop signal needs.
struct StopTarget {
    control: Arc<Framed>,
    mounted: MountedHere,
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
            mounted.detach();
            if let Some((_, minor)) = mounted.device
                && let Err(e) = table::abort(minor)
            {
                ::log::warn!("cannot break the connection of processes that still use the mount: {e}");
            }
            return;
        }
        // Not on the signal thread, which must hear the second signal.
        let work = move || {
            if let Err(e) = control.shutdown(STOP_SHIPPING) {
                ::log::warn!("before unmounting: {e}");
            }
            mounted.detach();
        };
        if let Err(e) = std::thread::Builder::new().name("stop".into()).spawn(work) {
            ::log::error!("cannot start the thread that stops: {e}");
        }
    }
}

/// A volume's control with what only the frame knows filled in.
struct Framed {
    inner: Arc<dyn Control>,
    clock: Arc<dyn Clock>,
    started: Duration,
    /// When shipping was last tried to the end.
    shipped: Mutex<Option<Duration>>,
    mountpoint: String,
    state: String,
    store: String,
}

impl Framed {
    fn new(inner: Arc<dyn Control>, plan: &MountPlan) -> Framed {
        let clock = Env::system().clock;
        Framed {
            inner,
            started: clock.monotonic(),
            clock,
            shipped: Mutex::default(),
            mountpoint: plan.settings.mountpoint.display().to_string(),
            state: plan.request.state.display().to_string(),
            store: plan.request.store_url.clone(),
        }
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
        let shipped = *self.shipped.lock().unwrap_or_else(PoisonError::into_inner);
        match shipped {
            Some(at) if self.clock.monotonic() - at < SHIPPED_RECENTLY => Duration::ZERO,
            _ => STOP_SHIPPING,
        }
    }
}

impl Control for Framed {
    fn status(&self) -> Status {
        self.fill(self.inner.status())
    }

    fn sync(&self, timeout: Duration, progress: &mut dyn FnMut(&Status)) -> Result<Status, String> {
        let done = self.inner.sync(timeout, &mut |status| progress(&self.fill(status.clone())));
        done.map(|status| self.fill(status))
    }

    fn shutdown(&self, timeout: Duration) -> Result<Status, String> {
        let done = self.inner.shutdown(timeout);
        *self.shipped.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clock.monotonic());
        done.map(|status| self.fill(status))
    }
}
