//! `Q4_1`: `d q + m`. Block of 32: f16 `d`, f16 `m`, 16 bytes of nibbles.

use super::{GgmlType, each_block, half_at, nibbles};

pub const Q4_1: GgmlType = GgmlType {
    name: "Q4_1",
    id: 3,
    block_values: 32,
    block_bytes: 20,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    nibbles(&b[4..20], |i, q| y[i] = d * f32::from(q) + m);
}
