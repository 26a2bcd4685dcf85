//! `eliminate-common-subexpressions`: computes the same thing once.
//!
//! Before: `%a = silu %x`, `%b = silu %x`, `%y = mul %a, %b`.   After: `%a = silu %x`, `%y = mul %a, %a`.
//! Preconditions: none. Two nodes are the same when op, attributes and inputs are; `add` and `mul` in either
//! order. `attention` is left alone, since it extends the KV cache.
//! Numerics: exact.   Cost: linear in the graph.
//! Reference: Cocke 1970, "Global common subexpression elimination".

use crate::pattern::is_pure;
use attar_ir::{Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};
use std::collections::BTreeMap;

struct EliminateCommonSubexpressions;

static DECL: PassDecl = PassDecl {
    name: "eliminate-common-subexpressions",
    summary: "computes the same thing once",
    phase: Phase::Canonicalize,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(EliminateCommonSubexpressions)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for EliminateCommonSubexpressions {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut first: BTreeMap<(String, Vec<ValueId>), NodeId> = BTreeMap::new();
        for id in graph.topo() {
            let op = graph.op(id);
            if !is_pure(op) {
                continue;
            }
            let mut inputs = graph.inputs_of(id);
            if matches!(op, OpKind::Add(_) | OpKind::Mul(_)) {
                inputs.sort_unstable();
            }
            // The debug text shows every attribute, numbers such that they read back the same.
            let key = (format!("{op:?}"), inputs);
            let Some(&kept) = first.get(&key) else {
                first.insert(key, id);
                continue;
            };
            if !cx.rewrite(&graph.node(id).name) {
                continue;
            }
            let slots = 0..graph.node(id).outputs.len() as u16;
            let same: Vec<ValueId> = slots.map(|slot| ValueId { node: kept, slot }).collect();
            graph.replace(id, &same)?;
        }
        Ok(cx.changed())
    }
}
