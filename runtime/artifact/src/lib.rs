//! The one-file model container, `model.attar`: manifest, sections, hashes, mapping.
//!
//! `docs/artifact.md` specifies the bytes. [`program`] holds what the runtime executes; [`manifest`] what it must
//! know about the model.

pub mod manifest;
pub mod program;
