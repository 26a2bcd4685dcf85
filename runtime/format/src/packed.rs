//! The packed layout: one arrangement of bytes that every instruction set reads well.
//!
//! A tensor `[N, K]` is a 64-byte header (table formats only) and then `ceil(N / 16)` blocks of 16 output
//! channels, each contiguous over all of K:
//!
//! | part | bytes | contents |
//! |---|---|---|
//! | header | `ceil64(entries + 1)` | table formats: the table's entries (i8), the shift (i8), zeros; other formats have no header |
//! | row scales | 64 | f32 per channel; only with [`Scale::RowF32Field8`](crate::Scale::RowF32Field8) |
//! | group fields | `ceil64(16 · groups · field_bytes)` | group-major: the 16 channels' fields of group 0, then of group 1, … |
//! | codes | `64 · rows` | rows of 64 bytes, one 32-bit lane per channel |
//!
//! One row of codes covers, per channel: 1 weight (f32), 2 (bf16: k in the low half, k+1 in the high half), or
//! 4 (int8: ascending k from the lowest byte). Codes of tables stand in planes of bits, group by group, see
//! [`planes`](crate::planes). Missing channels and a missing odd k are zero. All numbers are little-endian.

use crate::formats::{FormatRef, Scale};
use crate::planes::{QUAD, planes};

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
    /// Weights along K covered by one 64-byte row of codes; 0 in table formats, whose codes take several rows.
    pub k_per_row: usize,
    /// 64-byte rows of codes in a block.
    pub code_rows: usize,
}

/// Some bits of a code: `((byte[at] >> shift) & mask) << low`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodePart {
    /// Offset of the byte from the start of the tensor.
    pub at: usize,
    /// First bit within the byte.
    pub shift: u32,
    /// First bit within the code.
    pub low: u32,
    /// As many ones as there are bits.
    pub mask: u8,
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
        let header_bytes = format.table().map_or(0, |t| ((1 << t.bits) + 1usize).next_multiple_of(ROW_BYTES));
        let fields_offset = if row_scales { CHANNELS * 4 } else { 0 };
        let field_bytes =
            groups.checked_mul(CHANNELS * format.field_bytes())?.checked_next_multiple_of(ROW_BYTES)?;
        let k_per_row = if format.table().is_some() { 0 } else { 32 / format.code_bits() };
        let code_rows = match k_per_row {
            0 => groups.checked_mul(format.group_rows())?,
            _ => k.div_ceil(k_per_row),
        };
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

    /// Offset of the shift in the header of a table format; the table's entries stand before it.
    pub fn shift_position(&self) -> usize {
        self.format.table().map_or(0, |t| 1 << t.bits)
    }

    /// Offset of the code of channel `n`, input `k`, from the start of the tensor; for formats whose codes are whole
    /// bytes.
    pub fn code_position(&self, n: usize, k: usize) -> usize {
        let (row, within) = (k / self.k_per_row, k % self.k_per_row);
        self.lane(n) + row * ROW_BYTES + within * self.format.code_bits() / 8
    }

    /// Where the bits of the code of channel `n`, input `k` stand; for table formats.
    pub fn code_parts(&self, n: usize, k: usize) -> impl Iterator<Item = CodePart> {
        let (group, within) = (k / self.format.group, k % self.format.group);
        let lane = self.lane(n) + group * self.format.group_rows() * ROW_BYTES;
        planes(self.format.code_bits()).iter().map(move |plane| {
            let (row, shift) = plane.place(within / QUAD);
            CodePart { at: lane + row * ROW_BYTES + within % QUAD, shift, low: plane.low, mask: plane.mask() }
        })
    }

    /// Offset of channel `n`'s lane in the first row of codes of its block, from the start of the tensor.
    fn lane(&self, n: usize) -> usize {
        self.block_offset(n / CHANNELS) + self.codes_offset + (n % CHANNELS) * 4
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
