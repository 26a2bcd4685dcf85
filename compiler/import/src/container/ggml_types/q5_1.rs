//! `Q5_1`: `d q + m`. Block of 32: f16 `d`, f16 `m`, 32 fifth bits, 16 bytes of nibbles.

use super::{GgmlType, each_block, half_at, nibbles};

pub const Q5_1: GgmlType = GgmlType {
    name: "Q5_1",
    id: 7,
    block_values: 32,
    block_bytes: 24,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    nibbles(&b[8..24], |i, q| {
        let q = q | ((high >> i & 1) << 4) as u8;
        y[i] = d * f32::from(q) + m;
    });
}
