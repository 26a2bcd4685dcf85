//! `Q5_0`: `d (q - 16)`. Block of 32: f16 `d`, 32 fifth bits, 16 bytes of nibbles.

use super::{GgmlType, each_block, half_at, nibbles};

pub const Q5_0: GgmlType = GgmlType {
    name: "Q5_0",
    id: 6,
    block_values: 32,
    block_bytes: 22,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    nibbles(&b[6..22], |i, q| {
        let q = q | ((high >> i & 1) << 4) as u8;
        y[i] = d * (f32::from(q) - 16.0);
    });
}
