//! `attar passes`: the passes a recipe may name, with their options.

use crate::failure::{Failure, Result};
use crate::plugins::PluginArgs;
use crate::terminal::{Terminal, table};
use attar_compiler::registry_with;
use attar_pass::{OptionDecl, OptionKind, PassDecl};
use clap::Args;
use serde_json::{Value, json};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  attar passes
  attar passes quantize-rtn
  attar passes --plugin ./libmine.so
  attar passes --json | jq '.[] | .name'")]
pub struct Passes {
    /// Show only this pass, with its options
    name: Option<String>,
    /// Print declarations and option schemas as JSON
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print the reference that is checked in as docs/passes.md
    #[arg(long, conflicts_with = "name")]
    markdown: bool,
    #[command(flatten)]
    plugins: PluginArgs,
}

impl Passes {
    /// Prints what is registered.
    ///
    /// # Errors
    /// An input failure when no pass has the name.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let registry = registry_with(&self.plugins.load(terminal)?)?;
        let chosen: Vec<&'static PassDecl> = match &self.name {
            None => registry.all().to_vec(),
            Some(name) => vec![registry.find(name)?],
        };
        if self.markdown {
            return terminal.line(attar_pass::reference_markdown(&chosen).trim_end());
        }
        if self.json {
            return terminal.json(&chosen.iter().map(|d| schema(d)).collect::<Vec<_>>());
        }
        match (&self.name, chosen.as_slice()) {
            (Some(_), [pass]) => terminal.line(describe(pass)),
            (Some(name), _) => Err(Failure::bug(format!("{name} was found but not chosen"))),
            _ => terminal.line(overview(&chosen)),
        }
    }
}

fn overview(passes: &[&'static PassDecl]) -> String {
    let mut rows = vec![["PASS", "PHASE", "NUMERICS", "WHAT"].map(str::to_owned).to_vec()];
    for d in passes {
        rows.push([d.name, d.phase.name(), d.numerics.name(), d.summary].map(str::to_owned).to_vec());
    }
    table(&rows)
}

fn describe(d: &PassDecl) -> String {
    let mut out = format!("{} ({}, {}): {}\n", d.name, d.phase, d.numerics.name(), d.summary);
    out.push_str(&format!("defined in {}\n", d.file));
    let mut rows = vec![["OPTION", "VALUES", "DEFAULT", "MEANING"].map(str::to_owned).to_vec()];
    if d.takes_tensors {
        rows.push(
            ["tensors", "list of globs", "[\"*\"]", "weights the pass concerns"].map(str::to_owned).to_vec(),
        );
        rows.push(["exclude", "list of globs", "[]", "weights it leaves alone"].map(str::to_owned).to_vec());
    }
    for o in d.options {
        let default = o.default().map_or("required".to_owned(), |v| attar_pass::to_toml(&v));
        rows.push(vec![o.name.to_owned(), o.allowed(), default, o.doc.to_owned()]);
    }
    if rows.len() > 1 {
        out.push_str(&table(&rows));
    }
    out.trim_end().to_owned()
}

fn schema(d: &PassDecl) -> Value {
    json!({
        "name": d.name,
        "summary": d.summary,
        "phase": d.phase,
        "numerics": d.numerics,
        "takes_tensors": d.takes_tensors,
        "file": d.file,
        "options": d.options.iter().map(option_schema).collect::<Vec<_>>(),
    })
}

/// One option, in the vocabulary of JSON Schema.
fn option_schema(o: &OptionDecl) -> Value {
    let mut schema = match o.kind {
        OptionKind::Bool { .. } => json!({ "type": "boolean" }),
        OptionKind::Int { min, max, .. } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        OptionKind::Float { min, max, .. } => json!({ "type": "number", "minimum": min, "maximum": max }),
        OptionKind::Choice { of, .. } => json!({ "type": "string", "enum": of }),
        OptionKind::Text { .. } => json!({ "type": "string" }),
    };
    schema["name"] = json!(o.name);
    schema["description"] = json!(o.doc);
    match o.default() {
        Some(default) => schema["default"] = json!(default),
        None => schema["required"] = json!(true),
    }
    schema
}
