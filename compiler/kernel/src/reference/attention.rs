//! Rotary embedding, the KV cache and attention.

use super::Args;
use attar_artifact::manifest::KvType;
use half::f16;

/// The numbers that place a key or value in the cache.
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) kv: KvType,
    pub(super) page_len: usize,
}

impl Shape {
    /// Index of the first element of (page table row, position, KV head).
    fn index(&self, table: &[u32], position: usize, head: usize) -> usize {
        let page = table[position / self.page_len] as usize;
        ((page * self.kv_heads + head) * self.page_len + position % self.page_len) * self.head_dim
    }
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
            let at = shape.index(table, position, head);
            let slot = self.0 + 4 + usize::from(values);
            match shape.kv {
                KvType::F32 => {
                    let out = args.values_mut::<f32>(slot, at, x.len());
                    out.iter_mut().zip(x).for_each(|(o, v)| *o = *v as f32);
                }
                KvType::F16 => {
                    let out = args.values_mut::<f16>(slot, at, x.len());
                    out.iter_mut().zip(x).for_each(|(o, v)| *o = f16::from_f32(*v as f32));
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
    let shape = Shape { heads: kv_heads, kv_heads, head_dim, kv, page_len };
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

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn attention(
    shape: &Shape,
    scale: f64,
    window: Option<usize>,
    args: Args<'_>,
    item: usize,
) {
    let (t, hk) = (item / shape.kv_heads, item % shape.kv_heads);
    let group = shape.heads / shape.kv_heads;
    let dh = shape.head_dim;
    let read = |slot: usize, at: usize| -> Vec<f64> {
        // SAFETY: the caller's contract.
        unsafe {
            match shape.kv {
                KvType::F32 => args.values::<f32>(slot, at, dh).iter().map(|v| f64::from(*v)).collect(),
                KvType::F16 => args.values::<f16>(slot, at, dh).iter().map(|v| v.to_f64()).collect(),
            }
        }
    };
    // SAFETY: the caller's contract.
    let (position, table) = unsafe { CacheArgs(1).locate(args, t) };
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
    for h in hk * group..(hk + 1) * group {
        let at = (t * shape.heads + h) * dh;
        // SAFETY: the caller's contract.
        let q = unsafe { args.values::<f32>(0, at, dh) };
        let scores: Vec<f64> = (first..=position)
            .map(|s| {
                let k = read(5, shape.index(table, s, hk));
                scale * q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut y = vec![0.0; dh];
        for (s, w) in (first..=position).zip(&weights) {
            let v = read(6, shape.index(table, s, hk));
            y.iter_mut().zip(v).for_each(|(y, v)| *y += w * v);
        }
        // SAFETY: the caller's contract.
        let out = unsafe { args.values_mut::<f32>(7, at, dh) };
        out.iter_mut().zip(y).for_each(|(o, v)| *o = (v / total) as f32);
    }
}
