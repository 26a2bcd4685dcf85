//! Failures of a command: which family they belong to, and so which exit code they end with.
//!
//! Library errors keep their types up to here; this is the one place that sorts them.

use attar_artifact::ErrorKind as Container;
use attar_runtime::ErrorKind as Run;
use std::fmt;
use std::io;

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// Who can do something about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// The model, the file or the options: the user can change them.
    Input,
    /// The machine: I/O, network, memory, no fitting CPU.
    Environment,
    /// Attar itself is wrong.
    Bug,
    /// The user stopped it.
    Cancelled,
    /// The reader of our output went away: nothing is wrong.
    OutputClosed,
}

impl Family {
    /// Exit code of the process.
    pub fn exit_code(self) -> u8 {
        match self {
            Family::Input => 2,
            Family::Environment => 3,
            Family::Bug => 70,
            Family::Cancelled => 130,
            Family::OutputClosed => 0,
        }
    }

    /// How the message begins.
    pub fn label(self) -> &'static str {
        match self {
            Family::Input => "error",
            Family::Environment => "error (environment)",
            Family::Bug => "bug",
            Family::Cancelled => "cancelled",
            Family::OutputClosed => "output closed",
        }
    }
}

/// An error of a known family.
#[derive(Debug)]
pub struct Failure {
    pub family: Family,
    pub error: anyhow::Error,
}

impl Failure {
    /// Something the user can change.
    pub fn input(message: impl fmt::Display) -> Failure {
        Failure { family: Family::Input, error: anyhow::anyhow!("{message}") }
    }

    /// Something about the machine.
    pub fn environment(message: impl fmt::Display) -> Failure {
        Failure { family: Family::Environment, error: anyhow::anyhow!("{message}") }
    }

    /// Something that cannot be unless Attar is wrong.
    pub fn bug(message: impl fmt::Display) -> Failure {
        Failure { family: Family::Bug, error: anyhow::anyhow!("{message}") }
    }

    /// The same failure with what was being done in front of it.
    #[must_use]
    pub fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Failure {
        Failure { family: self.family, error: self.error.context(what) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#}", self.family.label(), self.error)
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { family: family_of(&error), error: error.into() }
    }
}

/// The family an error of any of our crates belongs to.
fn family_of(error: &(dyn std::error::Error + 'static)) -> Family {
    if let Some(e) = error.downcast_ref::<io::Error>() {
        return of_io(e);
    }
    if let Some(e) = error.downcast_ref::<attar_compiler::Error>() {
        return of_pass(e.family());
    }
    if let Some(e) = error.downcast_ref::<attar_compiler::evaluate::Error>() {
        return match e {
            attar_compiler::evaluate::Error::Runtime(e) => family_of(e),
            _ => Family::Input,
        };
    }
    if let Some(e) = error.downcast_ref::<attar_pass::Error>() {
        return of_pass(e.family());
    }
    if let Some(e) = error.downcast_ref::<attar_artifact::Error>() {
        return of_artifact(e);
    }
    if let Some(e) = error.downcast_ref::<attar_runtime::Error>() {
        return match &*e.kind {
            Run::Artifact(e) => of_artifact(e),
            Run::NoCode { .. }
            | Run::TargetUnsupported { .. }
            | Run::Memory { .. }
            | Run::DeviceUnavailable { .. }
            | Run::DeviceUnsupported { .. }
            | Run::DriverTooOld { .. }
            | Run::DeviceMemory { .. }
            | Run::DeviceFailed { .. } => Family::Environment,
            Run::OutOfPages { .. }
            | Run::NoSequence { .. }
            | Run::StepTooLarge { .. }
            | Run::TooManyRows { .. } => Family::Bug,
            _ => Family::Input,
        };
    }
    Family::Input
}

fn of_io(e: &io::Error) -> Family {
    match e.kind() {
        io::ErrorKind::BrokenPipe => Family::OutputClosed,
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::IsADirectory => Family::Input,
        _ => Family::Environment,
    }
}

fn of_pass(family: attar_pass::Family) -> Family {
    match family {
        attar_pass::Family::Input => Family::Input,
        attar_pass::Family::Environment => Family::Environment,
        attar_pass::Family::Bug => Family::Bug,
        attar_pass::Family::Cancelled => Family::Cancelled,
    }
}

fn of_artifact(e: &attar_artifact::Error) -> Family {
    match &*e.kind {
        Container::Io { source, .. } => of_io(source),
        Container::Unfinished { .. } => Family::Bug,
        _ => Family::Input,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_are_sorted() {
        let of = |kind| Failure::from(io::Error::from(kind)).family;
        assert_eq!(of(io::ErrorKind::NotFound), Family::Input);
        assert_eq!(of(io::ErrorKind::PermissionDenied), Family::Environment);
        assert_eq!(of(io::ErrorKind::BrokenPipe), Family::OutputClosed);
    }

    #[test]
    fn the_chain_is_printed_in_one_line() {
        let f = Failure::environment("disk full").context("writing x.attar");
        assert_eq!(f.to_string(), "error (environment): writing x.attar: disk full");
    }
}
