//! The engine: opens an artifact and generates from it.
//!
//! A [`Model`] is an opened artifact: its weights in memory, the code section that suits this CPU, tokenizer and chat
//! template. A [`Session`] holds one sequence of tokens and generates from it; an [`Engine`] runs single steps over many
//! sequences. Computation is shared out among the model's threads; after the first token nothing is allocated.
//!
//! ```no_run
//! use attar_runtime::{Control, GenerateOptions, Message, Model, OpenOptions, SessionOptions};
//!
//! let model = Model::open("model.attar", &OpenOptions::default())?;
//! let prompt = model.chat_template()?.render(&[Message::new("user", "What is the capital of France?")], true)?;
//! let prompt = model.tokenizer()?.encode(&prompt, false)?;
//! let mut session = model.session(&SessionOptions::default())?;
//! let options = GenerateOptions { max_tokens: Some(64), ..GenerateOptions::default() };
//! let answer = session.generate(&prompt, &options, |piece| {
//!     eprint!("{}", piece.text);
//!     Control::Continue
//! })?;
//! assert_eq!(answer.tokens.len(), answer.timings.generated_tokens);
//! # Ok::<(), attar_runtime::Error>(())
//! ```
//!
//! `examples/generate.rs` is the same as a program.
//!
//! API boundary: the command line, the server and other programs build on this crate.

mod byte_pairs;
mod chat;
mod device;
mod engine;
mod error;
mod kv;
mod memory;
mod model;
mod prefetch;
mod sampler;
mod session;
mod stop;
mod text;
#[cfg(test)]
mod toy;

pub use attar_artifact::Verify;
pub use attar_artifact::certificate::{Certificate, Requirement};
pub use attar_artifact::manifest::Manifest;
pub use attar_artifact::program::ProgramKind;
pub use chat::{ChatTemplate, Message};
pub use device::cuda::{Gpu, gpus};
pub use engine::{Engine, LaunchTime, SequenceId, StepBatch};
pub use error::{Error, ErrorKind, Result, TokenizerFault};
pub use model::{
    DeviceChoice, Model, OpenOptions, OpenTimings, Progress, chosen_target, code_targets, target_refusal,
};
pub use sampler::{Sampler, SamplingOptions, TokenLogit, top_logits};
pub use session::{
    CancelToken, ContextOverflow, Control, FinishReason, GenerateOptions, Generation, Piece, Session,
    SessionOptions, Timings,
};
pub use text::{Detokenizer, Tokenizer};
