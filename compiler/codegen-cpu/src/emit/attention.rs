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
//! the cache on its way into registers; the rest is the same.
//!
//! The order of every sum is fixed by the definition, so a token's result is the same bits in all of them. What a row does
//! not see is never multiplied: memory beyond its positions may hold anything, NaN included.

use super::cache::{Cache, CacheArgs, codes};
use super::hadamard::hadamard;
use super::quantize::{QUADS, layout_of, some_groups};
use crate::lanes::{F32x4, FloatCmp, IntCmp, Lanes, Scalar, Var};
use crate::x86::{AttentionKernel, Level};
use attar_artifact::manifest::KvType;
use attar_kernel::{ActInt8Layout, Activation, AttentionSpec};

/// Positions whose weights are summed side by side; spans and pages are multiples of it.
const STRIDE: usize = 16;
/// Most rows whose sums are held in registers at once.
const BLOCK: usize = 4;

/// Computes tiles of tokens.
pub(super) fn attention(spec: &AttentionSpec, out: Activation, cx: &mut Lanes<'_>) -> Result<(), String> {
    let output = Output::new(spec, out)?;
    let group = spec.group();
    let stack = spec.tile_tokens() * group;
    let block = Level::of(cx.target()).map_or(BLOCK, |level| AttentionKernel::block_rows(level, stack));
    let rows = Rows::new(spec, stack, block, cx)?;
    let joined = Sums::scratch(cx, spec, rows.capacity);
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
                rows.run(cx, &joined, &args, q, from, next, head);
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
    let rows = Rows::new(spec, group, block, cx)?;
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
    let output = Output::new(spec, out)?;
    let (group, partial) = (spec.group(), spec.partial_len() * 4);
    let (partials, positions, to, spans) = (cx.arg(0), cx.arg(1), cx.arg(2), cx.arg(3));
    let joined = Sums::scratch(cx, spec, group);
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
                to.take(cx, spec, &later, is_first);
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

/// Where sums of weighted values, maxima and totals stand: `[rows, Dh]`, `[rows]` and `[rows]`.
#[derive(Clone, Copy)]
struct Sums {
    sums: Scalar,
    most: Scalar,
    total: Scalar,
}

impl Sums {
    fn scratch(cx: &mut Lanes<'_>, spec: &AttentionSpec, rows: usize) -> Sums {
        Sums {
            sums: cx.scratch(rows * spec.head_dim * 4),
            most: cx.scratch(rows * 4),
            total: cx.scratch(rows * 4),
        }
    }

    /// Those of one row.
    fn row(&self, cx: &mut Lanes<'_>, spec: &AttentionSpec, row: Scalar) -> Sums {
        Sums {
            sums: cx.offset(self.sums, row, spec.head_dim * 4),
            most: cx.offset(self.most, row, 4),
            total: cx.offset(self.total, row, 4),
        }
    }

    /// One row: takes a later span, which is the first when `is_first` holds.
    fn take(&self, cx: &mut Lanes<'_>, spec: &AttentionSpec, later: &Sums, is_first: Scalar) {
        let (later_most, later_total) = (cx.load_f32(later.most, 0), cx.load_f32(later.total, 0));
        cx.if_else(
            is_first,
            |cx| {
                cx.store_f32(later_most, self.most, 0);
                cx.store_f32(later_total, self.total, 0);
                cx.for_const(spec.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(later.sums, d, 4), cx.offset(self.sums, d, 4));
                    let v = cx.load4(from, 0);
                    cx.store4(v, to, 0);
                });
            },
            |cx| {
                let (most, total) = (cx.load_f32(self.most, 0), cx.load_f32(self.total, 0));
                let new = cx.fmax(most, later_most);
                cx.store_f32(new, self.most, 0);
                let base = finite(cx, new);
                let (a, b) = (cx.fsub(most, base), cx.fsub(later_most, base));
                let (a, b) = (cx.exp2_up_to_0(a), cx.exp2_up_to_0(b));
                let kept = cx.fmul(total, a);
                let total = cx.fmuladd(later_total, b, kept);
                cx.store_f32(total, self.total, 0);
                let (a, b) = (cx.splat(a), cx.splat(b));
                cx.for_const(spec.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(later.sums, d, 4), cx.offset(self.sums, d, 4));
                    let (old, new) = (cx.load4(to, 0), cx.load4(from, 0));
                    let kept = cx.vmul(old, a);
                    let sum = cx.vmuladd(new, b, kept);
                    cx.store4(sum, to, 0);
                });
            },
        );
    }
}

/// The maximum that differences are taken to: 0 in place of minus infinity.
fn finite(cx: &mut Lanes<'_>, most: Scalar) -> Scalar {
    let (least, zero) = (cx.f32(f32::NEG_INFINITY), cx.f32(0.0));
    let none = cx.fcmp(FloatCmp::Equal, most, least);
    cx.select(none, zero, most)
}

/// How results leave: as f32, or as groups of int8 rows.
struct Output {
    int8: Option<ActInt8Layout>,
}

impl Output {
    fn new(spec: &AttentionSpec, out: Activation) -> Result<Output, String> {
        let width = spec.group() * spec.head_dim;
        let int8 = match out {
            Activation::F32 => None,
            Activation::Int8 if width.is_multiple_of(ActInt8Layout::GROUP) => {
                Some(layout_of(spec.heads * spec.head_dim)?)
            }
            Activation::Int8 => {
                return Err(format!("int8 rows of {width} channels per KV head, which is no multiple of 32"));
            }
        };
        Ok(Output { int8 })
    }

    /// Divides the sums of a KV head's query heads by their totals and stores them as a part of row `t` of `to`.
    fn store(
        &self,
        cx: &mut Lanes<'_>,
        spec: &AttentionSpec,
        from: &Sums,
        to: Scalar,
        t: Scalar,
        head: Scalar,
    ) {
        let (group, dh) = (spec.group(), spec.head_dim);
        let f32_row = cx.offset(to, t, spec.heads * dh * 4);
        let f32_part = cx.offset(f32_row, head, group * dh * 4);
        let quotients = if self.int8.is_some() { from.sums } else { f32_part };
        cx.for_const(group, 1, |cx, g| {
            let row = from.row(cx, spec, g);
            let to = cx.offset(quotients, g, dh * 4);
            let total = cx.load_splat(row.total, 0);
            cx.for_const(dh, 4, |cx, d| {
                let (from, to) = (cx.offset(row.sums, d, 4), cx.offset(to, d, 4));
                let v = cx.load4(from, 0);
                let v = cx.vdiv(v, total);
                cx.store4(v, to, 0);
            });
            if spec.kv == KvType::Int4 {
                hadamard(cx, dh, to, to);
            }
        });
        if let Some(layout) = &self.int8 {
            let groups = group * dh / ActInt8Layout::GROUP;
            let to = cx.offset(to, t, layout.stride);
            let first = cx.imul_imm(head, groups as i64);
            some_groups(cx, layout, to, first, groups, |cx, first| {
                let at = cx.offset(quotients, first, 4);
                std::array::from_fn::<F32x4, QUADS, _>(|i| cx.load4(at, 16 * i as i32))
            });
        }
    }
}

/// Inner functions, and the lists of addresses they are given.
struct Wide {
    scores: Vec<u8>,
    soften: Vec<u8>,
    /// For a block of rows, and for one.
    mix: [Vec<u8>; 2],
    /// Addresses of the span's keys page by page, then of its values, then of keys that come after it and are only asked for.
    blocks: Scalar,
    /// How many of the last.
    ahead: usize,
}

impl Wide {
    fn new(spec: &AttentionSpec, block: usize, cx: &mut Lanes<'_>) -> Result<Option<Wide>, String> {
        let kernel = Level::of(cx.target()).and_then(|level| AttentionKernel::new(level, spec));
        let Some(kernel) = kernel else { return Ok(None) };
        let failed = |e: iced_x86::IcedError| format!("bug: inner function: {e}");
        let list = 2 * (spec.span / spec.page_len) + kernel.ahead();
        Ok(Some(Wide {
            scores: kernel.scores(block).map_err(failed)?,
            soften: kernel.soften().map_err(failed)?,
            mix: [kernel.mix(block).map_err(failed)?, kernel.mix(1).map_err(failed)?],
            ahead: kernel.ahead(),
            blocks: cx.scratch(list * 8),
        }))
    }
}

/// What a cache of codes asks of each row.
#[derive(Clone, Copy)]
struct Rounded {
    /// Scales of the queries, f32 `[capacity]`.
    scales: Scalar,
    /// For inner functions: the queries as signed bytes, `[capacity, Dh]`.
    codes: Scalar,
    /// Where a product begins, i32 `[capacity]`, see [`AttentionKernel::bias`].
    bias: Scalar,
    /// For inner functions: what the sums of 16-bit weights times codes are multiplied by, f32, for a 4-bit cache what is
    /// added to them before, i32, and, 8 bytes on, the address for the weights; 16 bytes a row.
    factors: Scalar,
}

/// Positions before those that all rows of a block see, those, and the others.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Before,
    All,
    After,
}

/// A stack of query heads of one KV head, token by token, and the memory to compute a span for them.
struct Rows<'a> {
    spec: &'a AttentionSpec,
    cache: Cache,
    /// Rows whose sums are held in registers at once.
    block: usize,
    /// Rows there is memory for, a multiple of `block`.
    capacity: usize,
    /// Scaled queries, `[capacity, Dh]`.
    q: Scalar,
    /// Scores, then weights, `[capacity, span]`.
    scores: Scalar,
    /// Positions a row sees, i32 `[capacity]` each: the first, and past the last.
    first: Scalar,
    end: Scalar,
    /// The same within the span.
    low: Scalar,
    high: Scalar,
    /// A page as f32, unless the cache is f32.
    page: Scalar,
    wide: Option<Wide>,
    /// Scales of the span's values.
    scales: Scalar,
    rounded: Option<Rounded>,
    /// What the span gives.
    own: Sums,
}

impl<'a> Rows<'a> {
    fn new(
        spec: &'a AttentionSpec,
        rows: usize,
        block: usize,
        cx: &mut Lanes<'_>,
    ) -> Result<Rows<'a>, String> {
        let AttentionSpec { kv_heads, head_dim, kv, page_len, .. } = *spec;
        let cache = Cache { kv_heads, head_dim, kv, page_len };
        cache.check()?;
        if !spec.span.is_multiple_of(page_len) || spec.span == 0 {
            return Err(format!("spans of {} positions, which is no multiple of a page", spec.span));
        }
        if kv_heads == 0 || !spec.heads.is_multiple_of(kv_heads) {
            return Err(format!("{} heads do not share {kv_heads} KV heads", spec.heads));
        }
        let capacity = rows.next_multiple_of(block);
        let wide = Wide::new(spec, block, cx)?;
        let page = if kv == KvType::F32 || wide.is_some() { 16 } else { head_dim * page_len * 4 };
        let scales = if kv.has_scales() { spec.span * 4 } else { 16 };
        let rounded = kv.has_scales().then(|| Rounded {
            scales: cx.scratch(capacity * 4),
            codes: cx.scratch(if wide.is_some() { capacity * head_dim } else { 16 }),
            bias: cx.scratch(capacity * 4),
            factors: cx.scratch(capacity * 16),
        });
        Ok(Rows {
            spec,
            cache,
            block,
            capacity,
            q: cx.scratch(capacity * head_dim * 4),
            scores: cx.scratch(capacity * spec.span * 4),
            first: cx.scratch(capacity * 4),
            end: cx.scratch(capacity * 4),
            low: cx.scratch(capacity * 4),
            high: cx.scratch(capacity * 4),
            page: cx.scratch(page),
            wide,
            scales: cx.scratch(scales),
            rounded,
            own: Sums::scratch(cx, spec, capacity),
        })
    }

    /// Rows of the tokens `from..next`, and the same filled up to whole blocks.
    fn count(&self, cx: &mut Lanes<'_>, from: Scalar, next: Scalar) -> (Scalar, Scalar) {
        let tokens = cx.isub(next, from);
        let rows = cx.imul_imm(tokens, self.spec.group() as i64);
        let past = cx.iadd_imm(rows, self.block as i64 - 1);
        let blocks = cx.udiv_imm(past, self.block as u32);
        (rows, cx.imul_imm(blocks, self.block as i64))
    }

    /// All spans of the tokens `from..next` of one sequence, joined.
    #[expect(clippy::too_many_arguments, reason = "a run of tokens in a batch")]
    fn run(
        &self,
        cx: &mut Lanes<'_>,
        joined: &Sums,
        args: &CacheArgs,
        q: Scalar,
        from: Scalar,
        next: Scalar,
        head: Scalar,
    ) {
        let (rows, count) = self.count(cx, from, next);
        let (position, table) = args.locate(cx, from);
        self.queries(cx, q, from, next, head);
        self.sight(cx, position, from, next);
        let end = cx.iadd_imm(position, 1);
        let first = first_seen(cx, self.spec, end);
        let first_span = cx.udiv_imm(first, self.spec.span as u32);
        let tokens = cx.isub(next, from);
        let past = cx.iadd(position, tokens);
        let past = cx.iadd_imm(past, self.spec.span as i64 - 1);
        let past_span = cx.udiv_imm(past, self.spec.span as u32);
        let zero = cx.int(0);
        cx.for_range(first_span, past_span, 1, |cx, span| {
            let start = cx.imul_imm(span, self.spec.span as i64);
            let (low, high) = self.within(cx, start, count);
            // A window may leave a gap between the run's rows and the span.
            let seen = cx.icmp(IntCmp::SignedLessThan, low, high);
            cx.if_(seen, |cx| {
                self.span(cx, args, table, head, start, count, (low, high));
                cx.for_range(zero, rows, 1, |cx, row| {
                    let (low, high) = self.seen(cx, row);
                    let sees = cx.icmp(IntCmp::SignedLessThan, low, high);
                    cx.if_(sees, |cx| {
                        let first = load_index(cx, self.first, row);
                        let is_first = cx.icmp(IntCmp::SignedGreaterThanOrEqual, first, start);
                        let (to, later) = (joined.row(cx, self.spec, row), self.own.row(cx, self.spec, row));
                        to.take(cx, self.spec, &later, is_first);
                    });
                });
            });
        });
    }

    /// Stores the results of the tokens `from..next`.
    #[expect(clippy::too_many_arguments, reason = "a run of tokens in a batch")]
    fn result(
        &self,
        cx: &mut Lanes<'_>,
        joined: &Sums,
        output: &Output,
        to: Scalar,
        from: Scalar,
        next: Scalar,
        head: Scalar,
    ) {
        cx.for_range(from, next, 1, |cx, t| {
            let token = cx.isub(t, from);
            let row = cx.imul_imm(token, self.spec.group() as i64);
            let sums = joined.row(cx, self.spec, row);
            output.store(cx, self.spec, &sums, to, t, head);
        });
    }

    /// Scales the queries of the tokens `from..next`; rows that only fill a block are zero.
    fn queries(&self, cx: &mut Lanes<'_>, q: Scalar, from: Scalar, next: Scalar, head: Scalar) {
        let (group, dh) = (self.spec.group(), self.spec.head_dim);
        let scale = cx.splat_const(self.spec.query_scale());
        cx.for_range(from, next, 1, |cx, t| {
            let row = cx.offset(q, t, self.spec.heads * dh * 4);
            let row = cx.offset(row, head, group * dh * 4);
            let token = cx.isub(t, from);
            let to = cx.offset(self.q, token, group * dh * 4);
            cx.for_const(group * dh, 4, |cx, i| {
                let (from, to) = (cx.offset(row, i, 4), cx.offset(to, i, 4));
                let v = cx.load4(from, 0);
                let v = cx.vmul(v, scale);
                cx.store4(v, to, 0);
            });
        });
        let (rows, count) = self.count(cx, from, next);
        let zero = cx.splat_const(0.0);
        cx.for_range(rows, count, 1, |cx, row| {
            let to = cx.offset(self.q, row, dh * 4);
            cx.for_const(dh, 4, |cx, d| {
                let to = cx.offset(to, d, 4);
                cx.store4(zero, to, 0);
            });
        });
        if let Some(rounded) = self.rounded {
            let zero = cx.int(0);
            if self.cache.kv == KvType::Int4 {
                cx.for_range(zero, rows, 1, |cx, row| {
                    let q = cx.offset(self.q, row, dh * 4);
                    hadamard(cx, dh, q, q);
                });
            }
            cx.for_range(zero, count, 1, |cx, row| self.round_query(cx, &rounded, row));
        }
    }

    /// Rounds a query to int8: to bytes for inner functions, in place as f32 otherwise.
    fn round_query(&self, cx: &mut Lanes<'_>, rounded: &Rounded, row: Scalar) {
        let dh = self.spec.head_dim;
        let q = cx.offset(self.q, row, dh * 4);
        let (scale, inverse) = self.cache.scale(cx, q);
        let to = cx.offset(rounded.scales, row, 4);
        cx.store_f32(scale, to, 0);
        let inverse = cx.splat(inverse);
        let zero = cx.splat_const_i32(0);
        let sum = cx.var(zero);
        let bytes = cx.offset(rounded.codes, row, dh);
        cx.for_const(dh, 4, |cx, d| {
            let at = cx.offset(q, d, 4);
            let v = cx.load4(at, 0);
            let codes = codes(cx, v, inverse, -127.0, 127.0);
            if self.wide.is_none() {
                let v = cx.vint_to_float(codes);
                return cx.store4(v, at, 0);
            }
            let to = cx.iadd(bytes, d);
            cx.store4_i8(codes, to, 0);
            let old = cx.get(&sum);
            let new = cx.viadd(old, codes);
            cx.set(&sum, new);
        });
        let sum = cx.get(&sum);
        let sum = cx.visum(sum);
        let bias = cx.imul_imm(sum, -i64::from(AttentionKernel::bias(self.cache.kv)));
        let to = cx.offset(rounded.bias, row, 4);
        cx.store_i32(bias, to, 0);
    }

    /// Notes what each row of the tokens `from..next` sees; `position` is that of the first. Rows that only fill a block
    /// see what the last one does.
    fn sight(&self, cx: &mut Lanes<'_>, position: Scalar, from: Scalar, next: Scalar) {
        let (_, count) = self.count(cx, from, next);
        let tokens = cx.isub(next, from);
        let last = cx.iadd_imm(tokens, -1);
        let zero = cx.int(0);
        cx.for_range(zero, count, 1, |cx, row| {
            let token = cx.udiv_imm(row, self.spec.group() as u32);
            let token = cx.imin(token, last);
            let end = cx.iadd(position, token);
            let end = cx.iadd_imm(end, 1);
            let first = first_seen(cx, self.spec, end);
            store_index(cx, first, self.first, row);
            store_index(cx, end, self.end, row);
        });
    }

    /// Notes what each row sees of the span that begins at `start`, and yields the range that holds all of it.
    fn within(&self, cx: &mut Lanes<'_>, start: Scalar, count: Scalar) -> (Scalar, Scalar) {
        let (zero, len) = (cx.int(0), cx.int(self.spec.span as i64));
        let (least, most) = (cx.var(len), cx.var(zero));
        cx.for_range(zero, count, 1, |cx, row| {
            let (first, end) = (load_index(cx, self.first, row), load_index(cx, self.end, row));
            let (low, high) = (cx.isub(first, start), cx.isub(end, start));
            let (low, high) = (cx.imax(low, zero), cx.imax(high, zero));
            let (low, high) = (cx.imin(low, len), cx.imin(high, len));
            store_index(cx, low, self.low, row);
            store_index(cx, high, self.high, row);
            let old = cx.get(&least);
            let new = cx.imin(old, low);
            cx.set(&least, new);
            let old = cx.get(&most);
            let new = cx.imax(old, high);
            cx.set(&most, new);
        });
        (cx.get(&least), cx.get(&most))
    }

    /// What a row sees of the span.
    fn seen(&self, cx: &mut Lanes<'_>, row: Scalar) -> (Scalar, Scalar) {
        (load_index(cx, self.low, row), load_index(cx, self.high, row))
    }

    /// The whole strides that hold what a row sees of the span.
    fn strides(&self, cx: &mut Lanes<'_>, row: Scalar) -> (Scalar, Scalar) {
        let (low, high) = self.seen(cx, row);
        let end = cx.iadd_imm(high, STRIDE as i64 - 1);
        (cx.iand_imm(low, -(STRIDE as i64)), cx.iand_imm(end, -(STRIDE as i64)))
    }

    /// Computes one span for `count` rows (whole blocks) into `own`; `low..high` is what any of them sees of it.
    #[expect(clippy::too_many_arguments, reason = "a span of a sequence")]
    fn span(
        &self,
        cx: &mut Lanes<'_>,
        args: &CacheArgs,
        table: Scalar,
        head: Scalar,
        start: Scalar,
        count: Scalar,
        (low, high): (Scalar, Scalar),
    ) {
        let last_row = cx.iadd_imm(count, -1);
        let last_end = load_index(cx, self.end, last_row);
        let page_len = self.cache.page_len;
        let zero = cx.int(0);
        let first_page = cx.udiv_imm(low, page_len as u32);
        let past = cx.iadd_imm(high, page_len as i64 - 1);
        let past_page = cx.udiv_imm(past, page_len as u32);
        let pages = cx.isub(past_page, first_page);
        let last_page = cx.iadd_imm(last_end, page_len as i64 - 1);
        let last_page = cx.udiv_imm(last_page, page_len as u32);
        let before = cx.udiv_imm(start, page_len as u32);
        let blocks = |cx: &mut Lanes<'_>, page: Scalar| {
            let index = cx.iadd(before, page);
            let block = self.cache.block(cx, table, index, head);
            (cx.iadd(args.keys, block), cx.iadd(args.values, block))
        };
        cx.for_range(first_page, past_page, 1, |cx, page| {
            let (keys, values) = blocks(cx, page);
            if let Some(wide) = &self.wide {
                let place = cx.isub(page, first_page);
                let key = cx.offset(wide.blocks, place, 8);
                let value = cx.offset(key, pages, 8);
                cx.store_i64(keys, key, 0);
                cx.store_i64(values, value, 0);
                return;
            }
            self.copy_scales(cx, page, values);
            let scales = cx.iadd_imm(keys, self.cache.scales_offset() as i64);
            let keys = self.convert(cx, keys, false);
            cx.for_range(zero, count, self.block as i64, |cx, row| {
                let q = cx.offset(self.q, row, self.spec.head_dim * 4);
                let to = cx.offset(self.scores, row, self.spec.span * 4);
                let to = cx.offset(to, page, page_len * 4);
                let scales = self.rounded.map(|r| (cx.offset(r.scales, row, 4), scales));
                self.scores(cx, q, keys, scales, to);
            });
        });
        if let Some(wide) = &self.wide {
            let end = cx.offset(wide.blocks, pages, 16);
            for i in 0..wide.ahead {
                // The table has entries up to the last page that any of the rows sees.
                let last = cx.iadd_imm(last_page, -1);
                let next = cx.iadd(before, past_page);
                let next = cx.iadd_imm(next, i as i64);
                let next = cx.imin(next, last);
                let block = self.cache.block(cx, table, next, head);
                let keys = cx.iadd(args.keys, block);
                cx.store_i64(keys, end, 8 * i as i32);
            }
            cx.for_range(zero, count, self.block as i64, |cx, row| {
                let q = cx.offset(self.q, row, self.spec.head_dim * 4);
                let to = cx.offset(self.scores, row, self.spec.span * 4);
                let to = cx.offset(to, first_page, page_len * 4);
                match self.rounded {
                    None => cx.call_inner(wide.scores.clone(), &[q, wide.blocks, pages, to]),
                    Some(r) => {
                        let q = cx.offset(r.codes, row, self.spec.head_dim);
                        let (scales, bias) = (cx.offset(r.scales, row, 4), cx.offset(r.bias, row, 4));
                        cx.call_inner(wide.scores.clone(), &[q, wide.blocks, pages, to, scales, bias]);
                    }
                }
            });
        }
        if self.wide.is_some() && self.rounded.is_some() {
            cx.for_range(first_page, past_page, 1, |cx, page| {
                let (_, values) = blocks(cx, page);
                self.copy_scales(cx, page, values);
            });
        }
        cx.for_range(zero, count, 1, |cx, row| self.soften(cx, row));
        let nothing = cx.splat_const(0.0);
        cx.for_range(zero, count, 1, |cx, row| {
            let to = cx.offset(self.own.sums, row, self.spec.head_dim * 4);
            cx.for_const(self.spec.head_dim, 4, |cx, d| {
                let to = cx.offset(to, d, 4);
                cx.store4(nothing, to, 0);
            });
        });
        if let Some(wide) = &self.wide {
            cx.for_range(zero, count, self.block as i64, |cx, row| {
                self.mix_part(cx, row, zero, self.spec.span, |cx, rows, weights, sums, from, to| {
                    let code = wide.mix[usize::from(rows != self.block)].clone();
                    let some = cx.icmp(IntCmp::SignedLessThan, from, to);
                    cx.if_(some, |cx| {
                        let page = cx.udiv_imm(from, page_len as u32);
                        let place = cx.urem_imm(from, page_len as u32);
                        let page = cx.isub(page, first_page);
                        let page = cx.iadd(page, pages);
                        let list = cx.offset(wide.blocks, page, 8);
                        let size = if self.rounded.is_some() { 2 } else { 4 };
                        let weights = cx.offset(weights, from, size);
                        let positions = cx.isub(to, from);
                        cx.call_inner(code, &[weights, list, place, positions, sums]);
                    });
                });
            });
            if let Some(rounded) = self.rounded {
                cx.for_range(zero, count, 1, |cx, row| self.scale_sums(cx, &rounded, row));
            }
            return;
        }
        cx.for_range(first_page, past_page, 1, |cx, page| {
            let (_, values) = blocks(cx, page);
            let values = self.convert(cx, values, true);
            let start = cx.imul_imm(page, page_len as i64);
            cx.for_range(zero, count, self.block as i64, |cx, row| {
                self.mix_part(cx, row, start, page_len, |cx, rows, weights, sums, from, to| {
                    self.mix(cx, rows, values, weights, sums, from, to);
                });
            });
        });
    }

    /// Turns a row's sums of products of integers into those of weighted values.
    fn scale_sums(&self, cx: &mut Lanes<'_>, rounded: &Rounded, row: Scalar) {
        let at = cx.offset(rounded.factors, row, 16);
        let factor = cx.load_splat(at, 0);
        let bias = (self.cache.kv == KvType::Int4).then(|| {
            let bias = cx.load_i32(at, 4);
            cx.splat_i32(bias)
        });
        let sums = cx.offset(self.own.sums, row, self.spec.head_dim * 4);
        cx.for_const(self.spec.head_dim, 4, |cx, d| {
            let at = cx.offset(sums, d, 4);
            let mut v = cx.load4_i32(at, 0);
            if let Some(bias) = bias {
                v = cx.viadd(v, bias);
            }
            let v = cx.vint_to_float(v);
            let v = cx.vmul(v, factor);
            cx.store4(v, at, 0);
        });
    }

    /// Keeps the scales of a page's values, for caches of codes.
    fn copy_scales(&self, cx: &mut Lanes<'_>, page: Scalar, values: Scalar) {
        if !self.cache.kv.has_scales() {
            return;
        }
        let page_len = self.cache.page_len;
        let offset = self.cache.scales_offset() as i64;
        let (from, to) = (cx.iadd_imm(values, offset), cx.offset(self.scales, page, page_len * 4));
        cx.for_const(page_len, 4, |cx, i| {
            let (from, to) = (cx.offset(from, i, 4), cx.offset(to, i, 4));
            let v = cx.load4(from, 0);
            cx.store4(v, to, 0);
        });
    }

    /// A block of keys (`values` false) or values as f32: converted to scratch memory, unless it is f32 already.
    fn convert(&self, cx: &mut Lanes<'_>, block: Scalar, values: bool) -> Scalar {
        let len = self.cache.page_len * self.cache.head_dim;
        // The inner dimension: positions of keys, elements of values.
        let columns = if values { self.cache.head_dim } else { self.cache.page_len };
        match self.cache.kv {
            KvType::F32 => return block,
            KvType::F16 => cx.for_const(len, STRIDE, |cx, i| {
                let (from, to) = (cx.offset(block, i, 2), cx.offset(self.page, i, 4));
                for quad in 0..STRIDE / 4 {
                    let v = cx.load4_f16(from, 8 * quad as i32);
                    cx.store4(v, to, 16 * quad as i32);
                }
            }),
            // Eight elements of a key to 32 bits, or four positions and two halves of the elements.
            KvType::Int4 => {
                let words = if values { columns / 2 } else { columns };
                let bias = cx.splat_const_i32(8);
                let mask = cx.splat_const_i32(15);
                cx.for_const(len / words / 8, 1, |cx, eight| {
                    let (from, to) =
                        (cx.offset(block, eight, 4 * words), cx.offset(self.page, eight, 32 * words));
                    cx.for_const(words, 4, |cx, column| {
                        let (from, to) = (cx.offset(from, column, 4), cx.offset(to, column, 4));
                        let bytes = cx.load4_i32(from, 0);
                        for (byte, half) in (0..4).flat_map(|byte| [(byte, 0), (byte, 1)]) {
                            let v = cx.vushr_imm(bytes, 8 * byte + 4 * half);
                            let v = cx.viand(v, mask);
                            let v = cx.visub(v, bias);
                            let v = cx.vint_to_float(v);
                            let (byte, half) = (byte as usize, half as usize);
                            let at = if values {
                                byte * columns + half * words
                            } else {
                                (4 * half + byte) * columns
                            };
                            cx.store4(v, to, 4 * at as i32);
                        }
                    });
                });
            }
            // Four rows of a column to 32 bits.
            KvType::Int8 => cx.for_const(len / columns / 4, 1, |cx, four| {
                let (from, to) =
                    (cx.offset(block, four, 4 * columns), cx.offset(self.page, four, 16 * columns));
                cx.for_const(columns, 4, |cx, column| {
                    let (from, to) = (cx.offset(from, column, 4), cx.offset(to, column, 4));
                    let bytes = cx.load4_i32(from, 0);
                    for row in 0..4 {
                        let v = cx.vishl_imm(bytes, 24 - 8 * row);
                        let v = cx.vsshr_imm(v, 24);
                        let v = cx.vint_to_float(v);
                        cx.store4(v, to, (row as usize * 4 * columns) as i32);
                    }
                });
            }),
        }
        self.page
    }

    /// Scores of one block of rows and one page of keys; `scales` are where those of queries and keys stand.
    fn scores(
        &self,
        cx: &mut Lanes<'_>,
        q: Scalar,
        keys: Scalar,
        scales: Option<(Scalar, Scalar)>,
        to: Scalar,
    ) {
        let (dh, page_len) = (self.cache.head_dim, self.cache.page_len);
        let quads = if cx.is_scalar() { 1 } else { 2 };
        let zero = cx.splat_const(0.0);
        cx.for_const(page_len, 4 * quads, |cx, key| {
            let sums: Vec<Var<F32x4>> = (0..self.block * quads).map(|_| cx.var(zero)).collect();
            let column = cx.offset(keys, key, 4);
            cx.for_const(dh, 4, |cx, d| {
                let (q, k) = (cx.offset(q, d, 4), cx.offset(column, d, page_len * 4));
                for i in 0..4 {
                    let k: Vec<F32x4> =
                        (0..quads).map(|n| cx.load4(k, (i * page_len * 4 + 16 * n) as i32)).collect();
                    for row in 0..self.block {
                        let q = cx.load_splat(q, ((row * dh + i) * 4) as i32);
                        for (n, k) in k.iter().enumerate() {
                            add_product(cx, &sums[row * quads + n], q, *k);
                        }
                    }
                }
            });
            let to = cx.offset(to, key, 4);
            let scales = scales.map(|(queries, keys)| {
                let at = cx.offset(keys, key, 4);
                (queries, (0..quads).map(|n| cx.load4(at, 16 * n as i32)).collect::<Vec<_>>())
            });
            for row in 0..self.block {
                for n in 0..quads {
                    let mut v = cx.get(&sums[row * quads + n]);
                    if let Some((queries, keys)) = &scales {
                        let query = cx.load_splat(*queries, 4 * row as i32);
                        v = cx.vmul(v, keys[n]);
                        v = cx.vmul(v, query);
                    }
                    cx.store4(v, to, (row * self.spec.span * 4 + 16 * n) as i32);
                }
            }
        });
    }

    /// Turns a row's scores into weights relative to their maximum.
    fn soften(&self, cx: &mut Lanes<'_>, row: Scalar) {
        let scores = cx.offset(self.scores, row, self.spec.span * 4);
        let (low, high) = self.seen(cx, row);
        let (begin, end) = self.strides(cx, row);
        // What the row does not see of the strides weighs nothing.
        let least = cx.f32(f32::NEG_INFINITY);
        for (from, to) in [(begin, low), (high, end)] {
            cx.for_range(from, to, 1, |cx, i| {
                let at = cx.offset(scores, i, 4);
                cx.store_f32(least, at, 0);
            });
        }
        if let Some(wide) = &self.wide {
            let len = cx.isub(end, begin);
            let strides = cx.udiv_imm(len, STRIDE as u32);
            let (first, scales) = (cx.offset(scores, begin, 4), cx.offset(self.scales, begin, 4));
            let (most, total) = (cx.offset(self.own.most, row, 4), cx.offset(self.own.total, row, 4));
            let some = cx.icmp(IntCmp::SignedLessThan, begin, end);
            cx.if_(some, |cx| match self.rounded {
                None => cx.call_inner(wide.soften.clone(), &[first, strides, most, total]),
                Some(r) => {
                    let factor = cx.offset(r.factors, row, 16);
                    let to = cx.offset(scores, begin, 2);
                    cx.store_i64(to, factor, 8);
                    cx.call_inner(wide.soften.clone(), &[first, strides, most, total, scales, factor]);
                }
            });
            return;
        }
        let first = cx.splat_const(f32::NEG_INFINITY);
        let most: [Var<F32x4>; 4] = std::array::from_fn(|_| cx.var(first));
        cx.for_range(begin, end, STRIDE as i64, |cx, i| {
            let at = cx.offset(scores, i, 4);
            for (n, most) in most.iter().enumerate() {
                let v = cx.load4(at, 16 * n as i32);
                // The old maximum when the score is NaN, which shows in the weights.
                let old = cx.get(most);
                let new = cx.vmax(v, old);
                cx.set(most, new);
            }
        });
        let [a, b, c, d] = most.map(|m| cx.get(&m));
        let (x, y) = (cx.vmax(a, c), cx.vmax(b, d));
        let most = cx.vmax(x, y);
        let most = cx.vmax_across(most);
        let at = cx.offset(self.own.most, row, 4);
        cx.store_f32(most, at, 0);
        let base = finite(cx, most);
        let base = cx.splat(base);
        let zero = cx.splat_const(0.0);
        let totals: [Var<F32x4>; 4] = std::array::from_fn(|_| cx.var(zero));
        cx.for_range(begin, end, STRIDE as i64, |cx, i| {
            let at = cx.offset(scores, i, 4);
            let scale = cx.offset(self.scales, i, 4);
            for (n, total) in totals.iter().enumerate() {
                let offset = 16 * n as i32;
                let v = cx.load4(at, offset);
                let v = cx.vsub(v, base);
                let mut weight = cx.vexp2_up_to_0(v);
                let old = cx.get(total);
                let new = cx.vadd(old, weight);
                cx.set(total, new);
                if self.cache.kv.has_scales() {
                    let scale = cx.load4(scale, offset);
                    weight = cx.vmul(weight, scale);
                }
                cx.store4(weight, at, offset);
            }
        });
        let [a, b, c, d] = totals.map(|t| cx.get(&t));
        let (x, y) = (cx.vadd(a, c), cx.vadd(b, d));
        let total = cx.vadd(x, y);
        let total = cx.vsum(total);
        let at = cx.offset(self.own.total, row, 4);
        cx.store_f32(total, at, 0);
    }

    /// Adds the values of `len` positions of the span, from `start` on, to the sums of the block of rows from `row` on.
    ///
    /// What all rows of the block see is added for all at once; what only some see comes before it and after it. `mix` is
    /// given rows, weights at `start`, sums, and positions from `start`.
    fn mix_part(
        &self,
        cx: &mut Lanes<'_>,
        row: Scalar,
        start: Scalar,
        len: usize,
        mut mix: impl FnMut(&mut Lanes<'_>, usize, Scalar, Scalar, Scalar, Scalar),
    ) {
        let (zero, len) = (cx.int(0), cx.int(len as i64));
        let within = |cx: &mut Lanes<'_>, row| {
            // Among bytes nothing is not finite: positions without weight may be added.
            let bytes = self.wide.is_some() && self.rounded.is_some();
            let (low, high) = if bytes { self.strides(cx, row) } else { self.seen(cx, row) };
            let (low, high) = (cx.isub(low, start), cx.isub(high, start));
            let (low, high) = (cx.imax(low, zero), cx.imax(high, zero));
            (cx.imin(low, len), cx.imin(high, len))
        };
        let (mut all_from, mut all_to) = (zero, len);
        for i in 0..self.block {
            let row = cx.iadd_imm(row, i as i64);
            let (low, high) = within(cx, row);
            all_from = cx.imax(all_from, low);
            all_to = cx.imin(all_to, high);
        }
        all_to = cx.imax(all_from, all_to);
        let weights = cx.offset(self.scores, row, self.spec.span * 4);
        let weights = cx.offset(weights, start, 4);
        let sums = cx.offset(self.own.sums, row, self.spec.head_dim * 4);
        for phase in [Phase::Before, Phase::All, Phase::After] {
            if phase == Phase::All {
                mix(cx, self.block, weights, sums, all_from, all_to);
            } else if self.block > 1 {
                cx.for_const(self.block, 1, |cx, i| {
                    let row = cx.iadd(row, i);
                    let (mut from, mut to) = within(cx, row);
                    if phase == Phase::Before {
                        to = cx.imin(to, all_from);
                    } else {
                        from = cx.imax(from, all_to);
                    }
                    let weights = cx.offset(weights, i, self.spec.span * 4);
                    let sums = cx.offset(sums, i, self.spec.head_dim * 4);
                    mix(cx, 1, weights, sums, from, to);
                });
            }
        }
    }

    /// `sums[r] += weights[r][s] * values[s]` for `rows` rows and the tokens `from..to` of a page.
    #[expect(clippy::too_many_arguments, reason = "a product of two matrices")]
    fn mix(
        &self,
        cx: &mut Lanes<'_>,
        rows: usize,
        values: Scalar,
        weights: Scalar,
        sums: Scalar,
        from: Scalar,
        to: Scalar,
    ) {
        let (dh, span) = (self.cache.head_dim, self.spec.span);
        let most = if cx.is_scalar() { 4 } else { 8 };
        let quads = [4, 2].into_iter().find(|q| (dh / 4).is_multiple_of(*q) && rows * q <= most).unwrap_or(1);
        let some = cx.icmp(IntCmp::SignedLessThan, from, to);
        cx.if_(some, |cx| {
            cx.for_const(dh, 4 * quads, |cx, d| {
                let (sums, column) = (cx.offset(sums, d, 4), cx.offset(values, d, 4));
                let at = |row: usize, n: usize| (row * dh * 4 + 16 * n) as i32;
                let mut held = Vec::new();
                for row in 0..rows {
                    for n in 0..quads {
                        let v = cx.load4(sums, at(row, n));
                        held.push(cx.var(v));
                    }
                }
                cx.for_range(from, to, 1, |cx, s| {
                    let value = cx.offset(column, s, dh * 4);
                    let weight = cx.offset(weights, s, 4);
                    let v: Vec<F32x4> = (0..quads).map(|n| cx.load4(value, 16 * n as i32)).collect();
                    for row in 0..rows {
                        let w = cx.load_splat(weight, (row * span * 4) as i32);
                        for (n, v) in v.iter().enumerate() {
                            add_product(cx, &held[row * quads + n], w, *v);
                        }
                    }
                });
                for row in 0..rows {
                    for n in 0..quads {
                        let v = cx.get(&held[row * quads + n]);
                        cx.store4(v, sums, at(row, n));
                    }
                }
            });
        });
    }
}

fn add_product(cx: &mut Lanes<'_>, sum: &Var<F32x4>, a: F32x4, b: F32x4) {
    let old = cx.get(sum);
    let new = cx.vmuladd(a, b, old);
    cx.set(sum, new);
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
