//! The weights between which the values of attention heads stand: what changes on one side can be undone on the other.

use crate::pattern::{linear_at, only_user, out, weight_name};
use attar_ir::{Elem, Graph, NodeId, OpKind, ValueId, WeightName, WeightStore};

/// An attention whose values come from one linear and whose result goes into one.
#[derive(Clone, Debug)]
pub(super) struct HeadValues {
    /// Of a head.
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) v: WeightName,
    pub(super) v_bias: Option<WeightName>,
    pub(super) o: WeightName,
    /// What `o` is multiplied with, `[T, heads * width]`.
    pub(super) result: ValueId,
}

/// Those of an attention; `None` where something else sees the values or uses the weights.
pub(super) fn values_at(graph: &Graph, weights: &WeightStore, attention: NodeId) -> Option<HeadValues> {
    let [q, _, v, _] = graph.inputs_of(attention)[..] else { return None };
    let heads = |v: ValueId| graph.ty(v).shape.get(1).and_then(|d| d.fixed());
    let (heads, kv_heads, width) = (heads(q)?, heads(v)?, graph.ty(v).last()?);
    let OpKind::Reshape(_) = graph.op(v.node) else { return None };
    let projected = linear_at(graph, *graph.inputs_of(v.node).first()?)?;
    let (reshape, _) = only_user(graph, out(attention))?;
    let OpKind::Reshape(_) = graph.op(reshape) else { return None };
    let (linear, slot) = only_user(graph, out(reshape))?;
    let o = linear_at(graph, out(linear)).filter(|_| slot == 0)?;
    only_user(graph, v)?;
    only_user(graph, projected.y())?;
    let fits = graph.ty(projected.y()).last() == Some(kv_heads * width)
        && graph.ty(projected.y()).rank() == 2
        && graph.ty(o.x).last() == Some(heads * width)
        && graph.ty(o.x).rank() == 2;
    let v_bias = match projected.b {
        Some(b) => Some(own_weight(graph, weights, b)?),
        None => None,
    };
    let (v, o_name) = (own_weight(graph, weights, projected.w)?, own_weight(graph, weights, o.w)?);
    fits.then_some(HeadValues { width, heads, kv_heads, v, v_bias, o: o_name, result: o.x })
}

/// The uncompressed weight behind a value, if nothing else uses it.
pub(super) fn own_weight(graph: &Graph, weights: &WeightStore, v: ValueId) -> Option<WeightName> {
    let name = weight_name(graph, v)?;
    only_user(graph, v)?;
    let nodes = graph.weights().filter(|(_, w)| &*w.name == name).count();
    let plain = weights.info(name).is_ok_and(|i| i.elem == Elem::F32);
    (plain && nodes == 1).then(|| WeightName::from(name))
}
