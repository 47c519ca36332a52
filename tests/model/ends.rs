//! What home shows, now and after an end.
//! Invariant: home shows the model; after a crash one of its commits, none older than what was acknowledged.

use super::compare::{Same, View};
use super::reference::Model;
use super::run::Run;

impl Run {
    pub(super) fn compare_home(&mut self) -> Same {
        let batch = self.draw.rng.pick(&[1, 7, 300]);
        let (world, volume) = (&self.host.world, self.host.home());
        View { world, volume, batch, cookies: &mut self.cookies }.compare(&self.model)
    }

    /// After a crash home shows one of its commits, `least` or a later one; what came after it has never been.
    pub(super) fn shows_a_commit_since(&mut self, least: u64) -> Same {
        let newest = self.host.newest();
        let kept = self.host.not_freed();
        let mut differences = Vec::new();
        for commit in self.candidates(newest, least, !kept.is_empty()) {
            let mut model = self.shown_after(commit);
            model.restart(&kept);
            let (world, volume) = (&self.host.world, self.host.home());
            let mut cookies = self.cookies.clone();
            match (View { world, volume, batch: 100, cookies: &mut cookies }).compare(&model) {
                Err(difference) => differences.push(format!("not commit {commit}: {difference}")),
                Ok(()) => return self.rolled_back(commit, model),
            }
        }
        let differences = differences.join("\n");
        let orphans = self.at(newest).orphans();
        Err(format!(
            "after the crash home is at commit {newest}, {least} was durable here; without names: {orphans:?}, of these \
             not freed: {kept:?}\n{differences}"
        ))
    }

    /// Commits that home can show when its newest is `newest`: that one, or, if something had to be done at once (an
    /// inode without names freed, the root made), the one before. With `kept`, not all of it could be done.
    fn candidates(&self, newest: u64, least: u64, kept: bool) -> Vec<u64> {
        let busy = |commit: u64| commit == 0 || !self.at(commit).orphans().is_empty();
        let both =
            [Some(newest).filter(|no| kept || !busy(*no)), newest.checked_sub(1).filter(|no| busy(*no))];
        both.into_iter().flatten().filter(|commit| *commit >= least).collect()
    }

    pub(super) fn shown_after(&self, commit: u64) -> Model {
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
}
