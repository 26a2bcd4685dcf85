//! The reference encoder: for each group the scale, of some that are tried, with the least squared error, and the codes nearest
//! by it. Works for every compressed format, since it asks nothing but the description; passes know better ways for some.

use crate::encoded::{Encoded, FormatError};
use crate::formats::{FormatRef, Scale, Value};
use half::bf16;

/// Scales that are tried, as shares of the one at which nothing is clipped.
const SHARES: [f32; 10] = [1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.73, 0.68, 0.6];

/// A way to read codes: the values they stand for before scaling, ascending, with their codes.
struct Grid {
    choice: u16,
    values: Vec<(f32, u8)>,
}

impl Grid {
    /// All ways a group of the format can be read.
    fn all(format: FormatRef) -> Vec<Grid> {
        match format.value {
            Value::Float(_) => Vec::new(),
            Value::Int8 => {
                let values = (-127i8..=127).map(|code| (f32::from(code), code as u8)).collect();
                vec![Grid { choice: 0, values }]
            }
            Value::Table(table) => {
                let choices = match format.scale {
                    Scale::RowF32Field8 { choice_bits, .. } => 1u16 << choice_bits,
                    _ => 1,
                };
                let entries = |choice: u16| {
                    let moved = f32::from(choice) * f32::from(table.shift);
                    let values = table.entries.iter().zip(0u8..);
                    values.map(|(entry, code)| (f32::from(*entry) + moved, code)).collect()
                };
                (0..choices).map(|choice| Grid { choice, values: entries(choice) }).collect()
            }
        }
    }

    /// The value nearest to `x`, and its code.
    fn nearest(&self, x: f32) -> (f32, u8) {
        let above = self.values.partition_point(|(v, _)| *v < x);
        let pick = |at: usize| self.values.get(at).copied();
        match (above.checked_sub(1).and_then(pick), pick(above)) {
            (Some(low), Some(high)) => {
                if x - low.0 <= high.0 - x {
                    low
                } else {
                    high
                }
            }
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => (0.0, 0),
        }
    }

    /// The scale at which no weight of the group is clipped, for a scale of that sign.
    fn unclipped(&self, weights: &[f32], sign: f32) -> f32 {
        let (least, most) = match (self.values.first(), self.values.last()) {
            (Some(first), Some(last)) => (first.0, last.0),
            _ => return 0.0,
        };
        weights.iter().fold(0.0f32, |s, w| {
            let w = w * sign;
            s.max(if w > 0.0 { w / most.max(1.0) } else { w / least.min(-1.0) })
        })
    }

    fn error(&self, weights: &[f32], importance: &[f32], scale: f32) -> f32 {
        if scale == 0.0 {
            return weights.iter().zip(importance).map(|(w, i)| w * w * i).sum();
        }
        let inverse = 1.0 / scale;
        let one = |(w, i): (&f32, &f32)| {
            let d = w - scale * self.nearest(w * inverse).0;
            d * d * i
        };
        weights.iter().zip(importance).map(one).sum()
    }
}

/// A scale that a group may get: its field, and the number it stands for.
type Candidate = (u16, f32);

impl Encoded {
    /// Encodes finite weights `[n, k]` in any format with its default table. `importance` is what a squared error in each column
    /// counts, `[k]`; all alike without it.
    ///
    /// # Errors
    /// [`FormatError`] when the format cannot hold the shape, or a length is wrong.
    pub fn nearest(
        format: FormatRef,
        n: usize,
        k: usize,
        weights: &[f32],
        importance: Option<&[f32]>,
    ) -> Result<Encoded, FormatError> {
        if format.is_uncompressed() {
            return Encoded::from_f32(format, n, k, weights);
        }
        let mut out = Encoded::zeros(format, n, k)?;
        if weights.len() != n * k {
            return Err(FormatError::Length { what: "weights", expected: n * k, got: weights.len() });
        }
        let alike = vec![1.0; k];
        let importance = importance.unwrap_or(&alike);
        if importance.len() != k {
            return Err(FormatError::Length { what: "importance", expected: k, got: importance.len() });
        }
        let (grids, groups) = (Grid::all(format), out.groups());
        for row in 0..n {
            let w = &weights[row * k..(row + 1) * k];
            let codes = &mut out.codes[row * k..(row + 1) * k];
            let fields = &mut out.field[row * groups..(row + 1) * groups];
            let scale = encode_row(format, &grids, w, importance, codes, fields);
            if let Some(slot) = out.row_scale.get_mut(row) {
                *slot = scale;
            }
        }
        Ok(out)
    }
}

/// Encodes a row and gives its scale, 1 where rows have none.
fn encode_row(
    format: FormatRef,
    grids: &[Grid],
    w: &[f32],
    importance: &[f32],
    codes: &mut [u8],
    fields: &mut [u16],
) -> f32 {
    let group = format.group;
    let signs: &[f32] = match format.scale {
        Scale::RowF32Field8 { bias, .. } if bias > 0 => &[1.0, -1.0],
        _ => &[1.0],
    };
    let row_scale = match format.scale {
        Scale::RowF32Field8 { bias, choice_bits } => {
            let most = most_scale(bias, choice_bits);
            let needs = w
                .chunks_exact(group)
                .map(|g| grids.iter().map(|grid| grid.unclipped(g, 1.0)).fold(f32::INFINITY, f32::min));
            needs.fold(0.0f32, f32::max) / most as f32
        }
        _ => 1.0,
    };
    let parts = w.chunks_exact(group).zip(importance.chunks_exact(group)).zip(codes.chunks_exact_mut(group));
    for (((w, importance), codes), field) in parts.zip(fields) {
        let mut best: Option<(f32, &Grid, Candidate)> = None;
        for grid in grids {
            for sign in signs {
                let unclipped = grid.unclipped(w, *sign);
                for candidate in candidates(format, grid.choice, row_scale, unclipped, *sign) {
                    let error = grid.error(w, importance, candidate.1);
                    if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                        best = Some((error, grid, candidate));
                    }
                }
            }
        }
        let Some((_, grid, (chosen, scale))) = best else { continue };
        *field = chosen;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        codes.iter_mut().zip(w).for_each(|(code, w)| *code = grid.nearest(w * inverse).1);
    }
    row_scale
}

/// Largest size of a stored integer scale, on both sides where it is signed.
fn most_scale(bias: i32, choice_bits: u32) -> i32 {
    let stored = (1 << (8 - choice_bits)) - 1;
    let most = if bias > 0 { bias.min(stored - bias) } else { stored };
    most.max(1)
}

/// Fields to try for a group, and the scales they stand for.
fn candidates(format: FormatRef, choice: u16, row_scale: f32, unclipped: f32, sign: f32) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = Vec::with_capacity(SHARES.len());
    for share in SHARES {
        let wanted = unclipped * share;
        let candidate = match format.scale {
            Scale::None => continue,
            Scale::Bf16 => {
                let scale = bf16::from_f32(wanted.min(f32::from(bf16::MAX)));
                (scale.to_bits(), scale.to_f32())
            }
            Scale::RowF32Field8 { bias, choice_bits } => {
                let most = most_scale(bias, choice_bits);
                let steps = if row_scale > 0.0 { (wanted / row_scale).round() as i32 } else { 0 };
                let steps = steps.clamp(0, most) * if sign < 0.0 { -1 } else { 1 };
                let field = ((steps + bias) as u16) << choice_bits | choice;
                (field, row_scale * steps as f32)
            }
        };
        if all.last() != Some(&candidate) {
            all.push(candidate);
        }
    }
    all
}
