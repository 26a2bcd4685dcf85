//! Packaging: streams packed tensors, code, programs and texts into one artifact.
//!
//! Tensors are packed a few at a time, in parallel, and written in order: memory holds one batch, never the model.

use crate::error::{Error, ErrorKind, Result};
use attar_artifact::Writer;
use attar_artifact::manifest::{Model, SectionKind};
use attar_artifact::program::Program;
use attar_codegen_cpu::CodeBlob;
use attar_codegen_cpu::lower::Lowered;
use attar_codegen_cpu::pack::PackedTensor;
use attar_codegen_cuda::CodeBlob as CudaBlob;
use attar_ir::WeightStore;
use attar_pass::Phase;
use rayon::prelude::*;
use std::path::Path;

/// Packed bytes of one batch; a larger tensor is a batch of its own.
const BATCH_BYTES: u64 = 32 << 20;

/// What goes into an artifact besides its weights.
pub(crate) struct Contents<'a> {
    pub(crate) model: Model,
    pub(crate) lowered: &'a Lowered,
    pub(crate) weights: &'a WeightStore,
    pub(crate) code: &'a [CodeBlob],
    /// Code for GPUs, and its programs.
    pub(crate) cuda: &'a CudaCode,
    pub(crate) tokenizer: Option<&'a str>,
    pub(crate) chat_template: Option<&'a str>,
    /// `.air` text of the graph that was lowered.
    pub(crate) graph: &'a str,
    pub(crate) recipe: &'a str,
}

/// Code for GPUs; empty where none was asked for.
#[derive(Debug, Default)]
pub(crate) struct CudaCode {
    pub(crate) blobs: Vec<CudaBlob>,
    pub(crate) programs: Vec<Program>,
}

/// Writes all sections but the certificate; nothing appears at `out` before the writer is told to finish.
///
/// # Errors
/// When a weight cannot be read or packed, or the file cannot be written.
pub(crate) fn write(
    out: &Path,
    contents: &Contents<'_>,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Writer> {
    let mut writer = Writer::create(out).map_err(artifact)?;
    write_weights(&mut writer, contents, progress)?;
    for blob in contents.code {
        let kind = SectionKind::Code {
            target: blob.target.name().to_owned(),
            features: blob.features.iter().map(|f| (*f).to_owned()).collect(),
            entries: blob.entries.clone(),
            prefill_differs: blob.target.prefill_differs(),
        };
        writer.add_section(kind, &blob.bytes).map_err(artifact)?;
    }
    for blob in &contents.cuda.blobs {
        let kind = SectionKind::Code {
            target: blob.target.name(),
            features: Vec::new(),
            entries: blob.entries.clone(),
            // Tensor cores multiply many rows as bf16, few rows as bytes.
            prefill_differs: true,
        };
        writer.add_section(kind, &blob.bytes).map_err(artifact)?;
    }
    if !contents.code.is_empty() {
        writer.add_programs("cpu", &contents.lowered.programs).map_err(artifact)?;
    }
    if !contents.cuda.blobs.is_empty() {
        writer.add_programs("cuda", &contents.cuda.programs).map_err(artifact)?;
    }
    if let Some(json) = contents.tokenizer {
        writer.add_tokenizer(json).map_err(artifact)?;
    }
    let texts = [
        (SectionKind::ChatTemplate, contents.chat_template),
        (SectionKind::Graph, Some(contents.graph)),
        (SectionKind::Recipe, Some(contents.recipe)),
    ];
    for (kind, text) in texts {
        if let Some(text) = text {
            writer.add_text(kind, text).map_err(artifact)?;
        }
    }
    Ok(writer)
}

fn write_weights(
    writer: &mut Writer,
    contents: &Contents<'_>,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<()> {
    let tensors = &contents.lowered.tensors;
    let total = tensors.iter().map(|t| t.len).sum();
    let mut done = 0;
    let mut section = writer.weights().map_err(artifact)?;
    for batch in batches(tensors) {
        let packed: Vec<Vec<u8>> = batch
            .par_iter()
            .map(|t| t.bytes(contents.weights))
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| Error::new(Phase::Package, ErrorKind::Weights(e)))?;
        for (tensor, bytes) in batch.iter().zip(packed) {
            let shape = tensor.file_shape();
            let entry = section.add(&tensor.name, tensor.format_name(), &shape, &bytes).map_err(artifact)?;
            if (entry.offset, entry.len) != (tensor.offset, tensor.len) {
                let problem = format!(
                    "tensor {} was planned at {} but written at {}",
                    tensor.name, tensor.offset, entry.offset
                );
                return Err(Error::new(Phase::Package, ErrorKind::Bug { problem }));
            }
            done += tensor.len;
            progress(&tensor.name, done, total);
        }
    }
    section.finish();
    Ok(())
}

/// Cuts the tensors into runs of at most [`BATCH_BYTES`].
fn batches(tensors: &[PackedTensor]) -> Vec<&[PackedTensor]> {
    let mut batches = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > start && bytes + tensor.len > BATCH_BYTES {
            batches.push(&tensors[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += tensor.len;
    }
    if start < tensors.len() {
        batches.push(&tensors[start..]);
    }
    batches
}

fn artifact(e: attar_artifact::Error) -> Error {
    Error::new(Phase::Package, ErrorKind::Artifact(e))
}
