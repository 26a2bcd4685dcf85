//! `fuse-norm`: an RMS norm goes into the projection that alone uses it.
//!
//! Before: `%n = rms_norm %x, %g`, `%y = linear %n, %w` (or `qkv_rope`, or `gate_up_swiglu`).
//! After: `%y = norm_linear %x, %g, %w` (or the same fused op with `eps`).
//! Preconditions: the projection is the norm's only use, has no norm yet, and `%x` is a matrix. A norm with other
//! users stays: computing it in each of them would cost more than it saves.
//! Numerics: exact (the fused ops are defined by their parts).   Cost: none.
//! Reference: Zhang & Sennrich 2019, arXiv:1910.07467.

use attar_plugin::{About, Attr, Context, NoOptions, Node, Numerics, Pass, Phase, Result, borrowed};

/// See the file's header.
pub(crate) struct FuseNorm;

attar_plugin::plugin! { passes: [FuseNorm] }

impl Pass for FuseNorm {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-norm",
        summary: "moves an RMS norm into the projection that alone uses it",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        // What a rewrite removes came before the projection, so the walk meets no node that is gone.
        for node in cx.nodes()? {
            let Some((norm, eps)) = norm_of(cx, node)? else { continue };
            let info = cx.node(node)?;
            if !cx.rewrite(&info.name)? {
                continue;
            }
            let (mut inputs, projection) = (cx.inputs_of(norm)?, cx.inputs_of(node)?);
            let mut attrs = cx.attrs(node)?;
            attrs.push(("eps".to_owned(), eps.into()));
            attrs.push(("gain".to_owned(), (inputs.len() == 2).into()));
            let op = if info.op == "linear" { "norm_linear" } else { &info.op };
            if op == "norm_linear" {
                attrs.push(("bias".to_owned(), (projection.len() == 3).into()));
            }
            inputs.extend_from_slice(&projection[1..]);
            let fused = cx.add_node(op, &inputs, &borrowed(&attrs))?;
            cx.replace(node, &cx.outputs_of(fused)?)?;
        }
        Ok(())
    }
}

/// The norm that a projection alone uses, and its eps.
fn norm_of(cx: &Context<'_>, projection: Node) -> Result<Option<(Node, f64)>> {
    let info = cx.node(projection)?;
    let takes_norms = match info.op.as_str() {
        "linear" => true,
        "qkv_rope" | "gate_up_swiglu" => cx.attr(projection, "eps")?.is_none(),
        _ => false,
    };
    let Some(x) = cx.inputs_of(projection)?.first().copied().filter(|_| takes_norms) else { return Ok(None) };
    let norm = cx.node_of(x)?;
    let alone = cx.only_use(x)? == Some((projection, 0));
    if cx.node(norm)?.op != "rms_norm" || cx.type_of(x)?.dims.len() != 2 || !alone {
        return Ok(None);
    }
    match cx.attr(norm, "eps")? {
        Some(Attr::Float(eps)) => Ok(Some((norm, eps))),
        _ => Ok(None),
    }
}
