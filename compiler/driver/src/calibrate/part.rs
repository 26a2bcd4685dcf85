//! A part of a model on its own: how far it is from what the uncompressed model gives there, and which way its weights lead
//! nearer.

use super::backward::Tape;
use super::sequential::{Indices, SequentialRun, Snapshot, damaged, evaluate};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName, WeightStore};
use attar_pass::{Part, PartGradient, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Windows of one batch.
const BATCH: usize = 2;

/// A part of the model, with what goes in and what comes out of the uncompressed model, window by window.
#[derive(Debug)]
pub(crate) struct PartRun {
    part: Part,
    nodes: Vec<NodeId>,
    inputs: Vec<Vec<f32>>,
    /// Empty until they are needed.
    targets: Vec<Vec<f32>>,
    /// Weights of the part that nobody changes.
    read: BTreeMap<NodeId, Vec<f32>>,
    /// The run where the part begins.
    before: Snapshot,
}

impl PartRun {
    /// Runs the model up to the part.
    pub(crate) fn enter(
        run: &mut SequentialRun,
        graph: &Graph,
        weights: &WeightStore,
        part: Part,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<PartRun> {
        let mut inputs = Vec::new();
        run.advance(graph, weights, part.from, progress, &mut |v| inputs.extend_from_slice(v))?;
        let nodes = between(graph, part);
        let before = run.snapshot();
        Ok(PartRun { part, nodes, inputs, targets: Vec::new(), read: BTreeMap::new(), before })
    }

    /// Puts the run back to where the part begins.
    pub(crate) fn leave(self, run: &mut SequentialRun) -> Result<()> {
        run.restore(self.before, self.part.from, self.inputs)
    }

    /// See [`attar_pass::Calibrator::part_gradient`]. Takes the run that entered, and that of the uncompressed model.
    pub(crate) fn gradient(
        &mut self,
        (run, original): (&SequentialRun, &mut SequentialRun),
        graph: &Graph,
        weights: &WeightStore,
        changed: &[(WeightName, Vec<f32>)],
        batch: Option<u64>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<PartGradient> {
        if self.targets.is_empty() {
            self.prepare(original, graph, weights, changed, progress)?;
        }
        let count = self.inputs.len();
        let windows: Vec<usize> = match batch {
            None => (0..count).collect(),
            Some(batch) => {
                let first = (batch % count.div_ceil(BATCH).max(1) as u64) as usize * BATCH;
                (first..(first + BATCH).min(count)).collect()
            }
        };
        let one =
            |window: &usize| self.window(graph, &run.indices(*window), *window, changed, batch.is_some());
        let mut total = PartGradient { loss: 0.0, weights: Vec::new() };
        let mut tokens = 0.0;
        for windows in windows.chunks(BATCH) {
            let each: Vec<Windowed> = windows.par_iter().map(one).collect::<Result<_>>()?;
            for window in each {
                total.loss += window.loss;
                tokens += window.tokens as f64;
                if total.weights.is_empty() {
                    total.weights = window.weights;
                    continue;
                }
                for (sum, more) in total.weights.iter_mut().zip(&window.weights) {
                    sum.par_iter_mut().zip(more).for_each(|(s, m)| *s += m);
                }
            }
        }
        total.loss /= f64::max(tokens, 1.0);
        Ok(total)
    }

    /// Runs the original through the part, and reads weights.
    fn prepare(
        &mut self,
        original: &mut SequentialRun,
        graph: &Graph,
        weights: &WeightStore,
        changed: &[(WeightName, Vec<f32>)],
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<()> {
        let targets = &mut self.targets;
        original.advance(graph, weights, self.part.to, progress, &mut |v| targets.extend_from_slice(v))?;
        for operand in self.nodes.iter().flat_map(|n| graph.inputs_of(*n)) {
            if let OpKind::Weight(w) = graph.op(operand.node)
                && !changed.iter().any(|(name, _)| *name == w.name)
            {
                self.read.insert(operand.node, weights.read_f32(&w.name)?);
            }
        }
        Ok(())
    }
}

/// The nodes that compute `to` from `from`, in order.
fn between(graph: &Graph, part: Part) -> Vec<NodeId> {
    let (mut found, mut open) = (BTreeSet::new(), vec![part.to]);
    while let Some(v) = open.pop() {
        let is_source = matches!(graph.op(v.node), OpKind::Input(_) | OpKind::Weight(_));
        if v != part.from && !is_source && found.insert(v.node) {
            open.extend(graph.inputs_of(v.node));
        }
    }
    graph.topo().into_iter().filter(|id| found.contains(id)).collect()
}

/// What one window contributes.
struct Windowed {
    loss: f64,
    tokens: usize,
    weights: Vec<Vec<f32>>,
}

impl PartRun {
    /// Loss and gradients of one window. Each token counts by its squared error relative to the square of its target, so
    /// that the few tokens with values a thousand times as large as others are not all that counts.
    fn window(
        &self,
        graph: &Graph,
        indices: &Indices<'_>,
        window: usize,
        changed: &[(WeightName, Vec<f32>)],
        slopes: bool,
    ) -> Result<Windowed> {
        let value_of = |node: NodeId| match graph.op(node) {
            OpKind::Weight(w) => match changed.iter().find(|(name, _)| *name == w.name) {
                Some((_, values)) => Some(values.as_slice()),
                None => self.read.get(&node).map(Vec::as_slice),
            },
            _ => None,
        };
        let mut values = BTreeMap::from([(self.part.from, self.inputs[window].clone())]);
        for id in &self.nodes {
            let result = evaluate(graph, *id, &graph.inputs_of(*id), &value_of, &values, indices)?;
            values.insert(ValueId { node: *id, slot: 0 }, result);
        }
        let missing = || damaged(graph, self.part.to, "was not computed");
        let (output, target) = (values.get(&self.part.to).ok_or_else(missing)?, &self.targets[window]);
        let width = graph.ty(self.part.to).last().unwrap_or(1).max(1);
        let (mut loss, mut slope) = (0.0f64, Vec::with_capacity(output.len()));
        for (y, t) in output.chunks_exact(width).zip(target.chunks_exact(width)) {
            let square: f64 = t.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let weight = 1.0 / square.max(1e-30);
            loss += weight * y.iter().zip(t).map(|(y, t)| f64::from(y - t) * f64::from(y - t)).sum::<f64>();
            slope.extend(y.iter().zip(t).map(|(y, t)| 2.0 * weight as f32 * (y - t)));
        }
        let tokens = output.len() / width;
        if !slopes {
            return Ok(Windowed { loss, tokens, weights: Vec::new() });
        }
        let place = |node: NodeId| match graph.op(node) {
            OpKind::Weight(w) => changed.iter().position(|(name, _)| *name == w.name),
            _ => None,
        };
        let wanted = |v: ValueId| place(v.node).is_some() || (values.contains_key(&v) && v != self.part.from);
        let tape = Tape { graph, nodes: &self.nodes, weight: &value_of, values: &values, indices };
        let found = tape.back(BTreeMap::from([(self.part.to, slope)]), &wanted, &mut |_, _| ())?;
        let mut weights: Vec<Vec<f32>> = changed.iter().map(|(_, v)| vec![0.0; v.len()]).collect();
        for (v, gradient) in found {
            if let Some(at) = place(v.node) {
                weights[at].iter_mut().zip(&gradient).for_each(|(sum, g)| *sum += g);
            }
        }
        Ok(Windowed { loss, tokens, weights })
    }
}
