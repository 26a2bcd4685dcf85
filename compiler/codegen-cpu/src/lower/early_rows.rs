//! Rows that nobody asks for are not computed: `gather_rows` moves from the end of a graph up to the last attention.
//!
//! A prompt wants the logits of its last token alone. Behind the last attention every op works row by row, so rows can
//! be gathered before its output matrix and the MLP as well as behind them; a prompt's other tokens then cost the last
//! layer nothing but keys, values and attention.

use super::error::LowerError;
use attar_ir::ops::GatherRows;
use attar_ir::{Dim, Graph, NodeId, OpKind, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Gathers rows before the matrix products that only the gathered rows are wanted of.
pub(super) fn gather_early(graph: &mut Graph) -> Result<(), LowerError> {
    let gathers = |id: &NodeId| matches!(graph.op(*id), OpKind::GatherRows(_));
    let all: Vec<NodeId> = graph.ids().filter(gathers).collect();
    let [gather] = all[..] else { return Ok(()) };
    let [x, rows] = graph.inputs_of(gather)[..] else { return Ok(()) };

    let moved = only_gathered(graph, gather);
    if !moved.iter().any(|id| is_product(graph.op(*id))) {
        return Ok(());
    }
    // What stands for a value once rows are gathered.
    let mut gathered: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for id in graph.topo().into_iter().filter(|id| moved.contains(id)) {
        let op = graph.op(id).clone();
        let slots = row_slots(&op, graph.inputs_of(id).len());
        let mut inputs = graph.inputs_of(id);
        for slot in slots {
            let all_rows = inputs[slot];
            inputs[slot] = match gathered.get(&all_rows) {
                Some(v) => *v,
                None => {
                    let some = graph.add1(GatherRows {}, &[all_rows, rows])?;
                    *gathered.entry(all_rows).or_insert(some)
                }
            };
        }
        let some = graph.add1(op, &inputs)?;
        gathered.insert(ValueId { node: id, slot: 0 }, some);
    }
    if let Some(y) = gathered.get(&x) {
        graph.replace_and_clean(gather, &[*y])?;
    }
    Ok(())
}

/// Nodes that work row by row and whose results nothing but `gather` takes, directly or through others of them.
fn only_gathered(graph: &Graph, gather: NodeId) -> BTreeSet<NodeId> {
    let mut found = BTreeSet::new();
    for id in graph.topo().into_iter().rev() {
        let y = ValueId { node: id, slot: 0 };
        let mut users = graph.users(y).into_iter().peekable();
        let works_by_row = !row_slots(graph.op(id), graph.inputs_of(id).len()).is_empty()
            && graph.ty(y).rank() == 2
            && graph.ty(y).shape.first() == Some(&Dim::T)
            && graph.inputs_of(id).iter().all(|v| !graph.ty(*v).shape.contains(&Dim::R));
        let takes_rows = |(user, slot): (NodeId, u16)| {
            (user == gather && slot == 0)
                || (found.contains(&user)
                    && row_slots(graph.op(user), graph.inputs_of(user).len()).contains(&usize::from(slot)))
        };
        if works_by_row && users.peek().is_some() && users.all(takes_rows) && !graph.outputs().contains(&y) {
            found.insert(id);
        }
    }
    found
}

/// The inputs of an op with a row for each row of its result; none where a row takes more than its own.
fn row_slots(op: &OpKind, inputs: usize) -> Vec<usize> {
    match op {
        OpKind::Linear(_) | OpKind::NormLinear(_) | OpKind::GateUpSwiglu(_) | OpKind::RmsNorm(_) => vec![0],
        OpKind::LinearResidual(_) => vec![0, inputs - 1],
        OpKind::Add(_) | OpKind::Mul(_) => vec![0, 1],
        OpKind::Silu(_) | OpKind::Gelu(_) => vec![0],
        _ => Vec::new(),
    }
}

fn is_product(op: &OpKind) -> bool {
    matches!(
        op,
        OpKind::Linear(_) | OpKind::NormLinear(_) | OpKind::LinearResidual(_) | OpKind::GateUpSwiglu(_)
    )
}
