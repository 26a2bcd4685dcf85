//! Decode attention in bytes of keys and values per second, at several contexts.

use crate::memory::{Random, Region, floats};
use crate::shapes::Model;
use crate::{Kernels, Measured, read, timing};
use anyhow::Result;
use attar_artifact::manifest::KvType;
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::lower::LowerOptions;
use attar_codegen_cpu::{Target, compile_blob};
use attar_kernel::KernelSpec;

const CONTEXTS: [usize; 3] = [512, 4096, 8192];

/// Measures one token's attention behind each context.
pub(crate) fn run(
    options: &Kernels,
    model: Model,
    target: Target,
    keep: &mut impl FnMut(Measured) -> Result<()>,
) -> Result<()> {
    let sizes = model.sizes();
    let (heads, kv_heads, head_dim) = (sizes.heads, sizes.kv_heads, sizes.head_dim);
    let (kv, page_len) = (KvType::F16, LowerOptions::PAGE_LEN as usize);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let spec = KernelSpec::Attention { heads, kv_heads, head_dim, scale, window: None, kv, page_len };
    let name = spec.name();
    let image = ExecImage::load(&compile_blob(target, &[spec])?)?;
    let threads = options.threads;
    for context in CONTEXTS {
        let pages = context.div_ceil(page_len);
        let one = pages * kv_heads * page_len * head_dim * kv.size();
        // As many caches as a model of 16 layers or more has: what one layer reads is not what the last one left behind.
        let layers = ((options.footprint << 20) / (2 * one)).max(1);
        let mut cache = Region::zeroed(2 * one * layers)?;
        // Halves of ordinary size: 0x3800 is 0.5.
        let mut random = Random(5);
        for half in cache.bytes_mut().chunks_exact_mut(2) {
            half.copy_from_slice(&(0x3800u16 + (random.bits() % 1024) as u16).to_le_bytes());
        }
        let q = floats(&Random(6).f32s(heads * head_dim))?;
        let out = Region::filled(heads * head_dim * 4)?;
        let position = (context as i32 - 1).to_le_bytes();
        let seq = 0i32.to_le_bytes();
        let table: Vec<u32> = (0..pages as u32).collect();
        let args: Vec<[u64; 8]> = (0..layers)
            .map(|layer| {
                let keys = cache.address() + (2 * one * layer) as u64;
                [
                    q.address(),
                    position.as_ptr() as u64,
                    seq.as_ptr() as u64,
                    table.as_ptr() as u64,
                    pages as u64,
                    keys,
                    keys + one as u64,
                    out.address(),
                ]
            })
            .collect();
        let launch = |unit: usize, thread: usize| {
            let (begin, end) = (thread * kv_heads / threads, (thread + 1) * kv_heads / threads);
            // SAFETY: the target runs here; the table holds a query, its position and sequence, a block table of
            // `pages` pages, a cache of as many, and room for the output.
            let found = unsafe { image.call(&name, &args[unit % layers], begin as u64, end as u64) };
            assert!(found, "no kernel {name}");
        };
        let part = |unit: usize, thread| {
            read::share(&cache.bytes()[unit % layers * 2 * one..][..2 * one], thread, threads)
        };
        let plain = |unit, thread| read::read::<false>(part(unit, thread));
        let ahead = |unit, thread| read::read::<true>(part(unit, thread));
        let [seconds, plain, ahead] = timing::in_turns(threads, &options.effort, [&launch, &plain, &ahead]);
        let (rate, limit) = (2.0 * one as f64 / seconds / 1e9, 2.0 * one as f64 / plain.min(ahead) / 1e9);
        keep(Measured {
            kernel: format!("attention {} f16 context {context}", sizes.name),
            target: target.name(),
            threads,
            rows: 1,
            microseconds: seconds * 1e6,
            rate,
            unit: "GB/s",
            limit: Some(limit),
            limit_is: "pure read of keys and values".to_owned(),
            fraction: Some(rate / limit),
        })?;
    }
    Ok(())
}
