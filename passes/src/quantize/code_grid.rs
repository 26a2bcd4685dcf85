//! The numbers that codes of a format can stand for, and the nearest of them.
//!
//! In units of a group's scale these are integers: a table moved by the group's choice, or −127 to 127.

use attar_format::{Encoded, FormatRef, Scale, Value};

/// Rounds numbers in units of a group's scale to what a code stands for.
#[derive(Clone, Debug)]
pub struct CodeGrid {
    /// For every choice the table where it moves it, ascending; empty for plain integers.
    tables: Vec<Vec<f32>>,
    /// For every choice and half-integer interval the nearest code.
    cells: Vec<[u8; CELLS]>,
    scale: Scale,
}

/// Table entries are integers, so every border between two codes is a multiple of one half.
const CELLS: usize = 1024;
const HALF_RANGE: f32 = 256.0;

/// The scale field of a group, taken apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupScale {
    /// Multiplier of the integers.
    pub scale: f32,
    /// The integer behind it, for formats whose scales are integers times a row's scale.
    pub integer: i32,
    /// Where the table stands.
    pub choice: usize,
}

impl CodeGrid {
    /// The grid of an encoded matrix's table; `None` for formats without codes.
    pub fn of(encoded: &Encoded) -> Option<CodeGrid> {
        let format: FormatRef = encoded.format;
        let choices = match format.scale {
            Scale::RowF32Field8 { choice_bits, .. } => 1usize << choice_bits,
            Scale::Bf16 => 1,
            Scale::None => return None,
        };
        if format.value == Value::Int8 {
            return Some(CodeGrid { tables: Vec::new(), cells: Vec::new(), scale: format.scale });
        }
        let entries = &encoded.table[..1 << format.code_bits()];
        let moved = |choice: usize| -> Vec<f32> {
            entries.iter().map(|t| f32::from(*t) + choice as f32 * f32::from(encoded.shift)).collect()
        };
        let tables: Vec<Vec<f32>> = (0..choices).map(moved).collect();
        let cells = tables.iter().map(|t| std::array::from_fn(|cell| nearest(t, cell))).collect();
        Some(CodeGrid { tables, cells, scale: format.scale })
    }

    /// The scale of a group from its field and the row's scale.
    pub fn group_scale(&self, field: u16, row_scale: f32) -> GroupScale {
        match self.scale {
            Scale::RowF32Field8 { bias, choice_bits } => {
                let integer = i32::from(field >> choice_bits) - bias;
                let choice = usize::from(field & ((1 << choice_bits) - 1));
                GroupScale { scale: row_scale * integer as f32, integer, choice }
            }
            Scale::Bf16 => GroupScale { scale: half::bf16::from_bits(field).to_f32(), integer: 0, choice: 0 },
            Scale::None => GroupScale { scale: 1.0, integer: 0, choice: 0 },
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

    /// The code nearest to `y`, a number in units of the scale, and what it stands for.
    #[inline(always)]
    pub fn round(&self, choice: usize, y: f32) -> (u8, f32) {
        match self.cells.get(choice) {
            Some(cells) => {
                let cell = ((y * 2.0 + 2.0 * HALF_RANGE).clamp(0.0, (CELLS - 1) as f32)) as usize;
                let code = cells[cell % CELLS];
                (code, self.tables[choice][usize::from(code)])
            }
            None => {
                let value = y.clamp(-127.0, 127.0).round_ties_even();
                (value as i8 as u8, value)
            }
        }
    }

    /// What a code stands for, in units of the scale.
    #[inline(always)]
    pub fn value(&self, choice: usize, code: u8) -> f32 {
        match self.tables.get(choice) {
            Some(table) => table[usize::from(code) % table.len()],
            None => f32::from(code as i8),
        }
    }

    /// Places a table can be moved to.
    pub fn choices(&self) -> usize {
        self.tables.len().max(1)
    }
}

/// The entry nearest to the middle of an interval.
fn nearest(table: &[f32], cell: usize) -> u8 {
    let y = (cell as f32 + 0.5) / 2.0 - HALF_RANGE;
    (1..table.len()).fold(0, |code, i| if y > (table[i - 1] + table[i]) / 2.0 { i as u8 } else { code })
}
