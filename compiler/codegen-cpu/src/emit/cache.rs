//! The paged KV cache as kernels see it: addressing, loads, stores; `rope` and `kv_write`.

use super::hadamard::hadamard;
use super::walk::quads;
use crate::lanes::{F32x4, FloatCmp, I32x4, IntCmp, Lanes, Scalar};
use crate::x86::{HeadKernel, Level};
use attar_artifact::manifest::KvType;

/// Shape of one layer's cache.
#[derive(Clone, Copy)]
pub(super) struct Cache {
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) kv: KvType,
    pub(super) page_len: usize,
}

/// The cache's arguments, which stand side by side in every kernel's list.
#[derive(Clone, Copy)]
pub(super) struct CacheArgs {
    pub(super) positions: Scalar,
    pub(super) seqs: Scalar,
    pub(super) tables: Scalar,
    pub(super) stride: Scalar,
    pub(super) keys: Scalar,
    pub(super) values: Scalar,
}

impl CacheArgs {
    /// Loads them from `first` on.
    pub(super) fn load(cx: &mut Lanes<'_>, first: usize) -> CacheArgs {
        CacheArgs {
            positions: cx.arg(first),
            seqs: cx.arg(first + 1),
            tables: cx.arg(first + 2),
            stride: cx.arg(first + 3),
            keys: cx.arg(first + 4),
            values: cx.arg(first + 5),
        }
    }

    /// Position of token `t`, and the address of its sequence's block table.
    pub(super) fn locate(&self, cx: &mut Lanes<'_>, t: Scalar) -> (Scalar, Scalar) {
        let at = cx.offset(self.positions, t, 4);
        let position = cx.load_i32(at, 0);
        let position = cx.widen(position);
        let at = cx.offset(self.seqs, t, 4);
        let seq = cx.load_i32(at, 0);
        let seq = cx.widen(seq);
        let row = cx.imul(seq, self.stride);
        (position, cx.offset(self.tables, row, 4))
    }
}

/// Inner functions that store a key and a value as floats, where vectors are wider than Cranelift's.
pub(super) struct Stores(Option<(Vec<u8>, Vec<u8>)>);

impl Cache {
    /// Why no kernel handles this shape, if so.
    pub(super) fn check(&self) -> Result<(), String> {
        if !self.head_dim.is_multiple_of(4) {
            return Err(format!("a cache of heads of width {}, which is no multiple of 4", self.head_dim));
        }
        if !self.page_len.is_multiple_of(16) {
            return Err(format!("pages of {} tokens, which is no multiple of 16", self.page_len));
        }
        if self.kv == KvType::Int4 && !self.head_dim.is_multiple_of(KvType::INT4_HEAD) {
            return Err(format!(
                "a 4-bit cache of heads of width {}, which is no multiple of 16",
                self.head_dim
            ));
        }
        Ok(())
    }

    /// Bytes of the keys, or the values, of one head and page.
    fn block_bytes(&self) -> usize {
        self.kv.block_bytes(self.head_dim, self.page_len)
    }

    /// Offset of the scales within a block.
    pub(super) fn scales_offset(&self) -> usize {
        self.kv.scales_offset(self.head_dim, self.page_len)
    }

    /// Byte offset of the block of head `head` of page `page_index` of a block table.
    pub(super) fn block(
        &self,
        cx: &mut Lanes<'_>,
        table: Scalar,
        page_index: Scalar,
        head: Scalar,
    ) -> Scalar {
        let at = cx.offset(table, page_index, 4);
        let page = cx.load_i32(at, 0);
        let page = cx.widen_unsigned(page);
        // As `KvType::block_index` has it.
        let run = cx.udiv_imm(page, KvType::RUN as u32);
        let place = cx.urem_imm(page, KvType::RUN as u32);
        let run = cx.imul_imm(run, self.kv_heads as i64);
        let run = cx.iadd(run, head);
        let run = cx.imul_imm(run, KvType::RUN as i64);
        let index = cx.iadd(run, place);
        cx.imul_imm(index, self.block_bytes() as i64)
    }

    /// Stores one head of f32 as the key (when `is_key` holds) or value of token `t` for KV head `head`.
    #[expect(clippy::too_many_arguments, reason = "a head and its place")]
    pub(super) fn store_head(
        &self,
        cx: &mut Lanes<'_>,
        args: &CacheArgs,
        t: Scalar,
        head: Scalar,
        is_key: Scalar,
        from: Scalar,
        stores: &Stores,
    ) {
        let (position, table) = args.locate(cx, t);
        let page_index = cx.udiv_imm(position, self.page_len as u32);
        let place = cx.urem_imm(position, self.page_len as u32);
        let block = self.block(cx, table, page_index, head);
        let base = cx.select(is_key, args.keys, args.values);
        let block = cx.iadd(base, block);
        match self.kv {
            KvType::Int8 => return self.store_bytes(cx, block, place, is_key, from),
            KvType::Int4 => return self.store_halves(cx, block, place, is_key, from),
            KvType::F32 | KvType::F16 => {}
        }
        let size = self.kv.bits() / 8;
        if let Stores(Some((key, value))) = stores {
            let (key_at, value_at) =
                (cx.offset(block, place, size), cx.offset(block, place, self.head_dim * size));
            cx.if_else(
                is_key,
                |cx| cx.call_inner(key.clone(), &[from, key_at]),
                |cx| cx.call_inner(value.clone(), &[from, value_at]),
            );
            return;
        }
        cx.if_else(
            is_key,
            |cx| {
                let to = cx.offset(block, place, size);
                let step = self.page_len * size;
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(from, d, 4), cx.offset(to, d, step));
                    let v = cx.load4(from, 0);
                    if self.kv == KvType::F32 {
                        for (i, lane) in cx.floats(v).into_iter().enumerate() {
                            cx.store_f32(lane, to, (i * step) as i32);
                        }
                    } else {
                        let half = cx.f32_to_f16(v);
                        for (i, lane) in cx.ints(half).into_iter().enumerate() {
                            cx.store_u16(lane, to, (i * step) as i32);
                        }
                    }
                });
            },
            |cx| {
                let to = cx.offset(block, place, self.head_dim * size);
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let (from, to) = (cx.offset(from, d, 4), cx.offset(to, d, size));
                    let v = cx.load4(from, 0);
                    if self.kv == KvType::F32 {
                        cx.store4(v, to, 0);
                    } else {
                        cx.store4_f16(v, to, 0);
                    }
                });
            },
        );
    }

    /// What [`Cache::store_head`] stores with.
    pub(super) fn stores(&self, cx: &Lanes<'_>) -> Result<Stores, String> {
        let failed = |e: iced_x86::IcedError| format!("bug: inner function: {e}");
        let Some(heads) = HeadKernel::new(Level::of(cx.target()), self.head_dim) else {
            return Ok(Stores(None));
        };
        let step = self.page_len * self.kv.bits() / 8;
        let key = heads.store_key(self.kv, step).map_err(failed)?;
        let value = heads.store_value(self.kv).map_err(failed)?;
        Ok(Stores(key.zip(value)))
    }

    /// Stores one head as bytes and their scale.
    fn store_bytes(&self, cx: &mut Lanes<'_>, block: Scalar, place: Scalar, is_key: Scalar, from: Scalar) {
        let (scale, inverse) = self.scale(cx, from);
        let at = cx.offset(block, place, 4);
        cx.store_f32(scale, at, self.scales_offset() as i32);
        let inverse = cx.splat(inverse);
        let codes_at = |cx: &mut Lanes<'_>, d| {
            let from = cx.offset(from, d, 4);
            let v = cx.load4(from, 0);
            codes(cx, v, inverse, -127.0, 127.0)
        };
        cx.if_else(
            is_key,
            |cx| {
                let to = cx.offset(block, place, 4);
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let codes = codes_at(cx, d);
                    let to = cx.offset(to, d, self.page_len);
                    cx.store4_i8(codes, to, 0);
                });
            },
            |cx| {
                let (four, place) = (cx.udiv_imm(place, 4), cx.urem_imm(place, 4));
                let to = cx.offset(block, four, 4 * self.head_dim);
                let to = cx.iadd(to, place);
                cx.for_const(self.head_dim, 4, |cx, d| {
                    let codes = codes_at(cx, d);
                    let to = cx.offset(to, d, 4);
                    for (i, code) in cx.ints(codes).into_iter().enumerate() {
                        cx.store_u8(code, to, 4 * i as i32);
                    }
                });
            },
        );
    }

    /// Stores one head, rotated, as halves of bytes and their scale.
    fn store_halves(&self, cx: &mut Lanes<'_>, block: Scalar, place: Scalar, is_key: Scalar, from: Scalar) {
        let rotated = cx.scratch(self.head_dim * 4);
        hadamard(cx, self.head_dim, from, rotated);
        let (scale, inverse) = self.signed_scale(cx, rotated);
        let at = cx.offset(block, place, 4);
        cx.store_f32(scale, at, self.scales_offset() as i32);
        let inverse = cx.splat(inverse);
        // Codes of four numbers, and in the upper halves of the four that stand `apart` behind them.
        let pairs = |cx: &mut Lanes<'_>, d: Scalar, apart: usize| {
            let from = cx.offset(rotated, d, 4);
            let [lower, upper] = [0, 4 * apart as i32].map(|at| {
                let v = cx.load4(from, at);
                codes(cx, v, inverse, -8.0, 7.0)
            });
            let upper = cx.vishl_imm(upper, 4);
            let both = cx.viadd(lower, upper);
            // 8 more in each half.
            let bias = cx.splat_const_i32(0x88);
            cx.viadd(both, bias)
        };
        cx.if_else(
            is_key,
            |cx| {
                let to = cx.offset(block, place, 4);
                cx.for_const(self.head_dim, 8, |cx, d| {
                    let bytes = pairs(cx, d, 4);
                    let bytes = cx.vishl_imm(bytes, 24);
                    let bytes = cx.vsshr_imm(bytes, 24);
                    let to = cx.offset(to, d, self.page_len / 2);
                    cx.store4_i8(bytes, to, 0);
                });
            },
            |cx| {
                let (four, place) = (cx.udiv_imm(place, 4), cx.urem_imm(place, 4));
                let to = cx.offset(block, four, 2 * self.head_dim);
                let to = cx.iadd(to, place);
                cx.for_const(self.head_dim / 2, 4, |cx, d| {
                    let bytes = pairs(cx, d, self.head_dim / 2);
                    let to = cx.offset(to, d, 4);
                    for (i, byte) in cx.ints(bytes).into_iter().enumerate() {
                        cx.store_u8(byte, to, 4 * i as i32);
                    }
                });
            },
        );
    }

    /// As [`Cache::scale`] for codes of 4 bits: of the number of the largest size, with its sign.
    fn signed_scale(&self, cx: &mut Lanes<'_>, from: Scalar) -> (Scalar, Scalar) {
        let zero = cx.splat_const(0.0);
        let [highest, lowest, poison] = [(); 3].map(|()| cx.var(zero));
        cx.for_const(self.head_dim, 4, |cx, d| {
            let at = cx.offset(from, d, 4);
            let v = cx.load4(at, 0);
            let old = cx.get(&highest);
            let new = cx.vmax(v, old);
            cx.set(&highest, new);
            let down = cx.vneg(v);
            let old = cx.get(&lowest);
            let new = cx.vmax(down, old);
            cx.set(&lowest, new);
            let nothing = cx.vmul(v, zero);
            let old = cx.get(&poison);
            let new = cx.vadd(old, nothing);
            cx.set(&poison, new);
        });
        let [highest, lowest, poison] = [highest, lowest, poison].map(|v| cx.get(&v));
        let (highest, lowest, poison) = (cx.vmax_across(highest), cx.vmax_across(lowest), cx.vsum(poison));
        let is_high = cx.fcmp(FloatCmp::GreaterThanOrEqual, highest, lowest);
        let lowest = cx.fneg(lowest);
        let most = cx.select(is_high, highest, lowest);
        let (none, reach) = (cx.f32(0.0), cx.f32(KvType::INT4_REACH));
        let inverse = cx.fdiv(reach, most);
        let nothing = cx.fcmp(FloatCmp::Equal, most, none);
        let inverse = cx.select(nothing, none, inverse);
        let scale = cx.fdiv(most, reach);
        (cx.fadd(scale, poison), inverse)
    }

    /// Scale of a head's numbers, and what they are multiplied by. A NaN or infinity makes the scale NaN.
    pub(super) fn scale(&self, cx: &mut Lanes<'_>, from: Scalar) -> (Scalar, Scalar) {
        let zero = cx.splat_const(0.0);
        let (largest, poison) = (cx.var(zero), cx.var(zero));
        cx.for_const(self.head_dim, 4, |cx, d| {
            let at = cx.offset(from, d, 4);
            let v = cx.load4(at, 0);
            let size = cx.vabs(v);
            let old = cx.get(&largest);
            let new = cx.vmax(size, old);
            cx.set(&largest, new);
            let nothing = cx.vmul(v, zero);
            let old = cx.get(&poison);
            let new = cx.vadd(old, nothing);
            cx.set(&poison, new);
        });
        let (largest, poison) = (cx.get(&largest), cx.get(&poison));
        let (amax, poison) = (cx.vmax_across(largest), cx.vsum(poison));
        let (none, limit) = (cx.f32(0.0), cx.f32(127.0));
        let inverse = cx.fdiv(limit, amax);
        let some = cx.fcmp(FloatCmp::GreaterThan, amax, none);
        let inverse = cx.select(some, inverse, none);
        let scale = cx.fdiv(amax, limit);
        (cx.fadd(scale, poison), inverse)
    }
}

/// Codes from `low` to `high` of numbers given what they are multiplied by.
pub(super) fn codes(cx: &mut Lanes<'_>, v: F32x4, inverse: F32x4, low: f32, high: f32) -> I32x4 {
    let v = cx.vmul(v, inverse);
    let (low, high) = (cx.splat_const(low), cx.splat_const(high));
    let v = cx.vmax(v, low);
    let v = cx.vmin(v, high);
    cx.vround(v).1
}

pub(super) fn kv_write(cache: Cache, cx: &mut Lanes<'_>) -> Result<(), String> {
    cache.check()?;
    let stores = cache.stores(cx)?;
    let (k, v) = (cx.arg(0), cx.arg(1));
    let args = CacheArgs::load(cx, 2);
    cx.for_items(|cx, t| {
        cx.for_const(2 * cache.kv_heads, 1, |cx, i| {
            let is_key = cx.icmp_imm(IntCmp::SignedLessThan, i, cache.kv_heads as i64);
            let value_head = cx.iadd_imm(i, -(cache.kv_heads as i64));
            let head = cx.select(is_key, i, value_head);
            let from = cx.select(is_key, k, v);
            let row = cx.imul_imm(t, cache.kv_heads as i64);
            let row = cx.iadd(row, head);
            let from = cx.offset(from, row, cache.head_dim * 4);
            cache.store_head(cx, &args, t, head, is_key, from, &stores);
        });
    });
    Ok(())
}

pub(super) fn rope(heads: usize, head_dim: usize, cx: &mut Lanes<'_>) {
    let (x, rope, out) = (cx.arg(0), cx.arg(1), cx.arg(2));
    cx.for_items(|cx, t| {
        let table = cx.offset(rope, t, head_dim * 4);
        cx.for_const(heads, 1, |cx, h| {
            let row = cx.imul_imm(t, heads as i64);
            let row = cx.iadd(row, h);
            let (from, to) = (cx.offset(x, row, head_dim * 4), cx.offset(out, row, head_dim * 4));
            rotate(cx, head_dim, table, from, to);
        });
    });
}

/// Rotates one head from `from` to `to` (which may be the same).
pub(super) fn rotate(cx: &mut Lanes<'_>, head_dim: usize, table: Scalar, from: Scalar, to: Scalar) {
    let half = head_dim / 2;
    let bytes = half as i64 * 4;
    let (sines, from2, to2) = (cx.iadd_imm(table, bytes), cx.iadd_imm(from, bytes), cx.iadd_imm(to, bytes));
    quads(cx, half, |cx, quad| {
        let (cos, sin) = (quad.load(cx, table, 0.0), quad.load(cx, sines, 0.0));
        let (a, b) = (quad.load(cx, from, 0.0), quad.load(cx, from2, 0.0));
        let (ac, bs) = (cx.vmul(a, cos), cx.vmul(b, sin));
        let first = cx.vsub(ac, bs);
        let (bc, as_) = (cx.vmul(b, cos), cx.vmul(a, sin));
        let second = cx.vadd(bc, as_);
        quad.store(cx, first, to);
        quad.store(cx, second, to2);
    });
}
