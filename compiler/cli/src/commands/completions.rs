//! `attar completions SHELL`: prints a completion script.

use crate::Cli;
use crate::failure::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  attar completions bash > ~/.local/share/bash-completion/completions/attar
  attar completions zsh > ~/.zfunc/_attar
  attar completions fish > ~/.config/fish/completions/attar.fish")]
pub struct Completions {
    /// The shell to write for
    shell: Shell,
}

impl Completions {
    /// Prints the script.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn run(&self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "attar", &mut script);
        Ok(std::io::Write::write_all(&mut std::io::stdout().lock(), &script)?)
    }
}
