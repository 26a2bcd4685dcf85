//! `n4`: 4-bit codes through a 16-entry table; 4.25 bits per weight and one f32 per row.
//!
//! `w[n, k] = row_scale[n] * (s[n, g] - 32) * (table[code[n, k]] + 4 * choice[n, g])`, `g = k / 32`. A group's byte is
//! `(s << 2) | choice`: a signed scale of magnitude up to 31, whose sign turns the table over, and one of four
//! places of the table. Table and shift (the 4) are stored with each tensor. docs/formats.md has the measurements.

use super::{Format, Scale, Table, Value};

/// 4-bit weights, the default for linear layers.
pub const N4: Format = Format {
    name: "n4",
    value: Value::Table(TABLE),
    group: 32,
    scale: Scale::RowF32Field8 { bias: 32, choice_bits: 2 },
    source: "non-linear 4-bit grids: Dettmers et al. 2023, arXiv:2305.14314; measured in docs/formats.md",
};

const _: () = assert!(N4.bits_per_weight() == 4.25 && TABLE.is_sound(2));

/// Fitted to normally distributed weights by Lloyd's algorithm.
const TABLE: Table = Table {
    bits: 4,
    entries: &[-127, -101, -79, -62, -47, -34, -22, -10, 1, 13, 25, 37, 51, 66, 82, 110],
    shift: 4,
};
