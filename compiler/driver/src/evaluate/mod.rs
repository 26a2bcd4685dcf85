//! Predicting a text with compiled models: the perplexity of one, and how far one strays from another.
//!
//! The protocol is that of llama-perplexity. One trailing newline is cut from the text and the whole is tokenized once;
//! window i is `tokens[C i .. C (i + 1)]` for a context of C tokens, computed from an empty cache; where the tokenizer puts
//! a beginning-of-sequence token in front, it replaces the first token of every window. The logits at positions
//! `C/2 ..= C-2` predict the tokens at `C/2 + 1 ..= C-1`. Perplexity is exp of the mean negative log-likelihood over all of
//! them. Two models read a window side by side, step by step, so that no logits are kept.
//! Source: llama.cpp, `tools/perplexity/perplexity.cpp`.

mod divergence;
mod error;

pub use divergence::Divergence;
pub use error::{Error, Result};

use attar_artifact::certificate::Quality;
use attar_runtime::{Engine, Model, StepBatch, Tokenizer};
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
    /// [`Error::TooShort`] when the text is shorter than one window; [`Error::Context`]; those of the tokenizer.
    pub fn new(model: &Model, text: &str, context: usize, most: Option<usize>) -> Result<Windows> {
        Windows::of(model.tokenizer()?, text, context, most)
    }

    /// As [`Windows::new`], before there is a model.
    ///
    /// # Errors
    /// As [`Windows::new`].
    pub fn of(tokenizer: &Tokenizer, text: &str, context: usize, most: Option<usize>) -> Result<Windows> {
        if context < 4 || !context.is_multiple_of(2) {
            return Err(Error::Context { context });
        }
        if most == Some(0) {
            return Err(Error::NoWindows);
        }
        let (tokens, bos) = tokenize(tokenizer, text)?;
        let count = (tokens.len() / context).min(most.unwrap_or(usize::MAX));
        if count == 0 {
            return Err(Error::TooShort { tokens: tokens.len(), context });
        }
        Ok(Windows { tokens, context, count, bos })
    }

    /// Refuses a reference model that would read other tokens, or predict among others.
    ///
    /// # Errors
    /// [`Error::Vocabulary`], [`Error::Tokens`]; those of the tokenizer.
    pub fn check_reference(&self, model: &Model, reference: &Model, text: &str) -> Result<()> {
        let (vocab, reference_vocab) = (vocab(model), vocab(reference));
        if vocab != reference_vocab {
            return Err(Error::Vocabulary { vocab, reference: reference_vocab });
        }
        let (tokens, bos) = tokenize(reference.tokenizer()?, text)?;
        if tokens != self.tokens || bos != self.bos {
            let differs = tokens.iter().zip(&self.tokens).position(|(a, b)| a != b);
            return Err(Error::Tokens { at: differs.unwrap_or(tokens.len().min(self.tokens.len())) });
        }
        Ok(())
    }

    /// How many windows there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Tokens of a window.
    pub fn context(&self) -> usize {
        self.context
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

/// The tokens of the text, and the one that begins every text.
fn tokenize(tokenizer: &Tokenizer, text: &str) -> Result<(Vec<u32>, Option<u32>)> {
    let tokens = tokenizer.encode(text.strip_suffix('\n').unwrap_or(text), true)?;
    Ok((tokens, tokenizer.encode("", true)?.first().copied()))
}

fn vocab(model: &Model) -> u32 {
    model.manifest().model.vocab
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
/// Those of the engine; [`Error::NotFinite`].
pub fn perplexity(
    model: &Model,
    windows: &Windows,
    mut progress: impl FnMut(usize, f64),
) -> Result<Perplexity> {
    let mut engines = [Engine::new(model.clone(), windows.context, 1)?];
    let mut sums = divergence::Likelihood::default();
    let mut window_mean_nll = Vec::with_capacity(windows.count);
    for i in 0..windows.count {
        let before = sums.clone();
        read_window(&mut engines, &windows.window(i), &mut |rows, targets| match rows {
            [rows] => sums.add_rows(rows, targets),
            _ => Ok(()),
        })
        .map_err(|e| e.within(i))?;
        window_mean_nll.push(sums.mean_since(&before));
        progress(i + 1, sums.perplexity());
    }
    let (perplexity, standard_error) = (sums.perplexity(), sums.standard_error());
    let (windows, context, scores) = (windows.count, windows.context, sums.count());
    Ok(Perplexity { perplexity, standard_error, windows, context, scores, window_mean_nll })
}

/// Two models on the same text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub windows: usize,
    pub context: usize,
    #[serde(flatten)]
    pub quality: Quality,
}

/// Compares models with a reference, which reads each window once for all of them; in the order of `models`. `windows`
/// must have passed [`Windows::check_reference`] for each. After each window `progress` gets the number of windows done and
/// the mean divergence of each model so far.
///
/// # Errors
/// Those of the engine; [`Error::NotFinite`].
pub fn compare(
    models: &[Model],
    reference: &Model,
    windows: &Windows,
    mut progress: impl FnMut(usize, &[f64]),
) -> Result<Vec<Comparison>> {
    let mut engines = Vec::with_capacity(models.len() + 1);
    for model in models.iter().chain([reference]) {
        engines.push(Engine::new(model.clone(), windows.context, 1)?);
    }
    let mut divergences = vec![Divergence::default(); models.len()];
    for i in 0..windows.count {
        read_window(&mut engines, &windows.window(i), &mut |rows, targets| {
            let Some((reference, rows)) = rows.split_last() else { return Ok(()) };
            divergences.iter_mut().zip(rows).try_for_each(|(d, rows)| d.add_rows(rows, reference, targets))
        })
        .map_err(|e| e.within(i))?;
        let means: Vec<f64> = divergences.iter().map(Divergence::mean).collect();
        progress(i + 1, &means);
    }
    let (windows, context) = (windows.count, windows.context);
    Ok(divergences.iter().map(|d| Comparison { windows, context, quality: d.quality() }).collect())
}

/// Takes the logits `[R, V]` of every model at R scored positions, and the R tokens that follow them.
type Sink<'a> = dyn FnMut(&[&[f32]], &[u32]) -> Result<()> + 'a;

/// Reads a window with every engine, in steps that suit them all, and hands on the logits of its second half.
fn read_window(engines: &mut [Engine], tokens: &[u32], sink: &mut Sink<'_>) -> Result<()> {
    let scored = tokens.len() / 2..tokens.len() - 1;
    let step = engines.iter().map(|e| e.model().max_step_rows()).min().unwrap_or(1).max(1);
    let mut batch = StepBatch::with_capacity(step);
    let mut sequences = Vec::with_capacity(engines.len());
    for engine in engines.iter_mut() {
        sequences.push(engine.add_sequence()?);
    }
    for start in (0..tokens.len()).step_by(step) {
        let end = (start + step).min(tokens.len());
        let (from, to) = (start.max(scored.start), end.min(scored.end));
        let mut logits: Vec<&[f32]> = Vec::with_capacity(engines.len());
        for (engine, sequence) in engines.iter_mut().zip(&sequences) {
            batch.clear();
            for (i, token) in (start..end).zip(&tokens[start..end]) {
                // Programs need not work without any row.
                let wanted = (from..to).contains(&i) || (from >= to && i + 1 == end);
                batch.push(*sequence, *token, wanted);
            }
            logits.push(engine.step(&batch)?);
        }
        if from < to {
            sink(&logits, &tokens[from + 1..=to])?;
        }
    }
    for (engine, sequence) in engines.iter_mut().zip(sequences) {
        engine.remove(sequence);
    }
    Ok(())
}
