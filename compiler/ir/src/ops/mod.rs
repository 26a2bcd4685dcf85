//! The ops, one file each. An op's file is its specification: meaning, rules with labels, reference evaluation.
//!
//! Core ops are few. Fused ops exist because a kernel does several things in one pass over memory; each has
//! [`Op::decompose`] into core ops, which defines its meaning.

use crate::attr::Attrs;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, ValueId};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Dim, Elem, TensorType};

/// What every op file provides.
pub trait Op {
    /// Stem of the file and name in the text form.
    fn name(&self) -> &'static str;

    /// Checks the rules that concern types and yields the output types.
    ///
    /// # Errors
    /// [`ErrorKind::Rule`] with the label of the broken rule, or [`ErrorKind::Arity`].
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>>;

    /// Attributes in declaration order, for the text form.
    fn attrs(&self) -> Attrs;

    /// The meaning of the op. Never optimised.
    ///
    /// # Errors
    /// When an index is out of range; types have been checked.
    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>>;

    /// For fused ops: the same computation in core ops, appended to `graph`. `None` for core ops.
    ///
    /// # Errors
    /// When a node cannot be added, which is a bug in the op.
    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let _ = (graph, inputs);
        Ok(None)
    }
}

macro_rules! ops {
    ($($variant:ident = $file:ident $name:literal),* $(,)?) => {
        $(mod $file; pub use $file::$variant;)*

        /// Any op. Closed: matched exhaustively in the tree.
        #[derive(Clone, Debug, PartialEq)]
        pub enum OpKind { $($variant($variant)),* }

        $(impl From<$variant> for OpKind {
            fn from(op: $variant) -> OpKind { OpKind::$variant(op) }
        })*

        /// Names of all ops, in table order.
        pub const NAMES: &[&str] = &[$($name),*];

        impl Op for OpKind {
            fn name(&self) -> &'static str { match self { $(OpKind::$variant(_) => $name),* } }
            fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
                match self { $(OpKind::$variant(op) => op.infer(inputs)),* }
            }
            fn attrs(&self) -> Attrs { match self { $(OpKind::$variant(op) => op.attrs()),* } }
            fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
                match self { $(OpKind::$variant(op) => op.eval(cx, inputs)),* }
            }
            fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
                match self { $(OpKind::$variant(op) => op.decompose(graph, inputs)),* }
            }
        }

        impl OpKind {
            /// Whether a node of the op does nothing but yield its outputs: `attention` extends the KV cache, inputs are the
            /// signature.
            pub fn is_pure(&self) -> bool {
                !matches!(self, OpKind::Attention(_) | OpKind::Input(_))
            }

            /// Builds the op of that name from its attributes, as the text form gives them.
            ///
            /// # Errors
            /// [`ErrorKind::UnknownOp`] or [`ErrorKind::Attribute`].
            pub fn from_attrs(name: &str, attrs: Attrs) -> Result<OpKind> {
                match name {
                    $($name => $variant::from_attrs(attrs).map(OpKind::$variant),)*
                    _ => Err(Error::new(ErrorKind::UnknownOp { name: name.to_owned(), nearest: nearest(name) })),
                }
            }
        }
    };
}

ops! {
    // sources
    Input = input "input",
    Weight = weight "weight",
    // core
    Embed = embed "embed",
    Linear = linear "linear",
    RmsNorm = rms_norm "rms_norm",
    LayerNorm = layer_norm "layer_norm",
    Rope = rope "rope",
    Attention = attention "attention",
    Add = add "add",
    Mul = mul "mul",
    Silu = silu "silu",
    Gelu = gelu "gelu",
    Softmax = softmax "softmax",
    GatherRows = gather_rows "gather_rows",
    Reshape = reshape "reshape",
    Slice = slice "slice",
    // fused
    NormLinear = norm_linear "norm_linear",
    QkvRope = qkv_rope "qkv_rope",
    GateUpSwiglu = gate_up_swiglu "gate_up_swiglu",
    LinearResidual = linear_residual "linear_residual",
    // of plugins
    Custom = custom "custom",
}

/// The op name closest to `name`, if one is close enough to be meant.
fn nearest(name: &str) -> Option<&'static str> {
    // Comparing costs the product of the lengths, and no typing error makes a name twice as long.
    if name.len() > 40 {
        return None;
    }
    let distance = |n: &str| strsim::osa_distance(n, name);
    let best = NAMES.iter().copied().min_by_key(|n| distance(n))?;
    (distance(best) <= best.len().max(3) / 3).then_some(best)
}

/// An input is missing although the arity has been checked: the graph was changed behind its own back.
pub(crate) fn missing(op: &'static str) -> Error {
    Error::new(ErrorKind::Arity { op, expected: "one more".to_owned(), got: 0 })
}

/// Checks the small constant under a square root.
pub(crate) fn require_eps(op: &'static str, rule: &'static str, eps: f64) -> Result<()> {
    require(op, rule, eps.is_finite() && eps >= 0.0, "a finite eps of 0 or more", eps)
}

/// `table[ids[i], :]` for every i.
pub(crate) fn pick_rows(op: &'static str, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (count, width) = (table.shape[0], table.last());
    let mut out = Vec::with_capacity(ids.len() * width);
    for id in ids.as_int() {
        let row = usize::try_from(*id).ok().filter(|r| *r < count).ok_or_else(|| {
            let expected = format!("{op} indices below {count}");
            Error::new(ErrorKind::Input { expected, got: id.to_string() })
        })?;
        out.extend_from_slice(&table.as_real()[row * width..(row + 1) * width]);
    }
    Ok(Tensor::real([ids.len(), width], out))
}

/// Checks the number of inputs.
pub(crate) fn arity(op: &'static str, expected: std::ops::RangeInclusive<usize>, got: usize) -> Result<()> {
    if expected.contains(&got) {
        return Ok(());
    }
    let expected = if expected.start() == expected.end() {
        expected.start().to_string()
    } else {
        format!("{} to {}", expected.start(), expected.end())
    };
    Err(Error::new(ErrorKind::Arity { op, expected, got }))
}

/// Checks a labelled rule of an op's specification.
pub(crate) fn require(
    op: &'static str,
    rule: &'static str,
    holds: bool,
    expected: impl ToString,
    got: impl ToString,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Rule { op, rule, expected: expected.to_string(), got: got.to_string() }))
}

/// Checks that a value is real-valued and, unless `None`, of that rank.
pub(crate) fn require_real(
    op: &'static str,
    rule: &'static str,
    ty: &TensorType,
    rank: Option<usize>,
) -> Result<()> {
    require(op, rule, ty.elem.is_float(), "real elements", ty)?;
    require(op, rule, rank.is_none_or(|r| r == ty.rank()), format!("rank {}", rank.unwrap_or(0)), ty)
}

/// The shape with its last dimension replaced.
pub(crate) fn with_last(ty: &TensorType, last: Dim) -> TensorType {
    let mut shape = ty.shape.clone();
    if let Some(d) = shape.last_mut() {
        *d = last;
    }
    TensorType::new(Elem::F32, shape)
}
