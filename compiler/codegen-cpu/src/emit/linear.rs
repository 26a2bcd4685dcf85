//! `linear`: matrix products with packed weights, for every format, row tile and epilogue.
//!
//! Item by item, and 16 rows at a time: the contraction ([`float`], [`int`]) leaves the sums of the item's channels
//! for those rows in scratch memory, and the epilogue ([`epilogue`]) takes each row from there to its destination.
//!
//! A row's result depends on nothing but the row: channels are summed over ascending inputs in one accumulator
//! (floats), or exactly within a group and then over ascending groups (integers), whatever the row tile. The exception
//! is many rows on a target with tile products ([`tiles`]), which round to bf16.

mod epilogue;
mod float;
mod int;
mod tiles;
mod wide;

use crate::lanes::{IntCmp, Lanes, Scalar};
use crate::x86::Level;
use attar_format::{CHANNELS, PackedLayout};
use attar_kernel::{ActInt8Layout, Activation, Epilogue, LinearSpec, RowTile};

/// Rows contracted before their epilogues run.
const CHUNK: usize = 16;
/// Rows that share decoded weights in registers.
const TILE: usize = 4;
/// Bytes of one row's sums of one block.
const BLOCK_SUMS: usize = CHANNELS * 4;

/// What a contraction works on.
struct Contraction<'a> {
    layout: &'a PackedLayout,
    rows: RowTile,
    /// Address of the block of weights.
    block: Scalar,
    /// Address of the tensor's header.
    header: Scalar,
    /// Address of the first row of activations.
    x: Scalar,
    /// Rows, at most [`CHUNK`]; i64.
    count: Scalar,
    /// Address of the first row's sums. Rows up to the next multiple of [`TILE`] may be written.
    sums: Scalar,
    /// Bytes from one row's sums to the next.
    sums_stride: usize,
}

/// Some rows of an item.
struct Chunk {
    /// Address of the first row of activations.
    x: Scalar,
    /// Address of the item's first block of weights.
    blocks: Scalar,
    /// Address of the tensor's header.
    header: Scalar,
    /// Address of the first row's sums.
    sums: Scalar,
    /// Rows; i64.
    count: Scalar,
}

pub(super) fn emit(spec: &LinearSpec, cx: &mut Lanes<'_>) -> Result<(), String> {
    let layout = check(spec)?;
    let int8 = spec.format.wants_int8_activations();
    let x_stride = if int8 { ActInt8Layout::new(spec.k).stride } else { spec.k * 4 };
    let blocks = spec.blocks_per_item();
    let sums_stride = blocks * BLOCK_SUMS;
    let level = Level::of(cx.target());
    let tiles = tiles::Tiles::new(cx, level, &layout, spec.rows, blocks);
    // Beside tiles there are only few rows left to do.
    let rows = if tiles.is_some() { RowTile::Small } else { spec.rows };
    let chunk = match (rows, level) {
        (RowTile::One, _) => 1,
        (rows, Some(level)) => wide::Wide::chunk_rows(level, rows),
        (_, None) => CHUNK,
    };
    let (x, weights) = (cx.arg(0), cx.arg(1));
    let sums = cx.scratch(chunk * sums_stride);
    let epilogue = epilogue::Args::load(spec, cx)?;
    let wide = level.map(|level| wide::Wide::new(cx, level, &layout, rows, blocks, epilogue.prefetch));
    let workspace = (int8 && wide.is_none()).then(|| int::Workspace::new(cx, spec.rows));
    let mut outcome = Ok(());
    let mut total_rows = epilogue.total_rows;
    if let Some(tiles) = tiles {
        let operands = tiles::Operands { x, weights, epilogue: &epilogue };
        let many = cx.icmp_imm(IntCmp::SignedGreaterThan, total_rows, tiles::FEW as i64);
        let mut tiled = Ok(());
        cx.if_(many, |cx| tiled = tiles.emit(spec, cx, &operands));
        tiled?;
        let none = cx.int(0);
        total_rows = cx.select(many, none, total_rows);
    }
    let first_block = cx.iadd_imm(weights, layout.header_bytes as i64);
    cx.for_items(|cx, item| {
        let item_weights = cx.offset(first_block, item, blocks * layout.block_bytes);
        let contract = |cx: &mut Lanes<'_>, x: Scalar, item_weights: Scalar, count: Scalar| {
            cx.for_const(blocks, 1, |cx, i| {
                let contraction = Contraction {
                    layout: &layout,
                    rows: spec.rows,
                    block: cx.offset(item_weights, i, layout.block_bytes),
                    header: weights,
                    x,
                    count,
                    sums: cx.offset(sums, i, BLOCK_SUMS),
                    sums_stride,
                };
                match &workspace {
                    Some(workspace) => int::emit(&contraction, workspace, cx),
                    None => float::emit(&contraction, cx),
                }
            });
        };
        let mut chunk_of_rows = |cx: &mut Lanes<'_>, first: Scalar, count: Scalar| {
            let x = cx.offset(x, first, x_stride);
            if let Some(wide) = &wide {
                let chunk = Chunk { x, blocks: item_weights, header: weights, sums, count };
                let finished = wide.contract(cx, &chunk).and_then(|()| {
                    let done = epilogue.wide(spec, cx, level, item, first, count, sums, sums_stride);
                    done.map_err(|e| format!("bug: inner function: {e}"))
                });
                match finished {
                    Ok(false) => {}
                    Ok(true) => return,
                    Err(e) => {
                        outcome = Err(e);
                        return;
                    }
                }
            } else {
                contract(cx, x, item_weights, count);
            }
            let finish = |cx: &mut Lanes<'_>, r: Scalar| {
                let row = cx.iadd(first, r);
                let sums = cx.offset(sums, r, sums_stride);
                epilogue.row(spec, cx, item, row, sums);
            };
            let zero = cx.int(0);
            if chunk == 1 { finish(cx, zero) } else { cx.for_range(zero, count, 1, finish) }
        };
        let zero = cx.int(0);
        if chunk == 1 {
            let one = cx.int(1);
            chunk_of_rows(cx, zero, one);
        } else {
            cx.for_range(zero, total_rows, chunk as i64, |cx, first| {
                let left = cx.isub(total_rows, first);
                let most = cx.int(chunk as i64);
                let count = cx.imin(left, most);
                chunk_of_rows(cx, first, count);
            });
        }
    });
    outcome
}

fn check(spec: &LinearSpec) -> Result<PackedLayout, String> {
    let (format, n, k) = (spec.format, spec.n, spec.k);
    let layout = PackedLayout::new(format, n, k)
        .ok_or_else(|| format!("format {} cannot hold a [{n}, {k}] matrix", format.name))?;
    // Offsets within a block are 32-bit immediates.
    if i32::try_from(layout.block_bytes).is_err() {
        return Err(format!("K = {k} is too large"));
    }
    if format.wants_int8_activations() && format.group != ActInt8Layout::GROUP {
        return Err(format!(
            "format {} has groups of {}, int8 activations of {}",
            format.name,
            format.group,
            ActInt8Layout::GROUP
        ));
    }
    match &spec.epilogue {
        Epilogue::Store | Epilogue::Residual => {}
        Epilogue::Swiglu { width, out } => {
            if *out == Activation::Int8 && !width.is_multiple_of(ActInt8Layout::GROUP) {
                return Err(format!("int8 rows of width {width}, which is no multiple of 32"));
            }
            if n != 2 * width.next_multiple_of(CHANNELS) {
                return Err(format!(
                    "swiglu of width {width} needs a weight padded to 16, not of {n} channels"
                ));
            }
        }
        Epilogue::Qkv(q) => {
            if q.head_dim == 0 || q.head_dim % CHANNELS != 0 {
                return Err(format!("heads of {} channels: must be a multiple of {CHANNELS}", q.head_dim));
            }
            if n != (q.heads + 2 * q.kv_heads) * q.head_dim {
                return Err(format!("weight of {n} channels does not make the heads"));
            }
        }
    }
    Ok(layout)
}
