//! Lowered code against the interpreter.

use crate::random::{self, Sequences};
use crate::tolerance::Tolerance;
use anyhow::{Context, Result, ensure};
use attar_codegen_cpu::host::{HostRunner, Kernels, Room};
use attar_codegen_cpu::lower::LowerOptions;
use attar_ir::Graph;
use attar_ir::interp::{self, KvState, Precision};

/// Runs the graph on random weights and inputs both ways, and compares every output.
///
/// # Errors
/// When it cannot be lowered or run, or an output is off by more than the tolerance.
pub fn check(
    graph: &Graph,
    options: &LowerOptions,
    kernels: Kernels,
    seed: u64,
    tolerance: Tolerance,
) -> Result<()> {
    let weights = random::weights(graph, seed)?;
    let inputs = random::inputs(graph, seed, Sequences::One)?;
    let reference = interp::run(graph, &weights, Precision::F64, &mut KvState::default(), &inputs.tensors)?;
    let room = Room { sequences: 1, context: 64 };
    let mut runner = HostRunner::new(graph, &weights, options, kernels, room)?;
    let got = runner.run(&inputs.tensors)?;
    ensure!(got.len() == reference.len(), "{} outputs instead of {}", got.len(), reference.len());
    for (i, (a, b)) in reference.iter().zip(&got).enumerate() {
        ensure!(a.shape == b.shape, "output {i} has shape {:?} instead of {:?}", b.shape, a.shape);
        let near = tolerance.check(a.as_real(), b.as_real());
        near.map_err(anyhow::Error::msg).with_context(|| format!("output {i}"))?;
    }
    Ok(())
}
