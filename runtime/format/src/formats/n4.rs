//! `n4`: 4-bit codes through a 16-entry table; 4.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - bias) * (table[code[n, k]] + choice[n, g] * shift)`, `g = k / 32`. The
//! scale `s` (7 bits) and the choice (1 bit) share the group's byte. Table and shift are stored once per tensor.

use super::{Format, Scale, Value};

/// 4-bit weights, the default for linear layers.
pub const N4: Format = Format {
    name: "n4",
    value: Value::Table4,
    group: 32,
    scale: Scale::RowF32Field8 { bias: 0 },
    source: "non-linear 4-bit grids: Dettmers et al. 2023, arXiv:2305.14314; measured in docs/formats.md",
};

const _: () = assert!(N4.bits_per_weight() == 4.25);

/// The default table: a cubic spaced more densely near zero.
pub const N4_TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// What a group adds to each table entry when its choice bit is set.
pub const N4_SHIFT: i8 = 4;
