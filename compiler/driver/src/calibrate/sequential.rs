//! Runs a graph over calibration windows piece by piece, with whatever the weights are by then.
//!
//! Between two questions only the values that later nodes need are kept, for every window ([`Activations`]); what a norm
//! or a reshape gives is computed again instead. So each node runs once over each window, and a layer's inputs are
//! computed with the layers before it as they have been encoded.
//! Results do not depend on threads: a window is computed by one thread, and sums over windows are taken tile by tile in
//! the order of the windows.
//! Reference: `true_sequential` of the GPTQ authors' code; Frantar et al. 2022, arXiv:2210.17323.

use super::activations::Activations;
use super::dense::{self, Operand};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightStore};
use attar_pass::{Error, ErrorKind, InputDrift, InputStatistics, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// A run over windows of tokens, each a sequence of its own from position 0.
#[derive(Debug)]
pub(crate) struct SequentialRun {
    windows: Vec<Vec<i32>>,
    /// Rows of logits that are wanted of each window.
    rows: Vec<Vec<i32>>,
    kept: Activations,
    memory: u64,
    /// Whether weights count as what they were before they were encoded.
    original: bool,
    /// Nodes that have run, and need not run again.
    done: BTreeSet<NodeId>,
    /// The graph without its weights, to notice when another is meant.
    shape: Vec<(NodeId, &'static str, Vec<ValueId>)>,
}

/// Windows computed at a time, per thread.
const WINDOWS_PER_THREAD: usize = 4;

/// Width of a tile of a second moment.
const TILE: usize = 192;

/// What has to run to get a value.
struct Stage {
    nodes: Vec<NodeId>,
    /// Values computed before that the nodes take.
    taken: BTreeSet<ValueId>,
    /// Values later nodes need, among those the nodes compute.
    keep: Vec<ValueId>,
    /// Kept values that nothing needs after this.
    dropped: Vec<ValueId>,
    /// Nodes that will be done.
    finished: Vec<NodeId>,
}

/// A value whose rows are summed over, and how often each token counts, window by window; once when nothing is said.
#[derive(Clone, Copy)]
pub(crate) struct Counted<'a> {
    pub(crate) value: ValueId,
    pub(crate) counts: Option<&'a [Vec<f32>]>,
}

impl From<ValueId> for Counted<'_> {
    fn from(value: ValueId) -> Self {
        Counted { value, counts: None }
    }
}

/// Which nodes had run at some time.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    done: BTreeSet<NodeId>,
}

/// A stage while windows run through it.
struct OpenStage {
    value: ValueId,
    stage: Stage,
    read: BTreeMap<NodeId, Vec<f32>>,
}

impl SequentialRun {
    /// A run over these windows that keeps at most `memory` bytes of values in memory between stages.
    pub(crate) fn new(windows: Vec<Vec<u32>>, memory: u64) -> SequentialRun {
        SequentialRun::with_rows(windows, memory, 0, 1)
    }

    /// The same, with logits of every `step`-th token from `first` on.
    pub(crate) fn with_rows(windows: Vec<Vec<u32>>, memory: u64, first: usize, step: usize) -> SequentialRun {
        let windows: Vec<Vec<i32>> =
            windows.into_iter().map(|w| w.into_iter().map(|t| t as i32).collect()).collect();
        let rows = windows.iter().map(|w| (0..w.len() as i32).skip(first).step_by(step).collect()).collect();
        SequentialRun {
            windows,
            rows,
            kept: Activations::new(memory),
            memory,
            original: false,
            done: BTreeSet::new(),
            shape: Vec::new(),
        }
    }

    /// The same windows with weights as they were before they were encoded.
    pub(crate) fn of_original(&self, memory: u64) -> SequentialRun {
        SequentialRun {
            windows: self.windows.clone(),
            rows: self.rows.clone(),
            kept: Activations::new(memory),
            memory,
            original: true,
            done: BTreeSet::new(),
            shape: Vec::new(),
        }
    }

    /// What has run by now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot { done: self.done.clone() }
    }

    /// Goes back to a snapshot; `values` are those of the value it was made at, window by window.
    pub(crate) fn restore(
        &mut self,
        snapshot: Snapshot,
        value: ValueId,
        values: Vec<Vec<f32>>,
    ) -> Result<()> {
        self.kept = Activations::new(self.memory);
        self.done = snapshot.done;
        for (window, data) in values.into_iter().enumerate() {
            self.kept.put(value, window, data).map_err(spill)?;
        }
        Ok(())
    }

    /// Windows.
    pub(crate) fn count(&self) -> usize {
        self.windows.len()
    }

    /// Tokens of all windows.
    pub(crate) fn tokens(&self) -> u64 {
        self.windows.iter().map(|w| w.len() as u64).sum()
    }

    /// Statistics of a value; see [`attar_pass::Calibrator`].
    pub(crate) fn input_statistics(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        Counted { value: input, counts }: Counted<'_>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<InputStatistics> {
        let width = graph.ty(input).last().ok_or_else(|| damaged(graph, input, "has no fixed width"))?;
        let mut tiles = Tiles::new(width);
        let mut seen = 0;
        self.advance(graph, weights, input, progress, &mut |inputs| {
            let counts = counts.map(|c| &c[seen..seen + inputs.len()]);
            seen += inputs.len();
            tiles.add(inputs, counts);
        })?;
        Ok(tiles.statistics(self.tokens()))
    }

    /// Largest magnitude in each column of a value; see [`attar_pass::Calibrator`].
    pub(crate) fn input_sizes(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Vec<f32>> {
        let width = graph.ty(input).last().ok_or_else(|| damaged(graph, input, "has no fixed width"))?;
        let mut sizes = vec![0.0f32; width];
        self.advance(graph, weights, input, progress, &mut |inputs| {
            for row in inputs.iter().flat_map(|x| x.chunks_exact(width)) {
                sizes.iter_mut().zip(row).for_each(|(s, v)| *s = s.max(v.abs()));
            }
        })?;
        Ok(sizes)
    }

    /// Runs until `value` is known for every window, and hands its values over, some windows at a time and in order.
    pub(crate) fn advance(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        value: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
        sink: &mut dyn FnMut(&[Vec<f32>]),
    ) -> Result<()> {
        let open = self.open(graph, weights, value)?;
        let name = graph.node(value.node).name.clone();
        let total = self.windows.len();
        for range in self.portions() {
            progress(&format!("reading text up to %{name}"), range.start as u64, total as u64);
            sink(&self.compute(graph, &open, range)?);
        }
        self.close(open);
        progress(&format!("reading text up to %{name}"), total as u64, total as u64);
        Ok(())
    }

    /// How far a value has drifted from what it is in the `original` run of the same windows, see
    /// [`attar_pass::Calibrator::input_drift`].
    pub(crate) fn input_drift(
        &mut self,
        original: &mut SequentialRun,
        graph: &Graph,
        weights: &WeightStore,
        Counted { value: input, counts }: Counted<'_>,
        sum: Option<ValueId>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<InputDrift> {
        let width = |v| graph.ty(v).last().ok_or_else(|| damaged(graph, v, "has no fixed width"));
        let (open, before) = (self.open(graph, weights, input)?, original.open(graph, weights, input)?);
        let known =
            |run: &SequentialRun, open: &OpenStage, v| run.kept.has(v) || open.stage.keep.contains(&v);
        let sum = sum.filter(|v| known(self, &open, *v) && known(original, &before, *v));
        let mut of_input = Product::new(width(input)?, width(input)?);
        let mut of_sum = sum.map(|v| Ok::<_, Error>(Product::new(width(v)?, width(input)?))).transpose()?;
        let name = graph.node(input.node).name.clone();
        let total = self.windows.len();
        for range in self.portions() {
            progress(&format!("comparing at %{name}"), range.start as u64, total as u64);
            let (now, was) = (
                self.compute(graph, &open, range.clone())?,
                original.compute(graph, &before, range.clone())?,
            );
            let counts = counts.map(|c| &c[range.clone()]);
            let counted = |mut differences: Vec<Vec<f32>>| {
                if let Some(counts) = counts {
                    differences.iter_mut().zip(counts).for_each(|(d, c)| scale_rows(d, c, |c| c));
                }
                differences
            };
            of_input.add(&counted(differences(&was, &now)), &now);
            if let (Some(product), Some(v)) = (&mut of_sum, sum) {
                let values = |run: &SequentialRun| -> Result<Vec<Vec<f32>>> {
                    let get = |window| {
                        run.kept
                            .get(v, window)
                            .map_err(spill)?
                            .ok_or_else(|| damaged(graph, v, "is not known yet"))
                    };
                    range.clone().map(get).collect()
                };
                product.add(&counted(differences(&values(original)?, &values(self)?)), &now);
            }
        }
        self.close(open);
        original.close(before);
        let n_effective = match counts {
            None => self.tokens() as f64,
            Some(counts) => {
                let of = |power: i32| counts.iter().flatten().map(|c| f64::from(*c).powi(power)).sum::<f64>();
                of(1).powi(2) / of(2).max(f64::MIN_POSITIVE)
            }
        };
        Ok(InputDrift { of_input: of_input.sum, of_sum: of_sum.map(|p| p.sum), n_effective })
    }

    /// Windows that are computed together.
    pub(crate) fn portions(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let (total, at_once) = (self.windows.len(), rayon::current_num_threads() * WINDOWS_PER_THREAD);
        (0..total).step_by(at_once).map(move |first| first..(first + at_once).min(total))
    }

    /// Plans the stage that ends with `value`, and reads its weights.
    fn open(&mut self, graph: &Graph, weights: &WeightStore, value: ValueId) -> Result<OpenStage> {
        let stage = self.stage(graph, value);
        let mut read = BTreeMap::new();
        for node in &stage.nodes {
            for operand in graph.inputs_of(*node) {
                if let OpKind::Weight(w) = graph.op(operand.node)
                    && !read.contains_key(&operand.node)
                {
                    let values = if self.original {
                        weights.read_original_f32(&w.name)?
                    } else {
                        weights.read_f32(&w.name)?
                    };
                    read.insert(operand.node, values);
                }
            }
        }
        Ok(OpenStage { value, stage, read })
    }

    /// The value of an open stage for some windows.
    fn compute(
        &self,
        graph: &Graph,
        open: &OpenStage,
        range: std::ops::Range<usize>,
    ) -> Result<Vec<Vec<f32>>> {
        range
            .into_par_iter()
            .map(|window| self.window(graph, &open.read, &open.stage, open.value, window))
            .collect()
    }

    /// Marks what every window has run as done.
    fn close(&mut self, open: OpenStage) {
        self.done.extend(open.stage.finished);
    }

    /// A value of every window with other values of some weights, computed from what is known by now, which stays as it is.
    /// Weights are read one node at a time.
    pub(crate) fn rest(
        &self,
        graph: &Graph,
        weights: &WeightStore,
        value: ValueId,
        changed: &BTreeMap<&str, &[f32]>,
    ) -> Result<Vec<Vec<f32>>> {
        let stage = self.try_stage(graph, value).ok_or_else(|| damaged(graph, value, "is known already"))?;
        let mut known: Vec<BTreeMap<ValueId, Vec<f32>>> = vec![BTreeMap::new(); self.windows.len()];
        for (window, values) in known.iter_mut().enumerate() {
            for v in &stage.taken {
                let data = self.kept.get(*v, window).map_err(spill)?;
                values.insert(*v, data.ok_or_else(|| damaged(graph, *v, "was lost between two stages"))?);
            }
        }
        let last_use = last_uses(graph, &stage.nodes);
        for (time, id) in stage.nodes.iter().enumerate() {
            let inputs = graph.inputs_of(*id);
            let mut read: BTreeMap<NodeId, Cow<'_, [f32]>> = BTreeMap::new();
            for v in &inputs {
                if let OpKind::Weight(w) = graph.op(v.node) {
                    let values = match changed.get(&*w.name) {
                        Some(values) => Cow::Borrowed(*values),
                        None => Cow::Owned(weights.read_f32(&w.name)?),
                    };
                    read.insert(v.node, values);
                }
            }
            let weight = |v: ValueId| read.get(&v.node).map(|w| &**w);
            let linear = matches!(graph.op(*id), OpKind::Linear(_)).then(|| weight(inputs[1])).flatten();
            let results = match linear {
                Some(w) => {
                    let missing = || damaged(graph, inputs[0], "was not computed");
                    let x = known.iter().map(|values| values.get(&inputs[0]).map(Vec::as_slice));
                    let x: Vec<&[f32]> = x.collect::<Option<_>>().ok_or_else(missing)?;
                    let bias = inputs.get(2).copied().and_then(weight);
                    dense::linear_of_all(&x, w, widths(graph, &inputs)[1], bias)
                }
                None => {
                    let of_window = |(window, values): (usize, &BTreeMap<ValueId, Vec<f32>>)| {
                        let weight = |node| weight(ValueId { node, slot: 0 });
                        evaluate(graph, *id, &inputs, &weight, values, &self.indices(window))
                    };
                    known.par_iter().enumerate().map(of_window).collect::<Result<_>>()?
                }
            };
            for (values, result) in known.iter_mut().zip(results) {
                values.insert(ValueId { node: *id, slot: 0 }, result);
                for v in &inputs {
                    if last_use.get(v) == Some(&time) && *v != value {
                        values.remove(v);
                    }
                }
            }
        }
        let take = |mut values: BTreeMap<ValueId, Vec<f32>>| {
            values.remove(&value).ok_or_else(|| damaged(graph, value, "was not computed"))
        };
        known.into_iter().map(take).collect()
    }

    /// Plans a stage; starts from the beginning when a value it needs is gone.
    fn stage(&mut self, graph: &Graph, value: ValueId) -> Stage {
        let shape: Vec<_> = graph
            .topo()
            .into_iter()
            .filter(|id| !matches!(graph.op(*id), OpKind::Weight(_)))
            .map(|id| (id, attar_ir::Op::name(graph.op(id)), graph.inputs_of(id)))
            .collect();
        if shape != self.shape {
            self.restart();
            self.shape = shape;
        }
        if let Some(stage) = self.try_stage(graph, value) {
            return stage;
        }
        self.restart();
        // From the beginning everything can be computed.
        self.try_stage(graph, value).unwrap_or(Stage {
            nodes: Vec::new(),
            taken: BTreeSet::new(),
            keep: Vec::new(),
            dropped: Vec::new(),
            finished: Vec::new(),
        })
    }

    fn restart(&mut self) {
        self.kept = Activations::new(self.memory);
        self.done.clear();
    }

    /// `None` when a node would have to run a second time.
    fn try_stage(&self, graph: &Graph, value: ValueId) -> Option<Stage> {
        let is_source = |id: NodeId| matches!(graph.op(id), OpKind::Input(_) | OpKind::Weight(_));
        let (mut needed, mut taken) = (BTreeSet::new(), BTreeSet::new());
        let mut open = vec![value];
        while let Some(v) = open.pop() {
            if is_source(v.node) || needed.contains(&v.node) {
                continue;
            }
            if self.kept.has(v) {
                taken.insert(v);
                continue;
            }
            if self.done.contains(&v.node) {
                return None;
            }
            needed.insert(v.node);
            open.extend(graph.inputs_of(v.node));
        }
        let nodes: Vec<NodeId> = graph.topo().into_iter().filter(|id| needed.contains(id)).collect();
        let runs = |id: NodeId| needed.contains(&id) || self.done.contains(&id);
        let wanted_later = |v: ValueId| graph.users(v).iter().any(|(user, _)| !runs(*user));
        let mut keep: Vec<ValueId> = Vec::new();
        let mut again = BTreeSet::new();
        for id in &nodes {
            let v = ValueId { node: *id, slot: 0 };
            if !wanted_later(v) {
                continue;
            }
            let cheap =
                matches!(graph.op(*id), OpKind::RmsNorm(_) | OpKind::Reshape(_) | OpKind::GatherRows(_));
            let from_kept = |v: ValueId| {
                is_source(v.node)
                    || keep.contains(&v)
                    || again.contains(&v.node)
                    || (taken.contains(&v) && wanted_later(v))
            };
            if cheap && graph.inputs_of(*id).into_iter().all(from_kept) {
                again.insert(*id);
            } else {
                keep.push(v);
            }
        }
        // What is computed again needs what it is computed from.
        let feeds_again = |v: ValueId| graph.users(v).iter().any(|(user, _)| again.contains(user));
        for id in &nodes {
            let v = ValueId { node: *id, slot: 0 };
            if feeds_again(v) && !again.contains(id) && !keep.contains(&v) {
                keep.push(v);
            }
        }
        let dropped = taken.iter().copied().filter(|v| !wanted_later(*v) && !feeds_again(*v)).collect();
        let finished = nodes.iter().copied().filter(|id| !again.contains(id)).collect();
        Some(Stage { nodes, taken, keep, dropped, finished })
    }

    /// What the graph's inputs are for a window.
    pub(crate) fn indices(&self, window: usize) -> Indices<'_> {
        let tokens = &self.windows[window];
        Indices { tokens, positions: (0..tokens.len() as i32).collect(), rows: &self.rows[window] }
    }

    /// Runs a stage over one window; gives the value asked for.
    fn window(
        &self,
        graph: &Graph,
        weights: &BTreeMap<NodeId, Vec<f32>>,
        stage: &Stage,
        value: ValueId,
        window: usize,
    ) -> Result<Vec<f32>> {
        let mut values: BTreeMap<ValueId, Vec<f32>> = BTreeMap::new();
        for v in &stage.taken {
            let data = self.kept.get(*v, window).map_err(spill)?;
            values.insert(*v, data.ok_or_else(|| damaged(graph, *v, "was lost between two stages"))?);
        }
        let last_use = last_uses(graph, &stage.nodes);
        let indices = self.indices(window);
        let weight = |node| weights.get(&node).map(Vec::as_slice);
        for (time, id) in stage.nodes.iter().enumerate() {
            let inputs = graph.inputs_of(*id);
            let result = evaluate(graph, *id, &inputs, &weight, &values, &indices)?;
            values.insert(ValueId { node: *id, slot: 0 }, result);
            for v in inputs {
                if last_use.get(&v) == Some(&time) && v != value && !stage.keep.contains(&v) {
                    values.remove(&v);
                }
            }
        }
        for v in &stage.keep {
            let data = if *v == value { values.get(v).cloned() } else { values.remove(v) };
            if let Some(data) = data {
                self.kept.put(*v, window, data).map_err(spill)?;
            }
        }
        for v in &stage.dropped {
            self.kept.drop_one(*v, window);
        }
        let asked = values.remove(&value).ok_or_else(|| damaged(graph, value, "was not computed"))?;
        match asked.iter().find(|v| !v.is_finite()) {
            None => Ok(asked),
            Some(v) => {
                Err(damaged(graph, value, &format!("holds {v}: the checkpoint is damaged, or overflows f32")))
            }
        }
    }
}

/// What the graph's inputs are for one window.
#[derive(Clone)]
pub(crate) struct Indices<'a> {
    tokens: &'a [i32],
    positions: Vec<i32>,
    rows: &'a [i32],
}

impl<'a> Indices<'a> {
    /// Rows of logits that are wanted.
    pub(crate) fn rows(&self) -> &'a [i32] {
        self.rows
    }

    /// The same window with some of those alone.
    pub(crate) fn with_rows(&self, rows: std::ops::Range<usize>) -> Indices<'a> {
        Indices { rows: &self.rows[rows], ..self.clone() }
    }
}

/// Runs one node over one window. `weight` gives the values of weight nodes.
pub(crate) fn evaluate<'w>(
    graph: &Graph,
    id: NodeId,
    inputs: &[ValueId],
    weight: &dyn Fn(NodeId) -> Option<&'w [f32]>,
    values: &BTreeMap<ValueId, Vec<f32>>,
    indices: &Indices<'_>,
) -> Result<Vec<f32>> {
    let operands = operands(graph, inputs, weight, values, indices)?;
    dense::evaluate(graph, id, &operands, &widths(graph, inputs))
}

/// The operands of a node over one window.
pub(crate) fn operands<'a, 'w: 'a>(
    graph: &Graph,
    inputs: &[ValueId],
    weight: &dyn Fn(NodeId) -> Option<&'w [f32]>,
    values: &'a BTreeMap<ValueId, Vec<f32>>,
    indices: &'a Indices<'_>,
) -> Result<Vec<Operand<'a>>> {
    let operand = |v: &ValueId| {
        Ok(match graph.op(v.node) {
            OpKind::Weight(_) => {
                Operand::Real(weight(v.node).ok_or_else(|| damaged(graph, *v, "was not read"))?)
            }
            OpKind::Input(_) => match graph.node(v.node).name.as_str() {
                "tokens" => Operand::Index(indices.tokens),
                "rows" => Operand::Index(indices.rows),
                _ => Operand::Index(&indices.positions),
            },
            _ => {
                let data = values.get(v);
                Operand::Real(data.ok_or_else(|| damaged(graph, *v, "was not computed"))?)
            }
        })
    };
    inputs.iter().map(operand).collect()
}

/// Last dimensions of values.
pub(crate) fn widths(graph: &Graph, values: &[ValueId]) -> Vec<usize> {
    values.iter().map(|v| graph.ty(*v).last().unwrap_or(1)).collect()
}

/// After which of the nodes each value is no longer needed.
fn last_uses(graph: &Graph, nodes: &[NodeId]) -> BTreeMap<ValueId, usize> {
    let mut last = BTreeMap::new();
    for (time, id) in nodes.iter().enumerate() {
        last.extend(graph.inputs_of(*id).into_iter().map(|v| (v, time)));
    }
    last
}

pub(crate) fn damaged(graph: &Graph, value: ValueId, problem: &str) -> Error {
    Error::new(ErrorKind::Calibration { problem: format!("%{} {problem}", graph.node(value.node).name) })
}

pub(crate) fn spill(e: std::io::Error) -> Error {
    Error::new(ErrorKind::CalibrationIo { problem: format!("the temporary file for activations: {e}") })
}

/// `was - now`, window by window.
fn differences(was: &[Vec<f32>], now: &[Vec<f32>]) -> Vec<Vec<f32>> {
    was.iter().zip(now).map(|(was, now)| was.iter().zip(now).map(|(a, b)| a - b).collect()).collect()
}

/// Multiplies each row by what `factor` makes of its count.
fn scale_rows(rows: &mut [f32], counts: &[f32], factor: impl Fn(f32) -> f32) {
    let width = rows.len() / counts.len().max(1);
    for (row, count) in rows.chunks_exact_mut(width.max(1)).zip(counts) {
        let by = factor(*count);
        row.iter_mut().for_each(|v| *v *= by);
    }
}

/// A sum of products `Yᵀ X` over windows, `[M, K]`.
struct Product {
    height: usize,
    width: usize,
    sum: Vec<f32>,
}

impl Product {
    fn new(height: usize, width: usize) -> Product {
        Product { height, width, sum: vec![0.0; height * width] }
    }

    /// Adds the rows of some windows, in order.
    fn add(&mut self, left: &[Vec<f32>], right: &[Vec<f32>]) {
        let (height, width) = (self.height, self.width);
        self.sum.par_chunks_mut(TILE * width).enumerate().for_each(|(tile, sum)| {
            let rows = tile * TILE..tile * TILE + sum.len() / width;
            for (y, x) in left.iter().zip(right) {
                let y = MatRef::from_row_major_slice(y, y.len() / height, height).get(.., rows.clone());
                let x = MatRef::from_row_major_slice(x, x.len() / width, width);
                let sum = MatMut::from_row_major_slice_mut(&mut *sum, rows.len(), width);
                matmul(sum, Accum::Add, y.transpose(), x, 1.0, Par::Seq);
            }
        });
    }
}

/// The lower half of a second moment, in tiles.
struct Tiles {
    width: usize,
    tiles: Vec<Tile>,
    /// [`TILE`] columns each.
    columns: Vec<Columns>,
}

/// What is told of columns besides their moments with others.
struct Columns {
    minimum: Vec<f32>,
    maximum: Vec<f32>,
    fourth: Vec<f64>,
}

struct Tile {
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    sum: Vec<f32>,
}

impl Tiles {
    fn new(width: usize) -> Tiles {
        let cuts = || (0..width).step_by(TILE).map(move |at| at..(at + TILE).min(width));
        let tiles = cuts().flat_map(|rows| {
            cuts().filter(move |c| c.start <= rows.start).map(move |columns| (rows.clone(), columns))
        });
        let tile = |(rows, columns): (std::ops::Range<usize>, std::ops::Range<usize>)| Tile {
            sum: vec![0.0; rows.len() * columns.len()],
            rows,
            columns,
        };
        let columns = |range: std::ops::Range<usize>| Columns {
            minimum: vec![f32::INFINITY; range.len()],
            maximum: vec![f32::NEG_INFINITY; range.len()],
            fourth: vec![0.0; range.len()],
        };
        Tiles { width, tiles: tiles.map(tile).collect(), columns: cuts().map(columns).collect() }
    }

    /// Adds the rows of some windows, in order; in moments each row counts as often as `counts` says.
    fn add(&mut self, windows: &[Vec<f32>], counts: Option<&[Vec<f32>]>) {
        let width = self.width;
        let scaled: Option<Vec<Vec<f32>>> = counts.map(|counts| {
            let of_window = |(x, counts): (&Vec<f32>, &Vec<f32>)| {
                let mut x = x.clone();
                scale_rows(&mut x, counts, f32::sqrt);
                x
            };
            windows.par_iter().zip(counts).map(of_window).collect()
        });
        let counted = scaled.as_deref().unwrap_or(windows);
        self.tiles.par_iter_mut().for_each(|tile| {
            for x in counted {
                let x = MatRef::from_row_major_slice(x, x.len() / width, width);
                let (left, right) = (x.get(.., tile.rows.clone()), x.get(.., tile.columns.clone()));
                let sum =
                    MatMut::from_row_major_slice_mut(&mut tile.sum, tile.rows.len(), tile.columns.len());
                matmul(sum, Accum::Add, left.transpose(), right, 1.0, Par::Seq);
            }
        });
        self.columns.par_iter_mut().enumerate().for_each(|(i, columns)| {
            let Columns { minimum, maximum, fourth } = columns;
            let range = i * TILE..i * TILE + fourth.len();
            for row in windows.iter().flat_map(|x| x.chunks_exact(width)) {
                // Values are numbers, which comparisons profit from: each loop is one instruction for several columns.
                let row = &row[range.clone()];
                minimum.iter_mut().zip(row).for_each(|(m, v)| *m = if *v < *m { *v } else { *m });
                maximum.iter_mut().zip(row).for_each(|(m, v)| *m = if *v > *m { *v } else { *m });
                fourth.iter_mut().zip(row).for_each(|(sum, v)| {
                    let square = f64::from(*v) * f64::from(*v);
                    *sum += square * square;
                });
            }
        });
    }

    fn statistics(self, n_tokens: u64) -> InputStatistics {
        let width = self.width;
        let joined = |of: fn(&Columns) -> &[f32]| self.columns.iter().flat_map(of).copied().collect();
        let mut all = InputStatistics {
            n_tokens,
            minimum: joined(|c| &c.minimum),
            maximum: joined(|c| &c.maximum),
            fourth_moment: self.columns.iter().flat_map(|c| &c.fourth).copied().collect(),
            ..InputStatistics::zeros(width)
        };
        for tile in &self.tiles {
            for (i, row) in tile.rows.clone().zip(tile.sum.chunks_exact(tile.columns.len())) {
                for (j, v) in tile.columns.clone().zip(row) {
                    if j <= i {
                        all.second_moment[i * width + j] = *v;
                        all.second_moment[j * width + i] = *v;
                    }
                }
            }
        }
        all
    }
}
