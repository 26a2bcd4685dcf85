//! Checkpoints in: safetensors folders and GGUF files become a graph, a weight store and a tokenizer.
//!
//! [`open`] does it all. Files are mapped and tensors read one at a time; every field of a file is taken for hostile.
//! What is wrong with a checkpoint is told in one error that lists all of it.

pub mod arch;
pub mod config;
pub mod container;
mod error;
mod folder;
mod gguf_file;
mod model;
pub mod rope;
mod sketch;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Problems, Result, Site};
pub use model::{Imported, ModelInfo, SourceFile, SourceInfo};
pub use rope::RopeTable;

use container::FileBytes;
use std::path::Path;

/// Imports a checkpoint: a folder with `config.json` and safetensors, a `.gguf` file, or a folder with one `.gguf` file.
///
/// # Errors
/// When the path holds no checkpoint, or one that cannot be imported; [`ErrorKind::Many`] lists every problem found.
pub fn open(path: &Path) -> Result<Imported> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("open", path, &e))?;
    if !meta.is_dir() {
        return open_gguf(FileBytes::map(path)?);
    }
    let files = folder::list(path, "gguf")?;
    // Some folders of GGUF files carry the original's config.json along.
    let has_safetensors = files.is_empty() || !folder::list(path, "safetensors")?.is_empty();
    if path.join("config.json").exists() && has_safetensors {
        return folder::open(path);
    }
    match &files[..] {
        [file] => open_gguf(FileBytes::map(file)?),
        _ => {
            let kind = ErrorKind::NoCheckpoint {
                expected: "config.json, or exactly one .gguf file",
                got: format!("a folder with {} .gguf files", files.len()),
            };
            Err(Error::new(kind).at_file(path))
        }
    }
}

/// Imports a GGUF file whose bytes are at hand.
///
/// # Errors
/// As [`open`].
pub fn open_gguf(file: FileBytes) -> Result<Imported> {
    gguf_file::open(file)
}
