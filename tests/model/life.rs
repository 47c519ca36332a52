//! The life of the volume around the steps: ends and restarts, readers at the embassy.
//! Invariant: a reader shows exactly the commit that it says it shows.

use super::compare::{Same, View, same};
use super::run::Run;
use embassyfs::fs::{Caller, NewNode};
use embassyfs::replica::Version;
use embassyfs::tree::value::FileType;
use embassyfs::types::{CommitNo, Ino};
use std::time::Duration;

impl Run {
    /// Nothing here excuses a difference.
    pub(super) fn excused(&mut self) -> bool {
        false
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
        self.model.restart(&[]);
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
        self.shows_a_commit_since(least)
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
