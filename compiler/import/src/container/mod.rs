//! Containers of checkpoints: files are mapped, headers are checked, tensors are read one at a time.

mod file;
pub mod ggml_types;
pub mod gguf;
pub mod safetensors;
mod tensor;

pub use file::FileBytes;
pub(crate) use file::read_text;
pub use tensor::{RowOrder, TensorEntry, TensorReader};

use crate::error::{Error, Problems};

/// Notes every pair of tensors that share bytes. Each tensor's bytes stand in `range`.
fn check_overlaps(tensors: &[TensorEntry], problems: &mut Problems) {
    let mut order: Vec<&TensorEntry> = tensors.iter().filter(|t| !t.range.is_empty()).collect();
    order.sort_by_key(|t| (t.range.start, t.range.end));
    for pair in order.windows(2) {
        let [a, b] = pair else { continue };
        if b.range.start < a.range.end {
            let got = format!("bytes {:?}, which overlap tensor {} at {:?}", b.range, a.name, a.range);
            problems.push(Error::malformed("bytes of its own", got).at_tensor(&b.name));
        }
    }
}
