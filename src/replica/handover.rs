//! Giving a volume away of this host's own will: the mark at the end of the log that says to whom.
//! Invariant: the mark is put only behind everything that was written here, into the one next place of the chain; once it
//! is there this host writes no more.

use super::divergent::{FENCED, Standing};
use super::held;
use super::proof::{ProvenStore, Put};
use super::volume::Volume;
use crate::log::claim::{self, About, Mark};
use crate::log::segment::{Kind, segment_name};
use crate::log::{self, Error, Result};
use crate::ops::names::told;
use crate::types::Head;

impl Volume {
    /// Hands the volume over to the host that calls itself `to`; `host` is what this one calls itself. The volume must
    /// have been closed, and everything sent. When the mark may or may not have got to the store, it stays in the log
    /// here: a mount then goes on with it, and who of the two comes first is the writer.
    pub fn hand_over(&self, host: &str, to: &str) -> Result<Head> {
        let durable = self.durable().ok_or_else(|| Error::Refused("a reader has nothing to give".into()))?;
        if let Some(reason) = durable.fenced().or(self.fs.failure()) {
            return Err(Error::Refused(reason));
        }
        self.runtime.block_on(self.put_handover(host, to))
    }

    async fn put_handover(&self, host: &str, to: &str) -> Result<Head> {
        let (ctx, store) = (&*self.ctx, &*self.store);
        let (_, walk) = held::chain_in_store(ctx, store).await?;
        let standing = Standing::find(ctx, &self.dir, store).await?;
        if !standing.tail.is_empty() || walk.barred {
            return Err(Error::Refused(format!(
                "{} segments are not in the store: mount again, and hand over when all is sent",
                standing.tail.len()
            )));
        }
        let seq = walk.place;
        let mark =
            Mark { about: About::Handover, time: self.env.clock.now(), host: host.into(), text: to.into() };
        let put = claim::Put {
            kind: Kind::Ordinary,
            seq,
            epoch: walk.epoch,
            prev: walk.head,
            last_commit: walk.last_commit,
            mark: &mark,
        };
        let (bytes, head) = put.bytes(ctx, &self.env)?;
        let name = segment_name(seq);
        self.dir.write_atomic(&name, &bytes)?;
        let known = self.dir.read(log::volume::NAME)?.unwrap_or_default().into();
        let proven = ProvenStore::new(self.store.clone(), known, self.env.clock.clone());
        if proven.put_ours(&name, bytes.into()).await? == Put::Taken {
            self.dir.remove(&name)?;
            return Err(Error::Refused(format!("{name} was taken by another writer meanwhile")));
        }
        let when = crate::ops::status::rfc3339::text(mark.time);
        let reason = told(&format!("HANDED OVER to `{to}` on {when} ({name})"));
        self.dir.write_atomic(FENCED, reason.as_bytes())?;
        ::log::info!("{reason}");
        Ok(head)
    }
}
