//! What can go wrong while a text is predicted.

use attar_runtime::ErrorKind as Run;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a text cannot be predicted, or nothing be said of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Windows of a size that cannot be halved.
    #[error("a window of {context} tokens: expected an even number of at least 4")]
    Context { context: usize },
    /// No window was asked for.
    #[error("0 windows leave nothing to measure; ask for at least one")]
    NoWindows,
    /// Less text than one window.
    #[error(
        "the text has {tokens} tokens; a window alone takes {context}: give a longer text or a smaller context"
    )]
    TooShort { tokens: usize, context: usize },
    /// Two models that predict among different tokens.
    #[error(
        "the models have vocabularies of {vocab} and {reference} tokens; only artifacts with the same tokenizer can be \
         compared"
    )]
    Vocabulary { vocab: u32, reference: u32 },
    /// Two tokenizers that cut the text differently.
    #[error(
        "the tokenizers of the models cut this text differently, from token {at} on; only artifacts with the same \
         tokenizer can be compared"
    )]
    Tokens { at: usize },
    /// A logit that is infinite or no number.
    #[error("the model's logits are not finite{}; its weights are damaged or its format cannot hold them",
            window.map(|w| format!(" in window {w}")).unwrap_or_default())]
    NotFinite { window: Option<usize> },
    /// The engine.
    #[error(transparent)]
    Runtime(attar_runtime::Error),
}

impl From<attar_runtime::Error> for Error {
    fn from(e: attar_runtime::Error) -> Error {
        Error::Runtime(e)
    }
}

impl Error {
    /// The same, in that window.
    pub(crate) fn within(self, window: usize) -> Error {
        match self {
            Error::NotFinite { .. } => Error::NotFinite { window: Some(window) },
            other => other,
        }
    }

    /// Whether the machine is at fault.
    pub(crate) fn is_environment(&self) -> bool {
        matches!(self, Error::Runtime(e) if matches!(*e.kind, Run::Memory { .. }))
    }
}
