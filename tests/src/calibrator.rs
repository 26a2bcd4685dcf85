//! A calibrator made of the reference interpreter and random inputs: slow, obvious, for graphs of any kind.

use crate::random::{self, Sequences};
use attar_ir::interp::{self, KvState, Precision};
use attar_ir::{Graph, ValueId, WeightName, WeightStore};
use attar_pass::{Calibrator, Error, ErrorKind, InputStatistics, Result};

/// Runs the interpreter on so many random steps for every question.
#[derive(Clone, Copy, Debug)]
pub struct InterpreterCalibrator {
    pub steps: u64,
}

impl Calibrator for InterpreterCalibrator {
    fn input_statistics(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<InputStatistics> {
        let mut graph = graph.clone();
        graph.set_outputs(vec![input]);
        let mut rows: Vec<Vec<f64>> = Vec::new();
        for seed in 0..self.steps {
            progress("interpreting", seed, self.steps);
            let inputs = random::inputs(&graph, seed, Sequences::One)
                .map_err(|e| Error::new(ErrorKind::Calibration { problem: e.to_string() }))?;
            let mut cache = KvState::default();
            let outputs = interp::run(&graph, weights, Precision::F64, &mut cache, &inputs.tensors)?;
            let width = outputs[0].shape.last().copied().unwrap_or(1);
            rows.extend(outputs[0].as_real().chunks_exact(width).map(<[f64]>::to_vec));
        }
        Ok(statistics_of(&rows))
    }

    fn divergence(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        _: Option<ValueId>,
        changed: &[(WeightName, Vec<f32>)],
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<f64> {
        let mut other = WeightStore::new();
        for (_, w) in graph.weights() {
            let found = changed.iter().find(|(name, _)| *name == w.name);
            let values = found.map_or_else(|| weights.read_f32(&w.name), |(_, values)| Ok(values.clone()))?;
            other.add_values(&w.name, &weights.info(&w.name)?.shape, values);
        }
        let mut each = Vec::new();
        for seed in 0..self.steps {
            progress("interpreting", seed, self.steps);
            let inputs = random::inputs(graph, seed, Sequences::One)
                .map_err(|e| Error::new(ErrorKind::Calibration { problem: e.to_string() }))?;
            let run = |weights: &WeightStore| {
                interp::run(graph, weights, Precision::F64, &mut KvState::default(), &inputs.tensors)
            };
            let (base, new) = (run(weights)?, run(&other)?);
            let width = base[0].shape.last().copied().unwrap_or(1);
            let rows = base[0].as_real().chunks_exact(width).zip(new[0].as_real().chunks_exact(width));
            each.extend(rows.map(|(p, q)| divergence_of(p, q)));
        }
        Ok(each.iter().sum::<f64>() / each.len().max(1) as f64)
    }
}

/// Kullback-Leibler divergence of the distributions that two rows of logits stand for.
fn divergence_of(p: &[f64], q: &[f64]) -> f64 {
    let log_sum = |x: &[f64]| x.iter().map(|v| v.exp()).sum::<f64>().ln();
    let (a, b) = (log_sum(p), log_sum(q));
    p.iter().zip(q).map(|(p, q)| (p - a).exp() * ((p - a) - (q - b))).sum()
}

/// The statistics of some rows, by their definition.
pub fn statistics_of(rows: &[Vec<f64>]) -> InputStatistics {
    let width = rows.first().map_or(0, Vec::len);
    let moment = |i: usize, j: usize| rows.iter().map(|r| r[i] * r[j]).sum::<f64>() as f32;
    let least = |i: usize| rows.iter().fold(f64::INFINITY, |m, r| m.min(r[i])) as f32;
    let greatest = |i: usize| rows.iter().fold(f64::NEG_INFINITY, |m, r| m.max(r[i])) as f32;
    InputStatistics {
        n_tokens: rows.len() as u64,
        width,
        second_moment: (0..width * width).map(|at| moment(at / width, at % width)).collect(),
        minimum: (0..width).map(least).collect(),
        maximum: (0..width).map(greatest).collect(),
        fourth_moment: (0..width).map(|i| rows.iter().map(|r| r[i].powi(4)).sum()).collect(),
    }
}
