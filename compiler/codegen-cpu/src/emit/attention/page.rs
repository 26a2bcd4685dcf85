//! A span's products and softmax in Cranelift's own vectors: a page is converted to f32 once for all rows.

use super::rows::Rows;
use super::{STRIDE, finite};
use crate::lanes::{F32x4, IntCmp, Lanes, Scalar, Var};
use attar_artifact::manifest::KvType;

impl Rows<'_> {
    /// A block of keys (`values` false) or values as f32: converted to scratch memory, unless it is f32 already.
    pub(super) fn convert(&self, cx: &mut Lanes<'_>, block: Scalar, values: bool) -> Scalar {
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
    pub(super) fn scores(
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

    /// Turns the strides `begin..end` of a row's scores into weights relative to their maximum.
    pub(super) fn soften_strides(
        &self,
        cx: &mut Lanes<'_>,
        row: Scalar,
        scores: Scalar,
        begin: Scalar,
        end: Scalar,
    ) {
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

    /// `sums[r] += weights[r][s] * values[s]` for `rows` rows and the tokens `from..to` of a page.
    #[expect(clippy::too_many_arguments, reason = "a product of two matrices")]
    pub(super) fn mix(
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
