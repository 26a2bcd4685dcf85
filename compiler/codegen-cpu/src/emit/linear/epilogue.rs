//! What happens to a row's sums: bias, then store, residual addition, SwiGLU, or the way of a head into attention.

use super::BLOCK_SUMS;
use crate::emit::cache::{Cache, CacheArgs, Stores, rotate};
use crate::emit::norm::rms_factor;
use crate::emit::quantize::some_groups;
use crate::lanes::{IntCmp, Lanes, Scalar};
use crate::x86::{HeadKernel, Level, rows};
use attar_format::CHANNELS;
use attar_kernel::{ActInt8Layout, Activation, Epilogue, LinearSpec, QkvEpilogue};

/// The epilogue's arguments, loaded once.
pub(super) struct Args {
    /// Rows of the launch; i64.
    pub(super) total_rows: Scalar,
    /// How far ahead of its use a weight is asked for, in bytes; i64.
    pub(super) prefetch: Scalar,
    bias: Option<Scalar>,
    rest: Vec<Scalar>,
    /// How heads come into the cache, where they do.
    stores: Option<Stores>,
}

impl Args {
    pub(super) fn load(spec: &LinearSpec, cx: &mut Lanes<'_>) -> Result<Args, String> {
        let count = match &spec.epilogue {
            Epilogue::Store | Epilogue::Swiglu { .. } => 1,
            Epilogue::Residual => 2,
            Epilogue::Qkv(q) => 8 + 2 * usize::from(q.qk_norm.is_some()),
        };
        let first = 2 + usize::from(spec.bias);
        let bias = spec.bias.then(|| cx.arg(2));
        let rest = (first..first + count).map(|i| cx.arg(i)).collect();
        let stores = match &spec.epilogue {
            Epilogue::Qkv(q) => Some(cache_of(q).stores(cx)?),
            _ => None,
        };
        Ok(Args {
            total_rows: cx.arg(first + count),
            prefetch: cx.arg(first + count + 1),
            bias,
            rest,
            stores,
        })
    }

    /// Takes the sums of grid item `item` for row `row` to their destination.
    pub(super) fn row(&self, spec: &LinearSpec, cx: &mut Lanes<'_>, item: Scalar, row: Scalar, sums: Scalar) {
        match &spec.epilogue {
            Epilogue::Store | Epilogue::Residual => {
                let residual = (spec.epilogue == Epilogue::Residual).then(|| self.rest[0]);
                let (blocks, out) = (spec.blocks_per_item(), self.rest[usize::from(residual.is_some())]);
                let first = cx.imul_imm(item, blocks as i64);
                cx.for_const(blocks, 1, |cx, b| {
                    let (block, sums) = (cx.iadd(first, b), cx.offset(sums, b, BLOCK_SUMS));
                    self.store(spec.n, residual, out, cx, block, row, sums);
                });
            }
            Epilogue::Swiglu { width, out } => {
                let pairs = spec.blocks_per_item() / 2;
                self.add_bias(pairs * 2 * CHANNELS, cx, item, sums);
                cx.for_const(pairs, 1, |cx, pair| {
                    let sums = cx.offset(sums, pair, 2 * BLOCK_SUMS);
                    cx.for_const(BLOCK_SUMS, 16, |cx, at| {
                        let gate = cx.iadd(sums, at);
                        let (up, gate_value) = (cx.load4(gate, BLOCK_SUMS as i32), cx.load4(gate, 0));
                        let activated = cx.vsilu(gate_value);
                        let product = cx.vmul(activated, up);
                        cx.store4(product, gate, 0);
                    });
                });
                match out {
                    Activation::F32 => {
                        let no_bias = Args { bias: None, rest: Vec::new(), stores: None, ..*self };
                        no_bias.store(*width, None, self.rest[0], cx, item, row, sums);
                    }
                    Activation::Int8 => {
                        let layout = ActInt8Layout::new(*width);
                        let to = cx.offset(self.rest[0], row, layout.stride);
                        some_groups(cx, &layout, to, item, 1, |cx, _| {
                            // Between a pair's 16 products and the next stand its ups.
                            std::array::from_fn(|i| {
                                let at = i / 4 * 2 * BLOCK_SUMS + i % 4 * 16;
                                cx.load4(sums, at as i32)
                            })
                        });
                    }
                }
            }
            Epilogue::Qkv(q) => self.head(q, cx, item, row, sums),
        }
    }

    /// Takes a chunk's sums to their destination by an inner function, where there is one; says whether.
    #[expect(clippy::too_many_arguments, reason = "a chunk's place and what to do there")]
    pub(super) fn wide(
        &self,
        spec: &LinearSpec,
        cx: &mut Lanes<'_>,
        level: Option<Level>,
        item: Scalar,
        first: Scalar,
        count: Scalar,
        sums: Scalar,
        sums_stride: usize,
    ) -> Result<bool, iced_x86::IcedError> {
        let Some(level) = level.filter(|_| self.bias.is_none()) else { return Ok(false) };
        let blocks = spec.blocks_per_item();
        match &spec.epilogue {
            Epilogue::Store | Epilogue::Residual if spec.n.is_multiple_of(CHANNELS) => {
                let residual = spec.epilogue == Epilogue::Residual;
                let code = rows::store_rows(level, spec.n, blocks, residual, sums_stride)?;
                let place = |cx: &mut Lanes<'_>, base: Scalar| {
                    let row = cx.offset(base, first, spec.n * 4);
                    cx.offset(row, item, blocks * BLOCK_SUMS)
                };
                let from = place(cx, self.rest[0]);
                let to = if residual { place(cx, self.rest[1]) } else { from };
                cx.call_inner(code, &[sums, from, to, count]);
                Ok(true)
            }
            Epilogue::Swiglu { width, out: Activation::Int8 } => {
                let layout = ActInt8Layout::new(*width);
                let code = rows::swiglu_quantize(level, &layout, sums_stride)?;
                let row = cx.offset(self.rest[0], first, layout.stride);
                let codes = cx.offset(row, item, ActInt8Layout::GROUP);
                let scale = cx.offset(row, item, 4);
                let scale = cx.iadd_imm(scale, layout.scales_offset as i64);
                cx.call_inner(code, &[sums, codes, scale, count]);
                Ok(true)
            }
            Epilogue::Qkv(q) if q.qk_norm.is_none() => {
                let Some(heads) = HeadKernel::new(Some(level), q.head_dim) else { return Ok(false) };
                self.heads(q, heads, cx, item, first, count, sums, sums_stride)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The way of a chunk's heads: all rows at once but into the cache, where each has a place of its own.
    #[expect(clippy::too_many_arguments, reason = "a chunk's place and what to do there")]
    fn heads(
        &self,
        q: &QkvEpilogue,
        heads: HeadKernel,
        cx: &mut Lanes<'_>,
        item: Scalar,
        first: Scalar,
        count: Scalar,
        sums: Scalar,
        sums_stride: usize,
    ) -> Result<(), iced_x86::IcedError> {
        let HeadArgs { rope, out, .. } = self.head_args(q);
        let head_bytes = q.head_dim * 4;
        let queries = heads.rotate(sums_stride, q.heads * head_bytes)?;
        let keys = heads.rotate(sums_stride, sums_stride)?;
        let rope = cx.offset(rope, first, head_bytes);
        let is_query = cx.icmp_imm(IntCmp::SignedLessThan, item, q.heads as i64);
        cx.if_else(
            is_query,
            |cx| {
                let out = cx.offset(out, first, q.heads * head_bytes);
                let out = cx.offset(out, item, head_bytes);
                cx.call_inner(queries, &[sums, rope, out, count]);
            },
            |cx| {
                let is_key = cx.icmp_imm(IntCmp::SignedLessThan, item, (q.heads + q.kv_heads) as i64);
                cx.if_(is_key, |cx| cx.call_inner(keys, &[sums, rope, sums, count]));
                let zero = cx.int(0);
                cx.for_range(zero, count, 1, |cx, r| {
                    let (row, sums) = (cx.iadd(first, r), cx.offset(sums, r, sums_stride));
                    self.cache(q, cx, item, row, sums);
                });
            },
        );
        Ok(())
    }

    /// Adds the bias of the item's `channels` channels in place; all of them must exist.
    fn add_bias(&self, channels: usize, cx: &mut Lanes<'_>, item: Scalar, sums: Scalar) {
        if let Some(bias) = self.bias {
            let bias = cx.offset(bias, item, channels * 4);
            cx.for_const(channels * 4, 16, |cx, at| {
                let (from, to) = (cx.iadd(bias, at), cx.iadd(sums, at));
                let (b, y) = (cx.load4(from, 0), cx.load4(to, 0));
                let y = cx.vadd(y, b);
                cx.store4(y, to, 0);
            });
        }
    }

    /// Stores a block of 16 channels of a matrix of `width` columns; the last block may be narrower.
    #[expect(clippy::too_many_arguments, reason = "a row's place and what to do there")]
    fn store(
        &self,
        width: usize,
        residual: Option<Scalar>,
        out: Scalar,
        cx: &mut Lanes<'_>,
        item: Scalar,
        row: Scalar,
        sums: Scalar,
    ) {
        let column = cx.imul_imm(item, BLOCK_SUMS as i64);
        let start = cx.imul_imm(row, (width * 4) as i64);
        let at = cx.iadd(start, column);
        let out = cx.iadd(out, at);
        let residual = residual.map(|r| cx.iadd(r, at));
        let bias = self.bias.map(|b| cx.iadd(b, column));
        let channels = |cx: &mut Lanes<'_>, count: usize| {
            for first in (0..count).step_by(4) {
                let (at, part) = ((first * 4) as i32, count - first);
                let mut y = cx.load4(sums, at);
                if let Some(bias) = bias {
                    let b = cx.load4_part(bias, at, part, 0.0);
                    y = cx.vadd(y, b);
                }
                if let Some(residual) = residual {
                    let r = cx.load4_part(residual, at, part, 0.0);
                    y = cx.vadd(r, y);
                }
                cx.store4_part(y, out, at, part);
            }
        };
        let tail = width % CHANNELS;
        if tail == 0 {
            channels(cx, CHANNELS);
        } else {
            let last = cx.icmp_imm(IntCmp::Equal, item, (width / CHANNELS) as i64);
            cx.if_else(last, |cx| channels(cx, tail), |cx| channels(cx, CHANNELS));
        }
    }

    /// A head: norm and rotation for q and k, then q to the output, k and v into the cache.
    fn head(&self, q: &QkvEpilogue, cx: &mut Lanes<'_>, item: Scalar, row: Scalar, sums: Scalar) {
        self.add_bias(q.head_dim, cx, item, sums);
        let HeadArgs { rope, out, .. } = self.head_args(q);
        let head_bytes = q.head_dim * 4;
        let is_query = cx.icmp_imm(IntCmp::SignedLessThan, item, q.heads as i64);
        let is_rotated = cx.icmp_imm(IntCmp::SignedLessThan, item, (q.heads + q.kv_heads) as i64);
        cx.if_(is_rotated, |cx| {
            if let Some(eps) = q.qk_norm {
                let gain = cx.select(is_query, self.rest[0], self.rest[1]);
                head_norm(q, eps, cx, gain, sums);
            }
            let rope = cx.offset(rope, row, head_bytes);
            rotate(cx, q.head_dim, rope, sums, sums);
        });
        cx.if_else(
            is_query,
            |cx| {
                let out = cx.offset(out, row, q.heads * head_bytes);
                let out = cx.offset(out, item, head_bytes);
                cx.for_const(head_bytes, 16, |cx, at| {
                    let (from, to) = (cx.iadd(sums, at), cx.iadd(out, at));
                    let y = cx.load4(from, 0);
                    cx.store4(y, to, 0);
                });
            },
            |cx| self.cache(q, cx, item, row, sums),
        );
    }

    /// Stores a head of k or v, rotated where it is to be, in the cache.
    fn cache(&self, q: &QkvEpilogue, cx: &mut Lanes<'_>, item: Scalar, row: Scalar, sums: Scalar) {
        let kv_item = cx.iadd_imm(item, -(q.heads as i64));
        let is_key = cx.icmp_imm(IntCmp::SignedLessThan, kv_item, q.kv_heads as i64);
        let value_head = cx.iadd_imm(kv_item, -(q.kv_heads as i64));
        let head = cx.select(is_key, kv_item, value_head);
        let Some(stores) = &self.stores else { unreachable!("loaded with the heads' arguments") };
        cache_of(q).store_head(cx, &self.head_args(q).cache, row, head, is_key, sums, stores);
    }

    fn head_args(&self, q: &QkvEpilogue) -> HeadArgs {
        let norm_args = 2 * usize::from(q.qk_norm.is_some());
        let &[rope, positions, seqs, tables, stride, keys, values, out] = &self.rest[norm_args..] else {
            unreachable!("as many as loaded");
        };
        HeadArgs { rope, out, cache: CacheArgs { positions, seqs, tables, stride, keys, values } }
    }
}

fn cache_of(q: &QkvEpilogue) -> Cache {
    Cache { kv_heads: q.kv_heads, head_dim: q.head_dim, kv: q.kv, page_len: q.page_len }
}

/// Arguments of heads behind those of their norms.
struct HeadArgs {
    rope: Scalar,
    out: Scalar,
    cache: CacheArgs,
}

/// `y * gain / sqrt(mean(y^2) + eps)` in place.
fn head_norm(q: &QkvEpilogue, eps: f32, cx: &mut Lanes<'_>, gain: Scalar, sums: Scalar) {
    let inverse = rms_factor(cx, sums, q.head_dim, eps);
    let inverse = cx.splat(inverse);
    cx.for_const(q.head_dim * 4, 16, |cx, at| {
        let (from, gain) = (cx.iadd(sums, at), cx.iadd(gain, at));
        let (y, gain) = (cx.load4(from, 0), cx.load4(gain, 0));
        let y = cx.vmul(y, inverse);
        let y = cx.vmul(y, gain);
        cx.store4(y, from, 0);
    });
}
