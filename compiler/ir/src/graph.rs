//! The graph: typed nodes over petgraph's stable graph, behind ids of our own.
//!
//! A node has ordered inputs and one or more outputs (slots); an edge carries both slots. Iteration order is
//! topological with ties broken by id, so everything derived from a graph is deterministic.

use crate::error::{Error, ErrorKind, Result};
use crate::ops::{Input, Op, OpKind, Weight};
use crate::types::TensorType;
use crate::weights::WeightName;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;
use std::collections::{BTreeMap, BTreeSet};

/// A node of one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

/// Output `slot` of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId {
    pub node: NodeId,
    pub slot: u16,
}

/// An op instance: what it does, its name in the text form, and the types it yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op: OpKind,
    /// Printed as `%name`; unique in the graph. Nodes with several outputs print `%name#0, %name#1`.
    pub name: String,
    pub outputs: Vec<TensorType>,
}

#[derive(Clone, Copy, Debug)]
struct Edge {
    from_slot: u16,
    to_slot: u16,
}

/// One step of a model.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Name of the function in the text form.
    pub name: String,
    nodes: StableDiGraph<Node, Edge>,
    inputs: Vec<NodeId>,
    outputs: Vec<ValueId>,
    /// Node of every name in use. Ordered rather than hashed: names may come from hostile text.
    names: BTreeMap<String, NodeId>,
    next_name: u32,
}

impl Graph {
    pub fn new(name: &str) -> Graph {
        Graph { name: name.to_owned(), ..Graph::default() }
    }

    /// Adds a function input.
    pub fn add_input(&mut self, name: &str, ty: TensorType) -> ValueId {
        let op = OpKind::Input(Input { ty: ty.clone() });
        let node = self.push(op, Some(name), vec![ty]);
        self.inputs.push(node);
        ValueId { node, slot: 0 }
    }

    /// Adds a reference to a weight. The type's shape is fixed.
    pub fn add_weight(&mut self, weight: &WeightName, ty: TensorType) -> ValueId {
        ValueId { node: self.push_weight(weight, ty, None), slot: 0 }
    }

    pub(crate) fn add_weight_named(&mut self, weight: &WeightName, ty: TensorType, name: &str) -> NodeId {
        self.push_weight(weight, ty, Some(name))
    }

    fn push_weight(&mut self, weight: &WeightName, ty: TensorType, name: Option<&str>) -> NodeId {
        let op = OpKind::Weight(Weight { name: weight.clone(), ty: ty.clone() });
        self.push(op, name, vec![ty])
    }

    /// Adds a node; its output types are inferred and its rules checked.
    ///
    /// # Errors
    /// When an input is unknown or a rule of the op does not hold.
    pub fn add(&mut self, op: impl Into<OpKind>, inputs: &[ValueId]) -> Result<NodeId> {
        self.add_named(op, inputs, None)
    }

    /// As [`Graph::add`], with a name for the text form.
    ///
    /// # Errors
    /// As [`Graph::add`].
    pub fn add_named(
        &mut self,
        op: impl Into<OpKind>,
        inputs: &[ValueId],
        name: Option<&str>,
    ) -> Result<NodeId> {
        let op = op.into();
        let types = inputs.iter().map(|v| self.try_ty(*v).cloned()).collect::<Result<Vec<_>>>()?;
        let outputs = op.infer(&types).map_err(|e| e.at_node(site(name, &op)))?;
        if let Some(ty) = outputs.iter().find(|ty| !ty.is_bounded()) {
            return Err(unbounded(ty).at_node(site(name, &op)));
        }
        let node = self.push(op, name, outputs);
        for (slot, v) in inputs.iter().enumerate() {
            self.connect(*v, node, slot as u16);
        }
        Ok(node)
    }

    /// As [`Graph::add`] for an op with one output.
    ///
    /// # Errors
    /// As [`Graph::add`].
    pub fn add1(&mut self, op: impl Into<OpKind>, inputs: &[ValueId]) -> Result<ValueId> {
        Ok(ValueId { node: self.add(op, inputs)?, slot: 0 })
    }

    fn push(&mut self, op: OpKind, name: Option<&str>, outputs: Vec<TensorType>) -> NodeId {
        let name = match name.map(spelled) {
            Some(n) if !self.names.contains_key(&n) => n,
            _ => self.fresh_name(),
        };
        let id = NodeId(self.nodes.add_node(Node { op, name: name.clone(), outputs }).index() as u32);
        self.names.insert(name, id);
        id
    }

    fn fresh_name(&mut self) -> String {
        loop {
            let name = self.next_name.to_string();
            self.next_name += 1;
            if !self.names.contains_key(&name) {
                return name;
            }
        }
    }

    /// The node of that name.
    pub fn by_name(&self, name: &str) -> Option<NodeId> {
        self.names.get(name).copied()
    }

    /// Gives a node another name, unless that is taken.
    pub fn rename(&mut self, id: NodeId, name: &str) {
        let name = spelled(name);
        if !self.names.contains_key(&name) {
            let old = std::mem::replace(&mut self.nodes[ix(id)].name, name.clone());
            self.names.remove(&old);
            self.names.insert(name, id);
        }
    }

    /// How errors and dumps call a node: `%q = linear`.
    pub fn describe(&self, id: NodeId) -> String {
        let node = self.node(id);
        site(Some(&node.name), &node.op)
    }

    #[cfg(test)]
    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[ix(id)]
    }

    pub(crate) fn connect(&mut self, from: ValueId, to: NodeId, to_slot: u16) {
        self.nodes.add_edge(ix(from.node), ix(to), Edge { from_slot: from.slot, to_slot });
    }

    /// The node, which must be of this graph and not removed.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[ix(id)]
    }

    pub fn op(&self, id: NodeId) -> &OpKind {
        &self.nodes[ix(id)].op
    }

    pub fn contains(&self, id: NodeId) -> bool {
        self.nodes.contains_node(ix(id))
    }

    /// Type of a value.
    pub fn ty(&self, v: ValueId) -> &TensorType {
        &self.nodes[ix(v.node)].outputs[usize::from(v.slot)]
    }

    fn try_ty(&self, v: ValueId) -> Result<&TensorType> {
        self.nodes
            .node_weight(ix(v.node))
            .and_then(|n| n.outputs.get(usize::from(v.slot)))
            .ok_or_else(|| Error::new(ErrorKind::UnknownValue { name: format!("{}.{}", v.node.0, v.slot) }))
    }

    /// Values a node takes, in slot order.
    pub fn inputs_of(&self, id: NodeId) -> Vec<ValueId> {
        self.input_slots(id).into_iter().map(|(_, v)| v).collect()
    }

    /// Input edges with the slots they fill, in slot order.
    pub(crate) fn input_slots(&self, id: NodeId) -> Vec<(u16, ValueId)> {
        let mut ins: Vec<(u16, ValueId)> = self
            .nodes
            .edges_directed(ix(id), Direction::Incoming)
            .map(|e| (e.weight().to_slot, ValueId { node: id_of(e.source()), slot: e.weight().from_slot }))
            .collect();
        ins.sort_unstable();
        ins
    }

    /// Nodes that take a value, with the slot they take it in, by id. Function outputs are not among them.
    pub fn users(&self, v: ValueId) -> Vec<(NodeId, u16)> {
        let mut users: Vec<(NodeId, u16)> = self
            .nodes
            .edges_directed(ix(v.node), Direction::Outgoing)
            .filter(|e| e.weight().from_slot == v.slot)
            .map(|e| (id_of(e.target()), e.weight().to_slot))
            .collect();
        users.sort_unstable();
        users
    }

    /// Whether the value is used exactly once, counting function outputs.
    pub fn has_one_use(&self, v: ValueId) -> bool {
        self.users(v).len() + self.outputs.iter().filter(|o| **o == v).count() == 1
    }

    /// Function inputs, in order.
    pub fn inputs(&self) -> &[NodeId] {
        &self.inputs
    }

    /// Function outputs, in order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    pub fn set_outputs(&mut self, outputs: Vec<ValueId>) {
        self.outputs = outputs;
    }

    /// The function input of that name.
    pub fn input_named(&self, name: &str) -> Option<ValueId> {
        let node = self.inputs.iter().copied().find(|i| self.node(*i).name == name)?;
        Some(ValueId { node, slot: 0 })
    }

    /// Makes every user of `old` take `new` instead. Types must agree.
    ///
    /// # Errors
    /// [`ErrorKind::Structure`] (`G4`) when the types differ.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) -> Result<()> {
        if self.try_ty(old)? != self.try_ty(new)? {
            let problem = format!("cannot replace a {} by a {}", self.ty(old), self.ty(new));
            return Err(Error::new(ErrorKind::Structure { rule: "G4", problem }));
        }
        let edges: Vec<_> = self
            .nodes
            .edges_directed(ix(old.node), Direction::Outgoing)
            .filter(|e| e.weight().from_slot == old.slot)
            .map(|e| (e.id(), e.target(), *e.weight()))
            .collect();
        if old == new {
            return Ok(());
        }
        for (edge, target, slots) in edges {
            self.nodes.remove_edge(edge);
            self.connect(new, id_of(target), slots.to_slot);
        }
        for out in &mut self.outputs {
            if *out == old {
                *out = new;
            }
        }
        Ok(())
    }

    /// Replaces the weight a node refers to, and its type (a pass has encoded it).
    ///
    /// # Errors
    /// [`ErrorKind::Structure`] when the node is no weight or the shape changes.
    pub fn set_weight(&mut self, id: NodeId, name: WeightName, ty: TensorType) -> Result<()> {
        let node = &mut self.nodes[ix(id)];
        match &node.op {
            OpKind::Weight(w) if w.ty.shape == ty.shape => {}
            _ => {
                let problem = format!("%{} is no weight of shape {ty}", node.name);
                return Err(Error::new(ErrorKind::Structure { rule: "G5", problem }));
            }
        }
        node.op = OpKind::Weight(Weight { name, ty: ty.clone() });
        node.outputs = vec![ty];
        Ok(())
    }

    /// Removes a node nobody uses.
    ///
    /// # Errors
    /// [`ErrorKind::Structure`] (`G6`) when it is still used, or is a function input.
    pub fn remove(&mut self, id: NodeId) -> Result<()> {
        if self.is_used(id) || self.inputs.contains(&id) {
            let problem = format!("%{} is still used", self.node(id).name);
            return Err(Error::new(ErrorKind::Structure { rule: "G6", problem }));
        }
        if let Some(node) = self.nodes.remove_node(ix(id)) {
            self.names.remove(&node.name);
        }
        Ok(())
    }

    /// Puts values in the place of a node: output `i` becomes `with[i]`, and the node is removed. When all come from
    /// one node that was added without a name, it inherits the name.
    ///
    /// # Errors
    /// [`ErrorKind::Structure`] (`G4`) when counts or types differ.
    pub fn replace(&mut self, old: NodeId, with: &[ValueId]) -> Result<()> {
        let node = self.node(old);
        if with.len() != node.outputs.len() {
            let problem = format!("%{} has {} outputs, not {}", node.name, node.outputs.len(), with.len());
            return Err(Error::new(ErrorKind::Structure { rule: "G4", problem }));
        }
        let name = node.name.clone();
        for (slot, new) in with.iter().enumerate() {
            self.replace_uses(ValueId { node: old, slot: slot as u16 }, *new)?;
        }
        self.remove(old)?;
        if let Some(first) = with.first() {
            let is_auto = self.node(first.node).name.bytes().all(|b| b.is_ascii_digit());
            if is_auto && with.iter().all(|v| v.node == first.node) {
                self.rename(first.node, &name);
            }
        }
        Ok(())
    }

    /// Whether any output of a node is taken by another node, or is a function output.
    pub fn is_used(&self, id: NodeId) -> bool {
        self.nodes.edges_directed(ix(id), Direction::Outgoing).next().is_some()
            || self.outputs.iter().any(|o| o.node == id)
    }

    /// Removes a node that nothing uses, and then whatever fed only it. Nodes that are not pure stay.
    ///
    /// # Errors
    /// None that the graph's own invariants allow.
    pub fn remove_unused(&mut self, node: NodeId) -> Result<()> {
        let mut pending = vec![node];
        while let Some(id) = pending.pop() {
            if !self.contains(id) || self.is_used(id) || !self.op(id).is_pure() {
                continue;
            }
            let inputs = self.inputs_of(id);
            self.remove(id)?;
            pending.extend(inputs.into_iter().map(|v| v.node));
        }
        Ok(())
    }

    /// As [`Graph::replace`], and removes what is no longer used.
    ///
    /// # Errors
    /// As [`Graph::replace`].
    pub fn replace_and_clean(&mut self, old: NodeId, with: &[ValueId]) -> Result<()> {
        let inputs = self.inputs_of(old);
        self.replace(old, with)?;
        inputs.into_iter().try_for_each(|v| self.remove_unused(v.node))
    }

    /// Replaces a fused node by its decomposition into core ops; `false` when the op is a core op.
    ///
    /// # Errors
    /// When the decomposition breaks a rule, which is a bug in the op.
    pub fn expand(&mut self, id: NodeId) -> Result<bool> {
        let (op, inputs) = (self.op(id).clone(), self.inputs_of(id));
        match op.decompose(self, &inputs)? {
            Some(values) => self.replace(id, &values).map(|()| true),
            None => Ok(false),
        }
    }

    /// Weight nodes in id order, with the names of their tensors.
    pub fn weights(&self) -> impl Iterator<Item = (NodeId, &Weight)> {
        self.ids().filter_map(|id| match self.op(id) {
            OpKind::Weight(w) => Some((id, w)),
            _ => None,
        })
    }

    /// All nodes, each after its inputs, ties by id. Nodes on a cycle are left out (the verifier reports them).
    pub fn topo(&self) -> Vec<NodeId> {
        let mut missing: rustc_hash::FxHashMap<NodeIndex, usize> = rustc_hash::FxHashMap::default();
        let mut ready: BTreeSet<NodeIndex> = BTreeSet::new();
        for n in self.nodes.node_indices() {
            let count = self.nodes.edges_directed(n, Direction::Incoming).count();
            if count == 0 {
                ready.insert(n);
            } else {
                missing.insert(n, count);
            }
        }
        let mut order = Vec::with_capacity(self.nodes.node_count());
        while let Some(n) = ready.pop_first() {
            order.push(id_of(n));
            for e in self.nodes.edges_directed(n, Direction::Outgoing) {
                if let Some(count) = missing.get_mut(&e.target()) {
                    *count -= 1;
                    if *count == 0 {
                        missing.remove(&e.target());
                        ready.insert(e.target());
                    }
                }
            }
        }
        order
    }

    /// Number of nodes, inputs and weights included.
    pub fn len(&self) -> usize {
        self.nodes.node_count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All node ids in id order.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.node_indices().map(id_of)
    }
}

impl PartialEq for Graph {
    /// Whether both are the same function written the same way: ids may differ, order, names and types may not.
    fn eq(&self, other: &Graph) -> bool {
        let value = |g: &Graph, v: &ValueId| (g.node(v.node).name.clone(), v.slot);
        let key = |g: &Graph, id: &NodeId| g.inputs_of(*id).iter().map(|v| value(g, v)).collect::<Vec<_>>();
        let (a, b) = (self.topo(), other.topo());
        self.name == other.name
            && self.len() == other.len()
            && a.len() == b.len()
            && a.iter().zip(&b).all(|(x, y)| self.node(*x) == other.node(*y) && key(self, x) == key(other, y))
            && self
                .inputs
                .iter()
                .map(|i| &self.node(*i).name)
                .eq(other.inputs.iter().map(|i| &other.node(*i).name))
            && self.outputs.iter().map(|v| value(self, v)).eq(other.outputs.iter().map(|v| value(other, v)))
    }
}

/// Longest name of a node, in bytes.
const MAX_NAME: usize = 200;

/// Whether a name can stand after `%` as it is.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
    !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(plain)
}

/// The name with what the text form cannot spell replaced by `_`.
fn spelled(name: &str) -> String {
    if is_plain_name(name) {
        return name.to_owned();
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' };
    let short: String = name.chars().take(MAX_NAME).map(plain).collect();
    if short.is_empty() { "_".to_owned() } else { short }
}

fn site(name: Option<&str>, op: &OpKind) -> String {
    match name {
        Some(name) => format!("%{name} = {}", op.name()),
        None => op.name().to_owned(),
    }
}

/// The error for a type that breaks the verifier's rule G8.
pub(crate) fn unbounded(ty: &TensorType) -> Error {
    let (rank, most) = (TensorType::MAX_RANK, TensorType::MAX_ELEMENTS);
    let problem = format!("{ty} has a zero dimension, a rank above {rank}, or more than {most} elements");
    Error::new(ErrorKind::Structure { rule: "G8", problem })
}

fn ix(id: NodeId) -> NodeIndex {
    NodeIndex::new(id.0 as usize)
}

fn id_of(n: NodeIndex) -> NodeId {
    NodeId(n.index() as u32)
}
