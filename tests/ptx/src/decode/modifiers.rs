//! Modifiers of an opcode. Each must be claimed: what an instruction does not know is an error, never ignored.

use crate::arith::small_float::Rounding;
use crate::error::ErrorKind;
use crate::types::Type;

pub(crate) struct Modifiers<'a> {
    parts: Vec<(&'a str, bool)>,
    spelling: String,
}

impl<'a> Modifiers<'a> {
    /// Of an opcode, whose first part is its root.
    pub(crate) fn of(opcode: &'a [String]) -> Modifiers<'a> {
        let parts = opcode.iter().skip(1).map(|p| (p.as_str(), false)).collect();
        Modifiers { parts, spelling: opcode.join(".") }
    }

    /// Whether the modifier is there.
    pub(crate) fn take(&mut self, name: &str) -> bool {
        match self.parts.iter_mut().find(|(part, used)| !used && *part == name) {
            Some((_, used)) => {
                *used = true;
                true
            }
            None => false,
        }
    }

    /// The first of these that is there.
    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(name, _)| self.take(name)).map(|(_, value)| *value)
    }

    /// Claims all that begin with `prefix`.
    pub(crate) fn take_prefix(&mut self, prefix: &str) -> bool {
        let mut found = false;
        for (part, used) in &mut self.parts {
            if !*used && part.starts_with(prefix) {
                *used = true;
                found = true;
            }
        }
        found
    }

    /// The next modifier not claimed that `parse` understands.
    pub(crate) fn parse<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        for (part, used) in &mut self.parts {
            if !*used && let Some(value) = parse(part) {
                *used = true;
                return Some(value);
            }
        }
        None
    }

    /// The next type, in the order of the text.
    pub(crate) fn ty(&mut self) -> Result<Type, ErrorKind> {
        self.parse(Type::parse).ok_or_else(|| self.unsupported("without a type"))
    }

    /// Rounding of a result; to nearest where none is said.
    pub(crate) fn rounding(&mut self) -> Rounding {
        self.one_of(&[
            ("rn", Rounding::Nearest),
            ("rz", Rounding::Zero),
            ("rm", Rounding::Down),
            ("rp", Rounding::Up),
        ])
        .unwrap_or(Rounding::Nearest)
    }

    pub(crate) fn unsupported(&self, why: &str) -> ErrorKind {
        ErrorKind::Unsupported(format!("{} {why}", self.spelling).trim_end().to_owned())
    }

    /// # Errors
    /// A modifier that nobody has claimed.
    pub(crate) fn finish(&self) -> Result<(), ErrorKind> {
        match self.parts.iter().find(|(_, used)| !used) {
            Some((part, _)) => Err(self.unsupported(&format!("(modifier .{part})"))),
            None => Ok(()),
        }
    }
}
