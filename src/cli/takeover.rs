//! `embassyfs take-over`: what a daemon starts to go on with its mount (`embassyfs upgrade`). Nobody else can.
//! Invariant: nothing is read from the connection before the predecessor has said that the mount is ours; until then
//! an end of this process, however it comes, changes nothing.

use super::exit::{ExitCode, Failure, Outcome};
use super::mount::{self, MountArgs, MountPlan};
use super::passing::{self, Answer, Hello, Serve, Take, VERSION};
use super::seam;
use super::serve::Daemon;
use crate::fuse::connection::Connection;
use crate::fuse::pass::receive_fd;
use clap::Parser;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long a word of the predecessor may take that should come at once.
const WORD_WAIT: Duration = Duration::from_secs(30);

/// The words of a predecessor, which are those of `embassyfs mount`.
#[derive(Parser)]
#[command(name = "take-over", no_binary_name = true)]
struct Words {
    #[command(flatten)]
    args: MountArgs,
}

/// Runs the command; standard input is the socket to the predecessor.
pub fn run() -> Outcome {
    let socket = Arc::new(predecessor().map_err(|e| {
        Failure::from_error(ExitCode::Usage, "only a daemon starts this, for 'embassyfs upgrade'", &e)
    })?);
    let outcome = take_over(&socket);
    if let Err(failure) = &outcome {
        ::log::error!("{failure}");
        // The predecessor may have gone, or may have heard already.
        let _ = passing::send(&socket, &Answer::Failed { message: failure.to_string() });
    }
    outcome
}

/// Takes standard input for the socket it is, and puts nothing in its place.
fn predecessor() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.peer_addr()?; // fails for anything but a socket
    let null = File::open("/dev/null")?;
    // SAFETY: both are open; standard input belongs to no Rust object that minds the change.
    if unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) } < 0 {
        return Err(io::Error::last_os_error());
    }
    socket.set_write_timeout(Some(WORD_WAIT))?;
    Ok(socket)
}

fn take_over(socket: &Arc<UnixStream>) -> Outcome {
    let fail = |what: &'static str| move |e: io::Error| Failure::from_error(ExitCode::Failed, what, &e);
    let hello: Hello =
        passing::receive(socket, Some(WORD_WAIT)).map_err(fail("the predecessor is not understood"))?;
    if hello.version != VERSION {
        return Err(Failure::new(
            ExitCode::Refused,
            format!(
                "the daemon hands over in version {}, this program ({}) takes over in version {VERSION}",
                hello.version,
                env!("CARGO_PKG_VERSION")
            ),
        )
        .hint("unmount and mount again to change the program"));
    }
    let plan = understood(&hello)?;
    let greeting = hello.greeting().map_err(fail("the predecessor's greeting is not understood"))?;
    let mut daemon = Daemon::new(&plan)?;
    let prepared = seam::prepare(plan.request.clone())?;
    let answer =
        |answer: Answer| passing::send(socket, &answer).map_err(fail("the predecessor does not listen"));
    answer(Answer::Prepared { version: env!("CARGO_PKG_VERSION").into() })?;
    let take: Take = passing::receive(socket, None).map_err(fail("the predecessor goes on itself"))?;
    let before = take.predecessor(socket).map_err(fail("the predecessor goes on itself"))?;
    let fd = receive_fd(socket).map_err(fail("the predecessor goes on itself"))?;
    ::log::info!("going on with {}", plan.settings.mountpoint.display());
    let volume = prepared.open(Some(&before))?;
    let connection = Connection { fd, greeting: Some(greeting) };
    let socket = socket.clone();
    let agree = move || {
        passing::send(&socket, &Answer::Opened {})?;
        passing::receive::<Serve>(&socket, Some(WORD_WAIT)).map(drop)
    };
    daemon.take_over(volume, connection, Box::new(agree))
}

fn understood(hello: &Hello) -> Result<MountPlan, Failure> {
    let words = Words::try_parse_from(&hello.words).map_err(|e| {
        Failure::usage(format!("this version does not know how the mount was made: {}", e.kind()))
            .hint("unmount and mount again to change the program")
    })?;
    let plan = mount::plan(words.args)?;
    Ok(MountPlan { foreground: hello.foreground, ..plan })
}
