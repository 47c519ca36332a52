//! Somebody else takes the volume over while home lives: a storm of promotions, by the product's own hand.
//! Invariant: one of the two owns the chain. Home is fenced at its next upload, stops for good and cannot open again;
//! what it was told of the embassy before is in the chain, and nothing else of it ever gets there.

use super::compare::{Same, View, same};
use super::disk::SimDisk;
use super::ops::Op;
use super::run::Run;
use bytes::Bytes;
use embassyfs::clock::Env;
use embassyfs::fs::{Caller, XattrMode};
use embassyfs::log::Error;
use embassyfs::ops::init::WRITER_KEY;
use embassyfs::replica::promote::{Came, Promotion, Report, promote};
use embassyfs::replica::{Trust, Version};
use embassyfs::store::retry::{RetryPolicy, RetryStore};
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use std::sync::Arc;
use std::time::Duration;

/// Tries of what the weather may keep from happening.
const TRIES: usize = 200;

impl Run {
    /// The newest commit of the old reign is the model's; home must find out, and nobody else must notice.
    pub fn promotion(&mut self) -> Same {
        if self.host.down() {
            self.crash()?;
        }
        let last = self.take_over()?;
        self.host.world.chance.fault("promotion");
        let told = self.host.told();
        if told.remote > last.0 {
            return Err(format!(
                "commit {} was said to be in the embassy, the chain has {}",
                told.remote, last.0
            ));
        }
        // Home lives on until it hears of it: it has something to send, sooner or later.
        let newest = self.host.newest();
        for n in 0..5 {
            self.write_on()?;
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
                "at {newest}: commit {remote} was acknowledged after the promotion at {}",
                last.0
            ));
        }
        self.host.fall();
        self.refused()?;
        self.reader_sees(last)
    }

    /// The next home on the same disk must not write.
    fn refused(&mut self) -> Same {
        for _ in 0..TRIES {
            match self.host.rise() {
                Ok(()) if self.host.down() => {}
                // The store does not answer: home works for itself, until it does.
                Ok(()) => {
                    let host = &self.host;
                    // All it has may be in the embassy: only who has something to send finds out.
                    let _ = host.run(|fs| fs.setxattr(Ino::ROOT, b"user.fenced", b"yet?", XattrMode::Any));
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

    fn reader_sees(&mut self, last: CommitNo) -> Same {
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
            if shown < last.0 {
                continue; // an old list
            }
            same(|| "the commit shown after a promotion".into(), shown, last.0)?;
            let model = self.at(last.0).clone();
            let mut cookies = self.cookies.clone();
            let world = &self.host.world;
            return View { world, volume: &volume, batch: 50, cookies: &mut cookies }.compare(&model);
        }
        Err(format!("no reader saw the promotion: {why}"))
    }

    /// Takes the volume over as an operator would: again when it fails, with the same state directory; sometimes two at
    /// once; while home writes. Gives the newest commit of the chain.
    fn take_over(&mut self) -> Result<CommitNo, String> {
        let rivals = 1 + self.host.world.chance.below(2) as usize;
        let mut standbys: Vec<Standby> = (0..rivals).map(|n| Standby::new(&self.host.world, n)).collect();
        for _ in 0..TRIES {
            let tasks =
                standbys.iter_mut().map(|standby| standby.begin(&self.host.world)).collect::<Vec<_>>();
            let mut left = 100_000_u32;
            while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
                left = left.checked_sub(1).ok_or("a promotion goes on for ever")?;
                self.write_on()?;
                self.host.world.pass(self.host.world.chance.millis(1, 50));
                standbys.iter().for_each(|standby| standby.breathe(&self.host.world));
            }
            let mut won: Vec<Report> = Vec::new();
            for (task, standby) in tasks.into_iter().zip(&mut standbys) {
                match self.host.world.runtime.block_on(task).map_err(|e| e.to_string())? {
                    Ok(report) => won.push(report),
                    Err(Error::Fenced { .. }) => self.host.world.chance.fault("promotion lost to another"),
                    Err(error) => {
                        // Its words may name the directory, which is another one in each run.
                        let told =
                            error.to_string().replace(&*self.host.world.dir.path().to_string_lossy(), "");
                        self.host.world.chance.event(&format!("no promotion: {told}"), &[]);
                        standby.again();
                    }
                }
            }
            if let Some(newest) = won.iter().max_by_key(|report| report.epoch) {
                for report in &won {
                    if report.barriers > 0 {
                        self.host.world.chance.fault("barrier");
                    }
                    if report.lost_places > 0 {
                        self.host.world.chance.fault("place lost to home");
                    }
                    if report.came == Came::Before {
                        self.host.world.chance.fault("promotion done again");
                    }
                }
                let mut epochs: Vec<_> = won.iter().map(|report| report.epoch).collect();
                epochs.sort_unstable();
                epochs.dedup();
                same(|| "two promotions of one epoch have won".into(), epochs.len(), won.len())?;
                return Ok(newest.commit);
            }
            self.host.world.pass(Duration::from_secs(1));
        }
        Err(format!("no promotion in {TRIES} tries"))
    }

    /// Home goes on as if nothing were, until it is down or hears of it.
    fn write_on(&mut self) -> Same {
        if self.host.down() {
            return Ok(());
        }
        self.now.secs += 1;
        self.host.set_clock(self.now);
        let name = Bytes::from(format!("in the storm {}", self.now.secs));
        let (dir, target, who) = (Ino::ROOT, Bytes::new(), Caller { uid: 0, gid: 0 });
        let (kind, mode, umask, rdev, hold) = (FileType::Directory, 0o755, 0, 0, false);
        let made = self.apply(&Op::Make { dir, name, kind, mode, umask, rdev, target, who, hold });
        if self.host.down() {
            return Ok(()); // whether it was made, nobody was told
        }
        made?;
        let commit = self.host.home().fs.sync_point();
        self.host.home().fs.request_commit(commit, true);
        Ok(())
    }
}

/// A host that takes the volume over.
struct Standby {
    name: String,
    disk: SimDisk,
    /// The next of its links to the store.
    link: usize,
}

impl Standby {
    fn new(world: &super::common::World, n: usize) -> Standby {
        let name = format!("standby{n}");
        let disk = SimDisk::new(&world.dir.path().join(&name), world).without_rests();
        Standby { name, disk, link: 3 + n }
    }

    fn begin(
        &mut self,
        world: &super::common::World,
    ) -> tokio::task::JoinHandle<embassyfs::log::Result<Report>> {
        let env = Env { disk: Arc::new(self.disk.clone()), ..world.env() };
        // A link of its own for each try: a barrier may be made anew.
        self.link += 2;
        let link = RetryStore::new(world.store.link(self.link as u32), env.clone(), RetryPolicy::default());
        let options = Promotion {
            store: Arc::new(link),
            key: world.key(WRITER_KEY),
            state: world.dir.path().join(&self.name),
            env,
            host: self.name.clone(),
            reason: "a storm".into(),
            accept: None,
            trust: Trust::default(),
        };
        world.runtime.spawn(async move { promote(&options).await })
    }

    /// Its machine may go down at any of its writes.
    fn breathe(&self, world: &super::common::World) {
        if world.chance.per_mille(20) {
            self.disk.cut_within(12);
        }
    }

    fn again(&mut self) {
        self.disk = self.disk.after();
    }
}
