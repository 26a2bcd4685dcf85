//! Sums of weighted values: where they stand, how spans are joined, how results leave.

use super::finite;
use crate::emit::hadamard::hadamard;
use crate::emit::quantize::{QUADS, layout_of, some_groups};
use crate::lanes::{F32x4, Lanes, Scalar};
use crate::x86::{HeadKernel, Level};
use attar_artifact::manifest::KvType;
use attar_kernel::{ActInt8Layout, Activation, AttentionSpec};

/// Where sums of weighted values, maxima and totals stand: `[rows, Dh]`, `[rows]` and `[rows]`.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) sums: Scalar,
    pub(super) most: Scalar,
    pub(super) total: Scalar,
}

impl Sums {
    pub(super) fn scratch(cx: &mut Lanes<'_>, spec: &AttentionSpec, rows: usize) -> Sums {
        Sums {
            sums: cx.scratch(rows * spec.head_dim * 4),
            most: cx.scratch(rows * 4),
            total: cx.scratch(rows * 4),
        }
    }

    /// Those of one row.
    pub(super) fn row(&self, cx: &mut Lanes<'_>, spec: &AttentionSpec, row: Scalar) -> Sums {
        Sums {
            sums: cx.offset(self.sums, row, spec.head_dim * 4),
            most: cx.offset(self.most, row, 4),
            total: cx.offset(self.total, row, 4),
        }
    }
}

/// Joins spans of a row.
pub(super) struct Joiner {
    head_dim: usize,
    /// Inner functions that begin with a span and add one, where vectors are wider than Cranelift's.
    inner: Option<[Vec<u8>; 2]>,
}

impl Joiner {
    pub(super) fn new(spec: &AttentionSpec, cx: &Lanes<'_>) -> Result<Joiner, String> {
        let heads = HeadKernel::new(Level::of(cx.target()), spec.head_dim);
        let inner = heads.map(|h| Ok([h.copy()?, h.join()?])).transpose().map_err(inner_failed)?;
        Ok(Joiner { head_dim: spec.head_dim, inner })
    }

    /// One row: `to` takes a later span, which is the first when `is_first` holds.
    pub(super) fn take(&self, cx: &mut Lanes<'_>, to: &Sums, later: &Sums, is_first: Scalar) {
        if let Some([copy, join]) = &self.inner {
            cx.if_else(
                is_first,
                |cx| {
                    let (most, total) = (cx.load_f32(later.most, 0), cx.load_f32(later.total, 0));
                    cx.store_f32(most, to.most, 0);
                    cx.store_f32(total, to.total, 0);
                    cx.call_inner(copy.clone(), &[to.sums, later.sums]);
                },
                |cx| {
                    let args = [to.sums, later.sums, to.most, to.total, later.most, later.total];
                    cx.call_inner(join.clone(), &args);
                },
            );
            return;
        }
        let (later_most, later_total) = (cx.load_f32(later.most, 0), cx.load_f32(later.total, 0));
        cx.if_else(
            is_first,
            |cx| {
                cx.store_f32(later_most, to.most, 0);
                cx.store_f32(later_total, to.total, 0);
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(later.sums, d, 4), cx.offset(to.sums, d, 4));
                    let v = cx.load4(from, 0);
                    cx.store4(v, to, 0);
                });
            },
            |cx| {
                let (most, total) = (cx.load_f32(to.most, 0), cx.load_f32(to.total, 0));
                let new = cx.fmax(most, later_most);
                cx.store_f32(new, to.most, 0);
                let base = finite(cx, new);
                let (a, b) = (cx.fsub(most, base), cx.fsub(later_most, base));
                let (a, b) = (cx.exp2_up_to_0(a), cx.exp2_up_to_0(b));
                let kept = cx.fmul(total, a);
                let total = cx.fmuladd(later_total, b, kept);
                cx.store_f32(total, to.total, 0);
                let (a, b) = (cx.splat(a), cx.splat(b));
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(later.sums, d, 4), cx.offset(to.sums, d, 4));
                    let (old, new) = (cx.load4(to, 0), cx.load4(from, 0));
                    let kept = cx.vmul(old, a);
                    let sum = cx.vmuladd(new, b, kept);
                    cx.store4(sum, to, 0);
                });
            },
        );
    }
}

/// An inner function that the assembler refuses is a bug.
pub(super) fn inner_failed(e: iced_x86::IcedError) -> String {
    format!("bug: inner function: {e}")
}

/// How results leave: as f32, or as groups of int8 rows.
pub(super) struct Output {
    int8: Option<ActInt8Layout>,
    /// An inner function that divides and quantizes, where there is one.
    inner: Option<Vec<u8>>,
}

impl Output {
    pub(super) fn new(spec: &AttentionSpec, out: Activation, cx: &Lanes<'_>) -> Result<Output, String> {
        let width = spec.group() * spec.head_dim;
        let int8 = match out {
            Activation::F32 => None,
            Activation::Int8 if width.is_multiple_of(ActInt8Layout::GROUP) => {
                Some(layout_of(spec.heads * spec.head_dim)?)
            }
            Activation::Int8 => {
                return Err(format!("int8 rows of {width} channels per KV head, which is no multiple of 32"));
            }
        };
        let heads = HeadKernel::new(Level::of(cx.target()), spec.head_dim);
        let inner = match (heads, &int8) {
            (Some(heads), Some(layout)) if spec.kv != KvType::Int4 => {
                heads.finish(spec.group(), layout).map_err(inner_failed)?
            }
            _ => None,
        };
        Ok(Output { int8, inner })
    }

    /// Divides the sums of a KV head's query heads by their totals and stores them as a part of row `t` of `to`.
    pub(super) fn store(
        &self,
        cx: &mut Lanes<'_>,
        spec: &AttentionSpec,
        from: &Sums,
        to: Scalar,
        t: Scalar,
        head: Scalar,
    ) {
        let (group, dh) = (spec.group(), spec.head_dim);
        if let (Some(code), Some(layout)) = (&self.inner, &self.int8) {
            let groups = group * dh / ActInt8Layout::GROUP;
            let row = cx.offset(to, t, layout.stride);
            let codes = cx.offset(row, head, groups * ActInt8Layout::GROUP);
            let scale = cx.offset(row, head, groups * 4);
            let scale = cx.iadd_imm(scale, layout.scales_offset as i64);
            cx.call_inner(code.clone(), &[from.sums, from.total, codes, scale]);
            return;
        }
        let f32_row = cx.offset(to, t, spec.heads * dh * 4);
        let f32_part = cx.offset(f32_row, head, group * dh * 4);
        let quotients = if self.int8.is_some() { from.sums } else { f32_part };
        cx.for_const(group, 1, |cx, g| {
            let row = from.row(cx, spec, g);
            let to = cx.offset(quotients, g, dh * 4);
            let total = cx.load_splat(row.total, 0);
            cx.for_const(dh, 4, |cx, d| {
                let (from, to) = (cx.offset(row.sums, d, 4), cx.offset(to, d, 4));
                let v = cx.load4(from, 0);
                let v = cx.vdiv(v, total);
                cx.store4(v, to, 0);
            });
            if spec.kv == KvType::Int4 {
                hadamard(cx, dh, to, to);
            }
        });
        if let Some(layout) = &self.int8 {
            let groups = group * dh / ActInt8Layout::GROUP;
            let to = cx.offset(to, t, layout.stride);
            let first = cx.imul_imm(head, groups as i64);
            some_groups(cx, layout, to, first, groups, |cx, first| {
                let at = cx.offset(quotients, first, 4);
                std::array::from_fn::<F32x4, QUADS, _>(|i| cx.load4(at, 16 * i as i32))
            });
        }
    }
}
