//! Attention: of one token behind a context, in bytes of keys and values against reading them; of a prompt, in operations
//! against fused multiply-adds.
//!
//! A decode kernel goes round as many caches as the footprint holds, as a step goes from layer to layer.

use crate::memory::{Random, Region, floats};
use crate::peak::Instruction;
use crate::shapes::Model;
use crate::{Kernels, Measured, read, timing};
use anyhow::{Result, ensure};
use attar_artifact::manifest::KvType;
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::lower::LowerOptions;
use attar_codegen_cpu::{Target, compile_blob};
use attar_format::formats;
use attar_kernel::{ActInt8Layout, Activation, AttentionSpec, KernelSpec};

const CONTEXTS: [usize; 3] = [512, 4096, 8192];
const KV: [(KvType, &str); 3] = [(KvType::F16, "f16"), (KvType::Int8, "int8"), (KvType::Int4, "int4")];
/// Tokens of the prompt whose attention is measured; they are the last of their context.
const PROMPT: usize = 512;

/// Keys and values of one sequence in one layer, several times.
struct Cache {
    region: Region,
    /// Bytes of keys, and of values.
    half: usize,
    layers: usize,
    table: Vec<u32>,
}

impl Cache {
    fn new(spec: &AttentionSpec, context: usize, footprint: usize) -> Result<Cache> {
        // Whole runs of pages, as blocks are laid out.
        let pages = context.div_ceil(spec.page_len).next_multiple_of(KvType::RUN);
        let block = spec.kv.block_bytes(spec.head_dim, spec.page_len);
        let half = (pages * spec.kv_heads * block).next_multiple_of(64);
        let layers = (footprint / (2 * half)).max(1);
        let mut region = Region::zeroed(2 * half * layers)?;
        let mut random = Random(5);
        for block in region.bytes_mut().chunks_exact_mut(block) {
            let (codes, scales) = block.split_at_mut(spec.kv.scales_offset(spec.head_dim, spec.page_len));
            // Halves of ordinary size, 0.5 to 1, or any int8 under scales of 0.01.
            for half in codes.chunks_exact_mut(2) {
                half.copy_from_slice(&(0x3800u16 + (random.bits() % 1024) as u16).to_le_bytes());
            }
            for scale in scales.chunks_exact_mut(4) {
                scale.copy_from_slice(&0.01f32.to_le_bytes());
            }
        }
        Ok(Cache { region, half, layers, table: (0..pages as u32).collect() })
    }

    /// Keys and values of the layer that a unit of work is about.
    fn of(&self, unit: usize) -> &[u8] {
        &self.region.bytes()[unit % self.layers * 2 * self.half..][..2 * self.half]
    }

    /// Arguments from the query to the values.
    fn args(&self, unit: usize, q: &Region, positions: &[i32], seqs: &[i32]) -> [u64; 7] {
        let keys = self.of(unit).as_ptr() as u64;
        [
            q.address(),
            positions.as_ptr() as u64,
            seqs.as_ptr() as u64,
            self.table.as_ptr() as u64,
            self.table.len() as u64,
            keys,
            keys + self.half as u64,
        ]
    }
}

/// Measures decode and prefill behind each context.
pub(crate) fn run(
    options: &Kernels,
    model: Model,
    target: Target,
    keep: &mut impl FnMut(Measured) -> Result<()>,
) -> Result<()> {
    let sizes = model.sizes();
    let page_len = LowerOptions::PAGE_LEN as usize;
    ensure!(
        options.span > 0 && options.span.is_multiple_of(page_len),
        "--span {}: expected a multiple of {page_len}",
        options.span
    );
    for (kv, kv_name) in KV {
        let defaults = LowerOptions::new(kv);
        let spec = AttentionSpec {
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            scale: 1.0 / (sizes.head_dim as f32).sqrt(),
            window: None,
            kv,
            page_len: defaults.page_len as usize,
            span: options.span,
        };
        for context in CONTEXTS {
            let cache = Cache::new(&spec, context, options.footprint << 20)?;
            let mut measured = Vec::new();
            if options.rows.contains(&1) {
                measured.push(decode(options, target, &spec, &cache, context)?);
            }
            if options.rows.contains(&PROMPT) {
                measured.push(prefill(options, target, &spec, &cache, context)?);
            }
            for mut m in measured {
                m.kernel = format!("attention {} {kv_name} context {context}", sizes.name);
                keep(m)?;
            }
        }
    }
    Ok(())
}

/// One token: its spans, then their merge.
fn decode(
    options: &Kernels,
    target: Target,
    spec: &AttentionSpec,
    cache: &Cache,
    context: usize,
) -> Result<Measured> {
    let width = spec.heads * spec.head_dim;
    let out = Activation::Int8;
    let kernels = [KernelSpec::AttentionSpan(*spec), KernelSpec::AttentionMerge { attention: *spec, out }];
    let names = kernels.each_ref().map(KernelSpec::name);
    let image = ExecImage::load(&compile_blob(target, &kernels)?)?;
    let spans = context.div_ceil(spec.span);
    let q = floats(&Random(6).f32s(width))?;
    let partials = Region::filled(spans * spec.heads * spec.partial_len() * 4)?;
    let result = Region::filled(ActInt8Layout::new(width).stride)?;
    let (positions, seqs) = ([context as i32 - 1], [0]);
    let merge = [partials.address(), positions.as_ptr() as u64, result.address(), spans as u64];
    let threads = options.threads;
    let launch = |unit: usize, thread: usize| {
        let mut args = cache.args(unit, &q, &positions, &seqs).to_vec();
        args.extend([partials.address(), spans as u64]);
        let grid = spec.kv_heads * spans;
        let (begin, end) = (thread * grid / threads, (thread + 1) * grid / threads);
        // SAFETY: the target runs here; the table holds a query, its position and sequence, a block table, a cache of as
        // many pages, and room for the partials.
        let found = unsafe { image.call(&names[0], &args, begin as u64, end as u64) };
        assert!(found, "no kernel {}", names[0]);
        // Threads do not wait for each other here, so partials may be those of the layer before: as much to compute.
        if thread == 0 {
            // SAFETY: as above; partials of all spans have room, and the result has room for a row.
            let found = unsafe { image.call(&names[1], &merge, 0, spec.kv_heads as u64) };
            assert!(found, "no kernel {}", names[1]);
        }
    };
    let part = |unit, thread| read::share(cache.of(unit), thread, threads);
    let plain = |unit, thread| read::read::<false>(part(unit, thread));
    let ahead = |unit, thread| read::read::<true>(part(unit, thread));
    let [seconds, plain, ahead] = timing::in_turns(threads, &options.effort, [&launch, &plain, &ahead]);
    let bytes = 2.0 * cache.half as f64;
    let (rate, limit) = (bytes / seconds / 1e9, bytes / plain.min(ahead) / 1e9);
    Ok(Measured {
        kernel: String::new(),
        target: target.name(),
        threads,
        rows: 1,
        microseconds: seconds * 1e6,
        rate,
        unit: "GB/s",
        limit: Some(limit),
        limit_is: "pure read".to_owned(),
        fraction: Some(rate / limit),
    })
}

/// The last tokens of the context, together.
fn prefill(
    options: &Kernels,
    target: Target,
    spec: &AttentionSpec,
    cache: &Cache,
    context: usize,
) -> Result<Measured> {
    let width = spec.heads * spec.head_dim;
    let kernel = KernelSpec::Attention { attention: *spec, out: Activation::Int8 };
    let name = kernel.name();
    let image = ExecImage::load(&compile_blob(target, &[kernel])?)?;
    let q = floats(&Random(6).f32s(PROMPT * width))?;
    let result = Region::filled(PROMPT * ActInt8Layout::new(width).stride)?;
    let first = context - PROMPT;
    let positions: Vec<i32> = (first as i32..context as i32).collect();
    let seqs = vec![0; PROMPT];
    let mut args = cache.args(0, &q, &positions, &seqs).to_vec();
    args.extend([result.address(), PROMPT as u64]);
    let threads = options.threads;
    let grid = spec.kv_heads * (PROMPT + spec.tile_tokens() - 1);
    let launch = |_: usize, thread: usize| {
        // Tiles by turns: later ones see more.
        let tile = spec.tile_tokens();
        for begin in (thread * tile..grid).step_by(threads * tile) {
            // SAFETY: the target runs here; the table holds queries, their positions and sequences, a block table, a cache
            // of as many pages, and room for the results.
            let found = unsafe { image.call(&name, &args, begin as u64, (begin + tile).min(grid) as u64) };
            assert!(found, "no kernel {name}");
        }
    };
    let seen: usize = (first + 1..=context).sum();
    let operations = 4.0 * (seen * width) as f64;
    let instruction = Instruction::meant(target, &formats::F32, 1);
    let (seconds, limit, limit_is) = match instruction.and_then(|i| Some((i, i.work()?))) {
        Some((instruction, work)) => {
            let [seconds, peak] = timing::in_turns(threads, &options.effort, [&launch, &work]);
            (seconds, Some(instruction.rate_of(peak, threads)), instruction.name().to_owned())
        }
        None => (timing::fastest(threads, &options.effort, &launch), None, "no loop for it".to_owned()),
    };
    let rate = operations / seconds / 1e9;
    Ok(Measured {
        kernel: String::new(),
        target: target.name(),
        threads,
        rows: PROMPT,
        microseconds: seconds * 1e6,
        rate,
        unit: "GOP/s",
        limit,
        limit_is,
        fraction: limit.map(|l| rate / l),
    })
}
