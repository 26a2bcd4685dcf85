//! Prepares a graph for lowering: fused nodes that no kernel serves as they stand are replaced by core ops.

use super::error::LowerError;
use attar_format::CHANNELS;
use attar_ir::ops::{GateUpSwiglu, QkvRope};
use attar_ir::{Dim, Graph, NodeId, OpKind, ValueId};
use std::collections::BTreeMap;

/// A copy of `graph` in which every fused node can be lowered as it is, and no custom op is left.
pub(super) fn prepare(graph: &Graph) -> Result<Graph, LowerError> {
    let mut graph = graph.clone();
    let is_custom = |id: &NodeId| matches!(graph.op(*id), OpKind::Custom(_));
    for id in graph.ids().filter(is_custom).collect::<Vec<_>>() {
        graph.expand(id)?;
    }
    for id in graph.topo() {
        let serves = match graph.op(id) {
            OpKind::QkvRope(op) => qkv_attention(&graph, id, op).is_some(),
            OpKind::GateUpSwiglu(op) => has_gate_up_kernel(&graph, id, op),
            _ => true,
        };
        if !serves {
            graph.expand(id)?;
        }
    }
    Ok(graph)
}

/// The attention node that reads the keys and values a `qkv_rope` makes, if the fused kernel can store them straight
/// in the cache: heads are whole blocks of channels, nobody else reads q, k or v, and no other node writes the layer.
pub(super) fn qkv_attention(graph: &Graph, id: NodeId, op: &QkvRope) -> Option<NodeId> {
    let value = |slot| ValueId { node: id, slot };
    let [(attention, 1)] = graph.users(value(1))[..] else { return None };
    let [(same, 2)] = graph.users(value(2))[..] else { return None };
    let asks = graph.users(value(0))[..] == [(attention, 0)];
    if !asks || same != attention || graph.outputs().iter().any(|o| o.node == id) {
        return None;
    }
    let OpKind::Attention(a) = graph.op(attention) else { return None };
    let writers = graph
        .ids()
        .filter(|n| matches!(graph.op(*n), OpKind::Attention(other) if other.layer == a.layer))
        .count();
    let positions = graph.input_named("positions");
    let same_positions = graph.inputs_of(attention).last().copied() == positions
        && graph.inputs_of(id).last().copied() == positions
        && positions.is_some();
    let rows = graph.ty(value(0)).shape.first() == Some(&Dim::T);
    (writers == 1 && same_positions && rows && op.head_dim.is_multiple_of(CHANNELS)).then_some(attention)
}

/// Gate and up rows can be interleaved in blocks of 16 only when F is a multiple of 16.
fn has_gate_up_kernel(graph: &Graph, id: NodeId, _: &GateUpSwiglu) -> bool {
    graph.node(id).outputs[0].last().is_some_and(|f| f.is_multiple_of(CHANNELS))
}

/// Attention nodes whose keys and values a fused kernel has stored, by the `qkv_rope` node that did.
pub(super) fn cache_writers(graph: &Graph) -> BTreeMap<NodeId, NodeId> {
    let fused = |id: NodeId| match graph.op(id) {
        OpKind::QkvRope(op) => qkv_attention(graph, id, op).map(|attention| (id, attention)),
        _ => None,
    };
    graph.ids().filter_map(fused).collect()
}
