//! There and back through the whole model over some windows of text: logits on the way there, gradients on the way back.
//!
//! The model runs in segments between which one value is alive; what a segment computes is computed again on the way back.
//! A window is computed by one thread, so threads change nothing.

use super::activations::Activations;
use super::backward::Tape;
use super::sequential::{Indices, SequentialRun, damaged, evaluate, spill};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName};
use attar_pass::Result;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Numbers of logits computed at a time, per thread.
pub(crate) const LOGITS: usize = 6 << 20;
/// Values of a segment, as a multiple of the value it hands on.
const SEGMENT: usize = 8;

/// All values of a segment over one window.
pub(crate) type Values = BTreeMap<ValueId, Vec<f32>>;

/// Reads a weight as it is to be used.
pub(crate) type ReadWeight<'a> = dyn Fn(&WeightName) -> attar_ir::Result<Vec<f32>> + 'a;

/// Whether gradients can be led back through the whole graph: those of a plugin's ops are not known.
pub(crate) fn has_gradients(graph: &Graph) -> bool {
    graph.topo().into_iter().all(|id| !matches!(graph.op(id), OpKind::Custom(_)))
}

/// What a trip is made for.
pub(crate) trait Errand: Sync {
    /// What is brought back from one window.
    type Found: Default + Send;

    /// Turns logits `[R, V]` of some rows into the gradient that is led back.
    ///
    /// # Errors
    /// Those of computing what they are compared with.
    fn turn(&self, rows: &Rows<'_>, logits: &mut [f32], found: &mut Self::Found) -> Result<()>;

    /// Sees the gradient of a node's result, of which the first row belongs to token `first`.
    fn see(&self, node: NodeId, values: &Values, gradient: &[f32], first: usize, found: &mut Self::Found);

    /// Whether the gradient of a weight is wanted, too.
    fn wants(&self, weight: &WeightName) -> bool {
        let _ = weight;
        false
    }

    /// Sees the gradient of a weight that is wanted, once for each use.
    fn see_weight(&self, weight: &WeightName, gradient: Vec<f32>, found: &mut Self::Found) {
        let _ = (weight, gradient, found);
    }
}

/// Rows of logits of one window.
pub(crate) struct Rows<'a> {
    pub(crate) window: usize,
    pub(crate) range: Range<usize>,
    pub(crate) vocab: usize,
    pub(crate) indices: Indices<'a>,
}

/// A model, cut into segments.
pub(crate) struct WholeModel<'a> {
    graph: &'a Graph,
    output: ValueId,
    segments: Vec<Segment>,
    /// Numbers of logits at a time and thread.
    logits: usize,
    /// Bytes of values handed from segment to segment.
    memory: u64,
}

impl<'a> WholeModel<'a> {
    /// `None` for a graph without outputs.
    pub(crate) fn new(graph: &'a Graph, (logits, memory): (usize, u64)) -> Option<WholeModel<'a>> {
        let output = graph.outputs().first().copied()?;
        Some(WholeModel { graph, output, segments: segments(graph, output), logits, memory })
    }

    /// The logits.
    pub(crate) fn output(&self) -> ValueId {
        self.output
    }

    /// The same model as one segment.
    #[cfg(test)]
    pub(crate) fn in_one_segment(mut self) -> WholeModel<'a> {
        assert!(self.segments.len() > 1, "it is one segment already");
        let nodes = self.segments.drain(..).flat_map(|s| s.nodes).collect();
        self.segments.push(Segment { from: None, to: self.output, nodes });
        self
    }

    /// What each window's last segment takes.
    pub(crate) fn up_to_last(
        &self,
        run: &SequentialRun,
        windows: Range<usize>,
        weight: &ReadWeight<'_>,
    ) -> Result<UpToLast<'_>> {
        let kept = Activations::new(self.memory);
        let Some((last, before)) = self.segments.split_last() else {
            return Err(damaged(self.graph, self.output, "is computed by nothing"));
        };
        for segment in before {
            let read = &read(self.graph, weight, segment)?;
            windows.clone().into_par_iter().try_for_each(|window| {
                let at =
                    OneWindow { graph: self.graph, read, kept: &kept, window, indices: run.indices(window) };
                let mut values = segment.run(&at)?;
                let handed = values.remove(&segment.to);
                let handed = handed.ok_or_else(|| damaged(self.graph, segment.to, "was not computed"))?;
                kept.put(segment.to, window, handed).map_err(spill)
            })?;
        }
        Ok(UpToLast { graph: self.graph, last, kept, read: read(self.graph, weight, last)? })
    }

    /// There alone.
    pub(crate) fn there<E: Errand>(
        &self,
        run: &SequentialRun,
        windows: Range<usize>,
        weight: &ReadWeight<'_>,
        errand: &E,
    ) -> Result<Vec<E::Found>> {
        let UpToLast { last, kept, read, .. } = &self.up_to_last(run, windows.clone(), weight)?;
        let of_window = |window: usize| {
            let at = OneWindow { graph: self.graph, read, kept, window, indices: run.indices(window) };
            let mut found = E::Found::default();
            let mut nothing = |_: &OneWindow<'_>, _: &Values, _: Vec<f32>, _: usize, _: &mut E::Found| Ok(());
            last.turn(&at, self.logits, errand, &mut found, &mut nothing)?;
            Ok(found)
        };
        windows.into_par_iter().map(of_window).collect()
    }

    /// There and back. What is found of each window comes in order.
    pub(crate) fn there_and_back<E: Errand>(
        &self,
        run: &SequentialRun,
        windows: Range<usize>,
        weight: &ReadWeight<'_>,
        errand: &E,
    ) -> Result<Vec<E::Found>> {
        let UpToLast { kept, read: of_last, .. } = self.up_to_last(run, windows.clone(), weight)?;
        let mut of_last = Some(of_last);
        let mut found: Vec<(Vec<f32>, E::Found)> = windows.clone().map(|_| Default::default()).collect();
        for segment in self.segments.iter().rev() {
            let read = &match of_last.take() {
                Some(read) => read,
                None => read(self.graph, weight, segment)?,
            };
            let back = |(window, (slope, mut found)): (usize, (Vec<f32>, E::Found))| {
                let at =
                    OneWindow { graph: self.graph, read, kept: &kept, window, indices: run.indices(window) };
                let slope = if segment.to == self.output {
                    segment.back_from_logits(&at, self.logits, errand, &mut found)?
                } else {
                    segment.back(&at, slope, errand, &mut found)?
                };
                Ok((slope, found))
            };
            found = windows.clone().into_par_iter().zip(found).map(back).collect::<Result<_>>()?;
        }
        Ok(found.into_iter().map(|(_, found)| found).collect())
    }
}

/// Windows that have run up to the last segment.
pub(crate) struct UpToLast<'a> {
    graph: &'a Graph,
    last: &'a Segment,
    kept: Activations,
    read: BTreeMap<NodeId, Vec<f32>>,
}

impl UpToLast<'_> {
    /// Logits of some rows of a window.
    pub(crate) fn logits(&self, rows: &Rows<'_>) -> Result<Vec<f32>> {
        let at = OneWindow {
            graph: self.graph,
            read: &self.read,
            kept: &self.kept,
            window: rows.window,
            indices: rows.indices.clone(),
        };
        let logits = self.last.run(&at)?.remove(&self.last.to);
        logits.ok_or_else(|| damaged(self.graph, self.last.to, "was not computed"))
    }
}

/// Nodes that compute `to` from `from` (from nothing at the beginning) and from weights alone.
struct Segment {
    from: Option<ValueId>,
    to: ValueId,
    nodes: Vec<NodeId>,
}

/// One window on its way through one segment.
struct OneWindow<'a> {
    graph: &'a Graph,
    /// Weights of the segment.
    read: &'a BTreeMap<NodeId, Vec<f32>>,
    /// What segments have handed on.
    kept: &'a Activations,
    window: usize,
    indices: Indices<'a>,
}

/// What happens to some rows of logits.
type Then<'a, F> = dyn FnMut(&OneWindow<'_>, &Values, Vec<f32>, usize, &mut F) -> Result<()> + 'a;

impl Segment {
    fn run(&self, at: &OneWindow<'_>) -> Result<Values> {
        let graph = at.graph;
        let mut values = BTreeMap::new();
        if let Some(from) = self.from {
            let data = at.kept.get(from, at.window).map_err(spill)?;
            values.insert(from, data.ok_or_else(|| damaged(graph, from, "was lost between two stages"))?);
        }
        let weight = |node| at.read.get(&node).map(Vec::as_slice);
        for id in &self.nodes {
            let result = evaluate(graph, *id, &graph.inputs_of(*id), &weight, &values, &at.indices)?;
            values.insert(ValueId { node: *id, slot: 0 }, result);
        }
        Ok(values)
    }

    /// From the gradient of `to` to that of `from`.
    fn back<E: Errand>(
        &self,
        at: &OneWindow<'_>,
        slope: Vec<f32>,
        errand: &E,
        found: &mut E::Found,
    ) -> Result<Vec<f32>> {
        let values = self.run(at)?;
        self.lead_back(at, &values, slope, 0, errand, found)
    }

    /// From what the errand makes of logits to the gradient of `from`.
    fn back_from_logits<E: Errand>(
        &self,
        at: &OneWindow<'_>,
        at_once: usize,
        errand: &E,
        found: &mut E::Found,
    ) -> Result<Vec<f32>> {
        let mut slope = Vec::new();
        self.turn(at, at_once, errand, found, &mut |some, values, logits, first, found| {
            add_to(&mut slope, 0, self.lead_back(some, values, logits, first, errand, found)?);
            Ok(())
        })?;
        Ok(slope)
    }

    /// Hands logits to the errand, at most `at_once` numbers at a time, and what it makes of them to `then`, with the values
    /// behind them and their first row.
    fn turn<E: Errand>(
        &self,
        at: &OneWindow<'_>,
        at_once: usize,
        errand: &E,
        found: &mut E::Found,
        then: &mut Then<'_, E::Found>,
    ) -> Result<()> {
        let graph = at.graph;
        let vocab = graph.ty(self.to).last().unwrap_or(1).max(1);
        let gathers = self.nodes.iter().any(|n| matches!(graph.op(*n), OpKind::GatherRows(_)));
        let all = at.indices.rows().len();
        let at_once = if gathers { (at_once / vocab).max(1) } else { all.max(1) };
        for first in (0..all).step_by(at_once) {
            let range = first..(first + at_once).min(all);
            let indices = at.indices.with_rows(range.clone());
            let some = OneWindow { indices: indices.clone(), ..*at };
            let mut values = self.run(&some)?;
            let mut logits =
                values.remove(&self.to).ok_or_else(|| damaged(graph, self.to, "was not computed"))?;
            let rows = Rows { window: at.window, range, vocab, indices };
            errand.turn(&rows, &mut logits, found)?;
            then(&some, &values, logits, first, found)?;
        }
        Ok(())
    }

    /// `first` is the token of the first row of logits: what is computed from gathered rows begins with it.
    fn lead_back<E: Errand>(
        &self,
        at: &OneWindow<'_>,
        values: &Values,
        slope: Vec<f32>,
        first: usize,
        errand: &E,
        found: &mut E::Found,
    ) -> Result<Vec<f32>> {
        let weight = |node| at.read.get(&node).map(Vec::as_slice);
        let (graph, nodes, indices) = (at.graph, &self.nodes, &at.indices);
        let tape = Tape { graph, nodes, weight: &weight, values, indices };
        let name = |v: ValueId| match graph.op(v.node) {
            OpKind::Weight(w) if errand.wants(&w.name) => Some(&w.name),
            _ => None,
        };
        let wanted = |v: ValueId| values.contains_key(&v) || name(v).is_some();
        let mut gathered = false;
        let mut seen = |node: NodeId, gradient: &[f32]| {
            gathered |= matches!(graph.op(node), OpKind::GatherRows(_));
            errand.see(node, values, gradient, if gathered { 0 } else { first }, found);
        };
        let mut left = tape.back(BTreeMap::from([(self.to, slope)]), &wanted, &mut seen)?;
        let slope = self.from.and_then(|from| left.remove(&from)).unwrap_or_default();
        for (v, gradient) in left {
            if let Some(name) = name(v) {
                errand.see_weight(name, gradient, found);
            }
        }
        Ok(slope)
    }
}

/// Adds to a part of a sum, which grows as needed.
pub(crate) fn add_to(sum: &mut Vec<f32>, at: usize, more: Vec<f32>) {
    if sum.is_empty() && at == 0 {
        *sum = more;
        return;
    }
    if sum.len() < at + more.len() {
        sum.resize(at + more.len(), 0.0);
    }
    sum[at..].iter_mut().zip(more).for_each(|(s, m)| *s += m);
}

/// Weights of a segment.
fn read(graph: &Graph, weight: &ReadWeight<'_>, segment: &Segment) -> Result<BTreeMap<NodeId, Vec<f32>>> {
    let mut read = BTreeMap::new();
    for operand in segment.nodes.iter().flat_map(|n| graph.inputs_of(*n)) {
        if let OpKind::Weight(w) = graph.op(operand.node)
            && !read.contains_key(&operand.node)
        {
            read.insert(operand.node, weight(&w.name)?);
        }
    }
    Ok(read)
}

/// Cuts the way to `output` where one value is alive, into pieces that compute much more than they hand on.
fn segments(graph: &Graph, output: ValueId) -> Vec<Segment> {
    let is_source = |id: NodeId| matches!(graph.op(id), OpKind::Input(_) | OpKind::Weight(_));
    let (mut needed, mut open) = (BTreeSet::new(), vec![output.node]);
    while let Some(id) = open.pop() {
        if !is_source(id) && needed.insert(id) {
            open.extend(graph.inputs_of(id).iter().map(|v| v.node));
        }
    }
    let nodes: Vec<NodeId> = graph.topo().into_iter().filter(|id| needed.contains(id)).collect();
    let mut last_use: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (time, id) in nodes.iter().enumerate() {
        last_use.extend(graph.inputs_of(*id).into_iter().map(|v| (v, time)));
    }
    let width = |v: ValueId| graph.ty(v).shape.iter().filter_map(|d| d.fixed()).product::<usize>();
    let (mut segments, mut alive) = (Vec::new(), BTreeSet::new());
    let (mut from, mut current, mut size) = (None, Vec::new(), 0);
    let mut gathered = false;
    for (time, id) in nodes.iter().enumerate() {
        let value = ValueId { node: *id, slot: 0 };
        current.push(*id);
        size += width(value);
        alive.insert(value);
        alive.retain(|v| last_use.get(v).is_some_and(|last| *last > time));
        gathered |= matches!(graph.op(*id), OpKind::GatherRows(_));
        if let Some(to) = alive.first().copied()
            && alive.len() == 1
            && !gathered
            && size >= SEGMENT * width(to)
        {
            segments.push(Segment { from, to, nodes: std::mem::take(&mut current) });
            (from, size) = (Some(to), 0);
        }
    }
    segments.push(Segment { from, to: output, nodes: current });
    segments
}
