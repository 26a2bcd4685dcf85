//! Errors of passes and of what they ask the host for.

use std::fmt;

/// Result of anything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, in words, and of which kind it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    /// The host's function that said so, once it is known.
    pub call: Option<&'static str>,
}

/// Kinds of errors; each is a status of the C interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// It cannot be done. A pass may go on.
    Failed,
    /// A handle or a length that cannot be: the pass fails.
    Misuse,
    /// The user stops the compile.
    Cancelled,
    /// What was asked for is not there in this compile.
    Unavailable,
    /// Something panicked.
    Panic,
}

impl Error {
    /// An error of a pass's own.
    pub fn new(message: impl Into<String>) -> Error {
        Error::of(ErrorKind::Failed, message)
    }

    /// An error of some kind.
    pub fn of(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), call: None }
    }

    /// The same error of a host's function, unless it has one.
    #[must_use]
    pub fn in_call(mut self, call: &'static str) -> Error {
        self.call.get_or_insert(call);
        self
    }

    /// The same error with what was being done in front of it.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Error {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Error {
        Error::new(e.to_string())
    }
}
