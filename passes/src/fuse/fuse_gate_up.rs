//! `fuse-gate-up`: the gate and up projections of a gated MLP as one linear.
//!
//! Before: `%g = linear %x, %wg`, `%u = linear %x, %wu`, `%s = silu %g`, `%y = mul %s, %u`.
//! After: `%a = linear %x, %w`, `%g = slice %a`, `%u = slice %a`, … with `%w` all gate rows, then all up rows.
//! Preconditions: one input, weights of one format (and one table) with no other use; else the block is left as
//! it is and the metrics say why.
//! Numerics: exact.   Cost: the coded weights of two matrices are copied once.
//! Reference: Shazeer 2020, arXiv:2002.05202 (the gated MLP).

use super::stacked_linear::stack_linears;
use crate::pattern::{LinearAt, linear_at};
use attar_ir::{Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseGateUp;

static DECL: PassDecl = PassDecl {
    name: "fuse-gate-up",
    summary: "joins the gate and up projections of a gated MLP into one linear",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseGateUp)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseGateUp {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            if let Some((gate, up)) = gate_and_up(graph, id) {
                stack_linears(graph, cx, &[gate, up])?;
            }
        }
        Ok(cx.changed())
    }
}

/// The two linears behind `mul(silu(gate), up)`, whose factors may stand in either order.
fn gate_and_up(graph: &Graph, mul: NodeId) -> Option<(LinearAt, LinearAt)> {
    let OpKind::Mul(_) = graph.op(mul) else { return None };
    let [a, b] = graph.inputs_of(mul)[..] else { return None };
    let read = |activated: ValueId, up: ValueId| {
        let OpKind::Silu(_) = graph.op(activated.node) else { return None };
        let gate = linear_at(graph, *graph.inputs_of(activated.node).first()?)?;
        let up = linear_at(graph, up)?;
        (gate.x == up.x && gate.node != up.node).then_some((gate, up))
    };
    read(a, b).or_else(|| read(b, a))
}
