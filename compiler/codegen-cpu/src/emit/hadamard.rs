//! The Hadamard transform of a head, as `attar_kernel::hadamard` defines it.

use crate::lanes::{F32x4, Lanes, Scalar};
use attar_kernel::hadamard::{factor, order};

/// Rotates one head, whose width is a multiple of 16, from `from` to `to` (which may be the same).
pub(super) fn hadamard(cx: &mut Lanes<'_>, head_dim: usize, from: Scalar, to: Scalar) {
    let order = order(head_dim);
    let factor = cx.splat_const(factor(head_dim));
    cx.for_const(head_dim, 16, |cx, d| {
        let (from, to) = (cx.offset(from, d, 4), cx.offset(to, d, 4));
        let v = std::array::from_fn(|i| {
            let v = cx.load4(from, 16 * i as i32);
            let v = cx.vmul(v, factor);
            cx.vhadamard(v)
        });
        let v = four(cx, v);
        v.into_iter().enumerate().for_each(|(i, v)| cx.store4(v, to, 16 * i as i32));
    });
    // As few passes over memory as may be: two steps at once where two are left.
    let mut apart = 16;
    while apart < order {
        let radix = if order / apart >= 4 { 4 } else { 2 };
        cx.for_const(head_dim, radix * apart, |cx, first| {
            let first = cx.offset(to, first, 4);
            cx.for_const(apart, 4, |cx, i| {
                let at = cx.offset(first, i, 4);
                let place = |i: usize| (4 * i * apart) as i32;
                if radix == 4 {
                    let v = std::array::from_fn(|i| cx.load4(at, place(i)));
                    let v = four(cx, v);
                    v.into_iter().enumerate().for_each(|(i, v)| cx.store4(v, at, place(i)));
                } else {
                    let (a, b) = (cx.load4(at, 0), cx.load4(at, place(1)));
                    let (a, b) = two(cx, a, b);
                    cx.store4(a, at, 0);
                    cx.store4(b, at, place(1));
                }
            });
        });
        apart *= radix;
    }
}

fn two(cx: &mut Lanes<'_>, a: F32x4, b: F32x4) -> (F32x4, F32x4) {
    (cx.vadd(a, b), cx.vsub(a, b))
}

fn four(cx: &mut Lanes<'_>, [a, b, c, d]: [F32x4; 4]) -> [F32x4; 4] {
    let ((a, b), (c, d)) = (two(cx, a, b), two(cx, c, d));
    let ((a, c), (b, d)) = (two(cx, a, c), two(cx, b, d));
    [a, b, c, d]
}
