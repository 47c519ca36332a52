//! The life of the volume around the steps, in a world that does its worst: ends and restarts of home, readers.
//! Invariant: see [`super`].

use super::compare::{Same, View, same};
use super::disk::Rot;
use super::host::Told;
use super::run::Run;
use embassyfs::log::Error;
use embassyfs::replica::Version;
use embassyfs::types::CommitNo;
use std::time::Duration;

/// Tries to open something in bad weather.
const TRIES: u32 = 1000;

impl Run {
    /// When home went down in the middle of a step, the step may not have been: home rises, and shows what it may.
    pub(super) fn excused(&mut self) -> bool {
        if !self.host.down() {
            return false;
        }
        if let Some((_, model)) = self.history.last() {
            self.model = model.clone();
        }
        self.may_have_failed();
        if let Err(difference) = self.crash() {
            self.tell(&difference);
        }
        true
    }

    pub(super) fn ship(&mut self) -> Same {
        let commit = self.host.newest();
        if !self.host.ship() {
            return self.crash();
        }
        (self.shipped, self.acked) = (commit, commit);
        let used = self.host.used(self.model.used());
        if self.host.down() {
            return self.crash();
        }
        same(|| "usage().used".into(), used, self.model.used())
    }

    pub(super) fn reopen(&mut self, ship: bool) -> Same {
        self.count_checkpoints();
        let told = self.host.told();
        if !self.host.close(if ship { Duration::from_secs(30) } else { Duration::ZERO }) {
            return self.rise_and_show(told);
        }
        self.done.reopened += 1;
        let newest = self.history.last().map_or(0, |(commit, _)| *commit);
        self.rise_and_show(Told { acked: told.acked.max(newest), ..told })
    }

    fn count_checkpoints(&mut self) {
        let found = self.host.checkpoints();
        self.done.checkpoints += found.saturating_sub(self.checkpoints) as u64;
        self.checkpoints = found;
    }

    pub(super) fn crash(&mut self) -> Same {
        self.count_checkpoints();
        let told = self.host.told();
        self.host.fall();
        self.done.crashes += 1;
        self.rise_and_show(told)
    }

    /// Home opens again, in the end, and shows one of its commits, none older than what was acknowledged; so does the
    /// store.
    fn rise_and_show(&mut self, told: Told) -> Same {
        let least = told.acked.max(self.acked);
        let mut rot = None;
        for n in 0..TRIES {
            if rot.is_none() && self.host.sizes.rough > 0 && self.host.world.chance.one_in(10) {
                rot = self.host.disk.rot();
            }
            if self.host.sizes.rough > 0 && self.host.world.chance.one_in(4) {
                self.host.disk.cut_within(40); // also what mends a crash can be cut off
            }
            let opened = self.host.rise();
            if opened.is_err() && self.host.disk.is_down() {
                self.host.fall();
                continue;
            }
            match opened {
                Ok(()) => {
                    let shown = self.shows_a_commit_since(least);
                    match (shown, &rot) {
                        (Err(_), _) if self.host.down() => self.host.fall(),
                        (Err(_), Some(_)) => {
                            self.mend(&mut rot, "bit rot, lost something");
                            self.host.fall();
                        }
                        (Err(_), _) if n + 1 < TRIES && self.puts_off() => {
                            self.host.world.chance.fault("orphans put off");
                            self.fall_and_wait();
                        }
                        (other, _) => return other.map(|()| self.mend(&mut rot, "bit rot, borne")),
                    }
                }
                Err(error) => {
                    self.may_refuse(&error, n, rot.is_some())?;
                    if matches!(error, Error::Corrupt { .. } | Error::Refused(_)) {
                        self.mend(&mut rot, "bit rot, refused");
                    }
                    self.fall_and_wait();
                }
            }
        }
        Err(format!("home did not open in {TRIES} tries"))
    }

    /// Until the weather may be another.
    fn fall_and_wait(&mut self) {
        self.host.fall();
        self.host.world.pass(Duration::from_secs(1));
        self.host.breathe();
    }

    /// Home is up, but the store did not answer when it wanted to know which inodes have no name: it will ask again the
    /// next time, and frees none until then.
    fn puts_off(&self) -> bool {
        let known = self.host.sizes.rough == 0 || !self.host.not_freed().is_empty();
        !known && !self.at(self.host.newest()).orphans().is_empty()
    }

    /// What an operator would do: the file back from where it is whole.
    fn mend(&self, rot: &mut Option<Rot>, what: &'static str) {
        if let Some(rot) = rot.take() {
            self.host.world.chance.fault(what);
            self.host.disk.mend(rot);
        }
    }

    /// Whether home may refuse to open with this: only for the weather, a full disk, or damage that was done.
    fn may_refuse(&self, error: &Error, n: u32, rotten: bool) -> Same {
        let faults = self.host.world.chance.faults();
        let good = match error {
            Error::Store(_) => true,
            Error::Io { .. } => true,
            Error::Corrupt { .. } => rotten || faults.contains_key("damaged answer"),
            Error::Refused(why) => {
                rotten
                    || why.contains("does not answer")
                    || why.contains("neither the store nor this host")
                    || faults.contains_key("stale list") && why.contains("does not hold the end")
                    || faults.contains_key("damaged answer") && why.contains("volume.json")
            }
            _ => false,
        };
        if good && n + 1 < TRIES { Ok(()) } else { Err(format!("home does not open: {error}")) }
    }

    /// A home whose machine is up has failed: only a failing sync, or damage, is a reason, and nobody has fenced it.
    fn may_have_failed(&self) {
        let failure = self.host.home().fs.failure();
        if let Some(reason) = failure.filter(|_| !self.host.disk.is_down()) {
            let faults = self.host.world.chance.faults();
            let good = faults.contains_key("failing sync") || faults.contains_key("damaged answer");
            if !good || reason.contains("FENCED") {
                self.tell(&format!("home failed: {reason}"));
            }
        }
    }

    fn stale_lists(&self) -> u64 {
        self.host.world.chance.faults().get("stale list").copied().unwrap_or_default()
    }

    pub(super) fn look_abroad(&mut self, newest: bool, fresh: bool) -> Same {
        if self.host.down() {
            return self.crash();
        }
        let shipped = self.host.shipped().0.max(self.shipped);
        let version = match newest || shipped == 0 {
            true => Version::Newest,
            false => Version::Commit(CommitNo(1 + self.draw.rng.below(shipped))),
        };
        if shipped == 0 {
            return Ok(()); // nothing there yet
        }
        for n in 0..TRIES {
            let before = self.stale_lists();
            let opened = self.host.embassy(version, fresh);
            let old_list = self.stale_lists() > before;
            let volume = match opened {
                Ok(volume) => volume,
                Err(error) => {
                    let excused = old_list && matches!(error, Error::Corrupt { .. } | Error::Refused(_));
                    if !excused {
                        self.may_refuse(&error, n, false)
                            .map_err(|e| format!("the embassy, {version:?}: {e}"))?;
                    }
                    self.host.world.pass(Duration::from_secs(1));
                    continue;
                }
            };
            self.done.readers += 1;
            let shown = volume.opened.map_or(0, |(commit, _)| commit.0);
            match version {
                Version::Commit(commit) => same(|| "commit shown".into(), shown, commit.0)?,
                _ if shown < shipped && !old_list => {
                    return Err(format!("commit {shown} is shown, {shipped} was shipped"));
                }
                _ => {}
            }
            let model = self.shown_after(shown);
            let mut cookies = self.cookies.clone();
            let world = &self.host.world;
            let compared = View { world, volume: &volume, batch: 50, cookies: &mut cookies }.compare(&model);
            return compared.map_err(|e| format!("the embassy at commit {shown}: {e}"));
        }
        Err(format!("the embassy did not open in {TRIES} tries"))
    }
}
