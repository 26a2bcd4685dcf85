//! `attention`: causal grouped-query attention over KV pages with online softmax.
//!
//! An item is one token and one KV head: its query heads are stacked, so each key and value is read once for all of
//! them. Pages are visited in order of position, which fixes the order of every sum whatever the batch.
//! Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.

use super::cache::{Cache, CacheArgs};
use crate::lanes::{F32x4, IntCmp, Lanes, Scalar};

/// Query heads whose sums are held in registers at once.
const STACK: usize = 4;

pub(super) struct Attention {
    pub(super) cache: Cache,
    pub(super) heads: usize,
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
}

/// Per item on the stack: scaled queries, running sums, scores of one page, running maximum and sum per head.
struct Scratch {
    q: Scalar,
    sums: Scalar,
    scores: Scalar,
    most: Scalar,
    total: Scalar,
}

impl Attention {
    fn group(&self) -> usize {
        self.heads / self.cache.kv_heads
    }

    /// Bytes of one head's scores: a page, filled up to whole vectors.
    fn score_bytes(&self) -> usize {
        self.cache.page_len.next_multiple_of(4) * 4
    }

    pub(super) fn emit(&self, cx: &mut Lanes<'_>) -> Result<(), String> {
        self.cache.check()?;
        let (group, dh) = (self.group(), self.cache.head_dim);
        let (q, out) = (cx.arg(0), cx.arg(7));
        let args = CacheArgs::load(cx, 1);
        let s = Scratch {
            q: cx.scratch(group * dh * 4),
            sums: cx.scratch(group * dh * 4),
            scores: cx.scratch(group * self.score_bytes()),
            most: cx.scratch(group * 4),
            total: cx.scratch(group * 4),
        };
        cx.for_items(|cx, item| {
            let t = cx.udiv_imm(item, self.cache.kv_heads as u32);
            let head = cx.urem_imm(item, self.cache.kv_heads as u32);
            let row = cx.imul_imm(t, self.heads as i64);
            let first_head = cx.imul_imm(head, group as i64);
            let row = cx.iadd(row, first_head);
            let (from, to) = (cx.offset(q, row, dh * 4), cx.offset(out, row, dh * 4));
            self.start(cx, &s, from);
            let (position, table) = args.locate(cx, t);
            let end = cx.iadd_imm(position, 1);
            let zero = cx.int(0);
            let first = match self.window {
                Some(w) => {
                    let first = cx.iadd_imm(end, -(w as i64));
                    cx.imax(first, zero)
                }
                None => zero,
            };
            let page_len = self.cache.page_len;
            let first_page = cx.udiv_imm(first, page_len as u32);
            let past = cx.iadd_imm(end, page_len as i64 - 1);
            let past_page = cx.udiv_imm(past, page_len as u32);
            cx.for_range(first_page, past_page, 1, |cx, page_index| {
                let at = self.cache.page(cx, table, page_index, head);
                let page_start = cx.imul_imm(page_index, page_len as i64);
                let (low, high) = (cx.isub(first, page_start), cx.isub(end, page_start));
                let whole = cx.int(page_len as i64);
                let (low, high) = (cx.imax(low, zero), cx.imin(high, whole));
                let (keys, values) = (cx.iadd(args.keys, at), cx.iadd(args.values, at));
                self.page(cx, &s, keys, values, low, high);
            });
            self.finish(cx, &s, to);
        });
        Ok(())
    }

    /// Scaled queries, sums of zero, maximum of minus infinity.
    fn start(&self, cx: &mut Lanes<'_>, s: &Scratch, q: Scalar) {
        let scale = cx.splat_const(self.scale);
        let zero = cx.splat_const(0.0);
        cx.for_const(self.group() * self.cache.head_dim, 4, |cx, i| {
            let from = cx.offset(q, i, 4);
            let v = cx.load4(from, 0);
            let v = cx.vmul(v, scale);
            let (to, sum) = (cx.offset(s.q, i, 4), cx.offset(s.sums, i, 4));
            cx.store4(v, to, 0);
            cx.store4(zero, sum, 0);
        });
        let (least, none) = (cx.f32(f32::NEG_INFINITY), cx.f32(0.0));
        for g in 0..self.group() {
            cx.store_f32(least, s.most, 4 * g as i32);
            cx.store_f32(none, s.total, 4 * g as i32);
        }
    }

    /// Folds positions `low..high` of one page into the running sums.
    fn page(&self, cx: &mut Lanes<'_>, s: &Scratch, keys: Scalar, values: Scalar, low: Scalar, high: Scalar) {
        // Scores outside low..high count as minus infinity, so that whole vectors can be processed.
        let least = cx.splat_const(f32::NEG_INFINITY);
        cx.for_const(self.group() * self.score_bytes() / 4, 4, |cx, i| {
            let at = cx.offset(s.scores, i, 4);
            cx.store4(least, at, 0);
        });
        for first in (0..self.group()).step_by(STACK) {
            let heads = first..(first + STACK).min(self.group());
            self.scores(cx, s, heads.clone(), keys, low, high);
            for g in heads.clone() {
                self.soften(cx, s, g);
            }
            self.mix(cx, s, heads, values, low, high);
        }
    }

    /// `scores[g][p] = q[g] . k[p]` for a few heads.
    fn scores(
        &self,
        cx: &mut Lanes<'_>,
        s: &Scratch,
        heads: std::ops::Range<usize>,
        keys: Scalar,
        low: Scalar,
        high: Scalar,
    ) {
        let dh = self.cache.head_dim;
        cx.for_range(low, high, 1, |cx, p| {
            let key = cx.offset(keys, p, self.cache.head_bytes());
            let zero = cx.splat_const(0.0);
            let sums: Vec<_> = heads.clone().map(|_| cx.var(zero)).collect();
            cx.for_const(dh, 4, |cx, d| {
                let at = cx.offset(key, d, self.cache.kv.size());
                let k = self.cache.load4(cx, at, 0);
                let q = cx.offset(s.q, d, 4);
                for (sum, g) in sums.iter().zip(heads.clone()) {
                    let q = cx.load4(q, (g * dh * 4) as i32);
                    let old = cx.get(sum);
                    let new = cx.vmuladd(q, k, old);
                    cx.set(sum, new);
                }
            });
            let at = cx.offset(s.scores, p, 4);
            for (sum, g) in sums.iter().zip(heads.clone()) {
                let lanes = cx.get(sum);
                let score = cx.vsum(lanes);
                cx.store_f32(score, at, (g * self.score_bytes()) as i32);
            }
        });
    }

    /// Turns a head's scores into weights relative to the new maximum, and rescales what was summed before.
    fn soften(&self, cx: &mut Lanes<'_>, s: &Scratch, g: usize) {
        let slot = 4 * g as i32;
        let scores = cx.iadd_imm(s.scores, (g * self.score_bytes()) as i64);
        let old = cx.load_f32(s.most, slot);
        let most = self.fold_scores(cx, scores, f32::NEG_INFINITY, |cx, most, v, _| cx.vmax(v, most));
        let most = cx.vmax_across(most);
        let most = cx.fmax(most, old);
        cx.store_f32(most, s.most, slot);
        let all = cx.splat(most);
        let sum = self.fold_scores(cx, scores, 0.0, |cx, sum, v, at| {
            let v = cx.vsub(v, all);
            let e = cx.vexp(v);
            cx.store4(e, at, 0);
            cx.vadd(sum, e)
        });
        let sum = cx.vsum(sum);
        let change = cx.fsub(old, most);
        let factor = cx.exp(change);
        let total = cx.load_f32(s.total, slot);
        let total = cx.fmuladd(total, factor, sum);
        cx.store_f32(total, s.total, slot);
        let factor = cx.splat(factor);
        let sums = cx.iadd_imm(s.sums, (g * self.cache.head_dim * 4) as i64);
        cx.for_const(self.cache.head_dim, 4, |cx, d| {
            let at = cx.offset(sums, d, 4);
            let v = cx.load4(at, 0);
            let v = cx.vmul(v, factor);
            cx.store4(v, at, 0);
        });
    }

    fn fold_scores(
        &self,
        cx: &mut Lanes<'_>,
        scores: Scalar,
        first: f32,
        step: impl FnOnce(&mut Lanes<'_>, F32x4, F32x4, Scalar) -> F32x4,
    ) -> F32x4 {
        let first = cx.splat_const(first);
        let folded = cx.var(first);
        cx.for_const(self.score_bytes() / 4, 4, |cx, i| {
            let at = cx.offset(scores, i, 4);
            let v = cx.load4(at, 0);
            let old = cx.get(&folded);
            let new = step(cx, old, v, at);
            cx.set(&folded, new);
        });
        cx.get(&folded)
    }

    /// `sums[g] += weight[g][p] * v[p]` for a few heads.
    fn mix(
        &self,
        cx: &mut Lanes<'_>,
        s: &Scratch,
        heads: std::ops::Range<usize>,
        values: Scalar,
        low: Scalar,
        high: Scalar,
    ) {
        let dh = self.cache.head_dim;
        let nonempty = cx.icmp(IntCmp::SignedLessThan, low, high);
        cx.if_(nonempty, |cx| {
            cx.for_const(dh, 4, |cx, d| {
                let at = cx.offset(s.sums, d, 4);
                let column = cx.offset(values, d, self.cache.kv.size());
                let sums: Vec<_> = heads
                    .clone()
                    .map(|g| {
                        let v = cx.load4(at, (g * dh * 4) as i32);
                        cx.var(v)
                    })
                    .collect();
                cx.for_range(low, high, 1, |cx, p| {
                    let value = cx.offset(column, p, self.cache.head_bytes());
                    let v = self.cache.load4(cx, value, 0);
                    let weight = cx.offset(s.scores, p, 4);
                    for (sum, g) in sums.iter().zip(heads.clone()) {
                        let w = cx.load_splat(weight, (g * self.score_bytes()) as i32);
                        let old = cx.get(sum);
                        let new = cx.vmuladd(w, v, old);
                        cx.set(sum, new);
                    }
                });
                for (sum, g) in sums.iter().zip(heads.clone()) {
                    let v = cx.get(sum);
                    cx.store4(v, at, (g * dh * 4) as i32);
                }
            });
        });
    }

    /// Divides by the totals and stores.
    fn finish(&self, cx: &mut Lanes<'_>, s: &Scratch, out: Scalar) {
        let dh = self.cache.head_dim;
        for g in 0..self.group() {
            let total = cx.load_f32(s.total, 4 * g as i32);
            let total = cx.splat(total);
            let offset = (g * dh * 4) as i64;
            let (sums, out) = (cx.iadd_imm(s.sums, offset), cx.iadd_imm(out, offset));
            cx.for_const(dh, 4, |cx, d| {
                let (from, to) = (cx.offset(sums, d, 4), cx.offset(out, d, 4));
                let v = cx.load4(from, 0);
                let y = cx.vdiv(v, total);
                cx.store4(y, to, 0);
            });
        }
    }
}
