//! Rotary embedding, the KV cache and attention.

use super::Args;
use super::norm::{quantize_run, store_int8_part};
use crate::hadamard;
use crate::spec::{Activation, AttentionSpec};
use attar_artifact::manifest::KvType;
use half::f16;
use std::ops::Range;

/// Where keys and values stand in the cache.
pub(super) struct Shape {
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) kv: KvType,
    pub(super) page_len: usize,
}

impl Shape {
    /// Byte offset of the block of (position, KV head), and the token's place in the page.
    fn block(&self, table: &[u32], position: usize, head: usize) -> (usize, usize) {
        let page = table[position / self.page_len] as usize;
        let bytes = self.kv.block_bytes(self.head_dim, self.page_len);
        (KvType::block_index(page, self.kv_heads, head) * bytes, position % self.page_len)
    }

    /// Index within a block of element `d` of the key (`values` false) or value of the token at `place`.
    fn element(&self, values: bool, place: usize, d: usize) -> usize {
        self.kv.element(values, self.head_dim, self.page_len, place, d)
    }

    /// Byte offset of the scale of the token at `place` of a block.
    fn scale(&self, place: usize) -> usize {
        self.kv.scales_offset(self.head_dim, self.page_len) + 4 * place
    }

    /// One head's key or value.
    ///
    /// # Safety
    /// As [`super::run`]; `slot` holds the layer's keys or values.
    unsafe fn read(
        &self,
        args: Args<'_>,
        slot: usize,
        values: bool,
        table: &[u32],
        position: usize,
        head: usize,
    ) -> Vec<f64> {
        let (block, place) = self.block(table, position, head);
        let index = |d: usize| block * 8 / self.kv.bits() + self.element(values, place, d);
        let indices = (0..self.head_dim).map(index);
        // SAFETY: the caller's contract.
        unsafe {
            match self.kv {
                KvType::F32 => indices.map(|i| f64::from(args.values::<f32>(slot, i, 1)[0])).collect(),
                KvType::F16 => indices.map(|i| args.values::<f16>(slot, i, 1)[0].to_f64()).collect(),
                KvType::Int8 => {
                    let scale = args.values::<f32>(slot, (block + self.scale(place)) / 4, 1)[0];
                    let code = |i| f64::from(args.values::<i8>(slot, i, 1)[0]);
                    indices.map(|i| f64::from(scale) * code(i)).collect()
                }
                KvType::Int4 => {
                    let scale = args.values::<f32>(slot, (block + self.scale(place)) / 4, 1)[0];
                    let code = |i: usize| args.values::<u8>(slot, i / 2, 1)[0] >> (i % 2 * 4) & 15;
                    indices.map(|i| f64::from(scale) * (f64::from(code(i)) - 8.0)).collect()
                }
            }
        }
    }
}

/// Codes from -8 to 7 and scale of a head that has been rotated, as [`quantize_run`].
fn quantize_to_4_bits(x: &[f32]) -> (impl Iterator<Item = i8>, f32) {
    let highest = x.iter().fold(0.0f32, |m, v| if *v > m { *v } else { m });
    let lowest = x.iter().fold(0.0f32, |m, v| if *v < m { *v } else { m });
    let most = if highest >= -lowest { highest } else { lowest };
    let inverse = if most == 0.0 { 0.0 } else { KvType::INT4_REACH / most };
    let codes = x.iter().map(move |v| {
        // Not `clamp`: NaN becomes -8.
        let low = if v * inverse > -8.0 { v * inverse } else { -8.0 };
        (if low < 7.0 { low } else { 7.0 }).round_ties_even() as i8
    });
    let poison: f32 = x.iter().map(|v| v * 0.0).sum();
    (codes, most / KvType::INT4_REACH + poison)
}

/// Rotates one head in place; `rope` holds Dh/2 cosines, then Dh/2 sines.
pub(super) fn rotate(x: &mut [f64], rope: &[f32]) {
    let half = x.len() / 2;
    for i in 0..half {
        let (cos, sin) = (f64::from(rope[i]), f64::from(rope[half + i]));
        let (a, b) = (x[i], x[half + i]);
        x[i] = a * cos - b * sin;
        x[half + i] = b * cos + a * sin;
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn rope(heads: usize, head_dim: usize, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let table = args.values::<f32>(1, t * head_dim, head_dim);
        for h in 0..heads {
            let at = (t * heads + h) * head_dim;
            let mut x: Vec<f64> = args.values::<f32>(0, at, head_dim).iter().map(|v| f64::from(*v)).collect();
            rotate(&mut x, table);
            let out = args.values_mut::<f32>(2, at, head_dim);
            out.iter_mut().zip(x).for_each(|(o, v)| *o = v as f32);
        }
    }
}

/// Where the cache's arguments stand: positions, seqs, block tables, table stride, keys, values follow each other.
#[derive(Clone, Copy)]
pub(super) struct CacheArgs(pub(super) usize);

impl CacheArgs {
    /// Position and block table of token `t`.
    ///
    /// # Safety
    /// As [`super::run`].
    unsafe fn locate<'a>(self, args: Args<'_>, t: usize) -> (usize, &'a [u32]) {
        let stride = args.number(self.0 + 3);
        // SAFETY: the caller's contract.
        unsafe {
            let position = args.values::<i32>(self.0, t, 1)[0] as usize;
            let seq = args.values::<i32>(self.0 + 1, t, 1)[0] as usize;
            (position, args.values::<u32>(self.0 + 2, seq * stride, stride))
        }
    }

    /// Stores one head of keys (`values` false) or values of token `t`.
    ///
    /// # Safety
    /// As [`super::run`].
    pub(super) unsafe fn store(
        self,
        shape: &Shape,
        args: Args<'_>,
        t: usize,
        head: usize,
        values: bool,
        x: &[f64],
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let (position, table) = self.locate(args, t);
            let slot = self.0 + 4 + usize::from(values);
            let (block, place) = shape.block(table, position, head);
            let index = |d: usize| block * 8 / shape.kv.bits() + shape.element(values, place, d);
            let mut each = x.iter().enumerate();
            match shape.kv {
                KvType::F32 => {
                    each.for_each(|(d, v)| args.values_mut::<f32>(slot, index(d), 1)[0] = *v as f32);
                }
                KvType::F16 => {
                    let half = |v: f64| f16::from_f32(v as f32);
                    each.for_each(|(d, v)| args.values_mut::<f16>(slot, index(d), 1)[0] = half(*v));
                }
                KvType::Int8 => {
                    let x: Vec<f32> = x.iter().map(|v| *v as f32).collect();
                    let (codes, scale) = quantize_run(&x);
                    each.by_ref().zip(codes).for_each(|((d, _), code)| {
                        args.values_mut::<i8>(slot, index(d), 1)[0] = code;
                    });
                    args.values_mut::<f32>(slot, (block + shape.scale(place)) / 4, 1)[0] = scale;
                }
                KvType::Int4 => {
                    let mut x: Vec<f32> = x.iter().map(|v| *v as f32).collect();
                    hadamard::rotate(&mut x);
                    let (codes, scale) = quantize_to_4_bits(&x);
                    each.by_ref().zip(codes).for_each(|((d, _), code)| {
                        let byte = &mut args.values_mut::<u8>(slot, index(d) / 2, 1)[0];
                        let shift = index(d) % 2 * 4;
                        *byte = *byte & !(15 << shift) | ((code + 8) as u8) << shift;
                    });
                    args.values_mut::<f32>(slot, (block + shape.scale(place)) / 4, 1)[0] = scale;
                }
            }
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn kv_write(
    kv_heads: usize,
    head_dim: usize,
    kv: KvType,
    page_len: usize,
    args: Args<'_>,
    t: usize,
) {
    let shape = Shape { kv_heads, head_dim, kv, page_len };
    for (slot, values) in [(0, false), (1, true)] {
        for h in 0..kv_heads {
            // SAFETY: the caller's contract.
            unsafe {
                let x = args.values::<f32>(slot, (t * kv_heads + h) * head_dim, head_dim);
                let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
                CacheArgs(2).store(&shape, args, t, h, values, &x);
            }
        }
    }
}

/// What one head of a token gathers from some of the positions it sees.
struct Partial {
    most: f64,
    total: f64,
    sums: Vec<f64>,
}

impl Partial {
    /// Adds the weights of later positions.
    fn join(&mut self, later: &Partial) {
        let most = self.most.max(later.most);
        let (a, b) = ((self.most - finite(most)).exp2(), (later.most - finite(most)).exp2());
        self.most = most;
        self.total = self.total * a + later.total * b;
        self.sums.iter_mut().zip(&later.sums).for_each(|(s, l)| *s = *s * a + l * b);
    }

    fn result(&self) -> impl Iterator<Item = f32> {
        self.sums.iter().map(|s| (s / self.total) as f32)
    }
}

/// The maximum that differences are taken to: no score but minus infinity has weight relative to it.
fn finite(most: f64) -> f64 {
    if most == f64::NEG_INFINITY { 0.0 } else { most }
}

/// A layer's cache as arguments of an attention kernel.
struct Context<'a> {
    spec: &'a AttentionSpec,
    args: Args<'a>,
}

impl Context<'_> {
    fn shape(&self) -> Shape {
        let AttentionSpec { kv_heads, head_dim, kv, page_len, .. } = *self.spec;
        Shape { kv_heads, head_dim, kv, page_len }
    }

    /// Positions that token `t` sees.
    ///
    /// # Safety
    /// As [`super::run`].
    unsafe fn seen(&self, positions: usize, t: usize) -> Range<usize> {
        // SAFETY: the caller's contract.
        let position = unsafe { self.args.values::<i32>(positions, t, 1)[0] as usize };
        let first = self.spec.window.map_or(0, |w| (position + 1).saturating_sub(w));
        first..position + 1
    }

    /// The part of span `span` in what head `head` of token `t` sees; `None` where it sees nothing of it.
    ///
    /// # Safety
    /// As [`super::run`].
    unsafe fn partial(&self, t: usize, head: usize, span: usize) -> Option<Partial> {
        let (spec, shape) = (self.spec, self.shape());
        let (dh, hk) = (spec.head_dim, head / spec.group());
        // SAFETY: the caller's contract.
        let (seen, (_, table)) = unsafe { (self.seen(1, t), CacheArgs(1).locate(self.args, t)) };
        let from = seen.start.max(span * spec.span);
        let to = seen.end.min((span + 1) * spec.span);
        if from >= to {
            return None;
        }
        // SAFETY: the caller's contract.
        let q = unsafe { self.args.values::<f32>(0, (t * spec.heads + head) * dh, dh) };
        let q: Vec<f64> = match spec.kv {
            KvType::F32 | KvType::F16 => {
                q.iter().map(|q| f64::from(*q) * f64::from(spec.query_scale())).collect()
            }
            KvType::Int8 | KvType::Int4 => {
                let mut q: Vec<f32> = q.iter().map(|q| q * spec.query_scale()).collect();
                if spec.kv == KvType::Int4 {
                    hadamard::rotate(&mut q);
                }
                let (codes, scale) = quantize_run(&q);
                codes.map(|code| f64::from(scale) * f64::from(code)).collect()
            }
        };
        // SAFETY: the caller's contract.
        let read = |slot, values, s| unsafe { shape.read(self.args, slot, values, table, s, hk) };
        let scores: Vec<f64> =
            (from..to).map(|s| q.iter().zip(read(5, false, s)).map(|(q, k)| q * k).sum()).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - finite(most)).exp2()).collect();
        let mut sums = vec![0.0; dh];
        for (s, w) in (from..to).zip(&weights) {
            sums.iter_mut().zip(read(6, true, s)).for_each(|(y, v)| *y += w * v);
        }
        // Partials are handed on as f32, in whichever kernel.
        let round = |v: f64| f64::from(v as f32);
        let total = round(weights.iter().sum());
        Some(Partial { most: round(most), total, sums: sums.into_iter().map(round).collect() })
    }

    /// Stores the results of a KV head's query heads.
    ///
    /// # Safety
    /// As [`super::run`]; `slot` is the kernel's output.
    unsafe fn store(&self, slot: usize, out: Activation, t: usize, hk: usize, heads: &[Partial]) {
        let mut y: Vec<f32> = heads.iter().flat_map(Partial::result).collect();
        if self.spec.kv == KvType::Int4 {
            y.chunks_exact_mut(self.spec.head_dim).for_each(hadamard::rotate);
        }
        let (width, first) = (self.spec.heads * self.spec.head_dim, hk * y.len());
        // SAFETY: the caller's contract.
        unsafe {
            match out {
                Activation::F32 => {
                    self.args.values_mut::<f32>(slot, t * width + first, y.len()).copy_from_slice(&y);
                }
                Activation::Int8 => store_int8_part(&y, width, first, self.args, slot, t),
            }
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn tile(spec: &AttentionSpec, out: Activation, args: Args<'_>, item: usize) {
    let context = Context { spec, args };
    let tokens = args.number(8);
    let Some((first, hk)) = spec.tile(item, tokens) else { return };
    for t in first..(first + spec.tile_tokens()).min(tokens) {
        // SAFETY: the caller's contract.
        unsafe {
            let seen = context.seen(1, t);
            let heads = (hk * spec.group()..(hk + 1) * spec.group()).map(|head| {
                let mut spans = (seen.start / spec.span..seen.end.div_ceil(spec.span))
                    .filter_map(|span| context.partial(t, head, span));
                let first = spans.next().unwrap_or(Partial { most: 0.0, total: 0.0, sums: Vec::new() });
                spans.fold(first, |mut all, later| {
                    all.join(&later);
                    all
                })
            });
            let heads: Vec<Partial> = heads.collect();
            context.store(7, out, t, hk, &heads);
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn span(spec: &AttentionSpec, args: Args<'_>, item: usize) {
    let (spans, group, len) = (args.number(8), spec.group(), spec.partial_len());
    let (row, span) = (item / spans, item % spans);
    let (t, hk) = (row / spec.kv_heads, row % spec.kv_heads);
    for g in 0..group {
        // SAFETY: the caller's contract.
        unsafe {
            let partial = Context { spec, args }.partial(t, hk * group + g, span);
            let Some(partial) = partial else { continue };
            let to = args.values_mut::<f32>(7, (item * group + g) * len, len);
            to.iter_mut().zip(&partial.sums).for_each(|(o, s)| *o = *s as f32);
            to[spec.head_dim] = partial.most as f32;
            to[spec.head_dim + 1] = partial.total as f32;
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn merge(spec: &AttentionSpec, out: Activation, args: Args<'_>, item: usize) {
    let (spans, group, len) = (args.number(3), spec.group(), spec.partial_len());
    let (t, hk) = (item / spec.kv_heads, item % spec.kv_heads);
    let context = Context { spec, args };
    // SAFETY: the caller's contract.
    unsafe {
        let seen = context.seen(1, t);
        let heads = (0..group).map(|g| {
            let read = |span: usize| {
                let at = (item * spans + span) * group + g;
                let from = args.values::<f32>(0, at * len, len);
                let number = |i: usize| f64::from(from[i]);
                let dh = spec.head_dim;
                Partial { most: number(dh), total: number(dh + 1), sums: (0..dh).map(number).collect() }
            };
            let mut all = read(seen.start / spec.span);
            for span in seen.start / spec.span + 1..seen.end.div_ceil(spec.span) {
                all.join(&read(span));
            }
            all
        });
        let heads: Vec<Partial> = heads.collect();
        context.store(2, out, t, hk, &heads);
    }
}
