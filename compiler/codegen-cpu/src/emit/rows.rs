//! `gather_rows` and `slice`: kernels that copy.

use super::walk::quads;
use crate::lanes::Lanes;

pub(super) fn gather_rows(dim: usize, cx: &mut Lanes<'_>) {
    let (x, rows, out) = (cx.arg(0), cx.arg(1), cx.arg(2));
    cx.for_items(|cx, r| {
        let at = cx.offset(rows, r, 4);
        let row = cx.load_i32(at, 0);
        let row = cx.widen(row);
        let (from, to) = (cx.offset(x, row, dim * 4), cx.offset(out, r, dim * 4));
        quads(cx, dim, |cx, quad| {
            let v = quad.load(cx, from, 0.0);
            quad.store(cx, v, to);
        });
    });
}

pub(super) fn slice(dim: usize, start: usize, len: usize, cx: &mut Lanes<'_>) {
    let (x, out) = (cx.arg(0), cx.arg(1));
    cx.for_items(|cx, t| {
        let row = cx.offset(x, t, dim * 4);
        let from = cx.iadd_imm(row, start as i64 * 4);
        let to = cx.offset(out, t, len * 4);
        quads(cx, len, |cx, quad| {
            let v = quad.load(cx, from, 0.0);
            quad.store(cx, v, to);
        });
    });
}
