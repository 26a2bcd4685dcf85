//! The reference interpreter: scalar, slow, and what the words mean.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, NodeId, ValueId};
use crate::ops::{Op, OpKind};
use crate::tensor::{Tensor, TensorData};
use crate::types::{Dim, Elem, Sym, TensorType};
use crate::weights::WeightStore;
use std::collections::BTreeMap;

/// Rounding of every op's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    F64,
}

/// What evaluation of an op may look at besides its inputs.
#[derive(Debug)]
pub struct EvalCx<'a> {
    pub weights: &'a WeightStore,
    pub cache: &'a mut KvState,
    /// Sequence of each token of the step, `[T]`.
    pub seqs: &'a [i32],
    /// What the symbols stand for in this step.
    pub sizes: Sizes,
}

/// The numbers that symbolic dimensions stand for in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes([Option<usize>; Sym::ALL.len()]);

impl Sizes {
    /// The number a symbol stands for, once an input has fixed it.
    pub fn get(&self, sym: Sym) -> Option<usize> {
        self.0[sym as usize]
    }

    /// The number a dimension stands for.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when no input fixes the symbol.
    pub fn resolve(&self, dim: Dim) -> Result<usize> {
        match dim {
            Dim::Fixed(n) => Ok(n),
            Dim::Sym(sym) => self.get(sym).ok_or_else(|| {
                let expected = format!("an input with dimension {}", sym.letter());
                Error::new(ErrorKind::Input { expected, got: "none".to_owned() })
            }),
        }
    }

    /// Binds the symbols of `ty` to the dimensions of `tensor`, and checks both against each other.
    fn bind(&mut self, ty: &TensorType, tensor: &Tensor) -> Result<()> {
        let fits_element = match (ty.elem, &tensor.data) {
            (Elem::Plain(attar_format::DType::I32), TensorData::Int(v)) => v.len() == tensor.len(),
            (elem, TensorData::Real(v)) => elem.is_float() && v.len() == tensor.len(),
            _ => false,
        };
        let fits_shape = ty.rank() == tensor.shape.len()
            && ty.shape.iter().zip(&tensor.shape).all(|(dim, size)| match dim {
                Dim::Fixed(n) => n == size,
                Dim::Sym(sym) => *self.0[*sym as usize].get_or_insert(*size) == *size,
            });
        if fits_element && fits_shape {
            return Ok(());
        }
        let bound = Sym::ALL.into_iter().filter_map(|s| Some(format!("{}={}", s.letter(), self.get(s)?)));
        let expected = format!("{ty} with {}", bound.collect::<Vec<_>>().join(" "));
        let got = format!("{} of shape {:?}", tensor.data.kind(), tensor.shape);
        Err(Error::new(ErrorKind::Input { expected, got }))
    }
}

/// The KV cache of the interpreter: per layer and sequence, keys and values by position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvState {
    pub layers: BTreeMap<(usize, i32), Vec<KeyValue>>,
}

/// Key and value of one token, all KV heads side by side.
pub type KeyValue = (Vec<f64>, Vec<f64>);

impl KvState {
    /// Stores the key and value of one token, all KV heads side by side. A position already held is overwritten.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when an earlier position was never stored.
    pub fn store(
        &mut self,
        layer: usize,
        seq: i32,
        position: i32,
        key: Vec<f64>,
        value: Vec<f64>,
    ) -> Result<()> {
        let held = self.layers.entry((layer, seq)).or_default();
        match usize::try_from(position) {
            Ok(at) if at < held.len() => held[at] = (key, value),
            Ok(at) if at == held.len() => held.push((key, value)),
            _ => {
                let expected =
                    format!("positions of sequence {seq} to follow the {} cached ones", held.len());
                return Err(Error::new(ErrorKind::Input { expected, got: position.to_string() }));
            }
        }
        Ok(())
    }

    /// What a layer holds of a sequence, by position.
    pub fn get(&self, layer: usize, seq: i32) -> &[KeyValue] {
        self.layers.get(&(layer, seq)).map_or(&[], Vec::as_slice)
    }
}

/// The inputs of one step of a model: a flat batch of tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Token ids, `[T]`.
    pub tokens: Vec<i32>,
    /// Position of each token in its sequence, `[T]`.
    pub positions: Vec<i32>,
    /// Sequence of each token, `[T]`.
    pub seqs: Vec<i32>,
    /// Tokens of this step whose logits are wanted, `[R]`.
    pub rows: Vec<i32>,
}

impl Step {
    /// `tokens` of sequence 0 from position `start` on; logits of the last one.
    pub fn new(tokens: &[i32], start: i32) -> Step {
        let len = tokens.len() as i32;
        Step {
            tokens: tokens.to_vec(),
            positions: (start..start + len).collect(),
            seqs: vec![0; tokens.len()],
            rows: vec![len - 1],
        }
    }

    /// The same step with the logits of every token.
    #[must_use]
    pub fn all_rows(mut self) -> Step {
        self.rows = (0..self.tokens.len() as i32).collect();
        self
    }

    /// The tensors of a graph's inputs, which are any of `tokens`, `positions` and `rows`.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the graph has an input of another name.
    pub fn inputs(&self, graph: &Graph) -> Result<Vec<Tensor>> {
        let tensor = |id: &NodeId| {
            let values = match graph.node(*id).name.as_str() {
                "tokens" => &self.tokens,
                "positions" => &self.positions,
                "rows" => &self.rows,
                other => {
                    let expected = "inputs named tokens, positions and rows".to_owned();
                    return Err(Error::new(ErrorKind::Input { expected, got: other.to_owned() }));
                }
            };
            Ok(Tensor::int([values.len()], values.clone()))
        };
        graph.inputs().iter().map(tensor).collect()
    }
}

/// Runs one step of sequence 0. `inputs` are in the order of the graph's inputs.
///
/// # Errors
/// When inputs do not fit the graph, or an op fails.
pub fn run(
    graph: &Graph,
    weights: &WeightStore,
    precision: Precision,
    cache: &mut KvState,
    inputs: &[Tensor],
) -> Result<Vec<Tensor>> {
    evaluate(graph, weights, precision, cache, inputs, None)
}

/// As [`run`], with the sequence of each token.
///
/// # Errors
/// As [`run`].
pub fn run_seqs(
    graph: &Graph,
    weights: &WeightStore,
    precision: Precision,
    cache: &mut KvState,
    inputs: &[Tensor],
    seqs: &[i32],
) -> Result<Vec<Tensor>> {
    evaluate(graph, weights, precision, cache, inputs, Some(seqs))
}

/// Runs one step of a model and gives its outputs; the logits `[R, V]` come first.
///
/// # Errors
/// As [`run`].
pub fn run_step(
    graph: &Graph,
    weights: &WeightStore,
    precision: Precision,
    cache: &mut KvState,
    step: &Step,
) -> Result<Vec<Tensor>> {
    evaluate(graph, weights, precision, cache, &step.inputs(graph)?, Some(&step.seqs))
}

fn evaluate(
    graph: &Graph,
    weights: &WeightStore,
    precision: Precision,
    cache: &mut KvState,
    inputs: &[Tensor],
    seqs: Option<&[i32]>,
) -> Result<Vec<Tensor>> {
    if inputs.len() != graph.inputs().len() {
        let expected = format!("{} inputs", graph.inputs().len());
        return Err(Error::new(ErrorKind::Input { expected, got: inputs.len().to_string() }));
    }
    let mut sizes = Sizes::default();
    let mut values: BTreeMap<ValueId, Tensor> = BTreeMap::new();
    for (node, tensor) in graph.inputs().iter().zip(inputs) {
        let value = ValueId { node: *node, slot: 0 };
        sizes.bind(graph.ty(value), tensor).map_err(|e| e.at_node(graph.describe(*node)))?;
        values.insert(value, tensor.clone());
    }
    let one_sequence = vec![0; sizes.get(Sym::T).unwrap_or(0)];
    let mut cx = EvalCx { weights, cache, seqs: seqs.unwrap_or(&one_sequence), sizes };

    let order = graph.topo();
    if order.len() != graph.len() {
        let problem = "the graph has a cycle".to_owned();
        return Err(Error::new(ErrorKind::Structure { rule: "G1", problem }));
    }
    let last_use = last_uses(graph, &order);
    for (time, id) in order.iter().enumerate() {
        let (op, operands) = (graph.op(*id), graph.inputs_of(*id));
        if !matches!(op, OpKind::Input(_)) {
            let mut taken = Vec::with_capacity(operands.len());
            for (slot, v) in operands.iter().enumerate() {
                let is_last = last_use.get(&v.node) == Some(&time) && !operands[slot + 1..].contains(v);
                let known = if is_last { values.remove(v) } else { values.get(v).cloned() };
                taken.push(known.ok_or_else(|| {
                    Error::new(ErrorKind::UnknownValue { name: graph.node(v.node).name.clone() })
                })?);
            }
            let results = op.eval(&mut cx, &taken).map_err(|e| e.at_node(graph.describe(*id)))?;
            for (slot, mut tensor) in results.into_iter().enumerate() {
                if precision == Precision::F32 {
                    tensor.round_to_f32();
                }
                values.insert(ValueId { node: *id, slot: slot as u16 }, tensor);
            }
        }
        // What nobody needs any more goes at once: weights are the bulk of a model.
        for v in operands.iter().copied().chain([ValueId { node: *id, slot: 0 }]) {
            if last_use.get(&v.node).is_none_or(|last| *last <= time) {
                values.retain(|held, _| held.node != v.node);
            }
        }
    }
    let output = |v: &ValueId| {
        values
            .get(v)
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::UnknownValue { name: graph.node(v.node).name.clone() }))
    };
    graph.outputs().iter().map(output).collect()
}

/// When each node is used last, as an index into `order`; function outputs are used for ever.
fn last_uses(graph: &Graph, order: &[NodeId]) -> BTreeMap<NodeId, usize> {
    let mut last = BTreeMap::new();
    for (time, id) in order.iter().enumerate() {
        for v in graph.inputs_of(*id) {
            last.insert(v.node, time);
        }
    }
    for v in graph.outputs() {
        last.insert(v.node, usize::MAX);
    }
    last
}
