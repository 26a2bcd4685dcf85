//! Errors of the importer: what is wrong with a checkpoint, where, and what would be right.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of an import.
pub type Result<T> = std::result::Result<T, Error>;

/// An error and the place it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Error {
    pub kind: ErrorKind,
    /// Boxed, because every result carries room for it.
    pub at: Box<Site>,
}

/// Where an error belongs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Site {
    pub file: Option<PathBuf>,
    /// Tensor, as the file spells it.
    pub tensor: Option<String>,
    /// Key of the configuration or metadata, as the file spells it.
    pub key: Option<String>,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The system refused a file; `doing` is a verb with its object, e.g. `open`.
    Io { doing: &'static str, kind: std::io::ErrorKind, cause: String },
    /// The path holds no checkpoint.
    NoCheckpoint { expected: &'static str, got: String },
    /// Bytes that break the rules of the container or of a JSON file.
    Malformed { expected: String, got: String },
    /// A file ends before something it declares.
    Truncated { what: String, needed: u64, len: u64 },
    /// A shard the index names does not exist.
    MissingShard { index: String },
    /// No importer for this architecture.
    UnsupportedArchitecture { got: String, supported: Vec<&'static str> },
    /// A tensor type that cannot be read.
    UnsupportedType { got: String, supported: String },
    /// A setting whose meaning the importer does not know.
    Unsupported { got: String, supported: String },
    /// A setting that is missing or impossible.
    Config { expected: String, got: String },
    /// A tensor the architecture needs is not there.
    MissingTensor { shape: Vec<usize> },
    /// A tensor of another shape than the configuration says. Outermost dimension first.
    Shape { expected: Vec<usize>, got: Vec<usize> },
    /// A tensor the architecture has no use for, so importing would drop it silently.
    UnexpectedTensor { shape: Vec<usize> },
    /// A tokenizer that cannot be read or rebuilt.
    Tokenizer { problem: String },
    /// The graph could not be built: a bug of the importer.
    Graph { cause: Box<attar_ir::Error> },
    /// Several problems, in the order they were found.
    Many(Vec<Error>),
}

impl Error {
    /// An error with no place yet.
    pub fn new(kind: ErrorKind) -> Error {
        Error { kind, at: Box::default() }
    }

    pub(crate) fn malformed(expected: impl Into<String>, got: impl Into<String>) -> Error {
        Error::new(ErrorKind::Malformed { expected: expected.into(), got: got.into() })
    }

    pub(crate) fn config(
        key: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Error {
        Error::new(ErrorKind::Config { expected: expected.into(), got: got.into() }).at_key(key)
    }

    pub(crate) fn io(doing: &'static str, path: &Path, cause: &std::io::Error) -> Error {
        let kind = ErrorKind::Io { doing, kind: cause.kind(), cause: cause.to_string() };
        Error::new(kind).at_file(path)
    }

    /// The same error in a file, unless it already has one; every part of a list gets the file.
    #[must_use]
    pub fn at_file(mut self, path: &Path) -> Error {
        if let ErrorKind::Many(list) = self.kind {
            self.kind = ErrorKind::Many(list.into_iter().map(|e| e.at_file(path)).collect());
        } else {
            self.at.file.get_or_insert_with(|| path.to_owned());
        }
        self
    }

    /// The same error for a tensor, unless it already has one.
    #[must_use]
    pub fn at_tensor(mut self, tensor: impl Into<String>) -> Error {
        self.at.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// The same error for a key, unless it already has one.
    #[must_use]
    pub fn at_key(mut self, key: impl Into<String>) -> Error {
        self.at.key.get_or_insert_with(|| key.into());
        self
    }

    /// Every single problem this error stands for.
    pub fn problems(&self) -> Vec<&Error> {
        match &self.kind {
            ErrorKind::Many(list) => list.iter().flat_map(Error::problems).collect(),
            _ => vec![self],
        }
    }

    /// Whether the machine is at fault (a file that cannot be read) and not the checkpoint.
    pub fn is_environment(&self) -> bool {
        self.problems()
            .iter()
            .all(|e| matches!(&e.kind, ErrorKind::Io { kind, .. } if *kind != std::io::ErrorKind::NotFound))
    }

    /// Whether the importer itself is at fault.
    pub fn is_bug(&self) -> bool {
        self.problems().iter().any(|e| matches!(e.kind, ErrorKind::Graph { .. }))
    }
}

/// Problems found so far. Reading goes on after one, so that a user can fix all of them at once.
#[derive(Debug, Default)]
pub struct Problems(Vec<Error>);

impl Problems {
    pub fn new() -> Problems {
        Problems::default()
    }

    pub fn push(&mut self, e: Error) {
        match e.kind {
            ErrorKind::Many(list) => self.0.extend(list),
            _ => self.0.push(e),
        }
    }

    /// The value, or `None` after noting the error.
    pub fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(v) => Some(v),
            Err(e) => {
                self.push(e);
                None
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives all that was found the file it was found in.
    #[must_use]
    pub fn at_file(self, path: &Path) -> Problems {
        Problems(self.0.into_iter().map(|e| e.at_file(path)).collect())
    }

    /// Adds what another part found.
    pub fn extend(&mut self, other: Problems) {
        self.0.extend(other.0);
    }

    /// `value` when nothing was found.
    ///
    /// # Errors
    /// The one problem, or [`ErrorKind::Many`] with all of them.
    pub fn finish<T>(mut self, value: T) -> Result<T> {
        match self.0.len() {
            0 => Ok(value),
            1 => Err(self.0.remove(0)),
            _ => Err(Error::new(ErrorKind::Many(self.0))),
        }
    }
}

/// Lines of a long list that are printed; the rest is counted.
const SHOWN: usize = 100;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let ErrorKind::Many(list) = &self.kind {
            write!(f, "{} problems:", list.len())?;
            for e in list.iter().take(SHOWN) {
                write!(f, "\n  {e}")?;
            }
            if list.len() > SHOWN {
                write!(f, "\n  and {} more", list.len() - SHOWN)?;
            }
            return Ok(());
        }
        if let Some(file) = &self.at.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(tensor) = &self.at.tensor {
            write!(f, "tensor {tensor}: ")?;
        }
        if let Some(key) = &self.at.key {
            write!(f, "{key}: ")?;
        }
        match &self.kind {
            ErrorKind::Io { doing, cause, .. } => write!(f, "cannot {doing}: {cause}"),
            ErrorKind::NoCheckpoint { expected, got } => {
                write!(f, "no checkpoint: expected {expected}, got {got}")
            }
            ErrorKind::Malformed { expected, got } | ErrorKind::Config { expected, got } => {
                write!(f, "expected {expected}, got {got}")
            }
            ErrorKind::Truncated { what, needed, len } => {
                write!(f, "truncated: {what} needs {needed} bytes, the file has {len}")
            }
            ErrorKind::MissingShard { index } => {
                write!(f, "shard named by {index} does not exist; download it again")
            }
            ErrorKind::UnsupportedArchitecture { got, supported } => {
                write!(f, "unsupported architecture {got}; supported: {}", supported.join(", "))
            }
            ErrorKind::UnsupportedType { got, supported } => {
                write!(f, "unsupported type {got}; supported: {supported}")
            }
            ErrorKind::Unsupported { got, supported } => {
                write!(f, "unsupported {got}; supported: {supported}")
            }
            ErrorKind::MissingTensor { shape } => write!(f, "missing; expected shape {shape:?}"),
            ErrorKind::Shape { expected, got } => write!(f, "expected shape {expected:?}, got {got:?}"),
            ErrorKind::UnexpectedTensor { shape } => {
                write!(
                    f,
                    "shape {shape:?}: not part of this architecture, so the model would not be the same without it"
                )
            }
            ErrorKind::Tokenizer { problem } => write!(f, "tokenizer: {problem}"),
            ErrorKind::Graph { cause } => write!(f, "bug: building the graph: {cause}"),
            ErrorKind::Many(_) => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<attar_ir::Error> for Error {
    fn from(cause: attar_ir::Error) -> Error {
        Error::new(ErrorKind::Graph { cause: Box::new(cause) })
    }
}
