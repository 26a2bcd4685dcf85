//! `embed`: one row of a packed table per token.

use super::codes;
use crate::lanes::{Lanes, Scalar};
use attar_format::{CHANNELS, DType, FormatRef, PackedLayout, Scale, Value};

const ROW: i64 = 64;

pub(super) fn embed(format: FormatRef, vocab: usize, dim: usize, cx: &mut Lanes<'_>) -> Result<(), String> {
    let layout = PackedLayout::new(format, vocab, dim)
        .ok_or_else(|| format!("a table of [{vocab}, {dim}] in {}", format.name))?;
    if matches!(format.value, Value::Float(DType::F16 | DType::I32)) {
        return Err(format!("no code for format {}", format.name));
    }
    let (tokens, table, out) = (cx.arg(0), cx.arg(1), cx.arg(2));
    cx.for_items(|cx, t| {
        let at = cx.offset(tokens, t, 4);
        let token = cx.load_i32(at, 0);
        let token = cx.widen(token);
        let to = cx.offset(out, t, dim * 4);
        let block = cx.udiv_imm(token, CHANNELS as u32);
        let channel = cx.urem_imm(token, CHANNELS as u32);
        let blocks = cx.iadd_imm(table, layout.header_bytes as i64);
        let block = cx.offset(blocks, block, layout.block_bytes);
        let codes = cx.iadd_imm(block, layout.codes_offset as i64);
        let lane = cx.offset(codes, channel, 4);
        match format.value {
            Value::Float(DType::F32) => {
                cx.for_const(dim, 1, |cx, k| {
                    let from = cx.offset(lane, k, ROW as usize);
                    let v = cx.load_f32(from, 0);
                    let to = cx.offset(to, k, 4);
                    cx.store_f32(v, to, 0);
                });
            }
            Value::Float(_) => bf16_row(cx, dim, lane, to),
            Value::Int8 | Value::Table(_) => coded_row(cx, &layout, table, block, channel, lane, to),
        }
    });
    Ok(())
}

fn bf16_row(cx: &mut Lanes<'_>, dim: usize, lane: Scalar, to: Scalar) {
    cx.for_const(dim / 2 * 2, 2, |cx, k| {
        let from = cx.offset(lane, k, ROW as usize / 2);
        let (a, b) = (cx.load_bf16(from, 0), cx.load_bf16(from, 2));
        let to = cx.offset(to, k, 4);
        cx.store_f32(a, to, 0);
        cx.store_f32(b, to, 4);
    });
    if dim % 2 == 1 {
        let last = dim as i64 - 1;
        let from = cx.iadd_imm(lane, last / 2 * ROW);
        let v = cx.load_bf16(from, 0);
        let to = cx.iadd_imm(to, last * 4);
        cx.store_f32(v, to, 0);
    }
}

/// Formats with groups: scale and shift once per group, then its rows of codes.
fn coded_row(
    cx: &mut Lanes<'_>,
    layout: &PackedLayout,
    table: Scalar,
    block: Scalar,
    channel: Scalar,
    lane: Scalar,
    to: Scalar,
) {
    let format = layout.format;
    let group_bytes = format.group_rows() * ROW as usize;
    let fields = cx.iadd_imm(block, layout.fields_offset as i64);
    let field = cx.offset(fields, channel, format.field_bytes());
    cx.for_const(layout.groups, 1, |cx, g| {
        let at = cx.offset(field, g, CHANNELS * format.field_bytes());
        let (scale, shift) = match format.scale {
            Scale::RowF32Field8 { bias, choice_bits } => {
                let byte = cx.load_u8(at, 0);
                let s = cx.ushr_imm(byte, choice_bits);
                let s = cx.iadd_imm(s, i64::from(-bias));
                let s = cx.int_to_float(s);
                let row = cx.offset(block, channel, 4);
                let row = cx.load_f32(row, 0);
                let choice = cx.iand_imm(byte, (1 << choice_bits) - 1);
                let step = cx.load_i8(table, layout.shift_position() as i32);
                (cx.fmul(row, s), cx.imul(choice, step))
            }
            _ => (cx.load_bf16(at, 0), cx.int32(0)),
        };
        let lane = cx.offset(lane, g, group_bytes);
        let to = cx.offset(to, g, format.group * 4);
        let Some(coding) = format.table() else {
            cx.for_const(format.group_rows(), 1, |cx, quad| {
                let from = cx.offset(lane, quad, ROW as usize);
                let to = cx.offset(to, quad, 16);
                for j in 0..4 {
                    let code = cx.load_i8(from, j);
                    store_scaled(cx, code, scale, to, 4 * j);
                }
            });
            return;
        };
        cx.for_const(4, 1, |cx, j| {
            let from = cx.iadd(lane, j);
            let to = cx.offset(to, j, 4);
            for (quad, code) in codes::scalar_codes(cx, coding.bits, from).into_iter().enumerate() {
                let index = cx.widen_unsigned(code);
                let entry = cx.iadd(table, index);
                let entry = cx.load_i8(entry, 0);
                let value = cx.iadd(entry, shift);
                store_scaled(cx, value, scale, to, 16 * quad as i32);
            }
        });
    });
}

fn store_scaled(cx: &mut Lanes<'_>, integer: Scalar, scale: Scalar, to: Scalar, offset: i32) {
    let v = cx.int_to_float(integer);
    let v = cx.fmul(scale, v);
    cx.store_f32(v, to, offset);
}
