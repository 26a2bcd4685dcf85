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
//! The gradient `d A` is computed once and then follows what moves. All rows of a chunk are gone over together.
//! Reference: cyclic coordinate descent for this problem: Behdin et al. 2023, arXiv:2309.01885 (QuantEase).

#![expect(clippy::needless_range_loop, reason = "the lanes of several arrays are gone over together")]

use super::code_grid::{CodeGrid, Integers, Kind, Rounding};
use super::curvature::Curvature;
use super::error_feedback::inverse_scales;
use super::row_chunk::{Group, Lanes, ROWS, RowChunk, matrix, matrix_mut};
use super::scale_search::{GROUP, TableSearch};
use super::vector_level::{Level, Work};
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};

/// Rounds in which scales are searched anew.
const SEARCHES: usize = 2;

/// Times the codes of a group are gone over for one scale.
const CODE_SWEEPS: usize = 3;

/// Times the scale of a group moves in one round.
const SCALE_STEPS: usize = 3;

/// Columns after which the gradient of all other columns follows.
const BLOCK: usize = 128;

/// `[GROUP, GROUP]`.
type Form = [[f32; GROUP]; GROUP];

/// What descending needs of a curvature and a format, whatever the rows.
pub(super) struct Descent<'a> {
    curvature: &'a Curvature,
    grid: &'a CodeGrid,
    search: Option<TableSearch>,
    groups: Vec<Forms>,
    has_row_scale: bool,
    level: Level,
}

/// A group's part of the curvature.
struct Forms {
    /// `A_GG`.
    form: Form,
    diagonal: [f32; GROUP],
    inverse_diagonal: [f32; GROUP],
    /// `A_GG⁻¹`.
    inverse: Form,
}

impl<'a> Descent<'a> {
    pub(super) fn new(
        curvature: &'a Curvature,
        grid: &'a CodeGrid,
        search: Option<TableSearch>,
        has_row_scale: bool,
        level: Level,
    ) -> Descent<'a> {
        let inverses = curvature.group_inverses(GROUP);
        let forms = |(g, inverse): (usize, &[f32])| {
            let mut forms = Forms {
                form: [[0.0; GROUP]; GROUP],
                diagonal: [0.0; GROUP],
                inverse_diagonal: [0.0; GROUP],
                inverse: [[0.0; GROUP]; GROUP],
            };
            for i in 0..GROUP {
                let row = &curvature.row(g * GROUP + i)[g * GROUP..(g + 1) * GROUP];
                forms.form[i].copy_from_slice(row);
                forms.inverse[i].copy_from_slice(&inverse[i * GROUP..(i + 1) * GROUP]);
                forms.diagonal[i] = row[i];
                forms.inverse_diagonal[i] = 1.0 / row[i];
            }
            forms
        };
        let groups = inverses.chunks_exact(GROUP * GROUP).enumerate().map(forms).collect();
        Descent { curvature, grid, search, groups, has_row_scale, level }
    }

    /// Lowers the errors of some rows in at most `rounds` rounds over all groups. Gives `w A wᵀ` of each row where that was
    /// computed on the way.
    pub(super) fn descend(&self, chunk: &mut RowChunk, rounds: usize) -> Option<[f64; ROWS]> {
        if rounds == 0 {
            return None;
        }
        let k = chunk.width();
        let mut errors = chunk.errors();
        // `errors · A`, and `weights · A`: how the former changes with the scales of rows.
        let mut gradient = vec![[0.0f32; ROWS]; k];
        let mut along_weights = vec![[0.0f32; ROWS]; if self.has_row_scale { k } else { 0 }];
        self.curvature.product(0..k, 0..k, &errors, &mut gradient, false);
        if self.has_row_scale {
            self.curvature.product(0..k, 0..k, &chunk.weights, &mut along_weights, false);
        }
        let mut changes = vec![[0.0f32; ROWS]; k.min(BLOCK)];
        for round in 0..rounds {
            let search = self.search.as_ref().filter(|_| round < SEARCHES);
            let mut moved = false;
            for start in (0..k).step_by(BLOCK) {
                let end = (start + BLOCK).min(k);
                let changes = &mut changes[..end - start];
                changes.as_flattened_mut().fill(0.0);
                let mut block_moved = false;
                for at in (start..end).step_by(GROUP) {
                    let span = at..at + GROUP;
                    let change = &mut changes[at - start..at - start + GROUP];
                    let local = Local {
                        forms: &self.groups[at / GROUP],
                        grid: self.grid,
                        search,
                        gradient: lanes_of(&gradient[span.clone()]),
                        weights: lanes_of(&chunk.weights[span.clone()]),
                        row_scale: &chunk.row_scale,
                        group: &mut chunk.groups[at / GROUP],
                        values: &mut chunk.values[span.clone()],
                        errors: &mut errors[span.clone()],
                        change: &mut *change,
                    };
                    let group_moved = match &self.grid.kind {
                        Kind::Tables(tables) => self.level.run(Improve { local, rounding: tables }),
                        Kind::Integers => self.level.run(Improve { local, rounding: &Integers }),
                    };
                    if group_moved {
                        block_moved = true;
                        self.curvature.product(start..end, span, change, &mut gradient[start..end], true);
                    }
                }
                if block_moved {
                    moved = true;
                    let (before, rest) = gradient.split_at_mut(start);
                    self.curvature.product(0..start, start..end, changes, before, true);
                    self.curvature.product(end..k, start..end, changes, &mut rest[end - start..], true);
                }
            }
            if self.has_row_scale {
                self.refit_row_scales(chunk, &mut errors, &mut gradient, &along_weights);
            }
            if !moved {
                break;
            }
        }
        self.has_row_scale.then(|| {
            let mut square = [0.0f64; ROWS];
            for (weight, along) in chunk.weights.iter().zip(&along_weights) {
                (0..ROWS).for_each(|r| square[r] += f64::from(weight[r]) * f64::from(along[r]));
            }
            square
        })
    }

    /// Moves every row's scale to `1 - (v A d) / (v A v)` times itself, v being the row's values and d its errors.
    fn refit_row_scales(
        &self,
        chunk: &mut RowChunk,
        errors: &mut Vec<Lanes>,
        gradient: &mut [Lanes],
        along_weights: &[Lanes],
    ) {
        let (mut along, mut square) = ([0.0f64; ROWS], [0.0f64; ROWS]);
        for (column, (error, weight)) in errors.iter().zip(&chunk.weights).enumerate() {
            for r in 0..ROWS {
                // v = w + d, so v A = w A + d A.
                let v = f64::from(weight[r] + error[r]);
                along[r] += v * f64::from(gradient[column][r]);
                square[r] += v * f64::from(along_weights[column][r] + gradient[column][r]);
            }
        }
        let (mut scale, mut factor) = (chunk.row_scale, [1.0f32; ROWS]);
        for r in 0..chunk.rows {
            let wanted = 1.0 - along[r] / square[r];
            let moved = (f64::from(scale[r]) * wanted) as f32;
            if square[r] > 0.0 && wanted > 0.0 && moved.is_normal() {
                factor[r] = (f64::from(moved) / f64::from(scale[r])) as f32;
                scale[r] = moved;
            }
        }
        chunk.rescale(&scale, self.grid);
        *errors = chunk.errors();
        for (gradient, weights) in gradient.iter_mut().zip(along_weights) {
            for r in 0..ROWS {
                gradient[r] += (factor[r] - 1.0) * (gradient[r] + weights[r]);
            }
        }
    }
}

impl Curvature {
    /// `change · A` for changes in columns `from`, in columns `to`; added to `out` or instead of it.
    fn product(
        &self,
        to: std::ops::Range<usize>,
        from: std::ops::Range<usize>,
        change: &[Lanes],
        out: &mut [Lanes],
        add: bool,
    ) {
        if to.is_empty() {
            return;
        }
        let accum = if add { Accum::Add } else { Accum::Replace };
        matmul(matrix_mut(out), accum, self.part(to, from), matrix(change), 1.0, Par::Seq);
    }
}

/// The lanes of one group.
fn lanes_of(columns: &[Lanes]) -> &[Lanes; GROUP] {
    const NONE: &[Lanes; GROUP] = &[[0.0; ROWS]; GROUP];
    columns.as_array().unwrap_or(NONE)
}

/// One group of all rows of a chunk. The error of a row is `2 c·gradient + c A_GG cᵀ` above what it is, for changes `c` of the
/// group's values.
struct Local<'a> {
    forms: &'a Forms,
    grid: &'a CodeGrid,
    search: Option<&'a TableSearch>,
    gradient: &'a [Lanes; GROUP],
    weights: &'a [Lanes; GROUP],
    row_scale: &'a Lanes,
    group: &'a mut Group,
    values: &'a mut [Lanes],
    errors: &'a mut [Lanes],
    /// Receives how the errors change.
    change: &'a mut [Lanes],
}

/// Scales and codes that are tried.
#[derive(Clone)]
struct Tried {
    group: Group,
    /// In units of the scales.
    values: [Lanes; GROUP],
    /// Against the group's values as they are.
    change: [Lanes; GROUP],
    /// What the error rises by.
    cost: Lanes,
}

/// Changes scales and codes of a group where that lowers the error; whether any changed.
struct Improve<'a, R> {
    local: Local<'a>,
    rounding: &'a R,
}

impl<R: Rounding> Work for Improve<'_, R> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Improve { local, rounding } = self;
        let Local { forms, grid, search, gradient, weights, row_scale, group, values, errors, change } =
            local;
        // What the group's codes stand for as they are.
        let mut now = [[0.0f32; ROWS]; GROUP];
        let mut margin = [0.0f32; ROWS];
        let mut best = Tried {
            group: group.clone(),
            values: *lanes_of(values),
            change: [[0.0; ROWS]; GROUP],
            cost: [0.0; ROWS],
        };
        for i in 0..GROUP {
            for r in 0..ROWS {
                now[i][r] = group.scale[r] * values[i][r];
                margin[r] += (errors[i][r] * gradient[i][r]).abs();
            }
        }
        let quadratic = Quadratic { forms, gradient, now: &now, rounding };
        let searched = search.map(|search| quadratic.searched(search, grid, group, row_scale, &best));
        quadratic.sweep(&mut best);
        if let Some(mut tried) = searched {
            quadratic.sweep(&mut tried);
            best.take(&tried);
        }
        // The closed-form scale for the best codes so far, then codes for that scale, until neither moves.
        let mut open = [true; ROWS];
        for _ in 0..SCALE_STEPS {
            let Some(mut tried) = quadratic.rescaled(&best, grid, row_scale, &mut open) else { break };
            quadratic.sweep(&mut tried);
            let taken = best.take(&tried);
            (0..ROWS).for_each(|r| open[r] &= taken[r]);
        }
        let mut kept = [false; ROWS];
        let mut any = false;
        for r in 0..ROWS {
            kept[r] = group.scale[r] != 0.0 && best.cost[r] < -1e-6 * margin[r];
            any |= kept[r];
        }
        if !any {
            return false;
        }
        for r in 0..ROWS {
            if kept[r] {
                group.field[r] = best.group.field[r];
                group.scale[r] = best.group.scale[r];
                group.choice[r] = best.group.choice[r];
            }
        }
        for i in 0..GROUP {
            for r in 0..ROWS {
                let value = if kept[r] { best.values[i][r] } else { values[i][r] };
                let error = group.scale[r] * value - weights[i][r];
                values[i][r] = value;
                change[i][r] = error - errors[i][r];
                errors[i][r] = error;
            }
        }
        true
    }
}

impl Tried {
    /// Takes over rows of which `other` costs less; which these are.
    #[inline(always)]
    fn take(&mut self, other: &Tried) -> [bool; ROWS] {
        let mut taken = [false; ROWS];
        for r in 0..ROWS {
            taken[r] = other.cost[r] < self.cost[r];
            self.cost[r] = if taken[r] { other.cost[r] } else { self.cost[r] };
            self.group.field[r] = if taken[r] { other.group.field[r] } else { self.group.field[r] };
            self.group.scale[r] = if taken[r] { other.group.scale[r] } else { self.group.scale[r] };
            self.group.choice[r] = if taken[r] { other.group.choice[r] } else { self.group.choice[r] };
        }
        for i in 0..GROUP {
            for r in 0..ROWS {
                self.values[i][r] = if taken[r] { other.values[i][r] } else { self.values[i][r] };
                self.change[i][r] = if taken[r] { other.change[i][r] } else { self.change[i][r] };
            }
        }
        taken
    }
}

/// The error of the rows as a function of one group.
struct Quadratic<'a, R> {
    forms: &'a Forms,
    gradient: &'a [Lanes; GROUP],
    /// What the group's codes stand for as they are.
    now: &'a [Lanes; GROUP],
    rounding: &'a R,
}

impl<R: Rounding> Quadratic<'_, R> {
    /// `m · x`: for every row of a form the sum over its columns, in two parts.
    #[inline(always)]
    fn times(row: &[f32; GROUP], x: &[Lanes; GROUP]) -> Lanes {
        let (mut even, mut odd) = ([0.0f32; ROWS], [0.0f32; ROWS]);
        for j in (0..GROUP).step_by(2) {
            for r in 0..ROWS {
                even[r] += row[j] * x[j][r];
            }
            for r in 0..ROWS {
                odd[r] += row[j + 1] * x[j + 1][r];
            }
        }
        std::array::from_fn(|r| even[r] + odd[r])
    }

    /// Goes over the codes at given scales.
    #[inline(always)]
    fn sweep(&self, tried: &mut Tried) {
        let (scale, choice) = (&tried.group.scale, &tried.group.choice);
        let inverse = inverse_scales(scale);
        for _ in 0..CODE_SWEEPS {
            let mut moved = false;
            for i in 0..GROUP {
                let bent = Self::times(&self.forms.form[i], &tried.change);
                let (diagonal, inverse_diagonal) = (self.forms.diagonal[i], self.forms.inverse_diagonal[i]);
                let (mut gradient, mut rounded) = ([0.0f32; ROWS], [0.0f32; ROWS]);
                for r in 0..ROWS {
                    gradient[r] = self.gradient[i][r] + bent[r];
                }
                for r in 0..ROWS {
                    let value = scale[r] * tried.values[i][r];
                    let y = (value - gradient[r] * inverse_diagonal) * inverse[r];
                    rounded[r] = self.rounding.nearest(choice[r], y);
                }
                let mut changed = 0u32;
                for r in 0..ROWS {
                    let step = scale[r] * rounded[r] - scale[r] * tried.values[i][r];
                    let cost = step * (2.0 * gradient[r] + diagonal * step);
                    let pays = cost < 0.0;
                    tried.cost[r] += if pays { cost } else { 0.0 };
                    tried.values[i][r] = if pays { rounded[r] } else { tried.values[i][r] };
                    tried.change[i][r] = scale[r] * tried.values[i][r] - self.now[i][r];
                    changed |= u32::from(pays);
                }
                moved |= changed != 0;
            }
            if !moved {
                break;
            }
        }
    }

    /// Scales that a search finds for the values at which the quadratic is least, `values - gradient A_GG⁻¹`, and the
    /// nearest codes.
    #[inline(always)]
    fn searched(
        &self,
        search: &TableSearch,
        grid: &CodeGrid,
        group: &Group,
        row_scale: &Lanes,
        now: &Tried,
    ) -> Tried {
        let mut ideal = [[0.0f32; ROWS]; GROUP];
        for i in 0..GROUP {
            let step = Self::times(&self.forms.inverse[i], self.gradient);
            for r in 0..ROWS {
                ideal[i][r] = self.now[i][r] - step[r];
            }
        }
        let mut tried = now.clone();
        for r in 0..ROWS {
            if group.scale[r] == 0.0 {
                continue;
            }
            let row: [f32; GROUP] = std::array::from_fn(|i| ideal[i][r]);
            let field = search.field_of_group(&row, &self.forms.diagonal, row_scale[r]);
            if let Some(field) = field.filter(|f| *f != group.field[r]) {
                let s = grid.group_scale(field, row_scale[r]);
                tried.group.field[r] = field;
                (tried.group.scale[r], tried.group.choice[r]) = (s.scale, s.choice as u32);
            }
        }
        let inverse = inverse_scales(&tried.group.scale);
        for i in 0..GROUP {
            for r in 0..ROWS {
                tried.values[i][r] = self.rounding.nearest(tried.group.choice[r], ideal[i][r] * inverse[r]);
            }
            for r in 0..ROWS {
                tried.change[i][r] = tried.group.scale[r] * tried.values[i][r] - self.now[i][r];
            }
        }
        tried.cost = [0.0; ROWS];
        for i in 0..GROUP {
            let bent = Self::times(&self.forms.form[i], &tried.change);
            for r in 0..ROWS {
                tried.cost[r] += tried.change[i][r] * (2.0 * self.gradient[i][r] + bent[r]);
            }
        }
        tried
    }

    /// The same codes at the scales at which they have the least error; rows whose scale stays are no longer open. `None` when
    /// all stay.
    #[inline(always)]
    fn rescaled(
        &self,
        best: &Tried,
        grid: &CodeGrid,
        row_scale: &Lanes,
        open: &mut [bool; ROWS],
    ) -> Option<Tried> {
        let (mut along, mut square) = ([0.0f32; ROWS], [0.0f32; ROWS]);
        for i in 0..GROUP {
            let bent = Self::times(&self.forms.form[i], &best.change);
            let curved = Self::times(&self.forms.form[i], &best.values);
            for r in 0..ROWS {
                along[r] += best.values[i][r] * (self.gradient[i][r] + bent[r]);
                square[r] += best.values[i][r] * curved[r];
            }
        }
        let mut group = best.group.clone();
        let mut any = false;
        for r in 0..ROWS {
            let scale = group.scale[r];
            if !open[r] || scale == 0.0 || square[r] <= 0.0 {
                open[r] = false;
                continue;
            }
            let found = grid.field(scale - along[r] / square[r], group.choice[r] as usize, row_scale[r]);
            open[r] = found.is_some_and(|(field, _)| field != group.field[r]);
            if let Some((field, s)) = found.filter(|_| open[r]) {
                (group.field[r], group.scale[r]) = (field, s.scale);
                any = true;
            }
        }
        if !any {
            return None;
        }
        let mut tried = Tried { group, ..best.clone() };
        for r in 0..ROWS {
            let step = tried.group.scale[r] - best.group.scale[r];
            tried.cost[r] += step * (2.0 * along[r] + step * square[r]);
        }
        for i in 0..GROUP {
            for r in 0..ROWS {
                tried.change[i][r] = tried.group.scale[r] * tried.values[i][r] - self.now[i][r];
            }
        }
        Some(tried)
    }
}
