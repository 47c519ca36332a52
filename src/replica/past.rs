//! Older versions of a volume that is open: another file system over the same frames.
//! Invariant: it reads what the store holds, through the caches of the volume, and changes nothing.

use super::opening::{self, Version};
use super::volume::Volume;
use crate::fs::{Fs, Settings};
use crate::log::recovery::Role;
use crate::log::{Error, Result};
use crate::types::{CommitNo, Timestamp};
use std::sync::Arc;

impl Volume {
    /// The file system as it was at `version`, with the commit that it shows. Asks the store; `Error::Refused` when the
    /// store has no such version.
    pub async fn version(&self, version: Version) -> Result<(Arc<Fs>, CommitNo, Timestamp)> {
        let store = Some(&*self.store);
        let found = opening::recover(&self.ctx, &self.dir, &self.env, store, Role::Reader, version).await?;
        let time = found.time.ok_or_else(|| Error::Refused("the volume has no commit yet".into()))?;
        let commit = found.recovery.last_commit;
        let settings = Settings { read_only: true, relatime: false, follow: None, ..self.fs.settings };
        let fs = Fs::new(settings, self.env.clone(), self.reader.clone(), found.recovery);
        Ok((Arc::new(fs), commit, time))
    }
}
