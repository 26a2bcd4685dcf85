//! `Q3_K`: `d (s - 32) q`. Block of 256 in 16 groups of 16: 32 bytes of third bits, 64 bytes of 2-bit codes, 16 6-bit
//! scales in 12 bytes, f16 `d`. A code is its two bits, less 4 when its third bit is clear.

use super::{GgmlType, each_block, half_at};

pub const Q3_K: GgmlType = GgmlType {
    name: "Q3_K",
    id: 11,
    block_values: 256,
    block_bytes: 110,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 110], y: &mut [f32; 256]) {
    let (high, codes, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (i, y) in y.iter_mut().enumerate() {
        let (half, row, col) = (i / 128, i % 128 / 32, i % 32);
        let low = (codes[half * 32 + col] >> (2 * row) & 3).cast_signed();
        let q = low - if high[col] >> (i / 32) & 1 == 1 { 0 } else { 4 };
        let g = i / 16;
        let s = (scales[g % 8] >> (4 * (g / 8)) & 0xf) | (scales[8 + g % 4] >> (2 * (g / 4)) & 3) << 4;
        *y = (d * f32::from(s.cast_signed() - 32)) * f32::from(q);
    }
}
