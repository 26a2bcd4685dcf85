//! `eliminate-dead-code`: removes nodes whose results nothing uses.
//!
//! Before: `%a = silu %x`, `%y = add %x, %x`, `return %y`.   After: `%y = add %x, %x`, `return %y`.
//! Preconditions: none. Function inputs stay, and so does `attention`, which extends the KV cache.
//! Numerics: exact.   Cost: linear in the graph.
//! Reference: Cytron et al. 1991, "Efficiently computing static single assignment form", section 7.1.

use attar_plugin::{About, Context, NoOptions, Node, Numerics, Pass, Phase, Result};

/// See the file's header.
pub(crate) struct EliminateDeadCode;

attar_plugin::plugin! { passes: [EliminateDeadCode] }

impl Pass for EliminateDeadCode {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "eliminate-dead-code",
        summary: "removes nodes whose results nothing uses",
        phase: Phase::Canonicalize,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        // Users come after what they use, so one walk backwards finds chains.
        for node in cx.nodes()?.into_iter().rev() {
            let info = cx.node(node)?;
            let stays = ["attention", "input"].contains(&info.op.as_str()) || is_used(cx, node)?;
            if !stays && cx.rewrite(&info.name)? {
                cx.remove(node)?;
            }
        }
        Ok(())
    }
}

fn is_used(cx: &Context<'_>, node: Node) -> Result<bool> {
    let results = cx.outputs()?;
    for value in cx.outputs_of(node)? {
        if results.contains(&value) || !cx.uses(value)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
