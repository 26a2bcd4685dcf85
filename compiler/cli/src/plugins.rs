//! Plugins on the command line: which are loaded, and passes that are named beside a recipe.

use crate::failure::{Failure, Result};
use crate::terminal::Terminal;
use attar_compiler::{Plugin, registry, registry_with};
use attar_pass::{OptionKind, PassDecl, Recipe, Registry, Value, to_toml};
use clap::Args;
use std::fmt::Write;
use std::path::PathBuf;

/// Options of commands that load plugins.
#[derive(Args, Debug, Clone, Default)]
pub struct PluginArgs {
    /// A plugin to load: native code, which runs with all your rights
    #[arg(long = "plugin", value_name = "LIBRARY")]
    pub libraries: Vec<PathBuf>,
    /// BLAKE3 hashes that plugins may have; others are not loaded
    #[arg(long, value_name = "HASHES", value_delimiter = ',', requires = "libraries", value_parser = hash)]
    pub allow_plugins: Vec<String>,
}

impl PluginArgs {
    /// Loads the plugins, in order. Says which built-in passes they replace.
    ///
    /// # Errors
    /// An input failure for one that cannot be loaded or is not allowed.
    pub fn load(&self, terminal: Terminal) -> Result<Vec<Plugin>> {
        let allowed = (!self.allow_plugins.is_empty()).then_some(self.allow_plugins.as_slice());
        let built_in = registry()?;
        let mut plugins = Vec::with_capacity(self.libraries.len());
        for path in &self.libraries {
            let plugin = Plugin::load(path, allowed).map_err(Failure::input)?;
            for decl in plugin.passes.iter().filter(|d| built_in.find(d.name).is_ok()) {
                let library = path.display();
                terminal.note(format!("{} of {library} takes the place of the built-in pass", decl.name));
            }
            plugins.push(plugin);
        }
        Ok(plugins)
    }
}

fn hash(text: &str) -> std::result::Result<String, String> {
    let text = text.trim();
    if text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("expected 64 hexadecimal digits, as `attar plugin check` prints them".to_owned())
}

/// The steps that `--pass NAME=option:value,…` asks for.
///
/// # Errors
/// An input failure when there is no such pass or option, or a value does not suit it.
pub fn steps(passes: &[String], plugins: &[Plugin]) -> Result<Recipe> {
    let registry = registry_with(plugins)?;
    let mut recipe = Recipe::default();
    for pass in passes {
        let parsed = Recipe::parse(&toml_of(pass, &registry)?, &format!("--pass {pass}"), &registry)?;
        recipe.steps.extend(parsed.steps);
    }
    Ok(recipe)
}

/// The same passes as a recipe says them.
fn toml_of(pass: &str, registry: &Registry) -> Result<String> {
    let (name, options) = pass.split_once('=').unwrap_or((pass, ""));
    let decl = registry.find(name)?;
    let mut toml = format!("[[pass]]\nname = {}\n", quoted(name));
    let mut globs: [(&str, Vec<String>); 2] = [("tensors", Vec::new()), ("exclude", Vec::new())];
    for option in options.split(',').filter(|o| !o.is_empty()) {
        let Some((key, value)) = option.split_once(':') else {
            return Err(Failure::input(format!("--pass {pass}: {option}: expected OPTION:VALUE")));
        };
        if let Some((_, list)) = globs.iter_mut().find(|(k, _)| *k == key) {
            list.push(quoted(value));
            continue;
        }
        let _ = writeln!(toml, "{key} = {}", spelled(decl, key, value));
    }
    for (key, list) in globs.iter().filter(|(_, list)| !list.is_empty()) {
        let _ = writeln!(toml, "{key} = [{}]", list.join(", "));
    }
    Ok(toml)
}

/// A value as TOML: words get quotes, what should be a number or a flag stays as it is, so that the recipe's own checks see it.
fn spelled(decl: &PassDecl, key: &str, value: &str) -> String {
    let kind = decl.options.iter().find(|o| o.name == key).map(|o| o.kind);
    let fits = match kind {
        Some(OptionKind::Bool { .. }) => value.parse::<bool>().is_ok(),
        Some(OptionKind::Int { .. }) => value.parse::<i64>().is_ok(),
        Some(OptionKind::Float { .. }) => {
            // `.5` and `1.` are numbers to people, but not to TOML.
            return value.parse::<f64>().map_or_else(|_| quoted(value), |v| to_toml(&Value::Float(v)));
        }
        Some(OptionKind::Choice { .. } | OptionKind::Text { .. }) | None => false,
    };
    if fits { value.to_owned() } else { quoted(value) }
}

fn quoted(text: &str) -> String {
    to_toml(&Value::Text(text.to_owned()))
}

/// Both recipes' steps, by phase; within a phase those of `first` come first.
pub fn joined(first: Recipe, then: Recipe) -> Recipe {
    let mut steps = [first.steps, then.steps].concat();
    steps.sort_by_key(|s| s.decl.phase);
    Recipe { steps }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_become_steps() {
        let recipe =
            steps(&["prune-magnitude=pattern:2:4,sparsity:.25,tensors:a.*,tensors:b".to_owned()], &[]);
        let text = recipe.unwrap().to_toml();
        assert!(text.contains("pattern = \"2:4\"") && text.contains("sparsity = 0.25"), "{text}");
        assert!(text.contains("tensors = [\"a.*\", \"b\"]"), "{text}");
        let said = |pass: &str| steps(&[pass.to_owned()], &[]).unwrap_err().to_string();
        assert!(said("prune-magnitud").contains("did you mean prune-magnitude"));
        assert!(said("prune-magnitude=sparsity").contains("OPTION:VALUE"));
        assert!(said("prune-magnitude=sparsity:much").contains("option sparsity must be"));
        assert!(said("prune-magnitude=sparsty:0.5").contains("did you mean sparsity"));
        assert!(hash("ab").is_err() && hash(&"0F".repeat(32)).unwrap().starts_with("0f0f"));
    }
}
