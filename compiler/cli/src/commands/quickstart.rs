//! `attar quickstart`: the main job on a small model, from nothing to an answer.

use crate::commands::compile::{compile, preset_recipe, render};
use crate::commands::pull::pull;
use crate::failure::{Failure, Result};
use crate::generation::{OpenArgs, summary};
use crate::home::{Home, make_folder};
use crate::interrupt::{cancel_on_ctrl_c, generation_ended};
use crate::quality;
use crate::speed::{self, Plan};
use crate::terminal::Terminal;
use attar_compiler::{Certify, CompileOptions, CompileReport, resolve_targets};
use attar_pass::Preset;
use attar_runtime::{Control, FinishReason, GenerateOptions, Message, Model, SessionOptions};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Instant;

const MODEL: &str = "smollm2-135m";

#[derive(Args, Debug)]
#[command(
    after_help = "Fetches SmolLM2-135M-Instruct (about 100 to 270 MB, once), compiles it with 4-bit weights, says what that did, how
good and how fast the result is, and answers a prompt.

Examples:
  attar quickstart
  attar quickstart --prompt 'Why is the sky blue?'"
)]
pub struct Quickstart {
    /// What to ask
    #[arg(long, default_value = "Give me three tips for learning to cook.")]
    prompt: String,
    /// Where to put the artifact (default: the cache folder)
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Threads to run with (default: as many as the process may use)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Quickstart {
    /// Runs through everything.
    ///
    /// # Errors
    /// Those of the commands it joins.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let started = Instant::now();
        let home = Home::from_env()?;
        terminal.line(format_args!("1. Getting {MODEL}"))?;
        let (checkpoint, pulled) = match home.find(MODEL) {
            Some(found) => found,
            None => pull(&home, MODEL, false, terminal)?,
        };
        terminal.line(format_args!("   {}\n   from {}", checkpoint.display(), pulled.source))?;

        let folder = home.root.join("quickstart");
        make_folder(&folder)?;
        let output = self.output.clone().unwrap_or_else(|| folder.join("smollm2-135m-n4.attar"));
        let open = OpenArgs {
            threads: self.threads,
            device: None,
            target: None,
            mmap: false,
            deterministic: false,
            require: Vec::new(),
        };
        terminal.line("\n2. Compiling it with 4-bit weights (--quantize n4 --target native)")?;
        let report = compiled(&checkpoint, &output, Preset::N4, terminal)?;
        terminal.line(indented(&render(&report)))?;

        terminal.line("\n3. How good it is")?;
        match (&report.certificate, &report.uncertified) {
            (Some(c), _) => terminal.line(indented(&format!(
                "{}\n\nThe compiler measured this on {} tokens of a built-in text, against {} weights, and wrote it into\n\
                 the artifact as its certificate. `attar eval FILE --against REFERENCE --text F` measures on a text of yours.",
                quality::table(&c.quality),
                c.quality.scores,
                c.reference
            )))?,
            (None, reason) => {
                terminal.line(format_args!("   not measured: {}", reason.as_deref().unwrap_or("no reason")))?;
            }
        }

        terminal.line("\n4. How fast it is")?;
        let model = open.open(&output)?;
        let spinner = terminal.spinner("measuring");
        let plan = Plan { prompt: 128, generate: 32, context: 0, batch: 1, repetitions: 3 };
        let speeds = speed::measure(&model, plan, |test| spinner.set_message(test.to_owned()))?;
        spinner.finish_and_clear();
        for s in &speeds {
            let what = if s.test.starts_with("pp") { "prompt" } else { "generation" };
            terminal.line(format_args!(
                "   {what}: {:.1} tokens/s ({}, {} threads, {}; median of {})",
                s.tokens_per_second,
                s.test,
                s.threads,
                model.target(),
                s.samples.len()
            ))?;
        }

        terminal.line(format_args!("\n5. An answer\n   > {}\n", self.prompt))?;
        self.answer(&model, terminal)?;
        let (seconds, path) = (started.elapsed().as_secs_f64(), output.display());
        terminal
            .line(format_args!("\nDone in {seconds:.0} s. The artifact is {path}\nNext: attar chat {path}"))
    }

    fn answer(&self, model: &Model, terminal: Terminal) -> Result<()> {
        let prompt = model.chat_template()?.render(&[Message::new("user", self.prompt.as_str())], true)?;
        let prompt = model.tokenizer()?.encode(&prompt, false)?;
        let cancel = cancel_on_ctrl_c()?;
        let options = GenerateOptions { max_tokens: Some(120), cancel, ..GenerateOptions::default() };
        let mut written = Ok(());
        let mut session = model.session(&SessionOptions { context: Some(prompt.len() + 120) })?;
        let generation = session.generate(&prompt, &options, |piece| {
            written = terminal.stream(piece.text);
            if written.is_ok() { Control::Continue } else { Control::Stop }
        })?;
        generation_ended();
        written?;
        terminal.line("")?;
        terminal.note(summary(&generation));
        if generation.finish == FinishReason::Cancelled {
            return Err(Failure { family: crate::Family::Cancelled, error: anyhow::anyhow!("by Ctrl-C") });
        }
        Ok(())
    }
}

fn compiled(checkpoint: &Path, output: &Path, preset: Preset, terminal: Terminal) -> Result<CompileReport> {
    let targets = resolve_targets(&["native"])?;
    let recipe = preset_recipe(preset)?;
    let options = CompileOptions::new(checkpoint.to_owned(), recipe, targets, output.to_owned());
    compile(CompileOptions { certify: Certify::BuiltIn, ..options }, terminal, false)
}

fn indented(text: &str) -> String {
    text.lines().map(|l| format!("   {l}")).collect::<Vec<_>>().join("\n")
}
