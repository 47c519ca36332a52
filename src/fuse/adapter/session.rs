//! A session of `fuser` on a connection that is new, or that somebody else has served before.
//! Invariant: the greeting passes through us, so that it can be repeated to a successor word for word; nothing is read
//! from a connection that was taken over before `ready` has agreed.

use super::DISPATCH_THREADS;
use super::guard::Guard;
use super::invalidate;
use crate::fuse::connection::{
    Connection, Greeting, Switch, message_pair, put_in_place, receive_message, send_message,
};
use fuser::{Config, Notifier, Session, SessionACL};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, OnceLock};

/// Why serving has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The mount is gone.
    Unmounted,
    /// A [`Switch`] was thrown: the mount is there, and waits for somebody to go on.
    Stopped,
}

/// Called when all is ready to serve; an error keeps it from beginning.
pub type Ready = Box<dyn FnOnce(&Greeting) -> io::Result<()> + Send>;

pub(super) fn run(
    guard: Guard,
    connection: &mut Connection,
    switch: &Switch,
    kernel: &Arc<OnceLock<Notifier>>,
    ready: Ready,
) -> io::Result<Ended> {
    let requests = guard.0.requests().clone();
    let gate = requests.gate().clone();
    let taken_over = connection.greeting.is_some();
    let session = greet(guard, connection)?;
    if let Some(greeting) = &connection.greeting {
        ready(greeting)?;
    }
    // It keeps the number open on which a switch acts.
    let _ = kernel.set(session.notifier()); // it was empty
    let telling = invalidate::start(&requests, session.notifier(), session.as_fd())?;
    drop(requests);
    switch.arm(gate, session.as_fd().as_raw_fd());
    if taken_over && let Err(e) = connection.ask_again() {
        ::log::warn!("the kernel is not asked to ask again: {e}"); // the mount may be gone already
    }
    let ran = session.run();
    drop(telling);
    let stopped = switch.disarm();
    match ran {
        _ if stopped => Ok(Ended::Stopped),
        Ok(()) => Ok(Ended::Unmounted),
        Err(e) => Err(e),
    }
}

/// `fuser` insists on greeting; so it greets a pair of sockets, which then gives way to the connection.
fn greet(guard: Guard, connection: &mut Connection) -> io::Result<Session<Guard>> {
    let mut config = Config::default();
    config.n_threads = Some(DISPATCH_THREADS);
    let request = match &connection.greeting {
        Some(greeting) => greeting.request.clone(),
        None => connection.read_greeting()?,
    };
    let (ours, theirs) = message_pair(0)?;
    send_message(&ours, &request)?;
    let session = Session::from_fd(guard, theirs, SessionACL::All, config)?;
    let reply = receive_message(&ours)?;
    match &connection.greeting {
        Some(before) if before.reply != reply => {
            let text = "this program and the one that mounted differ in what they agree upon with the kernel; unmount \
                        and mount again to change the program";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Some(_) => {}
        None => {
            send_message(&connection.fd, &reply)?;
            connection.greeting = Some(Greeting { request, reply });
        }
    }
    put_in_place(connection.fd.as_fd(), session.as_fd().as_raw_fd())?;
    Ok(session)
}
