//! How much each token of calibration text counts at each linear layer: how far the model's predictions move when what the
//! layer gives for the token does.
//!
//! For small changes the divergence of predictions is half of `δᵀ F δ`, with F the Fisher information of the layer's output.
//! Its diagonal is estimated by leading back, from each row of logits, a vector whose covariance is that of the logits'
//! scores: `√p ∘ ε - p (√p · ε)` with random signs ε has `diag(p) - p pᵀ`, and varies less than the score of a token drawn
//! from p. A token's weight is the sum of squares of what arrives, over the layer's outputs.
//! Reference: Kim et al. 2025, arXiv:2505.07004 (GuidedQuant), with one group of outputs and the model's own Fisher
//! information in place of the training loss.

use super::dense::{exp, lane_sum, largest};
use super::sequential::{SequentialRun, damaged};
use super::whole_model::{Errand, Rows, Values, WholeModel, add_to};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName, WeightStore};
use attar_pass::Result;
use std::collections::BTreeMap;

/// Most that a token counts, as a multiple of the median.
const MOST: f64 = 20.0;

/// Weights of tokens by the value that linear layers read: for each window, one number for each token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TokenWeights(BTreeMap<ValueId, Vec<Vec<f32>>>);

/// The same of one window.
#[derive(Default)]
struct Squares(BTreeMap<ValueId, Vec<f32>>);

/// Leads scores of the logits back, and squares what arrives.
struct Weighing<'a> {
    graph: &'a Graph,
}

impl Errand for Weighing<'_> {
    type Found = Squares;

    fn turn(&self, rows: &Rows<'_>, logits: &mut [f32], _: &mut Squares) -> Result<()> {
        let mut roots = Vec::new();
        for (row, scores) in rows.range.clone().zip(logits.chunks_exact_mut(rows.vocab)) {
            to_scores(scores, &mut roots, (rows.window as u64) << 32 | row as u64);
        }
        Ok(())
    }

    fn see(&self, node: NodeId, _: &Values, gradient: &[f32], first: usize, found: &mut Squares) {
        if !matches!(self.graph.op(node), OpKind::Linear(_)) {
            return;
        }
        let width = self.graph.ty(ValueId { node, slot: 0 }).last().unwrap_or(1).max(1);
        let square = |row: &[f32]| lane_sum(width, |i| f64::from(row[i]) * f64::from(row[i])) as f32;
        let squares = gradient.chunks_exact(width).map(square).collect();
        add_to(found.0.entry(self.graph.inputs_of(node)[0]).or_default(), first, squares);
    }
}

impl TokenWeights {
    /// Runs the model over the windows of `run`, there and back, with at most so many numbers of logits at a time and thread,
    /// and bytes of values handed from segment to segment.
    pub(crate) fn measure(
        run: &SequentialRun,
        graph: &Graph,
        weights: &WeightStore,
        most: (usize, u64),
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<TokenWeights> {
        let mut all = TokenWeights::default();
        let Some(model) = WholeModel::new(graph, most) else { return Ok(all) };
        let total = run.count();
        for range in run.portions() {
            progress("weighing tokens", range.start as u64, total as u64);
            let read = |name: &WeightName| weights.read_f32(name);
            for squares in model.there_and_back(run, range, &read, &Weighing { graph })? {
                for (value, squares) in squares.0 {
                    if let Some(v) = squares.iter().find(|v| !v.is_finite()) {
                        let problem = format!("has gradients whose squares sum up to {v}");
                        return Err(damaged(graph, value, &problem));
                    }
                    all.0.entry(value).or_default().push(squares);
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

#[cfg(test)]
mod tests {
    use super::super::whole_model::{LOGITS, has_gradients};
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
            let most = (LOGITS, 1 << 30);
            let whole = WholeModel::new(graph, most).expect("an output").in_one_segment();
            let run = run();
            let read = |name: &WeightName| model.weights.read_f32(name);
            let expected =
                whole.there_and_back(&run, 0..run.count(), &read, &Weighing { graph }).expect("gradients");
            let found = measured(&model, LOGITS, 1 << 30, 2);
            let in_parts = measured(&model, 1000, 0, 1);
            let mut linears = 0;
            for (window, expected) in expected.into_iter().enumerate() {
                linears = expected.0.len();
                assert_eq!((found.0.len(), in_parts.0.len()), (linears, linears), "{name}");
                for (value, expected) in expected.0 {
                    assert_eq!(expected.len(), run.indices(window).rows().len());
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
        assert!(has_gradients(&model.graph));
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
        assert!(!has_gradients(&graph));
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
