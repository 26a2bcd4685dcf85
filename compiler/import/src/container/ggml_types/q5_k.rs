//! `Q5_K`: `d s q - dmin m`. Block of 256 in 8 groups of 32: f16 `d`, f16 `dmin`, eight 6-bit pairs (`s`, `m`) in 12
//! bytes, 32 bytes of fifth bits (bit `g` of byte `i` belongs to value `i` of group `g`), 128 bytes of nibbles as in
//! `Q4_K`.

use super::{GgmlType, each_block, half_at, scale_min};

pub const Q5_K: GgmlType = GgmlType {
    name: "Q5_K",
    id: 13,
    block_values: 256,
    block_bytes: 176,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (high, codes) = (&b[16..48], &b[48..176]);
    for (g, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, m) = scale_min(&b[4..16], g);
        let (scale, min) = (d * s, dmin * m);
        for ((y, byte), high) in y.iter_mut().zip(&codes[g / 2 * 32..]).zip(high) {
            let q = (byte >> (4 * (g % 2)) & 0xf) | (high >> g & 1) << 4;
            *y = scale * f32::from(q) - min;
        }
    }
}
