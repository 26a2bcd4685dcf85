//! What a pass can ask for, as a trait with two implementations: over the compiler's own types, for passes that are linked
//! into it, and over the C interface ([`crate::remote`]), for those in shared libraries.
//!
//! Passes use [`Context`](crate::Context), which is safe and comfortable; this is what it stands on.

use crate::decl::Codes;
use crate::error::Result;

/// A node of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(pub(crate) u64);

/// One output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub(crate) u64);

impl Node {
    /// The number that stands for it in the C interface.
    pub fn number(self) -> u64 {
        self.0
    }

    /// From the number that stands for it in the C interface. The host checks it whenever it is used.
    pub fn from_number(number: u64) -> Node {
        Node(number)
    }
}

impl Value {
    /// The number that stands for it in the C interface.
    pub fn number(self) -> u64 {
        self.0
    }

    /// From the number that stands for it in the C interface. The host checks it whenever it is used.
    pub fn from_number(number: u64) -> Value {
        Value(number)
    }
}

/// One dimension of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    Fixed(usize),
    /// Tokens in this step, `T`.
    Tokens,
    /// Rows whose logits are wanted, `R`.
    Rows,
    /// Length of the context, `S`.
    Context,
}

impl From<usize> for Dim {
    fn from(n: usize) -> Dim {
        Dim::Fixed(n)
    }
}

/// Type of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    /// `f32`, `i32`, or the name of a weight format.
    pub elem: String,
    /// Outermost first.
    pub dims: Vec<Dim>,
}

impl Type {
    /// The innermost dimension, if it is a number.
    pub fn width(&self) -> Option<usize> {
        match self.dims.last() {
            Some(Dim::Fixed(n)) => Some(*n),
            _ => None,
        }
    }
}

/// Value of an attribute of an op, as the text form has them.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Floats(Vec<f64>),
    Dims(Vec<Dim>),
}

/// Attributes of a node, as nodes are added with: `cx.add(&info.op, &inputs, &borrowed(&cx.attrs(node)?))`.
pub fn borrowed(attrs: &[(String, Attr)]) -> Vec<(&str, Attr)> {
    attrs.iter().map(|(name, attr)| (name.as_str(), attr.clone())).collect()
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    pub op: String,
    pub name: String,
    /// The weight's name for a `weight` node, the custom op's for a `custom` node; else empty.
    pub target: String,
    pub inputs: usize,
    pub outputs: usize,
    pub attrs: usize,
}

/// What is known of a weight tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// `[N, K]` for matrices, `[D]` for vectors.
    pub shape: Vec<usize>,
    /// `f32` until a pass has encoded it, then the name of its format.
    pub elem: String,
    /// The type in the checkpoint.
    pub stored_as: String,
    /// Named in the recipe without a wildcard: then what cannot be done is to be an error.
    pub is_explicit: bool,
}

/// A measured value.
#[derive(Clone, Debug, PartialEq)]
pub enum Metric {
    Count(u64),
    Number(f64),
    Text(String),
}

/// How much a message matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Debug,
    Info,
    Warning,
}

/// A matrix `[n, k]` in a format's codes, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded<'a> {
    pub format: &'a str,
    pub n: usize,
    pub k: usize,
    /// `[n, k]`.
    pub codes: &'a [u8],
    /// `[n, k / group]`: the bits of a bf16, or a field byte.
    pub fields: &'a [u16],
    /// `[n]` in formats with scales of rows, else empty.
    pub row_scales: &'a [f32],
    /// The tensor's own table and shift; `None` for the format's default.
    pub table: Option<(&'a [i8], i8)>,
}

/// Layout of a weight format that the host knows.
#[derive(Clone, Debug, PartialEq)]
pub struct FormatInfo {
    pub name: String,
    pub source: String,
    /// Bits of a code.
    pub bits: usize,
    pub group: usize,
    pub kind: FormatKind,
    /// `bias` and `choice_bits` of formats with scales of rows and field bytes; `None` with bf16 scales or none.
    pub row_fields: Option<(i32, u32)>,
}

/// What codes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatKind {
    Float,
    Int8,
    Table { entries: Vec<i8>, shift: i8 },
}

impl From<Codes> for FormatKind {
    fn from(codes: Codes) -> FormatKind {
        match codes {
            Codes::Int8 => FormatKind::Int8,
            Codes::Table { entries, shift, .. } => FormatKind::Table { entries: entries.to_vec(), shift },
        }
    }
}

/// Memory of the host: valid until `buffer` is released or the run ends, and not changed until then.
#[derive(Clone, Copy, Debug)]
pub struct Held<T> {
    pub data: *const T,
    pub len: usize,
    pub buffer: u64,
}

/// Memory of the host that only the pass uses until it commits or releases it.
#[derive(Clone, Copy, Debug)]
pub struct HeldMut {
    pub data: *mut f32,
    pub len: usize,
    pub buffer: u64,
}

/// Statistics in memory of the host.
#[derive(Clone, Copy, Debug)]
pub struct HeldStatistics {
    pub n_tokens: u64,
    pub width: usize,
    /// `[width, width]`.
    pub second_moment: *const f32,
    /// `[width]`.
    pub minimum: *const f32,
    /// `[width]`.
    pub maximum: *const f32,
    pub buffer: u64,
}

/// What the C table offers, in Rust's types; see [`AttarHost`](crate::abi::AttarHost) for what each function does.
///
/// # Safety
/// Pointers that functions give must be valid for reads of `len` elements (of `width` and `width * width` in statistics), those
/// of [`HeldMut`] for writes too, until their buffer is released, committed, or the host is gone; and what they point to must
/// not change, or in a [`HeldMut`] not be looked at, by anybody else. [`Host::native`] must give `self` by its own type.
#[expect(missing_docs, reason = "each method is documented where the C table has it")]
pub unsafe trait Host {
    fn fail(&mut self, message: &str) -> Result<()>;
    fn log(&mut self, level: Level, message: &str) -> Result<()>;
    fn progress(&mut self, what: &str, done: u64, total: u64) -> Result<()>;
    fn metric(&mut self, subject: &str, values: &[(&str, Metric)]) -> Result<()>;
    fn rewrite(&mut self, site: &str) -> Result<bool>;
    fn seed(&mut self) -> Result<u64>;
    fn release(&mut self, buffer: u64) -> Result<()>;

    fn graph_text(&mut self) -> Result<String>;
    fn nodes(&mut self) -> Result<Vec<Node>>;
    fn inputs(&mut self) -> Result<Vec<Value>>;
    fn outputs(&mut self) -> Result<Vec<Value>>;
    fn set_outputs(&mut self, values: &[Value]) -> Result<()>;
    fn node_by_name(&mut self, name: &str) -> Result<Node>;
    fn node_info(&mut self, node: Node) -> Result<NodeInfo>;
    fn node_inputs(&mut self, node: Node) -> Result<Vec<Value>>;
    fn node_output(&mut self, node: Node, slot: usize) -> Result<Value>;
    fn node_attr(&mut self, node: Node, index: usize) -> Result<(String, Attr)>;
    fn value_node(&mut self, value: Value) -> Result<Node>;
    fn value_type(&mut self, value: Value) -> Result<Type>;
    fn value_uses(&mut self, value: Value) -> Result<Vec<(Node, usize)>>;
    fn add_node(&mut self, op: &str, name: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Node>;
    fn add_weight(&mut self, tensor: &str) -> Result<Value>;
    fn replace_uses(&mut self, old: Value, new: Value) -> Result<()>;
    fn remove_node(&mut self, node: Node) -> Result<()>;
    fn custom_begin(&mut self, name: &str, inputs: &[Value]) -> Result<Vec<Value>>;
    fn custom_end(&mut self, outputs: &[Value]) -> Result<Node>;

    fn tensors(&mut self, all: bool) -> Result<Vec<String>>;
    fn tensor_info(&mut self, tensor: &str) -> Result<TensorInfo>;
    fn tensor_read(&mut self, tensor: &str, first: u64, rows: u64) -> Result<Held<f32>>;
    fn tensor_edit(&mut self, tensor: &str) -> Result<HeldMut>;
    fn tensor_create(&mut self, tensor: &str, shape: &[usize]) -> Result<HeldMut>;
    fn tensor_commit(&mut self, buffer: u64) -> Result<()>;
    fn tensor_set_format(&mut self, tensor: &str, format: &str, importance: Option<&[f32]>) -> Result<f64>;
    fn tensor_set_codes(&mut self, tensor: &str, codes: &Encoded<'_>) -> Result<()>;
    fn format_info(&mut self, name: &str) -> Result<FormatInfo>;

    fn statistics(&mut self, value: Value) -> Result<HeldStatistics>;
    fn calibration_window(&mut self, index: usize) -> Result<(Held<u32>, usize)>;
    fn tokenize(&mut self, text: &str) -> Result<Held<u32>>;
    fn run_model(&mut self, tokens: &[u32], value: Option<Value>) -> Result<Held<f32>>;

    fn refused(&mut self, subject: &str, reason: &str) -> Result<()>;
    fn replace_node(&mut self, node: Node, values: &[Value]) -> Result<()>;
    fn remove_unused(&mut self, node: Node) -> Result<()>;
    fn node_evaluate(&mut self, node: Node, tensor: &str) -> Result<()>;
    fn tensor_stack(&mut self, tensor: &str, parts: &[&str]) -> Result<bool>;

    /// The host itself, by a type that passes linked into the same program may know; never there behind the C interface.
    fn native(&mut self) -> Option<Native> {
        None
    }
}

/// A host by its own type.
#[derive(Clone, Copy, Debug)]
pub struct Native {
    /// The type, with `'static` for its lifetimes.
    pub of: std::any::TypeId,
    /// The host that was asked: valid for as long as the borrow it was asked through.
    pub at: *mut (),
}
