//! Contraction with integer weights and int8 activations.
//!
//! Within a group of 32 inputs everything is an exact i32:
//! `dot = sum_k table[code[c, k]] * x[k]  (+ choice[c, g] * shift * sum_k x[k])`,
//! and then `sum[c] += f32(dot) * (scale[c, g] * x_scale[g])`, g ascending. A row scale multiplies the final sum.

use super::{Contraction, TILE};
use crate::Target;
use crate::aarch64;
use crate::emit::codes;
use crate::lanes::{DotActivation, DotWeights, F32x4, I8x16, I32x4, Lanes, Scalar};
use attar_format::{CHANNELS, Format, Scale};
use attar_kernel::{ActInt8Layout, RowTile};

const GROUP: usize = ActInt8Layout::GROUP;
/// Quads of inputs in a group.
const QUADS: usize = GROUP / 4;
/// Quads of channels in a block.
const SLABS: usize = CHANNELS / 4;

/// Scratch memory of a contraction of several rows.
pub(super) struct Workspace {
    /// Prepared weights of a group, `[SLABS][QUADS]`.
    weights: Scalar,
    /// Prepared activations of a group, `[QUADS][TILE]` of 16 bytes.
    activations: Scalar,
    /// Per row of the tile: the scale in every lane.
    row_scales: Scalar,
    /// Per row of the tile: `shift * sum x` in every lane.
    row_shifts: Scalar,
    /// Per slab: the scales of its channels.
    scales: Scalar,
    /// Per slab: the choices of its channels.
    choices: Scalar,
    /// Products of a tile and a group, i32 `[TILE][CHANNELS]`: where an inner function makes them.
    products: Scalar,
}

impl Workspace {
    pub(super) fn new(cx: &mut Lanes<'_>, rows: RowTile) -> Workspace {
        let alone = rows == RowTile::One || cx.is_scalar();
        let mut room = |bytes: usize| if alone { cx.int(0) } else { cx.scratch(bytes) };
        Workspace {
            weights: room(SLABS * QUADS * 32),
            activations: room(QUADS * TILE * 16),
            row_scales: room(TILE * 16),
            row_shifts: room(TILE * 16),
            scales: room(SLABS * 16),
            choices: room(SLABS * 16),
            products: room(TILE * aarch64::PRODUCT_BYTES),
        }
    }
}

pub(super) fn emit(c: &Contraction<'_>, workspace: &Workspace, cx: &mut Lanes<'_>) {
    if cx.is_scalar() {
        scalar(c, cx);
    } else if c.rows == RowTile::One {
        one(c, cx);
    } else {
        several(c, workspace, cx);
    }
}

/// Bytes of codes of one group of a block.
fn group_bytes(format: &Format) -> usize {
    format.group_rows() * 64
}

fn has_choice(format: &Format) -> bool {
    matches!(format.scale, Scale::RowF32Field8 { .. })
}

/// The table, for formats that have one: loaded once, outside the loops.
fn table(c: &Contraction<'_>, cx: &mut Lanes<'_>) -> Option<Vec<I8x16>> {
    c.layout.format.table().map(|t| codes::load_table(cx, c.header, t.bits))
}

/// The table's shift as an i32; 0 without a choice.
fn shift(c: &Contraction<'_>, cx: &mut Lanes<'_>) -> Scalar {
    if has_choice(c.layout.format) && c.layout.header_bytes > 0 {
        cx.load_i8(c.header, c.layout.shift_position() as i32)
    } else {
        cx.int32(0)
    }
}

/// Scales of the 4 channels of a slab, and their choices; `fields` is the group's first field.
fn fields(format: &Format, cx: &mut Lanes<'_>, fields: Scalar, slab: usize) -> (F32x4, Option<I32x4>) {
    let at = (slab * 4 * format.field_bytes()) as i32;
    match format.scale {
        Scale::RowF32Field8 { bias, choice_bits } => {
            let field = cx.load4_u8(fields, at);
            let mask = cx.splat_const_i32((1 << choice_bits) - 1);
            let choice = cx.viand(field, mask);
            let mut s = cx.vushr_imm(field, choice_bits);
            if bias != 0 {
                let bias = cx.splat_const_i32(bias);
                s = cx.visub(s, bias);
            }
            (cx.vint_to_float(s), Some(choice))
        }
        Scale::Bf16 | Scale::None => (cx.load4_bf16(fields, at), None),
    }
}

/// 16 weights for each quad of a group, in the order of `codes`: calls `each(quad, weights)`.
fn decode_slab(
    c: &Contraction<'_>,
    cx: &mut Lanes<'_>,
    table: Option<&[I8x16]>,
    codes: Scalar,
    offset: usize,
    mut each: impl FnMut(&mut Lanes<'_>, usize, DotWeights),
) {
    match table {
        Some(table) => {
            codes::each_quad(cx, c.layout.format.code_bits(), codes, offset, |cx, quad, codes| {
                let weights = cx.lookup(c.header, table, codes);
                let weights = cx.dot_weights(weights);
                each(cx, quad, weights);
            });
        }
        None => {
            for quad in 0..QUADS {
                let weights = cx.load16_i8(codes, (offset + quad * 64) as i32);
                let weights = cx.dot_weights(weights);
                each(cx, quad, weights);
            }
        }
    }
}

/// One row: activations stay in registers while the slabs pass.
fn one(c: &Contraction<'_>, cx: &mut Lanes<'_>) {
    let format = c.layout.format;
    let rows = ActInt8Layout::new(c.layout.k);
    let zero = cx.splat_const(0.0);
    for slab in 0..SLABS {
        cx.store4(zero, c.sums, (slab * 16) as i32);
    }
    let table = table(c, cx);
    let shift = shift(c, cx);
    let all_codes = cx.iadd_imm(c.block, c.layout.codes_offset as i64);
    let all_fields = cx.iadd_imm(c.block, c.layout.fields_offset as i64);
    cx.for_const(c.layout.groups, 1, |cx, g| {
        let codes = cx.offset(all_codes, g, group_bytes(format));
        let group_fields = cx.offset(all_fields, g, CHANNELS * format.field_bytes());
        let x = cx.offset(c.x, g, GROUP);
        let quads = group_activations(cx, x);
        let per_group = cx.offset(c.x, g, 4);
        let x_scale = cx.load_splat(per_group, rows.scales_offset as i32);
        let x_shift = has_choice(format).then(|| {
            let sum = cx.load_i32(per_group, rows.sums_offset as i32);
            let shifted = cx.imul(sum, shift);
            cx.splat_i32(shifted)
        });
        for slab in 0..SLABS {
            let mut acc = cx.dot_zero();
            decode_slab(c, cx, table.as_deref(), codes, slab * 16, |cx, quad, weights| {
                acc = cx.dot(acc, weights, quads[quad]);
            });
            let dot = cx.dot_finish(acc);
            let (scale, choice) = fields(format, cx, group_fields, slab);
            let at = (slab * 16) as i32;
            add_group(cx, dot, scale, choice.zip(x_shift), x_scale, c.sums, at);
        }
    });
    row_scale(c, cx, c.sums);
}

/// Several rows: each group is decoded once into scratch memory and met by all rows, [`TILE`] at a time.
fn several(c: &Contraction<'_>, ws: &Workspace, cx: &mut Lanes<'_>) {
    let format = c.layout.format;
    let rows = ActInt8Layout::new(c.layout.k);
    let weight_bytes = cx.dot_weight_bytes();
    let zero_i = cx.int(0);
    let past = cx.iadd_imm(c.count, TILE as i64 - 1);
    let past = cx.iand_imm(past, -(TILE as i64));
    cx.for_range(zero_i, past, 1, |cx, r| {
        let zero = cx.splat_const(0.0);
        let sums = cx.offset(c.sums, r, c.sums_stride);
        for slab in 0..SLABS {
            cx.store4(zero, sums, (slab * 16) as i32);
        }
    });
    let shift = shift(c, cx);
    let last = cx.iadd_imm(c.count, -1);
    let all_codes = cx.iadd_imm(c.block, c.layout.codes_offset as i64);
    let all_fields = cx.iadd_imm(c.block, c.layout.fields_offset as i64);
    cx.for_const(c.layout.groups, 1, |cx, g| {
        let codes = cx.offset(all_codes, g, group_bytes(format));
        let group_fields = cx.offset(all_fields, g, CHANNELS * format.field_bytes());
        let table = table(c, cx);
        for slab in 0..SLABS {
            decode_slab(c, cx, table.as_deref(), codes, slab * 16, |cx, quad, weights| {
                cx.store_dot_weights(weights, ws.weights, ((slab * QUADS + quad) * weight_bytes) as i32);
            });
            let (scale, choice) = fields(format, cx, group_fields, slab);
            cx.store4(scale, ws.scales, (slab * 16) as i32);
            if let Some(choice) = choice {
                cx.store4_i32(choice, ws.choices, (slab * 16) as i32);
            }
        }
        cx.for_range(zero_i, c.count, TILE as i64, |cx, first| {
            let mut row_groups = Vec::with_capacity(TILE);
            for r in 0..TILE {
                // Rows past the last are computed as the last and never used.
                let row = cx.iadd_imm(first, r as i64);
                let row = cx.imin(row, last);
                let x = cx.offset(c.x, row, rows.stride);
                let per_group = cx.offset(x, g, 4);
                let x = cx.offset(x, g, GROUP);
                row_groups.push(x);
                if !multiplies_matrices(cx) {
                    for (quad, prepared) in group_activations(cx, x).into_iter().enumerate() {
                        cx.store_dot_activation(prepared, ws.activations, ((quad * TILE + r) * 16) as i32);
                    }
                }
                let x_scale = cx.load_splat(per_group, rows.scales_offset as i32);
                cx.store4(x_scale, ws.row_scales, (r * 16) as i32);
                if has_choice(format) {
                    let sum = cx.load_i32(per_group, rows.sums_offset as i32);
                    let shifted = cx.imul(sum, shift);
                    let shifted = cx.splat_i32(shifted);
                    cx.store4_i32(shifted, ws.row_shifts, (r * 16) as i32);
                }
            }
            if multiplies_matrices(cx) {
                row_groups.extend([ws.weights, ws.products]);
                cx.call_inner(aarch64::products(), &row_groups);
            }
            let tile_sums = cx.offset(c.sums, first, c.sums_stride);
            cx.for_const(SLABS, 1, |cx, slab| {
                let at = cx.imul_imm(slab, 16);
                let dots = if multiplies_matrices(cx) {
                    let products = cx.iadd(ws.products, at);
                    std::array::from_fn(|r| cx.load4_i32(products, (r * aarch64::PRODUCT_BYTES) as i32))
                } else {
                    let weights = cx.offset(ws.weights, slab, QUADS * weight_bytes);
                    slab_products(cx, ws, weights, weight_bytes)
                };
                let scales = cx.iadd(ws.scales, at);
                let scale = cx.load4(scales, 0);
                let choice = has_choice(format).then(|| {
                    let choices = cx.iadd(ws.choices, at);
                    cx.load4_i32(choices, 0)
                });
                let sums = cx.iadd(tile_sums, at);
                for (r, dot) in dots.into_iter().enumerate() {
                    let x_shift = has_choice(format).then(|| cx.load4_i32(ws.row_shifts, (r * 16) as i32));
                    let x_scale = cx.load4(ws.row_scales, (r * 16) as i32);
                    let at = (r * c.sums_stride) as i32;
                    add_group(cx, dot, scale, choice.zip(x_shift), x_scale, sums, at);
                }
            });
        });
    });
    cx.for_range(zero_i, c.count, 1, |cx, r| {
        let sums = cx.offset(c.sums, r, c.sums_stride);
        row_scale(c, cx, sums);
    });
}

/// Whether the target has `smmla`, whose inner function takes activations as they are.
fn multiplies_matrices(cx: &Lanes<'_>) -> bool {
    const _: () = assert!(TILE == aarch64::ROWS);
    cx.target() == Target::Aarch64I8mm
}

/// Products of a tile of prepared activations with the prepared weights of a slab.
fn slab_products(cx: &mut Lanes<'_>, ws: &Workspace, weights: Scalar, weight_bytes: usize) -> [I32x4; TILE] {
    let zero = cx.dot_zero();
    let mut acc = [zero; TILE];
    for quad in 0..QUADS {
        let w = cx.load_dot_weights(weights, (quad * weight_bytes) as i32);
        for (r, acc) in acc.iter_mut().enumerate() {
            let a = cx.load_dot_activation(ws.activations, ((quad * TILE + r) * 16) as i32);
            *acc = cx.dot(*acc, w, a);
        }
    }
    acc.map(|acc| cx.dot_finish(acc))
}

/// The prepared activations of a group.
fn group_activations(cx: &mut Lanes<'_>, x: Scalar) -> [DotActivation; QUADS] {
    let low = cx.load_dot_activations(x, 0);
    let high = cx.load_dot_activations(x, 16);
    std::array::from_fn(|q| if q < 4 { low[q] } else { high[q - 4] })
}

/// `sums += f32(dot + choice * x_shift) * (scale * x_scale)`.
fn add_group(
    cx: &mut Lanes<'_>,
    dot: I32x4,
    scale: F32x4,
    shift: Option<(I32x4, I32x4)>,
    x_scale: F32x4,
    sums: Scalar,
    at: i32,
) {
    let dot = match shift {
        Some((choice, x_shift)) => {
            let extra = cx.vimul(choice, x_shift);
            cx.viadd(dot, extra)
        }
        None => dot,
    };
    let value = cx.vint_to_float(dot);
    let scale = cx.vmul(scale, x_scale);
    let sum = cx.load4(sums, at);
    let sum = cx.vmuladd(value, scale, sum);
    cx.store4(sum, sums, at);
}

/// Multiplies a row's sums by the row scales of the block's channels, for formats that have them.
fn row_scale(c: &Contraction<'_>, cx: &mut Lanes<'_>, sums: Scalar) {
    if has_choice(c.layout.format) {
        for slab in 0..SLABS {
            let at = (slab * 16) as i32;
            let sum = cx.load4(sums, at);
            let scale = cx.load4(c.block, at);
            let sum = cx.vmul(sum, scale);
            cx.store4(sum, sums, at);
        }
    }
}

/// Without vectors: a loop over rows, channels, groups and inputs, in the same order of additions.
fn scalar(c: &Contraction<'_>, cx: &mut Lanes<'_>) {
    let format = c.layout.format;
    let rows = ActInt8Layout::new(c.layout.k);
    let shift = shift(c, cx);
    let zero = cx.int(0);
    cx.for_range(zero, c.count, 1, |cx, r| {
        let x = cx.offset(c.x, r, rows.stride);
        let sums = cx.offset(c.sums, r, c.sums_stride);
        cx.for_const(CHANNELS, 1, |cx, channel| {
            let lane = cx.offset(c.block, channel, 4);
            let field_lane = cx.offset(c.block, channel, format.field_bytes());
            let start = cx.f32(0.0);
            let total = cx.var(start);
            cx.for_const(c.layout.groups, 1, |cx, g| {
                let codes = cx.offset(lane, g, group_bytes(format));
                let codes = cx.iadd_imm(codes, c.layout.codes_offset as i64);
                let group_x = cx.offset(x, g, GROUP);
                let dot = scalar_dot(c, cx, codes, group_x);
                let field = cx.offset(field_lane, g, CHANNELS * format.field_bytes());
                let fields_offset = c.layout.fields_offset as i32;
                let per_group = cx.offset(x, g, 4);
                let (dot, scale) = match format.scale {
                    Scale::RowF32Field8 { bias, choice_bits } => {
                        let field = cx.load_u8(field, fields_offset);
                        let sum = cx.load_i32(per_group, rows.sums_offset as i32);
                        let extra = cx.imul(sum, shift);
                        let choice = cx.iand_imm(field, (1 << choice_bits) - 1);
                        let extra = cx.imul(choice, extra);
                        let s = cx.ushr_imm(field, choice_bits);
                        let s = cx.iadd_imm(s, -i64::from(bias));
                        (cx.iadd(dot, extra), cx.int_to_float(s))
                    }
                    Scale::Bf16 | Scale::None => (dot, cx.load_bf16(field, fields_offset)),
                };
                let x_scale = cx.load_f32(per_group, rows.scales_offset as i32);
                let scale = cx.fmul(scale, x_scale);
                let value = cx.int_to_float(dot);
                let sum = cx.get(&total);
                let sum = cx.fmuladd(value, scale, sum);
                cx.set(&total, sum);
            });
            let mut sum = cx.get(&total);
            if has_choice(format) {
                let scale = cx.load_f32(lane, 0);
                sum = cx.fmul(sum, scale);
            }
            let at = cx.offset(sums, channel, 4);
            cx.store_f32(sum, at, 0);
        });
    });
}

/// The dot product of one channel's group; `codes` is its first lane.
fn scalar_dot(c: &Contraction<'_>, cx: &mut Lanes<'_>, codes: Scalar, x: Scalar) -> Scalar {
    let start = cx.int32(0);
    let total = cx.var(start);
    let add = |cx: &mut Lanes<'_>, weight: Scalar, x: Scalar| {
        let product = cx.imul(weight, x);
        let sum = cx.get(&total);
        let sum = cx.iadd(sum, product);
        cx.set(&total, sum);
    };
    let Some(table) = c.layout.format.table() else {
        cx.for_const(QUADS, 1, |cx, quad| {
            let lane = cx.offset(codes, quad, 64);
            let x = cx.offset(x, quad, 4);
            for j in 0..4 {
                let (weight, x) = (cx.load_i8(lane, j), cx.load_i8(x, j));
                add(cx, weight, x);
            }
        });
        return cx.get(&total);
    };
    cx.for_const(4, 1, |cx, j| {
        let lane = cx.iadd(codes, j);
        let x = cx.iadd(x, j);
        for (quad, code) in codes::scalar_codes(cx, table.bits, lane).into_iter().enumerate() {
            let code = cx.widen_unsigned(code);
            let entry = cx.iadd(c.header, code);
            let weight = cx.load_i8(entry, 0);
            let x = cx.load_i8(x, 4 * quad as i32);
            add(cx, weight, x);
        }
    });
    cx.get(&total)
}
