//! `F32`: plain values.

use super::{GgmlType, each_block};

pub const F32: GgmlType =
    GgmlType { name: "F32", id: 0, block_values: 1, block_bytes: 4, decode: |b, y| each_block(b, y, block) };

fn block(b: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
}
