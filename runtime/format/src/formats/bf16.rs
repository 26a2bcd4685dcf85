//! `bf16`: the upper half of a binary32, rounded to nearest even. What most checkpoints are published in.

use super::{Format, Scale, Value};
use crate::DType;

/// Uncompressed 16-bit weights.
pub const BF16: Format = Format {
    name: "bf16",
    value: Value::Float(DType::BF16),
    group: 1,
    scale: Scale::None,
    source: "Kalamkar et al. 2019, arXiv:1905.12322",
};

const _: () = assert!(BF16.code_bits() == 16);
