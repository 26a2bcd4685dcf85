//! Types of values: an element and a shape whose dimensions are numbers or symbols.

use attar_format::{DType, FormatRef};
use std::fmt;

/// A dimension known only when a step runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sym {
    /// Tokens in this step.
    T,
    /// Rows whose logits are wanted.
    R,
    /// Context length.
    S,
}

impl Sym {
    pub const ALL: [Sym; 3] = [Sym::T, Sym::R, Sym::S];

    /// The letter of the text form.
    pub fn letter(self) -> &'static str {
        match self {
            Sym::T => "T",
            Sym::R => "R",
            Sym::S => "S",
        }
    }
}

/// One dimension of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    Fixed(usize),
    Sym(Sym),
}

impl Sym {
    /// The symbol of that letter.
    pub fn by_letter(letter: &str) -> Option<Sym> {
        Sym::ALL.into_iter().find(|s| s.letter() == letter)
    }
}

impl Dim {
    pub const T: Dim = Dim::Sym(Sym::T);
    pub const R: Dim = Dim::Sym(Sym::R);

    /// The number, if it is one.
    pub fn fixed(self) -> Option<usize> {
        match self {
            Dim::Fixed(n) => Some(n),
            Dim::Sym(_) => None,
        }
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Dim {
        Dim::Fixed(n)
    }
}

/// What a tensor's elements are: a plain type, or codes of a weight format. Where a name is both, it means the weight
/// format, except `f32`; [`Elem::coded`] and [`Elem::by_name`] keep to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elem {
    Plain(DType),
    /// Only weights have these; arithmetic sees their decoded values.
    Coded(FormatRef),
}

impl Elem {
    /// The element of weights stored in a format: codes, except that `f32` is just numbers.
    pub fn coded(format: FormatRef) -> Elem {
        if format.name == DType::F32.name() { Elem::F32 } else { Elem::Coded(format) }
    }

    pub const F32: Elem = Elem::Plain(DType::F32);
    pub const I32: Elem = Elem::Plain(DType::I32);

    /// Name as the text form spells it.
    pub fn name(self) -> &'static str {
        match self {
            Elem::Plain(d) => d.name(),
            Elem::Coded(f) => f.name,
        }
    }

    /// The element of that name.
    pub fn by_name(name: &str) -> Option<Elem> {
        let plain = || DType::ALL.into_iter().find(|d| d.name() == name).map(Elem::Plain);
        attar_format::by_name(name).map(Elem::coded).or_else(plain)
    }

    /// Whether the decoded values are real numbers.
    pub fn is_float(self) -> bool {
        match self {
            Elem::Plain(d) => d.is_float(),
            Elem::Coded(_) => true,
        }
    }
}

/// Type of a value: element and shape, outermost dimension first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    pub elem: Elem,
    pub shape: Vec<Dim>,
}

impl TensorType {
    pub fn new(elem: Elem, shape: impl IntoIterator<Item = Dim>) -> TensorType {
        TensorType { elem, shape: shape.into_iter().collect() }
    }

    /// An f32 value, which is what every activation is.
    pub fn f32(shape: impl IntoIterator<Item = Dim>) -> TensorType {
        TensorType::new(Elem::F32, shape)
    }

    pub fn i32(shape: impl IntoIterator<Item = Dim>) -> TensorType {
        TensorType::new(Elem::I32, shape)
    }

    /// Largest rank of any value: bounds what hostile text can make a graph hold.
    pub const MAX_RANK: usize = 8;

    /// Most elements of a value whose symbols are 1; sizes in bytes can then be computed in 64 bits.
    pub const MAX_ELEMENTS: usize = 1 << 48;

    /// Whether rank and size are within the bounds and no dimension is zero.
    pub fn is_bounded(&self) -> bool {
        let fixed = self.shape.iter().filter_map(|d| d.fixed());
        self.rank() <= Self::MAX_RANK
            && fixed
                .into_iter()
                .try_fold(1usize, |n, d| n.checked_mul(d).filter(|n| (1..=Self::MAX_ELEMENTS).contains(n)))
                .is_some()
    }

    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The innermost dimension, if it is a number.
    pub fn last(&self) -> Option<usize> {
        self.shape.last().and_then(|d| d.fixed())
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(n) => write!(f, "{n}"),
            Dim::Sym(s) => f.write_str(s.letter()),
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.elem.name())?;
        for (i, d) in self.shape.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}
