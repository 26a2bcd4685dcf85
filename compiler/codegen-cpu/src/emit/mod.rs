//! Kernel bodies: one file per kernel, each written once for all targets.

mod attention;
mod cache;
mod codes;
mod elementwise;
mod embed;
mod hadamard;
mod linear;
mod norm;
mod quantize;
mod rows;
mod walk;

use crate::lanes::Lanes;
use attar_kernel::KernelSpec;

/// Emits the body of `spec`.
///
/// # Errors
/// What the spec asks for that no kernel provides.
pub(crate) fn emit(spec: &KernelSpec, cx: &mut Lanes<'_>) -> Result<(), String> {
    match *spec {
        KernelSpec::Embed { format, vocab, dim } => embed::embed(format, vocab, dim, cx)?,
        KernelSpec::RmsNorm { dim, eps, gain, out } => norm::rms_norm(dim, eps, gain, out, cx)?,
        KernelSpec::LayerNorm { dim, eps } => norm::layer_norm(dim, eps, cx),
        KernelSpec::Quantize { dim } => quantize::quantize(dim, cx)?,
        KernelSpec::Linear(ref l) => linear::emit(l, cx)?,
        KernelSpec::Rope { heads, head_dim } => cache::rope(heads, head_dim, cx),
        KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len } => {
            cache::kv_write(cache::Cache { kv_heads, head_dim, kv, page_len }, cx)?;
        }
        KernelSpec::Attention { ref attention, out } => attention::attention(attention, out, cx)?,
        KernelSpec::AttentionSpan(ref attention) => attention::attention_span(attention, cx)?,
        KernelSpec::AttentionMerge { ref attention, out } => attention::attention_merge(attention, out, cx)?,
        KernelSpec::Elementwise { op, dim } => elementwise::elementwise(op, dim, cx),
        KernelSpec::Softmax { dim } => norm::softmax(dim, cx),
        KernelSpec::GatherRows { dim } => rows::gather_rows(dim, cx),
        KernelSpec::Slice { dim, start, len } => rows::slice(dim, start, len, cx),
    }
    Ok(())
}
