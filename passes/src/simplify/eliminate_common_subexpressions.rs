//! `eliminate-common-subexpressions`: computes the same thing once.
//!
//! Before: `%a = silu %x`, `%b = silu %x`, `%y = mul %a, %b`.   After: `%a = silu %x`, `%y = mul %a, %a`.
//! Preconditions: none. Two nodes are the same when op, attributes and inputs are; `add` and `mul` in either
//! order. `attention` is left alone, since it extends the KV cache.
//! Numerics: exact.   Cost: linear in the graph.
//! Reference: Cocke 1970, "Global common subexpression elimination".

use attar_plugin::{About, Context, NoOptions, Node, Numerics, Pass, Phase, Result, Value};
use std::collections::BTreeMap;

/// See the file's header.
pub(crate) struct EliminateCommonSubexpressions;

attar_plugin::plugin! { passes: [EliminateCommonSubexpressions] }

impl Pass for EliminateCommonSubexpressions {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "eliminate-common-subexpressions",
        summary: "computes the same thing once",
        phase: Phase::Canonicalize,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        let mut first: BTreeMap<(String, Vec<Value>), Node> = BTreeMap::new();
        for node in cx.nodes()? {
            let info = cx.node(node)?;
            if ["attention", "input"].contains(&info.op.as_str()) {
                continue;
            }
            let mut inputs = cx.inputs_of(node)?;
            if ["add", "mul"].contains(&info.op.as_str()) {
                inputs.sort_unstable();
            }
            // The debug text shows every attribute, numbers such that they read back the same.
            let key = (format!("{} {} {:?}", info.op, info.target, cx.attrs(node)?), inputs);
            let Some(&kept) = first.get(&key) else {
                first.insert(key, node);
                continue;
            };
            if cx.rewrite(&info.name)? {
                cx.replace(node, &cx.outputs_of(kept)?)?;
            }
        }
        Ok(())
    }
}
