//! Some rows of a matrix while their codes are chosen: columns one after the other, and of each column all rows, so that
//! what is done for a row is done for all of them with one instruction.
//!
//! Rows are independent. A matrix whose last rows are too few for a chunk has it filled with zeros.

#![expect(clippy::needless_range_loop, reason = "the lanes of several arrays are gone over together")]

use super::code_grid::CodeGrid;
use super::scale_search::GROUP;
use faer::{MatMut, MatRef};

/// Rows of a chunk.
pub(super) const ROWS: usize = 32;

/// One number of each row.
pub(super) type Lanes = [f32; ROWS];

/// Rows of weights and what stands for them.
#[derive(Clone, Debug)]
pub(super) struct RowChunk {
    /// Rows that are no filling.
    pub(super) rows: usize,
    /// `[K]`.
    pub(super) weights: Vec<Lanes>,
    /// What the codes stand for in units of the scales, `[K]`.
    pub(super) values: Vec<Lanes>,
    /// `[K / GROUP]`.
    pub(super) groups: Vec<Group>,
    pub(super) row_scale: Lanes,
}

/// Scales of a group.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) field: [u16; ROWS],
    pub(super) scale: Lanes,
    pub(super) choice: [u32; ROWS],
}

impl RowChunk {
    /// Rows of weights `[rows, K]` with given scales, and codes that are yet to be chosen. Formats without scales of rows
    /// have an empty `row_scale`.
    pub(super) fn new(
        weights: &[f32],
        k: usize,
        grid: &CodeGrid,
        fields: &[u16],
        row_scale: &[f32],
    ) -> RowChunk {
        let (rows, groups) = (weights.len() / k, k / GROUP);
        let lanes = |row: usize| row_scale.get(row).copied().unwrap_or(if row < rows { 1.0 } else { 0.0 });
        let mut chunk = RowChunk {
            rows,
            weights: in_lanes(weights, k),
            values: vec![[0.0; ROWS]; k],
            groups: vec![Group { field: [0; ROWS], scale: [0.0; ROWS], choice: [0; ROWS] }; groups],
            row_scale: std::array::from_fn(lanes),
        };
        for row in 0..rows {
            for (g, group) in chunk.groups.iter_mut().enumerate() {
                let field = fields[row * groups + g];
                let s = grid.group_scale(field, chunk.row_scale[row]);
                (group.field[row], group.scale[row], group.choice[row]) = (field, s.scale, s.choice as u32);
            }
        }
        chunk
    }

    /// K.
    pub(super) fn width(&self) -> usize {
        self.weights.len()
    }

    /// What the codes stand for, less the weights, `[K]`.
    pub(super) fn errors(&self) -> Vec<Lanes> {
        let mut errors = vec![[0.0; ROWS]; self.width()];
        for (column, error) in errors.iter_mut().enumerate() {
            let scale = &self.groups[column / GROUP].scale;
            let (value, weight) = (&self.values[column], &self.weights[column]);
            (0..ROWS).for_each(|r| error[r] = scale[r] * value[r] - weight[r]);
        }
        errors
    }

    /// Multiplies the scales of rows.
    pub(super) fn rescale(&mut self, row_scale: &Lanes, grid: &CodeGrid) {
        self.row_scale = *row_scale;
        for group in &mut self.groups {
            for row in 0..self.rows {
                group.scale[row] = grid.group_scale(group.field[row], row_scale[row]).scale;
            }
        }
    }

    /// Writes codes and scales of one row.
    pub(super) fn store(&self, row: usize, grid: &CodeGrid, codes: &mut [u8], fields: &mut [u16]) {
        for (g, group) in self.groups.iter().enumerate() {
            fields[g] = group.field[row];
        }
        for (column, code) in codes.iter_mut().enumerate() {
            let group = &self.groups[column / GROUP];
            // A scale of zero makes any code zero; the first is as good as any.
            let value = self.values[column][row];
            *code = if group.scale[row] == 0.0 { 0 } else { grid.code(group.choice[row] as usize, value) };
        }
    }
}

/// Rows `[rows, K]` as lanes, `[K]`.
fn in_lanes(rows: &[f32], k: usize) -> Vec<Lanes> {
    let mut lanes = vec![[0.0; ROWS]; k];
    for (r, row) in rows.chunks_exact(k).enumerate() {
        lanes.iter_mut().zip(row).for_each(|(lane, v)| lane[r] = *v);
    }
    lanes
}

/// Lanes as a matrix `[K, ROWS]`.
pub(super) fn matrix(lanes: &[Lanes]) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(lanes.as_flattened(), lanes.len(), ROWS)
}

/// As [`matrix`], to be written.
pub(super) fn matrix_mut(lanes: &mut [Lanes]) -> MatMut<'_, f32> {
    let k = lanes.len();
    MatMut::from_row_major_slice_mut(lanes.as_flattened_mut(), k, ROWS)
}
