//! Errors of the IR: what rule was broken, and where.

use std::fmt;

/// Result of an IR operation.
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
    /// Function of the `.air` text, if known.
    pub func: Option<String>,
    /// Node, as the text form prints it (`%q = linear`).
    pub node: Option<String>,
    /// Weight tensor.
    pub tensor: Option<String>,
    /// Line and column of a text, from 1.
    pub line: Option<(u32, u32)>,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A rule of an op's specification does not hold; `rule` is its label in the op's file, e.g. `C1`.
    Rule { op: &'static str, rule: &'static str, expected: String, got: String },
    /// An op was given the wrong number of inputs.
    Arity { op: &'static str, expected: String, got: usize },
    /// An attribute is missing, unknown, or has an impossible value.
    Attribute { op: String, name: String, problem: String },
    /// No such op; `nearest` is the closest known name.
    UnknownOp { name: String, nearest: Option<&'static str> },
    /// A value is used that the graph does not hold.
    UnknownValue { name: String },
    /// A structural rule of the graph is broken (the verifier's `G…` rules).
    Structure { rule: &'static str, problem: String },
    /// Text that is no `.air`.
    Syntax { expected: String, got: String },
    /// A weight the store does not hold, or that cannot be read.
    Weight { problem: String },
    /// The interpreter was given inputs that do not fit the graph.
    Input { expected: String, got: String },
}

impl Error {
    /// An error with no place yet.
    pub fn new(kind: ErrorKind) -> Error {
        Error { kind, at: Box::default() }
    }

    /// The same error at a node, unless it already has one.
    #[must_use]
    pub fn at_node(mut self, node: impl Into<String>) -> Error {
        self.at.node.get_or_insert_with(|| node.into());
        self
    }

    /// The same error in a function, unless it already has one.
    #[must_use]
    pub fn at_func(mut self, func: impl Into<String>) -> Error {
        self.at.func.get_or_insert_with(|| func.into());
        self
    }

    /// The same error at a line and column of a text, unless it already has them.
    #[must_use]
    pub fn at_line(mut self, line: u32, column: u32) -> Error {
        self.at.line.get_or_insert((line, column));
        self
    }

    /// The same error for a tensor.
    #[must_use]
    pub fn at_tensor(mut self, tensor: impl Into<String>) -> Error {
        self.at.tensor.get_or_insert_with(|| tensor.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, col)) = self.at.line {
            write!(f, "{line}:{col}: ")?;
        }
        if let Some(func) = &self.at.func {
            write!(f, "@{func}: ")?;
        }
        if let Some(node) = &self.at.node {
            write!(f, "{node}: ")?;
        }
        if let Some(tensor) = &self.at.tensor {
            write!(f, "tensor {tensor}: ")?;
        }
        match &self.kind {
            ErrorKind::Rule { op, rule, expected, got } => {
                write!(f, "{op} ({rule}): expected {expected}, got {got}")
            }
            ErrorKind::Arity { op, expected, got } => {
                write!(f, "{op}: expected {expected} inputs, got {got}")
            }
            ErrorKind::Attribute { op, name, problem } => write!(f, "{op}: attribute {name}: {problem}"),
            ErrorKind::UnknownOp { name, nearest } => {
                write!(f, "unknown op {name}")?;
                if let Some(n) = nearest {
                    write!(f, "; did you mean {n}?")?;
                }
                Ok(())
            }
            ErrorKind::UnknownValue { name } => write!(f, "unknown value {name}"),
            ErrorKind::Structure { rule, problem } => write!(f, "graph ({rule}): {problem}"),
            ErrorKind::Syntax { expected, got } => write!(f, "expected {expected}, got {got}"),
            ErrorKind::Weight { problem } => write!(f, "{problem}"),
            ErrorKind::Input { expected, got } => write!(f, "input: expected {expected}, got {got}"),
        }
    }
}

impl std::error::Error for Error {}
