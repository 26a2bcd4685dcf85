//! The declaration of a pass: from it follow the recipe's checks, `attar passes`, and the reference document.

use crate::context::PassCx;
use crate::error::{Error, ErrorKind, Result};
use attar_ir::Graph;
use std::fmt;

pub use attar_plugin::{Numerics, OptionDecl, OptionKind, OptionValue as Value};

/// Stages of a compile, in order. Nothing before `Lower` knows the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Checkpoint to graph.
    Import,
    /// Cleaning up without changing meaning.
    Canonicalize,
    /// Making weights smaller.
    Compress,
    /// Joining ops that one kernel can do.
    Fuse,
    /// Graph to programs of one target.
    Lower,
    /// Programs to machine code.
    Emit,
    /// Everything into one file.
    Package,
    /// Measuring how good the result is.
    Certify,
}

impl Phase {
    /// All phases, in the order they run.
    pub const ALL: [Phase; 8] = [
        Phase::Import,
        Phase::Canonicalize,
        Phase::Compress,
        Phase::Fuse,
        Phase::Lower,
        Phase::Emit,
        Phase::Package,
        Phase::Certify,
    ];

    /// Name as `--stop-after` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Import => "import",
            Phase::Canonicalize => "canonicalize",
            Phase::Compress => "compress",
            Phase::Fuse => "fuse",
            Phase::Lower => "lower",
            Phase::Emit => "emit",
            Phase::Package => "package",
            Phase::Certify => "certify",
        }
    }

    /// The phase of that name.
    pub fn by_name(name: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Everything that is known of a pass without running it.
///
/// Made once for each pass, linked in or of a loaded library, and kept for the life of the process.
pub struct PassDecl {
    /// Verb first, with dashes: `fuse-qkv`.
    pub name: &'static str,
    /// One sentence without a full stop.
    pub summary: &'static str,
    pub phase: Phase,
    pub numerics: Numerics,
    /// Whether a recipe may say which tensors the pass concerns (`tensors`, `exclude`).
    pub takes_tensors: bool,
    pub options: &'static [OptionDecl],
    /// Source file, from `file!()`.
    pub file: &'static str,
    /// Runs the pass with checked options. Every rewrite is asked for with [`PassCx::rewrite`] first.
    pub run: &'static RunFn,
}

/// What runs a pass.
pub type RunFn = dyn Fn(&Options, &mut Graph, &mut PassCx<'_>) -> Result<()> + Send + Sync;

impl fmt::Debug for PassDecl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassDecl")
            .field("name", &self.name)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

/// A value as a recipe writes it.
pub fn to_toml(value: &Value) -> String {
    match value {
        Value::Bool(v) => v.to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) => toml::Value::Float(*v).to_string(),
        Value::Text(v) => toml::Value::String(v.clone()).to_string(),
    }
}

/// Checks type and range; an integer is accepted where a number is wanted.
fn check(option: &OptionDecl, pass: &'static str, value: Value) -> Result<Value> {
    let expected = option.allowed();
    let wrong = |got: String, nearest: Option<String>| {
        let expected = option.allowed();
        Err(Error::new(ErrorKind::OptionValue { pass, option: option.name, expected, got, nearest }))
    };
    match (option.kind, value) {
        (OptionKind::Bool { .. }, v @ Value::Bool(_)) => Ok(v),
        (OptionKind::Int { min, max, .. }, Value::Int(v)) if (min..=max).contains(&v) => Ok(Value::Int(v)),
        (OptionKind::Int { .. }, Value::Int(v)) => wrong(v.to_string(), None),
        (OptionKind::Float { min, max, .. }, Value::Int(v)) if (min..=max).contains(&(v as f64)) => {
            Ok(Value::Float(v as f64))
        }
        (OptionKind::Float { .. }, Value::Int(v)) => wrong((v as f64).to_string(), None),
        (OptionKind::Float { min, max, .. }, Value::Float(v)) if (min..=max).contains(&v) => {
            Ok(Value::Float(v))
        }
        (OptionKind::Float { .. }, Value::Float(v)) => wrong(v.to_string(), None),
        (OptionKind::Choice { of, .. }, Value::Text(v)) if of.contains(&v.as_str()) => Ok(Value::Text(v)),
        (OptionKind::Choice { of, .. }, Value::Text(v)) => {
            let nearest = crate::error::nearest(&v, of.iter().copied());
            wrong(format!("\"{v}\""), nearest)
        }
        (OptionKind::Text { .. }, Value::Text(v)) if v.contains(|c: char| c.is_control()) => {
            wrong(format!("{v:?}"), None)
        }
        (OptionKind::Text { .. }, Value::Text(v)) => Ok(Value::Text(v)),
        (_, v) => {
            let got = match v {
                Value::Bool(_) => "true or false",
                Value::Int(_) => "an integer",
                Value::Float(_) => "a number",
                Value::Text(_) => "a string",
            };
            Err(Error::new(ErrorKind::OptionType { pass, option: option.name, expected, got }))
        }
    }
}

/// A value for every option a pass declares, in declaration order.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    values: Vec<(&'static str, Value)>,
}

impl Options {
    /// Checks given values against the declaration and adds the defaults.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownOption`], [`ErrorKind::OptionType`], [`ErrorKind::OptionValue`],
    /// [`ErrorKind::MissingOption`].
    pub fn new(decl: &'static PassDecl, given: &[(String, Value)]) -> Result<Options> {
        for (name, _) in given {
            Options::known(decl, name)?;
        }
        let mut values = Vec::with_capacity(decl.options.len());
        for option in decl.options {
            let value = match given.iter().find(|(n, _)| n == option.name) {
                Some((_, v)) => check(option, decl.name, v.clone())?,
                None => option.default().ok_or_else(|| {
                    Error::new(ErrorKind::MissingOption {
                        pass: decl.name,
                        option: option.name,
                        expected: option.allowed(),
                    })
                })?,
            };
            values.push((option.name, value));
        }
        Ok(Options { values })
    }

    /// Checks one value, for errors that point at it.
    pub(crate) fn check_one(decl: &'static PassDecl, name: &str, value: Value) -> Result<Value> {
        check(Options::known(decl, name)?, decl.name, value)
    }

    fn known(decl: &'static PassDecl, name: &str) -> Result<&'static OptionDecl> {
        decl.options.iter().find(|o| o.name == name).ok_or_else(|| {
            Error::new(ErrorKind::UnknownOption {
                pass: decl.name,
                name: name.to_owned(),
                nearest: crate::error::nearest(name, decl.options.iter().map(|o| o.name)),
                known: decl.options.iter().map(|o| o.name).collect(),
            })
        })
    }

    /// All values, in declaration order.
    pub fn values(&self) -> &[(&'static str, Value)] {
        &self.values
    }
}
