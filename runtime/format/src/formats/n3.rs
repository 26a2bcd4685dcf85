//! `n3`: 3-bit codes through a table of 8 entries; 3.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - 32) * (table[code[n, k]] + 8 * choice[n, g])`, `g = k / 32`; scales and choices as
//! in `n4`. docs/formats.md has the measurements.

use super::{Format, Scale, Table, Value};

/// 3-bit weights.
pub const N3: Format = Format {
    name: "n3",
    value: Value::Table(TABLE),
    group: 32,
    scale: Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
    source: "as n4, with fewer entries; measured in docs/formats.md",
};

const _: () = assert!(N3.bits_per_weight() == 3.25 && TABLE.is_sound(2));

/// Fitted to normally distributed weights by Lloyd's algorithm.
const TABLE: Table = Table { bits: 3, entries: &[-97, -64, -39, -16, 7, 30, 59, 103], shift: 8 };
