//! The scalar reference: every kernel executed slowly, in f64, on the same argument slots as compiled code.
//!
//! It shares the calling convention, so a test fills one argument table and runs both. Integer activations are exact;
//! everything else is rounded once, when it is stored.

mod attention;
mod elementwise;
mod linear;
mod norm;
mod rows;

use crate::spec::KernelSpec;
use std::ops::Range;

/// Executes the grid items `items` of a kernel.
///
/// # Safety
/// `args` must hold the arguments that `spec` documents, with addresses valid for the shapes it states, and no other
/// thread may touch what the items write.
pub unsafe fn run(spec: &KernelSpec, args: &[u64], items: Range<u64>) {
    let args = Args(args);
    for item in items {
        let i = item as usize;
        // SAFETY: forwarded from the caller.
        unsafe {
            match spec {
                KernelSpec::Embed { format, vocab, dim } => rows::embed(format, *vocab, *dim, args, i),
                KernelSpec::RmsNorm { dim, eps, gain, out } => {
                    norm::rms_norm(*dim, *eps, *gain, *out, args, i)
                }
                KernelSpec::LayerNorm { dim, eps } => norm::layer_norm(*dim, *eps, args, i),
                KernelSpec::Quantize { dim } => norm::quantize(*dim, args, i),
                KernelSpec::Linear(l) => linear::linear(l, args, i),
                KernelSpec::Rope { heads, head_dim } => attention::rope(*heads, *head_dim, args, i),
                KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len } => {
                    attention::kv_write(*kv_heads, *head_dim, *kv, *page_len, args, i);
                }
                KernelSpec::Attention { attention, out } => attention::tile(attention, *out, args, i),
                KernelSpec::AttentionSpan(attention) => attention::span(attention, args, i),
                KernelSpec::AttentionMerge { attention, out } => {
                    attention::merge(attention, *out, args, i);
                }
                KernelSpec::Elementwise { op, dim } => elementwise::elementwise(*op, *dim, args, i),
                KernelSpec::Softmax { dim } => norm::softmax(*dim, args, i),
                KernelSpec::GatherRows { dim } => rows::gather_rows(*dim, args, i),
                KernelSpec::Slice { dim, start, len } => rows::slice(*dim, *start, *len, args, i),
            }
        }
    }
}

/// The argument slots of a launch, read as what the contract says they are.
#[derive(Clone, Copy)]
struct Args<'a>(&'a [u64]);

impl Args<'_> {
    fn number(&self, slot: usize) -> usize {
        self.0[slot] as usize
    }

    /// # Safety
    /// The slot must hold an address of `len` readable values of type `V` at `offset` values.
    unsafe fn values<'a, V>(&self, slot: usize, offset: usize, len: usize) -> &'a [V] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts((self.0[slot] as *const V).add(offset), len) }
    }

    /// # Safety
    /// The slot must hold an address of `len` writable values of type `V` at `offset` values, not aliased elsewhere.
    unsafe fn values_mut<'a, V>(&self, slot: usize, offset: usize, len: usize) -> &'a mut [V] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut((self.0[slot] as *mut V).add(offset), len) }
    }
}
