//! Errors of lowering: a graph that no kernel serves, and where.

use attar_format::FormatError;
use std::fmt;

/// Why a graph cannot be lowered, and the node it is about.
#[derive(Debug, Clone, PartialEq)]
pub struct LowerError {
    pub kind: LowerErrorKind,
    /// The node as the text form prints it (`%5 = rope`), if it is about one.
    pub node: Option<String>,
}

/// See [`LowerError`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum LowerErrorKind {
    /// No kernel and no decomposition serves this.
    Unsupported { problem: String, supported: &'static str },
    /// A size does not fit 64 bits.
    Overflow,
    /// A weight does not fit its format.
    Format(FormatError),
    /// The graph is broken, which the verifier would have found.
    Ir(attar_ir::Error),
}

impl LowerError {
    pub(super) fn unsupported(problem: impl Into<String>, supported: &'static str) -> LowerError {
        LowerErrorKind::Unsupported { problem: problem.into(), supported }.into()
    }

    #[must_use]
    pub(super) fn at(mut self, node: &attar_ir::Node) -> LowerError {
        self.node.get_or_insert_with(|| format!("%{} = {}", node.name, attar_ir::Op::name(&node.op)));
        self
    }
}

impl From<LowerErrorKind> for LowerError {
    fn from(kind: LowerErrorKind) -> LowerError {
        LowerError { kind, node: None }
    }
}

impl From<attar_ir::Error> for LowerError {
    fn from(e: attar_ir::Error) -> LowerError {
        LowerErrorKind::Ir(e).into()
    }
}

impl fmt::Display for LowerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lower: ")?;
        if let Some(node) = &self.node {
            write!(f, "{node}: ")?;
        }
        match &self.kind {
            LowerErrorKind::Unsupported { problem, supported } => {
                write!(f, "{problem} is not supported; {supported}")
            }
            LowerErrorKind::Overflow => f.write_str("a size does not fit 64 bits"),
            LowerErrorKind::Format(e) => write!(f, "{e}"),
            LowerErrorKind::Ir(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for LowerError {}
