//! Where log lines go: standard error (with journald's priority prefixes when it is not a terminal) or a bounded file.
//! Invariant: one event is one line, whatever the message holds, and a log file never exceeds its bound twice over.

use crate::clock::{Clock, Env};
use crate::ops::names::told;
use crate::ops::status::rfc3339;
use ::log::{Level, LevelFilter, Log, Metadata, Record};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A log file is renamed to `NAME.1` at this size and begun anew.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Where to log to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard error.
    Stderr,
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// Standard error is pointed at the file as well, for what does not log (the daemon's case).
        take_stderr: bool,
    },
}

/// Starts logging; the first call in a process counts.
pub fn init(target: &Target, level: LevelFilter) -> io::Result<()> {
    let env = Env::system();
    let sink = match target {
        Target::Stderr => {
            let journald = std::env::var_os("JOURNAL_STREAM").is_some() || !io::stderr().is_terminal();
            Sink::Stderr { journald }
        }
        Target::File { path, take_stderr } => Sink::File(LogFile::open(path, *take_stderr)?),
    };
    let logger = Logger { level, clock: env.clock, sink: Mutex::new(sink) };
    if ::log::set_boxed_logger(Box::new(logger)).is_ok() {
        ::log::set_max_level(level);
        log_panics();
    }
    Ok(())
}

/// The level that `text` names.
pub fn parse_level(text: &str) -> Result<LevelFilter, String> {
    text.parse().map_err(|_| format!("'{text}' is not one of off, error, warn, info, debug, trace"))
}

fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        ::log::error!("internal error in thread {}: {info}", thread.name().unwrap_or("?"));
    }));
}

struct Logger {
    level: LevelFilter,
    clock: Arc<dyn Clock>,
    sink: Mutex<Sink>,
}

enum Sink {
    Stderr { journald: bool },
    File(LogFile),
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates' chatter is of use only to who asks for everything.
        let ours = metadata.target().starts_with("embassyfs");
        let level = if ours || self.level == LevelFilter::Trace {
            self.level
        } else {
            self.level.min(LevelFilter::Warn)
        };
        metadata.level() <= level
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = told(&record.args().to_string());
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        // There is nowhere to report a failed log write to.
        let _ = match &mut *sink {
            Sink::Stderr { journald: true } => {
                writeln!(io::stderr(), "<{}>{message}", priority(record.level()))
            }
            Sink::Stderr { journald: false } => {
                writeln!(
                    io::stderr(),
                    "embassyfs: {}: {message}",
                    record.level().as_str().to_ascii_lowercase()
                )
            }
            Sink::File(file) => {
                let time = rfc3339::text(self.clock.now());
                file.write(&format!("{time} {:5} {}: {message}\n", record.level(), record.target()))
            }
        };
    }

    fn flush(&self) {}
}

/// Syslog's number, as journald reads it from `<N>`.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// File names come from users; they must not be able to forge a line or to steer a terminal.
struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    take_stderr: bool,
    size_max: u64,
}

impl LogFile {
    fn open(path: &Path, take_stderr: bool) -> io::Result<LogFile> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        let log = LogFile { path: path.into(), file, size, take_stderr, size_max: FILE_BYTES_MAX };
        log.redirect_stderr();
        Ok(log)
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        if self.size > 0 && self.size + line.len() as u64 > self.size_max {
            self.rotate()?;
        }
        self.file.write_all(line.as_bytes())?;
        self.size += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
        self.size = 0;
        self.redirect_stderr();
        Ok(())
    }

    fn redirect_stderr(&self) {
        if self.take_stderr {
            // SAFETY: both descriptors are open; standard error belongs to no Rust object that minds the change.
            unsafe { libc::dup2(self.file.as_raw_fd(), libc::STDERR_FILENO) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_stays_one_line() {
        assert_eq!(told("a\n<0>b\x1b[2J\u{e9}"), "a\\x0a<0>b\\x1b[2J\u{e9}");
    }

    #[test]
    fn the_file_is_bounded_and_the_previous_one_kept() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.log");
        let mut log = LogFile::open(&path, false).expect("writable");
        log.size_max = 100;
        for i in 0..50 {
            log.write(&format!("line {i:04}\n")).expect("writable");
        }
        let len = |p: &Path| std::fs::metadata(p).expect("there").len();
        assert_eq!(len(&path), 100);
        assert_eq!(len(&dir.path().join("x.log.1")), 100);
        assert!(std::fs::read_to_string(&path).expect("text").ends_with("line 0049\n"));
    }

    #[test]
    fn levels() {
        assert_eq!(parse_level("Debug"), Ok(LevelFilter::Debug));
        assert!(parse_level("loud").is_err());
    }
}
