//! `n2`: 2-bit codes through a table of 4 entries; 2.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - 32) * (table[code[n, k]] + 12 * choice[n, g])`, `g = k / 32`; scales and choices as
//! in `n4`. docs/formats.md has the measurements.

use super::{Format, Scale, Table, Value};

/// 2-bit weights. Plain rounding to them destroys a model; they are for algorithms that weigh errors by activations.
pub const N2: Format = Format {
    name: "n2",
    value: Value::Table(TABLE),
    group: 32,
    scale: Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
    source: "as n4, with fewer entries; measured in docs/formats.md",
};

const _: () = assert!(N2.bits_per_weight() == 2.25 && TABLE.is_sound(2));

/// Fitted to normally distributed weights by Lloyd's algorithm.
const TABLE: Table = Table { bits: 2, entries: &[-88, -31, 20, 91], shift: 12 };
