//! Somebody else takes the volume over while home lives: what a promotion does to the store, done by hand.
//! Invariant: one of the two owns the chain. Home is fenced at its next upload, stops for good and cannot open again;
//! what it was told of the embassy before is in the chain, and nothing else of it ever gets there.

use super::compare::{Same, View, same};
use super::disk::SimDisk;
use super::run::Run;
use bytes::Bytes;
use embassyfs::clock::Env;
use embassyfs::log::Error;
use embassyfs::log::chain::ChainStart;
use embassyfs::log::recovery::{Recovered, Role, Step, recover};
use embassyfs::log::segment::{VolumeContext, segment_name};
use embassyfs::log::statedir::StateDir;
use embassyfs::log::writer::LogWriter;
use embassyfs::ops::init::WRITER_KEY;
use embassyfs::replica::Version;
use embassyfs::store::Store;
use embassyfs::store::retry::{RetryPolicy, RetryStore};
use embassyfs::tree::{Counters, delta};
use embassyfs::types::{CommitNo, Epoch, Seq, Timestamp};
use std::sync::Arc;
use std::time::Duration;

/// Tries to win a race against a home that uploads.
const TRIES: usize = 200;
/// How many numbers a promotion leaves free behind its first segment.
const SKIP: u64 = 1000;

impl Run {
    /// The newest commit of the old reign is the model's; home must find out, and nobody else must notice.
    pub fn promotion(&mut self) -> Same {
        if self.host.down() {
            self.crash()?;
        }
        let taken = self.take_over()?;
        let (last, promoted) = (taken.0, taken.1);
        self.host.world.chance.fault("promotion");
        let told = self.host.told();
        if told.remote > last.0 {
            return Err(format!(
                "commit {} was said to be in the embassy, the chain has {}",
                told.remote, last.0
            ));
        }
        // Home lives on until it hears of it: it has something to send, sooner or later.
        let home = self.host.home();
        let newest = home.fs.sync_point();
        let who = embassyfs::fs::Caller { uid: 0, gid: 0 };
        let node = embassyfs::fs::NewNode {
            kind: embassyfs::tree::value::FileType::Directory,
            mode: 0o755,
            umask: 0,
            rdev: 0,
            target: b"",
        };
        for n in 0..5 {
            let name = format!("after the promotion {n}");
            drop(self.host.run(|fs| fs.make(embassyfs::types::Ino::ROOT, name.as_bytes(), &node, who)));
            self.host.commit(n % 2 == 0 && !self.host.down());
        }
        let fenced = || self.host.home().durable().is_some_and(|durable| durable.fenced().is_some());
        if !self.host.disk.is_down() && self.host.home().fs.failure().is_none() {
            self.host.world.until("a fence", || fenced() || self.host.down());
        }
        let told = self.host.told();
        if told.remote > last.0 {
            let remote = told.remote;
            return Err(format!(
                "{newest:?}: commit {remote} was acknowledged after the promotion at {}",
                last.0
            ));
        }
        self.host.fall();
        self.refused()?;
        self.reader_sees(last, promoted)
    }

    /// The next home on the same disk must not write.
    fn refused(&mut self) -> Same {
        for _ in 0..TRIES {
            match self.host.rise() {
                Ok(()) if self.host.down() => {}
                // The store does not answer: home works for itself, until it does.
                Ok(()) => {
                    let host = &self.host;
                    host.commit(false);
                    host.world.until("a fence", || {
                        host.down() || host.home().durable().is_some_and(|durable| durable.fenced().is_some())
                    });
                }
                Err(Error::Refused(why))
                    if why.contains("does not hold the end") || why.contains("FENCED") =>
                {
                    return Ok(());
                }
                Err(_) => {}
            }
            self.host.fall();
            self.host.world.pass(Duration::from_secs(5));
        }
        Err("the fenced home was never refused".into())
    }

    fn reader_sees(&mut self, last: CommitNo, promoted: CommitNo) -> Same {
        let mut why = String::new();
        for _ in 0..TRIES {
            let volume = match self.host.embassy(Version::Newest, true) {
                Ok(volume) => volume,
                Err(error) => {
                    why = error.to_string();
                    self.host.world.pass(Duration::from_secs(5));
                    continue;
                }
            };
            let shown = volume.opened.map_or(0, |(commit, _)| commit.0);
            if shown < promoted.0 {
                continue; // an old list
            }
            same(|| "the commit shown after a promotion".into(), shown, promoted.0)?;
            let model = self.at(last.0).clone();
            let mut cookies = self.cookies.clone();
            let world = &self.host.world;
            return View { world, volume: &volume, batch: 50, cookies: &mut cookies }.compare(&model);
        }
        Err(format!("no reader saw the promotion: {why}"))
    }

    /// Puts a segment of a new epoch behind the newest one, with an empty commit. Gives the last commit before it and
    /// its own.
    fn take_over(&mut self) -> Result<(CommitNo, CommitNo), String> {
        let world = &self.host.world;
        let key = world.key(WRITER_KEY);
        let superblock = &self.host.home().superblock;
        let ctx = Arc::new(VolumeContext {
            id: superblock.volume,
            key: key.volume_key().map_err(|e| e.to_string())?.clone(),
            key_id: superblock.key_id,
            writer_public: superblock.writer_public,
            signer: key.signing.clone(),
        });
        let link = RetryStore::new(world.store.link(3), world.env(), RetryPolicy::default());
        for n in 0..TRIES {
            let path = world.dir.path().join(format!("promoted{n}"));
            let disk = SimDisk::new(&path, world);
            let env = Env { disk: Arc::new(disk), ..world.env() };
            let dir = StateDir::open_on(env.disk.clone(), &path).map_err(|e| e.to_string())?;
            let dir = Arc::new(dir);
            let mut counters = None;
            let mut note = |_: CommitNo, _: Timestamp, _: Seq, bodies: &[Bytes]| {
                counters = Some(delta::decode(bodies)?.0);
                Ok(Step::Continue)
            };
            let start = ChainStart::default();
            let found = recover(&ctx, &dir, &env, Some(&link), start, Role::Reader, &mut note);
            let found: Recovered = match world.runtime.block_on(found) {
                Ok(found) => found,
                Err(_) => {
                    world.pass(Duration::from_secs(1));
                    continue;
                }
            };
            let Some(counters): Option<Counters> = counters else {
                world.pass(Duration::from_secs(1));
                continue;
            };
            let promoted = CommitNo(found.last_commit.0 + 1);
            let epoch = Epoch(found.epoch.0 + 1);
            let put = |head, seq, last: CommitNo| {
                let mut log = LogWriter::new(dir.clone(), ctx.clone(), env.clone(), epoch, head, seq, last);
                let parts = delta::encode(&counters, Vec::new());
                let closed = log.append_commit(CommitNo(last.0 + 1), self.now, &parts);
                let closed = closed.and_then(|()| log.close()).map_err(|e| e.to_string())?;
                let closed = closed.ok_or("no segment")?;
                let name = segment_name(closed.head.seq);
                let body: Bytes = closed.file.read().map_err(|e| e.to_string())?.into();
                for _ in 0..TRIES {
                    let _ = world.runtime.block_on(link.put_new(&name, body.clone())); // what came of it is asked now
                    world.pass(Duration::from_secs(60)); // what is late is there by then
                    let there = world.runtime.block_on(world.store.truth().get_suffix(&name, u64::MAX));
                    if let Ok((there, _)) = there {
                        return Ok((there == body).then_some(closed.head));
                    }
                }
                Err::<_, String>(format!("{name} cannot be put"))
            };
            if let Some(head) = put(found.head, found.next_seq, found.last_commit)? {
                // From here on out of reach of what home has under way.
                let far = Seq(found.next_seq.0 + SKIP);
                put(Some(head), far, promoted)?.ok_or("somebody wrote far ahead")?;
                return Ok((found.last_commit, CommitNo(promoted.0 + 1)));
            }
        }
        Err(format!("no promotion in {TRIES} tries"))
    }
}
