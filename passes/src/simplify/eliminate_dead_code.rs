//! `eliminate-dead-code`: removes nodes whose results nothing uses.
//!
//! Before: `%a = silu %x`, `%y = add %x, %x`, `return %y`.   After: `%y = add %x, %x`, `return %y`.
//! Preconditions: none. Function inputs stay, and so does `attention`, which extends the KV cache.
//! Numerics: exact.   Cost: linear in the graph.
//! Reference: Cytron et al. 1991, "Efficiently computing static single assignment form", section 7.1.

use crate::pattern::{is_pure, is_used};
use attar_ir::Graph;
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct EliminateDeadCode;

static DECL: PassDecl = PassDecl {
    name: "eliminate-dead-code",
    summary: "removes nodes whose results nothing uses",
    phase: Phase::Canonicalize,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(EliminateDeadCode)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for EliminateDeadCode {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        // Users come after what they use, so one walk backwards finds chains.
        for id in graph.topo().into_iter().rev() {
            if !is_used(graph, id) && is_pure(graph.op(id)) && cx.rewrite(&graph.node(id).name) {
                graph.remove(id)?;
            }
        }
        Ok(cx.changed())
    }
}
