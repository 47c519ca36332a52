//! What a file-system operation can answer instead of a result, and the errno each becomes.
//! Invariant: an operation that returns an error has changed nothing.

use crate::log;
use crate::types::FramePtr;

/// Result of a file-system operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An answer that POSIX foresees (`ENOENT`, `ENOTEMPTY`, ...): normal, not logged.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// A limit is reached and room will come: wait for [`super::Fs::when_space`], then try again.
    #[error("too much unwritten data; waiting for the disk")]
    Busy,
    /// The volume's size limit is reached, but the next commit may make room: wait for it, then try once more.
    #[error("the volume has reached its size limit")]
    OverLimit,
    /// The log below failed, or wants frames fetched first.
    #[error(transparent)]
    Log(#[from] log::Error),
}

impl Error {
    /// The errno the application sees.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Os(errno) => *errno,
            Error::Busy => libc::EAGAIN,
            Error::OverLimit => libc::ENOSPC,
            Error::Log(e) if e.is_no_space() => libc::ENOSPC,
            Error::Log(log::Error::Fenced { .. }) => libc::EROFS,
            Error::Log(_) => libc::EIO,
        }
    }

    /// The frames to fetch before the operation is tried again, if that is what it wants.
    pub fn missing(&self) -> Option<&[FramePtr]> {
        match self {
            Error::Log(log::Error::Missing(ptrs)) => Some(ptrs),
            _ => None,
        }
    }
}

/// Says of damage found in a value whose value it is.
pub(super) fn of(object: impl ToString, error: log::Error) -> log::Error {
    match error {
        log::Error::Corrupt { object: what, detail } => {
            log::Error::corrupt(object, format!("{what}: {detail}"))
        }
        other => other,
    }
}

/// Shorthand for an errno answer.
pub(super) fn os<T>(errno: i32) -> Result<T> {
    Err(Error::Os(errno))
}
