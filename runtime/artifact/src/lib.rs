//! The one-file model container, `model.attar`: manifest, sections, hashes, mapping.
//!
//! [`Writer`] makes a file, [`Artifact`] opens one and treats every byte of it as hostile. `docs/artifact.md`
//! specifies the bytes. [`program`] holds what the runtime executes; [`manifest`] what it must know about the model.
//!
//! API boundary: the runtime, the compiler's driver and other readers build on this crate.

pub mod certificate;
mod check;
pub mod cpu;
mod error;
pub mod header;
pub mod manifest;
pub mod program;
mod reader;
pub mod vocabulary;
mod writer;

pub use error::{Error, ErrorKind, ProgramFault, Result, SectionFault, Site, TensorFault};
pub use reader::{Artifact, Verify, Weights};
pub use writer::{SectionWriter, WeightsWriter, Writer, place_tensor, tokenizer_bytes};

/// Bytes per chunk hash.
pub const CHUNK: u64 = 1 << 20;
/// Tensors start at multiples of this within the weights section.
pub const TENSOR_ALIGN: u64 = 64;
