//! `n6`: 6-bit codes through a table of 64 entries; 6.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - 32) * (table[code[n, k]] + 2 * choice[n, g])`, `g = k / 32`; scales and choices as
//! in `n4`. docs/formats.md has the measurements.

use super::{Format, Scale, Table, Value};

/// 6-bit weights.
pub const N6: Format = Format {
    name: "n6",
    value: Value::Table(TABLE),
    group: 32,
    scale: Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
    source: "as n4, with more entries; measured in docs/formats.md",
};

const _: () = assert!(N6.bits_per_weight() == 6.25 && TABLE.is_sound(2));

/// Fitted to normally distributed weights by Lloyd's algorithm.
const TABLE: Table = Table {
    bits: 6,
    entries: &[
        -127, -121, -107, -100, -94, -87, -81, -75, -70, -64, -60, -56, -52, -48, -44, -41, -37, -35, -32,
        -29, -27, -24, -22, -19, -17, -15, -12, -10, -8, -5, -3, -1, 1, 3, 4, 6, 8, 11, 13, 15, 17, 19, 21,
        23, 25, 28, 30, 32, 35, 38, 41, 44, 47, 51, 55, 59, 63, 68, 73, 79, 86, 95, 102, 106,
    ],
    shift: 2,
};
