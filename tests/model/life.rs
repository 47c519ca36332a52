//! The life of the volume around the steps: the whole tree compared, ends and restarts, readers at the embassy.
//! Invariant: home shows the model; after a crash one of its commits, none older than what was acknowledged; a reader
//! exactly the commit that it says it shows.

use super::compare::{Same, View, same};
use super::reference::Model;
use super::run::Run;
use embassyfs::fs::{Caller, NewNode};
use embassyfs::replica::Version;
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use std::time::Duration;

impl Run {
    pub(super) fn compare_home(&mut self) -> Same {
        let batch = self.draw.rng.pick(&[1, 7, 300]);
        let (world, volume) = (&self.host.world, self.host.home());
        View { world, volume, batch, cookies: &mut self.cookies }.compare(&self.model)
    }

    pub(super) fn ship(&mut self) -> Same {
        let commit = self.host.newest();
        self.host.ship();
        (self.shipped, self.acked) = (commit, commit);
        let used = self.host.used(self.model.used());
        same(|| "usage().used".into(), used, self.model.used())
    }

    pub(super) fn reopen(&mut self, ship: bool) -> Same {
        self.count_checkpoints();
        self.host.close(if ship { Duration::from_secs(30) } else { Duration::ZERO });
        self.host.open();
        self.checkpoints = self.host.checkpoints();
        self.done.reopened += 1;
        self.restarted()
    }

    /// Those made since home was opened, as far as the store has them by now.
    fn count_checkpoints(&mut self) {
        self.done.checkpoints += self.host.checkpoints().saturating_sub(self.checkpoints) as u64;
    }

    /// What has no name is freed, by a commit of its own.
    fn restarted(&mut self) -> Same {
        self.acked = self.acked.max(self.history.last().map_or(0, |(commit, _)| *commit));
        self.model.restart();
        self.note();
        self.compare_home()
    }

    /// After a crash home shows one of its commits, not older than the last that was acknowledged.
    pub(super) fn crash(&mut self) -> Same {
        let least = self.host.durable().0.max(self.acked);
        self.count_checkpoints();
        self.host.crash().map_err(|e| format!("the image of the state directory: {e}"))?;
        self.host.open();
        self.checkpoints = self.host.checkpoints();
        self.done.crashes += 1;
        let newest = self.host.newest();
        let mut differences = Vec::new();
        for commit in self.candidates(newest, least) {
            let mut model = self.shown_after(commit);
            model.restart();
            let (world, volume) = (&self.host.world, self.host.home());
            let mut cookies = self.cookies.clone();
            match (View { world, volume, batch: 100, cookies: &mut cookies }).compare(&model) {
                Err(difference) => differences.push(format!("not commit {commit}: {difference}")),
                Ok(()) => return self.rolled_back(commit, model),
            }
        }
        let differences = differences.join("\n");
        Err(format!("after the crash home is at commit {newest}, {least} was durable here\n{differences}"))
    }

    /// Commits that home can show when its newest is `newest`: that one, or, if something had to be done at once (an
    /// inode without names freed, the root made), the one before.
    fn candidates(&self, newest: u64, least: u64) -> Vec<u64> {
        let busy = |commit: u64| commit == 0 || !self.at(commit).orphans().is_empty();
        let both = [Some(newest).filter(|no| !busy(*no)), newest.checked_sub(1).filter(|no| busy(*no))];
        both.into_iter().flatten().filter(|commit| *commit >= least).collect()
    }

    fn shown_after(&self, commit: u64) -> Model {
        match commit {
            0 => Model::new(self.now), // nothing was committed: the root is made at the opening
            _ => self.at(commit).clone(),
        }
    }

    /// What came after `commit` has never been.
    fn rolled_back(&mut self, commit: u64, model: Model) -> Same {
        self.done.lost += u64::from(self.history.last().is_some_and(|(no, _)| *no > commit));
        self.model = Model { arrivals: self.model.arrivals, ..model };
        self.history.retain(|(no, _)| *no <= commit);
        self.scans.clear();
        self.cookies.clear();
        self.used = self.history.iter().flat_map(|(_, model)| model.nodes.keys()).copied().collect();
        self.draw.gone.clear();
        self.shipped = self.shipped.min(commit);
        self.note();
        Ok(())
    }

    pub(super) fn look_abroad(&mut self, newest: bool, fresh: bool) -> Same {
        let shipped = self.host.shipped().0.max(self.shipped);
        let version = match newest || shipped == 0 {
            true => Version::Newest,
            false => Version::Commit(CommitNo(1 + self.draw.rng.below(shipped))),
        };
        if shipped == 0 {
            return Ok(()); // nothing there yet
        }
        let volume =
            self.host.embassy(version, fresh).map_err(|e| format!("the embassy, {version:?}: {e}"))?;
        self.done.readers += 1;
        let shown = volume.opened.map_or(0, |(commit, _)| commit.0);
        match version {
            Version::Commit(commit) => same(|| "commit shown".into(), shown, commit.0)?,
            _ if shown < shipped => return Err(format!("commit {shown} is shown, {shipped} was shipped")),
            _ => {}
        }
        let model = self.at(shown).clone();
        let mut cookies = self.cookies.clone();
        let world = &self.host.world;
        View { world, volume: &volume, batch: 50, cookies: &mut cookies }
            .compare(&model)
            .map_err(|e| format!("the embassy at commit {shown}: {e}"))?;
        same(|| format!("usage().used at commit {shown}"), volume.fs.usage().used, model.used())?;
        let who = Caller { uid: 0, gid: 0 };
        let node = NewNode { kind: FileType::Fifo, mode: 0, umask: 0, rdev: 0, target: b"" };
        let refused = volume.fs.make(Ino::ROOT, b"refused", &node, who).map(|_| ()).map_err(|e| e.errno());
        same(|| "a change at the embassy".into(), refused, Err(libc::EROFS))
    }
}
