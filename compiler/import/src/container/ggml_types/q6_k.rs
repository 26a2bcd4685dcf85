//! `Q6_K`: `d s (q - 32)`. Block of 256 in 16 groups of 16: 128 bytes of low nibbles, 64 bytes of upper two bits, 16
//! signed scales, f16 `d`.

use super::{GgmlType, each_block, half_at};

pub const Q6_K: GgmlType = GgmlType {
    name: "Q6_K",
    id: 14,
    block_values: 256,
    block_bytes: 210,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 210], y: &mut [f32; 256]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (i, y) in y.iter_mut().enumerate() {
        let (half, row, col) = (i / 128, i % 128 / 32, i % 32);
        let l = low[half * 64 + row % 2 * 32 + col] >> (4 * (row / 2)) & 0xf;
        let h = high[half * 32 + col] >> (2 * row) & 3;
        let q = (l | h << 4).cast_signed() - 32;
        *y = (d * f32::from(scales[i / 16].cast_signed())) * f32::from(q);
    }
}
