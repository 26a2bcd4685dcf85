//! Errors of code generation for GPUs.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no NVRTC on this machine.
    #[error(
        "CUDA code is compiled by NVRTC, which was not found ({}); install a CUDA toolkit of version {major} or \
         `pip install {WHEEL}`, or say with {VARIABLE} where libnvrtc.so.{major} or its folder is",
        searched.join(", "), major = crate::nvrtc::MAJOR, WHEEL = crate::nvrtc::WHEEL, VARIABLE = crate::nvrtc::VARIABLE
    )]
    Unavailable { searched: Vec<String> },
    /// There is one, but the system cannot load it.
    #[error("{}: cannot be loaded: {problem}", path.display())]
    Load { path: PathBuf, problem: String },
    /// A library that is not NVRTC, or not one of this version.
    #[error("{}: has no symbol {symbol}: not NVRTC?", path.display())]
    Symbol { path: PathBuf, symbol: &'static str },
    /// An NVRTC whose code other drivers run.
    #[error(
        "{}: is NVRTC {}.{}, and version {major} is needed; `pip install {WHEEL}` has it, {VARIABLE} says where it is",
        path.display(), found.0, found.1, major = crate::nvrtc::MAJOR, WHEEL = crate::nvrtc::WHEEL,
        VARIABLE = crate::nvrtc::VARIABLE
    )]
    Version { path: PathBuf, found: (i32, i32) },
    /// A kernel that no template serves.
    #[error("kernel {kernel}: {problem}")]
    Spec { kernel: String, problem: String },
    /// NVRTC refused the source.
    #[error("bug: kernel {kernel} cannot be compiled for {target}: {log}")]
    Compile { kernel: String, target: String, log: String },
    /// A call of NVRTC failed.
    #[error("NVRTC's {call} failed with code {code}")]
    Call { call: &'static str, code: i32 },
}

impl Error {
    /// Whether the machine lacks something, rather than that the model or Attar is at fault.
    pub fn is_environment(&self) -> bool {
        matches!(
            self,
            Error::Unavailable { .. }
                | Error::Load { .. }
                | Error::Symbol { .. }
                | Error::Version { .. }
                | Error::Call { .. }
        )
    }
}
