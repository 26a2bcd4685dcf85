//! Choosing scales and codes of one row of weights so that the squared error is small.
//!
//! Not a pass: the search that `quantize-rtn` uses, row by row and without knowledge of activations. Rows are
//! independent and the arithmetic is a fixed sequence, so results do not depend on threads.
//!
//! Rows are divided by their largest magnitude first, so huge and tiny weights meet no overflow or underflow
//! in the sums of squares.
//! Reference: docs/formats.md (what each part of the search is worth).

use attar_format::formats::{N4_SHIFT, N4_TABLE};
use half::bf16;

/// Rows and groups whose largest magnitude is below this become zero: their scales would be subnormal numbers,
/// which are slow to compute with and say nothing.
pub const TINY: f32 = 1e-30;

/// Weights that share a scale.
const GROUP: usize = 32;

/// Chooses codes of table formats: a scale and a table choice per group, an f32 per row.
#[derive(Clone, Debug)]
pub struct TableSearch {
    /// The table as it is, and with the shift added.
    tables: [[f32; 16]; 2],
    /// For every half-integer interval, the entry of each table that is nearest.
    nearest: std::sync::Arc<[[u8; CELLS]; 2]>,
    /// What is subtracted from the stored 7-bit scale.
    bias: i32,
    /// Fractions of the scale at which nothing is clipped; each is tried.
    fractions: Vec<f32>,
    /// Integer scales tried on either side of the rounded one.
    window: i32,
}

/// Table entries are integers, so every border between two codes is a multiple of one half.
const CELLS: usize = 1024;
const HALF_RANGE: f32 = 256.0;

/// Largest table entry plus shift that the lookup covers.
const _: () = assert!(127 + 127 < HALF_RANGE as i32);

/// What the search chose for a group before scales are integers.
#[derive(Clone, Copy)]
struct Free {
    /// Best scale for each of the four ways: choice bit, and sign.
    scale: [f32; 4],
    error: [f32; 4],
}

/// What the search chose for a row divided by its largest magnitude.
struct Chosen {
    unit: f32,
    /// Integer scale, and way of reading the group.
    scales: Vec<(i32, usize)>,
}

/// Sums over a group: weights against table values, and table values squared.
#[derive(Clone, Copy)]
struct Sums {
    wt: f32,
    tt: f32,
}

impl TableSearch {
    /// The search for `n4`. `candidates` scales are tried per group and table.
    pub fn n4(candidates: usize, bias: i32) -> TableSearch {
        TableSearch::new(N4_TABLE, N4_SHIFT, bias, candidates)
    }

    /// A search for a table in ascending order.
    pub fn new(table: [i8; 16], shift: i8, bias: i32, candidates: usize) -> TableSearch {
        let shifted = |add: i8| table.map(|t| f32::from(t) + f32::from(add));
        let tables = [shifted(0), shifted(shift)];
        let n = candidates.max(1);
        // One candidate is plain rounding: the scale at which nothing is clipped.
        let fractions = (0..n).map(|i| 1.0 - FRACTION_SPAN * i as f32 / (n.max(2) - 1) as f32).collect();
        let nearest = tables.map(|t| std::array::from_fn(|cell| nearest_code(&t, cell))).into();
        TableSearch { tables, nearest, bias, fractions, window: if n == 1 { 0 } else { WINDOW } }
    }

    /// Whether scales may be negative, which mirrors the table.
    fn signed(&self) -> bool {
        self.bias > 0
    }

    /// Largest magnitude of an integer scale.
    fn max_scale(&self) -> i32 {
        if self.signed() { self.bias.min(127 - self.bias) } else { 127 }
    }

    /// The ways of reading a group: bit 0 is the choice, bit 1 the sign.
    fn ways(&self) -> std::ops::Range<usize> {
        0..if self.signed() { 4 } else { 2 }
    }

    /// Encodes a row of finite weights: codes one per byte, fields one per group. Returns the row scale.
    pub fn encode_row(&self, weights: &[f32], codes: &mut [u8], fields: &mut [u16]) -> f32 {
        let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        let zero = (self.bias as u16) << 1;
        if largest < TINY {
            codes.fill(0);
            fields.fill(zero);
            return 0.0;
        }
        let row: Vec<f32> = weights.iter().map(|w| w / largest).collect();
        let groups: Vec<[f32; GROUP]> = row.as_chunks::<GROUP>().0.to_vec();
        let mut found = self.choose(&groups);
        if self.fractions.len() > 1 {
            // The search is greedy in places; it must still never be worse than not searching.
            let plain = TableSearch { fractions: vec![1.0], window: 0, ..self.clone() }.choose(&groups);
            if self.row_error(&groups, &plain) < self.row_error(&groups, &found) {
                found = plain;
            }
        }
        let Chosen { unit, scales } = found;
        for (g, (group, &(scale, way))) in groups.iter().zip(&scales).enumerate() {
            let (choice, sign) = (way & 1, if way & 2 == 0 { 1 } else { -1 });
            fields[g] = (((scale * sign + self.bias) as u16) << 1) | choice as u16;
            let codes = &mut codes[g * GROUP..(g + 1) * GROUP];
            let inverse = inverse_of(unit, scale, way);
            for (code, w) in codes.iter_mut().zip(group) {
                *code = self.nearest[choice][cell_of(w * inverse)];
            }
        }
        unit * largest
    }

    /// The row scale, and an integer scale and way of reading for every group.
    fn choose(&self, groups: &[[f32; GROUP]]) -> Chosen {
        let free: Vec<Free> = groups.iter().map(|g| self.search_free(g)).collect();
        let top = free.iter().map(|f| f.scale[best(&f.error)]).fold(0.0f32, f32::max);
        let at = |unit: f32| Chosen {
            unit,
            scales: groups.iter().zip(&free).map(|(g, f)| self.search_integer(g, f, unit)).collect(),
        };
        let first = at(top / self.max_scale() as f32);
        if self.fractions.len() == 1 {
            return first;
        }
        // With codes and integer scales as they are, the row scale has a closed-form optimum; at that row scale
        // other codes may be nearer.
        let Some(second) = self.refit(groups, &first).map(at) else { return first };
        if self.row_error(groups, &second) < self.row_error(groups, &first) { second } else { first }
    }

    /// Best real-valued scale for each way of reading the group.
    fn search_free(&self, group: &[f32; GROUP]) -> Free {
        let mut found = Free { scale: [0.0; 4], error: [f32::INFINITY; 4] };
        let square: f32 = group.iter().map(|w| w * w).sum();
        for way in self.ways() {
            let table = &self.tables[way & 1];
            let sign = if way & 2 == 0 { 1.0 } else { -1.0 };
            let (low, high) =
                group.iter().fold((0.0f32, 0.0f32), |(low, high), w| (low.min(w * sign), high.max(w * sign)));
            let unclipped = (high / table[15]).max(low / table[0]);
            if unclipped <= 0.0 {
                (found.scale[way], found.error[way]) = (0.0, square);
                continue;
            }
            for fraction in &self.fractions {
                let scale = unclipped * fraction;
                let sums = self.sums(group, way, sign / scale);
                let error = square - 2.0 * scale * sign * sums.wt + scale * scale * sums.tt;
                if error < found.error[way] {
                    (found.scale[way], found.error[way]) = (scale, error);
                }
            }
        }
        found
    }

    /// Best integer scale near the free ones, and the way of reading the group.
    fn search_integer(&self, group: &[f32; GROUP], free: &Free, unit: f32) -> (i32, usize) {
        let square: f32 = group.iter().map(|w| w * w).sum();
        // A scale of zero makes the group zero; nothing worse is accepted.
        let (mut least, mut chosen) = (square, (0, 0));
        // Plain rounding keeps the way the free search found best.
        let plain = [best(&free.error)];
        let ways: Vec<usize> = if self.fractions.len() > 1 { self.ways().collect() } else { plain.to_vec() };
        for way in ways {
            let sign = if way & 2 == 0 { 1.0 } else { -1.0 };
            let middle = (free.scale[way] / unit).round() as i32;
            for scale in middle - self.window..=middle + self.window {
                let scale = scale.clamp(1, self.max_scale());
                let real = scale as f32 * unit;
                let sums = self.sums(group, way, inverse_of(unit, scale, way));
                let error = square - 2.0 * real * sign * sums.wt + real * real * sums.tt;
                if error < least {
                    (least, chosen) = (error, (scale, way));
                }
            }
        }
        chosen
    }

    /// The row scale with the least error for given integer scales and the codes they imply.
    fn refit(&self, groups: &[[f32; GROUP]], chosen: &Chosen) -> Option<f32> {
        let (mut wt, mut tt) = (0.0f64, 0.0f64);
        for (group, &(scale, way)) in groups.iter().zip(&chosen.scales) {
            if scale == 0 {
                continue;
            }
            let sign = if way & 2 == 0 { 1.0 } else { -1.0 };
            let sums = self.sums(group, way, inverse_of(chosen.unit, scale, way));
            let signed = f64::from(scale) * sign;
            wt += signed * f64::from(sums.wt);
            tt += signed * signed * f64::from(sums.tt);
        }
        let better = (wt / tt) as f32;
        (better.is_finite() && better > 0.0).then_some(better)
    }

    fn row_error(&self, groups: &[[f32; GROUP]], chosen: &Chosen) -> f64 {
        let (mut total, unit) = (0.0f64, chosen.unit);
        for (group, &(scale, way)) in groups.iter().zip(&chosen.scales) {
            let inverse = inverse_of(unit, scale, way);
            let signed = if way & 2 == 0 { scale as f32 * unit } else { -(scale as f32) * unit };
            let table = &self.tables[way & 1];
            for w in group {
                let value = if scale == 0 {
                    0.0
                } else {
                    signed * table[usize::from(self.nearest[way & 1][cell_of(w * inverse)])]
                };
                total += f64::from(w - value) * f64::from(w - value);
            }
        }
        total
    }

    /// Sums for the codes nearest at a scale of which the inverse, with its sign, is given.
    fn sums(&self, group: &[f32; GROUP], way: usize, inverse: f32) -> Sums {
        let (table, nearest) = (&self.tables[way & 1], &self.nearest[way & 1]);
        // Four chains of additions, so that one need not wait for the other.
        let (mut wt, mut tt) = ([0.0f32; 4], [0.0f32; 4]);
        for four in group.as_chunks::<4>().0 {
            for lane in 0..4 {
                let w = four[lane];
                let t = table[usize::from(nearest[cell_of(w * inverse)] & 15)];
                wt[lane] += w * t;
                tt[lane] += t * t;
            }
        }
        let sum = |v: [f32; 4]| (v[0] + v[1]) + (v[2] + v[3]);
        Sums { wt: sum(wt), tt: sum(tt) }
    }
}

/// How far below the unclipped scale candidates reach.
const FRACTION_SPAN: f32 = 0.3;

/// Integer scales tried on either side.
const WINDOW: i32 = 2;

fn best(errors: &[f32; 4]) -> usize {
    (0..4).fold(0, |b, i| if errors[i] < errors[b] { i } else { b })
}

/// What a weight is multiplied by before it is looked up in the table.
fn inverse_of(unit: f32, scale: i32, way: usize) -> f32 {
    let inverse = 1.0 / (unit * scale as f32);
    if way & 2 == 0 { inverse } else { -inverse }
}

/// The half-integer interval of a value in table units.
#[inline(always)]
fn cell_of(y: f32) -> usize {
    let cell = (y + HALF_RANGE) * 2.0;
    cell.clamp(0.0, (CELLS - 1) as f32) as usize
}

/// The entry nearest to the middle of an interval; at a border the upper one.
fn nearest_code(table: &[f32; 16], cell: usize) -> u8 {
    let y = (cell as f32 + 0.5) / 2.0 - HALF_RANGE;
    (1..16).fold(0, |code, i| if y > (table[i - 1] + table[i]) / 2.0 { i as u8 } else { code })
}

/// Encodes one group as `w8`: a bf16 scale and integers in −127..=127. `candidates` scales are tried, the largest
/// being the smallest bf16 that clips nothing. Returns the scale's bits, or `None` when no finite scale fits.
pub fn encode_w8_group(weights: &[f32], candidates: usize, codes: &mut [u8]) -> Option<u16> {
    let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    if largest < TINY {
        codes.fill(0);
        return Some(0);
    }
    let mut up = bf16::from_f32(largest / 127.0);
    if up.to_f32() * 127.0 < largest {
        up = bf16::from_bits(up.to_bits() + 1);
    }
    if !(up.to_f32() * 127.0).is_finite() {
        return None;
    }
    let (mut least, mut chosen) = (f32::INFINITY, up.to_bits());
    for step in 0..candidates.max(1) as u16 {
        let bits = up.to_bits() - step;
        // In units of the scale the error of large and tiny weights alike stays within range.
        let unit = bf16::from_bits(bits).to_f32();
        let relative = unit / up.to_f32();
        let error: f32 = weights
            .iter()
            .map(|w| {
                let y = w / unit;
                (y - round_w8(y)).powi(2)
            })
            .sum();
        let error = error * relative * relative;
        if error < least {
            (least, chosen) = (error, bits);
        }
    }
    let unit = bf16::from_bits(chosen).to_f32();
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = round_w8(w / unit) as i8 as u8;
    }
    Some(chosen)
}

/// Nearest integer in −127..=127, ties to even.
#[inline(always)]
fn round_w8(y: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 leaves no fraction bits, which needs no instruction beyond SSE2.
    const MAGIC: f32 = 12_582_912.0;
    (y.clamp(-127.0, 127.0) + MAGIC) - MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lookup_finds_the_nearest_entry() {
        let search = TableSearch::n4(1, 0);
        for choice in 0..2 {
            for i in -3000..3000 {
                let y = i as f32 / 10.0 + 0.013;
                let code = search.nearest[choice][cell_of(y)];
                let distance = |c: usize| (search.tables[choice][c] - y).abs();
                let least = (0..16).map(distance).fold(f32::INFINITY, f32::min);
                assert_eq!(distance(usize::from(code)), least, "{y}");
            }
        }
    }

    #[test]
    fn w8_rounding_is_to_even_and_clamped() {
        for (y, expected) in
            [(0.5, 0.0), (1.5, 2.0), (-2.5, -2.0), (126.6, 127.0), (300.0, 127.0), (-1e30, -127.0)]
        {
            assert_eq!(round_w8(y), expected);
        }
    }
}
