//! Contractions of many rows by tile products, on targets with AMX.
//!
//! Rows come in chunks whose activations, laid out as tiles of bf16, fit the second-level cache. That layout is made once
//! per chunk, not once per item, since it costs as much as the products of a few hundred channels: the loop over rows is
//! the outer one here. Where a whole row is too long for that, inputs are cut into spans, and a few items share the
//! layout of a span.

use super::wide::pieces;
use super::{BLOCK_SUMS, epilogue};
use crate::lanes::{IntCmp, Lanes, Scalar};
use crate::x86::{BLOCK_ROWS, Level, Span, TILE, TILE_ROWS, TileKernel};
use attar_format::{CHANNELS, PackedLayout};
use attar_kernel::{ActInt8Layout, LinearSpec, RowTile};

/// Rows up to which the integer kernels are used.
pub(super) const FEW: usize = 16;
/// Most rows of a chunk.
const MOST_ROWS: usize = 512;
/// A chunk of whole rows is not smaller than this: weights are decoded once per chunk.
const LEAST_ROWS: usize = 192;
/// Rows of a chunk when inputs are cut.
const ROWS_OF_SPANS: usize = 256;
/// Channels that share a layout when inputs are cut.
const SHARING_CHANNELS: usize = 256;
/// Bytes for activations and sums of a chunk: half of a second-level cache, and of a thread's usual stack.
const ROOM: usize = 1152 << 10;
/// Groups of a panel of weights: two blocks of them take 18 KB of the first-level cache.
const PANEL_GROUPS: usize = 9;

/// Sizes of a contraction's loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    rows: usize,
    /// Items contracted together.
    items: usize,
    /// Groups of a span of inputs; all of them where rows are not cut.
    groups: usize,
    sums_stride: usize,
}

impl Plan {
    fn new(groups: usize, blocks: usize) -> Plan {
        let stride = |items: usize| {
            let bytes = items * blocks * BLOCK_SUMS;
            // An odd number of cache lines: strides of powers of two would meet in few sets of the cache.
            bytes + if bytes.is_multiple_of(128) { 64 } else { 0 }
        };
        // Two blocks to a panel, even where an item has an odd number.
        let items = 1 + blocks % 2;
        let row_bytes = TileKernel::block_bytes(groups) / BLOCK_ROWS;
        let rows = (ROOM / (row_bytes + stride(items)) / BLOCK_ROWS * BLOCK_ROWS).min(MOST_ROWS);
        if rows >= LEAST_ROWS {
            return Plan { rows, items, groups, sums_stride: stride(items) };
        }
        let items = (SHARING_CHANNELS / CHANNELS / blocks).max(1);
        let most =
            (ROOM / ROWS_OF_SPANS).saturating_sub(stride(items)) * BLOCK_ROWS / TileKernel::block_bytes(1);
        let spans = groups.div_ceil(most.max(1));
        Plan { rows: ROWS_OF_SPANS, items, groups: groups.div_ceil(spans), sums_stride: stride(items) }
    }
}

/// A contraction by tile products with its scratch memory.
pub(super) struct Tiles<'a> {
    level: Level,
    layout: &'a PackedLayout,
    /// Blocks of an item.
    blocks: usize,
    plan: Plan,
    /// Activations of a chunk of rows and a span of inputs.
    x_tiles: Scalar,
    /// A panel of weights.
    panel: Scalar,
    sums: Scalar,
}

/// Where a launch's operands are.
pub(super) struct Operands<'a> {
    pub(super) x: Scalar,
    /// The tensor of weights: its header.
    pub(super) weights: Scalar,
    pub(super) epilogue: &'a epilogue::Args,
}

/// Some rows and items.
struct Piece {
    /// First row of activations.
    x: Scalar,
    rows: Scalar,
    header: Scalar,
    /// First block of weights.
    block: Scalar,
    /// Blocks; i64.
    blocks: Scalar,
}

impl<'a> Tiles<'a> {
    /// `None` where the integer or float kernels are to be used for any number of rows.
    pub(super) fn new(
        cx: &mut Lanes<'_>,
        level: Option<Level>,
        layout: &'a PackedLayout,
        rows: RowTile,
        blocks: usize,
    ) -> Option<Tiles<'a>> {
        let level = level.filter(|l| l.amx && rows == RowTile::Many)?;
        if !TileKernel::exists(layout) {
            return None;
        }
        let plan = Plan::new(TileKernel::groups(layout), blocks);
        let x_tiles = cx.scratch(plan.rows / BLOCK_ROWS * TileKernel::block_bytes(plan.groups));
        let panel = cx.scratch(2 * PANEL_GROUPS * TILE);
        let sums = cx.scratch(plan.rows.next_multiple_of(TILE_ROWS) * plan.sums_stride);
        Some(Tiles { level, layout, blocks, plan, x_tiles, panel, sums })
    }

    /// The whole launch.
    pub(super) fn emit(&self, spec: &LinearSpec, cx: &mut Lanes<'_>, o: &Operands<'_>) -> Result<(), String> {
        let Plan { rows, items, groups, sums_stride } = self.plan;
        let x_stride = self.kernel().x_stride();
        let first_block = cx.iadd_imm(o.weights, self.layout.header_bytes as i64);
        let (zero, begin, end) = (cx.int(0), cx.begin(), cx.end());
        let mut outcome = Ok(());
        cx.for_range(zero, o.epilogue.total_rows, rows as i64, |cx, first| {
            let count = at_most(cx, o.epilogue.total_rows, first, rows);
            let x = cx.offset(o.x, first, x_stride);
            let whole = groups == TileKernel::groups(self.layout);
            if whole {
                outcome = self.pack_rows(cx, x, count, 0, groups);
            }
            cx.for_range(begin, end, items as i64, |cx, item| {
                let together = at_most(cx, end, item, items);
                let block = cx.offset(first_block, item, self.blocks * self.layout.block_bytes);
                let blocks = cx.imul_imm(together, self.blocks as i64);
                let piece = Piece { x, rows: count, header: o.weights, block, blocks };
                if let Err(e) = self.contract(cx, &piece, whole) {
                    outcome = Err(e);
                }
                cx.for_range(zero, together, 1, |cx, i| {
                    let item = cx.iadd(item, i);
                    let sums = cx.offset(self.sums, i, self.blocks * BLOCK_SUMS);
                    match o.epilogue.wide(spec, cx, Some(self.level), item, first, count, sums, sums_stride) {
                        Ok(false) => {}
                        Ok(true) => return,
                        Err(e) => {
                            outcome = Err(e);
                            return;
                        }
                    }
                    cx.for_range(zero, count, 1, |cx, r| {
                        let row = cx.iadd(first, r);
                        let sums = cx.offset(sums, r, sums_stride);
                        o.epilogue.row(spec, cx, item, row, sums);
                    });
                });
            });
        });
        outcome.map_err(|e| format!("bug: inner function: {e}"))
    }

    fn kernel(&self) -> TileKernel<'a> {
        TileKernel { level: self.level, layout: self.layout }
    }

    fn pack_rows(
        &self,
        cx: &mut Lanes<'_>,
        x: Scalar,
        rows: Scalar,
        first: usize,
        groups: usize,
    ) -> Result<(), iced_x86::IcedError> {
        let scales = ActInt8Layout::new(self.layout.k).scales_offset + 4 * first;
        let scales = cx.iadd_imm(x, scales as i64);
        let x = cx.iadd_imm(x, (first * self.kernel().x_group_bytes()) as i64);
        cx.call_inner(self.kernel().pack_rows(groups)?, &[x, scales, self.x_tiles, rows]);
        Ok(())
    }

    /// Sums of some items' blocks for a chunk of rows; `packed` tells that the rows' tiles are there already.
    fn contract(&self, cx: &mut Lanes<'_>, p: &Piece, packed: bool) -> Result<(), iced_x86::IcedError> {
        for (first, groups) in pieces(TileKernel::groups(self.layout), self.plan.groups) {
            if !packed {
                self.pack_rows(cx, p.x, p.rows, first, groups)?;
            }
            let span = Span { first, groups };
            let panel = |blocks: usize| self.panel_code(blocks, groups);
            let zero = cx.int(0);
            let pairs = cx.iand_imm(p.blocks, -2);
            if self.blocks > 1 || self.plan.items > 1 {
                let code = panel(2)?;
                cx.for_range(zero, pairs, 2, |cx, b| self.panels(cx, p, b, span, &code));
            }
            if self.blocks % 2 == 1 {
                let code = panel(1)?;
                let odd = cx.icmp(IntCmp::NotEqual, pairs, p.blocks);
                cx.if_(odd, |cx| self.panels(cx, p, pairs, span, &code));
            }
        }
        Ok(())
    }

    fn panel_code(&self, blocks: usize, groups: usize) -> Result<PanelCode, iced_x86::IcedError> {
        let kernel = self.kernel();
        let multiply = kernel.multiply(blocks, groups, self.plan.sums_stride)?;
        let unpack = (!kernel.is_unpacked()).then(|| kernel.unpack(blocks)).transpose()?;
        Ok(PanelCode { unpack, multiply })
    }

    /// The block at `b`, and the next if the code is for two, over a span of inputs.
    fn panels(&self, cx: &mut Lanes<'_>, p: &Piece, b: Scalar, span: Span, code: &PanelCode) {
        let layout = self.layout;
        let group_bytes = self.kernel().group_bytes();
        let field_bytes = CHANNELS * layout.format.field_bytes();
        let block = cx.offset(p.block, b, layout.block_bytes);
        let sums = cx.offset(self.sums, b, BLOCK_SUMS);
        for (within, count) in pieces(span.groups, PANEL_GROUPS) {
            let group = span.first + within;
            let codes = cx.iadd_imm(block, (layout.codes_offset + group * group_bytes) as i64);
            let begins = cx.int(i64::from(group == 0));
            let count = cx.int(count as i64);
            let weights = match &code.unpack {
                Some(unpack) => {
                    let fields = cx.iadd_imm(block, (layout.fields_offset + group * field_bytes) as i64);
                    cx.call_inner(unpack.clone(), &[codes, fields, block, p.header, self.panel, count]);
                    self.panel
                }
                None => codes,
            };
            let x = cx.iadd_imm(self.x_tiles, (within * 2 * TILE) as i64);
            cx.call_inner(code.multiply.clone(), &[x, weights, sums, p.rows, count, begins]);
        }
    }
}

/// Inner functions for panels of some number of blocks.
struct PanelCode {
    /// `None` where weights are tiles as they are.
    unpack: Option<Vec<u8>>,
    multiply: Vec<u8>,
}

/// `end - first`, but no more than `most`.
fn at_most(cx: &mut Lanes<'_>, end: Scalar, first: Scalar, most: usize) -> Scalar {
    let left = cx.isub(end, first);
    let most = cx.int(most as i64);
    cx.imin(left, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_their_room_and_cover_all_inputs() {
        for groups in [1, 3, 18, 48, 64, 65, 255, 256, 448, 1000] {
            for blocks in [1, 2, 3, 4, 8, 16] {
                let plan = Plan::new(groups, blocks);
                let bytes =
                    plan.rows * (TileKernel::block_bytes(plan.groups) / BLOCK_ROWS + plan.sums_stride);
                assert!(bytes <= ROOM, "{plan:?} takes {bytes}");
                assert!(plan.rows >= LEAST_ROWS && plan.rows.is_multiple_of(BLOCK_ROWS), "{plan:?}");
                assert!(plan.groups > 0 && plan.groups <= groups, "{plan:?}");
                assert!(plan.sums_stride >= plan.items * blocks * BLOCK_SUMS, "{plan:?}");
                assert_eq!(plan.sums_stride / 64 % 2, 1, "{plan:?}");
            }
        }
    }
}
