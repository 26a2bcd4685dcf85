//! What can go wrong while a model is opened or run.

use std::fmt;
use std::io;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A fault: what is wrong and what to change.
#[derive(Debug)]
pub struct Error {
    pub kind: Box<ErrorKind>,
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Error {
        Error { kind: Box::new(kind) }
    }
}

impl From<attar_artifact::Error> for Error {
    fn from(source: attar_artifact::Error) -> Error {
        ErrorKind::Artifact(source).into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

/// Error of the tokenizer library.
pub type TokenizerFault = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file cannot be opened or is damaged.
    #[error(transparent)]
    Artifact(attar_artifact::Error),
    /// No code section runs here.
    #[error("no code in this artifact runs on this CPU ({cpu}): {}; compile it again with --target native",
            if refused.is_empty() { "it has none at all".to_owned() } else { refused.join("; ") })]
    NoCode { cpu: String, refused: Vec<String> },
    /// The target asked for is not in the file.
    #[error("the artifact has no code for target {target}; it has: {}", have.join(", "))]
    TargetAbsent { target: String, have: Vec<String> },
    /// The target asked for does not run on this CPU.
    #[error("target {target} cannot run on this CPU ({cpu}): {reason}")]
    TargetUnsupported { target: String, cpu: String, reason: String },
    /// The device asked for is not there.
    #[error("{device} is not available: {reason}; use --device cpu")]
    DeviceUnavailable { device: String, reason: String },
    /// The artifact was made for CPUs alone.
    #[error(
        "the artifact has no code for GPUs; compile it again with --target native,cuda:sm_90a, or use --device cpu"
    )]
    NoCudaCode,
    /// None of the artifact's code runs on the GPU.
    #[error("no code in this artifact runs on {device} ({name}, compute capability {}.{}): it has {}, and GPUs need {}.{} or \
             later; compile it again for this GPU, or use --device cpu",
            compute.0, compute.1, have.join(", "), needed.0, needed.1)]
    DeviceUnsupported {
        device: String,
        name: String,
        compute: (i32, i32),
        needed: (i32, i32),
        have: Vec<String>,
    },
    /// The driver does not know the code that artifacts hold.
    #[error(
        "the NVIDIA driver is for CUDA {found}, and {needed} is needed; update the driver, or use --device cpu"
    )]
    DriverTooOld { found: String, needed: String },
    /// The GPU's memory is too small, or in use.
    #[error("{device} has no room for {what}: {bytes} bytes are needed, {free} are free{hint}")]
    DeviceMemory { device: String, what: &'static str, bytes: u64, free: u64, hint: &'static str },
    /// The driver reports an error: a GPU that was lost, or code that failed.
    #[error("{device} failed while {action}: {problem}; open the model again, or use --device cpu")]
    DeviceFailed { device: String, action: &'static str, problem: String },
    /// The certificate does not say what the caller requires.
    #[error(
        "{requirement} is required, but the artifact's certificate says {metric} {value}; compile the model with more \
             bits, or require less"
    )]
    Requirement { requirement: String, metric: &'static str, value: f64 },
    /// There is no certificate, but the caller requires something of it.
    #[error("{requirement} is required, but the artifact has no certificate{}; compile the model again with one",
            reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default())]
    Uncertified { requirement: String, reason: Option<String> },
    /// A section needed for this is absent.
    #[error("the artifact has no {what}; compile the model again{hint}")]
    Missing { what: &'static str, hint: &'static str },
    /// The tokenizer section is not what the tokenizer library reads.
    #[error("the tokenizer cannot {action}: {source}")]
    Tokenizer { action: &'static str, source: TokenizerFault },
    /// The chat template does not parse, or refuses the messages.
    #[error("the chat template failed: {message}")]
    ChatTemplate { message: String },
    /// Messages given as JSON are malformed.
    #[error("the chat messages are not a JSON list of objects with role and content: {source}")]
    Messages { source: serde_json::Error },
    /// The operating system gave no memory.
    #[error("cannot get {bytes} bytes of memory for {what}: {source}{hint}")]
    Memory { what: &'static str, bytes: u64, hint: &'static str, source: io::Error },
    /// An option has a value that makes no sense.
    #[error("option {name} is {value}, expected {expected}")]
    Option { name: &'static str, value: String, expected: String },
    /// Nothing to run.
    #[error("the prompt has no tokens; give at least one")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token { token: u32, vocab: u32 },
    /// More tokens than the context holds.
    #[error(
        "{needed} tokens do not fit the context of {capacity}; shorten the prompt, open a larger context, or choose \
         ContextOverflow::Shift"
    )]
    ContextOverflow { needed: usize, capacity: usize },
    /// All pages of the KV cache are in use.
    #[error("the KV cache has no free page ({pages} in all); end a sequence or open a larger context")]
    OutOfPages { pages: usize },
    /// A step of more tokens than the programs take.
    #[error("a step of {tokens} tokens; the artifact's programs take at most {most}")]
    StepTooLarge { tokens: usize, most: usize },
    /// A step that asks for the logits of more tokens than there is memory for.
    #[error("a step that asks for the logits of {rows} tokens; at most {most} are given in one step")]
    TooManyRows { rows: usize, most: usize },
    /// An id of a sequence that was removed or never made.
    #[error("there is no sequence {id}")]
    NoSequence { id: u32 },
    /// All sequences are in use.
    #[error("all {most} sequences are in use; remove one, or open the engine for more")]
    TooManySequences { most: usize },
}
