//! Mount options (`-o`), and the values that options and flags share: sizes, durations, points in time.
//! Invariant: an option that is not known is refused by name; none is ignored silently, except those that belong to
//! mount(8) and systemd.

use super::exit::Failure;
use crate::clock::Env;
use crate::ops::names::told;
use crate::ops::status::rfc3339;
use crate::replica::Version;
use crate::replica::durable::Protection;
use crate::types::{CommitNo, Timestamp};
use std::time::Duration;

/// A point in the history of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// The commit with this number.
    Commit(CommitNo),
    /// The newest commit that was made at or before this time.
    Time(Timestamp),
    /// The newest commit.
    Newest,
}

impl From<At> for Version {
    fn from(at: At) -> Version {
        match at {
            At::Commit(no) => Version::Commit(no),
            At::Time(time) => Version::Time(time),
            At::Newest => Version::Newest,
        }
    }
}

/// How far home's clock may be ahead of this host's: a time that is further in the future is still to come. What home
/// wrote by such a clock can be asked for by its time.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Everything `-o` can say, with its default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// `protection=`
    pub protection: Protection,
    /// `sync_timeout=`
    pub sync_timeout: Duration,
    /// `cache_size=`: local disk for what the store holds as well.
    pub cache_size: u64,
    /// `memory_size=`: opened frames in memory.
    pub memory_size: u64,
    /// `dirty_size=`: written, not yet committed bytes in memory.
    pub dirty_size: u64,
    /// `uploads=`: segments on their way at once.
    pub uploads: u32,
    /// `size=`: the most the volume may hold.
    pub size_limit: Option<u64>,
    /// `fsname=`
    pub fsname: Option<String>,
    /// `allow_other`
    pub allow_other: bool,
    /// `ro`
    pub read_only: bool,
    /// `suid`
    pub suid: bool,
    /// `dev`
    pub dev: bool,
    /// `exec`
    pub exec: bool,
    /// `relatime`: reading changes access times that are older than the last change, or a day old.
    pub relatime: bool,
    /// `read_ahead=`
    pub read_ahead: u64,
    /// `heartbeat=`: a writer without changes gives a sign of life this often; none: never.
    pub heartbeat: Option<Duration>,
    /// `follow`: a read-only mount moves on with home.
    pub follow: bool,
    /// `follow_interval=`: how often it asks the store.
    pub follow_interval: Duration,
    /// `supervise`: after a crash of the daemon the volume is mounted again.
    pub supervise: bool,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            protection: Protection::default(),
            sync_timeout: Duration::from_secs(30),
            cache_size: 10 << 30,
            memory_size: 128 << 20,
            dirty_size: 64 << 20,
            uploads: 32,
            size_limit: None,
            fsname: None,
            allow_other: false,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            relatime: false,
            read_ahead: 2 << 20,
            heartbeat: Some(Duration::from_secs(60)),
            follow: false,
            follow_interval: Duration::from_millis(500),
            supervise: false,
        }
    }
}

/// The options that take effect, for messages and the manual.
pub const KNOWN: &[(&str, &str)] = &[
    ("protection=LEVEL", "strict, available (default) or local: what fsync waits for"),
    ("sync_timeout=TIME", "how long fsync waits for the embassy (default 30s)"),
    ("cache_size=SIZE", "local disk used as cache (default 10G); unsent data is never evicted"),
    ("memory_size=SIZE", "memory for opened data (default 128M)"),
    ("dirty_size=SIZE", "memory for data not yet committed (default 64M)"),
    ("uploads=N", "segments on their way to the store at once, 64 MiB of them (default 32)"),
    ("size=SIZE", "the most file contents the volume may hold (default: no limit)"),
    ("fsname=TEXT", "source shown in the mount table (default embassyfs:NAME)"),
    ("allow_other", "other users may enter; permissions are checked as on a local disk"),
    ("default_permissions", "always on; accepted for the habit's sake"),
    ("ro, rw", "read-only, read-write"),
    ("exec, noexec", "programs can be run from the mount (default exec)"),
    ("suid, nosuid", "set-user-id bits count (default nosuid)"),
    ("dev, nodev", "device files work (default nodev)"),
    (
        "relatime, noatime",
        "reading changes access times, at most daily or once after a change (default noatime)",
    ),
    (
        "heartbeat=TIME",
        "an idle writer's sign of life, an empty commit, after so long (default 60s; 0: none)",
    ),
    ("follow", "read-only: move on with home (default nofollow)"),
    ("follow_interval=TIME", "how often a follower asks the store (default 500ms)"),
    ("supervise", "mount again by itself after a crash of the daemon (default nosupervise)"),
    ("read_ahead=SIZE", "how far the kernel reads ahead (default 2M; 0: the kernel's own)"),
];

/// Words that are for mount(8), libmount or systemd; the mount helper may see them.
const FOREIGN: &[&str] = &[
    "_netdev",
    "auto",
    "noauto",
    "defaults",
    "nofail",
    "user",
    "nouser",
    "users",
    "group",
    "owner",
    "async",
    "diratime",
    "nodiratime",
    "loud",
    "silent",
    "nostrictatime",
    "nolazytime",
    // What is so anyway.
    "acl",
    "user_xattr",
    "nomand",
];
const FOREIGN_PREFIXES: &[&str] = &["x-", "X-", "comment=", "uhelper=", "helper="];

impl MountOptions {
    /// Applies a comma-separated list; a later word wins over an earlier one.
    pub fn apply(&mut self, list: &str) -> Result<(), Failure> {
        list.split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
            .try_for_each(|word| self.apply_one(word))
    }

    /// Applies one option, `name` or `name=value`.
    pub fn apply_one(&mut self, word: &str) -> Result<(), Failure> {
        match word.split_once('=') {
            Some((name, value)) => self.apply_value(word, name, value),
            None => self.apply_switch(word),
        }
    }

    fn apply_switch(&mut self, word: &str) -> Result<(), Failure> {
        match word {
            "allow_other" => self.allow_other = true,
            "default_permissions" => {}
            "ro" | "rw" => self.read_only = word == "ro",
            "exec" | "noexec" => self.exec = word == "exec",
            "suid" | "nosuid" => self.suid = word == "suid",
            "follow" | "nofollow" => self.follow = word == "follow",
            "supervise" | "nosupervise" => self.supervise = word == "supervise",
            "dev" | "nodev" => self.dev = word == "dev",
            "atime" | "relatime" => self.relatime = true,
            "noatime" | "norelatime" => self.relatime = false,
            "strictatime" => {
                return Err(Failure::usage("option 'strictatime' is not supported").hint("use 'relatime'"));
            }
            "remount" => {
                return Err(Failure::usage("option 'remount' is not supported")
                    .hint("unmount and mount again with the new options"));
            }
            _ if is_foreign(word) => {}
            _ => return Err(unknown(word)),
        }
        Ok(())
    }

    fn apply_value(&mut self, word: &str, name: &str, value: &str) -> Result<(), Failure> {
        let bad = |why: String| Failure::usage(format!("option '{name}': {why}"));
        match name {
            "protection" => self.protection = value.parse().map_err(bad)?,
            "sync_timeout" => self.sync_timeout = parse_duration(value).map_err(bad)?,
            "heartbeat" => {
                self.heartbeat = Some(parse_duration(value).map_err(bad)?).filter(|every| !every.is_zero());
            }
            "follow_interval" => {
                self.follow_interval = parse_duration(value).map_err(bad)?.max(Duration::from_millis(10));
            }
            "cache_size" => self.cache_size = parse_size(value).map_err(bad)?,
            "memory_size" => self.memory_size = parse_size(value).map_err(bad)?,
            "dirty_size" => self.dirty_size = parse_size(value).map_err(bad)?,
            "size" => self.size_limit = Some(parse_size(value).map_err(bad)?),
            "read_ahead" => self.read_ahead = parse_size(value).map_err(bad)?,
            "uploads" => {
                self.uploads = match value.parse() {
                    Ok(n @ 1..=64) => n,
                    _ => return Err(bad(format!("'{value}' is not a number from 1 to 64"))),
                }
            }
            "fsname" if value.is_empty() || !crate::fuse::table::is_plain_value(value.as_ref()) => {
                return Err(bad("must be text without commas and control characters".into()));
            }
            "fsname" => self.fsname = Some(value.into()),
            _ if is_foreign(word) => {}
            _ => return Err(unknown(name)),
        }
        Ok(())
    }
}

fn is_foreign(word: &str) -> bool {
    FOREIGN.contains(&word) || FOREIGN_PREFIXES.iter().any(|p| word.starts_with(p))
}

fn unknown(name: &str) -> Failure {
    let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
    Failure::usage(format!("unknown mount option '{name}'")).hint(format!("known are: {}", known.join(", ")))
}

/// A number of bytes: `4096`, `64K`, `1.5G`, `10GiB`. Suffixes are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a size like 4096, 512K, 64M or 10G");
    let lower = text.trim().to_ascii_lowercase();
    let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = lower.get(number.len()..).unwrap_or_default();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.trim_end().split_once('.').unwrap_or((number.trim_end(), "0"));
    let digits = |s: &str| !s.is_empty() && s.len() <= 18 && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let scale = 10u128.pow(fraction.len() as u32);
    let fraction: u128 = fraction.parse().map_err(|_| bad())?;
    let bytes = (u128::from(whole) << shift) + (fraction << shift) / scale;
    u64::try_from(bytes).map_err(|_| format!("'{text}' is too large"))
}

/// A duration: `30` (seconds), `1.5`, `500ms`, `30s`, `5m`, `1h 30m`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is not a time like 30s, 500ms, 5m or 1h30m");
    let text = text.trim();
    if text.starts_with(|c: char| c.is_ascii_digit()) && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
    {
        let seconds: f64 = text.parse().map_err(|_| bad())?;
        return Duration::try_from_secs_f64(seconds).ok().filter(is_sane).ok_or_else(bad);
    }
    let parsed: jiff::SignedDuration = text.parse().map_err(|_| bad())?;
    Duration::try_from(parsed).ok().filter(is_sane).ok_or_else(bad)
}

/// Longer waits are typing errors, and would overflow sums with the clock.
fn is_sane(d: &Duration) -> bool {
    *d <= Duration::from_secs(366 * 86_400)
}

/// What `--at` takes: as [`parse_at`], and no time to come. What is newest then is not known now.
pub fn parse_past(text: &str) -> Result<At, String> {
    match parse_at(text)? {
        At::Time(time) if is_to_come(time, Env::system().clock.now()) => Err(format!(
            "{} is still to come, by this host's clock ({}); for the newest commit say 'newest'",
            rfc3339::text(time),
            rfc3339::text(Env::system().clock.now())
        )),
        at => Ok(at),
    }
}

/// Later than any clock may be by now.
pub fn is_to_come(time: Timestamp, now: Timestamp) -> bool {
    time.secs.saturating_sub(now.secs) > CLOCK_SKEW.as_secs().cast_signed()
}

/// A point in the history: a commit number, an RFC 3339 time, `@seconds` since 1970, or `newest`.
pub fn parse_at(text: &str) -> Result<At, String> {
    if text == "newest" {
        return Ok(At::Newest);
    }
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let no: u64 = text.parse().map_err(|_| format!("'{text}' is too large for a commit number"))?;
        return Ok(At::Commit(CommitNo(no)));
    }
    rfc3339::parse(text).map(At::Time).map_err(|_| {
        format!(
            "'{text}' is neither a commit number, nor a time with its offset such as 2025-01-31T12:00:00Z, nor @seconds, \
             nor 'newest'"
        )
    })
}

/// Longest name of a host, in bytes.
pub const HOST_NAME_MAX: usize = 255;
/// Longest reason, in bytes: what a mark in the log holds.
pub const REASON_MAX: usize = 1024;

/// Refuses words for others that would not stay one line on their terminals.
pub fn check_words(flag: &str, words: &str, bytes_max: usize) -> Result<(), Failure> {
    let why = match words {
        "" => "must not be empty".into(),
        _ if words.len() > bytes_max => {
            format!("has {} bytes, and at most {bytes_max} are taken", words.len())
        }
        _ if told(words) != words => {
            "holds control characters, line ends or marks of direction; others see it on their terminals"
                .into()
        }
        _ => return Ok(()),
    };
    Err(Failure::usage(format!("{flag} '{words}' {why}")).hint("give plain words in one line"))
}

/// A store option, `name=value`.
pub fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("must be NAME=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("64k", 65536),
            ("1.5G", 3 << 29),
            ("10GiB", 10 << 30),
            ("2MB", 2 << 20),
            ("16383P", 16383 << 50),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1x", "1.", ".5G", "99999P", "1e3", "1 000", "0x10", "12Q"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in
            [("30", 30_000), ("1.5", 1500), ("500ms", 500), ("5m", 300_000), ("1h30m", 5_400_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "-1s", "x", "1e99", "99999999999999", "nan", "10y"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_for_others_are_one_plain_line() {
        assert!(check_words("--reason", "der Brand im Ministerium, \u{dc}bung", REASON_MAX).is_ok());
        let long = "x".repeat(REASON_MAX + 1);
        for words in ["", "a\nb", "a\x1b[31m", "a\u{9b}m", "a\u{2028}b", "a\u{202e}b", &long] {
            let failure = check_words("--reason", words, REASON_MAX).expect_err(words);
            assert!(failure.to_string().starts_with("--reason") && !failure.to_string().contains('\x1b'));
        }
    }

    #[test]
    fn points_in_time() {
        assert_eq!(parse_at("17"), Ok(At::Commit(CommitNo(17))));
        assert_eq!(parse_at("@17"), Ok(At::Time(Timestamp { secs: 17, nanos: 0 })));
        assert_eq!(parse_at("1970-01-01T02:00:00+02:00"), Ok(At::Time(Timestamp::default())));
        assert_eq!(parse_at("newest"), Ok(At::Newest));
        for text in ["", "-5", "yesterday", "2025-01-01", "99999999999999999999999"] {
            assert!(parse_at(text).is_err(), "{text}");
        }
        let at = |secs| Timestamp { secs, nanos: 0 };
        assert!(!is_to_come(at(1300), at(1000)), "home's clock may be that far ahead");
        assert!(is_to_come(at(1301), at(1000)) && !is_to_come(at(0), at(1000)));
        assert!(is_to_come(at(i64::MAX), at(i64::MIN)) && !is_to_come(at(i64::MIN), at(i64::MAX)));
        let refused = parse_past("2999-01-01T00:00:00Z").expect_err("is to come");
        assert!(refused.contains("still to come") && refused.contains("'newest'"), "{refused}");
        assert_eq!(parse_past("@17"), parse_at("@17"));
    }

    #[test]
    fn later_options_win_and_foreign_ones_do_nothing() {
        let mut options = MountOptions::default();
        let list =
            "ro,rw,defaults,_netdev,x-systemd.automount,comment=a=b,noexec,suid,protection=strict,uploads=2";
        options.apply(list).expect("all known");
        assert!(!options.read_only && !options.exec && options.suid);
        assert_eq!((options.protection, options.uploads), (Protection::Strict, 2));
    }

    #[test]
    fn an_unknown_option_is_named_with_the_known_ones() {
        for list in
            ["rw,cachesize=5", "cachesize", "protection=loose", "uploads=0", "cache_size=big", "remount"]
        {
            let failure = MountOptions::default().apply(list).expect_err(list);
            let name = list.rsplit(',').next().and_then(|w| w.split('=').next()).expect("a word");
            assert!(failure.to_string().contains(&format!("'{name}'")), "{failure}");
        }
        let text = MountOptions::default().apply("nope").expect_err("unknown").to_string();
        assert!(text.contains("cache_size=SIZE") && text.contains("allow_other"));
    }
}
