//! Gradients through a run of nodes, last to first.

use super::adjoint;
use super::sequential::{Indices, operands, widths};
use attar_ir::{Graph, NodeId, ValueId};
use attar_pass::Result;
use std::collections::BTreeMap;

/// Nodes that have run over one window, with what they were given.
pub(crate) struct Tape<'a, 'w> {
    pub(crate) graph: &'a Graph,
    /// In the order they ran.
    pub(crate) nodes: &'a [NodeId],
    pub(crate) weight: &'a dyn Fn(NodeId) -> Option<&'w [f32]>,
    pub(crate) values: &'a BTreeMap<ValueId, Vec<f32>>,
    pub(crate) indices: &'a Indices<'a>,
}

impl Tape<'_, '_> {
    /// Leads the gradients of some values back: what is left are those of `wanted` values that none of the nodes computes.
    /// `seen` is told the gradient of each node's result.
    pub(crate) fn back(
        &self,
        mut gradients: BTreeMap<ValueId, Vec<f32>>,
        wanted: &dyn Fn(ValueId) -> bool,
        seen: &mut dyn FnMut(NodeId, &[f32]),
    ) -> Result<BTreeMap<ValueId, Vec<f32>>> {
        for id in self.nodes.iter().rev() {
            let Some(gradient) = gradients.remove(&ValueId { node: *id, slot: 0 }) else { continue };
            seen(*id, &gradient);
            let inputs = self.graph.inputs_of(*id);
            let operands = operands(self.graph, &inputs, self.weight, self.values, self.indices)?;
            let wanted: Vec<bool> = inputs.iter().map(|v| wanted(*v)).collect();
            let widths = widths(self.graph, &inputs);
            let found = adjoint::gradients(self.graph, *id, &operands, &widths, &gradient, &wanted)?;
            for (v, gradient) in inputs.iter().zip(found) {
                let Some(gradient) = gradient else { continue };
                match gradients.get_mut(v) {
                    Some(sum) => sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g),
                    None => {
                        gradients.insert(*v, gradient);
                    }
                }
            }
        }
        Ok(gradients)
    }
}
