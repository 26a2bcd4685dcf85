//! How far a compressed model's predictions are from the uncompressed model's, and which way factors of matrix rows and of
//! vectors lead nearer.
//!
//! With `y = f (w x)` the derivative by a row's factor f is `Σ_t dy y / f`: gradients of weights are never computed, so it costs
//! a run of each model and one way back.

use super::dense::{exp, lane_sum};
use super::probe::log_sum;
use super::sequential::{SequentialRun, damaged};
use super::whole_model::{Errand, Rows, UpToLast, Values, WholeModel};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName, WeightStore};
use attar_pass::{GainGradient, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// What one window contributes.
#[derive(Default)]
struct Found {
    /// Summed over rows of logits.
    divergence: f64,
    rows: usize,
    slopes: BTreeMap<WeightName, Vec<f64>>,
}

/// Leads `q - p` back, the gradient of the divergence at logits that give q where the uncompressed model gives p.
struct Comparing<'a> {
    graph: &'a Graph,
    output: ValueId,
    original: UpToLast<'a>,
    gains: BTreeMap<&'a str, &'a [f32]>,
    /// Vectors of the graph, without factors.
    vectors: BTreeMap<WeightName, Vec<f32>>,
}

impl Comparing<'_> {
    /// The weight and the bias of a linear layer whose rows have factors.
    fn linear(&self, node: NodeId) -> Option<(&WeightName, Option<&WeightName>)> {
        let inputs = self.graph.inputs_of(node);
        // Rows of logits are not scaled: there are more of them than of anything else, and text shows few.
        if !matches!(self.graph.op(node), OpKind::Linear(_)) || self.output.node == node {
            return None;
        }
        let weight = |v: &ValueId| match self.graph.op(v.node) {
            OpKind::Weight(w) => Some(&w.name),
            _ => None,
        };
        let name = weight(inputs.get(1)?).filter(|name| self.gains.contains_key(&***name))?;
        Some((name, inputs.get(2).and_then(weight)))
    }
}

impl Errand for Comparing<'_> {
    type Found = Found;

    fn turn(&self, rows: &Rows<'_>, logits: &mut [f32], found: &mut Found) -> Result<()> {
        let expected = self.original.logits(rows)?;
        for (q, p) in logits.chunks_exact_mut(rows.vocab).zip(expected.chunks_exact(rows.vocab)) {
            let (of_q, of_p) = (log_sum(q), log_sum(p));
            let row = &*q;
            let term = |i: usize| f64::from(exp(p[i] - of_p) * ((p[i] - of_p) - (row[i] - of_q)));
            found.divergence += lane_sum(row.len(), term).max(0.0);
            q.iter_mut().zip(p).for_each(|(q, p)| *q = exp(*q - of_q) - exp(p - of_p));
        }
        found.rows += rows.range.len();
        Ok(())
    }

    fn see(&self, node: NodeId, values: &Values, gradient: &[f32], _: usize, found: &mut Found) {
        let Some((name, bias)) = self.linear(node) else { return };
        let (y, gains) = (&values[&ValueId { node, slot: 0 }], self.gains[&**name]);
        let bias = bias.map(|b| &self.vectors[b]);
        let width = gains.len().max(1);
        let slopes = found.slopes.entry(name.clone()).or_insert_with(|| vec![0.0; width]);
        for (y, dy) in y.chunks_exact(width).zip(gradient.chunks_exact(width)) {
            for (n, (slope, (y, dy))) in slopes.iter_mut().zip(y.iter().zip(dy)).enumerate() {
                let y = y - bias.map_or(0.0, |b| b[n]);
                *slope += f64::from(y * dy / gains[n]);
            }
        }
    }

    fn wants(&self, weight: &WeightName) -> bool {
        self.vectors.contains_key(weight) && self.gains.contains_key(&**weight)
    }

    fn see_weight(&self, weight: &WeightName, gradient: Vec<f32>, found: &mut Found) {
        let values = &self.vectors[weight];
        let slopes = found.slopes.entry(weight.clone()).or_insert_with(|| vec![0.0; values.len()]);
        let products = gradient.iter().zip(values).map(|(g, v)| f64::from(g * v));
        slopes.iter_mut().zip(products).for_each(|(slope, p)| *slope += p);
    }
}

/// The vectors that a graph reads.
fn vectors(graph: &Graph, weights: &WeightStore) -> Result<BTreeMap<WeightName, Vec<f32>>> {
    let mut all = BTreeMap::new();
    for id in graph.topo() {
        if let OpKind::Weight(w) = graph.op(id)
            && weights.info(&w.name)?.shape.len() == 1
        {
            all.insert(w.name.clone(), weights.read_f32(&w.name)?);
        }
    }
    Ok(all)
}

/// See [`attar_pass::Calibrator::gain_gradient`].
pub(crate) fn gain_gradient(
    run: &SequentialRun,
    graph: &Graph,
    weights: &WeightStore,
    most: (usize, u64),
    gains: &[(WeightName, Vec<f32>)],
    (windows, slopes): (Range<usize>, bool),
) -> Result<GainGradient> {
    let mut sum = GainGradient::zeros(gains);
    let Some(model) = WholeModel::new(graph, most) else { return Ok(sum) };
    let of: BTreeMap<&str, &[f32]> = gains.iter().map(|(n, g)| (&**n, g.as_slice())).collect();
    for (name, gains) in gains {
        let rows = weights.info(name)?.shape.first().copied();
        if rows != Some(gains.len()) {
            let problem = format!("{name} has {} factors for {} rows", gains.len(), rows.unwrap_or(0));
            return Err(super::problem(problem));
        }
    }
    let scaled = |name: &WeightName| {
        let mut values = weights.read_f32(name)?;
        if let Some(gains) = of.get(&**name) {
            let width = (values.len() / gains.len().max(1)).max(1);
            for (row, gain) in values.chunks_exact_mut(width).zip(gains.iter()) {
                row.iter_mut().for_each(|w| *w *= gain);
            }
        }
        Ok(values)
    };
    let original =
        model.up_to_last(run, windows.clone(), &|name: &WeightName| weights.read_original_f32(name))?;
    let output = model.output();
    let errand = Comparing { graph, output, original, gains: of.clone(), vectors: vectors(graph, weights)? };
    let found = if slopes {
        model.there_and_back(run, windows, &scaled, &errand)?
    } else {
        model.there(run, windows, &scaled, &errand)?
    };
    let (mut rows, mut exact): (usize, BTreeMap<WeightName, Vec<f64>>) = (0, BTreeMap::new());
    for window in found {
        sum.divergence += window.divergence;
        rows += window.rows;
        for (name, slopes) in window.slopes {
            let all = exact.entry(name).or_insert_with(|| vec![0.0; slopes.len()]);
            all.iter_mut().zip(slopes).for_each(|(a, s)| *a += s);
        }
    }
    let each = 1.0 / rows.max(1) as f64;
    sum.divergence *= each;
    for ((name, _), slopes) in gains.iter().zip(&mut sum.slopes) {
        if let Some(exact) = exact.get(name) {
            slopes.iter_mut().zip(exact).for_each(|(s, e)| *s = (e * each) as f32);
        }
    }
    let finite = sum.divergence.is_finite() && sum.slopes.iter().flatten().all(|s| s.is_finite());
    if finite { Ok(sum) } else { Err(damaged(graph, output, "has a divergence whose gradient overflows")) }
}

#[cfg(test)]
mod tests {
    use super::super::whole_model::LOGITS;
    use super::*;
    use attar_format::formats::N3;
    use attar_pass::InputStatistics;
    use attar_passes::quantize::curvature::Curvature;
    use attar_passes::quantize::quantize_gptq::choose;
    use attar_passes::quantize::vector_level::Level;
    use std::path::Path;

    /// A tiny model whose matrices are coded in three bits, its factors, and text.
    fn coded(name: &str) -> (attar_import::Imported, Vec<(WeightName, Vec<f32>)>, SequentialRun) {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
        let mut model = attar_import::open(&data.join(name)).expect("a checkpoint");
        let names: Vec<WeightName> = model.weights.names().cloned().collect();
        let mut gains = Vec::new();
        for name in names.iter().filter(|n| n.starts_with("model.layers.")) {
            let shape = model.weights.info(name).expect("a weight").shape.clone();
            if let [n, k] = shape[..]
                && k.is_multiple_of(32)
            {
                let values = model.weights.read_f32(name).expect("values");
                let curvature = Curvature::new(&InputStatistics::zeros(k), 0.01, true).expect("a form");
                let chosen = choose(&N3, n, &curvature, &values, 0, Level::widest()).expect("codes");
                model.weights.set_encoded(name, &chosen.encoded).expect("room");
            }
            let factor = |i: usize| 1.0 + 0.01 * ((i * 7 % 5) as f32 - 2.0);
            let is_bias = name.ends_with("bias");
            gains.extend((!is_bias).then(|| (name.clone(), (0..shape[0]).map(factor).collect())));
        }
        let window = |w: u32| (0..12 + w).map(|t| (w * 31 + t * t * 7 + 3) % 200).collect();
        (model, gains, SequentialRun::new((0..4).map(window).collect(), 1 << 30))
    }

    fn gradient(
        model: &attar_import::Imported,
        run: &SequentialRun,
        gains: &[(WeightName, Vec<f32>)],
        what: (Range<usize>, bool),
    ) -> GainGradient {
        let most = (LOGITS, 1 << 30);
        gain_gradient(run, &model.graph, &model.weights, most, gains, what).expect("a gradient")
    }

    /// The way back agrees with differences along it.
    #[test]
    fn slopes_are_those_of_the_divergence() {
        for name in ["tiny/llama2", "tiny/mistral", "tiny/qwen2", "tiny/qwen3", "tiny/smollm2"] {
            let (model, gains, run) = coded(name);
            let found = gradient(&model, &run, &gains, (1..4, true));
            assert!(found.divergence > 0.0, "{name}");
            let same = gradient(&model, &run, &gains, (1..4, false));
            assert!((same.divergence / found.divergence - 1.0).abs() < 1e-6, "{name}");
            assert!(same.slopes.iter().flatten().all(|s| *s == 0.0));
            for (i, (weight, factors)) in gains.iter().enumerate() {
                // Along the slopes of one weight, so that what is compared is as large as it can be.
                let size = found.slopes[i].iter().map(|s| f64::from(*s).powi(2)).sum::<f64>().sqrt();
                assert!(size > 0.0, "{name}: {weight} has no slopes");
                let at = |step: f64| {
                    let mut moved = gains.to_vec();
                    moved[i].1 = factors
                        .iter()
                        .zip(&found.slopes[i])
                        .map(|(f, s)| (f64::from(*f) + step * f64::from(*s) / size) as f32)
                        .collect();
                    gradient(&model, &run, &moved, (1..4, false)).divergence
                };
                // Long enough for f32 logits to show a difference, and so long that it has some curvature in it.
                let step = 0.02;
                let difference = (at(step) - at(-step)) / (2.0 * step);
                assert!(
                    (difference - size).abs() <= 0.05 * size + 1e-5,
                    "{name}: {weight}: {difference} for {size}"
                );
            }
        }
    }

    /// Without compression and with factors of 1 there is no divergence, and threads change nothing.
    #[test]
    fn an_uncompressed_model_does_not_diverge() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny/smollm2");
        let model = attar_import::open(&data).expect("a checkpoint");
        let (coded, gains, run) = coded("tiny/smollm2");
        let ones: Vec<_> = gains.iter().map(|(n, g)| (n.clone(), vec![1.0; g.len()])).collect();
        let found = gradient(&model, &run, &ones, (0..4, true));
        assert!(found.divergence < 1e-9, "{}", found.divergence);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| gradient(&coded, &run, &gains, (0..4, true)))
        };
        assert_eq!(on(1), on(3));
    }

    #[test]
    fn factors_for_other_rows_are_refused() {
        let (model, mut gains, run) = coded("tiny/smollm2");
        gains[0].1.pop();
        let most = (LOGITS, 1 << 30);
        let e = gain_gradient(&run, &model.graph, &model.weights, most, &gains, (0..4, true))
            .expect_err("refused");
        assert!(e.to_string().contains(&*gains[0].0), "{e}");
    }
}
