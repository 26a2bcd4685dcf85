//! The weight formats, one file each.

mod bf16;
mod f32;
mod n2;
mod n3;
mod n4;
mod n5;
mod n6;
mod w8;

pub use bf16::BF16;
pub use f32::F32;
pub use n2::N2;
pub use n3::N3;
pub use n4::N4;
pub use n5::N5;
pub use n6::N6;
pub use w8::W8;

use crate::DType;

/// Every weight format, uncompressed ones first, then by size.
pub const ALL: &[FormatRef] = &[&F32, &BF16, &W8, &N6, &N5, &N4, &N3, &N2];

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
    /// An index into a table of signed 8-bit integers, stored with the tensor.
    Table(Table<'static>),
}

/// How codes index a table: their size, and the table tensors get unless a pass makes one for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table<'a> {
    /// Bits of a code, 2 to 6. The table has `1 << bits` entries.
    pub bits: usize,
    /// Default entries, ascending.
    pub entries: &'a [i8],
    /// Default of what each step of a group's choice adds to every entry.
    pub shift: i8,
}

/// Entries of the largest table.
pub const MOST_ENTRIES: usize = 64;

impl Table<'_> {
    /// The default entries; those that codes do not reach are 0.
    pub const fn padded(&self) -> [i8; MOST_ENTRIES] {
        let mut all = [0; MOST_ENTRIES];
        let mut i = 0;
        while i < self.entries.len() {
            all[i] = self.entries[i];
            i += 1;
        }
        all
    }

    /// Whether there is an entry for every code, in ascending order and on both sides of zero, and every entry fits a
    /// signed byte wherever the choice moves it.
    pub(crate) const fn is_sound(&self, choice_bits: u32) -> bool {
        let most = (1 << choice_bits) - 1;
        let entries = self.entries;
        let mut i = 1;
        while i < entries.len() {
            if entries[i - 1] >= entries[i] {
                return false;
            }
            i += 1;
        }
        let last = entries[entries.len() - 1] as i32;
        entries.len() == 1 << self.bits
            && entries[0] < 0
            && entries[0] >= -127
            && last > 0
            && last + most * self.shift as i32 <= 127
    }
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
            Value::Table(table) => table.bits,
        }
    }

    /// The table, for formats whose codes are indices.
    pub const fn table(&self) -> Option<Table<'static>> {
        match self.value {
            Value::Table(table) => Some(table),
            Value::Float(_) | Value::Int8 => None,
        }
    }

    /// 64-byte rows of codes that a group of 16 channels takes, in formats with groups of 32.
    pub const fn group_rows(&self) -> usize {
        self.group * self.code_bits() / 32
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
        matches!(self.value, Value::Int8 | Value::Table(_))
    }

    /// Whether the format stores weights as they are.
    pub const fn is_uncompressed(&self) -> bool {
        matches!(self.value, Value::Float(_))
    }
}

/// The format of that name, built in or described.
pub fn by_name(name: &str) -> Option<FormatRef> {
    ALL.iter().copied().find(|f| f.name == name).or_else(|| crate::described::described(name))
}
