//! `attar eval FILE --text F`: perplexity, by the protocol of llama-perplexity.

use crate::commands::run::read_text;
use crate::failure::Result;
use crate::generation::OpenArgs;
use crate::perplexity::{Perplexity, Windows, measure};
use crate::terminal::{Terminal, seconds_text};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Args, Debug)]
#[command(
    after_help = "The text is tokenized once and cut into windows of --context tokens; the second half of each window is scored,
from an empty cache. Figures compare with those of llama-perplexity at the same context.

Examples:
  attar eval model.attar --text wiki.valid.txt
  attar eval model.attar --text wiki.valid.txt --windows 20 --json"
)]
pub struct Eval {
    /// The artifact
    file: PathBuf,
    /// The text to predict
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
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
struct Report {
    model: String,
    target: String,
    threads: usize,
    text: String,
    text_tokens: usize,
    seconds: f64,
    #[serde(flatten)]
    result: Perplexity,
}

impl Eval {
    /// Measures and prints.
    ///
    /// # Errors
    /// Those of opening and running the artifact; an input failure when the text is too short.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let text = read_text(&self.text)?;
        let model = self.open.open(&self.file)?;
        let windows = Windows::new(&model, &text, self.context, self.windows)?;
        let bar = terminal.steps(windows.count() as u64, "windows");
        let start = Instant::now();
        let result = measure(&model, &windows, |done, so_far| {
            bar.set_position(done as u64);
            bar.set_prefix(format!("perplexity {so_far:.4}"));
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        if self.json {
            return terminal.json(&Report {
                model: model.manifest().model.name.clone(),
                target: model.target().to_owned(),
                threads: model.threads(),
                text: self.text.display().to_string(),
                text_tokens: windows.tokens().len(),
                seconds,
                result,
            });
        }
        terminal.note(format!(
            "{} windows of {} tokens, {} scores, {}",
            result.windows,
            result.context,
            result.scores,
            seconds_text(seconds)
        ));
        terminal.line(format_args!("perplexity {:.4} +/- {:.4}", result.perplexity, result.standard_error))
    }
}
