//! How much each token of calibration text counts at each linear layer: how far the model's predictions move when what the
//! layer gives for the token does.
//!
//! For small changes the divergence of predictions is half of `δᵀ F δ`, with F the Fisher information of the layer's output.
//! Its diagonal is estimated by leading back, from each row of logits, a vector whose covariance is that of the logits'
//! scores: `√p ∘ ε - p (√p · ε)` with random signs ε has `diag(p) - p pᵀ`, and varies less than the score of a token drawn
//! from p. A token's weight is the sum of squares of what arrives, over the layer's outputs.
//! The model runs as it is, in segments between which one value is alive; what a segment computes is computed again on the
//! way back. A window is computed by one thread, so threads change nothing.
//! Reference: Kim et al. 2025, arXiv:2505.07004 (GuidedQuant), with one group of outputs and the model's own Fisher
//! information in place of the training loss.

use super::activations::Activations;
use super::backward::Tape;
use super::dense::{exp, lane_sum, largest};
use super::sequential::{Indices, SequentialRun, damaged, evaluate, spill};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightStore};
use attar_pass::Result;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Numbers of logits computed at a time, per thread.
pub(crate) const LOGITS: usize = 6 << 20;
/// Most that a token counts, as a multiple of the median.
const MOST: f64 = 20.0;
/// Values of a segment, as a multiple of the value it hands on.
const SEGMENT: usize = 8;

/// Weights of tokens by the value that linear layers read: for each window, one number for each token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TokenWeights(BTreeMap<ValueId, Vec<Vec<f32>>>);

/// The same of one window.
#[derive(Default)]
struct Squares(BTreeMap<ValueId, Vec<f32>>);

impl Squares {
    /// Takes in the gradient of a node's result. `at` is the token that its first row belongs to.
    fn see(&mut self, graph: &Graph, node: NodeId, gradient: &[f32], at: usize) {
        if !matches!(graph.op(node), OpKind::Linear(_)) {
            return;
        }
        let width = graph.ty(ValueId { node, slot: 0 }).last().unwrap_or(1).max(1);
        let square = |row: &[f32]| lane_sum(width, |i| f64::from(row[i]) * f64::from(row[i])) as f32;
        let squares = gradient.chunks_exact(width).map(square).collect();
        add_to(self.0.entry(graph.inputs_of(node)[0]).or_default(), at, squares);
    }
}

/// Nodes that compute `to` from `from` (from nothing at the beginning) and from weights alone.
struct Segment {
    from: Option<ValueId>,
    to: ValueId,
    nodes: Vec<NodeId>,
}

impl TokenWeights {
    /// Whether gradients can be led back through the whole graph: those of a plugin's ops are not known.
    pub(crate) fn fit(graph: &Graph) -> bool {
        graph.topo().into_iter().all(|id| !matches!(graph.op(id), OpKind::Custom(_)))
    }

    /// Runs the model over the windows of `run`, there and back, with at most so many `logits` at a time and thread, and `memory`
    /// bytes of values handed from segment to segment.
    pub(crate) fn measure(
        run: &SequentialRun,
        graph: &Graph,
        weights: &WeightStore,
        (logits, memory): (usize, u64),
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<TokenWeights> {
        let Some(output) = graph.outputs().first().copied() else { return Ok(TokenWeights::default()) };
        let segments = segments(graph, output);
        let total = run.count();
        let mut all = TokenWeights::default();
        for range in run.portions() {
            progress("weighing tokens", range.start as u64, total as u64);
            let kept = Activations::new(memory);
            for segment in &segments[..segments.len() - 1] {
                let read = &read(graph, weights, segment)?;
                range.clone().into_par_iter().try_for_each(|window| {
                    let at = OneWindow { graph, read, kept: &kept, window, indices: run.indices(window) };
                    let mut values = segment.run(&at)?;
                    let handed = values.remove(&segment.to);
                    let handed = handed.ok_or_else(|| damaged(graph, segment.to, "was not computed"))?;
                    kept.put(segment.to, window, handed).map_err(spill)
                })?;
            }
            let mut slopes: Vec<Vec<f32>> = range.clone().map(|_| Vec::new()).collect();
            for segment in segments.iter().rev() {
                let read = &read(graph, weights, segment)?;
                let back = |(window, slope): (usize, Vec<f32>)| {
                    let at = OneWindow { graph, read, kept: &kept, window, indices: run.indices(window) };
                    if segment.to == output {
                        segment.back_from_logits(&at, logits)
                    } else {
                        segment.back(&at, slope)
                    }
                };
                let found: Vec<(Vec<f32>, Squares)> =
                    range.clone().into_par_iter().zip(slopes).map(back).collect::<Result<_>>()?;
                slopes = Vec::with_capacity(found.len());
                for (slope, squares) in found {
                    slopes.push(slope);
                    for (value, squares) in squares.0 {
                        if let Some(v) = squares.iter().find(|v| !v.is_finite()) {
                            let problem = format!("has gradients whose squares sum up to {v}");
                            return Err(damaged(graph, value, &problem));
                        }
                        all.0.entry(value).or_default().push(squares);
                    }
                }
            }
        }
        progress("weighing tokens", total as u64, total as u64);
        Ok(all)
    }

    /// Weights at a value with a mean of 1, raised to `power` before.
    pub(crate) fn at(&self, value: ValueId, power: f64) -> Option<Vec<Vec<f32>>> {
        let raw = self.0.get(&value)?;
        // A few tokens, such as the first, can matter more than all others together, and nothing is learnt from so few.
        let mut sorted: Vec<f32> = raw.iter().flatten().copied().collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let most = MOST * f64::from(*sorted.get(sorted.len() / 2)?);
        let raised = |w: &f32| f64::from(*w).clamp(0.0, most).powf(power);
        let count = sorted.len() as f64;
        let mean = raw.iter().flatten().map(raised).sum::<f64>() / count;
        let usable = mean.is_finite() && mean > 0.0;
        usable.then(|| raw.iter().map(|w| w.iter().map(|w| (raised(w) / mean) as f32).collect()).collect())
    }

    /// For the journal; nodes by their place in topological order.
    pub(crate) fn bytes(&self, graph: &Graph) -> Vec<u8> {
        let places: BTreeMap<NodeId, u32> = graph.topo().into_iter().zip(0..).collect();
        let mut words: Vec<u32> = vec![self.0.len() as u32];
        for (value, windows) in &self.0 {
            let place = places.get(&value.node).copied().unwrap_or(u32::MAX);
            words.extend([place, u32::from(value.slot), windows.len() as u32]);
            for window in windows {
                words.push(window.len() as u32);
                words.extend(window.iter().map(|w| w.to_bits()));
            }
        }
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// What [`TokenWeights::bytes`] gave; `None` when it is something else.
    pub(crate) fn read(graph: &Graph, bytes: &[u8]) -> Option<TokenWeights> {
        let nodes = graph.topo();
        let mut words = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b));
        let mut word = || words.next();
        let mut all = TokenWeights::default();
        for _ in 0..word()? {
            let node = *nodes.get(word()? as usize)?;
            let value = ValueId { node, slot: u16::try_from(word()?).ok()? };
            let mut windows = Vec::new();
            for _ in 0..word()? {
                let len = word()?;
                windows.push((0..len).map(|_| word().map(f32::from_bits)).collect::<Option<_>>()?);
            }
            all.0.insert(value, windows);
        }
        Some(all)
    }
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

impl Segment {
    /// All values of the segment.
    fn run(&self, at: &OneWindow<'_>) -> Result<BTreeMap<ValueId, Vec<f32>>> {
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
    fn back(&self, at: &OneWindow<'_>, slope: Vec<f32>) -> Result<(Vec<f32>, Squares)> {
        let values = self.run(at)?;
        let mut squares = Squares::default();
        let mut see = |node: NodeId, gradient: &[f32]| squares.see(at.graph, node, gradient, 0);
        let slope = self.lead_back(at, &values, slope, &mut see)?;
        Ok((slope, squares))
    }

    /// From the scores of the logits to the gradient of `from`, `at_once` numbers of logits at a time.
    fn back_from_logits(&self, at: &OneWindow<'_>, at_once: usize) -> Result<(Vec<f32>, Squares)> {
        let graph = at.graph;
        let vocab = graph.ty(self.to).last().unwrap_or(1).max(1);
        let gathers = self.nodes.iter().any(|n| matches!(graph.op(*n), OpKind::GatherRows(_)));
        let all = at.indices.rows().len();
        let at_once = if gathers { (at_once / vocab).max(1) } else { all.max(1) };
        let (mut slope, mut squares, mut roots) = (Vec::new(), Squares::default(), Vec::new());
        for first in (0..all).step_by(at_once) {
            let rows = first..(first + at_once).min(all);
            let some = OneWindow { indices: at.indices.with_rows(rows.clone()), ..*at };
            let mut values = self.run(&some)?;
            let mut logits =
                values.remove(&self.to).ok_or_else(|| damaged(graph, self.to, "was not computed"))?;
            for (row, scores) in rows.clone().zip(logits.chunks_exact_mut(vocab)) {
                to_scores(scores, &mut roots, (at.window as u64) << 32 | row as u64);
            }
            let mut gathered = false;
            let more = self.lead_back(&some, &values, logits, &mut |node, gradient| {
                // Rows of logits are the tokens themselves, so what is computed from the gathered rows begins with the first.
                gathered |= matches!(graph.op(node), OpKind::GatherRows(_));
                squares.see(graph, node, gradient, if gathered { 0 } else { rows.start });
            })?;
            add_to(&mut slope, 0, more);
        }
        Ok((slope, squares))
    }

    fn lead_back(
        &self,
        at: &OneWindow<'_>,
        values: &BTreeMap<ValueId, Vec<f32>>,
        slope: Vec<f32>,
        seen: &mut dyn FnMut(NodeId, &[f32]),
    ) -> Result<Vec<f32>> {
        let weight = |node| at.read.get(&node).map(Vec::as_slice);
        let (graph, nodes, indices) = (at.graph, &self.nodes, &at.indices);
        let tape = Tape { graph, nodes, weight: &weight, values, indices };
        let wanted = |v: ValueId| values.contains_key(&v);
        let mut left = tape.back(BTreeMap::from([(self.to, slope)]), &wanted, seen)?;
        Ok(self.from.and_then(|from| left.remove(&from)).unwrap_or_default())
    }
}

/// Adds to a part of a sum, which grows as needed.
fn add_to(sum: &mut Vec<f32>, at: usize, more: Vec<f32>) {
    if sum.is_empty() && at == 0 {
        *sum = more;
        return;
    }
    if sum.len() < at + more.len() {
        sum.resize(at + more.len(), 0.0);
    }
    sum[at..].iter_mut().zip(more).for_each(|(s, m)| *s += m);
}

/// Random signs drawn beside each other, and sums taken so.
const LANES: usize = 16;

/// Logits to `√p ∘ ε - p (√p · ε)`; `roots` is room for as many numbers.
fn to_scores(row: &mut [f32], roots: &mut Vec<f32>, seed: u64) {
    let top = largest(row);
    for l in row.iter_mut() {
        *l = exp(*l - top);
    }
    let mut states: [u32; LANES] = std::array::from_fn(|lane| mixed(seed ^ mixed(lane as u64)) as u32 | 1);
    let (mut total, mut along) = (0.0f64, 0.0f64);
    roots.clear();
    roots.resize(row.len(), 0.0);
    // Short sums in f32, sums of sums in f64.
    for (row, roots) in row.chunks(64 * LANES).zip(roots.chunks_mut(64 * LANES)) {
        let (mut totals, mut alongs) = ([0.0f32; LANES], [0.0f32; LANES]);
        for (part, roots) in row.chunks(LANES).zip(roots.chunks_mut(LANES)) {
            for state in &mut states {
                // Marsaglia 2003, "Xorshift RNGs".
                *state ^= *state << 13;
                *state ^= *state >> 17;
                *state ^= *state << 5;
            }
            for (((e, root), state), (total, along)) in
                part.iter().zip(roots).zip(&states).zip(totals.iter_mut().zip(&mut alongs))
            {
                *root = f32::from_bits(e.sqrt().to_bits() | (state & 0x8000_0000));
                *total += e;
                *along += *root;
            }
        }
        total += totals.iter().map(|v| f64::from(*v)).sum::<f64>();
        along += alongs.iter().map(|v| f64::from(*v)).sum::<f64>();
    }
    // With e = p · total: √p = √e / √total, and what p is multiplied with is along / √total.
    let (of_root, of_exp) = ((1.0 / total.sqrt()) as f32, (along / (total * total.sqrt())) as f32);
    row.iter_mut().zip(roots).for_each(|(e, root)| *e = *root * of_root - *e * of_exp);
}

/// A number with all bits mixed (the finalizer of SplitMix64).
fn mixed(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Weights of a segment.
fn read(graph: &Graph, weights: &WeightStore, segment: &Segment) -> Result<BTreeMap<NodeId, Vec<f32>>> {
    let mut read = BTreeMap::new();
    for operand in segment.nodes.iter().flat_map(|n| graph.inputs_of(*n)) {
        if let OpKind::Weight(w) = graph.op(operand.node)
            && !read.contains_key(&operand.node)
        {
            read.insert(operand.node, weights.read_f32(&w.name)?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// The covariance of scores is the Fisher information of logits, `diag(p) - p pᵀ`.
    #[test]
    fn scores_have_the_covariance_of_logits() {
        let logits = [1.0f32, -0.5, 0.3, 2.0, 0.0];
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let p = logits.map(|l| f64::from(l).exp() / total);
        let draws = 40_000;
        let (mut mean, mut moment, mut roots) = ([0.0f64; 5], [[0.0f64; 5]; 5], Vec::new());
        for seed in 0..draws {
            let mut scores = logits;
            to_scores(&mut scores, &mut roots, seed);
            for i in 0..5 {
                mean[i] += f64::from(scores[i]) / draws as f64;
                for j in 0..5 {
                    moment[i][j] += f64::from(scores[i] * scores[j]) / draws as f64;
                }
            }
        }
        for i in 0..5 {
            assert!(mean[i].abs() < 0.02, "{mean:?}");
            for j in 0..5 {
                let expected = if i == j { p[i] } else { 0.0 } - p[i] * p[j];
                assert!((moment[i][j] - expected).abs() < 0.01, "{i} {j}: {} for {expected}", moment[i][j]);
            }
        }
    }

    fn tiny(name: &str) -> attar_import::Imported {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
        attar_import::open(&data.join(name)).expect("a checkpoint")
    }

    fn run() -> SequentialRun {
        let window = |w: u32| (0..12 + w).map(|t| (w * 31 + t * t * 7 + 3) % 200).collect();
        SequentialRun::new((0..5).map(window).collect(), 1 << 30)
    }

    fn measured(model: &attar_import::Imported, at_once: usize, memory: u64, threads: usize) -> TokenWeights {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let run = run();
        let measure = || {
            TokenWeights::measure(&run, &model.graph, &model.weights, (at_once, memory), &mut |_, _, _| {})
        };
        pool.install(measure).expect("weights")
    }

    /// Segments and portions of logits give what one way back through the whole model gives.
    #[test]
    fn weights_are_those_of_the_whole_model_at_once() {
        for name in ["tiny/llama2", "tiny/mistral", "tiny/qwen2", "tiny/qwen3", "tiny/smollm2"] {
            let model = tiny(name);
            let graph = &model.graph;
            let output = graph.outputs()[0];
            assert!(segments(graph, output).len() > 1, "{name} is one segment");
            let is_source = |id: &NodeId| matches!(graph.op(*id), OpKind::Input(_) | OpKind::Weight(_));
            let nodes = graph.topo().into_iter().filter(|id| !is_source(id)).collect();
            let whole = Segment { from: None, to: output, nodes };
            let weights = read(graph, &model.weights, &whole).expect("weights");
            let (run, kept) = (run(), Activations::new(0));
            let found = measured(&model, LOGITS, 1 << 30, 2);
            let in_parts = measured(&model, 1000, 0, 1);
            let mut linears = 0;
            for window in 0..run.count() {
                let indices = run.indices(window);
                let at = OneWindow { graph, read: &weights, kept: &kept, window, indices: indices.clone() };
                let (_, expected) = whole.back_from_logits(&at, LOGITS).expect("gradients");
                linears = expected.0.len();
                assert_eq!((found.0.len(), in_parts.0.len()), (linears, linears), "{name}");
                for (value, expected) in expected.0 {
                    assert_eq!(expected.len(), indices.rows().len());
                    for got in [&found.0[&value][window], &in_parts.0[&value][window]] {
                        assert_eq!(got.len(), expected.len());
                        for (a, b) in got.iter().zip(&expected) {
                            assert!((a - b).abs() <= 1e-3 * b.abs() + 1e-12, "{name}: {a} for {b}");
                        }
                    }
                }
            }
            assert!(linears > 4, "{name} has {linears} inputs of linear layers");
        }
    }

    #[test]
    fn threads_and_memory_change_nothing_and_bytes_come_back() {
        let model = tiny("tiny/smollm2");
        let expected = measured(&model, LOGITS, 1 << 30, 1);
        assert!(measured(&model, LOGITS, 0, 3) == expected);
        let bytes = expected.bytes(&model.graph);
        assert!(TokenWeights::read(&model.graph, &bytes).as_ref() == Some(&expected));
        assert!(TokenWeights::read(&model.graph, &bytes[..bytes.len() - 4]).is_none());
    }

    /// Gradients that overflow are an error that names the value, and ops of plugins have none.
    #[test]
    fn what_has_no_gradients_is_told() {
        let mut model = tiny("tiny/smollm2");
        assert!(TokenWeights::fit(&model.graph));
        // The same function, with gradients of 1e30 in between.
        for (name, by) in [("up_proj", 1e-30f32), ("down_proj", 1e30)] {
            let name = format!("model.layers.1.mlp.{name}.weight");
            let shape = model.weights.info(&name).expect("a weight").shape.clone();
            let scaled = model.weights.read_f32(&name).expect("values").iter().map(|v| v * by).collect();
            model.weights.add_values(&name, &shape, scaled);
        }
        let most = (LOGITS, 1 << 30);
        let e = TokenWeights::measure(&run(), &model.graph, &model.weights, most, &mut |_, _, _| {})
            .expect_err("an overflow");
        assert!(e.to_string().contains("%l1_") && e.to_string().contains("gradients"), "{e}");

        let ty = || attar_ir::TensorType::f32([attar_ir::Dim::T, 4.into()]);
        let mut body = Graph::new("double");
        let x = body.add_input("x", ty());
        let sum = body.add(attar_ir::ops::Add {}, &[x, x]).expect("a sum");
        body.set_outputs(vec![ValueId { node: sum, slot: 0 }]);
        let custom = attar_ir::ops::Custom::new("double", body).expect("an op");
        let mut graph = Graph::new("f");
        let x = graph.add_input("x", ty());
        graph.add(custom, &[x]).expect("a node");
        assert!(!TokenWeights::fit(&graph));
    }

    #[test]
    fn no_token_counts_for_all() {
        let model = tiny("tiny/smollm2");
        let mut found = measured(&model, LOGITS, 1 << 30, 2);
        let value = *found.0.keys().next().expect("a value");
        found.0.get_mut(&value).expect("weights")[0][0] = 1e9;
        for power in [0.5, 1.0] {
            let counts = found.at(value, power).expect("counts");
            let all: Vec<f64> = counts.iter().flatten().map(|c| f64::from(*c)).collect();
            assert!((all.iter().sum::<f64>() / all.len() as f64 - 1.0).abs() < 1e-6);
            let mut sorted = all.clone();
            sorted.sort_by(f64::total_cmp);
            let most = MOST.powf(power) * sorted[sorted.len() / 2];
            assert!((all[0] / most - 1.0).abs() < 1e-6, "{} of at most {most}", all[0]);
        }
        assert!(found.at(value, 0.0).expect("counts").iter().flatten().all(|c| *c == 1.0));
    }
}
