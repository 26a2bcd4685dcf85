//! Codes of table formats, put together from their planes.

use crate::lanes::{I8x16, Lanes, Scalar};
use attar_format::planes::{QUAD, planes};
use attar_kernel::ActInt8Layout;

/// Quads of inputs in a group.
const QUADS: usize = ActInt8Layout::GROUP / QUAD;
/// Bytes of a row of codes.
const ROW: usize = 64;

/// The table's entries by sixteens, of codes of `bits` bits; `header` is the tensor's.
pub(super) fn load_table(cx: &mut Lanes<'_>, header: Scalar, bits: usize) -> Vec<I8x16> {
    (0..(1usize << bits).div_ceil(16)).map(|i| cx.load16_i8(header, 16 * i as i32)).collect()
}

/// Codes of four channels of a group, one vector for each quad of inputs, in order; `offset` is that of the channels'
/// lanes in the group's first row.
pub(super) fn each_quad(
    cx: &mut Lanes<'_>,
    bits: usize,
    codes: Scalar,
    offset: usize,
    mut each: impl FnMut(&mut Lanes<'_>, usize, I8x16),
) {
    let planes = planes(bits);
    // The row that each plane's bits were last taken from.
    let mut rows: Vec<Option<(usize, I8x16)>> = vec![None; planes.len()];
    for quad in 0..QUADS {
        let mut code: Option<I8x16> = None;
        for (plane, loaded) in planes.iter().zip(&mut rows) {
            let (row, bit) = plane.place(quad);
            let bytes = match *loaded {
                Some((at, bytes)) if at == row => bytes,
                _ => cx.load16_i8(codes, (offset + row * ROW) as i32),
            };
            *loaded = Some((row, bytes));
            let part = cx.byte_bits(bytes, bit, plane.low, plane.mask());
            code = Some(match code {
                Some(code) => cx.byte_or(code, part),
                None => part,
            });
        }
        if let Some(code) = code {
            each(cx, quad, code);
        }
    }
}

/// The codes of one input of every quad of a group, as i32: those whose byte of the group's first row is at `lane`.
pub(super) fn scalar_codes(cx: &mut Lanes<'_>, bits: usize, lane: Scalar) -> Vec<Scalar> {
    let rows: Vec<Scalar> = (0..bits).map(|row| cx.load_u8(lane, (row * ROW) as i32)).collect();
    let code = |cx: &mut Lanes<'_>, quad: usize| {
        let mut code = cx.int32(0);
        for plane in planes(bits) {
            let (row, bit) = plane.place(quad);
            let part = cx.ushr_imm(rows[row], bit);
            let part = cx.iand_imm(part, i64::from(plane.mask()));
            let part = cx.ishl_imm(part, plane.low);
            code = if plane.low == 0 { part } else { cx.ior(code, part) };
        }
        code
    };
    (0..QUADS).map(|quad| code(cx, quad)).collect()
}
