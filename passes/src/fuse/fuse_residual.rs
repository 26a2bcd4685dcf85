//! `fuse-residual`: the addition after a projection goes into its epilogue.
//!
//! Before: `%p = linear %x, %w`, `%y = add %r, %p`.   After: `%y = linear_residual %x, %w, %r`.
//! Preconditions: the addition is the projection's only use, and its result is a matrix. When both summands are
//! such projections the second is taken.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: He et al. 2015, arXiv:1512.03385 (residual connections).

use super::linear_at::{LinearAt, linear_at};
use attar_plugin::{About, Context, NoOptions, Numerics, Pass, Phase, Result, Value};

/// See the file's header.
pub(crate) struct FuseResidual;

attar_plugin::plugin! { passes: [FuseResidual] }

impl Pass for FuseResidual {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-residual",
        summary: "moves the addition after a projection into its epilogue",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        for node in cx.nodes_of("add")? {
            let [a, b] = cx.inputs_of(node)?[..] else { continue };
            let (linear, residual) = match (projection(cx, b)?, projection(cx, a)?) {
                (Some(linear), _) => (linear, a),
                (None, Some(linear)) => (linear, b),
                (None, None) => continue,
            };
            if !cx.rewrite(&cx.node(node)?.name)? {
                continue;
            }
            let mut inputs = vec![linear.x, linear.w];
            inputs.extend(linear.b);
            inputs.push(residual);
            let y = cx.add("linear_residual", &inputs, &[("bias", linear.b.is_some().into())])?;
            cx.replace(node, &[y])?;
        }
        Ok(())
    }
}

/// The projection that makes a summand, if nothing else uses it.
fn projection(cx: &Context<'_>, p: Value) -> Result<Option<LinearAt>> {
    if cx.only_use(p)?.is_none() || cx.type_of(p)?.dims.len() != 2 {
        return Ok(None);
    }
    linear_at(cx, p)
}
