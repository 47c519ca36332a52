//! Exit codes and the one-line error that goes with them. `docs/operations.md` lists both.
//! Invariant: a number, once documented, never changes its meaning.

use crate::ops::names::told;
use std::error::Error;
use std::fmt;

/// How a command ended. Scripts rely on the numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ExitCode {
    /// Done, and nothing is left to do.
    Ok = 0,
    /// Failed for a reason that has no number of its own.
    Failed = 1,
    /// The command line, an option or the config file is wrong; nothing was done.
    Usage = 2,
    /// There is no EmbassyFS mount at this path.
    NotMounted = 3,
    /// The daemon of the mount is gone or does not answer.
    NoDaemon = 4,
    /// Data is still only on this host (in the state directory); a later mount ships it.
    Unsent = 5,
    /// The mount point is in use, or already mounted.
    Busy = 6,
    /// The store is not reachable or refuses us.
    Store = 7,
    /// The volume refuses: wrong key, damaged or rolled-back store, existing volume, fenced writer.
    Refused = 8,
    /// The command did its work, and found what it looks for: versions differ, damage, a check that does not hold.
    Found = 9,
}

impl ExitCode {
    /// The code with this number; what is not documented counts as a failure without a number of its own.
    pub fn from_number(n: u8) -> ExitCode {
        use ExitCode::*;
        let all = [Ok, Failed, Usage, NotMounted, NoDaemon, Unsent, Busy, Store, Refused, Found];
        all.into_iter().find(|c| *c as u8 == n).unwrap_or(Failed)
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code as u8)
    }
}

/// Why a command failed: one line with what was tried, why it failed, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: ExitCode,
    /// What was tried and why it failed, the chain of causes included.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure with its own words only.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hint: None }
    }

    /// A wrong command line, option or config file.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::new(ExitCode::Usage, message)
    }

    /// A failure caused by `error`; the whole chain of causes goes into the line.
    pub fn from_error(code: ExitCode, what: impl Into<String>, error: &dyn Error) -> Failure {
        let mut message = what.into();
        let mut cause = Some(error);
        while let Some(e) = cause {
            let text = e.to_string();
            // Many errors repeat their source in their own text.
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = e.source();
        }
        Failure::new(code, message)
    }

    /// Adds the way out.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one_line = |text: &str| told(&text.split_whitespace().collect::<Vec<_>>().join(" "));
        write!(f, "{}", one_line(&self.message))?;
        match &self.hint {
            Some(hint) => write!(f, "; {}", one_line(hint)),
            None => Ok(()),
        }
    }
}

impl Error for Failure {}

/// What a command returns: its exit code, or the reason it failed.
pub type Outcome = Result<ExitCode, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_with_causes_and_the_way_out() {
        let cause = std::io::Error::other("disk\nfull");
        let failure = Failure::from_error(ExitCode::Failed, "cannot open x", &cause).hint("make room");
        assert_eq!(failure.to_string(), "cannot open x: disk full; make room");
    }

    #[test]
    fn what_others_wrote_does_not_speak_to_the_terminal() {
        let failure =
            Failure::new(ExitCode::Refused, "taken over by h\x1b[1mX\nY (a\u{9b}b)").hint("see \x07x");
        assert_eq!(failure.to_string(), "taken over by h\\x1b[1mX Y (a\\xc2\\x9bb); see \\x07x");
    }

    #[test]
    fn numbers_are_stable() {
        assert_eq!(ExitCode::from_number(5), ExitCode::Unsent);
        assert_eq!(ExitCode::from_number(77), ExitCode::Failed);
    }
}
