//! The paged KV cache as kernels see it: addressing, loads, stores; `rope` and `kv_write`.

use super::walk::quads;
use crate::lanes::{F32x4, Lanes, Scalar};
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

impl Cache {
    /// Why no kernel handles this shape, if so.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.head_dim.is_multiple_of(4) {
            Ok(())
        } else {
            Err(format!("a cache of heads of width {}, which is no multiple of 4", self.head_dim))
        }
    }

    /// Bytes of one head at one position.
    pub(super) fn head_bytes(&self) -> usize {
        self.head_dim * self.kv.size()
    }

    /// Byte offset of head `head` of page `page_index` of a block table, position 0 within the page.
    pub(super) fn page(&self, cx: &mut Lanes<'_>, table: Scalar, page_index: Scalar, head: Scalar) -> Scalar {
        let at = cx.offset(table, page_index, 4);
        let page = cx.load_i32(at, 0);
        let page = cx.widen_unsigned(page);
        let page = cx.imul_imm(page, self.kv_heads as i64);
        let row = cx.iadd(page, head);
        cx.imul_imm(row, (self.page_len * self.head_bytes()) as i64)
    }

    /// Byte offset of head `head` at `position`.
    pub(super) fn at(&self, cx: &mut Lanes<'_>, table: Scalar, position: Scalar, head: Scalar) -> Scalar {
        let page_index = cx.udiv_imm(position, self.page_len as u32);
        let within = cx.urem_imm(position, self.page_len as u32);
        let page = self.page(cx, table, page_index, head);
        cx.offset(page, within, self.head_bytes())
    }

    /// Loads 4 elements, `index` elements after `at`.
    pub(super) fn load4(&self, cx: &mut Lanes<'_>, at: Scalar, index: usize) -> F32x4 {
        let offset = (index * self.kv.size()) as i32;
        match self.kv {
            KvType::F32 => cx.load4(at, offset),
            KvType::F16 => cx.load4_f16(at, offset),
        }
    }

    /// Copies one head of f32 to the cache.
    pub(super) fn store_head(&self, cx: &mut Lanes<'_>, from: Scalar, to: Scalar) {
        cx.for_const(self.head_dim, 4, |cx, i| {
            let (from, to) = (cx.offset(from, i, 4), cx.offset(to, i, self.kv.size()));
            let v = cx.load4(from, 0);
            match self.kv {
                KvType::F32 => cx.store4(v, to, 0),
                KvType::F16 => cx.store4_f16(v, to, 0),
            }
        });
    }
}

pub(super) fn kv_write(cache: Cache, cx: &mut Lanes<'_>) -> Result<(), String> {
    cache.check()?;
    let (k, v) = (cx.arg(0), cx.arg(1));
    let args = CacheArgs::load(cx, 2);
    cx.for_items(|cx, t| {
        let (position, table) = args.locate(cx, t);
        cx.for_const(cache.kv_heads, 1, |cx, head| {
            let to = cache.at(cx, table, position, head);
            let row = cx.imul_imm(t, cache.kv_heads as i64);
            let row = cx.iadd(row, head);
            for (from, base) in [(k, args.keys), (v, args.values)] {
                let from = cx.offset(from, row, cache.head_dim * 4);
                let to = cx.iadd(base, to);
                cache.store_head(cx, from, to);
            }
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
