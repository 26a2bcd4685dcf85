//! `n5`: 5-bit codes through a table of 32 entries; 5.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - 32) * (table[code[n, k]] + 3 * choice[n, g])`, `g = k / 32`; scales and choices as
//! in `n4`. docs/formats.md has the measurements.

use super::{Format, Scale, Table, Value};

/// 5-bit weights.
pub const N5: Format = Format {
    name: "n5",
    value: Value::Table(TABLE),
    group: 32,
    scale: Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
    source: "as n4, with more entries; measured in docs/formats.md",
};

const _: () = assert!(N5.bits_per_weight() == 5.25 && TABLE.is_sound(2));

/// Fitted to normally distributed weights by Lloyd's algorithm.
const TABLE: Table = Table {
    bits: 5,
    entries: &[
        -127, -107, -94, -84, -75, -66, -58, -50, -43, -36, -30, -24, -19, -13, -8, -3, 2, 7, 11, 16, 21, 26,
        31, 37, 43, 50, 57, 65, 73, 83, 97, 107,
    ],
    shift: 3,
};
