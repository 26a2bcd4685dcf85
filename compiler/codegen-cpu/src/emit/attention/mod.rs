//! `attention`: causal grouped-query attention over KV pages, a span of positions at a time.
//!
//! Three kernels share one body, [`Rows::span`], which computes what `AttentionSpec` defines for a stack of rows (query
//! heads of one KV head, of one or more tokens): scores with lanes = keys, since the cache keeps the keys of a page
//! transposed; a softmax over the whole span; sums of values with lanes = elements. A page is converted to f32 once for
//! all rows.
//!
//! - `attention` computes tiles of consecutive tokens over all their spans, and joins spans as it goes.
//! - `attention_span` computes one token and one span, so that long contexts are shared out among threads.
//! - `attention_merge` joins what the former left.
//!
//! Where vectors are wider than Cranelift's, scores, softmax and sums are inner functions ([`AttentionKernel`]) that convert
//! the cache on its way into registers, and so is what is done head by head around them ([`HeadKernel`](crate::x86::HeadKernel)).
//!
//! The order of every sum is fixed by the definition, so a token's result is the same bits in all of them. What a row does
//! not see is never multiplied: memory beyond its positions may hold anything, NaN included.

mod page;
mod rows;
mod sums;

use super::cache::CacheArgs;
use crate::lanes::{FloatCmp, IntCmp, Lanes, Scalar};
use crate::x86::{AttentionKernel, Level};
use attar_kernel::{Activation, AttentionSpec};
use rows::Rows;
use sums::{Joiner, Output, Sums};

/// Positions whose weights are summed side by side; spans and pages are multiples of it.
const STRIDE: usize = 16;
/// Most rows whose sums are held in registers at once.
const BLOCK: usize = 4;

/// Computes tiles of tokens.
pub(super) fn attention(spec: &AttentionSpec, out: Activation, cx: &mut Lanes<'_>) -> Result<(), String> {
    let output = Output::new(spec, out, cx)?;
    let group = spec.group();
    let stack = spec.tile_tokens() * group;
    let block = Level::of(cx.target()).map_or(BLOCK, |level| AttentionKernel::block_rows(level, stack));
    let rows = Rows::new(spec, stack, block, false, cx)?;
    let joined = Sums::scratch(cx, spec, rows.capacity);
    let joiner = Joiner::new(spec, cx)?;
    let (q, to, tokens) = (cx.arg(0), cx.arg(7), cx.arg(8));
    let args = CacheArgs::load(cx, 1);
    let one = cx.int(1);
    let past = cx.iadd_imm(tokens, spec.tile_tokens() as i64 - 1);
    let tiles = cx.udiv_imm(past, spec.tile_tokens() as u32);
    cx.for_items(|cx, item| {
        // As `AttentionSpec::tile` has it.
        let rest = cx.urem_imm(item, spec.tile_tokens() as u32);
        let index = cx.udiv_imm(item, spec.tile_tokens() as u32);
        let head = cx.urem_imm(index, spec.kv_heads as u32);
        let index = cx.udiv_imm(index, spec.kv_heads as u32);
        let tile = cx.isub(tiles, index);
        let tile = cx.isub(tile, one);
        let first = cx.imul_imm(tile, spec.tile_tokens() as i64);
        let last = cx.iadd_imm(first, spec.tile_tokens() as i64);
        let last = cx.imin(last, tokens);
        // Empty for items that stand for no tile.
        let stands = cx.icmp_imm(IntCmp::Equal, rest, 0);
        let last = cx.select(stands, last, first);
        let zero = cx.int(0);
        let before = cx.icmp(IntCmp::SignedLessThan, first, zero);
        let last = cx.select(before, first, last);
        let run = cx.var(first);
        cx.for_range(first, last, 1, |cx, t| {
            let next = cx.iadd_imm(t, 1);
            let ends = run_ends(cx, &args, t, next, last);
            cx.if_(ends, |cx| {
                let from = cx.get(&run);
                rows.run(cx, (&joined, &joiner), &args, q, from, next, head);
                rows.result(cx, &joined, &output, to, from, next, head);
                cx.set(&run, next);
            });
        });
    });
    Ok(())
}

/// Whether the tokens of one sequence that follow each other end before `next`.
fn run_ends(cx: &mut Lanes<'_>, args: &CacheArgs, t: Scalar, next: Scalar, last: Scalar) -> Scalar {
    let ends = cx.icmp(IntCmp::SignedGreaterThanOrEqual, next, last);
    // Nothing beyond the last token is looked at.
    let other = cx.select(ends, t, next);
    let load = |cx: &mut Lanes<'_>, base, t| {
        let at = cx.offset(base, t, 4);
        let v = cx.load_i32(at, 0);
        cx.widen(v)
    };
    let (seq, other_seq) = (load(cx, args.seqs, t), load(cx, args.seqs, other));
    let (position, other_position) = (load(cx, args.positions, t), load(cx, args.positions, other));
    let following = cx.iadd_imm(position, 1);
    let same = cx.icmp(IntCmp::Equal, seq, other_seq);
    let follows = cx.icmp(IntCmp::Equal, following, other_position);
    let goes_on = cx.iand(same, follows);
    cx.icmp_imm(IntCmp::Equal, goes_on, 0)
}

/// Computes one span of one token's context.
pub(super) fn attention_span(spec: &AttentionSpec, cx: &mut Lanes<'_>) -> Result<(), String> {
    let group = spec.group();
    let most = Level::of(cx.target()).map_or(BLOCK, AttentionKernel::most_rows);
    let block = group.div_ceil(group.div_ceil(most));
    let rows = Rows::new(spec, group, block, true, cx)?;
    let (q, to, spans) = (cx.arg(0), cx.arg(7), cx.arg(8));
    let args = CacheArgs::load(cx, 1);
    let count = cx.int(rows.capacity as i64);
    cx.for_items(|cx, item| {
        let row = cx.udiv(item, spans);
        let before = cx.imul(row, spans);
        let span = cx.isub(item, before);
        let t = cx.udiv_imm(row, spec.kv_heads as u32);
        let head = cx.urem_imm(row, spec.kv_heads as u32);
        let (position, table) = args.locate(cx, t);
        let start = cx.imul_imm(span, spec.span as i64);
        let next = cx.iadd_imm(t, 1);
        rows.sight(cx, position, t, next);
        let (low, high) = rows.within(cx, start, count);
        let seen = cx.icmp(IntCmp::SignedLessThan, low, high);
        cx.if_(seen, |cx| {
            rows.queries(cx, q, t, next, head);
            rows.span(cx, &args, table, head, start, count, (low, high));
            let to = cx.offset(to, item, group * spec.partial_len() * 4);
            for g in 0..group {
                let at = (g * spec.partial_len() * 4) as i64;
                let (to, from) =
                    (cx.iadd_imm(to, at), cx.iadd_imm(rows.own.sums, (g * spec.head_dim * 4) as i64));
                cx.for_const(spec.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(from, d, 4), cx.offset(to, d, 4));
                    let v = cx.load4(from, 0);
                    cx.store4(v, to, 0);
                });
                let offset = (spec.head_dim * 4) as i32;
                let most = cx.load_f32(rows.own.most, 4 * g as i32);
                cx.store_f32(most, to, offset);
                let total = cx.load_f32(rows.own.total, 4 * g as i32);
                cx.store_f32(total, to, offset + 4);
            }
        });
    });
    Ok(())
}

/// Joins the spans of a token.
pub(super) fn attention_merge(
    spec: &AttentionSpec,
    out: Activation,
    cx: &mut Lanes<'_>,
) -> Result<(), String> {
    let output = Output::new(spec, out, cx)?;
    let (group, partial) = (spec.group(), spec.partial_len() * 4);
    let (partials, positions, to, spans) = (cx.arg(0), cx.arg(1), cx.arg(2), cx.arg(3));
    let joined = Sums::scratch(cx, spec, group);
    let joiner = Joiner::new(spec, cx)?;
    cx.for_items(|cx, item| {
        let t = cx.udiv_imm(item, spec.kv_heads as u32);
        let head = cx.urem_imm(item, spec.kv_heads as u32);
        let at = cx.offset(positions, t, 4);
        let position = cx.load_i32(at, 0);
        let position = cx.widen(position);
        let end = cx.iadd_imm(position, 1);
        let first = first_seen(cx, spec, end);
        let first_span = cx.udiv_imm(first, spec.span as u32);
        let past = cx.iadd_imm(end, spec.span as i64 - 1);
        let past_span = cx.udiv_imm(past, spec.span as u32);
        let before = cx.imul(item, spans);
        cx.for_range(first_span, past_span, 1, |cx, span| {
            let is_first = cx.icmp(IntCmp::Equal, span, first_span);
            let at = cx.iadd(before, span);
            let at = cx.offset(partials, at, group * partial);
            cx.for_const(group, 1, |cx, g| {
                let from = cx.offset(at, g, partial);
                let most = cx.iadd_imm(from, spec.head_dim as i64 * 4);
                let total = cx.iadd_imm(most, 4);
                let later = Sums { sums: from, most, total };
                let to = joined.row(cx, spec, g);
                joiner.take(cx, &to, &later, is_first);
            });
        });
        output.store(cx, spec, &joined, to, t, head);
    });
    Ok(())
}

/// First position that a token sees whose last is before `end`.
fn first_seen(cx: &mut Lanes<'_>, spec: &AttentionSpec, end: Scalar) -> Scalar {
    let zero = cx.int(0);
    match spec.window {
        Some(w) => {
            let first = cx.iadd_imm(end, -(w as i64));
            cx.imax(first, zero)
        }
        None => zero,
    }
}

/// The maximum that differences are taken to: 0 in place of minus infinity.
fn finite(cx: &mut Lanes<'_>, most: Scalar) -> Scalar {
    let (least, zero) = (cx.f32(f32::NEG_INFINITY), cx.f32(0.0));
    let none = cx.fcmp(FloatCmp::Equal, most, least);
    cx.select(none, zero, most)
}

fn load_index(cx: &mut Lanes<'_>, base: Scalar, index: Scalar) -> Scalar {
    let at = cx.offset(base, index, 4);
    let v = cx.load_i32(at, 0);
    cx.widen(v)
}

fn store_index(cx: &mut Lanes<'_>, value: Scalar, base: Scalar, index: Scalar) {
    let at = cx.offset(base, index, 4);
    let v = cx.narrow(value);
    cx.store_i32(v, at, 0);
}
