//! Perplexity by the protocol of llama-perplexity.
//!
//! One trailing newline is cut from the text and the whole is tokenized once; window i is `tokens[C i .. C (i + 1)]`
//! for a context of C tokens, computed from an empty cache; where the tokenizer puts a beginning-of-sequence token in
//! front, it replaces the first token of every window. The logits at positions `C/2 ..= C-2` predict the tokens at
//! `C/2 + 1 ..= C-1`. Perplexity is exp of the mean negative log-likelihood over all of them.
//! Source: llama.cpp, `tools/perplexity/perplexity.cpp`.

use crate::failure::{Failure, Result};
use attar_runtime::{Engine, Model, StepBatch};
use serde::Serialize;

/// The tokens of a text, and how they are cut.
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Vec<u32>,
    context: usize,
    count: usize,
    /// Replaces the first token of every window.
    bos: Option<u32>,
}

impl Windows {
    /// Cuts a text into at most `most` windows of `context` tokens.
    ///
    /// # Errors
    /// An input failure when the text is shorter than one window; those of the tokenizer.
    pub fn new(model: &Model, text: &str, context: usize, most: Option<usize>) -> Result<Windows> {
        if context < 4 || !context.is_multiple_of(2) {
            return Err(Failure::input(format!(
                "--context {context}: expected an even number of at least 4"
            )));
        }
        let tokenizer = model.tokenizer()?;
        let tokens = tokenizer.encode(text.strip_suffix('\n').unwrap_or(text), true)?;
        let bos = tokenizer.encode("", true)?.first().copied();
        let count = (tokens.len() / context).min(most.unwrap_or(usize::MAX));
        if count == 0 {
            let n = tokens.len();
            return Err(Failure::input(format!("the text has {n} tokens; a window alone takes {context}")));
        }
        Ok(Windows { tokens, context, count, bos })
    }

    /// How many windows there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// All tokens of the text, also those after the last window.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn window(&self, i: usize) -> Vec<u32> {
        let mut window = self.tokens[i * self.context..(i + 1) * self.context].to_vec();
        if let (Some(bos), Some(first)) = (self.bos, window.first_mut()) {
            *first = bos;
        }
        window
    }
}

/// What a model makes of a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    pub perplexity: f64,
    /// Of the perplexity, from the spread of the single scores.
    pub standard_error: f64,
    pub windows: usize,
    pub context: usize,
    /// Tokens that were predicted.
    pub scores: usize,
    /// Mean negative log-likelihood of each window, in nats.
    pub window_mean_nll: Vec<f64>,
}

/// Computes perplexity; after each window `progress` gets the number of windows done and the value so far.
///
/// # Errors
/// Those of the engine.
pub fn measure(model: &Model, windows: &Windows, mut progress: impl FnMut(usize, f64)) -> Result<Perplexity> {
    let mut engine = Engine::new(model.clone(), windows.context, 1)?;
    let mut sums = Sums::default();
    let mut window_mean_nll = Vec::with_capacity(windows.count);
    for i in 0..windows.count {
        let scores = score_window(&mut engine, &windows.window(i))?;
        scores.iter().for_each(|nll| sums.add(*nll));
        window_mean_nll.push(scores.iter().sum::<f64>() / scores.len() as f64);
        progress(i + 1, sums.perplexity());
    }
    Ok(Perplexity {
        perplexity: sums.perplexity(),
        standard_error: sums.standard_error(),
        windows: windows.count,
        context: windows.context,
        scores: sums.count as usize,
        window_mean_nll,
    })
}

/// Negative log-likelihoods of the second half of one window.
fn score_window(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<f64>> {
    let first = tokens.len() / 2;
    let scored = first..tokens.len() - 1;
    let vocab = engine.model().manifest().model.vocab as usize;
    let step = engine.model().max_step_tokens().max(1);
    let sequence = engine.add_sequence()?;
    let mut batch = StepBatch::with_capacity(step);
    let mut scores = Vec::with_capacity(scored.len());
    for (n, chunk) in tokens.chunks(step).enumerate() {
        batch.clear();
        let mut targets = Vec::new();
        for (i, token) in (n * step..).zip(chunk) {
            let wanted = scored.contains(&i);
            // Programs need not work without any row.
            batch.push(sequence, *token, wanted || (i + 1 == n * step + chunk.len()));
            targets.push((wanted, i));
        }
        let logits = engine.step(&batch)?;
        let last = targets.len() - 1;
        let rows = targets.iter().enumerate().filter(|(at, (wanted, _))| *wanted || *at == last);
        for ((_, (wanted, i)), row) in rows.zip(logits.chunks_exact(vocab)) {
            if *wanted {
                scores.push(negative_log_likelihood(row, tokens[i + 1] as usize));
            }
        }
    }
    engine.remove(sequence);
    Ok(scores)
}

/// `log(sum(exp(logits))) - logits[target]`, in f64.
fn negative_log_likelihood(logits: &[f32], target: usize) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from((l - top).exp())).sum();
    f64::from(top) + sum.ln() - f64::from(logits[target])
}

/// Running sums of scores.
#[derive(Default)]
struct Sums {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Sums {
    fn add(&mut self, nll: f64) {
        self.count += 1.0;
        self.sum += nll;
        self.squares += nll * nll;
    }

    fn perplexity(&self) -> f64 {
        (self.sum / self.count).exp()
    }

    /// Standard error of the mean, carried through exp.
    fn standard_error(&self) -> f64 {
        let mean = self.sum / self.count;
        let variance = (self.squares / self.count - mean * mean).max(0.0);
        (variance / (self.count - 1.0).max(1.0)).sqrt() * mean.exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_are_those_of_softmax() {
        let logits = [1.0f32, 2.0, 3.0];
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (t, logit) in logits.iter().enumerate() {
            let expected = -(f64::from(*logit).exp() / sum).ln();
            assert!((negative_log_likelihood(&logits, t) - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn a_coin_has_perplexity_two() {
        let mut sums = Sums::default();
        (0..100).for_each(|_| sums.add(std::f64::consts::LN_2));
        assert!((sums.perplexity() - 2.0).abs() < 1e-12);
        assert!(sums.standard_error() < 1e-6);
    }
}
