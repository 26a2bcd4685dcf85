//! Speed as llama-bench counts it: `pp` tokens of a prompt at once, `tg` tokens one at a time from an empty cache, or
//! from one that holds a context, which is filled beforehand and not timed.

use crate::failure::Result;
use crate::profile::fill;
use attar_runtime::{Engine, Model, SequenceId, SessionOptions, StepBatch};
use serde::Serialize;
use std::time::Instant;

/// One measurement, repeated.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// `pp512`, `tg128`.
    pub test: String,
    pub threads: usize,
    pub tokens: usize,
    /// Median of the samples, in tokens per second.
    pub tokens_per_second: f64,
    pub min: f64,
    pub max: f64,
    /// `(max - min) / median`.
    pub spread: f64,
    /// In the order they were taken.
    pub samples: Vec<f64>,
    /// Tokens of each sequence that were there before.
    pub context: usize,
    /// Sequences that advance together, one token each per step.
    pub batch: usize,
    /// Median milliseconds of a step, where a step is one token of each sequence; of a `pp` test the whole prompt.
    pub step_ms: f64,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub prompt: usize,
    pub generate: usize,
    /// Tokens held before generation.
    pub context: usize,
    /// Sequences that generate together; above 1, a single one is measured too.
    pub batch: usize,
    pub repetitions: usize,
}

/// Measures; `progress` is told before each repetition. One run of each kind comes before those that count.
///
/// # Errors
/// Those of the engine.
pub fn measure(model: &Model, plan: Plan, mut progress: impl FnMut(&str)) -> Result<Vec<Speed>> {
    let vocab = model.manifest().model.vocab;
    let mut results = Vec::new();
    if plan.prompt > 0 {
        let test = format!("pp{}", plan.prompt);
        let mut session = model.session(&SessionOptions { context: Some(plan.prompt) })?;
        let ids = token_ids(plan.prompt, vocab);
        let mut samples = Vec::with_capacity(plan.repetitions);
        for repetition in 0..=plan.repetitions {
            progress(&test);
            session.truncate(0)?;
            let start = Instant::now();
            session.append(&ids)?;
            if repetition > 0 {
                samples.push(plan.prompt as f64 / start.elapsed().as_secs_f64());
            }
        }
        results.push(Speed::new(test, model.threads(), plan.prompt, 0, 1, 1, samples));
    }
    if plan.generate == 0 {
        return Ok(results);
    }
    let mut name = format!("tg{}", plan.generate);
    if plan.context > 0 {
        name.push_str(&format!("@{}", plan.context));
    }
    let sizes = if plan.batch > 1 { vec![1, plan.batch] } else { vec![1] };
    let mut runs = Vec::new();
    for batch in sizes {
        let test = if batch > 1 { format!("{name}x{batch}") } else { name.clone() };
        progress(&test);
        runs.push((Generation::new(model, plan, batch)?, test, Vec::with_capacity(plan.repetitions)));
    }
    // Batches take turns, so that what disturbs the machine disturbs all of them.
    for repetition in 0..=plan.repetitions {
        for (generation, test, samples) in &mut runs {
            progress(test);
            let seconds = generation.run()?;
            if repetition > 0 {
                samples.push((generation.sequences.len() * plan.generate) as f64 / seconds);
            }
        }
    }
    for (generation, test, samples) in runs {
        let batch = generation.sequences.len();
        let (tokens, steps) = (plan.generate * batch, plan.generate);
        results.push(Speed::new(test, model.threads(), tokens, plan.context, batch, steps, samples));
    }
    Ok(results)
}

/// Sequences that hold a context and advance together.
struct Generation {
    engine: Engine,
    sequences: Vec<SequenceId>,
    context: usize,
    /// What is generated, the same by all sequences.
    ids: Vec<u32>,
    step: StepBatch,
}

impl Generation {
    fn new(model: &Model, plan: Plan, batch: usize) -> Result<Generation> {
        let mut engine = Engine::new(model.clone(), plan.context + plan.generate, batch)?;
        let ids = token_ids(plan.context + plan.generate, model.manifest().model.vocab);
        let sequences =
            (0..batch).map(|_| engine.add_sequence()).collect::<attar_runtime::Result<Vec<_>>>()?;
        let (context, ids) = ids.split_at(plan.context);
        fill(&mut engine, &sequences, context)?;
        let step = StepBatch::with_capacity(batch);
        Ok(Generation { engine, sequences, context: plan.context, ids: ids.to_vec(), step })
    }

    /// Seconds for all tokens, one step after the other.
    fn run(&mut self) -> Result<f64> {
        for sequence in &self.sequences {
            self.engine.truncate(*sequence, self.context)?;
        }
        let start = Instant::now();
        for id in &self.ids {
            self.step.clear();
            self.sequences.iter().for_each(|s| self.step.push(*s, *id, true));
            self.engine.step(&self.step)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Speed {
    fn new(
        test: String,
        threads: usize,
        tokens: usize,
        context: usize,
        batch: usize,
        steps: usize,
        samples: Vec<f64>,
    ) -> Speed {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
        let last = sorted.len().saturating_sub(1);
        let median = (at(last / 2) + at(last.div_ceil(2))) / 2.0;
        let spread = if median > 0.0 { (at(last) - at(0)) / median } else { 0.0 };
        let step_ms = if median > 0.0 { tokens as f64 / median / steps as f64 * 1e3 } else { 0.0 };
        let (min, max) = (at(0), at(last));
        Speed {
            test,
            threads,
            tokens,
            tokens_per_second: median,
            min,
            max,
            spread,
            samples,
            context,
            batch,
            step_ms,
        }
    }
}

/// Ids that look random and are the same every time.
pub(crate) fn token_ids(count: usize, vocab: u32) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(vocab.max(1))) as u32
    };
    std::iter::repeat_with(next).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        let s = Speed::new("tg1".into(), 1, 8, 0, 4, 2, vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.tokens_per_second, s.min, s.max, s.spread), (2.5, 1.0, 4.0, 1.2));
        assert_eq!(s.step_ms, 8.0 / 2.5 / 2.0 * 1e3);
        let s = Speed::new("tg1".into(), 1, 1, 0, 1, 1, vec![3.0]);
        assert_eq!((s.tokens_per_second, s.spread), (3.0, 0.0));
    }

    #[test]
    fn ids_are_in_range_and_repeatable() {
        let ids = token_ids(1000, 77);
        assert!(ids.iter().all(|i| *i < 77));
        assert_eq!(ids, token_ids(1000, 77));
        assert!(ids.iter().collect::<std::collections::BTreeSet<_>>().len() > 50);
    }
}
