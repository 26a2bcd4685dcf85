//! Why a plugin cannot be loaded.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of loading a plugin.
pub type Result<T> = std::result::Result<T, Error>;

/// An error and the library it belongs to.
#[derive(Debug)]
pub struct Error {
    pub kind: ErrorKind,
    pub library: PathBuf,
}

/// What is wrong with a library.
#[derive(Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file cannot be read.
    Io(std::io::Error),
    /// Its hash is none of those that are allowed.
    NotAllowed { hash: String },
    /// The system's loader refuses it.
    Open { problem: String },
    /// It exports no entry function.
    NoEntry,
    /// Its entry function describes nothing.
    NoDescription,
    /// It was compiled for another major version of the interface.
    Major { plugin: (u16, u16), host: (u16, u16) },
    /// Its description says something that cannot be.
    Description { what: String, problem: String },
}

impl Error {
    pub(crate) fn new(library: &Path, kind: ErrorKind) -> Error {
        Error { kind, library: library.to_owned() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "plugin {}: ", self.library.display())?;
        match &self.kind {
            ErrorKind::Io(e) => write!(f, "cannot be read: {e}"),
            ErrorKind::NotAllowed { hash } => {
                write!(f, "its hash is {hash}, which --allow-plugins does not list; it was not loaded")
            }
            ErrorKind::Open { problem } => write!(f, "cannot be loaded: {problem}"),
            ErrorKind::NoEntry => {
                write!(f, "exports no function {}, so it is no plugin of Attar", crate::ENTRY)
            }
            ErrorKind::NoDescription => f.write_str("describes no passes; it refuses to work"),
            ErrorKind::Major { plugin, host } => write!(
                f,
                "was compiled for version {}.{} of the plugin interface, and this is version {}.{}; compile it with the \
                 attar-plugin of this Attar",
                plugin.0, plugin.1, host.0, host.1
            ),
            ErrorKind::Description { what, problem } => {
                write!(f, "its description is wrong: {what}: {problem}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::Io(e) => Some(e),
            _ => None,
        }
    }
}
