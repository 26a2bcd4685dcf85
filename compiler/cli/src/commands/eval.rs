//! `attar eval FILE --text F`: perplexity, and how far the model strays from a reference, as llama-perplexity measures both.

use crate::commands::run::read_text;
use crate::failure::{Failure, Result};
use crate::generation::OpenArgs;
use crate::quality;
use crate::terminal::{Terminal, seconds_text};
use attar_compiler::evaluate::{self, Comparison, Perplexity, Windows};
use attar_runtime::Model;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Args, Debug)]
#[command(
    after_help = "The text is tokenized once and cut into windows of --context tokens; the second half of each window is scored,
from an empty cache. Figures compare with those of llama-perplexity at the same context.

With --against, both models read the text side by side. KLD is the Kullback-Leibler divergence from the reference, in
nats; Δp is the change of the probability of the token that really follows. The reference should keep more of the
checkpoint: compile it with --quantize f32 --kv f32.

Examples:
  attar eval model.attar --text wiki.valid.txt
  attar eval model.attar --text wiki.valid.txt --windows 20 --json
  attar eval model-n4.attar --against model-f32.attar --text wiki.valid.txt --windows 100"
)]
pub struct Eval {
    /// The artifact
    file: PathBuf,
    /// The text to predict
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Compare with this artifact, the reference
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Most windows to score (default: all of the text)
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    #[command(flatten)]
    open: OpenArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<R: Serialize> {
    model: String,
    target: String,
    threads: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<Reference>,
    text: String,
    text_tokens: usize,
    seconds: f64,
    #[serde(flatten)]
    result: R,
}

/// The model that was compared with.
#[derive(Serialize)]
struct Reference {
    file: String,
    model: String,
    target: String,
}

impl Eval {
    /// Measures and prints.
    ///
    /// # Errors
    /// Those of opening and running the artifacts; an input failure when the text is too short, or when the models do not
    /// read the same tokens.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let text = read_text(&self.text)?;
        let model = self.open.open(&self.file)?;
        let reference = self.against.as_ref().map(|file| self.open.open_reference(file)).transpose()?;
        let windows = Windows::new(&model, &text, self.context, self.windows)
            .map_err(|e| Failure::from(e).context(self.text.display().to_string()))?;
        let Some(reference) = reference else { return self.alone(&model, &windows, terminal) };
        windows
            .check_reference(&model, &reference, &text)
            .map_err(|e| Failure::from(e).context("--against"))?;
        self.compared(&model, &reference, &windows, terminal)
    }

    fn alone(&self, model: &Model, windows: &Windows, terminal: Terminal) -> Result<()> {
        let bar = terminal.steps(windows.count() as u64, "windows");
        let start = Instant::now();
        let result: Perplexity = evaluate::perplexity(model, windows, |done, so_far| {
            bar.set_position(done as u64);
            bar.set_prefix(format!("perplexity {so_far:.4}"));
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        let (count, context, scores) = (result.windows, result.context, result.scores);
        let (value, error) = (result.perplexity, result.standard_error);
        if self.json {
            return terminal.json(&self.report(model, None, windows, seconds, result));
        }
        note(terminal, count, context, scores as u64, seconds);
        terminal.line(format_args!("perplexity {value:.4} +/- {error:.4}"))
    }

    fn compared(
        &self,
        model: &Model,
        reference: &Model,
        windows: &Windows,
        terminal: Terminal,
    ) -> Result<()> {
        let bar = terminal.steps(windows.count() as u64, "windows");
        let start = Instant::now();
        let result: Comparison = evaluate::compare(model, reference, windows, |done, so_far| {
            bar.set_position(done as u64);
            bar.set_prefix(format!("KLD {so_far:.5}"));
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        let quality = result.quality;
        if self.json {
            return terminal.json(&self.report(model, Some(reference), windows, seconds, result));
        }
        note(terminal, result.windows, result.context, quality.scores, seconds);
        terminal.line(quality::table(&quality))
    }

    fn report<R: Serialize>(
        &self,
        model: &Model,
        reference: Option<&Model>,
        windows: &Windows,
        seconds: f64,
        result: R,
    ) -> Report<R> {
        Report {
            model: model.manifest().model.name.clone(),
            target: model.target().to_owned(),
            threads: model.threads(),
            reference: reference.zip(self.against.as_ref()).map(|(m, file)| Reference {
                file: file.display().to_string(),
                model: m.manifest().model.name.clone(),
                target: m.target().to_owned(),
            }),
            text: self.text.display().to_string(),
            text_tokens: windows.tokens().len(),
            seconds,
            result,
        }
    }
}

fn note(terminal: Terminal, windows: usize, context: usize, scores: u64, seconds: f64) {
    let time = seconds_text(seconds);
    terminal.note(format!("{windows} windows of {context} tokens, {scores} scores, {time}"));
}
