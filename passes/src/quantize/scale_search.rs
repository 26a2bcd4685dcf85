//! Choosing scales and codes of one row of weights so that the squared error is small.
//!
//! Not a pass: the search that the quantizing passes share. Each column's squared error may have a weight, such as the mean
//! square of what the column is multiplied with; without any, all count alike. Rows are
//! independent and the arithmetic is a fixed sequence, so results do not depend on threads.
//!
//! Rows are divided by their largest magnitude first, so huge and tiny weights meet no overflow or underflow
//! in the sums of squares.
//! Reference: docs/formats.md, which has what each part of the search is worth, and what was left out.

use super::vector_level::{Level, Work};
use attar_format::{FormatRef, Scale};
use half::bf16;
use std::sync::Arc;

/// Rows and groups whose largest magnitude is below this become zero: their scales would be subnormal numbers,
/// which are slow to compute with and say nothing.
pub const TINY: f32 = 1e-30;

/// Weights that share a scale.
pub(super) const GROUP: usize = 32;

/// Sums that are kept apart until a group is done.
const LANES: usize = 16;

/// Ways of reading a group that any format has at most, and those that a brief search looks at more closely.
const MOST_WAYS: usize = 8;
const BRIEF_WAYS: usize = 3;

/// Chooses codes of table formats: a signed integer scale and a choice per group, an f32 per row.
///
/// A group can be read in several ways: turned over or not, times the places the choice can move the table to. For
/// every way some fractions of the scale that clips nothing are tried. The row scale is the largest of the scales
/// that did best, over the largest integer; then, for every way, the integers nearest to its best scale are tried.
#[derive(Clone, Debug)]
pub struct TableSearch {
    choice_bits: u32,
    /// What is subtracted from the stored scale.
    bias: i32,
    /// Largest magnitude of an integer scale.
    max_scale: i32,
    ways: Vec<Way>,
    effort: Effort,
    level: Level,
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Fractions of the scale at which nothing is clipped.
    fractions: &'static [f32],
    /// Ways of reading a group, those that did best with `fractions`, for which `more` are tried and integers are.
    ways: usize,
    more: &'static [f32],
    /// Integer scales tried on either side of the rounded one.
    window: i32,
}

/// The scale that clips nothing, rounded to an integer.
const PLAIN: Effort = Effort { fractions: &[1.0], ways: MOST_WAYS, more: &[], window: 0 };

/// One way of reading a group.
#[derive(Clone, Debug)]
struct Way {
    choice: u16,
    /// −1 when the scale is negative.
    sign: f32,
    /// Moved to where the choice puts it, ascending.
    table: Vec<f32>,
    /// For every half-integer interval the nearest entry, as code and as value.
    codes: Arc<[u8; CELLS]>,
    values: Arc<[f32; CELLS]>,
}

/// Table entries are integers, so every border between two codes is a multiple of one half.
pub(super) const CELLS: usize = 1024;
pub(super) const HALF_RANGE: f32 = 256.0;

/// What the search chose for a row divided by its largest magnitude.
struct Chosen {
    unit: f32,
    /// Magnitude of the integer scale, and index of the way of reading the group.
    scales: Vec<(i32, usize)>,
}

/// Real-valued scales of a group.
struct Free {
    /// For each way of reading the group the best scale; 0 when nothing positive is one.
    scales: [f32; MOST_WAYS],
    /// The squared errors at these; infinite for ways that are out of question.
    errors: [f32; MOST_WAYS],
    best: usize,
}

impl Free {
    /// Tries fractions of a scale.
    #[inline(always)]
    fn search(&mut self, i: usize, way: &Way, group: &Weighted, unclipped: f32, fractions: &[f32]) {
        if unclipped > 0.0 {
            for fraction in fractions {
                let tried = unclipped * fraction;
                let error = way.error(group, tried);
                if error < self.errors[i] {
                    (self.errors[i], self.scales[i]) = (error, tried);
                }
            }
        }
    }
}

impl TableSearch {
    /// The search for a format with that kind of scale, by the default table; `None` for other formats.
    pub fn for_format(format: FormatRef) -> Option<TableSearch> {
        match (format.table(), format.scale) {
            (Some(table), Scale::RowF32Field8 { bias, choice_bits }) => {
                Some(TableSearch::new(table.entries, table.shift, bias, choice_bits))
            }
            _ => None,
        }
    }

    /// The search for an ascending table with entries on both sides of zero, and a format's bias and choice bits.
    pub fn new(table: &[i8], shift: i8, bias: i32, choice_bits: u32) -> TableSearch {
        let stored = (1 << (8 - choice_bits)) - 1;
        let signs: &[f32] = if bias > 0 { &[1.0, -1.0] } else { &[1.0] };
        let mut ways = Vec::with_capacity(signs.len() << choice_bits);
        for choice in 0..1u16 << choice_bits {
            let moved = f32::from(choice) * f32::from(shift);
            let table: Vec<f32> = table.iter().map(|t| f32::from(*t) + moved).collect();
            let codes: [u8; CELLS] = std::array::from_fn(|cell| nearest_code(&table, cell));
            let values = Arc::new(codes.map(|c| table[usize::from(c)]));
            let codes = Arc::new(codes);
            ways.extend(signs.iter().map(|sign| Way {
                choice,
                sign: *sign,
                table: table.clone(),
                codes: codes.clone(),
                values: values.clone(),
            }));
        }
        TableSearch {
            choice_bits,
            bias,
            max_scale: if bias > 0 { bias.min(stored - bias + 1) - 1 } else { stored },
            ways,
            effort: Effort { fractions: fractions(table.len()), ways: MOST_WAYS, more: &[], window: 1 },
            level: Level::widest(),
        }
    }

    /// The same without a search: the scale that clips nothing, rounded to an integer.
    #[must_use]
    pub fn plain(&self) -> TableSearch {
        TableSearch { effort: PLAIN, ..self.clone() }
    }

    /// The same with about half the effort, for scales that are a first guess and are refined afterwards.
    #[must_use]
    pub fn brief(&self) -> TableSearch {
        const COARSE: [&[f32]; 3] = [&[0.45, 0.6, 0.75, 0.9], &[0.8, 0.9, 1.0], &[0.93, 1.0]];
        const BETWEEN: [&[f32]; 3] = [&[0.525, 0.675, 0.825, 1.0], &[0.75, 0.85, 0.95, 1.05], &[0.96, 1.03]];
        let at = match self.ways.first().map_or(0, |way| way.table.len()) {
            0..=4 => 0,
            5..=16 => 1,
            _ => 2,
        };
        let effort = Effort { fractions: COARSE[at], ways: BRIEF_WAYS, more: BETWEEN[at], window: 1 };
        TableSearch { effort, ..self.clone() }
    }

    /// The same computed with the vectors of a level; results do not depend on it.
    #[must_use]
    pub fn at_level(&self, level: Level) -> TableSearch {
        TableSearch { level, ..self.clone() }
    }

    /// Encodes a row of finite weights: codes one per byte, fields one per group. Returns the row scale.
    pub fn encode_row(&self, weights: &[f32], codes: &mut [u8], fields: &mut [u16]) -> f32 {
        self.encode_row_weighted(weights, &vec![1.0; weights.len()], codes, fields)
    }

    /// As [`TableSearch::encode_row`], with a positive weight for the squared error of each column.
    pub fn encode_row_weighted(
        &self,
        weights: &[f32],
        importance: &[f32],
        codes: &mut [u8],
        fields: &mut [u16],
    ) -> f32 {
        self.level.run(EncodeRow { search: self, weights, importance, codes, fields })
    }

    /// The field that suits one group best when the row's scale is given; `None` when that is zero.
    #[inline(always)]
    pub(super) fn field_of_group(
        &self,
        weights: &[f32; GROUP],
        importance: &[f32; GROUP],
        row_scale: f32,
    ) -> Option<u16> {
        let group = Weighted::new(weights, importance);
        let free = self.search_free(&group, self.effort);
        let (scale, way) = self.search_integer(&group, &free, row_scale, self.effort);
        let way = &self.ways[way];
        let signed = scale * way.sign as i32;
        (scale != 0).then_some(((signed + self.bias) as u16) << self.choice_bits | way.choice)
    }

    /// The row scale, and an integer scale and way of reading for every group.
    #[inline(always)]
    fn choose(&self, groups: &[Weighted], effort: Effort) -> Chosen {
        let mut top = 0.0f32;
        let mut free = Vec::with_capacity(groups.len());
        for group in groups {
            let found = self.search_free(group, effort);
            top = top.max(found.scales[found.best]);
            free.push(found);
        }
        let unit = top / self.max_scale as f32;
        let mut scales = Vec::with_capacity(groups.len());
        for (group, free) in groups.iter().zip(&free) {
            scales.push(self.search_integer(group, free, unit, effort));
        }
        Chosen { unit, scales }
    }

    /// Best real-valued scale for each way of reading the group, and the best way.
    #[inline(always)]
    fn search_free(&self, group: &Weighted, effort: Effort) -> Free {
        let (low, high) = group.values.iter().fold((0.0f32, 0.0f32), |(l, h), w| (l.min(*w), h.max(*w)));
        let mut free = Free { scales: [0.0; MOST_WAYS], errors: [f32::INFINITY; MOST_WAYS], best: 0 };
        for (i, way) in self.ways.iter().enumerate() {
            free.search(i, way, group, way.unclipped(low, high), effort.fractions);
        }
        if effort.ways < self.ways.len() {
            let mut errors = free.errors;
            errors[..self.ways.len()].sort_unstable_by(f32::total_cmp);
            let limit = errors[effort.ways - 1];
            for (i, way) in self.ways.iter().enumerate() {
                if free.errors[i] <= limit {
                    free.search(i, way, group, way.unclipped(low, high), effort.more);
                } else {
                    free.errors[i] = f32::INFINITY;
                }
            }
        }
        let mut least = f32::INFINITY;
        for (i, error) in free.errors.iter().enumerate() {
            if *error < least {
                (least, free.best) = (*error, i);
            }
        }
        free
    }

    /// Best integer scale near the free ones, and the way of reading the group.
    #[inline(always)]
    fn search_integer(&self, group: &Weighted, free: &Free, unit: f32, effort: Effort) -> (i32, usize) {
        // A scale of zero makes the group zero; nothing worse is accepted.
        let (mut least, mut chosen) = (group.square, (0, 0));
        // Without a search the way stays the one whose unrounded scale was best.
        let ways = if effort.window > 0 { 0..self.ways.len() } else { free.best..free.best + 1 };
        for i in ways {
            if effort.ways < self.ways.len() && free.errors[i] == f32::INFINITY {
                continue;
            }
            let middle = (free.scales[i] / unit).round() as i32;
            let tried = (middle - effort.window).max(1)..=(middle + effort.window).min(self.max_scale);
            for scale in tried {
                let error = self.ways[i].error(group, scale as f32 * unit);
                if error < least {
                    (least, chosen) = (error, (scale, i));
                }
            }
        }
        chosen
    }

    /// Squared error of a row, term by term.
    #[inline(always)]
    fn row_error(&self, groups: &[Weighted], chosen: &Chosen) -> f64 {
        let mut total = 0.0f64;
        for (group, &(scale, way)) in groups.iter().zip(&chosen.scales) {
            let way = &self.ways[way];
            let real = chosen.unit * scale as f32 * way.sign;
            for (w, h) in group.values.iter().zip(&group.importance) {
                let value = if scale == 0 { 0.0 } else { real * way.values[cell_of(w / real)] };
                total += f64::from(*h) * f64::from(w - value) * f64::from(w - value);
            }
        }
        total
    }
}

/// Chooses scales and codes of a row, and gives the row's scale.
struct EncodeRow<'a> {
    search: &'a TableSearch,
    weights: &'a [f32],
    importance: &'a [f32],
    codes: &'a mut [u8],
    fields: &'a mut [u16],
}

impl Work for EncodeRow<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let EncodeRow { search, weights, importance, codes, fields } = self;
        let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        if largest < TINY {
            codes.fill(0);
            fields.fill((search.bias as u16) << search.choice_bits);
            return 0.0;
        }
        let row: Vec<f32> = weights.iter().map(|w| w / largest).collect();
        let mut groups: Vec<Weighted> = Vec::with_capacity(fields.len());
        for (w, h) in row.as_chunks().0.iter().zip(importance.as_chunks().0) {
            groups.push(Weighted::new(w, h));
        }
        let groups = groups.as_slice();
        let mut chosen = search.choose(groups, search.effort);
        if search.effort.window > 0 && search.effort.ways == MOST_WAYS {
            // The search is greedy in places; it must still never be worse than not searching.
            let plain = search.choose(groups, PLAIN);
            if search.row_error(groups, &plain) < search.row_error(groups, &chosen) {
                chosen = plain;
            }
        }
        for (g, (group, &(scale, way))) in groups.iter().zip(&chosen.scales).enumerate() {
            let way = &search.ways[way];
            let signed = scale * way.sign as i32;
            fields[g] = ((signed + search.bias) as u16) << search.choice_bits | way.choice;
            let inverse = way.sign / (chosen.unit * scale as f32);
            for (code, w) in codes[g * GROUP..(g + 1) * GROUP].iter_mut().zip(&group.values) {
                *code = if scale == 0 { 0 } else { way.codes[cell_of(w * inverse)] };
            }
        }
        chosen.unit * largest
    }
}

/// A group, and what an error in each of its weights counts.
#[derive(Clone, Debug)]
struct Weighted {
    values: [f32; GROUP],
    importance: [f32; GROUP],
    /// Of the two above.
    products: [f32; GROUP],
    /// The error when all become zero.
    square: f32,
}

impl Weighted {
    #[inline(always)]
    fn new(values: &[f32; GROUP], importance: &[f32; GROUP]) -> Weighted {
        let products: [f32; GROUP] = std::array::from_fn(|i| values[i] * importance[i]);
        let square = values.iter().zip(&products).map(|(w, p)| w * p).sum();
        Weighted { values: *values, importance: *importance, products, square }
    }
}

impl Way {
    /// The scale at which a group within these bounds is not clipped; not positive when all scales clip it.
    #[inline(always)]
    fn unclipped(&self, low: f32, high: f32) -> f32 {
        let (low, high) = if self.sign < 0.0 { (-high, -low) } else { (low, high) };
        let (first, last) = (self.table[0], self.table[self.table.len() - 1]);
        (high / last).max(low / first)
    }

    /// Squared error of a group at a positive scale.
    #[inline(always)]
    fn error(&self, group: &Weighted, scale: f32) -> f32 {
        let inverse = self.sign / scale;
        // One loop for each step and sums in fixed lanes, so that the compiler vectorises and the order of
        // additions does not depend on the machine.
        let (mut cells, mut values) = ([0u32; GROUP], [0.0f32; GROUP]);
        for (cell, w) in cells.iter_mut().zip(&group.values) {
            *cell = cell_of(w * inverse) as u32;
        }
        for i in 0..GROUP {
            values[i] = self.values[cells[i] as usize % CELLS];
        }
        let (mut wt, mut tt) = ([0.0f32; LANES], [0.0f32; LANES]);
        for i in 0..GROUP / LANES {
            for lane in 0..LANES {
                let (at, t) = (LANES * i + lane, values[LANES * i + lane]);
                wt[lane] += group.products[at] * t;
                tt[lane] += group.importance[at] * (t * t);
            }
        }
        group.square - 2.0 * scale * self.sign * lane_sum(wt) + scale * scale * lane_sum(tt)
    }
}

/// The sum of all lanes, in one order on every machine.
#[inline(always)]
fn lane_sum(lanes: [f32; LANES]) -> f32 {
    let mut four = [0.0f32; 4];
    for (i, v) in lanes.iter().enumerate() {
        four[i % 4] += v;
    }
    (four[0] + four[1]) + (four[2] + four[3])
}

/// Fractions tried of the scale that clips nothing. Where a table has few entries, much is won by clipping.
fn fractions(entries: usize) -> &'static [f32] {
    const ALL: [f32; 14] = [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05];
    if entries > 4 { &ALL[7..] } else { &ALL }
}

/// The half-integer interval of a value in table units. On a border between two intervals either may come out.
#[inline(always)]
pub(super) fn cell_of(y: f32) -> usize {
    // Above 2^23 a float has no fraction bits, and its low bits are the integer: a conversion that vectorises.
    const INTEGERS: f32 = 8_388_608.0;
    // Rounding to the nearest integer after taking away one half is rounding down.
    let cell = (y * 2.0 + (2.0 * HALF_RANGE - 0.5)).clamp(0.0, (CELLS - 1) as f32);
    (cell + INTEGERS).to_bits() as usize % CELLS
}

/// The entry nearest to the middle of an interval.
fn nearest_code(table: &[f32], cell: usize) -> u8 {
    let y = (cell as f32 + 0.5) / 2.0 - HALF_RANGE;
    (1..table.len()).fold(0, |code, i| if y > (table[i - 1] + table[i]) / 2.0 { i as u8 } else { code })
}

/// Encodes one group as `w8`: the largest magnitude over 127 as bf16, and integers in −127..=127. Returns the
/// scale's bits, or `None` when the scale is not finite.
pub fn encode_w8_group(weights: &[f32], codes: &mut [u8]) -> Option<u16> {
    let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    if largest < TINY {
        codes.fill(0);
        return Some(0);
    }
    let scale = bf16::from_f32(largest / 127.0);
    if !(scale.to_f32() * 127.0).is_finite() {
        return None;
    }
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = round_w8(w / scale.to_f32()) as i8 as u8;
    }
    Some(scale.to_bits())
}

/// Nearest integer in −127..=127, ties to even.
#[inline(always)]
pub(super) fn round_w8(y: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 leaves no fraction bits, which needs no instruction beyond SSE2.
    const MAGIC: f32 = 12_582_912.0;
    (y.clamp(-127.0, 127.0) + MAGIC) - MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lookup_finds_the_nearest_entry() {
        let searches = attar_format::formats::ALL.iter().filter_map(|f| TableSearch::for_format(f));
        for way in searches.flat_map(|s| s.ways) {
            for i in -3000..3000 {
                let y = i as f32 / 10.0 + 0.013;
                let code = usize::from(way.codes[cell_of(y)]);
                assert_eq!(way.table[code], way.values[cell_of(y)]);
                let least = way.table.iter().map(|t| (t - y).abs()).fold(f32::INFINITY, f32::min);
                assert_eq!((way.table[code] - y).abs(), least, "{y}");
            }
        }
    }

    #[test]
    fn tables_have_eight_ways_and_scales_up_to_31() {
        for format in attar_format::formats::ALL.iter().filter(|f| f.table().is_some()) {
            let search = TableSearch::for_format(format).unwrap();
            assert_eq!((search.ways.len(), search.max_scale), (8, 31), "{}", format.name);
        }
        assert_eq!(TableSearch::new(&[-127, 0, 1, 90], 6, 0, 1).max_scale, 127);
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
