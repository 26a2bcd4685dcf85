//! Calibration text that the model itself writes: no data set is needed, and it is what the model is likely to see.
//!
//! A temporary artifact with `w8` weights generates windows at temperature 1, many at a time. Every window begins with
//! the token that begins or ends texts, where the model has one; in every second window a token drawn from the whole
//! vocabulary follows, which leads away from the likeliest openings. Draws come from ChaCha8, one stream per window,
//! and the engine's logits depend on neither threads nor the rest of a batch: the same model gives the same text.
//! Reference: data-free calibration of LLM-QAT, Liu et al. 2023, arXiv:2305.17888, section 3.1.

use super::dense::exp;
use super::text::problem;
use crate::{CompileOptions, Session, resolve_targets};
use attar_import::ModelInfo;
use attar_pass::{Preset, Recipe, Result};
use attar_runtime::{DeviceChoice, Engine, Model, OpenOptions, StepBatch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::path::Path;

/// Windows generated together.
const BATCH: usize = 32;

/// Where all draws start from.
const SEED: u64 = 0x0061_7474_6172;

/// Generates `count` windows of `context` tokens.
///
/// # Errors
/// Those of compiling and running the model, as problems of calibration.
pub(crate) fn windows_of_model(
    source: &Path,
    info: &ModelInfo,
    context: usize,
    count: usize,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<Vec<u32>>> {
    const WHAT: &str = "writing calibration text";
    progress(WHAT, 0, count as u64);
    let folder = tempfile::tempdir().map_err(|e| problem(format!("a temporary folder: {e}")))?;
    let path = folder.path().join("writer.attar");
    let model = compiled(source, &path).map_err(|e| problem(format!("the model that writes text: {e}")))?;
    let failed = |e: attar_runtime::Error| problem(format!("the model that writes text: {e}"));
    let vocab = info.vocab;
    let first = info.bos.or(info.eos.first().copied());
    let mut windows = Vec::with_capacity(count);
    for start in (0..count).step_by(BATCH) {
        let width = BATCH.min(count - start);
        let mut engine = Engine::new(model.clone(), context, width).map_err(failed)?;
        let sequences = (0..width)
            .map(|_| engine.add_sequence())
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(failed)?;
        let mut writers: Vec<Writer> =
            (start..start + width).map(|window| Writer::new(window, first, vocab)).collect();
        // Nobody feeds more than two tokens in one step.
        let most = (model.max_step_tokens() / 2).max(1);
        let mut batch = StepBatch::with_capacity(2 * most);
        while writers.iter().any(|w| w.tokens.len() < context) {
            // A step takes as many tokens as it was compiled for, which may be fewer than the windows have.
            for (writers, sequences) in writers.chunks_mut(most).zip(sequences.chunks(most)) {
                let mut open: Vec<(&mut Writer, _)> =
                    writers.iter_mut().zip(sequences).filter(|(w, _)| w.tokens.len() < context).collect();
                batch.clear();
                for (writer, sequence) in &mut open {
                    let last = writer.tokens.len() - 1;
                    for (i, token) in writer.tokens.iter().enumerate().skip(writer.fed) {
                        batch.push(**sequence, *token, i == last);
                    }
                    writer.fed = last + 1;
                }
                if !batch.is_empty() {
                    let logits = engine.step(&batch).map_err(failed)?;
                    open.par_iter_mut()
                        .zip(logits.par_chunks_exact(vocab))
                        .for_each(|((w, _), l)| w.write(l));
                }
            }
            let written = writers.iter().map(|w| w.tokens.len()).min().unwrap_or(context);
            progress(WHAT, (start + width * written / context) as u64, count as u64);
        }
        windows.extend(writers.into_iter().map(|w| w.tokens));
    }
    Ok(windows)
}

/// Compiles the model for this machine and opens it.
fn compiled(source: &Path, path: &Path) -> std::result::Result<Model, String> {
    let registry = crate::registry().map_err(|e| e.to_string())?;
    let recipe = Recipe::parse(&Preset::W8.recipe(), "w8", &registry).map_err(|e| e.to_string())?;
    let targets = resolve_targets(&["native".to_owned()]).map_err(|e| e.to_string())?;
    let options = CompileOptions::new(source.to_owned(), recipe, targets, path.to_owned());
    Session::new(options).and_then(|s| s.run(&mut |_| {})).map_err(|e| e.to_string())?;
    let threads = Some(rayon::current_num_threads());
    let options = OpenOptions {
        threads,
        deterministic: true,
        mmap: true,
        device: DeviceChoice::Cpu,
        ..OpenOptions::default()
    };
    Model::open(path, &options).map_err(|e| e.to_string())
}

/// One window being written.
struct Writer {
    tokens: Vec<u32>,
    /// Tokens the engine has seen.
    fed: usize,
    rng: ChaCha8Rng,
}

impl Writer {
    fn new(window: usize, first: Option<u32>, vocab: usize) -> Writer {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        rng.set_stream(window as u64);
        let mut tokens: Vec<u32> = first.into_iter().collect();
        if tokens.is_empty() || window % 2 == 1 {
            tokens.push(rng.random_range(0..vocab as u32));
        }
        Writer { tokens, fed: 0, rng }
    }

    /// Draws the next token.
    fn write(&mut self, logits: &[f32]) {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|l| exp(l - top)).collect();
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let mut left = self.rng.random::<f64>() * total;
        let drawn = weights.iter().position(|w| {
            left -= f64::from(*w);
            left < 0.0
        });
        self.tokens.push(drawn.unwrap_or(logits.len() - 1) as u32);
    }
}
