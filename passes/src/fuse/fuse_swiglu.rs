//! `fuse-swiglu`: the joined gate and up projection with its activation, as one `gate_up_swiglu`.
//!
//! Before: `%a = linear %x, %w` of 2F rows, `%g = slice %a`, `%u = slice %a`, `%s = silu %g`, `%y = mul %s, %u`.
//! After: `%y = gate_up_swiglu %x, %w`.
//! Preconditions: the slices are the two halves, gate first; nothing between has another use; no bias; `%x` is a
//! matrix.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: Shazeer 2020, arXiv:2002.05202.

use crate::pattern::{LinearAt, linear_at, only_user, replace};
use attar_ir::ops::GateUpSwiglu;
use attar_ir::{Dim, Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseSwiglu;

static DECL: PassDecl = PassDecl {
    name: "fuse-swiglu",
    summary: "joins a gate and up projection and its activation",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseSwiglu)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseSwiglu {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            let Some(linear) = matched(graph, id) else { continue };
            if cx.rewrite(&graph.node(id).name) {
                let y = graph.add1(GateUpSwiglu { eps: None, gain: false }, &[linear.x, linear.w])?;
                replace(graph, id, &[y])?;
            }
        }
        Ok(cx.changed())
    }
}

fn matched(graph: &Graph, mul: NodeId) -> Option<LinearAt> {
    let OpKind::Mul(_) = graph.op(mul) else { return None };
    let [a, b] = graph.inputs_of(mul)[..] else { return None };
    read(graph, a, b).or_else(|| read(graph, b, a))
}

fn read(graph: &Graph, activated: ValueId, up: ValueId) -> Option<LinearAt> {
    let OpKind::Silu(_) = graph.op(activated.node) else { return None };
    only_user(graph, activated)?;
    let gate = *graph.inputs_of(activated.node).first()?;
    let (OpKind::Slice(g), OpKind::Slice(u)) = (graph.op(gate.node), graph.op(up.node)) else { return None };
    only_user(graph, gate)?;
    only_user(graph, up)?;
    let (y, same) = (*graph.inputs_of(gate.node).first()?, *graph.inputs_of(up.node).first()?);
    let linear = linear_at(graph, y)?;
    let halves = g.start == 0 && u.start == g.len && g.len == u.len;
    let whole = graph.ty(linear.w).shape[0] == Dim::Fixed(g.len + u.len);
    let only_these = graph.users(y).len() == 2 && !graph.outputs().contains(&y);
    let plain = linear.b.is_none() && graph.ty(linear.x).rank() == 2;
    (y == same && halves && whole && only_these && plain).then_some(linear)
}
