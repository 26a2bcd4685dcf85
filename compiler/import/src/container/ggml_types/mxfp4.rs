//! `MXFP4`: `2^(e - 128) table[q]`. Block of 32: exponent byte `e`, 16 bytes of nibbles, each an E2M1 number; the table
//! holds twice its value.   Source: OCP Microscaling Formats (MX) Specification 1.0.

use super::{GgmlType, each_block, nibbles};

pub const MXFP4: GgmlType = GgmlType {
    name: "MXFP4",
    id: 39,
    block_values: 32,
    block_bytes: 17,
    decode: |b, y| each_block(b, y, block),
};

const TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of the scale that `e` stands for; exponents 0 and 1 give subnormals.
fn half_scale(e: u8) -> f32 {
    let e = u32::from(e);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

fn block(b: &[u8; 17], y: &mut [f32; 32]) {
    let d = half_scale(b[0]);
    nibbles(&b[1..17], |i, q| y[i] = d * f32::from(TABLE[usize::from(q)]));
}
