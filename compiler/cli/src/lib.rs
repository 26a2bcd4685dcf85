//! The `attar` command: its arguments, its commands, its exit codes.
//!
//! Commands are thin: they read arguments, call the driver or the runtime, and report. What a program may read goes to
//! standard output (`--json`), everything else to standard error. Failures end with the exit code of their family
//! ([`Family`]).

pub mod calibration;
pub mod commands;
pub mod failure;
pub mod fetch;
pub mod generation;
pub mod home;
pub mod interrupt;
pub mod model;
pub mod plan;
pub mod plugin_check;
pub mod plugins;
pub mod profile;
pub mod quality;
mod remake;
pub mod report;
pub mod scaffold;
pub mod speed;
pub mod start_up;
pub mod terminal;

pub use failure::{Failure, Family, Result};

use clap::{Parser, Subcommand};
use commands::bench::Bench;
use commands::calibrate::Calibrate;
use commands::chat::Chat;
use commands::compile::Compile;
use commands::completions::Completions;
use commands::diff::Diff;
use commands::doctor::Doctor;
use commands::eval::Eval;
use commands::inspect::Inspect;
use commands::passes::Passes;
use commands::plan::Plan;
use commands::plugin::Plugin;
use commands::pull::Pull;
use commands::quickstart::Quickstart;
use commands::run::Run;
use std::process::ExitCode;
use terminal::Terminal;

#[derive(Parser, Debug)]
#[command(name = "attar", version, about = "Compiles language models into one file that runs by itself")]
#[command(
    after_help = "Exit codes: 0 done; 2 the model, a file or an option is wrong; 3 the machine or the network;
70 a bug in Attar; 130 cancelled.

Example:
  attar quickstart"
)]
pub struct Cli {
    /// No notes and no progress on standard error
    #[arg(long, short, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// The commands; each has a file of its name in `commands/`.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Get a small model, compile it, say how good and fast it is, and answer a prompt
    Quickstart(Quickstart),
    /// Fetch a checkpoint into the cache folder
    Pull(Pull),
    /// Turn a checkpoint into one artifact
    Compile(Compile),
    /// Gather statistics of a model's activations, for compiles to come
    Calibrate(Calibrate),
    /// Generate from a prompt
    Run(Run),
    /// Talk with a model in the terminal
    Chat(Chat),
    /// Show what is inside an artifact
    Inspect(Inspect),
    /// Measure perplexity on a text, and divergence from a reference
    Eval(Eval),
    /// Compare two artifacts
    Diff(Diff),
    /// Measure prompt and generation speed
    Bench(Bench),
    /// Say what a model would weigh and how fast it would be, before compiling it
    Plan(Plan),
    /// List the passes a recipe may name
    Passes(Passes),
    /// Begin a plugin, or check one
    Plugin(Plugin),
    /// Show what this machine supports
    Doctor(Doctor),
    /// Print a completion script for a shell
    Completions(Completions),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version go to standard output, usage errors to standard error; nobody is left to tell when
            // neither can be written.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if failure.family != Family::OutputClosed {
                Terminal { quiet: false }.note(&failure);
            }
            if failure.family == Family::Bug {
                Terminal { quiet: false }.note(BUG_NOTE);
            }
            ExitCode::from(failure.family.exit_code())
        }
    }
}

const BUG_NOTE: &str = "This is a fault of Attar, not of your input. Please report it with the command line, \
                        `attar --version` and `attar doctor`.";

/// Runs one command.
///
/// # Errors
/// The command's failure.
pub fn run(cli: &Cli) -> Result<()> {
    let terminal = Terminal { quiet: cli.quiet };
    match &cli.command {
        Command::Quickstart(c) => c.run(terminal),
        Command::Pull(c) => c.run(terminal),
        Command::Compile(c) => c.run(terminal),
        Command::Calibrate(c) => c.run(terminal),
        Command::Run(c) => c.run(terminal),
        Command::Chat(c) => c.run(terminal),
        Command::Inspect(c) => c.run(terminal),
        Command::Eval(c) => c.run(terminal),
        Command::Diff(c) => c.run(terminal),
        Command::Bench(c) => c.run(terminal),
        Command::Plan(c) => c.run(terminal),
        Command::Passes(c) => c.run(terminal),
        Command::Plugin(c) => c.run(terminal),
        Command::Doctor(c) => c.run(terminal),
        Command::Completions(c) => c.run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
