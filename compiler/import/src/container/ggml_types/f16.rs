//! `F16`: IEEE half precision.

use super::{GgmlType, half_at};

pub const F16: GgmlType = GgmlType { name: "F16", id: 1, block_values: 1, block_bytes: 2, decode };

fn decode(b: &[u8], y: &mut [f32]) {
    y[0] = half_at(b, 0);
}
