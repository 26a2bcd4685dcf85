//! Walking rows four values at a time, with a tail when the width is no multiple of four.

use crate::lanes::{F32x4, Lanes, Scalar};

/// Up to four neighbouring values of a row: where they stand, and how many there are.
#[derive(Clone, Copy)]
pub(super) struct Quad {
    /// Byte offset from the start of an f32 row.
    offset: Scalar,
    count: usize,
}

/// `body` for each four values of a row of `width`, then for the rest. Emits the body at most twice.
pub(super) fn quads(cx: &mut Lanes<'_>, width: usize, mut body: impl FnMut(&mut Lanes<'_>, Quad)) {
    let whole = width / 4 * 4;
    cx.for_const(whole, 4, |cx, i| {
        let offset = cx.imul_imm(i, 4);
        body(cx, Quad { offset, count: 4 });
    });
    if whole < width {
        let offset = cx.int(whole as i64 * 4);
        body(cx, Quad { offset, count: width - whole });
    }
}

impl Quad {
    /// Loads from an f32 row; missing lanes hold `fill`.
    pub(super) fn load(self, cx: &mut Lanes<'_>, row: Scalar, fill: f32) -> F32x4 {
        let at = cx.iadd(row, self.offset);
        if self.count == 4 { cx.load4(at, 0) } else { cx.load4_part(at, 0, self.count, fill) }
    }

    /// Stores to an f32 row.
    pub(super) fn store(self, cx: &mut Lanes<'_>, value: F32x4, row: Scalar) {
        let at = cx.iadd(row, self.offset);
        if self.count == 4 { cx.store4(value, at, 0) } else { cx.store4_part(value, at, 0, self.count) }
    }
}

/// Folds a row: `first`, then `step(accumulator, quad)` in ascending order.
pub(super) fn fold(
    cx: &mut Lanes<'_>,
    width: usize,
    first: f32,
    mut step: impl FnMut(&mut Lanes<'_>, F32x4, Quad) -> F32x4,
) -> F32x4 {
    let first = cx.splat_const(first);
    let sum = cx.var(first);
    quads(cx, width, |cx, quad| {
        let old = cx.get(&sum);
        let new = step(cx, old, quad);
        cx.set(&sum, new);
    });
    cx.get(&sum)
}
