//! Speed of attention on this machine: prefill in GFLOP/s, against the materialised form; decode in bytes of keys and
//! values per second, against a loop that only reads them.
//!
//! usage: attention_speed [TARGET] [f32|f16|int8]

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob};
use attar_kernel::{Activation, AttentionSpec, Epilogue, KernelSpec, LinearSpec, RowTile};

const PAGE_LEN: usize = 32;

struct Bench {
    spec: AttentionSpec,
    image: ExecImage,
    keys: Vec<u8>,
    values: Vec<u8>,
    table: Vec<u32>,
}

fn numbers(n: usize, mut state: u32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

impl Bench {
    fn new(
        target: Target,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        kv: KvType,
        context: usize,
        layers: usize,
    ) -> Bench {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale,
            window: None,
            kv,
            page_len: PAGE_LEN,
            span: 256,
        };
        let out = Activation::F32;
        let specs = [
            KernelSpec::Attention { attention: spec, out },
            KernelSpec::AttentionSpan(spec),
            KernelSpec::AttentionMerge { attention: spec, out },
        ];
        let image = ExecImage::load(&compile_blob(target, &specs).unwrap()).unwrap();
        let pages = context.div_ceil(PAGE_LEN).next_multiple_of(KvType::RUN);
        let block = kv.block_bytes(head_dim, PAGE_LEN);
        let bytes = pages * kv_heads * block * layers;
        let unit = numbers(1 << 14, 5);
        let fill = |seed: usize| -> Vec<u8> {
            let mut out = huge(bytes);
            let mut i = seed;
            while out.len() < bytes {
                i += 1;
                let v = unit[i % unit.len()];
                match kv {
                    KvType::F32 => out.extend(v.to_le_bytes()),
                    KvType::F16 => out.extend(half::f16::from_f32(v).to_le_bytes()),
                    // Finite as codes and as scales.
                    KvType::Int8 => out.push(if out.len() % 4 == 3 { 0x3c } else { (v * 127.0) as i8 as u8 }),
                }
            }
            out
        };
        Bench { spec, image, keys: fill(1), values: fill(77), table: (0..pages as u32).collect() }
    }

    fn layer_bytes(&self) -> usize {
        self.table.len() * self.spec.kv_heads * self.spec.kv.block_bytes(self.spec.head_dim, PAGE_LEN)
    }

    /// Seconds of a prefill of the last `tokens` of `context`.
    fn prefill(&self, context: usize, tokens: usize) -> f64 {
        let s = &self.spec;
        let q = numbers(tokens * s.heads * s.head_dim, 3);
        let mut out = vec![0f32; q.len()];
        let positions: Vec<i32> = (context as i32 - tokens as i32..context as i32).collect();
        let seqs = vec![0i32; tokens];
        let args = [
            q.as_ptr() as u64,
            positions.as_ptr() as u64,
            seqs.as_ptr() as u64,
            self.table.as_ptr() as u64,
            self.table.len() as u64,
            self.keys.as_ptr() as u64,
            self.values.as_ptr() as u64,
            out.as_mut_ptr() as u64,
            tokens as u64,
        ];
        let grid = (s.kv_heads * (tokens + s.tile_tokens() - 1)) as u64;
        let name = KernelSpec::Attention { attention: *s, out: Activation::F32 }.name();
        best(3, || {
            // SAFETY: the arguments are what the spec asks for.
            unsafe { assert!(self.image.call(&name, &args, 0, grid)) };
        })
    }

    /// Seconds of one token at the end of `context`, over all layers, on `threads` threads.
    fn decode(&self, context: usize, layers: usize, threads: usize) -> f64 {
        let s = &self.spec;
        let q = numbers(s.heads * s.head_dim, 3);
        let spans = context.div_ceil(s.span);
        let mut partials = vec![0f32; s.heads * spans * s.partial_len()];
        let mut out = vec![0f32; q.len()];
        let positions = [context as i32 - 1];
        let seqs = [0i32];
        let (span, merge) = (
            KernelSpec::AttentionSpan(*s).name(),
            KernelSpec::AttentionMerge { attention: *s, out: Activation::F32 }.name(),
        );
        let (partials_at, out_at) = (partials.as_mut_ptr() as u64, out.as_mut_ptr() as u64);
        let (keys, values, layer_bytes) =
            (self.keys.as_ptr() as u64, self.values.as_ptr() as u64, self.layer_bytes() as u64);
        let items = (s.kv_heads * spans) as u64;
        let stored = (self.keys.len() / self.layer_bytes()) as u64;
        best(7, || {
            std::thread::scope(|scope| {
                for t in 0..threads as u64 {
                    let (q, positions, seqs, span, merge) = (&q, &positions, &seqs, &span, &merge);
                    scope.spawn(move || {
                        for l in 0..layers as u64 {
                            let args = [
                                q.as_ptr() as u64,
                                positions.as_ptr() as u64,
                                seqs.as_ptr() as u64,
                                self.table.as_ptr() as u64,
                                self.table.len() as u64,
                                keys + l % stored * layer_bytes,
                                values + l % stored * layer_bytes,
                                partials_at,
                                spans as u64,
                            ];
                            let (from, to) = (items * t / threads as u64, items * (t + 1) / threads as u64);
                            // SAFETY: the arguments are what the spec asks for.
                            unsafe { assert!(self.image.call(span, &args, from, to)) };
                            if t == 0 {
                                let args = [partials_at, positions.as_ptr() as u64, out_at, spans as u64];
                                // SAFETY: as above; what other threads write meanwhile is not looked at here.
                                unsafe { assert!(self.image.call(merge, &args, 0, s.kv_heads as u64)) };
                            }
                        }
                    });
                }
            });
        })
    }

    /// Seconds of reading all keys and values once.
    fn read(&self, threads: usize) -> f64 {
        best(7, || {
            std::thread::scope(|scope| {
                for t in 0..threads {
                    scope.spawn(move || {
                        for bytes in [&self.keys, &self.values] {
                            let (from, to) = (bytes.len() * t / threads, bytes.len() * (t + 1) / threads);
                            let mut sums = [0u64; 16];
                            for line in bytes[from..to].chunks_exact(128) {
                                for (s, w) in sums.iter_mut().zip(line.chunks_exact(8)) {
                                    *s ^= u64::from_le_bytes(w.try_into().unwrap());
                                }
                            }
                            std::hint::black_box(sums);
                        }
                    });
                }
            });
        })
    }
}

/// Room on huge pages, where the system has them, as the engine's cache is.
fn huge(bytes: usize) -> Vec<u8> {
    unsafe extern "C" {
        fn madvise(address: *mut u8, len: usize, advice: i32) -> i32;
    }
    const HUGE_PAGES: i32 = 14;
    const HUGE: usize = 2 << 20;
    let mut room: Vec<u8> = Vec::with_capacity(bytes + 2 * HUGE);
    let from = room.as_mut_ptr().align_offset(HUGE);
    // SAFETY: the range lies within the allocation, and advice changes nothing but speed.
    unsafe { madvise(room.as_mut_ptr().add(from), bytes / HUGE * HUGE, HUGE_PAGES) };
    room
}

/// Least seconds of processor time of some turns: the clock on the wall would count whatever else the machine does.
fn best(turns: usize, mut work: impl FnMut()) -> f64 {
    work();
    (0..turns)
        .map(|_| {
            let start = processor_time();
            work();
            processor_time() - start
        })
        .fold(f64::INFINITY, f64::min)
}

/// Seconds this process has run, on all its threads together.
fn processor_time() -> f64 {
    #[repr(C)]
    struct Time {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: i32, time: *mut Time) -> i32;
    }
    const PROCESS: i32 = 2;
    let mut time = Time { seconds: 0, nanoseconds: 0 };
    // SAFETY: the function fills the structure.
    unsafe { clock_gettime(PROCESS, &raw mut time) };
    time.seconds as f64 + time.nanoseconds as f64 * 1e-9
}

/// Seconds of the three steps of the materialised form of `tokens` tokens over `context` positions: a matrix product for the scores of each
/// KV head's stacked query heads, a softmax of its rows, a matrix product with the values. Making keys and values the
/// products' weights is not counted.
fn materialised(
    target: Target,
    (heads, kv_heads, dh): (usize, usize, usize),
    context: usize,
    tokens: usize,
) -> [f64; 3] {
    let rows = tokens * heads / kv_heads;
    let product = |n, k| {
        let (format, epilogue) = (&attar_format::formats::F32, Epilogue::Store);
        KernelSpec::Linear(LinearSpec { format, n, k, rows: RowTile::Many, bias: false, epilogue })
    };
    let specs = [product(context, dh), KernelSpec::Softmax { dim: context }, product(dh, context)];
    let image = ExecImage::load(&compile_blob(target, &specs).unwrap()).unwrap();
    let (q, keys, values) = (numbers(rows * dh, 3), numbers(context * dh, 4), numbers(context * dh, 5));
    let (mut scores, mut weights) = (vec![0f32; rows * context], vec![0f32; rows * context]);
    let mut out = vec![0f32; rows * dh];
    let (scores, weights, out) =
        (scores.as_mut_ptr() as u64, weights.as_mut_ptr() as u64, out.as_mut_ptr() as u64);
    // Input, weight, output, rows, prefetch distance.
    let first = [q.as_ptr() as u64, keys.as_ptr() as u64, scores, rows as u64, 0];
    let second = [scores, weights];
    let third = [weights, values.as_ptr() as u64, out, rows as u64, 0];
    let items = |spec: &KernelSpec| if let KernelSpec::Linear(l) = spec { l.items() } else { rows };
    let calls = [&first[..], &second[..], &third[..]];
    std::array::from_fn(|i| {
        let (args, grid) = (calls[i], items(&specs[i]));
        let name = specs[i].name();
        let seconds = best(3, || {
            // SAFETY: the arguments are what the specs ask for.
            unsafe { assert!(image.call(&name, args, 0, grid as u64)) };
        });
        seconds * kv_heads as f64
    })
}

fn main() {
    let mut args = std::env::args().skip(1);
    let target = args.next().map_or_else(|| Target::native().unwrap(), |t| Target::by_name(&t).unwrap());
    let kv = match args.next().as_deref() {
        Some("f32") => KvType::F32,
        Some("int8") => KvType::Int8,
        _ => KvType::F16,
    };
    println!("{} {kv:?}", target.name());
    for (heads, kv_heads, dh) in [(9, 3, 64), (32, 8, 64), (16, 8, 128)] {
        let b = Bench::new(target, heads, kv_heads, dh, kv, 8192, 1);
        for (context, tokens) in [(512, 512), (2048, 512), (8192, 512)] {
            let seconds = b.prefill(context, tokens);
            let pairs: f64 = (context - tokens + 1..=context).map(|p| p as f64).sum();
            let flops = pairs * (heads * dh * 4) as f64;
            println!(
                "{heads}/{kv_heads}x{dh} prefill {tokens} of {context}: {:.3} ms a layer, {:.1} GFLOP/s",
                seconds * 1e3,
                flops / seconds / 1e9
            );
        }
    }
    for (heads, kv_heads, dh) in [(9, 3, 64), (32, 8, 64)] {
        let [scores, softmax, sums] = materialised(target, (heads, kv_heads, dh), 8192, 512).map(|s| s * 1e3);
        println!(
            "{heads}/{kv_heads}x{dh} prefill 512 of 8192, materialised: {:.1} ms a layer ({scores:.1} scores, {softmax:.1} softmax, {sums:.1} sums)",
            scores + softmax + sums
        );
    }
    for (heads, kv_heads, dh) in [(9, 3, 64), (32, 8, 64)] {
        for (context, bytes) in [(4096, 256 << 20), (8192, 256 << 20)] {
            let layers = (bytes / (2 * context * kv_heads * dh * 2)).max(1);
            let b = Bench::new(target, heads, kv_heads, dh, kv, context, layers);
            for threads in [1, 2] {
                let bytes = (2 * layers * b.layer_bytes()) as f64;
                let turns = layers.max(200);
                let (seconds, read) =
                    (b.decode(context, turns, threads) * layers as f64 / turns as f64, b.read(threads));
                println!(
                    "{heads}/{kv_heads}x{dh} decode at {context}, {threads} threads: {:.1} GB/s of {:.1} read ({:.0} %), {:.1} us a layer",
                    bytes / seconds / 1e9 * threads as f64,
                    bytes / read / 1e9 * threads as f64,
                    100.0 * read / seconds,
                    seconds * 1e6 / layers as f64 / threads as f64
                );
            }
        }
    }
}
