//! Recipes: an ordered list of passes with options and tensor globs, in TOML.
//!
//! ```toml
//! [[pass]]
//! name = "quantize-rtn"
//! tensors = ["model.layers.*"]
//! exclude = ["*.down_proj.weight"]
//! format = "n4"
//! ```
//!
//! `tensors` and `exclude` are globs over weight names; every other key is an option of the pass. Everything is
//! checked on reading. A table `[made]` is passed over. [`Recipe::to_toml`] writes all defaults out: that text is kept in the artifact.

use crate::decl::{Options, Value, to_toml};
use crate::error::{Error, ErrorKind, Result, nearest};
use crate::globs::TensorGlobs;
use crate::manager::Step;
use crate::registry::Registry;
use attar_ir::Graph;
use std::fmt::Write;
use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// A checked recipe.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Recipe {
    pub steps: Vec<Step>,
}

/// A table that artifacts put before their recipe, to say how they were made. It is not read here.
const MADE: &str = "made";

const STEP_KEYS: [&str; 3] = ["name", "tensors", "exclude"];

impl Recipe {
    /// Reads a recipe. `file` is what messages call the text.
    ///
    /// # Errors
    /// [`ErrorKind::Syntax`], [`ErrorKind::RecipeKey`], [`ErrorKind::UnknownPass`], [`ErrorKind::GlobSyntax`],
    /// [`ErrorKind::TakesNoTensors`], [`ErrorKind::PhaseOrder`] and those of [`Options::new`], each with line
    /// and column.
    pub fn parse(text: &str, file: &str, registry: &Registry) -> Result<Recipe> {
        parse(text, registry).map_err(|e| e.in_file(file))
    }

    /// Checks that every glob matches a weight of the graph.
    ///
    /// # Errors
    /// [`ErrorKind::GlobMatchesNothing`] with the pass and the nearest name.
    pub fn check_tensors(&self, graph: &Graph) -> Result<()> {
        let weights = crate::graph_weights(graph);
        let names: Vec<&str> = weights.iter().map(|s| &*s.name).collect();
        self.steps.iter().try_for_each(|s| s.tensors.check(&names).map_err(|e| e.in_pass(s.decl.name)))
    }

    /// The recipe with every option written out; the same recipe always gives the same text.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        for (i, step) in self.steps.iter().enumerate() {
            if i > 0 {
                out.push('\n');
            }
            let _ = write!(out, "[[pass]]\nname = {}\n", quoted(step.decl.name));
            if step.decl.takes_tensors {
                let _ = writeln!(out, "tensors = {}", list(step.tensors.include()));
                let _ = writeln!(out, "exclude = {}", list(step.tensors.exclude()));
            }
            for (name, value) in step.options.values() {
                let _ = writeln!(out, "{name} = {}", to_toml(value));
            }
        }
        out
    }
}

fn quoted(text: &str) -> String {
    to_toml(&Value::Text(text.to_owned()))
}

fn list<'a>(items: impl Iterator<Item = &'a str>) -> String {
    format!("[{}]", items.map(quoted).collect::<Vec<_>>().join(", "))
}

/// Line and column, from 1, of a byte offset; columns count characters.
fn line_of(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn key_error(key: &str, problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::RecipeKey { key: key.to_owned(), problem: problem.into(), nearest: None })
}

fn parse(text: &str, registry: &Registry) -> Result<Recipe> {
    let at = |span: Range<usize>| line_of(text, span.start);
    let root = DeTable::parse(text).map_err(|e| {
        let error = Error::new(ErrorKind::Syntax { problem: e.message().to_owned() });
        match e.span() {
            Some(span) => error.at_line(at(span)),
            None => error,
        }
    })?;
    let mut recipe = Recipe::default();
    for (key, value) in root.get_ref() {
        if key.get_ref() == MADE {
            continue;
        }
        if key.get_ref() != "pass" {
            let near = nearest(key.get_ref(), ["pass"]);
            let kind = ErrorKind::RecipeKey {
                key: key.get_ref().to_string(),
                problem: "a recipe holds only [[pass]] tables".to_owned(),
                nearest: near,
            };
            return Err(Error::new(kind).at_line(at(key.span())));
        }
        let DeValue::Array(tables) = value.get_ref() else {
            return Err(
                key_error("pass", "must be an array of tables: write [[pass]]").at_line(at(key.span()))
            );
        };
        for table in tables.iter() {
            let line = at(table.span());
            let DeValue::Table(table) = table.get_ref() else {
                return Err(key_error("pass", "must be an array of tables: write [[pass]]").at_line(line));
            };
            let step = parse_step(text, table, registry).map_err(|e| e.at_line(line))?;
            if let Some(last) = recipe.steps.last()
                && last.decl.phase > step.decl.phase
            {
                let kind = ErrorKind::PhaseOrder {
                    pass: step.decl.name,
                    phase: step.decl.phase.name(),
                    after: last.decl.name,
                    after_phase: last.decl.phase.name(),
                };
                return Err(Error::new(kind).at_line(line));
            }
            recipe.steps.push(step);
        }
    }
    Ok(recipe)
}

fn parse_step(text: &str, table: &DeTable<'_>, registry: &Registry) -> Result<Step> {
    let at = |span: Range<usize>| line_of(text, span.start);
    let Some(name) = table.get("name") else {
        return Err(key_error("name", "every [[pass]] needs the name of a pass"));
    };
    let DeValue::String(pass) = name.get_ref() else {
        return Err(key_error("name", "must be a string").at_line(at(name.span())));
    };
    let decl = registry.find(pass).map_err(|e| e.at_line(at(name.span())))?;

    let globs = |key: &str, default: &[&str]| -> Result<Vec<String>> {
        let Some(value) = table.get(key) else {
            return Ok(default.iter().map(|s| (*s).to_owned()).collect());
        };
        let line = at(value.span());
        if !decl.takes_tensors {
            return Err(Error::new(ErrorKind::TakesNoTensors { pass: decl.name }).at_line(line));
        }
        let DeValue::Array(items) = value.get_ref() else {
            return Err(key_error(key, "must be a list of globs").at_line(line));
        };
        let mut globs = Vec::with_capacity(items.len());
        for item in items.iter() {
            let DeValue::String(glob) = item.get_ref() else {
                return Err(key_error(key, "must be a list of globs").at_line(at(item.span())));
            };
            TensorGlobs::new(&[glob.to_string()], &[]).map_err(|e| e.at_line(at(item.span())))?;
            globs.push(glob.to_string());
        }
        if globs.is_empty() && !default.is_empty() {
            return Err(
                key_error(key, "is empty, so the pass would do nothing; remove the pass").at_line(line)
            );
        }
        Ok(globs)
    };
    let tensors = TensorGlobs::new(&globs("tensors", &["*"])?, &globs("exclude", &[])?)?;

    let mut given = Vec::new();
    for (key, value) in table {
        if STEP_KEYS.contains(&key.get_ref().as_ref()) {
            continue;
        }
        let value_of = || -> Result<Value> {
            let value = option_value(key.get_ref(), value.get_ref())?;
            Options::check_one(decl, key.get_ref(), value)
        };
        let value = value_of().map_err(|e| {
            let span =
                if matches!(*e.kind, ErrorKind::UnknownOption { .. }) { key.span() } else { value.span() };
            e.at_line(at(span))
        })?;
        given.push((key.get_ref().to_string(), value));
    }
    Ok(Step { decl, options: Options::new(decl, &given)?, tensors })
}

fn option_value(key: &str, value: &DeValue<'_>) -> Result<Value> {
    Ok(match value {
        DeValue::String(s) => Value::Text(s.to_string()),
        DeValue::Boolean(b) => Value::Bool(*b),
        DeValue::Integer(i) => {
            let digits = i.as_str().replace('_', "");
            let parsed = i64::from_str_radix(&digits, i.radix());
            Value::Int(parsed.map_err(|_| key_error(key, "the integer does not fit in 64 bits"))?)
        }
        DeValue::Float(f) => {
            let parsed = f.as_str().replace('_', "").parse();
            Value::Float(parsed.map_err(|_| key_error(key, "not a number"))?)
        }
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => {
            return Err(key_error(key, "options are strings, numbers, true or false"));
        }
    })
}
