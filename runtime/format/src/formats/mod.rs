//! The weight formats, one file each.

mod bf16;
mod f32;
mod n4;
mod w8;

pub use bf16::BF16;
pub use f32::F32;
pub use n4::{N4, N4_SHIFT, N4_TABLE};
pub use w8::W8;

use crate::DType;

/// Every weight format, uncompressed ones first.
pub const ALL: &[FormatRef] = &[&F32, &BF16, &W8, &N4];

/// A weight format by reference; formats are compared by name.
pub type FormatRef = &'static Format;

/// How a weight matrix is stored. One value per file of this module.
#[derive(Debug)]
pub struct Format {
    /// Name in recipes, on the command line and in manifests.
    pub name: &'static str,
    /// What one code stands for.
    pub value: Value,
    /// Weights along K that share one scale field; K must be a multiple of it. 1 for uncompressed formats.
    pub group: usize,
    /// How scales are stored.
    pub scale: Scale,
    /// Where the idea comes from.
    pub source: &'static str,
}

/// What one code of a format stands for, before scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// The weight itself; no scale.
    Float(DType),
    /// A signed 8-bit integer in −127..=127.
    Int8,
    /// An index of 4 bits into a table of 16 signed 8-bit integers, stored with the tensor.
    Table4,
}

/// How the scales of a format are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Uncompressed: none.
    None,
    /// One bf16 per group: `w = scale * code`.
    Bf16,
    /// One f32 per row and one byte per group, `field = (s << choice_bits) | choice`:
    /// `w = row_scale * (s - bias) * (table[code] + choice * shift)`.
    RowF32Field8 {
        /// Subtracted from the stored scale, which makes it signed: a negative scale turns the table over.
        bias: i32,
        /// Low bits of the byte that hold the choice; the scale has the others.
        choice_bits: u32,
    },
}

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}
impl Eq for Format {}

impl Format {
    /// Bits of one code.
    pub const fn code_bits(&self) -> usize {
        match self.value {
            Value::Float(DType::F32 | DType::I32) => 32,
            Value::Float(DType::F16 | DType::BF16) => 16,
            Value::Int8 => 8,
            Value::Table4 => 4,
        }
    }

    /// Bytes of one group's scale field.
    pub const fn field_bytes(&self) -> usize {
        match self.scale {
            Scale::None => 0,
            Scale::Bf16 => 2,
            Scale::RowF32Field8 { .. } => 1,
        }
    }

    /// Bits per weight, without the per-row scale and padding.
    pub const fn bits_per_weight(&self) -> f64 {
        self.code_bits() as f64 + (self.field_bytes() * 8) as f64 / self.group as f64
    }

    /// Whether activations are quantized to int8 before they meet these weights.
    pub const fn wants_int8_activations(&self) -> bool {
        matches!(self.value, Value::Int8 | Value::Table4)
    }

    /// Whether the format stores weights as they are.
    pub const fn is_uncompressed(&self) -> bool {
        matches!(self.value, Value::Float(_))
    }
}

/// The format of that name.
pub fn by_name(name: &str) -> Option<FormatRef> {
    ALL.iter().copied().find(|f| f.name == name)
}
