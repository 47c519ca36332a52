//! A progress bar for what takes time, on a terminal only.

use crate::ops::status::{Status, bytes, seconds};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal};

/// Shows how much is still to be shipped.
pub struct Shipping {
    bar: ProgressBar,
    most: u64,
}

impl Shipping {
    /// A bar titled `what`, or nothing when standard error is not a terminal.
    pub fn new(what: &'static str) -> Shipping {
        let bar = match io::stderr().is_terminal() {
            true => ProgressBar::new(0),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        Shipping { bar, most: 0 }
    }

    /// Shows how things stand. What is to be shipped can grow while applications write.
    pub fn show(&mut self, status: &Status) {
        let left = status.unsent_bytes + status.dirty_bytes;
        self.most = self.most.max(left);
        self.bar.set_length(self.most.max(1));
        self.bar.set_position(self.most - left);
        let lag = seconds(status.lag_seconds);
        self.bar.set_message(format!(
            "{} left in {} segments, lag {lag}",
            bytes(left),
            status.unsent_segments
        ));
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Shows how much has been done of what has no known end.
pub struct Counting {
    bar: ProgressBar,
}

impl Counting {
    /// A line titled `what`, or nothing when standard error is not a terminal.
    pub fn new(what: &'static str) -> Counting {
        let bar = match io::stderr().is_terminal() {
            true => ProgressBar::new_spinner(),
            false => ProgressBar::hidden(),
        };
        if let Ok(style) = ProgressStyle::with_template("{prefix} {spinner} {msg}, {elapsed}") {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Counting { bar }
    }

    /// So many things, and so many bytes.
    pub fn show(&mut self, things: u64, of_bytes: u64) {
        self.bar.tick();
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("{things} done, {}", bytes(of_bytes)));
        }
    }

    /// So many of so many, of a part of the work.
    pub fn part(&mut self, what: &str, done: u64, of: u64) {
        self.bar.tick();
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("{what} {done} of {of}"));
        }
    }

    /// Takes the line away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
