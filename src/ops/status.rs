//! What a mounted volume says about itself: the record that `embassyfs status` shows, and its text for people.
//! Invariant: the JSON keys are an interface; they are added to, never renamed.

use super::names::told;
use super::requests::RequestFigures;
use crate::types::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Status of a mounted volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Process that serves the mount.
    pub pid: u32,
    /// Version of the program that serves it.
    pub version: String,
    /// Seconds since the daemon started.
    pub uptime: f64,
    /// Name of the volume.
    pub volume: String,
    /// Identity of the volume, hexadecimal.
    pub volume_id: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// `writer` or `reader`.
    pub role: String,
    /// The store, without secrets.
    pub store: String,
    /// The state directory.
    pub state: String,
    /// `strict`, `available` or `local`.
    pub protection: String,
    /// True when everything committed is durable at the protection level's place and the level has not fallen back.
    pub in_sync: bool,
    /// Age in seconds of the oldest change that the embassy does not hold; 0 when it holds all.
    pub lag_seconds: f64,
    /// Bytes that are committed here and not in the embassy.
    pub unsent_bytes: u64,
    /// Segments that are not in the embassy.
    pub unsent_segments: u64,
    /// Bytes written by applications that are not committed yet.
    pub dirty_bytes: u64,
    /// Bytes of the local disk used as cache.
    pub cache_bytes: u64,
    /// Newest commit on this host.
    pub last_commit: Option<CommitPoint>,
    /// Newest commit that the embassy holds.
    pub last_durable: Option<CommitPoint>,
    /// How many times `available` has fallen back to the local spool since the mount.
    pub fallbacks: u64,
    /// True when another writer owns the volume: nothing more is shipped from here.
    pub fenced: bool,
    /// To whom the volume was handed over, in the last status of a mount that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<String>,
    /// The last thing that went wrong, if it still matters.
    pub last_error: Option<String>,
    /// Seconds since `available` fell back to the local spool; null while it has not.
    pub out_of_sync_seconds: Option<f64>,
    /// True when the local log has failed: every change is refused until the next mount.
    pub failed: bool,
    /// Why the last upload failed; null when one has succeeded since.
    pub store_error: Option<String>,
    /// Callers that wait until something is durable.
    pub waiting: u64,
    /// What was sent to the store since the mount.
    pub uploads: UploadFigures,
    /// Bytes that the disk of the state directory had left when it was last looked at (each second).
    pub spool_free_bytes: Option<u64>,
    /// What the kernel asked since the mount.
    pub requests: RequestFigures,
    /// The newest segment: that is shown, or that the embassy holds; number and hash, as `--expect` takes them.
    pub head: Option<String>,
    /// How a follower stands; null for others. Its `lag_seconds` is the age of the newest commit that is shown.
    pub follow: Option<FollowStatus>,
}

/// How a follower stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FollowStatus {
    /// `following`, `store away` or `stopped`.
    pub state: String,
    /// The newest commit is older than `--max-age` allows.
    pub too_old: bool,
    /// Seconds since the store last answered.
    pub contact_seconds: f64,
    /// Jumps to a newer checkpoint since the mount.
    pub jumps: u64,
    /// What keeps it from going on.
    pub error: Option<String>,
}

/// What was sent to the store since the mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UploadFigures {
    /// Segments and checkpoints that wait or are under way.
    pub pending: u64,
    /// Segments sent.
    pub sent_segments: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Checkpoints sent.
    pub sent_checkpoints: u64,
    /// Attempts that failed.
    pub failures: u64,
}

/// A commit and when it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitPoint {
    /// Commit number.
    pub no: u64,
    /// Time of the commit by home's clock, RFC 3339 in JSON.
    #[serde(with = "rfc3339")]
    pub time: Timestamp,
}

/// What a store says about its volume when nobody mounts it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreStatus {
    /// The store, without secrets.
    pub store: String,
    /// Name of the volume.
    pub volume: String,
    /// Identity of the volume, hexadecimal.
    pub volume_id: String,
    /// Number of the newest segment.
    pub newest_segment: Option<u64>,
    /// The same with its hash, as `--expect` takes it.
    pub head: Option<String>,
    /// Newest commit in the store.
    pub last_commit: Option<CommitPoint>,
    /// Newest checkpoint in the store.
    pub newest_checkpoint: Option<CommitPoint>,
}

impl fmt::Display for StoreStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = |p: &Option<CommitPoint>| match p {
            Some(p) => format!("commit {} of {}", p.no, rfc3339::text(p.time)),
            None => "none".into(),
        };
        let [store, volume, id] = [&self.store, &self.volume, &self.volume_id].map(|text| told(text));
        writeln!(f, "{store}: volume {volume} ({id})")?;
        writeln!(f, "  last commit         {}", point(&self.last_commit))?;
        writeln!(f, "  newest checkpoint   {}", point(&self.newest_checkpoint))?;
        let segment = self.newest_segment.map_or_else(|| "none".into(), |n| format!("{n} ({n:016x})"));
        writeln!(f, "  newest segment      {segment}")?;
        write!(f, "  head                {}", told(self.head.as_deref().unwrap_or("none")))
    }
}

impl Status {
    /// True when something is on this host only: committed and not sent, or not even committed.
    pub fn has_unsent(&self) -> bool {
        self.dirty_bytes > 0 || self.has_unsent_commits()
    }

    pub(super) fn has_unsent_commits(&self) -> bool {
        self.unsent_bytes > 0 || self.unsent_segments > 0 || self.unsent_commits() > 0
    }

    /// Commits that the embassy does not hold. The account of bytes and segments leaves the open segment out.
    fn unsent_commits(&self) -> u64 {
        match (self.last_commit, self.last_durable) {
            _ if self.role != "writer" => 0,
            (None, _) => 0,
            (Some(here), Some(there)) => here.no.saturating_sub(there.no),
            // The first segment's time is noted a moment after it is known to have arrived; the lag is exact.
            (Some(here), None) => {
                if self.lag_seconds > 0.0 {
                    here.no
                } else {
                    0
                }
            }
        }
    }

    /// What is committed here and not in the embassy, in words: `3.2 MiB in 2 segments`. Uncommitted bytes are not
    /// part of it: only what is committed is kept in the state directory.
    pub fn unsent_in_words(&self) -> String {
        if self.unsent_bytes > 0 || self.unsent_segments > 0 {
            return format!("{} in {}", bytes(self.unsent_bytes), count(self.unsent_segments, "segment"));
        }
        match self.unsent_commits() {
            0 => "nothing that is committed".into(),
            n => count(n, "commit"),
        }
    }

    /// What a daemon that goes on has still to bring to the embassy; `None` when it is nothing.
    pub fn waiting_in_words(&self) -> Option<String> {
        let mut parts = Vec::new();
        if self.has_unsent_commits() {
            parts.push(format!("{} unsent", self.unsent_in_words()));
        }
        if self.dirty_bytes > 0 {
            parts.push(format!("{} not yet committed", bytes(self.dirty_bytes)));
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }

    /// The answer to "is it all right?", in a few words.
    pub fn headline(&self) -> String {
        if self.fenced {
            return "FENCED: another writer owns this volume; nothing more is shipped from here".into();
        }
        let mut words = Vec::new();
        if self.last_error.is_some() {
            words.push("ERROR (see last error)");
        }
        if self.role == "reader" {
            words.push("read-only");
            let follow = self.follow.as_ref().map(|follow| match follow.state.as_str() {
                "following" => format!("following, lag {}", seconds(self.lag_seconds)),
                "store away" => format!(
                    "STORE AWAY for {}, showing what is {} old",
                    seconds(follow.contact_seconds),
                    seconds(self.lag_seconds)
                ),
                _ => format!("STOPPED, showing what is {} old", seconds(self.lag_seconds)),
            });
            words.extend(follow.as_deref());
            if self.follow.as_ref().is_some_and(|follow| follow.too_old) {
                words.push("TOO OLD");
            }
            return words.join(", ");
        }
        if !self.in_sync {
            words.push("OUT OF SYNC with the embassy");
        }
        match self.waiting_in_words() {
            None if words.is_empty() => "in sync with the embassy".into(),
            None => words.join(", "),
            Some(waiting) => {
                if words.is_empty() {
                    words.push("shipping");
                }
                format!("{}: {waiting}, lag {}", words.join(", "), seconds(self.lag_seconds))
            }
        }
    }

    /// How the volume was left, if this is the last status of a daemon that has ended.
    pub fn ending(&self) -> Ending {
        // With all commits sent, only a fence or a failed log leaves the volume out of sync. A failed log may have
        // taken changes with it that have no bytes to count, such as new names.
        let failed = self.role == "writer" && !self.in_sync && !self.fenced && !self.has_unsent_commits();
        if self.dirty_bytes > 0 || failed {
            Ending::Lost
        } else if !self.has_unsent_commits() {
            Ending::Clean
        } else if self.fenced {
            Ending::Fenced
        } else {
            Ending::Unsent
        }
    }

    /// What [`Status::ending`] says, in words for who has to act on it; `None` when all is in the embassy.
    pub fn ending_in_words(&self) -> Option<String> {
        let mut parts = Vec::new();
        match (self.ending(), self.dirty_bytes) {
            (Ending::Clean, _) => return None,
            (Ending::Lost, 0) => {
                parts.push("LOST: what was changed after the last commit, if anything".into())
            }
            (Ending::Lost, n) => parts.push(format!("LOST: {} that were never committed", bytes(n))),
            _ => {}
        }
        if self.has_unsent_commits() {
            let (unsent, state) = (self.unsent_in_words(), &self.state);
            parts.push(if self.fenced {
                format!(
                    "unsent: {unsent}; another writer owns the volume, so this is never shipped from here; the unsent \
                     segments stay in {state}"
                )
            } else {
                format!("unsent: {unsent}, kept in {state}; the next mount with this state directory ships it")
            });
        }
        if let Some(error) = &self.last_error {
            parts.push(format!("last error: {error}"));
        }
        Some(parts.join("; "))
    }
}

/// How an ended daemon has left its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All is in the embassy.
    Clean,
    /// Commits are only in the state directory; the next mount ships them.
    Unsent,
    /// Commits are only in the state directory, and another writer owns the volume: nothing ships them.
    Fenced,
    /// Changes were never committed and are lost.
    Lost,
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = |p: &Option<CommitPoint>| match p {
            Some(p) => format!("commit {} of {}", p.no, rfc3339::text(p.time)),
            None => "none".into(),
        };
        writeln!(f, "{}: {}", told(&self.mountpoint), self.headline())?;
        writeln!(f, "  last error    {}", told(self.last_error.as_deref().unwrap_or("none")))?;
        writeln!(f, "  last durable  {}", point(&self.last_durable))?;
        writeln!(f, "  last commit   {}", point(&self.last_commit))?;
        if self.role != "reader" {
            let level = match self.fallbacks {
                0 => self.protection.clone(),
                n => format!("{} (fell back to the local spool {n} times)", self.protection),
            };
            writeln!(f, "  protection    {}", told(&level))?;
            writeln!(f, "  unsent        {}", self.waiting_in_words().as_deref().unwrap_or("nothing"))?;
            writeln!(f, "  lag           {}", seconds(self.lag_seconds))?;
        }
        writeln!(f, "  head          {}", told(self.head.as_deref().unwrap_or("none")))?;
        if let Some(follow) = &self.follow {
            writeln!(f, "  lag           {}", seconds(self.lag_seconds))?;
            writeln!(f, "  last contact  {} ago", seconds(follow.contact_seconds))?;
            if let Some(error) = &follow.error {
                writeln!(f, "  {:12}  {}", told(&follow.state), told(error))?;
            }
        }
        writeln!(f, "  cache         {}", bytes(self.cache_bytes))?;
        let [volume, id, role] = [&self.volume, &self.volume_id, &self.role].map(|text| told(text));
        writeln!(f, "  volume        {volume} ({id}), {role}")?;
        writeln!(f, "  store         {}", told(&self.store))?;
        writeln!(f, "  state         {}", told(&self.state))?;
        let version = told(&self.version);
        write!(f, "  daemon        pid {}, version {version}, up {}", self.pid, seconds(self.uptime))
    }
}

/// A number of bytes for people: `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A number of seconds for people: `0.4 s`, `3 min 2 s`, `5 d 4 h`.
pub fn seconds(s: f64) -> String {
    if !(0.0..1e15).contains(&s) {
        return "unknown".into();
    }
    let whole = s as u64;
    match whole {
        0..10 => format!("{s:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86400, whole % 86400 / 3600),
    }
}

/// Time stamps as RFC 3339 text, in JSON and for people.
pub mod rfc3339 {
    use crate::types::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// The text; a time outside of what the calendar can say is given as `@seconds`.
    pub fn text(time: Timestamp) -> String {
        // jiff wants the nanoseconds with the sign of the seconds; from_second plus a duration needs no case.
        let whole = jiff::Timestamp::from_second(time.secs).ok();
        let exact = whole.and_then(|t| t.checked_add(jiff::SignedDuration::new(0, time.nanos as i32)).ok());
        match exact {
            Some(t) => t.to_string(),
            None => format!("@{}", time.secs),
        }
    }

    /// The time that an RFC 3339 text (with its offset) or `@seconds[.fraction]` says.
    pub fn parse(text: &str) -> Result<Timestamp, String> {
        if let Some(unix) = text.strip_prefix('@') {
            return parse_unix(unix).ok_or_else(|| format!("'{text}' is not @seconds since 1970"));
        }
        let time: jiff::Timestamp =
            text.parse().map_err(|_| format!("'{text}' is not a time like 2025-01-31T12:00:00Z"))?;
        let nanos = time.as_nanosecond();
        Ok(Timestamp {
            secs: nanos.div_euclid(1_000_000_000) as i64,
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        })
    }

    fn parse_unix(text: &str) -> Option<Timestamp> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let secs: i64 = whole.parse().ok()?;
        if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let nanos: u32 = format!("{fraction:0<9}").parse().ok()?;
        match (whole.starts_with('-'), nanos) {
            (_, 0) | (false, _) => Some(Timestamp { secs, nanos }),
            (true, n) => Some(Timestamp { secs: secs.checked_sub(1)?, nanos: 1_000_000_000 - n }),
        }
    }

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&text(*time))
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(seconds(0.42), "0.4 s");
        assert_eq!(seconds(3723.0), "1 h 2 min");
        assert_eq!(seconds(f64::NAN), "unknown");
    }

    fn writer(commit: u64, durable: u64) -> Status {
        let point = |no| Some(CommitPoint { no, ..CommitPoint::default() }).filter(|p| p.no > 0);
        let (last_commit, last_durable) = (point(commit), point(durable));
        let (role, state) = ("writer".into(), "/s".into());
        Status { role, state, in_sync: true, last_commit, last_durable, ..Status::default() }
    }

    #[test]
    fn a_commit_that_is_not_durable_is_unsent_whatever_the_bytes_say() {
        assert!(!writer(7, 7).has_unsent() && !writer(0, 0).has_unsent());
        assert!(writer(8, 7).has_unsent() && !writer(1, 0).has_unsent());
        assert!(Status { lag_seconds: 0.1, ..writer(1, 0) }.has_unsent());
        assert_eq!(writer(9, 7).unsent_in_words(), "2 commits");
        assert!(!Status { role: "reader".into(), ..writer(8, 7) }.has_unsent());
    }

    #[test]
    fn the_headline_never_hides_what_is_unsent_or_wrong() {
        let ok = writer(7, 7);
        assert_eq!(ok.headline(), "in sync with the embassy");
        let shipping = Status { unsent_bytes: 1 << 20, unsent_segments: 1, lag_seconds: 2.0, ..writer(8, 7) };
        assert_eq!(shipping.headline(), "shipping: 1.0 MiB in 1 segment unsent, lag 2.0 s");
        assert!(Status { dirty_bytes: 5, ..ok.clone() }.headline().starts_with("shipping: 5 B not yet"));
        let out = Status { in_sync: false, ..shipping };
        assert!(out.headline().starts_with("OUT OF SYNC with the embassy: 1.0 MiB"), "{}", out.headline());
        let error = Status { last_error: Some("x".into()), ..out };
        assert!(error.headline().starts_with("ERROR (see last error), OUT OF SYNC"), "{}", error.headline());
        assert!(Status { fenced: true, ..error }.headline().starts_with("FENCED"));
        assert_eq!(Status { last_error: Some("x".into()), ..ok }.headline(), "ERROR (see last error)");
    }

    #[test]
    fn what_is_left_behind_is_promised_only_when_it_is_kept() {
        let words = |s: &Status| s.ending_in_words().unwrap_or_default();
        assert_eq!((writer(7, 7).ending(), words(&writer(7, 7))), (Ending::Clean, String::new()));
        let unsent = writer(8, 7);
        assert_eq!(unsent.ending(), Ending::Unsent);
        assert!(words(&unsent).contains("1 commit, kept in /s; the next mount"), "{}", words(&unsent));
        let fenced = Status { fenced: true, in_sync: false, ..unsent.clone() };
        assert_eq!(fenced.ending(), Ending::Fenced);
        assert!(words(&fenced).contains("another writer") && !words(&fenced).contains("next mount"));
        let lost = Status { dirty_bytes: 2048, last_error: Some("disk full".into()), ..unsent };
        assert_eq!(lost.ending(), Ending::Lost);
        assert!(words(&lost).starts_with("LOST: 2.0 KiB that were never committed; unsent: 1 commit, kept"));
        assert!(words(&lost).ends_with("last error: disk full"));
        // A failed log that has taken only names with it.
        let failed = Status { in_sync: false, ..writer(7, 7) };
        assert!(failed.ending() == Ending::Lost && words(&failed).contains("after the last commit"));
    }

    #[test]
    fn no_words_of_another_host_make_a_line_of_their_own() {
        let bad = || String::from("h\x1b[1mX\n  last error    none");
        let follow = Some(FollowStatus { state: bad(), error: Some(bad()), ..FollowStatus::default() });
        let status = Status {
            mountpoint: bad(),
            volume: bad(),
            store: bad(),
            state: bad(),
            head: Some(bad()),
            last_error: Some(bad()),
            protection: bad(),
            follow,
            ..writer(7, 7)
        };
        let text = status.to_string();
        assert_eq!(text.matches("\n  last error").count(), 1, "{text}");
        assert!(!text.contains('\x1b') && text.contains("h\\x1b[1mX\\x0a"), "{text}");
        let text = StoreStatus { store: bad(), volume: bad(), ..StoreStatus::default() }.to_string();
        assert!(text.lines().count() == 5 && !text.contains('\x1b'), "{text}");
    }

    #[test]
    fn times_round_trip_also_before_1970() {
        for t in [(0, 0), (1_700_000_000, 5), (-1, 999_999_999), (-86_400, 500_000_000)] {
            let t = Timestamp { secs: t.0, nanos: t.1 };
            assert_eq!(rfc3339::parse(&rfc3339::text(t)), Ok(t));
        }
        assert_eq!(rfc3339::parse("@-1.5"), Ok(Timestamp { secs: -2, nanos: 500_000_000 }));
        assert_eq!(rfc3339::parse("@12.25"), Ok(Timestamp { secs: 12, nanos: 250_000_000 }));
        assert!(rfc3339::parse("@").is_err() && rfc3339::parse("2025-01-01T00:00:00").is_err());
    }

    #[test]
    fn status_survives_json_and_missing_keys() {
        let status = Status { pid: 7, last_durable: Some(CommitPoint::default()), ..Status::default() };
        let json = serde_json::to_string(&status).expect("plain data");
        assert_eq!(serde_json::from_str::<Status>(&json).expect("own text"), status);
        assert!(json.contains("1970-01-01T00:00:00Z"));
        assert_eq!(serde_json::from_str::<Status>("{\"pid\":7}").expect("defaults").pid, 7);
    }
}
