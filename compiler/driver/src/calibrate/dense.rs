//! Dense f32 evaluation of single ops, fast enough for whole models.
//!
//! The meaning of each op is that of `attar_ir`'s interpreter, rounded to f32 and summed in another order. Windows of text
//! are computed in parallel, each on one thread, or outputs of a layer are, in parts of a fixed size: no result depends on
//! the number of threads.

use attar_ir::ops::{Attention, Custom, Rope};
use attar_ir::{Graph, NodeId, Op, OpKind, ValueId};
use attar_pass::{Error, ErrorKind, Result};
use attar_passes::quantize::vector_level::{Level, Work};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// An operand: numbers, or the indices a step is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operand<'a> {
    Real(&'a [f32]),
    Index(&'a [i32]),
}

impl<'a> Operand<'a> {
    pub(crate) fn real(&self) -> Option<&'a [f32]> {
        match self {
            Operand::Real(v) => Some(v),
            Operand::Index(_) => None,
        }
    }

    pub(crate) fn index(&self) -> Option<&'a [i32]> {
        match self {
            Operand::Index(v) => Some(v),
            Operand::Real(_) => None,
        }
    }
}

/// Evaluates a node of one output. `widths` holds the last dimension of each operand; tokens are one sequence that begins at
/// position 0.
///
/// # Errors
/// [`ErrorKind::Ir`] for an op that is not a core op, or an index out of range.
pub(crate) fn evaluate(
    graph: &Graph,
    node: NodeId,
    operands: &[Operand<'_>],
    widths: &[usize],
) -> Result<Vec<f32>> {
    Level::widest().run(Evaluated { graph, node, operands, widths })
}

/// A node to evaluate with the vectors of whoever calls it.
struct Evaluated<'a> {
    graph: &'a Graph,
    node: NodeId,
    operands: &'a [Operand<'a>],
    widths: &'a [usize],
}

impl Work for Evaluated<'_> {
    type Output = Result<Vec<f32>>;

    #[inline(always)]
    fn run(self) -> Result<Vec<f32>> {
        let Evaluated { graph, node, operands, widths } = self;
        let op = graph.op(node);
        let wrong = || unsupported(graph, node);
        let real = |i: usize| operands.get(i).and_then(Operand::real).ok_or_else(wrong);
        let index = |i: usize| operands.get(i).and_then(Operand::index).ok_or_else(wrong);
        let width = |i: usize| widths.get(i).copied().unwrap_or(0).max(1);
        let shape = |i: usize| graph.ty(graph.inputs_of(node)[i]).shape.clone();
        Ok(match op {
            OpKind::Embed(_) => pick_rows(real(1)?, width(1), index(0)?).ok_or_else(wrong)?,
            OpKind::GatherRows(_) => pick_rows(real(0)?, width(0), index(1)?).ok_or_else(wrong)?,
            OpKind::Linear(_) => {
                let bias = if operands.len() > 2 { Some(real(2)?) } else { None };
                linear(real(0)?, real(1)?, width(1), bias)
            }
            OpKind::RmsNorm(norm) => {
                let gain = if operands.len() > 1 { Some(real(1)?) } else { None };
                rms_norm(real(0)?, width(0), gain, norm.eps)
            }
            OpKind::LayerNorm(norm) => layer_norm(real(0)?, width(0), real(1)?, real(2)?, norm.eps),
            OpKind::Rope(op) => rope(op, real(0)?, index(1)?),
            OpKind::Attention(op) => {
                let heads = |i: usize| shape(i)[1].fixed().unwrap_or(1);
                attention(op, [real(0)?, real(1)?, real(2)?], index(3)?, [heads(0), heads(1)], width(0))
            }
            OpKind::Add(_) => paired(real(0)?, real(1)?, |a, b| a + b),
            OpKind::Mul(_) => paired(real(0)?, real(1)?, |a, b| a * b),
            OpKind::Silu(_) => mapped(real(0)?, |x| x / (1.0 + exp(-x))),
            OpKind::Gelu(_) => {
                let gelu = |x: f64| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2));
                mapped(real(0)?, |x| gelu(f64::from(x)) as f32)
            }
            OpKind::Softmax(_) => {
                let mut out = real(0)?.to_vec();
                out.chunks_exact_mut(width(0)).for_each(softmax);
                out
            }
            OpKind::Reshape(_) => real(0)?.to_vec(),
            OpKind::Slice(s) => {
                let rows = real(0)?.chunks_exact(width(0));
                rows.flat_map(|row| row[s.start..s.start + s.len].iter().copied()).collect()
            }
            OpKind::Custom(op) => body(op, operands).ok_or_else(wrong)?,
            OpKind::Input(_)
            | OpKind::Weight(_)
            | OpKind::NormLinear(_)
            | OpKind::QkvRope(_)
            | OpKind::GateUpSwiglu(_)
            | OpKind::LinearResidual(_) => return Err(wrong()),
        })
    }
}

/// `f` of each number.
#[inline(always)]
pub(crate) fn mapped(x: &[f32], f: impl Fn(f32) -> f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(*x);
    }
    out
}

/// `f` of each pair of numbers.
#[inline(always)]
pub(crate) fn paired(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    let mut out = vec![0.0; a.len()];
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = f(*a, *b);
    }
    out
}

/// A custom op of one output is what its body gives.
fn body(op: &Custom, operands: &[Operand<'_>]) -> Option<Vec<f32>> {
    let body = op.body();
    let [output] = body.outputs() else { return None };
    let mut values: BTreeMap<ValueId, Vec<f32>> = BTreeMap::new();
    let given = |v: &ValueId| body.inputs().iter().position(|n| *n == v.node).and_then(|i| operands.get(i));
    for id in body.topo() {
        if matches!(body.op(id), OpKind::Input(_)) {
            continue;
        }
        let inputs = body.inputs_of(id);
        let operand = |v: &ValueId| match given(v) {
            Some(operand) => Some(*operand),
            None => values.get(v).map(|data| Operand::Real(data)),
        };
        let operands = inputs.iter().map(operand).collect::<Option<Vec<_>>>()?;
        let widths: Vec<usize> = inputs.iter().map(|v| body.ty(*v).last().unwrap_or(1)).collect();
        let result = evaluate(body, id, &operands, &widths).ok()?;
        values.insert(ValueId { node: id, slot: 0 }, result);
    }
    match given(output) {
        Some(operand) => operand.real().map(<[f32]>::to_vec),
        None => values.remove(output),
    }
}

/// What no pass before fusion can leave behind.
pub(crate) fn unsupported(graph: &Graph, node: NodeId) -> Error {
    let problem = format!("calibration cannot run {}", graph.op(node).name());
    let kind = attar_ir::ErrorKind::Structure { rule: "calibration", problem };
    Error::new(ErrorKind::Ir(attar_ir::Error::new(kind).at_node(graph.describe(node))))
}

fn pick_rows(table: &[f32], width: usize, ids: &[i32]) -> Option<Vec<f32>> {
    let mut out = Vec::with_capacity(ids.len() * width);
    for id in ids {
        let start = usize::try_from(*id).ok()?.checked_mul(width)?;
        out.extend_from_slice(table.get(start..start + width)?);
    }
    Some(out)
}

/// `x · wᵀ (+ bias)`; `x` is `[.., k]`, `w` `[N, k]`.
pub(crate) fn linear(x: &[f32], w: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let (rows, n) = (x.len() / k, w.len() / k);
    let mut out = vec![0.0f32; rows * n];
    if let Some(bias) = bias {
        out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
    }
    let (x, w) = (MatRef::from_row_major_slice(x, rows, k), MatRef::from_row_major_slice(w, n, k));
    let y = MatMut::from_row_major_slice_mut(&mut out, rows, n);
    matmul(y, Accum::Add, x, w.transpose(), 1.0, Par::Seq);
    out
}

/// Outputs of a linear layer that one thread computes at a time: few, so that threads end together.
const OUTPUTS: usize = 96;

/// [`linear`] of several windows at once: weights are prepared once for all of their rows, and threads share out the outputs.
pub(crate) fn linear_of_all(windows: &[&[f32]], w: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<Vec<f32>> {
    let n = w.len() / k;
    let x = windows.concat();
    let mut out = vec![0.0f32; x.len() / k * n];
    if let Some(bias) = bias {
        out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
    }
    let x = MatRef::from_row_major_slice(&x, x.len() / k, k);
    let mut left = MatMut::from_row_major_slice_mut(&mut out, x.nrows(), n);
    let mut parts = Vec::with_capacity(n.div_ceil(OUTPUTS));
    for w in w.chunks(OUTPUTS * k) {
        let (part, others) = left.split_at_col_mut(w.len() / k);
        parts.push((part, MatRef::from_row_major_slice(w, w.len() / k, k)));
        left = others;
    }
    parts.into_par_iter().for_each(|(y, w)| matmul(y, Accum::Add, x, w.transpose(), 1.0, Par::Seq));
    let mut results: Vec<Vec<f32>> =
        windows.iter().rev().map(|x| out.split_off(out.len() - x.len() / k * n)).collect();
    results.reverse();
    results
}

#[inline(always)]
fn rms_norm(x: &[f32], width: usize, gain: Option<&[f32]>, eps: f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let square = lane_sum(width, |i| f64::from(row[i]) * f64::from(row[i]));
        let factor = (1.0 / (square / width as f64 + eps).sqrt()) as f32;
        match gain {
            Some(gain) => out.extend(row.iter().zip(gain).map(|(v, g)| v * factor * g)),
            None => out.extend(row.iter().map(|v| v * factor)),
        }
    }
    out
}

#[inline(always)]
fn layer_norm(x: &[f32], width: usize, gain: &[f32], bias: &[f32], eps: f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
        let (mean, factor) = (mean as f32, (1.0 / (variance + eps).sqrt()) as f32);
        out.extend(row.iter().zip(gain.iter().zip(bias)).map(|(v, (g, b))| (v - mean) * factor * g + b));
    }
    out
}

#[inline(always)]
pub(crate) fn rope(op: &Rope, x: &[f32], positions: &[i32]) -> Vec<f32> {
    let half = op.inv_freq.len();
    let mut out = x.to_vec();
    if positions.is_empty() || half == 0 {
        return out;
    }
    let per_token = x.len() / positions.len();
    let mut turns = vec![(0.0f32, 0.0f32); half];
    for (token, position) in out.chunks_exact_mut(per_token).zip(positions) {
        for (turn, freq) in turns.iter_mut().zip(&op.inv_freq) {
            let (sin, cos) = (f64::from(*position) * freq).sin_cos();
            *turn = ((op.mscale * sin) as f32, (op.mscale * cos) as f32);
        }
        for head in token.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(&turns) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    out
}

/// Queries whose scores are held at a time.
const QUERIES: usize = 64;

/// Causal attention of one sequence whose tokens stand at `positions`, ascending by 1 from 0.
#[inline(always)]
fn attention(
    op: &Attention,
    [q, k, v]: [&[f32]; 3],
    positions: &[i32],
    [heads, kv_heads]: [usize; 2],
    width: usize,
) -> Vec<f32> {
    let tokens = positions.len();
    let mut out = vec![0.0f32; q.len()];
    let mut scores = vec![0.0f32; QUERIES * tokens];
    for head in 0..heads {
        let (q_at, q_stride) = (head * width, heads * width);
        let (k_at, k_stride) = (head / (heads / kv_heads) * width, kv_heads * width);
        for first in (0..tokens).step_by(QUERIES) {
            let count = QUERIES.min(tokens - first);
            let seen = first + count;
            let from = op.window.map_or(0, |w| (first + 1).saturating_sub(w));
            let queries = gathered(q, q_at, q_stride, first..seen, width);
            let keys = gathered(k, k_at, k_stride, from..seen, width);
            let values = gathered(v, k_at, k_stride, from..seen, width);
            let span = seen - from;
            let scores = &mut scores[..count * span];
            matmul(
                MatMut::from_row_major_slice_mut(&mut *scores, count, span),
                Accum::Replace,
                MatRef::from_row_major_slice(&queries, count, width),
                MatRef::from_row_major_slice(&keys, span, width).transpose(),
                op.scale as f32,
                Par::Seq,
            );
            for (i, row) in scores.chunks_exact_mut(span).enumerate() {
                let position = first + i;
                let begin = op.window.map_or(0, |w| (position + 1).saturating_sub(w)) - from;
                let end = position + 1 - from;
                softmax(&mut row[begin..end]);
                row[..begin].fill(0.0);
                row[end..].fill(0.0);
            }
            let mut mixed = vec![0.0f32; count * width];
            matmul(
                MatMut::from_row_major_slice_mut(&mut mixed, count, width),
                Accum::Replace,
                MatRef::from_row_major_slice(&*scores, count, span),
                MatRef::from_row_major_slice(&values, span, width),
                1.0,
                Par::Seq,
            );
            for (i, row) in mixed.chunks_exact(width).enumerate() {
                let at = (first + i) * q_stride + q_at;
                out[at..at + width].copy_from_slice(row);
            }
        }
    }
    out
}

/// `width` numbers of each of some rows, `at` behind the row's start.
pub(crate) fn gathered(
    m: &[f32],
    at: usize,
    stride: usize,
    rows: std::ops::Range<usize>,
    width: usize,
) -> Vec<f32> {
    rows.flat_map(|row| m[row * stride + at..row * stride + at + width].iter().copied()).collect()
}

#[inline(always)]
pub(crate) fn softmax(row: &mut [f32]) {
    let largest = largest(row);
    for v in row.iter_mut() {
        *v = exp(*v - largest);
    }
    let inverse = (1.0 / lane_sum(row.len(), |i| f64::from(row[i]))) as f32;
    for v in row {
        *v *= inverse;
    }
}

/// Numbers that are added up, or compared, beside each other.
const LANES: usize = 16;

/// The largest of some numbers.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
}

/// `Σ term(i)` in f64, in an order that vectorises.
#[inline(always)]
pub(crate) fn lane_sum(count: usize, term: impl Fn(usize) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let whole = count - count % LANES;
    for first in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(first + lane);
        }
    }
    lanes.iter().sum::<f64>() + (whole..count).map(term).sum::<f64>()
}

/// `eˣ` within two units in the last place, in arithmetic that vectorises and is the same on every machine.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // e^x = 2^n e^r with n the integer nearest to x / ln 2. Adding and taking away 1.5 · 2^23 rounds to it.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = f32::from_bits((((n + MAGIC).to_bits()).wrapping_add(127)) << 23);
    (p * r * r + r + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::{OUTPUTS, exp, linear, linear_of_all};

    #[test]
    fn windows_together_are_what_they_are_alone() {
        // Several parts of outputs, the last one short; windows of different lengths.
        let (k, n) = (24, 2 * OUTPUTS + 77);
        let numbers = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| (i * step % 101) as f32 / 50.0 - 1.0).collect()
        };
        let (w, bias) = (numbers(n * k, 37), numbers(n, 13));
        let windows = [numbers(5 * k, 7), numbers(k, 11), numbers(9 * k, 29)];
        let rows: Vec<&[f32]> = windows.iter().map(Vec::as_slice).collect();
        for bias in [None, Some(bias.as_slice())] {
            let together = linear_of_all(&rows, &w, k, bias);
            assert_eq!(together.len(), windows.len());
            for (x, y) in windows.iter().zip(&together) {
                let alone = linear(x, &w, k, bias);
                assert_eq!(alone.len(), y.len());
                // Sums of 24 products of numbers up to 1, perhaps in another order.
                assert!(alone.iter().zip(y).all(|(a, b)| (a - b).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn the_exponential_is_accurate() {
        for i in -8600..8800 {
            let x = i as f32 / 100.0 + 0.001;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "{x}: {} for {expected}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
    }
}
