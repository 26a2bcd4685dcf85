//! Contraction with f32, bf16 and f16 weights: `sum[c] += w[c, k] * x[k]`, k ascending, one accumulator per channel.

use super::{Contraction, TILE};
use crate::lanes::{F32x4, Lanes, Scalar, Var};
use attar_format::{CHANNELS, DType, Value};
use attar_kernel::RowTile;

/// Inputs per iteration of the innermost loop.
const STEP: usize = 4;

pub(super) fn emit(c: &Contraction<'_>, cx: &mut Lanes<'_>) {
    let x_stride = c.layout.k * 4;
    if c.rows == RowTile::One {
        tile(c, cx, &[c.x], 0, CHANNELS / 4, &[c.sums]);
        return;
    }
    let zero = cx.int(0);
    if cx.is_scalar() {
        // One row of 16 channels is what fits the scalar registers.
        cx.for_range(zero, c.count, 1, |cx, r| {
            let x = cx.offset(c.x, r, x_stride);
            let sums = cx.offset(c.sums, r, c.sums_stride);
            tile(c, cx, &[x], 0, CHANNELS / 4, &[sums]);
        });
        return;
    }
    let last = cx.iadd_imm(c.count, -1);
    cx.for_range(zero, c.count, TILE as i64, |cx, first| {
        // Rows past the last are computed as the last and never used.
        let x: [Scalar; TILE] = std::array::from_fn(|r| {
            let row = cx.iadd_imm(first, r as i64);
            let row = cx.imin(row, last);
            cx.offset(c.x, row, x_stride)
        });
        let sums: [Scalar; TILE] = std::array::from_fn(|r| {
            let row = cx.iadd_imm(first, r as i64);
            cx.offset(c.sums, row, c.sums_stride)
        });
        // Half a block: eight accumulators and their operands fit sixteen registers.
        tile(c, cx, &x, 0, CHANNELS / 8, &sums);
        tile(c, cx, &x, CHANNELS / 8, CHANNELS / 8, &sums);
    });
}

/// Channels `4 * quad .. 4 * (quad + quads)` of the rows at `x`.
fn tile(c: &Contraction<'_>, cx: &mut Lanes<'_>, x: &[Scalar], quad: usize, quads: usize, sums: &[Scalar]) {
    let k_per_row = c.layout.k_per_row;
    let codes = cx.iadd_imm(c.block, (c.layout.codes_offset + quad * 16) as i64);
    let zero = cx.splat_const(0.0);
    let acc: Vec<Vec<Var<F32x4>>> = x.iter().map(|_| (0..quads).map(|_| cx.var(zero)).collect()).collect();
    let steps = c.layout.k / STEP;
    cx.for_const(steps, 1, |cx, i| {
        let codes = cx.offset(codes, i, STEP / k_per_row * 64);
        let at = cx.imul_imm(i, (STEP * 4) as i64);
        let x: Vec<Scalar> = x.iter().map(|x| cx.iadd(*x, at)).collect();
        for row in 0..STEP / k_per_row {
            code_row(c, cx, codes, row, k_per_row, &x, &acc);
        }
    });
    let rest = c.layout.k % STEP;
    let codes = cx.iadd_imm(codes, (steps * (STEP / k_per_row) * 64) as i64);
    let x: Vec<Scalar> = x.iter().map(|x| cx.iadd_imm(*x, (steps * STEP * 4) as i64)).collect();
    for row in 0..rest.div_ceil(k_per_row) {
        let inputs = k_per_row.min(rest - row * k_per_row);
        code_row(c, cx, codes, row, inputs, &x, &acc);
    }
    for (sums, acc) in sums.iter().zip(&acc) {
        for (q, acc) in acc.iter().enumerate() {
            let value = cx.get(acc);
            cx.store4(value, *sums, ((quad + q) * 16) as i32);
        }
    }
}

/// One row of codes, `inputs` of whose inputs exist.
fn code_row(
    c: &Contraction<'_>,
    cx: &mut Lanes<'_>,
    codes: Scalar,
    row: usize,
    inputs: usize,
    x: &[Scalar],
    acc: &[Vec<Var<F32x4>>],
) {
    let quads = acc[0].len();
    for part in 0..inputs {
        let weights: Vec<F32x4> =
            (0..quads).map(|q| weights(c, cx, codes, row * 64 + q * 16, part)).collect();
        let k = row * c.layout.k_per_row + part;
        for (x, acc) in x.iter().zip(acc) {
            let x = cx.load_splat(*x, (k * 4) as i32);
            for (w, acc) in weights.iter().zip(acc) {
                let sum = cx.get(acc);
                let sum = cx.vmuladd(*w, x, sum);
                cx.set(acc, sum);
            }
        }
    }
}

/// The weights of 4 channels for input `part` of a row of codes.
fn weights(c: &Contraction<'_>, cx: &mut Lanes<'_>, codes: Scalar, offset: usize, part: usize) -> F32x4 {
    let offset = offset as i32;
    match c.layout.format.value {
        Value::Float(DType::BF16) => {
            let pair = cx.load4_i32(codes, offset);
            let bits = if part == 0 {
                cx.vishl_imm(pair, 16)
            } else {
                let mask = cx.splat_const_i32(0xffff_0000_u32 as i32);
                cx.viand(pair, mask)
            };
            cx.vfrom_bits(bits)
        }
        Value::Float(DType::F16) => {
            let pair = cx.load4_i32(codes, offset);
            let high = if part == 0 { cx.vishl_imm(pair, 16) } else { pair };
            let shifted = cx.vsshr_imm(high, 3);
            cx.f16_shifted_to_f32(shifted)
        }
        _ => cx.load4(codes, offset),
    }
}
