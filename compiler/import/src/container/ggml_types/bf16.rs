//! `BF16`: the upper half of an f32.

use super::{GgmlType, each_block};

pub const BF16: GgmlType = GgmlType {
    name: "BF16",
    id: 30,
    block_values: 1,
    block_bytes: 2,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
}
