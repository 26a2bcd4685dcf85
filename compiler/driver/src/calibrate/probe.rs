//! How far a model's predictions move when some of its weights change: short runs of what depends on them.

use super::dense::{exp, lane_sum, largest};
use super::sequential::SequentialRun;
use attar_ir::{Graph, ValueId, WeightName, WeightStore};
use attar_pass::{Error, ErrorKind, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Windows of calibration text that are tried, and tokens of each: enough to tell weights that matter from those that do not.
const WINDOWS: usize = 6;
const TOKENS: usize = 128;
/// Of so many positions one is scored: the head is what takes longest.
const EVERY: usize = 2;

/// Runs of the model as it is, kept up to where the last question began.
#[derive(Debug)]
pub(crate) struct Probe {
    windows: Vec<Vec<u32>>,
    memory: u64,
    run: SequentialRun,
    /// Logarithms of the predicted probabilities `[R, V]` of each window.
    base: Vec<Vec<f32>>,
}

impl Probe {
    /// A probe on the beginning of some of the windows.
    pub(crate) fn new(
        windows: &[Vec<u32>],
        graph: &Graph,
        weights: &WeightStore,
        memory: u64,
    ) -> Result<Probe> {
        let every = windows.len().div_ceil(WINDOWS).max(1);
        let cut = |w: &Vec<u32>| w[..w.len().min(TOKENS)].to_vec();
        let windows: Vec<Vec<u32>> = windows.iter().step_by(every).map(cut).collect();
        let run = SequentialRun::with_rows(windows.clone(), memory, 1, EVERY);
        let mut probe = Probe { windows, memory, run, base: Vec::new() };
        let logits = probe.run.rest(graph, weights, output(graph)?, &BTreeMap::new())?;
        probe.base = logits;
        let vocab = graph.ty(output(graph)?).last().unwrap_or(1).max(1);
        probe.base.par_iter_mut().flat_map(|l| l.par_chunks_exact_mut(vocab)).for_each(|row| {
            let total = log_sum(row);
            row.iter_mut().for_each(|l| *l -= total);
        });
        Ok(probe)
    }

    /// Mean divergence of the predictions with other values of some weights, in nats. `from` is a value computed before any
    /// of them is read, so that what comes before it need not run again.
    pub(crate) fn divergence(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        from: Option<ValueId>,
        changed: &[(WeightName, Vec<f32>)],
    ) -> Result<f64> {
        let changed: BTreeMap<&str, &[f32]> = changed.iter().map(|(n, v)| (&**n, v.as_slice())).collect();
        let value = output(graph)?;
        let logits = match from {
            Some(from) => {
                self.run.advance(graph, weights, from, &mut |_, _, _| (), &mut |_| ())?;
                self.run.rest(graph, weights, value, &changed)?
            }
            None => {
                let fresh = SequentialRun::with_rows(self.windows.clone(), self.memory, 1, EVERY);
                fresh.rest(graph, weights, value, &changed)?
            }
        };
        let vocab = graph.ty(value).last().unwrap_or(1).max(1);
        let pairs = self.base.iter().zip(&logits);
        let rows = pairs.flat_map(|(base, new)| base.chunks_exact(vocab).zip(new.chunks_exact(vocab)));
        let rows: Vec<(&[f32], &[f32])> = rows.collect();
        let each: Vec<f64> = rows.par_iter().map(|(base, new)| divergence_of(base, new)).collect();
        Ok(each.iter().sum::<f64>() / each.len().max(1) as f64)
    }
}

fn output(graph: &Graph) -> Result<ValueId> {
    graph
        .outputs()
        .first()
        .copied()
        .ok_or_else(|| Error::new(ErrorKind::Calibration { problem: "the graph has no output".to_owned() }))
}

/// `ln Σ exp`.
pub(crate) fn log_sum(logits: &[f32]) -> f32 {
    let top = largest(logits);
    top + libm::log(lane_sum(logits.len(), |i| f64::from(exp(logits[i] - top)))) as f32
}

/// `Σ p (ln p - ln q)` of log-probabilities and logits.
fn divergence_of(base: &[f32], new: &[f32]) -> f64 {
    let total = log_sum(new);
    let (base, new) = (&base[..new.len()], new);
    lane_sum(new.len(), |i| f64::from(exp(base[i]) * (base[i] - (new[i] - total)))).max(0.0)
}
