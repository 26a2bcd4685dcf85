//! Reading patterns off a graph, and removing what a rewrite has left unused.

use attar_ir::{Graph, NodeId, OpKind, Result, ValueId, WeightStore};

/// A `linear` and what it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LinearAt {
    pub(crate) node: NodeId,
    pub(crate) x: ValueId,
    pub(crate) w: ValueId,
    pub(crate) b: Option<ValueId>,
}

impl LinearAt {
    /// Its result.
    pub(crate) fn y(&self) -> ValueId {
        out(self.node)
    }
}

/// First output of a node.
pub(crate) fn out(node: NodeId) -> ValueId {
    ValueId { node, slot: 0 }
}

/// The `linear` that makes a value.
pub(crate) fn linear_at(graph: &Graph, v: ValueId) -> Option<LinearAt> {
    let OpKind::Linear(_) = graph.op(v.node) else { return None };
    match graph.inputs_of(v.node)[..] {
        [x, w] => Some(LinearAt { node: v.node, x, w, b: None }),
        [x, w, b] => Some(LinearAt { node: v.node, x, w, b: Some(b) }),
        _ => None,
    }
}

/// The node that uses a value, if that is its only use and no function output is it.
pub(crate) fn only_user(graph: &Graph, v: ValueId) -> Option<(NodeId, u16)> {
    if !graph.has_one_use(v) {
        return None;
    }
    graph.users(v).first().copied()
}

/// Name of the weight behind a value.
pub(crate) fn weight_name(graph: &Graph, v: ValueId) -> Option<&str> {
    match graph.op(v.node) {
        OpKind::Weight(w) => Some(&w.name),
        _ => None,
    }
}

/// Puts values in the place of a node and removes what that leaves unused.
pub(crate) fn replace(graph: &mut Graph, old: NodeId, with: &[ValueId]) -> Result<()> {
    let inputs = graph.inputs_of(old);
    graph.replace(old, with)?;
    inputs.into_iter().try_for_each(|v| remove_unused(graph, v.node))
}

/// Removes a node and then whatever fed only it. Function inputs and nodes with effects stay.
pub(crate) fn remove_unused(graph: &mut Graph, node: NodeId) -> Result<()> {
    let mut pending = vec![node];
    while let Some(id) = pending.pop() {
        if !graph.contains(id) || is_used(graph, id) || !is_pure(graph.op(id)) {
            continue;
        }
        let inputs = graph.inputs_of(id);
        graph.remove(id)?;
        pending.extend(inputs.into_iter().map(|v| v.node));
    }
    Ok(())
}

/// Whether any output of a node is used.
pub(crate) fn is_used(graph: &Graph, id: NodeId) -> bool {
    let slots = graph.node(id).outputs.len() as u16;
    (0..slots).any(|slot| {
        let v = ValueId { node: id, slot };
        !graph.users(v).is_empty() || graph.outputs().contains(&v)
    })
}

/// Whether a node does nothing but yield its outputs: `attention` extends the KV cache, inputs are the signature.
pub(crate) fn is_pure(op: &OpKind) -> bool {
    !matches!(op, OpKind::Attention(_) | OpKind::Input(_))
}

/// `stem`, or `stem` with a number where the store already has it.
pub(crate) fn fresh_name(weights: &WeightStore, stem: &str) -> String {
    let mut name = stem.to_owned();
    let mut n = 2;
    while weights.contains(&name) {
        name = format!("{stem}.{n}");
        n += 1;
    }
    name
}
