//! `w8`: signed 8-bit codes with one bf16 scale per 32 weights; 8.5 bits per weight.
//!
//! `w[n, k] = scale[n, k / 32] * code[n, k]`, codes in −127..=127.

use super::{Format, Scale, Value};

/// 8-bit weights for sensitive tensors.
pub const W8: Format = Format {
    name: "w8",
    value: Value::Int8,
    group: 32,
    scale: Scale::Bf16,
    source: "block scaling as in Dettmers et al. 2022, arXiv:2110.02861, with blocks of 32",
};

const _: () = assert!(W8.bits_per_weight() == 8.5);
