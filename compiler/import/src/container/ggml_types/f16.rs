//! `F16`: IEEE half precision.

use super::GgmlType;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

pub const F16: GgmlType = GgmlType { name: "F16", id: 1, block_values: 1, block_bytes: 2, decode };

/// Values that are put into order at a time, for the processor to convert several with one instruction.
const AT_ONCE: usize = 1024;

fn decode(bytes: &[u8], values: &mut [f32]) {
    let mut bits = [0u16; AT_ONCE];
    for (bytes, values) in bytes.as_chunks::<2>().0.chunks(AT_ONCE).zip(values.chunks_mut(AT_ONCE)) {
        let bits = &mut bits[..values.len()];
        bits.iter_mut().zip(bytes).for_each(|(bits, bytes)| *bits = u16::from_le_bytes(*bytes));
        bits.reinterpret_cast::<f16>().convert_to_f32_slice(values);
    }
}
