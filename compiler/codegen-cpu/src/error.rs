//! Errors of code generation.

use crate::Target;

/// A kernel that could not be compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    /// Name of the kernel; empty when the target itself is at fault.
    pub kernel: String,
    pub target: Target,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The spec asks for something no kernel provides, or its sizes contradict each other.
    Spec(String),
    /// The code generator refused the target.
    Isa(String),
    /// The code generator refused the function.
    Compile(String),
    /// The function refers to something outside itself.
    Relocation { kind: String },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let target = self.target.name();
        if !self.kernel.is_empty() {
            write!(f, "kernel {}: ", self.kernel)?;
        }
        match &self.kind {
            ErrorKind::Spec(what) => write!(f, "{what} (target {target})"),
            ErrorKind::Isa(what) => write!(f, "bug: code generator refuses target {target}: {what}"),
            ErrorKind::Compile(what) => write!(f, "bug: cannot be compiled for {target}: {what}"),
            ErrorKind::Relocation { kind } => {
                write!(f, "bug: not self-contained on {target}: a relocation of kind {kind}")
            }
        }
    }
}

impl std::error::Error for Error {}
