//! Choosing codes of one matrix: how long it takes, and what the codes leave of the error of rounding.
//!
//! The matrices are of a layer of a small model, `[1536, 576]` and `[576, 1536]`. Their inputs share a few dozen causes of falling
//! size, and channels differ in size by orders of magnitude, as those of language models do.

use crate::{format_named, print};
use anyhow::{Result, anyhow};
use attar_format::FormatRef;
use attar_pass::InputStatistics;
use attar_passes::quantize::curvature::Curvature;
use attar_passes::quantize::quantize_gptq::choose;
use attar_passes::quantize::vector_level::Level;
use clap::Args;
use std::time::Instant;

#[derive(Args, Debug)]
pub(crate) struct Codes {
    /// Weight formats
    #[arg(long, value_name = "FORMAT", value_delimiter = ',', value_parser = format_named, default_value = "n2,n3,n4,n5,n6")]
    format: Vec<FormatRef>,
    /// Most rounds of refinement
    #[arg(long, value_name = "N", default_value_t = 4)]
    rounds: usize,
    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
}

pub(crate) fn run(options: &Codes) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build()?;
    pool.install(|| {
        for (n, k) in [(1536, 576), (576, 1536)] {
            let start = Instant::now();
            let curvature = Curvature::new(&statistics(k), 0.01, true).map_err(|e| anyhow!("{e}"))?;
            print(&format!("[{n}, {k}]: factors of the second moment in {:.0} ms", milliseconds(start)))?;
            let weights = weights(n, k);
            for format in &options.format {
                let start = Instant::now();
                let chosen = choose(format, n, &curvature, &weights, options.rounds, Level::widest())
                    .map_err(|e| anyhow!("{e}"))?;
                let (ms, error, rounded) =
                    (milliseconds(start), chosen.relative_error, chosen.rounded_error);
                print(&format!(
                    "[{n}, {k}] {}: {ms:.0} ms, {:.1} ns per weight, relative output error {error:.6}, rounded {rounded:.6}",
                    format.name,
                    1e6 * ms / (n * k) as f64,
                ))?;
            }
        }
        Ok(())
    })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Roughly normal numbers.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.7).collect()
}

/// Second moments of inputs of `k` channels.
fn statistics(k: usize) -> InputStatistics {
    const CAUSES: usize = 48;
    const TOKENS: f32 = 65536.0;
    let (mix, size) = (normal(CAUSES * k, 1), normal(k, 2));
    let mut s = InputStatistics::zeros(k);
    s.n_tokens = TOKENS as u64;
    for i in 0..k {
        for j in 0..k {
            let shared: f32 = (0..CAUSES).map(|c| mix[c * k + i] * mix[c * k + j] / (c + 1) as f32).sum();
            let own = if i == j { 0.5 } else { 0.0 };
            s.second_moment[i * k + j] = TOKENS * (shared + own) * (size[i] + size[j]).exp();
        }
        (s.minimum[i], s.maximum[i]) = (-4.0 * size[i].exp(), 4.0 * size[i].exp());
    }
    s
}

/// Weights whose rows and some single values differ in size.
fn weights(n: usize, k: usize) -> Vec<f32> {
    let (mut weights, rows) = (normal(n * k, 3), normal(n, 4));
    for (row, size) in weights.chunks_exact_mut(k).zip(rows) {
        row.iter_mut().for_each(|w| *w *= 0.02 * (0.3 * size).exp() * (1.0 + 0.1 * *w * *w));
    }
    weights
}
