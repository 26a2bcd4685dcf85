//! Contractions by inner functions, on targets whose vectors are wider than Cranelift's.
//!
//! An item's blocks are contracted for a chunk of rows at a time; the sums go to scratch memory. With one row, or a few,
//! weights are decoded on the way through the registers. With many they are decoded into a panel of a few blocks and a
//! few hundred inputs, which stays in the first-level cache while all rows of the chunk meet it.

use super::{BLOCK_SUMS, Chunk};
use crate::lanes::{Lanes, Scalar};
use crate::x86::{FloatKernel, IntKernel, Level, Span};
use attar_format::PackedLayout;
use attar_kernel::RowTile;

/// Rows up to which weights are decoded into registers rather than into panels.
const FEW: usize = 16;
/// Groups of inputs of a panel, so that a panel and its scales take no more than 32 KB.
const PANEL_GROUPS: usize = 24;

/// Inner functions for one kernel.
pub(super) struct Wide<'a> {
    level: Level,
    layout: &'a PackedLayout,
    rows: RowTile,
    /// Blocks of an item.
    blocks: usize,
    /// Room for a panel of decoded weights.
    panel: Scalar,
    prefetch: Scalar,
}

impl<'a> Wide<'a> {
    pub(super) fn new(
        cx: &mut Lanes<'_>,
        level: Level,
        layout: &'a PackedLayout,
        rows: RowTile,
        blocks: usize,
        prefetch: Scalar,
    ) -> Wide<'a> {
        let mut wide = Wide { level, layout, rows, blocks, panel: prefetch, prefetch };
        if wide.int8() && rows != RowTile::One {
            let int = wide.int();
            let blocks = int.panel_blocks().min(blocks);
            wide.panel = cx.scratch(PANEL_GROUPS.min(layout.groups) * int.panel_group_bytes(blocks));
        }
        wide
    }

    /// Rows contracted before their epilogues run: whole tiles.
    pub(super) fn chunk_rows(level: Level, rows: RowTile) -> usize {
        match rows {
            RowTile::One => 1,
            RowTile::Small => FEW,
            RowTile::Many if level.is_512() => 126,
            RowTile::Many => 96,
        }
    }

    fn int8(&self) -> bool {
        self.layout.format.wants_int8_activations()
    }

    fn int(&self) -> IntKernel<'a> {
        IntKernel { level: self.level, layout: self.layout }
    }

    fn float(&self) -> FloatKernel<'a> {
        FloatKernel { level: self.level, layout: self.layout }
    }

    fn sums_stride(&self) -> usize {
        self.blocks * BLOCK_SUMS
    }

    /// Sums of all blocks of an item for a chunk of rows.
    pub(super) fn contract(&self, cx: &mut Lanes<'_>, chunk: &Chunk) -> Result<(), String> {
        let failed = |e: iced_x86::IcedError| format!("bug: inner function: {e}");
        if !self.int8() {
            return self.floats(cx, chunk).map_err(failed);
        }
        match self.rows {
            RowTile::One => self.one(cx, chunk).map_err(failed),
            RowTile::Small if self.level.is_512() => self.small(cx, chunk).map_err(failed),
            RowTile::Small => self.many(cx, chunk).map_err(failed),
            RowTile::Many if self.level.is_512() => {
                let few = cx.int(FEW as i64);
                let (mut a, mut b) = (Ok(()), Ok(()));
                let is_few = cx.icmp(crate::lanes::IntCmp::SignedLessThanOrEqual, chunk.count, few);
                cx.if_else(is_few, |cx| a = self.small(cx, chunk), |cx| b = self.many(cx, chunk));
                a.and(b).map_err(failed)
            }
            RowTile::Many => self.many(cx, chunk).map_err(failed),
        }
    }

    fn one(&self, cx: &mut Lanes<'_>, c: &Chunk) -> Result<(), iced_x86::IcedError> {
        let blocks = cx.int(self.blocks as i64);
        let code = self.int().one()?;
        cx.call_inner(code, &[c.x, c.blocks, c.header, c.sums, blocks, self.prefetch]);
        Ok(())
    }

    fn small(&self, cx: &mut Lanes<'_>, c: &Chunk) -> Result<(), iced_x86::IcedError> {
        let code = self.int().small(self.blocks, self.sums_stride())?;
        cx.call_inner(code, &[c.x, c.blocks, c.header, c.sums, c.count, self.prefetch]);
        Ok(())
    }

    fn many(&self, cx: &mut Lanes<'_>, c: &Chunk) -> Result<(), iced_x86::IcedError> {
        let int = self.int();
        for (start, blocks) in pieces(self.blocks, int.panel_blocks()) {
            let block = cx.iadd_imm(c.blocks, (start * self.layout.block_bytes) as i64);
            let sums = cx.iadd_imm(c.sums, (start * BLOCK_SUMS) as i64);
            for (first, groups) in pieces(self.layout.groups, PANEL_GROUPS) {
                let span = Span { first, groups };
                cx.call_inner(int.unpack(blocks, span)?, &[block, c.header, self.panel]);
                let code = int.multiply(blocks, span, self.sums_stride())?;
                cx.call_inner(code, &[c.x, self.panel, sums, c.count, block]);
            }
        }
        Ok(())
    }

    fn floats(&self, cx: &mut Lanes<'_>, c: &Chunk) -> Result<(), iced_x86::IcedError> {
        let float = self.float();
        for (start, blocks) in pieces(self.blocks, float.panel_blocks()) {
            let block = cx.iadd_imm(c.blocks, (start * self.layout.block_bytes) as i64);
            let sums = cx.iadd_imm(c.sums, (start * BLOCK_SUMS) as i64);
            let code = float.multiply(blocks, self.sums_stride())?;
            cx.call_inner(code, &[c.x, block, sums, c.count, self.prefetch]);
        }
        Ok(())
    }
}

/// `0..whole` in pieces of about equal size, none larger than `most`, larger ones first.
pub(super) fn pieces(whole: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = whole.div_ceil(most);
    let each = whole.div_ceil(count.max(1)).max(1);
    (0..whole).step_by(each).map(move |start| (start, each.min(whole - start)))
}
