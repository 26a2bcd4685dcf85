//! Descent over groups: codes and scales of one group at a time are changed where that lowers `d A dᵀ`.
//!
//! For a group G the error of the whole row is a quadratic of the group's values alone, with Hessian `A_GG` and the
//! gradient that the other groups' errors leave. On it
//! (1) each code moves to the entry nearest to where the quadratic is least in that coordinate;
//! (2) in the first rounds, scale and place of the table are searched anew, as for plain rounding, for the values at which
//!     the quadratic is least;
//! (3) the scale moves to the storable one nearest to its closed-form optimum for the codes, `-(t·g) / (t A_GG tᵀ)` away,
//!     with codes chosen anew.
//! A change is kept only when the error falls; after each round over the groups the row's scale moves to its closed-form
//! optimum too. So the error of a row never rises.
//! Reference: cyclic coordinate descent for this problem: Behdin et al. 2023, arXiv:2309.01885 (QuantEase).

use super::code_grid::{CodeGrid, GroupScale};
use super::curvature::Curvature;
use super::error_feedback::ROWS;
use super::scale_search::TableSearch;
use attar_format::{Encoded, Scale};
use rayon::prelude::*;

/// Rounds in which scales are searched anew.
const SEARCHES: usize = 2;

/// Times the codes of a group are gone over for one scale.
const CODE_SWEEPS: usize = 3;

/// Lowers the error of `encoded` against `weights` `[N, K]` in `rounds` rounds over all groups.
pub(super) fn descend(
    curvature: &Curvature,
    grid: &CodeGrid,
    weights: &[f32],
    encoded: &mut Encoded,
    rounds: usize,
) {
    let (k, groups, group) = (encoded.k, encoded.groups(), encoded.format.group);
    let has_row_scale = matches!(encoded.format.scale, Scale::RowF32Field8 { .. });
    if !has_row_scale {
        // One per row all the same, so that the chunks below are alike.
        encoded.row_scale = vec![1.0; encoded.n];
    }
    let search = TableSearch::for_format(encoded.format);
    let inverses = if search.is_some() { curvature.group_inverses(group) } else { Vec::new() };
    let chunks = encoded
        .codes
        .par_chunks_mut(ROWS * k)
        .zip(encoded.field.par_chunks_mut(ROWS * groups))
        .zip(encoded.row_scale.par_chunks_mut(ROWS))
        .zip(weights.par_chunks(ROWS * k));
    chunks.for_each(|(((codes, fields), row_scale), weights)| {
        let mut rows = Rows { curvature, grid, group, weights, codes, fields, row_scale };
        for round in 0..rounds {
            let search = search.as_ref().filter(|_| round < SEARCHES);
            let moved = rows.round(search, &inverses);
            if has_row_scale {
                rows.refit_row_scales();
            }
            if !moved {
                break;
            }
        }
    });
    if !has_row_scale {
        encoded.row_scale.clear();
    }
}

/// Some rows of a matrix, `[rows, K]`.
struct Rows<'a> {
    curvature: &'a Curvature,
    grid: &'a CodeGrid,
    group: usize,
    weights: &'a [f32],
    codes: &'a mut [u8],
    fields: &'a mut [u16],
    row_scale: &'a mut [f32],
}

impl Rows<'_> {
    /// What the codes stand for, `[rows, K]`.
    fn values(&self) -> Vec<f32> {
        let (k, groups) = (self.curvature.width(), self.curvature.width() / self.group);
        let mut values = Vec::with_capacity(self.codes.len());
        for (row, codes) in self.codes.chunks_exact(k).enumerate() {
            for (g, codes) in codes.chunks_exact(self.group).enumerate() {
                let s = self.grid.group_scale(self.fields[row * groups + g], self.row_scale[row]);
                values.extend(codes.iter().map(|c| s.scale * self.grid.value(s.choice, *c)));
            }
        }
        values
    }

    /// Goes over all groups once; whether anything changed. `inverses` are those of `A_GG`, for the search.
    fn round(&mut self, search: Option<&TableSearch>, inverses: &[f32]) -> bool {
        let (k, group) = (self.curvature.width(), self.group);
        let (rows, groups) = (self.row_scale.len(), k / group);
        let mut errors: Vec<f32> = self.values().iter().zip(self.weights).map(|(v, w)| v - w).collect();
        let mut gradient = vec![0.0f32; rows * group];
        let mut form = vec![0.0f32; group * group];
        let mut moved = false;
        for g in 0..groups {
            let span = g * group..(g + 1) * group;
            self.curvature.gradient(&errors, span.clone(), &mut gradient);
            for (i, form) in form.chunks_exact_mut(group).enumerate() {
                form.copy_from_slice(&self.curvature.row(span.start + i)[span.clone()]);
            }
            for row in 0..rows {
                let at = row * k + span.start;
                let field = &mut self.fields[row * groups + g];
                let now = self.grid.group_scale(*field, self.row_scale[row]);
                if now.scale == 0.0 {
                    continue;
                }
                let local = Local {
                    grid: self.grid,
                    form: &form,
                    gradient: &gradient[row * group..(row + 1) * group],
                    targets: &self.weights[at..at + group],
                    start: errors[at..at + group].to_vec(),
                };
                let codes = &mut self.codes[at..at + group];
                let row_scale = self.row_scale[row];
                let searched = search.and_then(|s| {
                    let inverse = &inverses[span.start * group..span.end * group];
                    local.searched(s, inverse, row_scale)
                });
                if let Some((new_field, new_codes)) = local.improve(*field, now, row_scale, codes, searched) {
                    moved = true;
                    *field = new_field;
                    codes.copy_from_slice(&new_codes);
                    let s = self.grid.group_scale(new_field, self.row_scale[row]);
                    for (i, code) in new_codes.iter().enumerate() {
                        errors[at + i] = s.scale * self.grid.value(s.choice, *code) - self.weights[at + i];
                    }
                }
            }
        }
        moved
    }

    /// Moves every row's scale to `1 - (v A d) / (v A v)` times itself, v being the row's values and d its errors.
    fn refit_row_scales(&mut self) {
        let k = self.curvature.width();
        let values = self.values();
        let mut products = vec![0.0f32; values.len()];
        self.curvature.gradient(&values, 0..k, &mut products);
        let rows = values.chunks_exact(k).zip(products.chunks_exact(k)).zip(self.weights.chunks_exact(k));
        for (((v, p), w), scale) in rows.zip(&mut *self.row_scale) {
            let (mut along, mut square) = (0.0f64, 0.0f64);
            for ((v, p), w) in v.iter().zip(p).zip(w) {
                along += f64::from(*p) * f64::from(v - w);
                square += f64::from(*p) * f64::from(*v);
            }
            if square > 0.0 {
                let factor = 1.0 - along / square;
                let moved = (f64::from(*scale) * factor) as f32;
                if factor > 0.0 && moved.is_normal() {
                    *scale = moved;
                }
            }
        }
    }
}

/// One group of one row: the quadratic `2 (x - start)·gradient + (x - start) form (x - start)ᵀ` over errors `x`.
struct Local<'a> {
    grid: &'a CodeGrid,
    /// `A_GG`.
    form: &'a [f32],
    /// Of the row's error at `start`.
    gradient: &'a [f32],
    targets: &'a [f32],
    /// The group's errors as they are.
    start: Vec<f32>,
}

impl Local<'_> {
    /// A field and codes with a lower error, if some are found.
    fn improve(
        &self,
        field: u16,
        now: GroupScale,
        row_scale: f32,
        codes: &[u8],
        searched: Option<(u16, Vec<f32>)>,
    ) -> Option<(u16, Vec<u8>)> {
        let mut best = self.with_codes(now, codes.to_vec());
        let mut best_field = field;
        let (mut scale, mut step) = (now, 0);
        if let Some((other, ideal)) = searched.filter(|(other, _)| *other != field) {
            let s = self.grid.group_scale(other, row_scale);
            let nearest = ideal.iter().map(|w| self.grid.round(s.choice, w / s.scale).0).collect();
            let tried = self.with_codes(s, nearest);
            if tried.gain > best.gain {
                (best, best_field, scale) = (tried, other, s);
            }
        }
        // The closed-form scale for the best codes so far, then codes for that scale, until neither moves.
        while step < 3 {
            step += 1;
            let optimum = self.best_scale(scale, &best.codes);
            let Some((field, moved)) = self.grid.field(optimum, scale.choice, row_scale) else { break };
            if field == best_field {
                break;
            }
            let tried = self.with_codes(moved, best.codes.clone());
            if tried.gain <= best.gain {
                break;
            }
            (best, best_field, scale) = (tried, field, moved);
        }
        let margin = 1e-6 * self.start.iter().zip(self.gradient).map(|(e, g)| (e * g).abs()).sum::<f32>();
        (best.gain > margin && (best_field != field || best.codes != codes))
            .then_some((best_field, best.codes))
    }

    /// The values at which the quadratic is least, `values - gradient form⁻¹`, and the field a search finds for them.
    fn searched(&self, search: &TableSearch, inverse: &[f32], row_scale: f32) -> Option<(u16, Vec<f32>)> {
        let n = self.start.len();
        let ideal: Vec<f32> = (0..n)
            .map(|i| {
                let step: f32 =
                    inverse[i * n..(i + 1) * n].iter().zip(self.gradient).map(|(a, g)| a * g).sum();
                self.targets[i] + self.start[i] - step
            })
            .collect();
        let importance: Vec<f32> = (0..n).map(|i| self.form[i * n + i]).collect();
        Some((search.field_of_group(&ideal, &importance, row_scale)?, ideal))
    }

    /// Goes over the codes at a given scale.
    fn with_codes(&self, s: GroupScale, mut codes: Vec<u8>) -> Tried {
        let n = codes.len();
        let mut change: Vec<f32> = codes
            .iter()
            .zip(self.targets.iter().zip(&self.start))
            .map(|(c, (w, e))| s.scale * self.grid.value(s.choice, *c) - w - e)
            .collect();
        let mut gradient = self.gradient.to_vec();
        for (c, row) in change.iter().zip(self.form.chunks_exact(n)) {
            if *c != 0.0 {
                gradient.iter_mut().zip(row).for_each(|(g, a)| *g += c * a);
            }
        }
        for _ in 0..CODE_SWEEPS {
            let mut moved = false;
            for i in 0..n {
                let row = &self.form[i * n..(i + 1) * n];
                let value = self.targets[i] + self.start[i] + change[i];
                let (code, rounded) = self.grid.round(s.choice, (value - gradient[i] / row[i]) / s.scale);
                let step = s.scale * rounded - value;
                if code != codes[i] && 2.0 * gradient[i] * step + row[i] * step * step < 0.0 {
                    (codes[i], moved) = (code, true);
                    change[i] += step;
                    gradient.iter_mut().zip(row).for_each(|(g, a)| *g += step * a);
                }
            }
            if !moved {
                break;
            }
        }
        // The quadratic from its gradients at both ends.
        let gain = change
            .iter()
            .zip(self.gradient.iter().zip(&gradient))
            .map(|(c, (before, after))| -c * (before + after))
            .sum();
        Tried { codes, gain }
    }

    /// The scale at which the codes' values have the least error.
    fn best_scale(&self, s: GroupScale, codes: &[u8]) -> f32 {
        let n = codes.len();
        let integers: Vec<f32> = codes.iter().map(|c| self.grid.value(s.choice, *c)).collect();
        let (mut along, mut square) = (0.0f32, 0.0f32);
        for (i, row) in self.form.chunks_exact(n).enumerate() {
            let (mut moved, mut curved) = (0.0f32, 0.0f32);
            for (j, a) in row.iter().enumerate() {
                let change = s.scale * integers[j] - self.targets[j] - self.start[j];
                moved += a * change;
                curved += a * integers[j];
            }
            along += integers[i] * (self.gradient[i] + moved);
            square += integers[i] * curved;
        }
        if square > 0.0 { s.scale - along / square } else { s.scale }
    }
}

/// Codes for one scale, and by how much they lower the error.
struct Tried {
    codes: Vec<u8>,
    gain: f32,
}
