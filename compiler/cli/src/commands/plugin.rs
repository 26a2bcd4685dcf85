//! `attar plugin`: begin a plugin, and check one.

use crate::failure::{Failure, Result};
use crate::plugin_check;
use crate::scaffold;
use crate::terminal::Terminal;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(
    after_help = "A plugin is a shared library with passes of your own; docs/plugins.md is a tutorial. Plugins are \
native code: whoever loads one trusts it.

Examples:
  attar plugin new mine
  attar plugin check target/release/libmine.so
  attar compile smollm2-135m --plugin ./libmine.so --pass mine --quantize n4 -o smollm2.attar"
)]
pub struct Plugin {
    #[command(subcommand)]
    command: PluginCommand,
}

/// What is done about plugins.
#[derive(Subcommand, Debug)]
enum PluginCommand {
    /// Make a folder with a plugin that works, to go on from
    New(New),
    /// Load a plugin and try its passes on small models, in order and out of it
    Check(Check),
    /// Print the BLAKE3 hash of a library, for --allow-plugins; does not load it
    Hash(Hash),
}

#[derive(Args, Debug)]
struct Hash {
    /// The library
    library: PathBuf,
}

#[derive(Args, Debug)]
struct New {
    /// Name of the plugin, its folder and its pass: lower-case letters, digits and dashes
    name: String,
    /// Use the attar-plugin in this folder instead of a copy of this version's
    #[arg(long, value_name = "DIR")]
    sdk: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct Check {
    /// The library
    library: PathBuf,
    /// Options of a pass that has no defaults, or others than the defaults: NAME=option:value,…
    #[arg(long = "pass", value_name = "NAME=OPTIONS")]
    passes: Vec<String>,
    /// Leave valgrind out, though it is there
    #[arg(long)]
    no_valgrind: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Only run the passes where there is no run, and print those that do not notice: what the kit does in a process of its own
    #[arg(long, hide = true)]
    astray: bool,
}

impl Plugin {
    /// Runs the command.
    ///
    /// # Errors
    /// An input failure when the name will not do, or the plugin does not pass.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        match &self.command {
            PluginCommand::New(new) => {
                let folder = scaffold::create(&new.name, new.sdk.as_deref())?;
                let (name, library) = (folder.display(), scaffold::library_file(&new.name));
                terminal.line(format_args!(
                    "made {name}; go on with\n  cd {name}\n  cargo test\n  cargo build --release\n  attar plugin check \
                     target/release/{library}"
                ))
            }
            PluginCommand::Hash(hash) => {
                terminal.line(attar_compiler::Plugin::hash(&hash.library).map_err(Failure::input)?)
            }
            PluginCommand::Check(check) if check.astray => {
                terminal.json(&attar_compiler::Plugin::run_astray(&check.library).map_err(Failure::input)?)
            }
            PluginCommand::Check(check) => {
                let report = plugin_check::check(&check.library, &check.passes, !check.no_valgrind)?;
                if check.json {
                    terminal.json(&report)?;
                } else {
                    terminal.line(report.render())?;
                }
                match report.failed() {
                    0 => Ok(()),
                    n => Err(Failure::input(format!("{n} checks of {} failed", check.library.display()))),
                }
            }
        }
    }
}
