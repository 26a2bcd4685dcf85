//! `quantize`: f32 activations to int8 in groups of 32, and the group step other kernels end in.

use crate::lanes::{F32x4, Lanes, Scalar};
use crate::x86::{Level, rows};
use attar_kernel::ActInt8Layout;

pub(super) const QUADS: usize = ActInt8Layout::GROUP / 4;

pub(super) fn quantize(dim: usize, cx: &mut Lanes<'_>) -> Result<(), String> {
    let layout = layout_of(dim)?;
    let (x, out) = (cx.arg(0), cx.arg(1));
    let inner = inner(cx, dim, None, false)?;
    cx.for_items(|cx, t| {
        let (row, to) = (cx.offset(x, t, dim * 4), cx.offset(out, t, layout.stride));
        if let Some(code) = inner {
            cx.call_inner(code, &[row, row, to]);
            return;
        }
        groups(cx, &layout, to, |cx, first| {
            let at = cx.offset(row, first, 4);
            std::array::from_fn(|i| cx.load4(at, 16 * i as i32))
        });
    });
    Ok(())
}

/// The inner function that normalises (with `eps`) and quantizes a row, where the target has one.
pub(super) fn inner(
    cx: &Lanes<'_>,
    dim: usize,
    eps: Option<f32>,
    gain: bool,
) -> Result<Option<Vec<u8>>, String> {
    let level = Level::of(cx.target());
    let code = level.map(|level| rows::norm_quantize(level, dim, eps, gain)).transpose();
    code.map_err(|e| format!("bug: inner function: {e}"))
}

/// Layout of int8 rows of `dim` values.
pub(super) fn layout_of(dim: usize) -> Result<ActInt8Layout, String> {
    if dim.is_multiple_of(ActInt8Layout::GROUP) && dim > 0 {
        Ok(ActInt8Layout::new(dim))
    } else {
        Err(format!("int8 activations of width {dim}, which is no multiple of {}", ActInt8Layout::GROUP))
    }
}

/// Quantizes a row to `out`, group by group; `load` yields the 32 values that start at its index argument.
pub(super) fn groups(
    cx: &mut Lanes<'_>,
    layout: &ActInt8Layout,
    out: Scalar,
    load: impl FnMut(&mut Lanes<'_>, Scalar) -> [F32x4; QUADS],
) {
    let first = cx.int(0);
    some_groups(cx, layout, out, first, layout.groups, load);
}

/// Quantizes `count` groups of a row from group `first` on; `load` is given indices relative to the first of them.
pub(super) fn some_groups(
    cx: &mut Lanes<'_>,
    layout: &ActInt8Layout,
    out: Scalar,
    first: Scalar,
    count: usize,
    mut load: impl FnMut(&mut Lanes<'_>, Scalar) -> [F32x4; QUADS],
) {
    let at = cx.offset(out, first, 4);
    let scales = cx.iadd_imm(at, layout.scales_offset as i64);
    let sums = cx.iadd_imm(at, layout.sums_offset as i64);
    let out = cx.offset(out, first, ActInt8Layout::GROUP);
    cx.for_const(count, 1, |cx, g| {
        let first = cx.imul_imm(g, ActInt8Layout::GROUP as i64);
        let x = load(cx, first);
        let codes = cx.iadd(out, first);
        let (scale, sum) = group(cx, x, codes);
        let at = cx.offset(scales, g, 4);
        cx.store_f32(scale, at, 0);
        let at = cx.offset(sums, g, 4);
        cx.store_i32(sum, at, 0);
    });
}

/// Stores the codes of one group and yields its scale and the sum of its codes. A NaN or infinity makes the scale NaN,
/// so that it is not lost.
fn group(cx: &mut Lanes<'_>, x: [F32x4; QUADS], codes: Scalar) -> (Scalar, Scalar) {
    let zero = cx.splat_const(0.0);
    let mut largest = zero;
    let mut poison = zero;
    for v in x {
        let size = cx.vabs(v);
        largest = cx.vmax(size, largest);
        let nothing = cx.vmul(v, zero);
        poison = cx.vadd(poison, nothing);
    }
    let amax = cx.vmax_across(largest);
    let poison = cx.vsum(poison);
    let (none, limit) = (cx.f32(0.0), cx.f32(127.0));
    let inverse = cx.fdiv(limit, amax);
    let some = cx.fcmp(crate::lanes::FloatCmp::GreaterThan, amax, none);
    let inverse = cx.select(some, inverse, none);
    let inverse = cx.splat(inverse);
    let (low, high) = (cx.splat_const(-127.0), cx.splat_const(127.0));
    let mut sum = cx.splat_const_i32(0);
    for (i, quads) in x.chunks_exact(4).enumerate() {
        let parts = std::array::from_fn(|j| {
            let v = cx.vmul(quads[j], inverse);
            let v = cx.vmax(v, low);
            let v = cx.vmin(v, high);
            let (_, code) = cx.vround(v);
            sum = cx.viadd(sum, code);
            code
        });
        cx.store16_i8(parts, codes, 16 * i as i32);
    }
    let scale = cx.fdiv(amax, limit);
    (cx.fadd(scale, poison), cx.visum(sum))
}
