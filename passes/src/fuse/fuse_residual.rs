//! `fuse-residual`: the addition after a projection goes into its epilogue.
//!
//! Before: `%p = linear %x, %w`, `%y = add %r, %p`.   After: `%y = linear_residual %x, %w, %r`.
//! Preconditions: the addition is the projection's only use, and its result is a matrix. When both summands are
//! such projections the second is taken.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: He et al. 2015, arXiv:1512.03385 (residual connections).

use crate::pattern::{LinearAt, linear_at, only_user, replace};
use attar_ir::ops::LinearResidual;
use attar_ir::{Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseResidual;

static DECL: PassDecl = PassDecl {
    name: "fuse-residual",
    summary: "moves the addition after a projection into its epilogue",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseResidual)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseResidual {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            let Some((linear, residual)) = matched(graph, id) else { continue };
            if !cx.rewrite(&graph.node(id).name) {
                continue;
            }
            let mut inputs = vec![linear.x, linear.w];
            inputs.extend(linear.b);
            inputs.push(residual);
            let y = graph.add1(LinearResidual { bias: linear.b.is_some() }, &inputs)?;
            replace(graph, id, &[y])?;
        }
        Ok(cx.changed())
    }
}

/// The projection and the other summand.
fn matched(graph: &Graph, add: NodeId) -> Option<(LinearAt, ValueId)> {
    let OpKind::Add(_) = graph.op(add) else { return None };
    let [a, b] = graph.inputs_of(add)[..] else { return None };
    let read = |p: ValueId, residual: ValueId| {
        only_user(graph, p)?;
        let linear = linear_at(graph, p)?;
        (graph.ty(p).rank() == 2).then_some((linear, residual))
    };
    read(b, a).or_else(|| read(a, b))
}
