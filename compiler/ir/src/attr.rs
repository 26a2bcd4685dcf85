//! Attributes of ops, as the text form writes them: `{eps = 1e-5, heads = 9}`.

use crate::error::{Error, ErrorKind, Result};

/// Largest integer attribute, so that sums and products of a few of them can be checked in 64 bits.
const MAX_INT: i64 = 1 << 40;

/// One attribute value.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    Bool(bool),
    Int(i64),
    /// Printed so that parsing gives the same bits.
    Float(f64),
    Str(String),
    Floats(Vec<f64>),
    Dims(Vec<crate::Dim>),
}

/// Attributes in the order the op declares them.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Attrs {
    /// The op they belong to, for messages.
    pub op: String,
    pub list: Vec<(String, Attr)>,
}

impl Attrs {
    pub fn new(op: &str) -> Attrs {
        Attrs { op: op.to_owned(), list: Vec::new() }
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: Attr) -> Attrs {
        self.list.push((name.to_owned(), value));
        self
    }

    /// Adds `name = true`, or nothing.
    #[must_use]
    pub fn flag(self, name: &str, on: bool) -> Attrs {
        if on { self.with(name, Attr::Bool(true)) } else { self }
    }

    fn take(&mut self, name: &str) -> Option<Attr> {
        let at = self.list.iter().position(|(n, _)| n == name)?;
        Some(self.list.remove(at).1)
    }

    fn error(&self, name: &str, problem: &str) -> Error {
        Error::new(ErrorKind::Attribute {
            op: self.op.clone(),
            name: name.to_owned(),
            problem: problem.to_owned(),
        })
    }

    /// Takes a non-negative integer.
    pub fn take_usize(&mut self, name: &str) -> Result<usize> {
        match self.take(name) {
            Some(Attr::Int(v)) if (0..=MAX_INT).contains(&v) => Ok(v as usize),
            Some(_) => Err(self.error(name, "expected an integer from 0 to 2^40")),
            None => Err(self.error(name, "missing")),
        }
    }

    /// Takes an integer that may be absent.
    pub fn take_opt_usize(&mut self, name: &str) -> Result<Option<usize>> {
        if self.list.iter().any(|(n, _)| n == name) { self.take_usize(name).map(Some) } else { Ok(None) }
    }

    /// Takes a number.
    pub fn take_f64(&mut self, name: &str) -> Result<f64> {
        match self.take(name) {
            Some(Attr::Float(v)) => Ok(v),
            Some(Attr::Int(v)) => Ok(v as f64),
            Some(_) => Err(self.error(name, "expected a number")),
            None => Err(self.error(name, "missing")),
        }
    }

    /// Takes a flag; absent means false.
    pub fn take_flag(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            Some(Attr::Bool(v)) => Ok(v),
            Some(_) => Err(self.error(name, "expected true or false")),
            None => Ok(false),
        }
    }

    /// Takes a text.
    pub fn take_str(&mut self, name: &str) -> Result<String> {
        match self.take(name) {
            Some(Attr::Str(v)) => Ok(v),
            Some(_) => Err(self.error(name, "expected a string")),
            None => Err(self.error(name, "missing")),
        }
    }

    /// Takes a list of numbers.
    pub fn take_floats(&mut self, name: &str) -> Result<Vec<f64>> {
        match self.take(name) {
            Some(Attr::Floats(v)) => Ok(v),
            // `[1, 2]` reads as a shape: the text form cannot know which is meant.
            Some(Attr::Dims(d)) if d.iter().all(|d| d.fixed().is_some()) => {
                Ok(d.into_iter().filter_map(|d| d.fixed()).map(|n| n as f64).collect())
            }
            Some(_) => Err(self.error(name, "expected a list of numbers")),
            None => Err(self.error(name, "missing")),
        }
    }

    /// Takes a shape.
    pub fn take_dims(&mut self, name: &str) -> Result<Vec<crate::Dim>> {
        match self.take(name) {
            Some(Attr::Dims(v)) => Ok(v),
            Some(_) => Err(self.error(name, "expected a shape")),
            None => Err(self.error(name, "missing")),
        }
    }

    /// Checks that nothing is left: every attribute given was known.
    pub fn finish(self) -> Result<()> {
        match self.list.first() {
            None => Ok(()),
            Some((name, _)) => Err(self.error(name, "no such attribute")),
        }
    }
}
