//! `f32`: IEEE 754 binary32 as it is. The reference every other format is measured against.

use super::{Format, Scale, Value};
use crate::DType;

/// Uncompressed 32-bit weights.
pub const F32: Format = Format {
    name: "f32",
    value: Value::Float(DType::F32),
    group: 1,
    scale: Scale::None,
    source: "IEEE 754-2019 binary32",
};

const _: () = assert!(F32.code_bits() == 32);
