//! What this host has seen of the store, or was told to expect of it, held against what the store shows.
//! Invariant: a store that is older than what was seen, different from it, or silent for too long is refused, and the
//! message says which of these it is and what to do.

use super::follow::age;
use crate::log::follow::Witness;
use crate::log::segment::VolumeContext;
use crate::log::statedir::StateDir;
use crate::log::{Error, Result, chain, follow};
use crate::ops::status::{rfc3339, seconds};
use crate::store::{Store, StoreError};
use crate::types::{Hash, Head, Seq, Timestamp, unhex};
use std::time::Duration;

/// Name of the file in the state directory that says the newest head this host has seen.
const PIN: &str = "head";

/// What a reader demands of the store beside what the keys prove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// The chain must hold this segment.
    pub expect: Option<Head>,
    /// The newest commit must not be older.
    pub max_age: Option<Duration>,
}

impl Trust {
    /// Refuses a newest commit that is older than is allowed.
    pub fn check_age(&self, newest: Option<Timestamp>, now: Timestamp) -> Result<()> {
        let Some(limit) = self.max_age else { return Ok(()) };
        match newest {
            Some(time) if age(time, now) <= limit => Ok(()),
            newest => Err(Error::Refused(too_old(newest, now, limit))),
        }
    }

    /// Refuses a chain that does not hold the segment that is expected. `head` is the end of the chain where that is
    /// known.
    pub(super) async fn check_expected(
        &self,
        ctx: &VolumeContext,
        store: &dyn Store,
        head: Option<Head>,
    ) -> Result<()> {
        let Some(expected) = self.expect else { return Ok(()) };
        if let Some(head) = head.filter(|head| head.seq < expected.seq) {
            return Err(follow::rolled_back(Witness::Expected, expected, Some(head.seq)));
        }
        match chain::stored_head(ctx, store, expected.seq).await {
            Ok(found) if found == expected => Ok(()),
            Ok(found) => Err(follow::forked(Witness::Expected, expected, found)),
            Err(Error::Store(StoreError::NotFound { .. })) => {
                Err(follow::rolled_back(Witness::Expected, expected, head.map(|head| head.seq)))
            }
            Err(e) => Err(e),
        }
    }
}

/// What to say of a newest commit that is too old.
pub(super) fn too_old(newest: Option<Timestamp>, now: Timestamp, limit: Duration) -> String {
    let limit = seconds(limit.as_secs_f64());
    let what = match newest {
        Some(time) => format!(
            "the newest commit in the store is {} old ({})",
            seconds(age(time, now).as_secs_f64()),
            rfc3339::text(time)
        ),
        None => "the store has no commit".into(),
    };
    format!(
        "FROZEN OR SILENT: {what}, and no more than {limit} is allowed. Either the store is frozen, or was rolled back \
         (which cannot be told apart from here), or home is silent: it gives a sign of life every minute by default. Ask \
         home for its newest commit; a larger --max-age shows this state"
    )
}

/// Refuses a store whose newest segment is older than one this host has seen, or whose chain does not hold it.
pub(super) async fn check_pin(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: &dyn Store,
    head: Option<Head>,
) -> Result<()> {
    let pinned = read_pin(dir)?;
    if let Some(pinned) = pinned {
        let Some(head) = head.filter(|head| head.seq >= pinned.seq) else {
            return Err(follow::rolled_back(Witness::Seen, pinned, head.map(|head| head.seq)));
        };
        let found =
            if head.seq == pinned.seq { head } else { chain::stored_head(ctx, store, pinned.seq).await? };
        if found != pinned {
            return Err(follow::forked(Witness::Seen, pinned, found));
        }
    }
    match head {
        Some(head) if pinned != Some(head) => write_pin(dir, head),
        _ => Ok(()),
    }
}

/// Remembers the newest head seen.
pub(super) fn write_pin(dir: &StateDir, head: Head) -> Result<()> {
    dir.write_atomic(PIN, format!("{} {}\n", head.seq, head.hash).as_bytes())
}

/// The same, if it is newer than what is remembered.
pub(super) fn write_pin_if_newer(dir: &StateDir, head: Head) -> Result<()> {
    match read_pin(dir)? {
        Some(pinned) if pinned.seq >= head.seq => Ok(()),
        _ => write_pin(dir, head),
    }
}

/// The newest head that is remembered.
pub(super) fn read_pin(dir: &StateDir) -> Result<Option<Head>> {
    let Some(bytes) = dir.read(PIN)? else { return Ok(None) };
    match parse_pin(&bytes) {
        Some(head) => Ok(Some(head)),
        None => Err(Error::corrupt(
            dir.root().join(PIN).display(),
            "is damaged; remove it to forget which head was seen (an older store would then go unnoticed)",
        )),
    }
}

pub(super) fn parse_pin(bytes: &[u8]) -> Option<Head> {
    let text = String::from_utf8_lossy(bytes);
    let (seq, hash) = text.trim_end().split_once(' ')?;
    Some(Head { seq: Seq(u64::from_be_bytes(unhex(seq)?)), hash: Hash(unhex(hash)?) })
}

/// A head as `status` and `versions` print it, `SEQ:HASH`: the number in sixteen hexadecimal digits, or in decimal.
pub fn parse_head(text: &str) -> std::result::Result<Head, String> {
    let parsed = text.split_once(':').and_then(|(seq, hash)| {
        let decimal = || seq.parse().ok().filter(|_| seq.len() < 16);
        let number = unhex::<8>(seq).map(u64::from_be_bytes).or_else(decimal)?;
        Some(Head { seq: Seq(number), hash: Hash(unhex(hash)?) })
    });
    parsed.ok_or_else(|| {
        format!("'{text}' is not a head as 'status' and 'versions' print it: segment number, ':', 64 hexadecimal digits")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_understood_as_they_are_printed() {
        let head = Head { seq: Seq(0x1f), hash: Hash([7; 32]) };
        assert_eq!(parse_head(&format!("{}:{}", head.seq, head.hash)), Ok(head));
        assert_eq!(parse_head(&format!("31:{}", head.hash)), Ok(head));
        for bad in ["", "31", "31:", "x:00", "31:0707", &format!("0x1f:{}", head.hash)] {
            assert!(parse_head(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_too_old_is_refused_and_what_is_from_the_future_is_not() {
        let at = |secs| Timestamp { secs, nanos: 0 };
        let trust = Trust { max_age: Some(Duration::from_secs(60)), ..Trust::default() };
        assert!(
            trust.check_age(Some(at(1000)), at(1060)).is_ok()
                && trust.check_age(Some(at(2000)), at(1000)).is_ok()
        );
        assert!(Trust::default().check_age(None, at(0)).is_ok());
        let refused = trust.check_age(Some(at(1000)), at(1061)).unwrap_err().to_string();
        assert!(refused.contains("FROZEN OR SILENT") && refused.contains("1 min 1 s old"), "{refused}");
        assert!(trust.check_age(None, at(0)).is_err());
    }
}
