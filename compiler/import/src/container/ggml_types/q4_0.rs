//! `Q4_0`: `d (q - 8)`. Block of 32: f16 `d`, 16 bytes of nibbles.

use super::{GgmlType, each_block, half_at, nibbles};

pub const Q4_0: GgmlType = GgmlType {
    name: "Q4_0",
    id: 2,
    block_values: 32,
    block_bytes: 18,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..18], |i, q| y[i] = d * (f32::from(q) - 8.0));
}
