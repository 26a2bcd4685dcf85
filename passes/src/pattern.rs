//! Reading patterns off the compiler's own graph.

use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightStore};

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
