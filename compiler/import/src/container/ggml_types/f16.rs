//! `F16`: IEEE half precision.

use super::{GgmlType, each_block, half_at};

pub const F16: GgmlType =
    GgmlType { name: "F16", id: 1, block_values: 1, block_bytes: 2, decode: |b, y| each_block(b, y, block) };

fn block(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = half_at(b, 0);
}
