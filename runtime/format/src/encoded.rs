//! A weight matrix in a format's codes, before packing: what quantization algorithms produce.

use crate::DType;
use crate::formats::{FormatRef, MOST_ENTRIES, Scale, Value};
use crate::packed::{CHANNELS, PackedLayout};
use half::{bf16, f16};

/// Why a matrix cannot be encoded, packed or unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// K is no multiple of the format's group, or a dimension is zero or too large.
    Shape { format: &'static str, n: usize, k: usize, group: usize },
    /// A buffer has not the length that format and shape ask for.
    Length { what: &'static str, expected: usize, got: usize },
    /// Two matrices to be joined differ in this respect.
    Mismatch { what: &'static str },
}

impl std::fmt::Display for FormatError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FormatError::Shape { format, n, k, group } => {
                write!(
                    f,
                    "format {format} cannot hold a [{n}, {k}] matrix: K must be a positive multiple of {group}"
                )
            }
            FormatError::Length { what, expected, got } => {
                write!(f, "{what}: expected {expected} bytes or elements, got {got}")
            }
            FormatError::Mismatch { what } => write!(f, "matrices to be joined differ in {what}"),
        }
    }
}

impl std::error::Error for FormatError {}

/// A `[N, K]` weight matrix as codes and scales, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    pub format: FormatRef,
    pub n: usize,
    pub k: usize,
    /// Table formats: the table's entries, and zeros behind the last; zeros otherwise.
    pub table: [i8; MOST_ENTRIES],
    /// Table formats: added to each entry as often as the group's choice says.
    pub shift: i8,
    /// `[N]`, only with [`Scale::RowF32Field8`]; empty otherwise.
    pub row_scale: Vec<f32>,
    /// `[N, K / group]` scale fields: bf16 bits or the field byte; empty for uncompressed formats.
    pub field: Vec<u16>,
    /// `[N, K]` codes, one byte each; for uncompressed formats the little-endian elements.
    pub codes: Vec<u8>,
}

impl Encoded {
    /// A zero matrix with room for every code, and the format's default table.
    ///
    /// # Errors
    /// [`FormatError::Shape`] when the format cannot hold the shape.
    pub fn zeros(format: FormatRef, n: usize, k: usize) -> Result<Encoded, FormatError> {
        let layout = layout_of(format, n, k)?;
        let code_bytes = (format.code_bits() / 8).max(1);
        let has_rows = matches!(format.scale, Scale::RowF32Field8 { .. });
        Ok(Encoded {
            format,
            n,
            k,
            table: format.table().map_or([0; MOST_ENTRIES], |t| t.padded()),
            shift: format.table().map_or(0, |t| t.shift),
            row_scale: vec![0.0; if has_rows { n } else { 0 }],
            field: vec![0; n * layout.groups],
            codes: vec![0; n * k * code_bytes],
        })
    }

    /// Encodes f32 weights `[n, k]` in an uncompressed format, rounding to nearest even.
    ///
    /// # Errors
    /// [`FormatError::Mismatch`] for a compressed format (choosing codes is a pass's work), or a wrong length.
    pub fn from_f32(format: FormatRef, n: usize, k: usize, weights: &[f32]) -> Result<Encoded, FormatError> {
        let Value::Float(dtype) = format.value else {
            return Err(FormatError::Mismatch { what: "format: only uncompressed formats encode directly" });
        };
        let mut out = Encoded::zeros(format, n, k)?;
        check_len("weights", n * k, weights.len())?;
        match dtype {
            DType::F32 | DType::I32 => {
                for (dst, w) in out.codes.chunks_exact_mut(4).zip(weights) {
                    dst.copy_from_slice(&w.to_le_bytes());
                }
            }
            DType::BF16 => {
                for (dst, w) in out.codes.chunks_exact_mut(2).zip(weights) {
                    dst.copy_from_slice(&bf16::from_f32(*w).to_le_bytes());
                }
            }
            DType::F16 => {
                for (dst, w) in out.codes.chunks_exact_mut(2).zip(weights) {
                    dst.copy_from_slice(&f16::from_f32(*w).to_le_bytes());
                }
            }
        }
        Ok(out)
    }

    /// Groups along K.
    pub fn groups(&self) -> usize {
        if self.format.scale == Scale::None { 0 } else { self.k / self.format.group }
    }

    /// Multiplier of the codes of row `n`, group `g`, and what is added to each table entry there.
    pub fn scale(&self, n: usize, g: usize) -> (f32, i32) {
        let field = self.field[n * self.groups() + g];
        match self.format.scale {
            Scale::None => (1.0, 0),
            Scale::Bf16 => (bf16::from_bits(field).to_f32(), 0),
            Scale::RowF32Field8 { bias, choice_bits } => {
                let s = i32::from(field >> choice_bits) - bias;
                let choice = i32::from(field & ((1 << choice_bits) - 1));
                (self.row_scale[n] * s as f32, choice * i32::from(self.shift))
            }
        }
    }

    /// What a code of an integer format stands for, before the group's shift and scale.
    pub fn integer(&self, code: u8) -> i32 {
        match self.format.value {
            Value::Table(table) => i32::from(self.table[usize::from(code) % (1 << table.bits)]),
            Value::Int8 | Value::Float(_) => i32::from(code as i8),
        }
    }

    /// Decodes row `n` into `out` of length K. The meaning of the format.
    pub fn decode_row(&self, n: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k);
        let k = self.k;
        match self.format.value {
            Value::Float(DType::F32 | DType::I32) => {
                for (o, c) in out.iter_mut().zip(self.codes[n * k * 4..].chunks_exact(4)) {
                    *o = f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                }
            }
            Value::Float(dtype) => {
                for (o, c) in out.iter_mut().zip(self.codes[n * k * 2..].chunks_exact(2)) {
                    let bits = u16::from_le_bytes([c[0], c[1]]);
                    *o = match dtype {
                        DType::BF16 => bf16::from_bits(bits).to_f32(),
                        _ => f16::from_bits(bits).to_f32(),
                    };
                }
            }
            Value::Int8 | Value::Table(_) => {
                let codes = &self.codes[n * k..(n + 1) * k];
                for g in 0..self.groups() {
                    let (scale, shift) = self.scale(n, g);
                    let span = g * self.format.group..(g + 1) * self.format.group;
                    for (o, &c) in out[span.clone()].iter_mut().zip(&codes[span]) {
                        *o = scale * (self.integer(c) + shift) as f32;
                    }
                }
            }
        }
    }

    /// Decodes the whole matrix, row-major.
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (n, row) in out.chunks_exact_mut(self.k).enumerate() {
            self.decode_row(n, row);
        }
        out
    }

    /// The rows of `self` in another order (indices may repeat).
    pub fn select_rows(&self, order: &[usize]) -> Encoded {
        let pick = |unit: usize, v: &[u8]| -> Vec<u8> {
            order.iter().flat_map(|&r| v[r * unit..(r + 1) * unit].iter().copied()).collect()
        };
        let groups = self.groups();
        Encoded {
            format: self.format,
            n: order.len(),
            k: self.k,
            table: self.table,
            shift: self.shift,
            row_scale: if self.row_scale.is_empty() {
                Vec::new()
            } else {
                order.iter().map(|&r| self.row_scale[r]).collect()
            },
            field: order
                .iter()
                .flat_map(|&r| self.field[r * groups..(r + 1) * groups].iter().copied())
                .collect(),
            codes: pick(self.codes.len() / self.n, &self.codes),
        }
    }

    /// Stacks matrices along N.
    ///
    /// # Errors
    /// [`FormatError::Mismatch`] when formats, K or tables differ.
    pub fn concat_rows(parts: &[&Encoded]) -> Result<Encoded, FormatError> {
        let Some((first, rest)) = parts.split_first() else {
            return Err(FormatError::Mismatch { what: "count: nothing to join" });
        };
        let mut out = (*first).clone();
        for part in rest {
            if part.format != out.format {
                return Err(FormatError::Mismatch { what: "format" });
            }
            if part.k != out.k {
                return Err(FormatError::Mismatch { what: "K" });
            }
            if part.table != out.table || part.shift != out.shift {
                return Err(FormatError::Mismatch { what: "table" });
            }
            out.n += part.n;
            out.row_scale.extend_from_slice(&part.row_scale);
            out.field.extend_from_slice(&part.field);
            out.codes.extend_from_slice(&part.codes);
        }
        Ok(out)
    }

    /// The packed bytes, as [`PackedLayout`] describes them.
    ///
    /// # Errors
    /// [`FormatError::Length`] when a field has been given the wrong length.
    pub fn pack(&self) -> Result<Vec<u8>, FormatError> {
        let layout = layout_of(self.format, self.n, self.k)?;
        self.check(&layout)?;
        let mut out = vec![0u8; layout.total_bytes()];
        if layout.header_bytes > 0 {
            let shift_position = layout.shift_position();
            for (o, t) in out[..shift_position].iter_mut().zip(self.table) {
                *o = t as u8;
            }
            out[shift_position] = self.shift as u8;
        }
        for n in 0..self.n {
            if !self.row_scale.is_empty() {
                let at = layout.row_scale_position(n);
                out[at..at + 4].copy_from_slice(&self.row_scale[n].to_le_bytes());
            }
            for g in 0..layout.groups {
                let at = layout.field_position(n, g);
                let field = self.field[n * layout.groups + g].to_le_bytes();
                let len = self.format.field_bytes();
                out[at..at + len].copy_from_slice(&field[..len]);
            }
            self.pack_row(&layout, n, &mut out);
        }
        // Channels that pad the last block repeat no weight: their table codes decode to `row_scale = 0`.
        debug_assert_eq!(out.len(), layout.total_bytes());
        Ok(out)
    }

    fn pack_row(&self, layout: &PackedLayout, n: usize, out: &mut [u8]) {
        let unit = (self.format.code_bits() / 8).max(1);
        let row = &self.codes[n * self.k * unit..(n + 1) * self.k * unit];
        for (k, code) in row.chunks_exact(unit).enumerate() {
            if self.format.table().is_some() {
                for part in layout.code_parts(n, k) {
                    out[part.at] |= (code[0] >> part.low & part.mask) << part.shift;
                }
            } else {
                let at = layout.code_position(n, k);
                out[at..at + unit].copy_from_slice(code);
            }
        }
    }

    /// Reads packed bytes back.
    ///
    /// # Errors
    /// [`FormatError`] when the shape does not fit the format or `bytes` has another length.
    pub fn unpack(format: FormatRef, n: usize, k: usize, bytes: &[u8]) -> Result<Encoded, FormatError> {
        let layout = layout_of(format, n, k)?;
        check_len("packed tensor", layout.total_bytes(), bytes.len())?;
        let mut out = Encoded::zeros(format, n, k)?;
        if layout.header_bytes > 0 {
            let shift_position = layout.shift_position();
            for (t, b) in out.table.iter_mut().zip(&bytes[..shift_position]) {
                *t = *b as i8;
            }
            out.shift = bytes[shift_position] as i8;
        }
        let unit = (format.code_bits() / 8).max(1);
        for row in 0..n {
            if !out.row_scale.is_empty() {
                let at = layout.row_scale_position(row);
                let b = &bytes[at..at + 4];
                out.row_scale[row] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
            for g in 0..layout.groups {
                let at = layout.field_position(row, g);
                out.field[row * layout.groups + g] = match format.field_bytes() {
                    1 => u16::from(bytes[at]),
                    _ => u16::from_le_bytes([bytes[at], bytes[at + 1]]),
                };
            }
            for col in 0..k {
                let dst = (row * k + col) * unit;
                if format.table().is_some() {
                    for part in layout.code_parts(row, col) {
                        out.codes[dst] |= (bytes[part.at] >> part.shift & part.mask) << part.low;
                    }
                } else {
                    let at = layout.code_position(row, col);
                    out.codes[dst..dst + unit].copy_from_slice(&bytes[at..at + unit]);
                }
            }
        }
        Ok(out)
    }

    fn check(&self, layout: &PackedLayout) -> Result<(), FormatError> {
        let unit = (self.format.code_bits() / 8).max(1);
        check_len("codes", self.n * self.k * unit, self.codes.len())?;
        check_len("scale fields", self.n * layout.groups, self.field.len())?;
        if matches!(self.format.scale, Scale::RowF32Field8 { .. }) {
            check_len("row scales", self.n, self.row_scale.len())?;
        }
        Ok(())
    }
}

fn layout_of(format: FormatRef, n: usize, k: usize) -> Result<PackedLayout, FormatError> {
    PackedLayout::new(format, n, k).ok_or(FormatError::Shape {
        format: format.name,
        n,
        k,
        group: format.group,
    })
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), FormatError> {
    if expected == got { Ok(()) } else { Err(FormatError::Length { what, expected, got }) }
}

const _: () = assert!(CHANNELS == 16);
