//! Elementwise kernels: add, mul, silu, gelu.

use super::walk::quads;
use crate::lanes::Lanes;
use attar_kernel::Elementwise;

pub(super) fn elementwise(op: Elementwise, dim: usize, cx: &mut Lanes<'_>) {
    let binary = matches!(op, Elementwise::Add | Elementwise::Mul);
    let (a, b, out) = (cx.arg(0), cx.arg(1), cx.arg(1 + usize::from(binary)));
    cx.for_items(|cx, t| {
        let (a, b, out) = (cx.offset(a, t, dim * 4), cx.offset(b, t, dim * 4), cx.offset(out, t, dim * 4));
        quads(cx, dim, |cx, quad| {
            let x = quad.load(cx, a, 0.0);
            let y = match op {
                Elementwise::Add => {
                    let y = quad.load(cx, b, 0.0);
                    cx.vadd(x, y)
                }
                Elementwise::Mul => {
                    let y = quad.load(cx, b, 0.0);
                    cx.vmul(x, y)
                }
                Elementwise::Silu => cx.vsilu(x),
                Elementwise::Gelu => cx.vgelu(x),
            };
            quad.store(cx, y, out);
        });
    });
}
