//! Speed as llama-bench counts it: `pp` tokens of a prompt at once, `tg` tokens one at a time, from an empty cache or
//! behind tokens that are in it already, for one sequence or several at once.

use crate::failure::Result;
use attar_runtime::{Engine, Model, SequenceId, StepBatch};
use serde::Serialize;
use std::ops::Range;
use std::time::Instant;

/// One measurement, repeated.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// `pp512`, `tg128`, `tg128x4`, `tg128@4096`.
    pub test: String,
    pub threads: usize,
    /// Of all sequences together.
    pub tokens: usize,
    /// Median of the samples, in tokens per second.
    pub tokens_per_second: f64,
    pub min: f64,
    pub max: f64,
    /// `(max - min) / median`.
    pub spread: f64,
    /// In the order they were taken.
    pub samples: Vec<f64>,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Tokens of the prompt; 0 leaves the test out.
    pub prompt: usize,
    /// Tokens to generate; 0 leaves the test out.
    pub generate: usize,
    /// Tokens of each sequence that are in the cache before a run.
    pub depth: usize,
    /// Numbers of sequences to generate at once, one test each; empty means one sequence.
    pub rows: Vec<usize>,
    /// Runs that count.
    pub repetitions: usize,
}

/// Measures; `progress` is told before each repetition. One run of each kind comes before those that count.
///
/// # Errors
/// Those of the engine.
pub fn measure(model: &Model, plan: &Plan, mut progress: impl FnMut(&str)) -> Result<Vec<Speed>> {
    let mut tests = Vec::new();
    if plan.prompt > 0 {
        tests.push(Test { prompt: true, tokens: plan.prompt, rows: 1 });
    }
    if plan.generate > 0 {
        let one = [1];
        let rows = if plan.rows.is_empty() { &one[..] } else { &plan.rows };
        tests.extend(rows.iter().map(|&rows| Test { prompt: false, tokens: plan.generate, rows }));
    }
    let context = plan.depth + plan.prompt.max(plan.generate);
    let most_rows = tests.iter().map(|t| t.rows).max().unwrap_or(1);
    let mut runner = Runner::new(model, context, most_rows)?;
    let mut results = Vec::new();
    for test in tests {
        let name = test.name(plan.depth);
        progress(&name);
        runner.fill(test.rows, plan.depth)?;
        let mut samples = Vec::with_capacity(plan.repetitions);
        for repetition in 0..=plan.repetitions {
            progress(&name);
            let rate = (test.tokens * test.rows) as f64 / runner.run(&test, plan.depth)?;
            if repetition > 0 {
                samples.push(rate);
            }
        }
        results.push(Speed::new(name, model.threads(), test.tokens * test.rows, samples));
    }
    Ok(results)
}

/// A kind of run.
struct Test {
    /// All tokens at once, or one after the other.
    prompt: bool,
    tokens: usize,
    rows: usize,
}

impl Test {
    /// `pp512`; `tg128`, `tg128x4` for four sequences at once, `tg128@4096` behind 4096 tokens.
    fn name(&self, depth: usize) -> String {
        let kind = if self.prompt { "pp" } else { "tg" };
        let rows = if self.rows > 1 { format!("x{}", self.rows) } else { String::new() };
        let depth = if depth > 0 { format!("@{depth}") } else { String::new() };
        format!("{kind}{}{rows}{depth}", self.tokens)
    }
}

struct Runner {
    engine: Engine,
    sequences: Vec<SequenceId>,
    batch: StepBatch,
    ids: Vec<u32>,
}

impl Runner {
    fn new(model: &Model, context: usize, rows: usize) -> Result<Runner> {
        let mut engine = Engine::new(model.clone(), context.max(1), rows)?;
        let sequences = (0..rows).map(|_| engine.add_sequence()).collect::<attar_runtime::Result<_>>()?;
        let batch = StepBatch::with_capacity(model.max_step_tokens());
        let ids = token_ids(context.max(1), model.manifest().model.vocab);
        Ok(Runner { engine, sequences, batch, ids })
    }

    /// Puts `depth` tokens into the first `rows` sequences and empties the others.
    fn fill(&mut self, rows: usize, depth: usize) -> Result<()> {
        for sequence in 0..self.sequences.len() {
            self.engine.truncate(self.sequences[sequence], 0)?;
            if sequence < rows {
                self.append(sequence, 0..depth)?;
            }
        }
        Ok(())
    }

    /// Appends tokens to one sequence, as many at once as a step takes; logits are wanted after the last.
    fn append(&mut self, sequence: usize, ids: Range<usize>) -> Result<()> {
        let most = self.engine.model().max_step_tokens();
        let mut at = ids.start;
        while at < ids.end {
            let next = ids.end.min(at + most);
            self.batch.clear();
            for i in at..next {
                self.batch.push(self.sequences[sequence], self.ids[i], i + 1 == ids.end);
            }
            self.engine.step(&self.batch)?;
            at = next;
        }
        Ok(())
    }

    /// Seconds for one run behind `depth` tokens.
    fn run(&mut self, test: &Test, depth: usize) -> Result<f64> {
        for sequence in &self.sequences[..test.rows] {
            self.engine.truncate(*sequence, depth)?;
        }
        let start = Instant::now();
        if test.prompt {
            self.append(0, depth..depth + test.tokens)?;
        } else {
            for i in depth..depth + test.tokens {
                self.batch.clear();
                for sequence in &self.sequences[..test.rows] {
                    self.batch.push(*sequence, self.ids[i], true);
                }
                self.engine.step(&self.batch)?;
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Speed {
    fn new(test: String, threads: usize, tokens: usize, samples: Vec<f64>) -> Speed {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
        let last = sorted.len().saturating_sub(1);
        let median = (at(last / 2) + at(last.div_ceil(2))) / 2.0;
        let spread = if median > 0.0 { (at(last) - at(0)) / median } else { 0.0 };
        Speed { test, threads, tokens, tokens_per_second: median, min: at(0), max: at(last), spread, samples }
    }
}

/// Ids that look random and are the same every time.
fn token_ids(count: usize, vocab: u32) -> Vec<u32> {
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
        let s = Speed::new("tg1".into(), 1, 1, vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.tokens_per_second, s.min, s.max, s.spread), (2.5, 1.0, 4.0, 1.2));
        let s = Speed::new("tg1".into(), 1, 1, vec![3.0]);
        assert_eq!((s.tokens_per_second, s.spread), (3.0, 0.0));
    }

    #[test]
    fn tests_are_named_for_what_they_do() {
        let test = |prompt, rows| Test { prompt, tokens: 64, rows };
        assert_eq!(test(true, 1).name(0), "pp64");
        assert_eq!(test(false, 4).name(0), "tg64x4");
        assert_eq!(test(false, 1).name(4096), "tg64@4096");
    }

    #[test]
    fn ids_are_in_range_and_repeatable() {
        let ids = token_ids(1000, 77);
        assert!(ids.iter().all(|i| *i < 77));
        assert_eq!(ids, token_ids(1000, 77));
        assert!(ids.iter().collect::<std::collections::BTreeSet<_>>().len() > 50);
    }
}
