//! Rounding column by column, each column's error spread over the columns still to come.
//!
//! Scales are given (static groups); only codes are chosen. With U of the [`Curvature`] and columns in its order, column
//! `i` is rounded to `q`, and `(w_i - q) / U_ii * U_ij` is taken from every later column `j`. Columns are done in blocks,
//! so that what crosses a block is one matrix product.
//! Reference: GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1.

use super::code_grid::{CodeGrid, Integers, Kind, Rounding};
use super::curvature::Curvature;
use super::row_chunk::{Group, Lanes, ROWS, RowChunk, matrix, matrix_mut};
use super::scale_search::GROUP;
use super::vector_level::{Level, Work};
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};

/// Columns whose errors are spread one at a time.
const BLOCK: usize = 128;

/// Chooses the codes of some rows, keeping their scales.
pub(super) fn round_with_feedback(
    curvature: &Curvature,
    grid: &CodeGrid,
    chunk: &mut RowChunk,
    level: Level,
) {
    let (k, order) = (curvature.width(), curvature.order());
    // What is left to represent, in solve order.
    let mut left: Vec<Lanes> = order.iter().map(|column| chunk.weights[*column]).collect();
    let inverses: Vec<Lanes> = chunk.groups.iter().map(|g| inverse_scales(&g.scale)).collect();
    let mut errors = vec![[0.0f32; ROWS]; BLOCK];
    for start in (0..k).step_by(BLOCK) {
        let end = (start + BLOCK).min(k);
        let (here, later) = left.split_at_mut(end);
        let block = Block {
            curvature,
            start,
            left: &here[start..],
            groups: &chunk.groups,
            inverses: &inverses,
            values: &mut chunk.values,
            errors: &mut errors,
        };
        match &grid.kind {
            Kind::Tables(tables) => level.run(SolveBlock { block, rounding: tables }),
            Kind::Integers => level.run(SolveBlock { block, rounding: &Integers }),
        }
        if end < k {
            let spread = curvature.factor_part(start..end, end);
            matmul(
                matrix_mut(later),
                Accum::Add,
                spread.transpose(),
                matrix(&errors[..end - start]),
                -1.0,
                Par::Seq,
            );
        }
    }
}

/// Reciprocals of scales; zero for zero.
#[inline(always)]
pub(super) fn inverse_scales(scale: &Lanes) -> Lanes {
    std::array::from_fn(|r| if scale[r] == 0.0 { 0.0 } else { 1.0 / scale[r] })
}

/// Columns from `start` on, in solve order.
struct Block<'a> {
    curvature: &'a Curvature,
    start: usize,
    /// What was left of the block's columns when the blocks before were done.
    left: &'a [Lanes],
    groups: &'a [Group],
    /// Reciprocals of the scales.
    inverses: &'a [Lanes],
    values: &'a mut [Lanes],
    /// Errors of the block's columns over `U_ii`.
    errors: &'a mut [Lanes],
}

struct SolveBlock<'a, R> {
    block: Block<'a>,
    rounding: &'a R,
}

impl<R: Rounding> Work for SolveBlock<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Block { curvature, start, left, groups, inverses, values, errors } = self.block;
        for (i, left) in left.iter().enumerate() {
            let column = curvature.order()[start + i];
            let mut here = *left;
            for (j, error) in errors[..i].iter().enumerate() {
                let u = curvature.factor_row(start + j)[start + i];
                (0..ROWS).for_each(|r| here[r] -= error[r] * u);
            }
            let inverse_diagonal = 1.0 / curvature.factor_row(start + i)[start + i];
            let (group, inverse) = (&groups[column / GROUP], &inverses[column / GROUP]);
            let (value, error) = (&mut values[column], &mut errors[i]);
            for r in 0..ROWS {
                value[r] = self.rounding.nearest(group.choice[r], here[r] * inverse[r]);
            }
            for r in 0..ROWS {
                error[r] = (here[r] - value[r] * group.scale[r]) * inverse_diagonal;
            }
        }
    }
}
