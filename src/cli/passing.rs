//! What a daemon and its successor say to each other: JSON in frames, each behind its length, over a socket.
//! Invariant: what the mount was made with passes in the spelling of the command line, which every later version
//! understands or refuses by name. Fields are added, never changed; [`VERSION`] counts what is more than that.

use super::mount::MountPlan;
use crate::fuse::connection::Greeting;
use crate::replica::Predecessor;
use crate::types::{CommitNo, Hash, Head, Seq, hex, unhex};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What both sides must have in common: these messages, and what the daemon has told the kernel once and for all
/// (which requests it does not want, how long names may be kept).
pub const VERSION: u32 = 1;

/// The longest frame, in bytes.
const FRAME_MAX: u32 = 4 << 20;

/// The first word, while the predecessor still serves.
#[derive(Serialize, Deserialize)]
pub struct Hello {
    pub version: u32,
    /// As for `embassyfs mount`.
    pub words: Vec<String>,
    /// Log to standard error, as the predecessor does.
    pub foreground: bool,
    greeting_request: String,
    greeting_reply: String,
}

impl Hello {
    pub fn new(plan: &MountPlan, at: Option<CommitNo>, greeting: &Greeting) -> io::Result<Hello> {
        Ok(Hello {
            version: VERSION,
            words: words(plan, at)?,
            foreground: plan.foreground,
            greeting_request: hex(&greeting.request),
            greeting_reply: hex(&greeting.reply),
        })
    }

    pub fn greeting(&self) -> io::Result<Greeting> {
        let bytes = |text: &str| {
            let pairs = (0..text.len()).step_by(2).map(|at| text.get(at..at + 2).and_then(unhex::<1>));
            let bytes: Option<Vec<[u8; 1]>> = pairs.collect();
            bytes.map(|b| b.concat()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        Ok(Greeting { request: bytes(&self.greeting_request)?, reply: bytes(&self.greeting_reply)? })
    }
}

/// What the successor says.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It understands all, and waits for [`Take`].
    Prepared { version: String },
    /// The volume is open; at the predecessor's word (a [`Serve`]) it serves.
    Opened {},
    /// It cannot, and ends.
    Failed { message: String },
}

/// The volume is closed and the successor's to open. Behind it come `held` bytes, and then the connection.
#[derive(Serialize, Deserialize)]
pub struct Take {
    held: u64,
    #[serde(default)]
    remote: u64,
    #[serde(default)]
    remote_head: Option<(u64, String)>,
    #[serde(default)]
    fallen_back: bool,
}

/// From here on the mount is the successor's.
#[derive(Serialize, Deserialize)]
pub struct Serve {}

impl Take {
    pub fn new(before: &Predecessor) -> Take {
        Take {
            held: before.held.len() as u64,
            remote: before.remote.0,
            remote_head: before.remote_head.map(|head| (head.seq.0, head.hash.to_string())),
            fallen_back: before.fallen_back,
        }
    }

    /// With the bytes that follow on the socket.
    pub fn predecessor(self, socket: &UnixStream) -> io::Result<Predecessor> {
        let mut held = Vec::new();
        let n = socket.take(self.held).read_to_end(&mut held)?;
        if n as u64 != self.held {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let head =
            self.remote_head.and_then(|(seq, hash)| Some(Head { seq: Seq(seq), hash: Hash(unhex(&hash)?) }));
        Ok(Predecessor {
            held,
            remote: CommitNo(self.remote),
            remote_head: head,
            fallen_back: self.fallen_back,
        })
    }
}

/// Sends one frame.
pub fn send(mut socket: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    socket.write_all(&(body.len() as u32).to_le_bytes())?;
    socket.write_all(&body)
}

/// Receives one frame; waits for each of its parts at most `limit`, or without a bound.
pub fn receive<T: DeserializeOwned>(mut socket: &UnixStream, limit: Option<Duration>) -> io::Result<T> {
    socket.set_read_timeout(limit)?;
    let mut len = [0; 4];
    socket.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > FRAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is too long"));
    }
    let mut body = vec![0; len as usize];
    socket.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

/// A plan as the words of a command line.
fn words(plan: &MountPlan, at: Option<CommitNo>) -> io::Result<Vec<String>> {
    let request = &plan.request;
    let mut words = vec!["--store".to_string(), request.store_url.clone()];
    for (name, value) in &request.store_options {
        words.extend(["--store-option".into(), format!("{name}={value}")]);
    }
    words.extend(["--key".into(), text(&request.key)?, "--state".into(), text(&request.state)?]);
    if let Some(path) = &plan.log_file {
        words.extend(["--log-file".into(), text(path)?]);
    }
    words.extend(["--log-level".into(), plan.log_level.to_string()]);
    if request.read_only {
        words.push("--read-only".into());
    }
    if let Some(head) = request.trust.expect {
        words.extend(["--expect".into(), format!("{}:{}", head.seq, head.hash)]);
    }
    if let Some(age) = request.trust.max_age {
        words.extend(["--max-age".into(), format!("{}ms", age.as_millis())]);
    }
    if let Some(no) = at.filter(|no| request.read_only && no.0 > 0) {
        words.extend(["--at".into(), no.0.to_string()]);
    }
    words.extend(["--options".into(), options(plan)]);
    words.extend(["--".into(), text(&plan.settings.mountpoint)?]);
    Ok(words)
}

fn options(plan: &MountPlan) -> String {
    // Most sizes are round, and the largest have no other spelling.
    let size = |n: u64| if n.is_multiple_of(1024) { format!("{}K", n >> 10) } else { n.to_string() };
    let (request, settings) = (&plan.request, &plan.settings);
    let either = |on: bool, yes: &str, no: &str| if on { yes.to_string() } else { no.to_string() };
    let mut all = vec![
        format!("protection={}", request.protection),
        format!("sync_timeout={}ms", request.sync_timeout.as_millis()),
        format!("cache_size={}", size(request.cache_size)),
        format!("memory_size={}", size(request.memory_size)),
        format!("dirty_size={}", size(request.dirty_size)),
        format!("uploads={}", request.uploads),
        format!("read_ahead={}K", settings.read_ahead_kib),
        format!("fsname={}", settings.fsname),
        either(settings.read_only, "ro", "rw"),
        either(settings.suid, "suid", "nosuid"),
        either(settings.dev, "dev", "nodev"),
        either(settings.exec, "exec", "noexec"),
        either(request.relatime, "relatime", "noatime"),
        either(plan.supervise, "supervise", "nosupervise"),
        format!("heartbeat={}ms", request.heartbeat.unwrap_or_default().as_millis()),
        either(request.follow.is_some(), "follow", "nofollow"),
    ];
    all.extend(request.follow.map(|every| format!("follow_interval={}ms", every.as_millis())));
    all.extend(request.size_limit.map(|n| format!("size={}", size(n))));
    all.extend(settings.allow_other.then(|| "allow_other".to_string()));
    all.join(",")
}

fn text(path: &Path) -> io::Result<String> {
    path.to_str().map(String::from).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{}: the path is not UTF-8", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::mount::{self, MountArgs};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: MountArgs,
    }

    fn parse(words: &[String]) -> MountPlan {
        let line = std::iter::once("x".to_string()).chain(words.iter().cloned());
        mount::plan(Line::try_parse_from(line).expect("understood").args).expect("a plan")
    }

    #[test]
    fn a_plan_survives_the_way_through_words() {
        let given = [
            "--store=s3://b/p",
            "--store-option=aws_region=eu",
            "--key=/k",
            "--state=/s",
            "--log-level=debug",
            "-oprotection=strict,sync_timeout=1.5,cache_size=16383P,size=1000001,uploads=7,suid,noexec,relatime",
            "-ofsname=f,allow_other,dirty_size=8M,read_ahead=0",
            "/m",
        ];
        let plan = parse(&given.map(String::from));
        let again = parse(&words(&plan, None).expect("UTF-8"));
        assert_eq!(format!("{plan:?}"), format!("{again:?}"));
        let reader = parse(
            &["--store=file:///x", "--key=/k", "--state=/s", "--read-only", "-ofsname=f", "/m"]
                .map(String::from),
        );
        let again = parse(&words(&reader, Some(CommitNo(17))).expect("UTF-8"));
        assert_eq!(again.request.at, Some(crate::cli::options::At::Commit(CommitNo(17))));
        assert!(again.request.read_only && again.settings.read_only);
    }

    #[test]
    fn what_a_later_version_adds_is_passed_over() {
        let (a, b) = UnixStream::pair().expect("pair");
        let later = serde_json::json!({"held": 3, "remote": 7, "remote_head": null, "colour": "blue"});
        send(&a, &later).expect("sent");
        (&a).write_all(b"abc").expect("sent");
        let take: Take = receive(&b, None).expect("understood");
        let before = take.predecessor(&b).expect("all there");
        assert_eq!((before.held, before.remote), (b"abc".to_vec(), CommitNo(7)));
        drop(a);
        assert!(receive::<Take>(&b, None).is_err());
    }
}
