//! Rounding column by column, each column's error spread over the columns still to come.
//!
//! Scales are given (static groups); only codes are chosen. With U of the [`Curvature`] and columns in its order, column
//! `i` is rounded to `q`, and `(w_i - q) / U_ii * U_ij` is taken from every later column `j`. Columns are done in blocks,
//! so that what crosses a block is one matrix product.
//! Rows are independent of each other, and a fixed number of them is solved together: results do not depend on threads.
//! Reference: GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1.

use super::code_grid::{CodeGrid, GroupScale};
use super::curvature::Curvature;
use attar_format::Encoded;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Columns whose errors are spread one at a time.
const BLOCK: usize = 128;

/// Rows solved together.
pub(super) const ROWS: usize = 32;

/// Chooses the codes of `encoded` anew for `weights` `[N, K]`, keeping its scales.
pub(super) fn round_with_feedback(
    curvature: &Curvature,
    grid: &CodeGrid,
    weights: &[f32],
    encoded: &mut Encoded,
) {
    let (k, groups, group) = (encoded.k, encoded.groups(), encoded.format.group);
    let (fields, row_scale) = (&encoded.field, &encoded.row_scale);
    let scales_of = |row: usize| -> Vec<GroupScale> {
        let row_scale = row_scale.get(row).copied().unwrap_or(1.0);
        fields[row * groups..(row + 1) * groups].iter().map(|f| grid.group_scale(*f, row_scale)).collect()
    };
    let chunks = encoded.codes.par_chunks_mut(ROWS * k).zip(weights.par_chunks(ROWS * k));
    chunks.enumerate().for_each(|(chunk, (codes, weights))| {
        let rows = weights.len() / k;
        let scales: Vec<Vec<GroupScale>> = (0..rows).map(|r| scales_of(chunk * ROWS + r)).collect();
        solve(curvature, grid, &scales, group, weights, codes);
    });
}

/// Solves some rows; `weights` and `codes` are `[rows, K]`.
fn solve(
    curvature: &Curvature,
    grid: &CodeGrid,
    scales: &[Vec<GroupScale>],
    group: usize,
    weights: &[f32],
    codes: &mut [u8],
) {
    let (k, rows, order) = (curvature.width(), scales.len(), curvature.order());
    // What is left to represent, in solve order.
    let mut left: Vec<f32> =
        weights.chunks_exact(k).flat_map(|row| order.iter().map(|column| row[*column])).collect();
    let mut errors = vec![0.0f32; rows * BLOCK];
    for start in (0..k).step_by(BLOCK) {
        let end = (start + BLOCK).min(k);
        for i in start..end {
            let spread = &curvature.factor_row(i)[i..end];
            let column = order[i];
            for (row, scales) in scales.iter().enumerate() {
                let here = &mut left[row * k + i..row * k + end];
                let s = scales[column / group];
                let value = if s.scale == 0.0 {
                    codes[row * k + column] = 0;
                    0.0
                } else {
                    let (code, value) = grid.round(s.choice, here[0] / s.scale);
                    codes[row * k + column] = code;
                    value * s.scale
                };
                let error = (here[0] - value) / spread[0];
                errors[row * BLOCK + i - start] = error;
                for (w, u) in here.iter_mut().zip(spread) {
                    *w -= error * u;
                }
            }
        }
        if end < k {
            let spread = curvature.factor_part(start..end, end);
            let errors = MatRef::from_row_major_slice(&errors, rows, BLOCK).get(.., 0..end - start);
            let left = MatMut::from_row_major_slice_mut(&mut left, rows, k).get_mut(.., end..k);
            matmul(left, Accum::Add, errors, spread, -1.0, Par::Seq);
        }
    }
}
