//! The declaration of a pass: from it follow the recipe's checks, `attar passes`, and the reference document.

use crate::context::Pass;
use crate::error::{Error, ErrorKind, Result};
use std::fmt;

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

/// What a pass may do to the values a graph computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// Bit for bit the same values.
    Exact,
    /// The same function of real numbers; operations may round differently.
    Rounding,
    /// Another function, close to the first.
    Lossy,
}

impl Numerics {
    /// Name as documents spell it.
    pub fn name(self) -> &'static str {
        match self {
            Numerics::Exact => "exact",
            Numerics::Rounding => "rounding",
            Numerics::Lossy => "lossy",
        }
    }
}

/// Everything that is known of a pass without running it.
///
/// Built-in passes are `static`s beside their code; a plugin host leaks one per loaded pass, since plugins stay
/// loaded for the life of the process.
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
    /// Builds the pass from checked options.
    pub make: &'static (dyn Fn(&Options) -> Result<Box<dyn Pass>> + Send + Sync),
}

impl fmt::Debug for PassDecl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassDecl")
            .field("name", &self.name)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

/// One option of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptionDecl {
    pub name: &'static str,
    pub kind: OptionKind,
    /// One sentence without a full stop.
    pub doc: &'static str,
}

/// Type, range and default of an option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptionKind {
    Bool {
        default: bool,
    },
    /// `min <= value <= max`.
    Int {
        default: i64,
        min: i64,
        max: i64,
    },
    /// `min <= value <= max`, finite.
    Float {
        default: f64,
        min: f64,
        max: f64,
    },
    /// One of a list of words; without a default the recipe must say which.
    Choice {
        default: Option<&'static str>,
        of: &'static [&'static str],
    },
    /// Any text of one line.
    Text {
        default: &'static str,
    },
}

/// Value of an option.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
}

impl Value {
    /// The value as a recipe writes it.
    pub fn to_toml(&self) -> String {
        match self {
            Value::Bool(v) => v.to_string(),
            Value::Int(v) => v.to_string(),
            Value::Float(v) => toml::Value::Float(*v).to_string(),
            Value::Str(v) => toml::Value::String(v.clone()).to_string(),
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Value::Bool(_) => "true or false",
            Value::Int(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Str(_) => "a string",
        }
    }
}

impl OptionDecl {
    /// The value a recipe leaves out; `None` when it must be given.
    pub fn default(&self) -> Option<Value> {
        match self.kind {
            OptionKind::Bool { default } => Some(Value::Bool(default)),
            OptionKind::Int { default, .. } => Some(Value::Int(default)),
            OptionKind::Float { default, .. } => Some(Value::Float(default)),
            OptionKind::Choice { default, .. } => default.map(|d| Value::Str(d.to_owned())),
            OptionKind::Text { default } => Some(Value::Str(default.to_owned())),
        }
    }

    /// What values are allowed, for documents and messages.
    pub fn allowed(&self) -> String {
        match self.kind {
            OptionKind::Bool { .. } => "true or false".to_owned(),
            OptionKind::Int { min, max, .. } => format!("an integer from {min} to {max}"),
            OptionKind::Float { min, max, .. } => format!("a number from {min} to {max}"),
            OptionKind::Choice { of, .. } => {
                let quoted: Vec<String> = of.iter().map(|w| format!("\"{w}\"")).collect();
                quoted.join(", ")
            }
            OptionKind::Text { .. } => "a text of one line".to_owned(),
        }
    }

    /// Checks type and range; an integer is accepted where a number is wanted.
    fn check(&self, pass: &'static str, value: Value) -> Result<Value> {
        let type_error = |got: &Value| {
            Err(Error::new(ErrorKind::OptionType {
                pass,
                option: self.name,
                expected: self.allowed(),
                got: got.type_name(),
            }))
        };
        let value_error = |got: String, nearest: Option<String>| {
            Err(Error::new(ErrorKind::OptionValue {
                pass,
                option: self.name,
                expected: self.allowed(),
                got,
                nearest,
            }))
        };
        match (self.kind, value) {
            (OptionKind::Bool { .. }, v @ Value::Bool(_)) => Ok(v),
            (OptionKind::Int { min, max, .. }, Value::Int(v)) => {
                if (min..=max).contains(&v) {
                    Ok(Value::Int(v))
                } else {
                    value_error(v.to_string(), None)
                }
            }
            (OptionKind::Float { min, max, .. }, Value::Int(v)) => {
                let v = v as f64;
                if (min..=max).contains(&v) { Ok(Value::Float(v)) } else { value_error(v.to_string(), None) }
            }
            (OptionKind::Float { min, max, .. }, Value::Float(v)) => {
                if (min..=max).contains(&v) {
                    Ok(Value::Float(v))
                } else {
                    value_error(v.to_string(), None)
                }
            }
            (OptionKind::Choice { of, .. }, Value::Str(v)) => {
                if of.contains(&v.as_str()) {
                    return Ok(Value::Str(v));
                }
                let nearest = crate::error::nearest(&v, of.iter().copied());
                value_error(format!("\"{v}\""), nearest)
            }
            (OptionKind::Text { .. }, Value::Str(v)) => {
                if v.contains(|c: char| c.is_control()) {
                    return value_error(format!("{v:?}"), None);
                }
                Ok(Value::Str(v))
            }
            (_, v) => type_error(&v),
        }
    }
}

/// A value for every option a pass declares, in declaration order.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pass: &'static str,
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
                Some((_, v)) => option.check(decl.name, v.clone())?,
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
        Ok(Options { pass: decl.name, values })
    }

    /// Checks one value, for errors that point at it.
    pub(crate) fn check_one(decl: &'static PassDecl, name: &str, value: Value) -> Result<Value> {
        Options::known(decl, name)?.check(decl.name, value)
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

    fn get(&self, name: &'static str) -> Result<&Value> {
        let found = self.values.iter().find(|(n, _)| *n == name).map(|(_, v)| v);
        found.ok_or_else(|| Error::new(ErrorKind::UndeclaredOption { pass: self.pass, option: name }))
    }

    /// Value of a declared [`OptionKind::Bool`].
    ///
    /// # Errors
    /// [`ErrorKind::UndeclaredOption`], a bug of the pass; so for the other getters.
    pub fn bool(&self, name: &'static str) -> Result<bool> {
        match self.get(name)? {
            Value::Bool(v) => Ok(*v),
            _ => Err(Error::new(ErrorKind::UndeclaredOption { pass: self.pass, option: name })),
        }
    }

    /// Value of a declared [`OptionKind::Int`].
    ///
    /// # Errors
    /// As [`Options::bool`].
    pub fn int(&self, name: &'static str) -> Result<i64> {
        match self.get(name)? {
            Value::Int(v) => Ok(*v),
            _ => Err(Error::new(ErrorKind::UndeclaredOption { pass: self.pass, option: name })),
        }
    }

    /// Value of a declared [`OptionKind::Float`].
    ///
    /// # Errors
    /// As [`Options::bool`].
    pub fn float(&self, name: &'static str) -> Result<f64> {
        match self.get(name)? {
            Value::Float(v) => Ok(*v),
            _ => Err(Error::new(ErrorKind::UndeclaredOption { pass: self.pass, option: name })),
        }
    }

    /// Value of a declared [`OptionKind::Choice`].
    ///
    /// # Errors
    /// As [`Options::bool`].
    pub fn choice(&self, name: &'static str) -> Result<&str> {
        match self.get(name)? {
            Value::Str(v) => Ok(v),
            _ => Err(Error::new(ErrorKind::UndeclaredOption { pass: self.pass, option: name })),
        }
    }
}
