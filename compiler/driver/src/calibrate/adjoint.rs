//! Reverse-mode differentiation of the dense evaluator: from the gradient of a node's result to those of its operands.
//!
//! Like [`super::dense`] it computes one window on one thread, in f32 with sums in one order.

use super::dense::{self, Operand, lane_sum, linear, paired};
use attar_ir::ops::{Attention, Rope};
use attar_ir::{Graph, NodeId, OpKind};
use attar_pass::Result;
use attar_passes::quantize::vector_level::{Level, Work};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Gradients for the operands of a node that are `wanted`, given `gradient`, that of its result. Operands that are indices have
/// none.
///
/// # Errors
/// As [`dense::evaluate`].
pub(crate) fn gradients(
    graph: &Graph,
    node: NodeId,
    operands: &[Operand<'_>],
    widths: &[usize],
    gradient: &[f32],
    wanted: &[bool],
) -> Result<Vec<Option<Vec<f32>>>> {
    Level::widest().run(Differentiated { graph, node, operands, widths, gradient, wanted })
}

/// A node to differentiate with the vectors of whoever calls it.
struct Differentiated<'a> {
    graph: &'a Graph,
    node: NodeId,
    operands: &'a [Operand<'a>],
    widths: &'a [usize],
    gradient: &'a [f32],
    wanted: &'a [bool],
}

impl Work for Differentiated<'_> {
    type Output = Result<Vec<Option<Vec<f32>>>>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        let Differentiated { graph, node, operands, widths, gradient, wanted } = self;
        let wrong = || dense::unsupported(graph, node);
        let real = |i: usize| operands.get(i).and_then(Operand::real).ok_or_else(wrong);
        let index = |i: usize| operands.get(i).and_then(Operand::index).ok_or_else(wrong);
        let width = |i: usize| widths.get(i).copied().unwrap_or(0).max(1);
        let want = |i: usize| wanted.get(i).copied().unwrap_or(false);
        let dy = gradient;
        let mut out: Vec<Option<Vec<f32>>> = vec![None; operands.len()];
        match graph.op(node) {
            OpKind::Embed(_) => {
                if want(1) {
                    out[1] = Some(scattered(real(1)?.len(), width(1), index(0)?, dy));
                }
            }
            OpKind::GatherRows(_) => {
                if want(0) {
                    out[0] = Some(scattered(real(0)?.len(), width(0), index(1)?, dy));
                }
            }
            OpKind::Linear(_) => {
                let (x, w, k) = (real(0)?, real(1)?, width(1));
                let n = w.len() / k;
                if want(0) {
                    out[0] = Some(product(dy, n, w, k));
                }
                if want(1) {
                    out[1] = Some(transposed_product(dy, n, x, k));
                }
                if want(2) {
                    out[2] = Some(column_sums(dy, n));
                }
            }
            OpKind::RmsNorm(norm) => {
                let gain = if operands.len() > 1 { Some(real(1)?) } else { None };
                let (dx, dg) = rms_norm(real(0)?, width(0), gain, norm.eps, dy);
                out[0] = want(0).then_some(dx);
                if want(1) {
                    out[1] = Some(dg);
                }
            }
            OpKind::LayerNorm(norm) => {
                let (dx, dg) = layer_norm(real(0)?, width(0), real(1)?, norm.eps, dy);
                out[0] = want(0).then_some(dx);
                out[1] = want(1).then_some(dg);
                out[2] = want(2).then(|| column_sums(dy, width(0)));
            }
            OpKind::Rope(op) => out[0] = want(0).then_some(turned_back(op, dy, index(1)?)),
            OpKind::Attention(op) => {
                let heads = |i: usize| graph.ty(graph.inputs_of(node)[i]).shape[1].fixed().unwrap_or(1);
                let qkv = [real(0)?, real(1)?, real(2)?];
                let tokens = index(3)?.len();
                let all = attention(op, qkv, tokens, [heads(0), heads(1)], width(0), dy);
                all.into_iter().enumerate().for_each(|(i, d)| out[i] = want(i).then_some(d));
            }
            OpKind::Add(_) => (0..2).filter(|i| want(*i)).for_each(|i| out[i] = Some(dy.to_vec())),
            OpKind::Mul(_) => {
                for (i, other) in [(0, real(1)?), (1, real(0)?)] {
                    out[i] = want(i).then(|| paired(dy, other, |d, v| d * v));
                }
            }
            OpKind::Silu(_) => {
                let slope = |x: f32| {
                    let sigmoid = 1.0 / (1.0 + dense::exp(-x));
                    sigmoid * (1.0 + x * (1.0 - sigmoid))
                };
                out[0] = want(0).then_some(paired(dy, real(0)?, |d, x| d * slope(x)));
            }
            OpKind::Gelu(_) => {
                let slope = |x: f32| {
                    let x = f64::from(x);
                    let below = 0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2));
                    (below + x * libm::exp(-0.5 * x * x) / std::f64::consts::TAU.sqrt()) as f32
                };
                out[0] = want(0).then_some(paired(dy, real(0)?, |d, x| d * slope(x)));
            }
            OpKind::Softmax(_) => {
                let mut p = real(0)?.to_vec();
                p.chunks_exact_mut(width(0)).for_each(dense::softmax);
                for (p, d) in p.chunks_exact_mut(width(0)).zip(dy.chunks_exact(width(0))) {
                    softmax_gradient(p, d);
                }
                out[0] = want(0).then_some(p);
            }
            OpKind::Reshape(_) => out[0] = want(0).then_some(dy.to_vec()),
            OpKind::Slice(s) => {
                let mut d = vec![0.0; real(0)?.len()];
                for (row, part) in d.chunks_exact_mut(width(0)).zip(dy.chunks_exact(s.len)) {
                    row[s.start..s.start + s.len].copy_from_slice(part);
                }
                out[0] = want(0).then_some(d);
            }
            OpKind::Input(_)
            | OpKind::Weight(_)
            | OpKind::NormLinear(_)
            | OpKind::QkvRope(_)
            | OpKind::GateUpSwiglu(_)
            | OpKind::LinearResidual(_)
            | OpKind::Custom(_) => return Err(wrong()),
        }
        Ok(out)
    }
}

/// Rows of `gradient` added up where their indices point. Indices are known to be in range: the op has been evaluated.
fn scattered(len: usize, width: usize, ids: &[i32], gradient: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0f32; len];
    for (id, row) in ids.iter().zip(gradient.chunks_exact(width)) {
        let at = *id as usize * width;
        out[at..at + width].iter_mut().zip(row).for_each(|(o, d)| *o += d);
    }
    out
}

/// `dy · w`: `[T, n] · [n, k]`.
fn product(dy: &[f32], n: usize, w: &[f32], k: usize) -> Vec<f32> {
    let rows = dy.len() / n;
    let mut out = vec![0.0f32; rows * k];
    matmul(
        MatMut::from_row_major_slice_mut(&mut out, rows, k),
        Accum::Replace,
        MatRef::from_row_major_slice(dy, rows, n),
        MatRef::from_row_major_slice(w, n, k),
        1.0,
        Par::Seq,
    );
    out
}

/// `dyᵀ · x`: `[n, T] · [T, k]`.
fn transposed_product(dy: &[f32], n: usize, x: &[f32], k: usize) -> Vec<f32> {
    let rows = dy.len() / n;
    let mut out = vec![0.0f32; n * k];
    matmul(
        MatMut::from_row_major_slice_mut(&mut out, n, k),
        Accum::Replace,
        MatRef::from_row_major_slice(dy, rows, n).transpose(),
        MatRef::from_row_major_slice(x, rows, k),
        1.0,
        Par::Seq,
    );
    out
}

#[inline(always)]
fn column_sums(dy: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f32; width];
    dy.chunks_exact(width).for_each(|row| sums.iter_mut().zip(row).for_each(|(s, d)| *s += d));
    sums
}

/// With `f = (mean(x²) + ε)^(-1/2)`: `dx = f g dy - x f³ mean(x g dy)` and `dg = Σ x f dy`.
#[inline(always)]
fn rms_norm(x: &[f32], width: usize, gain: Option<&[f32]>, eps: f64, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let ones = vec![1.0; if gain.is_some() { 0 } else { width }];
    let gain = gain.unwrap_or(&ones);
    let (mut dx, mut dg) = (Vec::with_capacity(x.len()), vec![0.0f32; width]);
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let gain = &gain[..width];
        let square = lane_sum(width, |i| f64::from(x[i]) * f64::from(x[i]));
        let factor = 1.0 / (square / width as f64 + eps).sqrt();
        let along = lane_sum(width, |i| f64::from(x[i] * gain[i] * dy[i]));
        let back = (factor.powi(3) * along / width as f64) as f32;
        let factor = factor as f32;
        dx.extend(x.iter().zip(gain).zip(dy).map(|((x, g), d)| factor * g * d - x * back));
        dg.iter_mut().zip(x).zip(dy).for_each(|((dg, x), d)| *dg += x * factor * d);
    }
    (dx, dg)
}

/// With `z = (x - mean) f` and `e = g dy`: `dx = f (e - mean(e) - z mean(e z))` and `dg = Σ z dy`.
#[inline(always)]
fn layer_norm(x: &[f32], width: usize, gain: &[f32], eps: f64, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut dx, mut dg) = (Vec::with_capacity(x.len()), vec![0.0f32; width]);
    let count = width as f64;
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
        let (mean, factor) = (mean as f32, (1.0 / (variance + eps).sqrt()) as f32);
        let z = |x: f32| (x - mean) * factor;
        let e = || gain.iter().zip(dy).map(|(g, d)| g * d);
        let level = (e().map(f64::from).sum::<f64>() / count) as f32;
        let along = (e().zip(x).map(|(e, x)| f64::from(e * z(*x))).sum::<f64>() / count) as f32;
        dx.extend(e().zip(x).map(|(e, x)| factor * (e - level - z(*x) * along)));
        dg.iter_mut().zip(x).zip(dy).for_each(|((dg, x), d)| *dg += z(*x) * d);
    }
    (dx, dg)
}

/// The rotation the other way; `mscale` stays.
fn turned_back(op: &Rope, dy: &[f32], positions: &[i32]) -> Vec<f32> {
    let back: Vec<i32> = positions.iter().map(|p| -p).collect();
    dense::rope(op, dy, &back)
}

/// `p ∘ (d - Σ p d)` in place of `p`, the gradient at the input of a softmax that gave `p`.
#[inline(always)]
fn softmax_gradient(p: &mut [f32], d: &[f32]) {
    let d = &d[..p.len()];
    let along = lane_sum(p.len(), |i| f64::from(p[i] * d[i])) as f32;
    for (p, d) in p.iter_mut().zip(d) {
        *p *= d - along;
    }
}

/// Queries whose scores are held at a time.
const QUERIES: usize = 64;

/// Gradients of q, k and v; scores are computed again.
#[inline(always)]
fn attention(
    op: &Attention,
    [q, k, v]: [&[f32]; 3],
    tokens: usize,
    [heads, kv_heads]: [usize; 2],
    width: usize,
    dy: &[f32],
) -> [Vec<f32>; 3] {
    let (mut dq, mut dk, mut dv) = (vec![0.0f32; q.len()], vec![0.0f32; k.len()], vec![0.0f32; v.len()]);
    let (q_stride, k_stride) = (heads * width, kv_heads * width);
    for head in 0..heads {
        let (q_at, k_at) = (head * width, head / (heads / kv_heads) * width);
        for first in (0..tokens).step_by(QUERIES) {
            let count = QUERIES.min(tokens - first);
            let seen = first + count;
            let from = op.window.map_or(0, |w| (first + 1).saturating_sub(w));
            let span = seen - from;
            let queries = dense::gathered(q, q_at, q_stride, first..seen, width);
            let keys = dense::gathered(k, k_at, k_stride, from..seen, width);
            let values = dense::gathered(v, k_at, k_stride, from..seen, width);
            let outputs = dense::gathered(dy, q_at, q_stride, first..seen, width);
            let mut weights = linear(&queries, &keys, width, None);
            // Of the mixed values with respect to the weights of the mixture.
            let slopes = linear(&outputs, &values, width, None);
            let visible = |i: usize| {
                let position = first + i;
                op.window.map_or(0, |w| (position + 1).saturating_sub(w)) - from..position + 1 - from
            };
            for (i, row) in weights.chunks_exact_mut(span).enumerate() {
                let visible = visible(i);
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
                row[visible.clone()].iter_mut().for_each(|s| *s *= op.scale as f32);
                dense::softmax(&mut row[visible]);
            }
            add_rows(
                &mut dv,
                k_at,
                k_stride,
                from,
                &transposed_product(&weights, span, &outputs, width),
                width,
            );
            for (i, (row, slope)) in weights.chunks_exact_mut(span).zip(slopes.chunks_exact(span)).enumerate()
            {
                let visible = visible(i);
                softmax_gradient(&mut row[visible.clone()], &slope[visible]);
                row.iter_mut().for_each(|s| *s *= op.scale as f32);
            }
            add_rows(&mut dq, q_at, q_stride, first, &product(&weights, span, &keys, width), width);
            add_rows(
                &mut dk,
                k_at,
                k_stride,
                from,
                &transposed_product(&weights, span, &queries, width),
                width,
            );
        }
    }
    [dq, dk, dv]
}

/// Adds rows to parts of the rows of `m`, `at` behind each row's start, from row `first` on.
#[inline(always)]
fn add_rows(m: &mut [f32], at: usize, stride: usize, first: usize, rows: &[f32], width: usize) {
    for (i, row) in rows.chunks_exact(width).enumerate() {
        let at = (first + i) * stride + at;
        m[at..at + width].iter_mut().zip(row).for_each(|(m, v)| *m += v);
    }
}
