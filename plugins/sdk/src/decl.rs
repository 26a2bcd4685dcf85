//! What passes and formats say of themselves.

/// Everything that is known of a pass without running it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// Verb first, with dashes: `prune-magnitude`. Recipes call the pass so.
    pub name: &'static str,
    /// One sentence without a full stop.
    pub summary: &'static str,
    pub phase: Phase,
    pub numerics: Numerics,
    /// Whether a recipe may say which tensors the pass concerns (`tensors`, `exclude`).
    pub takes_tensors: bool,
}

/// Stages of a compile that a pass can belong to, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Cleaning up without changing meaning.
    Canonicalize,
    /// Making weights smaller.
    Compress,
    /// Joining ops that one kernel can do.
    Fuse,
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

/// Declaration of an option of a pass; [`options!`](macro@crate::options) makes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptionDecl {
    pub name: &'static str,
    /// The documentation of the field: one sentence without a full stop.
    pub doc: &'static str,
    pub kind: OptionKind,
}

impl OptionDecl {
    /// The value a recipe leaves out; `None` when it must be given.
    pub fn default(&self) -> Option<OptionValue> {
        match self.kind {
            OptionKind::Bool { default } => Some(OptionValue::Bool(default)),
            OptionKind::Int { default, .. } => Some(OptionValue::Int(default)),
            OptionKind::Float { default, .. } => Some(OptionValue::Float(default)),
            OptionKind::Choice { default, .. } => default.map(|d| OptionValue::Text(d.to_owned())),
            OptionKind::Text { default } => Some(OptionValue::Text(default.to_owned())),
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
pub enum OptionValue {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// The layout of a weight format. From it follow its packed size, the reference encoder and decoder, and the kernels of every
/// target. Matrices `[N, K]` are stored in it where K is a multiple of `group`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    /// Lower-case letters, digits and `_`; recipes and artifacts call the format so.
    pub name: &'static str,
    /// Where the idea comes from.
    pub source: &'static str,
    pub codes: Codes,
    /// Weights along K that share a scale: 32.
    pub group: usize,
    pub scale: Scale,
}

/// What one code of a format stands for, before scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// A signed byte in -127..=127.
    Int8,
    /// An index of 2 to 6 bits into a table of signed bytes, ascending and on both sides of zero. `shift` is what each step of
    /// a group's choice adds to every entry; 0 with [`Scale::Bf16`].
    Table { bits: usize, entries: &'static [i8], shift: i8 },
}

/// How the scales of a format are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// One bf16 per group: `w = scale * code`.
    Bf16,
    /// One f32 per row and one byte per group, `field = (s << choice_bits) | choice`:
    /// `w = row_scale * (s - bias) * (table[code] + choice * shift)`. `choice_bits` is 2, which is what kernels read.
    RowF32Field8 { bias: i32, choice_bits: u32 },
}
