//! `fuse-qkv`: the three projections of an attention block as one linear.
//!
//! Before: `%q = linear %x, %wq`, `%k = linear %x, %wk`, `%v = linear %x, %wv`, which reach one `attention`
//! through reshapes, norms and rotations.
//! After: `%y = linear %x, %w`, `%q = slice %y`, `%k = slice %y`, `%v = slice %y`, `%w` being the stacked rows.
//! Preconditions: one input, weights of one format (and one table) with no other use. A missing bias beside
//! given ones becomes zeros. Where formats differ the block is left as it is and the metrics say so.
//! Numerics: exact.   Cost: the coded weights of three matrices are copied once.
//! Reference: Shoeybi et al. 2019, arXiv:1909.08053 (the fused QKV projection of Megatron-LM).

use super::linear_at::{LinearAt, linear_at};
use super::stacked_linear::stack_linears;
use attar_plugin::{About, Context, NoOptions, Numerics, Pass, Phase, Result, Value};

/// See the file's header.
pub(crate) struct FuseQkv;

attar_plugin::plugin! { passes: [FuseQkv] }

impl Pass for FuseQkv {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-qkv",
        summary: "joins the q, k and v projections of an attention block into one linear",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        for node in cx.nodes_of("attention")? {
            let mut parts = Vec::new();
            for v in cx.inputs_of(node)?.into_iter().take(3) {
                parts.extend(projection(cx, v)?);
            }
            let [q, k, v] = parts[..] else { continue };
            let distinct = q.node != k.node && k.node != v.node && q.node != v.node;
            if distinct && q.x == k.x && k.x == v.x {
                stack_linears(cx, &parts)?;
            }
        }
        Ok(())
    }
}

/// The linear whose result reaches `v` through reshape, norm and rotation.
fn projection(cx: &Context<'_>, mut v: Value) -> Result<Option<LinearAt>> {
    while ["rope", "rms_norm", "reshape"].contains(&cx.op_of(v)?.as_str()) {
        v = cx.inputs_of(cx.node_of(v)?)?[0];
    }
    linear_at(cx, v)
}
