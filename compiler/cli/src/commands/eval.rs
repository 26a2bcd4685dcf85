//! `attar eval FILE --text F`: perplexity, and how far the model strays from a reference, as llama-perplexity measures both.

use crate::commands::run::read_text;
use crate::failure::{Failure, Result};
use crate::generation::OpenArgs;
use crate::quality;
use crate::terminal::{Terminal, bytes_text, seconds_text, table};
use attar_compiler::evaluate::{self, Comparison, Perplexity, Windows};
use attar_runtime::Model;
use clap::Args;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Args, Debug)]
#[command(
    after_help = "The text is tokenized once and cut into windows of --context tokens; the second half of each window is scored,
from an empty cache. Figures compare with those of llama-perplexity at the same context.

With --against, all models read the text side by side, and the reference reads it once for all of them. KLD is the
Kullback-Leibler divergence from the reference, in nats; Δp is the change of the probability of the token that really
follows. The reference should keep more of the checkpoint: compile it with --quantize f32 --kv f32.

Examples:
  attar eval model.attar --text wiki.valid.txt
  attar eval model.attar --text wiki.valid.txt --windows 20 --json
  attar eval model-n4.attar --against model-f32.attar --text wiki.valid.txt --windows 100
  attar eval small.attar large.attar --against model-f32.attar --text wiki.valid.txt"
)]
pub struct Eval {
    /// The artifact; several with --against
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
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
    /// Print the result as JSON: an object, or an array of them for several artifacts
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<R: Serialize> {
    file: String,
    bytes: u64,
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
    /// Those of opening and running the artifacts; an input failure when the text is too short, when the models do not
    /// read the same tokens, or when several artifacts have nothing to be compared with.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        if self.files.len() > 1 && self.against.is_none() {
            return Err(Failure::input(
                "several artifacts are compared with a reference: add --against FILE",
            ));
        }
        let text = read_text(&self.text)?;
        let models = self.files.iter().map(|file| self.open.open(file)).collect::<Result<Vec<Model>>>()?;
        let reference = self.against.as_ref().map(|file| self.open.open_reference(file)).transpose()?;
        let windows = Windows::new(&models[0], &text, self.context, self.windows)
            .map_err(|e| Failure::from(e).context(self.text.display().to_string()))?;
        let Some(reference) = reference else { return self.alone(&models[0], &windows, terminal) };
        for (model, file) in models.iter().zip(&self.files) {
            windows.check_reference(model, &reference, &text).map_err(|e| {
                let pair = format!("{}: --against", file.display());
                Failure::from(e).context(pair)
            })?;
        }
        self.compared(&models, &reference, &windows, terminal)
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
            return terminal.json(&self.report(&self.files[0], model, None, windows, seconds, result));
        }
        note(terminal, count, context, scores as u64, seconds);
        terminal.line(format_args!("perplexity {value:.4} +/- {error:.4}"))
    }

    fn compared(
        &self,
        models: &[Model],
        reference: &Model,
        windows: &Windows,
        terminal: Terminal,
    ) -> Result<()> {
        let bar = terminal.steps(windows.count() as u64, "windows");
        let start = Instant::now();
        let results = evaluate::compare(models, reference, windows, |done, so_far| {
            bar.set_position(done as u64);
            let so_far: Vec<String> = so_far.iter().map(|kld| format!("{kld:.5}")).collect();
            bar.set_prefix(format!("KLD {}", so_far.join(" ")));
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        if self.json {
            let reports = self.files.iter().zip(models).zip(results).map(|((file, model), result)| {
                self.report(file, model, Some(reference), windows, seconds, result)
            });
            let mut reports: Vec<Report<Comparison>> = reports.collect();
            return match reports.len() {
                1 => terminal.json(&reports.remove(0)),
                _ => terminal.json(&reports),
            };
        }
        note(terminal, windows.count(), windows.context(), results[0].quality.scores, seconds);
        match &results[..] {
            [one] => terminal.line(quality::table(&one.quality)),
            _ => terminal.line(self.side_by_side(&results)),
        }
    }

    /// A row for each artifact.
    fn side_by_side(&self, results: &[Comparison]) -> String {
        let heading = ["FILE", "SIZE", "PERPLEXITY", "RATIO", "KLD", "KLD 99 %", "TOP-1"];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        for (file, result) in self.files.iter().zip(results) {
            let q = &result.quality;
            rows.push(vec![
                file.display().to_string(),
                bytes_text(file_bytes(file)),
                format!("{:.4}", q.ppl),
                format!("{:.4}", q.ppl_ratio),
                format!("{:.5} +/- {:.5}", q.kld, q.kld_error),
                format!("{:.4}", q.kld_p99),
                format!("{:.2} %", 100.0 * q.top1),
            ]);
        }
        table(&rows)
    }

    fn report<R: Serialize>(
        &self,
        file: &Path,
        model: &Model,
        reference: Option<&Model>,
        windows: &Windows,
        seconds: f64,
        result: R,
    ) -> Report<R> {
        Report {
            file: file.display().to_string(),
            bytes: file_bytes(file),
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

/// 0 where the system does not say: the file was open a moment ago.
fn file_bytes(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |m| m.len())
}

fn note(terminal: Terminal, windows: usize, context: usize, scores: u64, seconds: f64) {
    let time = seconds_text(seconds);
    terminal.note(format!("{windows} windows of {context} tokens, {scores} scores, {time}"));
}
