//! Kernels that reduce a row: rms_norm, layer_norm, softmax.

use super::quantize;
use super::walk::{fold, quads};
use crate::lanes::{Lanes, Scalar};
use attar_kernel::Activation;

pub(super) fn rms_norm(
    dim: usize,
    eps: f32,
    gain: bool,
    out: Activation,
    cx: &mut Lanes<'_>,
) -> Result<(), String> {
    let (x, g, to) = (cx.arg(0), cx.arg(1), cx.arg(1 + usize::from(gain)));
    let int8 = match out {
        Activation::F32 => None,
        Activation::Int8 => Some(quantize::layout_of(dim)?),
    };
    let inner = if int8.is_some() { quantize::inner(cx, dim, Some(eps), gain)? } else { None };
    cx.for_items(|cx, t| {
        let row = cx.offset(x, t, dim * 4);
        if let (Some(layout), Some(code)) = (&int8, &inner) {
            let to = cx.offset(to, t, layout.stride);
            cx.call_inner(code.clone(), &[row, g, to]);
            return;
        }
        let inverse = rms_factor(cx, row, dim, eps);
        let inverse = cx.splat(inverse);
        if let Some(layout) = &int8 {
            let to = cx.offset(to, t, layout.stride);
            quantize::groups(cx, layout, to, |cx, first| {
                let (at, g) = (cx.offset(row, first, 4), cx.offset(g, first, 4));
                std::array::from_fn(|i| {
                    let v = cx.load4(at, 16 * i as i32);
                    let v = cx.vmul(v, inverse);
                    if !gain {
                        return v;
                    }
                    let g = cx.load4(g, 16 * i as i32);
                    cx.vmul(v, g)
                })
            });
            return;
        }
        let to = cx.offset(to, t, dim * 4);
        quads(cx, dim, |cx, quad| {
            let v = quad.load(cx, row, 0.0);
            let mut v = cx.vmul(v, inverse);
            if gain {
                let g = quad.load(cx, g, 0.0);
                v = cx.vmul(v, g);
            }
            quad.store(cx, v, to);
        });
    });
    Ok(())
}

/// `1 / sqrt(mean(x^2) + eps)` of an f32 row.
pub(super) fn rms_factor(cx: &mut Lanes<'_>, row: Scalar, dim: usize, eps: f32) -> Scalar {
    let squares = fold(cx, dim, 0.0, |cx, sum, quad| {
        let v = quad.load(cx, row, 0.0);
        cx.vmuladd(v, v, sum)
    });
    let total = cx.vsum(squares);
    let (count, eps, one) = (cx.f32(dim as f32), cx.f32(eps), cx.f32(1.0));
    let mean = cx.fdiv(total, count);
    let mean = cx.fadd(mean, eps);
    let root = cx.fsqrt(mean);
    cx.fdiv(one, root)
}

pub(super) fn layer_norm(dim: usize, eps: f32, cx: &mut Lanes<'_>) {
    let (x, g, b, out) = (cx.arg(0), cx.arg(1), cx.arg(2), cx.arg(3));
    cx.for_items(|cx, t| {
        let (row, to) = (cx.offset(x, t, dim * 4), cx.offset(out, t, dim * 4));
        let sum = fold(cx, dim, 0.0, |cx, sum, quad| {
            let v = quad.load(cx, row, 0.0);
            cx.vadd(sum, v)
        });
        let count = cx.f32(dim as f32);
        let total = cx.vsum(sum);
        let mean = cx.fdiv(total, count);
        let mean = cx.splat(mean);
        // The tail is summed apart: lanes beyond the row would count as values of zero, not of the mean.
        let squares = fold(cx, dim / 4 * 4, 0.0, |cx, sum, quad| {
            let v = quad.load(cx, row, 0.0);
            let d = cx.vsub(v, mean);
            cx.vmuladd(d, d, sum)
        });
        let mut total = cx.vsum(squares);
        let mean0 = cx.lane(mean, 0);
        for i in dim / 4 * 4..dim {
            let v = cx.load_f32(row, 4 * i as i32);
            let d = cx.fsub(v, mean0);
            total = cx.fmuladd(d, d, total);
        }
        let variance = cx.fdiv(total, count);
        let (eps, one) = (cx.f32(eps), cx.f32(1.0));
        let variance = cx.fadd(variance, eps);
        let root = cx.fsqrt(variance);
        let inverse = cx.fdiv(one, root);
        let inverse = cx.splat(inverse);
        quads(cx, dim, |cx, quad| {
            let v = quad.load(cx, row, 0.0);
            let d = cx.vsub(v, mean);
            let d = cx.vmul(d, inverse);
            let (g, b) = (quad.load(cx, g, 0.0), quad.load(cx, b, 0.0));
            let y = cx.vmuladd(d, g, b);
            quad.store(cx, y, to);
        });
    });
}

pub(super) fn softmax(dim: usize, cx: &mut Lanes<'_>) {
    let (x, out) = (cx.arg(0), cx.arg(1));
    cx.for_items(|cx, t| {
        let (row, to) = (cx.offset(x, t, dim * 4), cx.offset(out, t, dim * 4));
        let largest = fold(cx, dim, f32::NEG_INFINITY, |cx, most, quad| {
            let v = quad.load(cx, row, f32::NEG_INFINITY);
            cx.vmax(v, most)
        });
        let largest = cx.vmax_across(largest);
        let largest = cx.splat(largest);
        let sum = fold(cx, dim, 0.0, |cx, sum, quad| {
            let v = quad.load(cx, row, f32::NEG_INFINITY);
            let v = cx.vsub(v, largest);
            let e = cx.vexp(v);
            quad.store(cx, e, to);
            cx.vadd(sum, e)
        });
        let total = cx.vsum(sum);
        let total = cx.splat(total);
        quads(cx, dim, |cx, quad| {
            let e = quad.load(cx, to, 0.0);
            let y = cx.vdiv(e, total);
            quad.store(cx, y, to);
        });
    });
}
