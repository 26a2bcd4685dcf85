//! `fuse-norm`: an RMS norm goes into the projection that alone uses it.
//!
//! Before: `%n = rms_norm %x, %g`, `%y = linear %n, %w` (or `qkv_rope`, or `gate_up_swiglu`).
//! After: `%y = norm_linear %x, %g, %w` (or the same fused op with `eps`).
//! Preconditions: the projection is the norm's only use, has no norm yet, and `%x` is a matrix. A norm with other
//! users stays: computing it in each of them would cost more than it saves.
//! Numerics: exact (the fused ops are defined by their parts).   Cost: none.
//! Reference: Zhang & Sennrich 2019, arXiv:1910.07467.

use crate::pattern::{only_user, out, replace};
use attar_ir::ops::NormLinear;
use attar_ir::{Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseNorm;

static DECL: PassDecl = PassDecl {
    name: "fuse-norm",
    summary: "moves an RMS norm into the projection that alone uses it",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseNorm)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseNorm {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            // The projection, which comes later in this order, is gone once it is fused.
            if !graph.contains(id) {
                continue;
            }
            let Some((user, op)) = matched(graph, id) else { continue };
            if !cx.rewrite(&graph.node(user).name) {
                continue;
            }
            let mut inputs = graph.inputs_of(id);
            inputs.extend_from_slice(&graph.inputs_of(user)[1..]);
            let fused = graph.add(op, &inputs)?;
            let slots = 0..graph.node(fused).outputs.len() as u16;
            let results: Vec<ValueId> = slots.map(|slot| ValueId { node: fused, slot }).collect();
            replace(graph, user, &results)?;
        }
        Ok(cx.changed())
    }
}

/// The projection that uses the norm `id`, and what it becomes.
fn matched(graph: &Graph, id: NodeId) -> Option<(NodeId, OpKind)> {
    let OpKind::RmsNorm(norm) = graph.op(id) else { return None };
    if graph.ty(out(id)).rank() != 2 {
        return None;
    }
    let gain = graph.inputs_of(id).len() == 2;
    let (user, slot) = only_user(graph, out(id))?;
    if slot != 0 {
        return None;
    }
    let op = match graph.op(user) {
        OpKind::Linear(_) => {
            NormLinear { eps: norm.eps, gain, bias: graph.inputs_of(user).len() == 3 }.into()
        }
        OpKind::QkvRope(op) if op.eps.is_none() => {
            let mut op = op.clone();
            (op.eps, op.gain) = (Some(norm.eps), gain);
            op.into()
        }
        OpKind::GateUpSwiglu(op) if op.eps.is_none() => {
            let mut op = op.clone();
            (op.eps, op.gain) = (Some(norm.eps), gain);
            op.into()
        }
        _ => return None,
    };
    Some((user, op))
}
