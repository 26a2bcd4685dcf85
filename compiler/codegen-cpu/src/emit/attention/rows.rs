//! A stack of query heads, and a span of the context computed for them.

use super::sums::{Joiner, Output, Sums, inner_failed};
use super::{STRIDE, first_seen, load_index, store_index};
use crate::emit::cache::{Cache, CacheArgs, codes};
use crate::emit::hadamard::hadamard;
use crate::lanes::{IntCmp, Lanes, Scalar};
use crate::x86::{AttentionKernel, HeadKernel, Level};
use attar_artifact::manifest::KvType;
use attar_kernel::AttentionSpec;

/// Bytes of [`Rounded::factors`] for a row.
const FACTOR_BYTES: usize = 24;

/// Inner functions, and the lists of addresses they are given.
struct Wide {
    scores: Vec<u8>,
    soften: Vec<u8>,
    /// For a block of rows, and for one.
    mix: [Vec<u8>; 2],
    /// Addresses of the span's keys page by page, then of its values, then of what is only asked for while values are read.
    blocks: Scalar,
    /// How many of the last.
    tail: usize,
    /// How many pages before its use a page is asked for.
    ahead: usize,
    /// Bytes of values that are asked for while a row's weights are made; none where there are many rows.
    fetch: usize,
}

impl Wide {
    fn new(
        spec: &AttentionSpec,
        block: usize,
        few: bool,
        cx: &mut Lanes<'_>,
    ) -> Result<Option<Wide>, String> {
        let kernel = Level::of(cx.target()).and_then(|level| AttentionKernel::new(level, spec));
        let Some(kernel) = kernel else { return Ok(None) };
        let failed = inner_failed;
        let pages = spec.span / spec.page_len;
        let tail = kernel.ahead_of_values().max(kernel.ahead());
        Ok(Some(Wide {
            scores: kernel.scores(block).map_err(failed)?,
            soften: kernel.soften(few).map_err(failed)?,
            mix: [kernel.mix(block).map_err(failed)?, kernel.mix(1).map_err(failed)?],
            tail,
            ahead: kernel.ahead(),
            fetch: if few { spec.span / STRIDE * AttentionKernel::SOFTEN_BYTES } else { 0 },
            blocks: cx.scratch((2 * pages + tail) * 8),
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
    /// added to them before, i32, then the address for the weights and that of what is to be fetched, [`FACTOR_BYTES`] a row.
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
pub(super) struct Rows<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) cache: Cache,
    /// Rows whose sums are held in registers at once.
    pub(super) block: usize,
    /// Rows there is memory for, a multiple of `block`.
    pub(super) capacity: usize,
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
    pub(super) page: Scalar,
    wide: Option<Wide>,
    /// Inner functions that scale queries and zero sums.
    heads: Option<[Vec<u8>; 2]>,
    /// Scales of the span's values.
    pub(super) scales: Scalar,
    rounded: Option<Rounded>,
    /// What the span gives.
    pub(super) own: Sums,
}

impl<'a> Rows<'a> {
    pub(super) fn new(
        spec: &'a AttentionSpec,
        rows: usize,
        block: usize,
        few: bool,
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
        let wide = Wide::new(spec, block, few, cx)?;
        let heads = HeadKernel::new(Level::of(cx.target()), head_dim).map(|heads| {
            let stride = spec.heads * head_dim * 4;
            Ok([heads.scale_queries(spec.group(), spec.query_scale(), stride)?, heads.zero()?])
        });
        let heads = heads.transpose().map_err(inner_failed)?;
        let page = if kv == KvType::F32 || wide.is_some() { 16 } else { head_dim * page_len * 4 };
        let scales = if kv.has_scales() { spec.span * 4 } else { 16 };
        let rounded = kv.has_scales().then(|| Rounded {
            scales: cx.scratch(capacity * 4),
            codes: cx.scratch(if wide.is_some() { capacity * head_dim } else { 16 }),
            bias: cx.scratch(capacity * 4),
            factors: cx.scratch(capacity * FACTOR_BYTES),
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
            heads,
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
    pub(super) fn run(
        &self,
        cx: &mut Lanes<'_>,
        joined: (&Sums, &Joiner),
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
                        let (sums, joiner) = joined;
                        let (to, later) = (sums.row(cx, self.spec, row), self.own.row(cx, self.spec, row));
                        joiner.take(cx, &to, &later, is_first);
                    });
                });
            });
        });
    }

    /// Stores the results of the tokens `from..next`.
    #[expect(clippy::too_many_arguments, reason = "a run of tokens in a batch")]
    pub(super) fn result(
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
    pub(super) fn queries(&self, cx: &mut Lanes<'_>, q: Scalar, from: Scalar, next: Scalar, head: Scalar) {
        let (group, dh) = (self.spec.group(), self.spec.head_dim);
        if let Some([scale, _]) = &self.heads {
            let row = cx.offset(q, from, self.spec.heads * dh * 4);
            let row = cx.offset(row, head, group * dh * 4);
            let tokens = cx.isub(next, from);
            cx.call_inner(scale.clone(), &[row, self.q, tokens]);
        } else {
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
        }
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
    pub(super) fn sight(&self, cx: &mut Lanes<'_>, position: Scalar, from: Scalar, next: Scalar) {
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
    pub(super) fn within(&self, cx: &mut Lanes<'_>, start: Scalar, count: Scalar) -> (Scalar, Scalar) {
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
    pub(super) fn span(
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
            // The table has entries up to the last page that any of the rows sees.
            let last = cx.iadd_imm(last_page, -1);
            let next: Vec<Scalar> = (0..wide.ahead)
                .map(|i| {
                    let next = cx.iadd(before, past_page);
                    let next = cx.iadd_imm(next, i as i64);
                    let next = cx.imin(next, last);
                    let block = self.cache.block(cx, table, next, head);
                    cx.iadd(args.keys, block)
                })
                .collect();
            self.ask_for(cx, wide, pages, &next);
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
        cx.for_range(zero, count, 1, |cx, row| self.soften(cx, row, pages));
        if let Some([_, zero]) = &self.heads {
            cx.call_inner(zero.clone(), &[self.own.sums, count]);
        } else {
            let nothing = cx.splat_const(0.0);
            cx.for_range(zero, count, 1, |cx, row| {
                let to = cx.offset(self.own.sums, row, self.spec.head_dim * 4);
                cx.for_const(self.spec.head_dim, 4, |cx, d| {
                    let to = cx.offset(to, d, 4);
                    cx.store4(nothing, to, 0);
                });
            });
        }
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
        let at = cx.offset(rounded.factors, row, FACTOR_BYTES);
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

    /// Turns a row's scores into weights relative to their maximum.
    fn soften(&self, cx: &mut Lanes<'_>, row: Scalar, pages: Scalar) {
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
            let fetch = (wide.fetch > 0).then(|| self.fetched(cx, wide, row, pages));
            cx.if_(some, |cx| match self.rounded {
                None => {
                    let args: Vec<Scalar> = [first, strides, most, total].into_iter().chain(fetch).collect();
                    cx.call_inner(wide.soften.clone(), &args);
                }
                Some(r) => {
                    let factor = cx.offset(r.factors, row, FACTOR_BYTES);
                    let to = cx.offset(scores, begin, 2);
                    cx.store_i64(to, factor, 8);
                    if let Some(fetch) = fetch {
                        cx.store_i64(fetch, factor, 16);
                    }
                    cx.call_inner(wide.soften.clone(), &[first, strides, most, total, scales, factor]);
                }
            });
            return;
        }
        self.soften_strides(cx, row, scores, begin, end);
    }

    /// Pages of values that are asked for before any is read: while scores are computed, and while weights are made.
    fn asked_before(&self, wide: &Wide) -> usize {
        let block = self.cache.kv.block_bytes(self.cache.head_dim, self.cache.page_len);
        let rows = if wide.fetch > 0 { self.spec.group() } else { 0 };
        (wide.ahead + rows * wide.fetch / block).min(self.spec.span / self.spec.page_len)
    }

    /// Fills the end of the list: while values are read, the rest of them is asked for, and then the keys in `next`, as evenly as
    /// may be.
    fn ask_for(&self, cx: &mut Lanes<'_>, wide: &Wide, pages: Scalar, next: &[Scalar]) {
        let (whole, before) = (self.spec.span / self.spec.page_len, self.asked_before(wide));
        let values = cx.offset(wide.blocks, pages, 8);
        let end = cx.offset(wide.blocks, pages, 16);
        let last = cx.iadd_imm(pages, -1);
        let count = whole - before + next.len();
        for i in 0..wide.tail {
            let address = match (i * count / wide.tail).checked_sub(whole - before) {
                Some(key) => next[key],
                None => {
                    let page = cx.int((before + i * count / wide.tail) as i64);
                    let page = cx.imin(page, last);
                    let at = cx.offset(values, page, 8);
                    cx.load_i64(at, 0)
                }
            };
            cx.store_i64(address, end, 8 * i as i32);
        }
    }

    /// What is asked for while a row's weights are made: values behind those that were asked for with the scores.
    fn fetched(&self, cx: &mut Lanes<'_>, wide: &Wide, row: Scalar, pages: Scalar) -> Scalar {
        let block = self.cache.kv.block_bytes(self.cache.head_dim, self.cache.page_len);
        let at = cx.imul_imm(row, wide.fetch as i64);
        let (page, place) = (cx.udiv_imm(at, block as u32), cx.urem_imm(at, block as u32));
        let page = cx.iadd_imm(page, wide.ahead as i64);
        let last = cx.iadd_imm(pages, -1);
        let page = cx.imin(page, last);
        let values = cx.offset(wide.blocks, pages, 8);
        let address = cx.offset(values, page, 8);
        let address = cx.load_i64(address, 0);
        cx.iadd(address, place)
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
}
