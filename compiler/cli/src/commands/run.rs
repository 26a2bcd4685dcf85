//! `attar run FILE`: generates from a prompt.

use crate::failure::{Failure, Result};
use crate::generation::{OpenArgs, SamplingArgs, TimingReport, summary};
use crate::interrupt::{cancel_on_ctrl_c, generation_ended};
use crate::terminal::Terminal;
use attar_runtime::{Control, FinishReason, Model, SessionOptions, top_logits};
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("input").required(true))]
#[command(
    after_help = "The prompt is taken as it is (a beginning-of-sequence token is put in front where the model asks for one);
the messages of --chat-json go through the model's chat template.

--json prints prompt_tokens and tokens (lists of ids), text, finish, top_logits (pairs of id and logit for the first
generated token, with --top-logits) and timings.

Examples:
  attar run model.attar --prompt 'The capital of France is'
  attar run model.attar --prompt-file story.txt --max-tokens 200 --temperature 0.8 --seed 1
  attar run model.attar --chat-json chat.json --json      (chat.json: [{\"role\": \"user\", \"content\": \"Hello\"}])
  attar run model.attar --prompt 'def f(x):' --top-logits 10 --json"
)]
pub struct Run {
    /// The artifact
    file: PathBuf,
    /// The prompt, as it is
    #[arg(long, value_name = "TEXT", group = "input")]
    prompt: Option<String>,
    /// A file with the prompt, taken as it is (`-`: standard input)
    #[arg(long, value_name = "FILE", group = "input")]
    prompt_file: Option<PathBuf>,
    /// A JSON file with a list of messages, each with role and content (`-`: standard input)
    #[arg(long, value_name = "FILE", group = "input")]
    chat_json: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Report this many of the largest logits of the first step
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_logits: usize,
    /// Go on after the model's end-of-text tokens
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    open: OpenArgs,
    /// Print one JSON object instead of streaming the text
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    model: String,
    target: String,
    threads: usize,
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    text: String,
    /// `stop`, `eos`, `length`, `context` or `cancelled`.
    finish: &'static str,
    /// `[id, logit]`, largest first.
    top_logits: Vec<(u32, f32)>,
    timings: TimingReport,
}

impl Run {
    /// Generates and prints.
    ///
    /// # Errors
    /// Those of opening and running the artifact; `Cancelled` after Ctrl-C.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let started = Instant::now();
        let model = self.open.open(&self.file)?;
        let open_seconds = started.elapsed().as_secs_f64();
        let prompt = self.prompt(&model)?;
        let mut session = model.session(&SessionOptions { context: self.sampling.context })?;
        let mut options = self.sampling.options(self.max_tokens, 0.0, cancel_on_ctrl_c()?);
        options.ignore_eos = self.ignore_eos;

        // The prompt is computed here and found again by `generate`, which so continues from these very logits.
        let mut logits = Vec::new();
        let mut prompt_time = None;
        if self.top_logits > 0 {
            let start = Instant::now();
            session.append(&prompt)?;
            prompt_time = Some(start.elapsed());
            logits = top_logits(session.logits(), self.top_logits);
        }
        let mut written = Ok(());
        let mut generation = session.generate(&prompt, &options, |piece| {
            if !self.json {
                written = terminal.stream(piece.text);
            }
            if written.is_ok() { Control::Continue } else { Control::Stop }
        })?;
        generation_ended();
        written?;
        if let Some(time) = prompt_time {
            let t = &mut generation.timings;
            (t.cached_tokens, t.prompt, t.first_token) = (0, time, t.first_token + time);
        }
        if self.json {
            terminal.json(&Report {
                model: model.manifest().model.name.clone(),
                target: model.target().to_owned(),
                threads: model.threads(),
                prompt_tokens: prompt,
                tokens: generation.tokens.clone(),
                text: generation.text.clone(),
                finish: generation.finish.name(),
                top_logits: logits,
                timings: TimingReport::new(open_seconds, &generation.timings),
            })?;
        } else {
            terminal.line("")?;
            for (id, logit) in logits {
                let token = model.tokenizer()?.token(id).unwrap_or_default();
                terminal.line(format_args!("{id:>8} {logit:>10.4}  {token}"))?;
            }
            terminal.note(summary(&generation));
        }
        if generation.finish == FinishReason::Cancelled {
            return Err(Failure { family: crate::Family::Cancelled, error: anyhow::anyhow!("by Ctrl-C") });
        }
        Ok(())
    }

    fn prompt(&self, model: &Model) -> Result<Vec<u32>> {
        let tokenizer = model.tokenizer()?;
        if let Some(file) = &self.chat_json {
            let messages = read_text(file)?;
            let text = model.chat_template()?.render_json(&messages, true)?;
            return Ok(tokenizer.encode(&text, false)?);
        }
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => read_text(file)?,
            (None, None) => return Err(Failure::input("give --prompt, --prompt-file or --chat-json")),
        };
        Ok(tokenizer.encode(&text, true)?)
    }
}

/// The text of a file, or of standard input for `-`.
///
/// # Errors
/// An input failure when it cannot be read or is no UTF-8.
pub fn read_text(file: &Path) -> Result<String> {
    let bytes = if file.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes)?;
        bytes
    } else {
        std::fs::read(file).map_err(|e| Failure::from(e).context(file.display().to_string()))?
    };
    String::from_utf8(bytes).map_err(|_| Failure::input(format!("{}: not UTF-8 text", file.display())))
}
