//! `IQ4_NL`: `d table[q]`. Block of 32: f16 `d`, 16 bytes of nibbles that index a fixed table.

use super::{GgmlType, each_block, half_at, nibbles};

pub const IQ4_NL: GgmlType = GgmlType {
    name: "IQ4_NL",
    id: 20,
    block_values: 32,
    block_bytes: 18,
    decode: |b, y| each_block(b, y, block),
};

const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn block(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..18], |i, q| y[i] = d * f32::from(TABLE[usize::from(q)]));
}
