//! The figures of mounted volumes as text that Prometheus reads (text exposition format 0.0.4).
//! Invariant: a name, its unit and its meaning never change; what is not known is left out, never shown as 0.

use super::names::told;
use super::status::Status;
use std::fmt::Write as _;

/// The values of one family for one mount: further labels, and the number.
type Samples = Vec<(String, f64)>;

struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&Status) -> Samples,
}

const fn gauge(name: &'static str, help: &'static str, samples: fn(&Status) -> Samples) -> Family {
    Family { name, kind: "gauge", help, samples }
}

const fn counter(name: &'static str, help: &'static str, samples: fn(&Status) -> Samples) -> Family {
    Family { name, kind: "counter", help, samples }
}

fn one(value: f64) -> Samples {
    vec![(String::new(), value)]
}

fn flag(value: bool) -> Samples {
    one(f64::from(u8::from(value)))
}

/// Of a mount that writes only.
fn home(s: &Status, value: f64) -> Samples {
    if s.role == "writer" { one(value) } else { Vec::new() }
}

fn by(label: &str, map: &std::collections::BTreeMap<String, u64>) -> Samples {
    map.iter().map(|(value, n)| (format!(",{label}=\"{}\"", escaped(value)), *n as f64)).collect()
}

const FAMILIES: &[Family] = &[
    gauge("embassyfs_info", "Always 1; what is mounted, in its labels.", |s| {
        let label = |name: &str, value: &str| format!(",{name}=\"{}\"", escaped(value));
        let labels = label("volume_id", &s.volume_id) + &label("version", &s.version);
        vec![(labels + &label("role", &s.role) + &label("store", &s.store), 1.0)]
    }),
    gauge("embassyfs_protection_level", "Always 1; what fsync waits for, in the label level.", |s| {
        match s.role.as_str() {
            "writer" => vec![(format!(",level=\"{}\"", escaped(&s.protection)), 1.0)],
            _ => Vec::new(),
        }
    }),
    gauge("embassyfs_uptime_seconds", "Time since the daemon started.", |s| one(s.uptime)),
    gauge(
        "embassyfs_in_sync",
        "1 unless the level has fallen back to the local spool, or the writer is fenced or has failed.",
        |s| flag(s.in_sync),
    ),
    gauge("embassyfs_out_of_sync_seconds", "Time since the level fell back; 0 while it has not.", |s| {
        home(s, s.out_of_sync_seconds.unwrap_or(0.0))
    }),
    counter("embassyfs_fallbacks_total", "How often fsync has fallen back to the local spool.", |s| {
        home(s, s.fallbacks as f64)
    }),
    gauge("embassyfs_fenced", "1 when another writer owns the volume: nothing more is shipped.", |s| {
        flag(s.fenced)
    }),
    gauge(
        "embassyfs_failed",
        "1 when the local log has failed: changes are refused until the next mount.",
        |s| flag(s.failed),
    ),
    gauge("embassyfs_lag_seconds", "Age of the oldest commit that the embassy does not hold.", |s| {
        home(s, s.lag_seconds)
    }),
    gauge("embassyfs_follow_lag_seconds", "Age of the newest commit that a follower shows.", |s| {
        s.follow.as_ref().map_or_else(Vec::new, |_| one(s.lag_seconds))
    }),
    gauge("embassyfs_follow_contact_seconds", "Time since the store last answered a follower.", |s| {
        s.follow.as_ref().map_or_else(Vec::new, |f| one(f.contact_seconds))
    }),
    gauge("embassyfs_follow_stopped", "1 when a follower stopped at what the store shows.", |s| {
        s.follow.as_ref().map_or_else(Vec::new, |f| flag(f.state == "stopped"))
    }),
    counter("embassyfs_follow_jumps_total", "Times a follower went to a newer checkpoint.", |s| {
        s.follow.as_ref().map_or_else(Vec::new, |f| one(f.jumps as f64))
    }),
    gauge("embassyfs_unsent_bytes", "Bytes committed here that the embassy does not hold.", |s| {
        home(s, s.unsent_bytes as f64)
    }),
    gauge("embassyfs_unsent_segments", "Segments that the embassy does not hold.", |s| {
        home(s, s.unsent_segments as f64)
    }),
    gauge("embassyfs_dirty_bytes", "Bytes written by applications and not committed yet.", |s| {
        home(s, s.dirty_bytes as f64)
    }),
    gauge("embassyfs_fsync_waiting", "Callers that wait until something is durable.", |s| {
        home(s, s.waiting as f64)
    }),
    gauge("embassyfs_cache_bytes", "Bytes of the local disk used as cache.", |s| one(s.cache_bytes as f64)),
    gauge("embassyfs_spool_free_bytes", "Bytes that the disk of the state directory has left.", |s| {
        s.spool_free_bytes.map_or_else(Vec::new, |free| one(free as f64))
    }),
    gauge("embassyfs_last_commit", "Number of the newest commit on this host.", |s| {
        s.last_commit.map_or_else(Vec::new, |c| one(c.no as f64))
    }),
    gauge("embassyfs_last_commit_timestamp_seconds", "When the newest commit on this host was made.", |s| {
        s.last_commit.map_or_else(Vec::new, |c| one(c.time.secs as f64))
    }),
    gauge("embassyfs_last_durable", "Number of the newest commit that the embassy holds.", |s| {
        s.last_durable.map_or_else(Vec::new, |c| one(c.no as f64))
    }),
    gauge(
        "embassyfs_last_durable_timestamp_seconds",
        "When the newest commit that the embassy holds was made.",
        |s| s.last_durable.map_or_else(Vec::new, |c| one(c.time.secs as f64)),
    ),
    gauge("embassyfs_uploads_pending", "Segments and checkpoints that wait or are under way.", |s| {
        home(s, s.uploads.pending as f64)
    }),
    counter("embassyfs_sent_segments_total", "Segments that the store has taken.", |s| {
        home(s, s.uploads.sent_segments as f64)
    }),
    counter("embassyfs_sent_bytes_total", "Bytes of these segments.", |s| {
        home(s, s.uploads.sent_bytes as f64)
    }),
    counter("embassyfs_sent_checkpoints_total", "Checkpoints that the store has taken.", |s| {
        home(s, s.uploads.sent_checkpoints as f64)
    }),
    counter("embassyfs_upload_failures_total", "Attempts of an upload that failed.", |s| {
        home(s, s.uploads.failures as f64)
    }),
    gauge("embassyfs_store_failing", "1 while the last upload failed and none has succeeded since.", |s| {
        home(s, f64::from(u8::from(s.store_error.is_some())))
    }),
    counter("embassyfs_requests_total", "Requests of the kernel, by operation.", |s| {
        by("operation", &s.requests.by_operation)
    }),
    counter(
        "embassyfs_request_errors_total",
        "Requests answered with an error. Most are answers that POSIX foresees, such as ENOENT.",
        |s| by("errno", &s.requests.errors),
    ),
    gauge("embassyfs_requests_open", "Requests that have no answer yet.", |s| one(s.requests.open as f64)),
    gauge("embassyfs_request_oldest_seconds", "How long the oldest of these has waited.", |s| {
        one(s.requests.oldest_seconds)
    }),
    gauge("embassyfs_request_longest_seconds", "The longest that any request took since the mount.", |s| {
        one(s.requests.longest_seconds)
    }),
    gauge("embassyfs_fetches_open", "Fetches from the store that requests wait for.", |s| {
        one(s.requests.open_fetches as f64)
    }),
];

/// The text for all these mounts; what belongs together by its name stands together.
pub fn text(mounts: &[Status]) -> String {
    let mut out = String::new();
    for family in FAMILIES {
        let mut lines = String::new();
        for s in mounts {
            let base = format!("volume=\"{}\",mountpoint=\"{}\"", escaped(&s.volume), escaped(&s.mountpoint));
            for (labels, value) in (family.samples)(s) {
                // Writing to a String cannot fail.
                let _ = writeln!(lines, "{}{{{base}{labels}}} {value}", family.name);
            }
        }
        if !lines.is_empty() {
            let (name, help, kind) = (family.name, family.help, family.kind);
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}");
        }
    }
    out
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    told(value).replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_label_is_one_line_that_the_format_knows() {
        assert_eq!(escaped("a\"b\\c\n\x1b"), "a\\\"b\\\\c\\\\x0a\\\\x1b");
    }

    fn mount(role: &str, place: &str) -> Status {
        let mut s =
            Status { role: role.into(), mountpoint: place.into(), lag_seconds: 1.5, ..Status::default() };
        s.requests.by_operation.insert("read".into(), 7);
        s.store_error = Some("x".into());
        s
    }

    #[test]
    fn every_family_has_its_help_and_type_once_and_its_samples_together() {
        let text = text(&[mount("writer", "/a \"b\"\\c"), mount("writer", "/d"), mount("reader", "/e")]);
        let mut seen = HashSet::new();
        let mut current = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                current = rest.split(' ').next().unwrap_or_default().to_string();
                assert!(seen.insert(current.clone()), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let counts = rest.ends_with(" counter");
                assert!(rest.starts_with(&current) && counts == current.ends_with("_total"), "{line}");
            } else {
                assert!(line.starts_with(&format!("{current}{{volume=")), "{line}");
                let value = line.rsplit(' ').next().unwrap_or_default();
                assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
            }
        }
        assert!(text.contains("embassyfs_lag_seconds{volume=\"\",mountpoint=\"/a \\\"b\\\"\\\\c\"} 1.5\n"));
        assert!(text.contains(",operation=\"read\"} 7\n") && text.contains("mountpoint=\"/d\"} 1.5"));
        assert!(!text.contains("embassyfs_lag_seconds{volume=\"\",mountpoint=\"/e\""), "a reader has no lag");
        assert!(!text.contains("spool_free"), "what is not known is left out");
    }
}
