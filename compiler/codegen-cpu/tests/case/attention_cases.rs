//! Launches of the cache's and attention's kernels: groups, widths, windows and lengths around the borders of pages and
//! spans, in batches of several sequences whose pages are scattered, with NaN wherever nothing has been stored.

use super::row_cases::{floats, input, ints, output};
use super::{Arg, Case, Check, Random, bytes_of};
use attar_artifact::manifest::KvType;
use attar_kernel::{ActInt8Layout, Activation, AttentionSpec, KernelSpec};
use half::f16;

pub(crate) const PAGE_LEN: usize = 32;

/// Tokens of a batch: sequence and position of each.
pub(crate) type Batch = Vec<(usize, usize)>;

/// A batch of runs: sequence, first position, tokens.
pub(crate) fn runs(runs: &[(usize, usize, usize)]) -> Batch {
    runs.iter().flat_map(|(seq, from, len)| (*from..from + len).map(|p| (*seq, p))).collect()
}

/// Everything attention reads, for any batch over the same sequences.
#[derive(Clone)]
pub(crate) struct Store {
    spec: AttentionSpec,
    pub(crate) keys: Vec<u8>,
    pub(crate) values: Vec<u8>,
    tables: Vec<u32>,
    stride: usize,
}

impl Store {
    /// `lengths` tokens are stored per sequence; all else is NaN.
    pub(crate) fn new(spec: AttentionSpec, lengths: &[usize], r: &mut Random) -> Store {
        let stride = lengths.iter().max().map_or(0, |l| l.div_ceil(PAGE_LEN)) + 1;
        let pages = lengths.len() * stride;
        // Sequences take turns, and every second one has its pages in descending order.
        let page = |seq: usize, p: usize| {
            let p = if seq.is_multiple_of(2) { p } else { stride - 1 - p };
            (p * lengths.len() + seq) as u32
        };
        let tables = (0..pages).map(|i| page(i / stride, i % stride)).collect();
        let block = spec.kv.block_bytes(spec.head_dim, PAGE_LEN);
        // All bits set is NaN as f32 and f16, and a code under a NaN scale as int8 and int4.
        let blank = vec![0xff; pages.next_multiple_of(KvType::RUN) * spec.kv_heads * block];
        let mut store = Store { spec, keys: blank.clone(), values: blank, tables, stride };
        for (seq, len) in lengths.iter().enumerate() {
            for position in 0..*len {
                for head in 0..spec.kv_heads {
                    for values in [false, true] {
                        let x = floats(r, spec.head_dim);
                        store.put(seq, position, head, values, &x);
                    }
                }
            }
        }
        store
    }

    /// Stores a key or value as `kv_write` would, but for the rotation of a 4-bit cache.
    pub(crate) fn put(&mut self, seq: usize, position: usize, head: usize, values: bool, x: &[f32]) {
        let AttentionSpec { head_dim, kv_heads, kv, .. } = self.spec;
        let page = self.tables[seq * self.stride + position / PAGE_LEN] as usize;
        let (place, block) = (position % PAGE_LEN, kv.block_bytes(head_dim, PAGE_LEN));
        let memory = if values { &mut self.values } else { &mut self.keys };
        let block = &mut memory[KvType::block_index(page, kv_heads, head) * block..][..block];
        let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let most = if kv == KvType::Int4 {
            // The largest number's sign is the scale's.
            let highest = x.iter().fold(0f32, |m, v| m.max(*v));
            KvType::INT4_REACH * if highest >= amax { 1.0 } else { -1.0 }
        } else {
            127.0
        };
        let scale = if x.iter().all(|v| v.is_finite()) { amax / most } else { f32::NAN };
        for (d, v) in x.iter().enumerate() {
            let bit = kv.element(values, head_dim, PAGE_LEN, place, d) * kv.bits();
            let at = bit / 8;
            match kv {
                KvType::F32 => block[at..at + 4].copy_from_slice(&v.to_le_bytes()),
                KvType::F16 => block[at..at + 2].copy_from_slice(&f16::from_f32(*v).to_le_bytes()),
                KvType::Int8 => block[at] = (v / scale).round_ties_even() as i8 as u8,
                KvType::Int4 => {
                    let code = ((v / scale).round_ties_even().clamp(-8.0, 7.0) as i8 + 8) as u8;
                    block[at] = block[at] & !(15 << (bit % 8)) | code << (bit % 8);
                }
            }
        }
        if kv.has_scales() {
            let at = kv.scales_offset(head_dim, PAGE_LEN) + 4 * place;
            block[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }

    /// Positions, sequences, tables, stride, keys and values as arguments.
    fn args(&self, batch: &Batch) -> Vec<Arg> {
        vec![
            ints(&batch.iter().map(|(_, p)| *p as i32).collect::<Vec<_>>()),
            ints(&batch.iter().map(|(s, _)| *s as i32).collect::<Vec<_>>()),
            Arg::Input(bytes_of(&self.tables)),
            Arg::Number(self.stride as u64),
            Arg::Input(self.keys.clone()),
            Arg::Input(self.values.clone()),
        ]
    }

    fn result(&self, out: Activation, tokens: usize) -> Arg {
        let width = self.spec.heads * self.spec.head_dim;
        match out {
            Activation::F32 => output(tokens * width, self.tolerance() / 20.0),
            Activation::Int8 => {
                let bytes = tokens * ActInt8Layout::new(width).stride;
                Arg::Output(vec![0; bytes], Check::Int8 { dim: width, slack: 1 })
            }
        }
    }

    /// Of the sums of a span. With a cache of codes each weight may be off by 1 / 65534 of the largest: errors of up to 256
    /// positions, at random, add up to some 16 times that.
    fn tolerance(&self) -> f32 {
        match self.spec.kv {
            KvType::F32 | KvType::F16 => 2e-4,
            KvType::Int8 | KvType::Int4 => 2e-3,
        }
    }

    /// The launch of a prefill program.
    pub(crate) fn tiles(&self, batch: &Batch, q: &[f32], out: Activation) -> Case {
        let attention = self.spec;
        let mut args = vec![input(q)];
        args.extend(self.args(batch));
        args.extend([self.result(out, batch.len()), Arg::Number(batch.len() as u64)]);
        let grid = attention.kv_heads * (batch.len() + attention.tile_tokens() - 1);
        Case { spec: KernelSpec::Attention { attention, out }, args, grid: grid as u64 }
    }

    /// The first launch of a program for few tokens. Partials start as `blank`.
    pub(crate) fn spans(&self, batch: &Batch, q: &[f32], blank: f32) -> Case {
        let attention = self.spec;
        let spans = self.span_count(batch);
        let items = batch.len() * attention.kv_heads * spans;
        let partials = vec![blank; items * attention.group() * attention.partial_len()];
        let mut args = vec![input(q)];
        args.extend(self.args(batch));
        let check = Check::F32 { abs: self.tolerance(), rel: 1e-5 };
        args.extend([Arg::Output(bytes_of(&partials), check), Arg::Number(spans as u64)]);
        Case { spec: KernelSpec::AttentionSpan(attention), args, grid: items as u64 }
    }

    /// The second.
    pub(crate) fn merge(&self, batch: &Batch, partials: Vec<u8>, out: Activation) -> Case {
        let attention = self.spec;
        let args = vec![
            Arg::Input(partials),
            ints(&batch.iter().map(|(_, p)| *p as i32).collect::<Vec<_>>()),
            self.result(out, batch.len()),
            Arg::Number(self.span_count(batch) as u64),
        ];
        let grid = (batch.len() * attention.kv_heads) as u64;
        Case { spec: KernelSpec::AttentionMerge { attention, out }, args, grid }
    }

    fn span_count(&self, batch: &Batch) -> usize {
        batch.iter().map(|(_, p)| (p + 1).div_ceil(self.spec.span)).max().unwrap_or(1)
    }
}

/// Queries of a batch. A token's depend on its sequence and position only, so that batches can be compared.
pub(crate) fn queries(spec: &AttentionSpec, batch: &Batch) -> Vec<f32> {
    let of = |(seq, position): &(usize, usize)| {
        floats(&mut Random((seq * 100_003 + position) as u64), spec.heads * spec.head_dim)
    };
    batch.iter().flat_map(of).collect()
}

pub(crate) fn spec(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
    kv: KvType,
    span: usize,
) -> AttentionSpec {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionSpec { heads, kv_heads, head_dim, scale, window, kv, page_len: PAGE_LEN, span }
}

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let r = &mut Random(11);
    // The spans are short, so that there are several of them.
    let shapes = [
        ((9, 3, 64), None, 64),
        ((4, 4, 16), Some(8), 32),
        ((10, 2, 12), None, 96),
        ((2, 1, 16), Some(40), 64),
        ((8, 1, 32), Some(70), 64),
        ((6, 1, 80), None, 64),
        ((7, 1, 128), None, 256),
        ((4, 1, 96), Some(33), 32),
    ];
    for (i, (shape, window, span)) in shapes.into_iter().enumerate() {
        let whole = usize::is_multiple_of(shape.2, KvType::INT4_HEAD);
        for kv in [KvType::F32, KvType::F16, KvType::Int8, KvType::Int4] {
            if kv == KvType::Int4 && !whole {
                continue;
            }
            let spec = spec(shape, window, kv, span);
            let groups = (spec.group() * spec.head_dim).is_multiple_of(ActInt8Layout::GROUP);
            let out = if groups && i % 2 == 0 { Activation::Int8 } else { Activation::F32 };
            // Two sequences from their beginning; one that goes on; single tokens around the borders.
            let batch =
                runs(&[(0, 0, 35), (1, 90, 9), (2, 31, 1), (2, 63, 1), (1, 64, 1), (0, 35, 1), (1, 127, 3)]);
            let store = Store::new(spec, &[36, 130, 64], r);
            let q = queries(&spec, &batch);
            cases.push(store.tiles(&batch, &q, out));
            let few = runs(&[(0, 0, 2), (0, 31, 2), (1, 95, 3), (2, 63, 1), (1, 129, 1)]);
            let q = queries(&spec, &few);
            let spans = store.spans(&few, &q, 0.0);
            let partials = spans.reference()[0].clone();
            cases.push(spans);
            cases.push(store.merge(&few, partials, out));
            cases.push(write(&store, &few, r));
        }
    }
    cases
}

fn write(store: &Store, batch: &Batch, r: &mut Random) -> Case {
    let len = batch.len() * store.spec.kv_heads * store.spec.head_dim;
    let (k, v) = (floats(r, len), floats(r, len));
    write_of(store, batch, &k, &v)
}

/// Stores keys and values `[T, Hk, Dh]`.
pub(crate) fn write_of(store: &Store, batch: &Batch, k: &[f32], v: &[f32]) -> Case {
    let AttentionSpec { kv_heads, head_dim, kv, page_len, .. } = store.spec;
    let mut args = vec![input(k), input(v)];
    let mut cache = store.args(batch);
    cache.truncate(4);
    args.extend(cache);
    let check = match kv {
        KvType::F32 => Check::Bytes,
        // Stores flush subnormals.
        KvType::F16 => Check::F16 { abs: 6.2e-5, rel: 0.0 },
        KvType::Int8 | KvType::Int4 => Check::Cache { kv, head_dim, page_len, slack: 0 },
    };
    args.extend([Arg::Output(store.keys.clone(), check), Arg::Output(store.values.clone(), check)]);
    Case { spec: KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len }, args, grid: batch.len() as u64 }
}
