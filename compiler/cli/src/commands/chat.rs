//! `attar chat FILE`: a conversation in the terminal.

use crate::failure::{Failure, Result};
use crate::generation::{OpenArgs, SamplingArgs, summary};
use crate::interrupt::{cancel_on_ctrl_c, generation_ended};
use crate::terminal::Terminal;
use attar_runtime::{Control, FinishReason, Message, SessionOptions};
use clap::Args;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(after_help = "In the conversation:
  /reset   forget everything said so far
  /exit    end (also: end of input)
  Ctrl-C   ends the answer being written; otherwise the program, with exit code 130

Examples:
  attar chat model.attar
  attar chat model.attar --system 'Answer in one sentence.' --temperature 0
  echo 'What is a harbour?' | attar chat model.attar --quiet")]
pub struct Chat {
    /// The artifact
    file: PathBuf,
    /// A first message that says how to answer
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of one answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    open: OpenArgs,
}

impl Chat {
    /// Talks until the input ends.
    ///
    /// # Errors
    /// Those of opening and running the artifact.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let model = self.open.open(&self.file)?;
        let template = model.chat_template()?;
        let tokenizer = model.tokenizer()?;
        let mut session = model.session(&SessionOptions { context: self.sampling.context })?;
        let opening: Vec<Message> = self.system.iter().map(|s| Message::new("system", s)).collect();
        let mut messages = opening.clone();
        let input = std::io::stdin();
        let interactive = input.is_terminal();
        terminal.note(format!("{} on {}; /exit ends", model.manifest().model.name, model.target()));
        loop {
            if interactive {
                terminal.stream("> ")?;
            }
            let mut line = String::new();
            if input.lock().read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim() {
                "" => continue,
                "/exit" => return Ok(()),
                "/reset" => {
                    messages.clone_from(&opening);
                    terminal.note("forgotten");
                    continue;
                }
                command if command.starts_with('/') => {
                    terminal.note(format!("{command}: unknown; there are /reset and /exit"));
                    continue;
                }
                text => messages.push(Message::new("user", text)),
            }
            // The beginning that earlier turns share with this one is still in the KV cache.
            let prompt = tokenizer.encode(&template.render(&messages, true)?, false)?;
            let options = self.sampling.options(self.max_tokens, 0.7, cancel_on_ctrl_c()?);
            let mut written = Ok(());
            let result = session.generate(&prompt, &options, |piece| {
                written = terminal.stream(piece.text);
                if written.is_ok() { Control::Continue } else { Control::Stop }
            });
            generation_ended();
            written?;
            let generation = match result {
                Ok(generation) => generation,
                // A full context ends the turn, not the program.
                Err(e) if interactive => {
                    messages.pop();
                    terminal.note(format!("{}; /reset starts over", Failure::from(e)));
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            terminal.line("")?;
            terminal.note(summary(&generation));
            if generation.finish == FinishReason::Context {
                terminal.note("the context is full; /reset starts over");
            }
            messages.push(Message::new("assistant", generation.text));
        }
    }
}
