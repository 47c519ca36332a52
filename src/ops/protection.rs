//! Whether a mounted volume protects as it was told to, in words for who is called at night.
//! Invariant: the first line begins with the level, a colon and one of the words in [`Standing`]; what is not in the
//! embassy is never left out.

use super::names::told;
use super::status::{CommitPoint, Status, bytes, rfc3339, seconds};
use std::fmt::Write as _;

/// How the protection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As told, and the embassy holds everything.
    InSync,
    /// As told, and something is on its way.
    Shipping,
    /// As told, but the embassy takes nothing at present.
    NotShipping,
    /// `available` has fallen back to the local spool.
    FellBack,
    /// The local log has failed.
    Failed,
    /// Another writer owns the volume.
    Fenced,
    /// Nothing is written from here.
    ReadOnly,
}

impl Standing {
    /// How `status` stands; the worst that is true.
    pub fn of(status: &Status) -> Standing {
        if status.role == "reader" {
            Standing::ReadOnly
        } else if status.fenced {
            Standing::Fenced
        } else if status.failed {
            Standing::Failed
        } else if status.out_of_sync_seconds.is_some() {
            Standing::FellBack
        } else if status.store_error.is_some() {
            Standing::NotShipping
        } else if status.has_unsent() {
            Standing::Shipping
        } else {
            Standing::InSync
        }
    }
}

/// The text: one line that says how it stands, then what, why and what to do.
pub fn text(s: &Status) -> String {
    let standing = Standing::of(s);
    let mut out = match standing {
        Standing::ReadOnly => return read_only(s),
        _ => format!("{}: {}\n", told(&s.protection), first_line(s, standing)),
    };
    let mut line = |what: &str, words: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{what:<8} {words}");
    };
    if let Some(why) = why(s, standing) {
        line("why:", &told(why));
    }
    line("unsent:", &unsent(s));
    line("means:", means(s, standing));
    line("to do:", to_do(standing));
    line("embassy:", &s.last_durable.map_or_else(|| "holds no commit of this mount yet".into(), holds));
    out
}

fn holds(point: CommitPoint) -> String {
    format!("holds everything up to commit {} of {}", point.no, rfc3339::text(point.time))
}

fn read_only(s: &Status) -> String {
    let shown = s.last_commit.map_or_else(
        || "the empty volume".to_string(),
        |c| format!("commit {} of {}", c.no, rfc3339::text(c.time)),
    );
    let error = s.last_error.as_ref().map_or_else(String::new, |e| format!("error:   {}\n", told(e)));
    format!(
        "read-only: shows {shown}\n{error}means:   nothing is written here, and nothing waits to be sent\n"
    )
}

fn first_line(s: &Status, standing: Standing) -> String {
    match standing {
        Standing::InSync => "in sync".into(),
        Standing::Shipping => format!("shipping, lag {}", seconds(s.lag_seconds)),
        Standing::NotShipping => {
            format!("NOT SHIPPING: the store takes nothing, lag {}", seconds(s.lag_seconds))
        }
        Standing::FellBack => {
            let since = s.out_of_sync_seconds.unwrap_or_default();
            format!("FELL BACK to the local spool {} ago", seconds(since))
        }
        Standing::Failed => "FAILED: the local log has stopped, and changes are refused".into(),
        Standing::Fenced => {
            "FENCED: another writer owns the volume, nothing more is shipped from here".into()
        }
        Standing::ReadOnly => "read-only".into(),
    }
}

fn why(s: &Status, standing: Standing) -> Option<&str> {
    let why = match standing {
        Standing::Failed | Standing::Fenced => s.last_error.as_deref(),
        _ => s.store_error.as_deref(),
    };
    match (why, standing) {
        (None, Standing::FellBack) => {
            Some("no answer within sync_timeout: the link or the store is silent or slow")
        }
        (why, _) => why,
    }
}

fn unsent(s: &Status) -> String {
    let mut words = match s.has_unsent_commits() {
        true => format!("{}, the oldest {} old", s.unsent_in_words(), seconds(s.lag_seconds)),
        false => "nothing that is committed".into(),
    };
    if s.dirty_bytes > 0 {
        let _ = write!(words, "; {} not yet committed", bytes(s.dirty_bytes));
    }
    words
}

fn means(s: &Status, standing: Standing) -> &'static str {
    match (standing, s.protection.as_str()) {
        (Standing::InSync | Standing::Shipping, "local") => {
            "fsync returns when this host's disk holds the data; the embassy follows, as told"
        }
        (Standing::InSync | Standing::Shipping, _) => "fsync returns when the embassy holds the data",
        (Standing::NotShipping, "strict") => {
            "fsync waits for the embassy and gives EIO after sync_timeout; nothing is acknowledged that it does not hold"
        }
        (Standing::NotShipping, "local") => {
            "fsync returns when this host's disk holds the data, as told; what is unsent is on this host only"
        }
        (Standing::NotShipping, _) => {
            "the next fsync waits sync_timeout, then falls back to the local spool; what is unsent is on this host only"
        }
        (Standing::FellBack, _) => {
            "fsync returns when this host's disk holds the data; what is unsent would be lost with this host"
        }
        (Standing::Failed, _) => "reads go on; what was changed after the last commit is lost",
        (Standing::Fenced, _) => {
            "fsync fails; what is unsent stays in the state directory and never reaches the embassy"
        }
        (Standing::ReadOnly, _) => "nothing is written here",
    }
}

fn to_do(standing: Standing) -> &'static str {
    match standing {
        Standing::InSync | Standing::ReadOnly => "nothing",
        Standing::Shipping => "nothing, unless the lag grows",
        Standing::NotShipping | Standing::FellBack => {
            "see why. If it is the link, nothing: it catches up and returns to sync by itself. If the store refuses \
             (rights, credentials, quota), put that right; no restart is needed"
        }
        Standing::Failed => "mend the disk of the state directory, then umount and mount again",
        Standing::Fenced => {
            "umount, and keep the state directory; see 'When something is wrong' in operations.md"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(level: &str) -> Status {
        let last_commit = Some(CommitPoint { no: 9, ..CommitPoint::default() });
        let last_durable = Some(CommitPoint { no: 7, ..CommitPoint::default() });
        let (role, protection) = ("writer".into(), level.into());
        Status { role, protection, in_sync: true, last_commit, last_durable, ..Status::default() }
    }

    fn behind(level: &str) -> Status {
        let store_error = Some("log/12: the store is unavailable: no route".into());
        Status { store_error, unsent_bytes: 12 << 20, unsent_segments: 3, lag_seconds: 41.0, ..at(level) }
    }

    #[test]
    fn each_standing_says_what_why_and_what_to_do() {
        let last_durable = at("available").last_commit;
        let even = Status { last_durable, ..at("available") };
        assert!(text(&even).starts_with("available: in sync\nunsent:  nothing"), "{}", text(&even));
        assert!(text(&at("available")).starts_with("available: shipping, lag 0.0 s\nunsent:  2 commits"));
        let fell_back = Status { out_of_sync_seconds: Some(37.0), in_sync: false, ..behind("available") };
        let words = text(&fell_back);
        assert!(
            words.starts_with("available: FELL BACK to the local spool 37 s ago\nwhy:     log/12: the store")
        );
        assert!(words.contains("unsent:  12.0 MiB in 3 segments, the oldest 41 s old\n"), "{words}");
        assert!(words.contains("by itself") && words.contains("up to commit 7 of 1970"), "{words}");
        let slow = Status { store_error: None, ..fell_back.clone() };
        assert!(text(&slow).contains("why:     no answer within sync_timeout"));
        assert!(text(&behind("strict")).starts_with("strict: NOT SHIPPING: "));
        assert!(text(&behind("strict")).contains("EIO"));
        assert!(text(&behind("local")).contains("as told"));
    }

    #[test]
    fn a_reason_of_another_host_forges_no_line() {
        let why = "FENCED: taken over (reason: x\nembassy: all of it\x1b[2J)";
        let fenced = Status { fenced: true, last_error: Some(why.into()), ..at("available") };
        let reader = Status { role: "reader".into(), ..fenced.clone() };
        for words in [text(&fenced), text(&reader)] {
            assert!(!words.contains('\x1b') && !words.contains("\nembassy: all"), "{words}");
        }
    }

    #[test]
    fn the_worst_is_said_first() {
        let all = Status {
            out_of_sync_seconds: Some(1.0),
            failed: true,
            last_error: Some("disk full".into()),
            dirty_bytes: 2048,
            ..behind("available")
        };
        assert!(text(&all).starts_with("available: FAILED"), "{}", text(&all));
        assert!(
            text(&all).contains("why:     disk full\n") && text(&all).contains("2.0 KiB not yet committed")
        );
        assert_eq!(Standing::of(&Status { fenced: true, ..all.clone() }), Standing::Fenced);
        let reader = Status { role: "reader".into(), ..all };
        assert!(text(&reader).starts_with("read-only: shows commit 9 of 1970"), "{}", text(&reader));
    }
}
