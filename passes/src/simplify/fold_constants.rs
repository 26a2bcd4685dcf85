//! `fold-constants`: computes at compile time what depends on weights alone, and drops ops that change nothing.
//!
//! Before: `%s = add %w1, %w2` of two weights.   After: `%s = weight @…` holding the sum.
//! Also: a reshape or slice to the type it already has disappears; of two reshapes in a row the last is enough.
//! Preconditions: inputs are uncompressed weights; the result has at most `max_elements` elements, or no more than
//! the weights it makes superfluous, so an artifact never grows by much.
//! Numerics: rounding (values are computed in f64 and rounded once).   Cost: that of the folded ops.
//! Reference: Wegman and Zadeck 1991, "Constant propagation with conditional branches", without the branches.

use attar_plugin::{About, Context, Dim, Node, Numerics, Pass, Phase, Result, Value, borrowed};

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// largest result that may be added to the weights it is computed from
        pub(crate) max_elements: usize = 65536, int 0..=1 << 31;
    }
}

/// See the file's header.
pub(crate) struct FoldConstants;

attar_plugin::plugin! { passes: [FoldConstants] }

/// Ops that are computed where all they take is known.
const FOLDABLE: [&str; 10] =
    ["linear", "rms_norm", "layer_norm", "add", "mul", "silu", "gelu", "softmax", "reshape", "slice"];

impl Pass for FoldConstants {
    type Options = Options;

    const ABOUT: About = About {
        name: "fold-constants",
        summary: "computes at compile time what depends on weights alone",
        phase: Phase::Canonicalize,
        numerics: Numerics::Rounding,
        takes_tensors: false,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        // What a rewrite removes came before it, so the walk meets no node that is gone.
        for node in cx.nodes()? {
            let info = cx.node(node)?;
            if let Some(same) = unchanged(cx, node)? {
                if cx.rewrite(&info.name)? {
                    cx.replace(node, &[same])?;
                }
            } else if let Some(x) = reshaped_twice(cx, node)? {
                if cx.rewrite(&info.name)? {
                    let is_back = cx.type_of(x)? == cx.type_of(cx.output(node)?)?;
                    let y = if is_back { x } else { cx.add("reshape", &[x], &borrowed(&cx.attrs(node)?))? };
                    cx.replace(node, &[y])?;
                }
            } else if let Some(first) = constant(options, cx, node)?
                && cx.rewrite(&info.name)?
            {
                let name = cx.fresh_name(&format!("{first}.{}", info.op));
                cx.evaluate(node, &name)?;
                cx.replace(node, &[cx.add_weight(&name)?])?;
            }
        }
        Ok(())
    }
}

/// The input of a reshape or slice that changes nothing.
fn unchanged(cx: &Context<'_>, node: Node) -> Result<Option<Value>> {
    if !["reshape", "slice"].contains(&cx.node(node)?.op.as_str()) {
        return Ok(None);
    }
    let x = cx.inputs_of(node)?[0];
    Ok((cx.type_of(x)? == cx.type_of(cx.output(node)?)?).then_some(x))
}

/// What a reshape of a reshape begins with.
fn reshaped_twice(cx: &Context<'_>, node: Node) -> Result<Option<Value>> {
    if cx.node(node)?.op != "reshape" {
        return Ok(None);
    }
    let between = cx.inputs_of(node)?[0];
    if cx.op_of(between)? != "reshape" {
        return Ok(None);
    }
    Ok(cx.inputs_of(cx.node_of(between)?)?.first().copied())
}

/// The first of the weights a node is computed from, if it is computed from weights alone and worth it.
fn constant(options: &Options, cx: &Context<'_>, node: Node) -> Result<Option<String>> {
    if !FOLDABLE.contains(&cx.node(node)?.op.as_str()) {
        return Ok(None);
    }
    let (mut first, mut freed) = (None, 0usize);
    for v in cx.inputs_of(node)? {
        let Some(name) = cx.weight_of(v)? else { return Ok(None) };
        if cx.type_of(v)?.elem != "f32" {
            return Ok(None);
        }
        if cx.only_use(v)?.is_some() {
            freed = freed.saturating_add(elements(cx, v)?.unwrap_or(0));
        }
        first.get_or_insert(name);
    }
    let fits = elements(cx, cx.output(node)?)?.is_some_and(|n| n <= options.max_elements.max(freed));
    Ok(first.filter(|_| fits))
}

/// How many elements a value has, where that is known.
fn elements(cx: &Context<'_>, v: Value) -> Result<Option<usize>> {
    let fixed = |d: &Dim| match d {
        Dim::Fixed(n) => Some(*n),
        _ => None,
    };
    Ok(cx.type_of(v)?.dims.iter().try_fold(1usize, |n, d| n.checked_mul(fixed(d)?)))
}
