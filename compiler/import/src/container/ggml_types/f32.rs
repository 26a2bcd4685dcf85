//! `F32`: plain values.

use super::GgmlType;

pub const F32: GgmlType = GgmlType { name: "F32", id: 0, block_values: 1, block_bytes: 4, decode };

fn decode(b: &[u8], y: &mut [f32]) {
    y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
}
