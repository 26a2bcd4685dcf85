//! The numbers that codes of a format can stand for, and the nearest of them.
//!
//! In units of a group's scale these are integers: a table moved by the group's choice, or −127 to 127.

use super::scale_search::{CELLS, HALF_RANGE, cell_of, round_w8};
use attar_format::{FormatRef, Scale, Value};

/// Choices that a format has at most.
const MOST_CHOICES: usize = 4;

/// Rounds numbers in units of a group's scale to what a code stands for.
#[derive(Clone, Debug)]
pub struct CodeGrid {
    pub(super) kind: Kind,
    scale: Scale,
}

/// What the codes stand for.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Tables(Tables),
    Integers,
}

/// A table at every place it can be moved to.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    /// For every choice and half-integer interval the nearest entry, as value and as code.
    values: Box<[f32; MOST_CHOICES * CELLS]>,
    codes: Box<[u8; MOST_CHOICES * CELLS]>,
    /// For every choice the value of each code.
    entries: Vec<Vec<f32>>,
}

/// The scale field of a group, taken apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupScale {
    /// Multiplier of the integers.
    pub scale: f32,
    /// Where the table stands.
    pub choice: usize,
}

/// Rounds to what a code stands for.
pub(super) trait Rounding {
    /// The value nearest to `y`, both in units of the scale; `choice` is where the table stands.
    fn nearest(&self, choice: u32, y: f32) -> f32;
}

/// Rounds to integers.
pub(super) struct Integers;

impl Rounding for Integers {
    #[inline(always)]
    fn nearest(&self, _: u32, y: f32) -> f32 {
        round_w8(y)
    }
}

impl Rounding for Tables {
    #[inline(always)]
    fn nearest(&self, choice: u32, y: f32) -> f32 {
        self.values[(choice as usize * CELLS + cell_of(y)) % (MOST_CHOICES * CELLS)]
    }
}

impl CodeGrid {
    /// The grid of a format with its default table; `None` for formats without codes.
    pub fn of(format: FormatRef) -> Option<CodeGrid> {
        let choices = match format.scale {
            Scale::RowF32Field8 { choice_bits, .. } => 1usize << choice_bits,
            Scale::Bf16 => 1,
            Scale::None => return None,
        };
        let kind = match (format.value, format.table()) {
            (Value::Int8, _) => Kind::Integers,
            (_, Some(table)) if choices <= MOST_CHOICES => {
                Kind::Tables(Tables::new(table.entries, table.shift, choices))
            }
            _ => return None,
        };
        Some(CodeGrid { kind, scale: format.scale })
    }

    /// The scale of a group from its field and the row's scale.
    pub fn group_scale(&self, field: u16, row_scale: f32) -> GroupScale {
        match self.scale {
            Scale::RowF32Field8 { bias, choice_bits } => {
                let integer = i32::from(field >> choice_bits) - bias;
                let choice = usize::from(field & ((1 << choice_bits) - 1));
                GroupScale { scale: row_scale * integer as f32, choice }
            }
            Scale::Bf16 => GroupScale { scale: half::bf16::from_bits(field).to_f32(), choice: 0 },
            Scale::None => GroupScale { scale: 1.0, choice: 0 },
        }
    }

    /// The field of the storable scale nearest to `scale`, with the table at `choice`, and the scale it stands for.
    /// `None` when that is zero or not finite.
    pub fn field(&self, scale: f32, choice: usize, row_scale: f32) -> Option<(u16, GroupScale)> {
        let field = match self.scale {
            Scale::RowF32Field8 { bias, choice_bits } => {
                let most = (1 << (8 - choice_bits)) - 1 - bias;
                let least = if bias > 0 { 1 - bias } else { 0 };
                let integer = ((scale / row_scale).round() as i32).clamp(least, most);
                (((integer + bias) as u16) << choice_bits) | choice as u16
            }
            Scale::Bf16 => half::bf16::from_f32(scale).to_bits(),
            Scale::None => return None,
        };
        let stored = self.group_scale(field, row_scale);
        (stored.scale.is_finite() && stored.scale != 0.0).then_some((field, stored))
    }

    /// The code that stands for `value`, one of the grid's, in units of the scale; of a table the code nearest to any value.
    pub(super) fn code(&self, choice: usize, value: f32) -> u8 {
        match &self.kind {
            Kind::Tables(tables) => tables.codes[(choice * CELLS + cell_of(value)) % (MOST_CHOICES * CELLS)],
            Kind::Integers => value as i8 as u8,
        }
    }

    /// What a code stands for, in units of the scale.
    pub fn value(&self, choice: usize, code: u8) -> f32 {
        match &self.kind {
            Kind::Tables(tables) => {
                let entries = &tables.entries[choice % tables.entries.len()];
                entries[usize::from(code) % entries.len()]
            }
            Kind::Integers => f32::from(code as i8),
        }
    }
}

impl Tables {
    fn new(table: &[i8], shift: i8, choices: usize) -> Tables {
        let moved = |choice: usize| -> Vec<f32> {
            table.iter().map(|t| f32::from(*t) + choice as f32 * f32::from(shift)).collect()
        };
        let entries: Vec<Vec<f32>> = (0..choices).map(moved).collect();
        let mut values = Box::new([0.0; MOST_CHOICES * CELLS]);
        let mut codes = Box::new([0; MOST_CHOICES * CELLS]);
        for (choice, entries) in entries.iter().enumerate() {
            for cell in 0..CELLS {
                let code = nearest(entries, cell);
                codes[choice * CELLS + cell] = code;
                values[choice * CELLS + cell] = entries[usize::from(code)];
            }
        }
        Tables { values, codes, entries }
    }
}

/// The entry nearest to the middle of an interval.
fn nearest(table: &[f32], cell: usize) -> u8 {
    let y = (cell as f32 + 0.5) / 2.0 - HALF_RANGE;
    (1..table.len()).fold(0, |code, i| if y > (table[i - 1] + table[i]) / 2.0 { i as u8 } else { code })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_codes_belong_together() {
        for format in attar_format::formats::ALL.iter().copied() {
            let Some(grid) = CodeGrid::of(format) else { continue };
            let choices = match &grid.kind {
                Kind::Tables(tables) => tables.entries.len(),
                Kind::Integers => 1,
            };
            for choice in 0..choices {
                for i in -2600..2600 {
                    let y = i as f32 / 20.0 + 0.013;
                    let value = match &grid.kind {
                        Kind::Tables(tables) => tables.nearest(choice as u32, y),
                        Kind::Integers => Integers.nearest(0, y),
                    };
                    let code = grid.code(choice, value);
                    assert_eq!(grid.value(choice, code), value, "{}: {y}", format.name);
                    // -128 is no code of the integers.
                    let codes = (0..=255u8).filter(|c| *c != 128);
                    let errors = codes.map(|c| (grid.value(choice, c) - y).abs());
                    let least = errors.fold(f32::INFINITY, f32::min);
                    assert!((value - y).abs() <= least, "{}: {value} for {y}", format.name);
                }
            }
        }
    }
}
