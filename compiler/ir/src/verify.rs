//! The verifier: structural rules `G…` and every op's own rules.
//!
//! | rule | holds when |
//! |---|---|
//! | G1 | the graph has no cycle |
//! | G2 | the inputs of every node fill its slots 0, 1, … once each |
//! | G3 | the recorded output types are those the op infers from its inputs; the op's own rules hold |
//! | G4 | every use names an output its node has, and what replaces a value has its type |
//! | G5 | every weight has numbers for dimensions and stands in the store with that shape and element |
//! | G6 | the signature lists every `input` node once and nothing else, and there is an output; what is used stays |
//! | G7 | names are unique and spelled with letters, digits, `_` and `.` |
//! | G8 | no type has a zero dimension, a rank above 8, or more than 2^48 elements |
//! | G9 | every KV cache belongs to one `attention` |

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, NodeId, is_plain_name, unbounded};
use crate::ops::{Op, OpKind};
use crate::types::TensorType;
use crate::weights::WeightStore;
use std::collections::{BTreeMap, BTreeSet};

/// Checks a graph, and its weights against the store when one is given.
///
/// # Errors
/// The first broken rule, with the node.
pub fn verify(graph: &Graph, weights: Option<&WeightStore>) -> Result<()> {
    check(graph, weights).map_err(|e| e.at_func(&*graph.name))
}

fn check(graph: &Graph, weights: Option<&WeightStore>) -> Result<()> {
    let order = graph.topo();
    if order.len() != graph.len() {
        let sorted: BTreeSet<NodeId> = order.iter().copied().collect();
        let stuck = graph.ids().find(|id| !sorted.contains(id));
        let error = broken("G1", format!("{} nodes stand on or behind a cycle", graph.len() - order.len()));
        return Err(stuck.map_or(error.clone(), |id| error.at_node(graph.describe(id))));
    }
    check_signature(graph)?;
    let mut names = BTreeSet::new();
    let mut caches = BTreeMap::new();
    for id in order {
        let node = graph.node(id);
        let here = |e: Error| e.at_node(graph.describe(id));
        if !is_plain_name(&node.name) {
            return Err(here(broken("G7", format!("{:?} cannot be spelled", node.name))));
        }
        if !names.insert(&node.name) || graph.by_name(&node.name) != Some(id) {
            return Err(here(broken("G7", format!("the name %{} is taken", node.name))));
        }
        check_types(graph, id).map_err(here)?;
        if let OpKind::Attention(attention) = &node.op
            && let Some(other) = caches.insert(attention.layer, id)
        {
            let problem = format!("cache {} belongs to {}", attention.layer, graph.describe(other));
            return Err(here(broken("G9", problem)));
        }
        if let (OpKind::Weight(weight), Some(store)) = (&node.op, weights) {
            let Ok(info) = store.info(&weight.name) else {
                let problem = "the weight store holds no such tensor".to_owned();
                return Err(here(broken("G5", problem).at_tensor(&*weight.name)));
            };
            let shape = weight.ty.shape.iter().map(|d| d.fixed()).collect::<Option<Vec<_>>>();
            if shape.as_ref() != Some(&info.shape) || weight.ty.elem != info.elem {
                let held = TensorType::new(info.elem, info.shape.iter().map(|d| (*d).into()));
                let problem = format!("declared as {}, but the store holds {held}", weight.ty);
                return Err(here(broken("G5", problem).at_tensor(&*weight.name)));
            }
        }
    }
    Ok(())
}

fn check_signature(graph: &Graph) -> Result<()> {
    let mut listed = BTreeSet::new();
    for id in graph.inputs() {
        let is_input = graph.contains(*id) && matches!(graph.op(*id), OpKind::Input(_));
        if !is_input || !listed.insert(*id) {
            return Err(broken(
                "G6",
                format!("input {} of the signature is no input node, or is listed twice", id.0),
            ));
        }
    }
    let unlisted = |id: &NodeId| matches!(graph.op(*id), OpKind::Input(_)) && !listed.contains(id);
    if let Some(id) = graph.ids().find(unlisted) {
        return Err(
            broken("G6", "an input the signature does not list".to_owned()).at_node(graph.describe(id))
        );
    }
    if graph.outputs().is_empty() {
        return Err(broken("G6", "the function returns nothing".to_owned()));
    }
    for v in graph.outputs() {
        if !graph.contains(v.node) || usize::from(v.slot) >= graph.node(v.node).outputs.len() {
            return Err(broken(
                "G4",
                format!("the function returns value {}#{}, which is none", v.node.0, v.slot),
            ));
        }
    }
    Ok(())
}

/// Rules that concern one node and its inputs: G2, G3, G4, G8 and the op's own.
fn check_types(graph: &Graph, id: NodeId) -> Result<()> {
    let node = graph.node(id);
    let slots = graph.input_slots(id);
    if slots.iter().enumerate().any(|(i, (slot, _))| usize::from(*slot) != i) {
        let filled: Vec<u16> = slots.iter().map(|(slot, _)| *slot).collect();
        return Err(broken("G2", format!("input slots {filled:?}")));
    }
    let mut types = Vec::with_capacity(slots.len());
    for (slot, v) in slots {
        let Some(ty) = graph.node(v.node).outputs.get(usize::from(v.slot)) else {
            let from = graph.describe(v.node);
            return Err(broken(
                "G4",
                format!("input {slot} takes output {} of {from}, which has none", v.slot),
            ));
        };
        types.push(ty.clone());
    }
    let inferred = node.op.infer(&types)?;
    if inferred != node.outputs {
        let list = |types: &[crate::TensorType]| {
            types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let problem = format!("the types are {}, recorded are {}", list(&inferred), list(&node.outputs));
        return Err(broken("G3", problem));
    }
    match node.outputs.iter().find(|ty| !ty.is_bounded()) {
        Some(ty) => Err(unbounded(ty)),
        None => Ok(()),
    }
}

fn broken(rule: &'static str, problem: String) -> Error {
    Error::new(ErrorKind::Structure { rule, problem })
}

#[cfg(test)]
mod tests {
    //! Rules that no text can break, because a text is checked as it is read: the graphs are broken by hand.

    use super::*;
    use crate::graph::ValueId;
    use crate::ops::{Add, Input, Silu};
    use crate::types::Dim;

    fn rule(result: Result<()>) -> &'static str {
        match result.map_err(|e| e.kind) {
            Err(ErrorKind::Structure { rule, .. }) => rule,
            other => panic!("expected a broken G rule, got {other:?}"),
        }
    }

    fn chain() -> (Graph, ValueId, ValueId, ValueId) {
        let mut g = Graph::new("f");
        let x = g.add_input("x", TensorType::f32([Dim::T, 4.into()]));
        let a = g.add1(Silu {}, &[x]).unwrap();
        let b = g.add1(Add {}, &[a, x]).unwrap();
        g.set_outputs(vec![b]);
        assert_eq!(verify(&g, None), Ok(()));
        (g, x, a, b)
    }

    #[test]
    fn a_cycle_is_g1() {
        let (mut g, x, _, b) = chain();
        // silu now takes what is computed from silu.
        g.replace_uses(x, b).unwrap();
        let error = verify(&g, None).unwrap_err();
        assert!(error.to_string().contains("%0 = silu: graph (G1)"), "{error}");
    }

    #[test]
    fn a_gap_between_inputs_is_g2() {
        let (mut g, x, _, b) = chain();
        g.connect(x, b.node, 3);
        assert_eq!(rule(verify(&g, None)), "G2");
    }

    #[test]
    fn a_wrong_recorded_type_is_g3() {
        let (mut g, _, a, _) = chain();
        g.node_mut(a.node).outputs = vec![TensorType::f32([Dim::T, 5.into()])];
        assert_eq!(rule(verify(&g, None)), "G3");
    }

    #[test]
    fn a_missing_output_is_g4() {
        let (mut g, _, a, b) = chain();
        g.set_outputs(vec![ValueId { node: b.node, slot: 1 }]);
        assert_eq!(rule(verify(&g, None)), "G4");
        g.set_outputs(vec![a]);
        g.connect(ValueId { node: a.node, slot: 7 }, b.node, 2);
        assert_eq!(rule(verify(&g, None)), "G4");
        let narrow = g.add_input("narrow", TensorType::f32([Dim::T, 2.into()]));
        assert_eq!(rule(g.replace_uses(a, narrow)), "G4");
    }

    #[test]
    fn an_unlisted_input_is_g6() {
        let (mut g, ..) = chain();
        g.add(Input { ty: TensorType::i32([Dim::T]) }, &[]).unwrap();
        assert_eq!(rule(verify(&g, None)), "G6");
    }

    #[test]
    fn removing_a_used_node_is_g6() {
        let (mut g, _, a, b) = chain();
        assert_eq!(rule(g.remove(a.node)), "G6");
        g.set_outputs(vec![a]);
        assert_eq!(g.remove(b.node), Ok(()));
        assert_eq!(verify(&g, None), Ok(()));
    }

    #[test]
    fn a_name_spelled_badly_is_g7() {
        let (mut g, _, a, _) = chain();
        g.node_mut(a.node).name = "x".to_owned();
        assert_eq!(rule(verify(&g, None)), "G7");
        g.node_mut(a.node).name = "a b".to_owned();
        assert_eq!(rule(verify(&g, None)), "G7");
    }
}
