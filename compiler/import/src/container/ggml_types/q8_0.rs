//! `Q8_0`: `d q`. Block of 32: f16 `d`, 32 signed bytes.

use super::{GgmlType, each_block, half_at};

pub const Q8_0: GgmlType = GgmlType {
    name: "Q8_0",
    id: 8,
    block_values: 32,
    block_bytes: 34,
    decode: |b, y| each_block(b, y, block),
};

fn block(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..34]) {
        *y = f32::from(q.cast_signed()) * d;
    }
}
