//! `Q2_K`: `d s q - dmin m`. Block of 256 in 16 groups of 16: 16 bytes of (`s`, `m`) nibbles, 64 bytes of 2-bit codes,
//! f16 `d`, f16 `dmin`. Each run of 32 code bytes holds four rows of 32 values, lowest bits first.

use super::{GgmlType, each_block, half_at};

pub const Q2_K: GgmlType = GgmlType {
    name: "Q2_K",
    id: 10,
    block_values: 256,
    block_bytes: 84,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, codes) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let (half, row, col) = (i / 128, i % 128 / 32, i % 32);
        let q = codes[half * 32 + col] >> (2 * row) & 3;
        let s = scales[i / 16];
        *y = (d * f32::from(s & 0xf)) * f32::from(q) - dmin * f32::from(s >> 4);
    }
}
