//! The packed layout: one arrangement of bytes that every instruction set reads well.
//!
//! A tensor `[N, K]` is a 64-byte header (table formats only) and then `ceil(N / 16)` blocks of 16 output
//! channels, each contiguous over all of K:
//!
//! | part | bytes | contents |
//! |---|---|---|
//! | header | 64 | table formats: 16 table entries (i8), the shift (i8), zeros; other formats have no header |
//! | row scales | 64 | f32 per channel; only with [`Scale::RowF32Field8`](crate::Scale::RowF32Field8) |
//! | group fields | `ceil64(16 · groups · field_bytes)` | group-major: the 16 channels' fields of group 0, then of group 1, … |
//! | codes | `64 · rows` | rows of 64 bytes, one 32-bit lane per channel |
//!
//! One row of codes covers, per channel: 1 weight (f32), 2 (bf16: k in the low half, k+1 in the high half),
//! 4 (int8: ascending k from the lowest byte), 8 (4-bit codes: byte j holds `k+j` in its low nibble and `k+4+j`
//! in its high nibble). Missing channels and a missing odd k are zero. All numbers are little-endian.

use crate::formats::{FormatRef, Scale, Value};

/// Output channels of one block.
pub const CHANNELS: usize = 16;
const ROW_BYTES: usize = 64;

/// Sizes and offsets of one packed tensor; all in bytes unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    pub format: FormatRef,
    /// Output channels.
    pub n: usize,
    /// Inputs per output channel.
    pub k: usize,
    /// Scale groups along K (0 for uncompressed formats).
    pub groups: usize,
    /// Before the first block.
    pub header_bytes: usize,
    /// Blocks of 16 channels.
    pub blocks: usize,
    /// From one block to the next.
    pub block_bytes: usize,
    /// Offset of the group fields within a block (the row scales, if any, stand at 0).
    pub fields_offset: usize,
    /// Offset of the codes within a block.
    pub codes_offset: usize,
    /// Weights along K covered by one 64-byte row of codes.
    pub k_per_row: usize,
    /// 64-byte rows of codes in a block.
    pub code_rows: usize,
}

impl PackedLayout {
    /// Layout of an `[n, k]` matrix; `None` when k is no multiple of the format's group or a size overflows.
    pub fn new(format: FormatRef, n: usize, k: usize) -> Option<PackedLayout> {
        if n == 0 || k == 0 || !k.is_multiple_of(format.group) {
            return None;
        }
        let grouped = format.scale != Scale::None;
        let groups = if grouped { k / format.group } else { 0 };
        let row_scales = matches!(format.scale, Scale::RowF32Field8 { .. });
        let header_bytes = if format.value == Value::Table4 { ROW_BYTES } else { 0 };
        let fields_offset = if row_scales { CHANNELS * 4 } else { 0 };
        let field_bytes =
            groups.checked_mul(CHANNELS * format.field_bytes())?.checked_next_multiple_of(ROW_BYTES)?;
        let k_per_row = 32 / format.code_bits();
        let code_rows = k.div_ceil(k_per_row);
        let codes_offset = fields_offset.checked_add(field_bytes)?;
        let block_bytes = code_rows.checked_mul(ROW_BYTES)?.checked_add(codes_offset)?;
        let blocks = n.div_ceil(CHANNELS);
        blocks.checked_mul(block_bytes)?.checked_add(header_bytes)?;
        Some(PackedLayout {
            format,
            n,
            k,
            groups,
            header_bytes,
            blocks,
            block_bytes,
            fields_offset,
            codes_offset,
            k_per_row,
            code_rows,
        })
    }

    /// Size of the whole tensor.
    pub fn total_bytes(&self) -> usize {
        self.header_bytes + self.blocks * self.block_bytes
    }

    /// Offset of block `b` from the start of the tensor.
    pub fn block_offset(&self, b: usize) -> usize {
        self.header_bytes + b * self.block_bytes
    }

    /// Offset of the byte holding the code of channel `n`, input `k`, from the start of the tensor, and how far
    /// that byte must be shifted right (4 for a high nibble).
    pub fn code_position(&self, n: usize, k: usize) -> (usize, u32) {
        let (row, within) = (k / self.k_per_row, k % self.k_per_row);
        let lane = self.block_offset(n / CHANNELS) + self.codes_offset + row * ROW_BYTES + (n % CHANNELS) * 4;
        match self.format.value {
            Value::Table4 => (lane + within % 4, if within >= 4 { 4 } else { 0 }),
            _ => (lane + within * self.format.code_bits() / 8, 0),
        }
    }

    /// Offset of the scale field of channel `n`, group `g`, from the start of the tensor.
    pub fn field_position(&self, n: usize, g: usize) -> usize {
        let index = g * CHANNELS + n % CHANNELS;
        self.block_offset(n / CHANNELS) + self.fields_offset + index * self.format.field_bytes()
    }

    /// Offset of the row scale of channel `n` from the start of the tensor.
    pub fn row_scale_position(&self, n: usize) -> usize {
        self.block_offset(n / CHANNELS) + (n % CHANNELS) * 4
    }
}
