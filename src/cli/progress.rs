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
