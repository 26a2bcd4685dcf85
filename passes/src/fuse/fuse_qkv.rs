//! `fuse-qkv`: the three projections of an attention block as one linear.
//!
//! Before: `%q = linear %x, %wq`, `%k = linear %x, %wk`, `%v = linear %x, %wv`, which reach one `attention`
//! through reshapes, norms and rotations.
//! After: `%y = linear %x, %w`, `%q = slice %y`, `%k = slice %y`, `%v = slice %y`, `%w` being the stacked rows.
//! Preconditions: one input, weights of one format (and one table) with no other use. A missing bias beside
//! given ones becomes zeros. Where formats differ the block is left as it is and the metrics say so.
//! Numerics: exact.   Cost: the coded weights of three matrices are copied once.
//! Reference: Shoeybi et al. 2019, arXiv:1909.08053 (the fused QKV projection of Megatron-LM).

use super::stacked_linear::stack_linears;
use crate::pattern::{LinearAt, linear_at};
use attar_ir::{Graph, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseQkv;

static DECL: PassDecl = PassDecl {
    name: "fuse-qkv",
    summary: "joins the q, k and v projections of an attention block into one linear",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseQkv)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseQkv {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            let OpKind::Attention(_) = graph.op(id) else { continue };
            let inputs = graph.inputs_of(id);
            let parts: Option<Vec<LinearAt>> = inputs.iter().take(3).map(|v| projection(graph, *v)).collect();
            let Some(parts) = parts else { continue };
            let [q, k, v] = parts[..] else { continue };
            let distinct = q.node != k.node && k.node != v.node && q.node != v.node;
            if distinct && q.x == k.x && k.x == v.x {
                stack_linears(graph, cx, &parts)?;
            }
        }
        Ok(cx.changed())
    }
}

/// The linear whose result reaches `v` through reshape, norm and rotation.
fn projection(graph: &Graph, mut v: ValueId) -> Option<LinearAt> {
    while let OpKind::Rope(_) | OpKind::RmsNorm(_) | OpKind::Reshape(_) = graph.op(v.node) {
        v = *graph.inputs_of(v.node).first()?;
    }
    linear_at(graph, v)
}
