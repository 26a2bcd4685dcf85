//! `Q4_K`: `d s q - dmin m`. Block of 256 in 8 groups of 32: f16 `d`, f16 `dmin`, eight 6-bit pairs (`s`, `m`) in 12
//! bytes, 128 bytes of nibbles. Each run of 32 bytes holds one group in its low and the next in its high nibbles.

use super::{GgmlType, each_block, half_at, scale_min};

pub const Q4_K: GgmlType = GgmlType {
    name: "Q4_K",
    id: 12,
    block_values: 256,
    block_bytes: 144,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let codes = &b[16..144];
    for (g, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(&b[4..16], g);
        let (scale, min) = (d * s, dmin * m);
        for (y, byte) in y.iter_mut().zip(&codes[g / 2 * 32..]) {
            *y = scale * f32::from(byte >> (4 * (g % 2)) & 0xf) - min;
        }
    }
}
