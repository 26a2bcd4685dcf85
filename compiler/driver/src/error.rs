//! Errors of a compile: what is wrong, in which phase, and whose fault it is.

use attar_artifact::ErrorKind as ArtifactError;
use attar_codegen_cpu::lower::{LowerError, LowerErrorKind};
use attar_pass::{Family, Phase};
use std::fmt;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error and the phase it arose in.
#[derive(Debug)]
pub struct Error {
    /// Boxed: errors are rare, results are everywhere.
    pub kind: Box<ErrorKind>,
    pub phase: Phase,
}

/// What is wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option that makes no sense; `flag` as the command line spells it.
    Option { flag: &'static str, problem: String },
    /// The checkpoint cannot be imported.
    Import(attar_import::Error),
    /// A recipe or a pass.
    Pass(attar_pass::Error),
    /// The graph cannot be lowered.
    Lower(LowerError),
    /// No code for a kernel.
    Codegen(attar_codegen_cpu::Error),
    /// No code for GPUs.
    Cuda(attar_codegen_cuda::Error),
    /// A weight cannot be read or packed.
    Weights(attar_ir::Error),
    /// The artifact cannot be written.
    Artifact(attar_artifact::Error),
    /// The artifact is larger than it may be: its bytes, those it may have, and those of its matrices.
    TooLarge { bytes: u64, most: u64, matrices: u64 },
    /// The artifact cannot be measured.
    Evaluate(crate::evaluate::Error),
    /// The operating system refused a file.
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// The operating system gave no threads.
    Threads { count: usize, problem: String },
    /// Something that cannot be unless Attar is wrong.
    Bug { problem: String },
}

impl Error {
    pub(crate) fn new(phase: Phase, kind: ErrorKind) -> Error {
        Error { kind: Box::new(kind), phase }
    }

    pub(crate) fn option(flag: &'static str, problem: impl Into<String>) -> Error {
        Error::new(Phase::Import, ErrorKind::Option { flag, problem: problem.into() })
    }

    pub(crate) fn io(phase: Phase, action: &'static str, path: &Path, source: std::io::Error) -> Error {
        Error::new(phase, ErrorKind::Io { action, path: path.to_owned(), source })
    }

    /// Whose fault it is; decides exit codes.
    pub fn family(&self) -> Family {
        match &*self.kind {
            ErrorKind::Option { .. } | ErrorKind::TooLarge { .. } => Family::Input,
            ErrorKind::Import(e) if e.is_bug() => Family::Bug,
            ErrorKind::Import(e) if e.is_environment() => Family::Environment,
            ErrorKind::Import(_) => Family::Input,
            ErrorKind::Pass(e) => e.family(),
            ErrorKind::Lower(e) => match e.kind {
                LowerErrorKind::Ir(_) => Family::Bug,
                _ => Family::Input,
            },
            ErrorKind::Cuda(e) if e.is_environment() => Family::Environment,
            ErrorKind::Cuda(attar_codegen_cuda::Error::Spec { .. }) => Family::Input,
            ErrorKind::Cuda(_) => Family::Bug,
            ErrorKind::Weights(_) => Family::Input,
            ErrorKind::Evaluate(e) if e.is_environment() => Family::Environment,
            ErrorKind::Evaluate(_) => Family::Input,
            ErrorKind::Artifact(e) => match &*e.kind {
                ArtifactError::Io { .. } => Family::Environment,
                _ => Family::Bug,
            },
            ErrorKind::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Family::Input,
            ErrorKind::Io { .. } | ErrorKind::Threads { .. } => Family::Environment,
            ErrorKind::Codegen(_) | ErrorKind::Bug { .. } => Family::Bug,
        }
    }

    /// The `.air` text that shows a bug: what the guilty pass was given.
    pub fn air(&self) -> Option<&str> {
        match &*self.kind {
            ErrorKind::Pass(e) => e.air(),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.kind {
            ErrorKind::Option { flag, problem } => write!(f, "{flag}: {problem}"),
            ErrorKind::Import(e) => write!(f, "{e}"),
            ErrorKind::Pass(e) => write!(f, "{e}"),
            ErrorKind::Lower(e) => write!(f, "{e}"),
            ErrorKind::Codegen(e) => write!(f, "{e}"),
            ErrorKind::Cuda(e) => write!(f, "{e}"),
            ErrorKind::Weights(e) => write!(f, "{}: {e}", self.phase),
            ErrorKind::Artifact(e) => write!(f, "{e}"),
            ErrorKind::TooLarge { bytes, most, matrices } => write!(
                f,
                "the file would take {bytes} bytes, and at most {most} were asked for; {matrices} of them are matrices, so ask \
                 for about {} bytes to get what was meant",
                most.saturating_sub(bytes - most)
            ),
            ErrorKind::Evaluate(e) => write!(f, "measuring the certificate: {e}"),
            ErrorKind::Io { action, path, source } => {
                write!(f, "{}: cannot {action}: {source}", path.display())
            }
            ErrorKind::Threads { count, problem } => write!(f, "cannot start {count} threads: {problem}"),
            ErrorKind::Bug { problem } => write!(f, "bug in {}: {problem}", self.phase),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.kind {
            ErrorKind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<attar_pass::Error> for Error {
    fn from(e: attar_pass::Error) -> Error {
        Error::new(Phase::Compress, ErrorKind::Pass(e))
    }
}
