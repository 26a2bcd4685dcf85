//! The evaluator against the reference interpreter on the tiny checkpoints, and what must not change its results.

use super::part::PartRun;
use super::probe::Probe;
use super::sequential::{Counted, SequentialRun};
use attar_import::Imported;
use attar_ir::interp::{KvState, Precision, Step, run_step};
use attar_ir::{Graph, OpKind, ValueId, WeightName};
use attar_pass::{InputStatistics, Part};
use std::path::Path;

fn tiny(name: &str) -> Imported {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    attar_import::open(&data.join(name)).expect("a checkpoint")
}

/// Some windows of tokens that any of the models has.
fn windows() -> Vec<Vec<u32>> {
    (0..5u32).map(|w| (0..12 + w).map(|t| (w * 31 + t * t * 7 + 3) % 200).collect()).collect()
}

/// Inputs of all linear layers, in topological order.
fn linear_inputs(graph: &Graph) -> Vec<ValueId> {
    let linears = graph.topo().into_iter().filter(|id| matches!(graph.op(*id), OpKind::Linear(_)));
    let mut inputs: Vec<ValueId> = linears.map(|id| graph.inputs_of(id)[0]).collect();
    let order = graph.topo();
    inputs.sort_by_key(|v| order.iter().position(|id| *id == v.node));
    inputs.dedup();
    inputs
}

/// Statistics of all linear inputs, asked for one after the other.
fn all_statistics(model: &Imported, memory: u64, threads: usize) -> Vec<InputStatistics> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    pool.install(|| {
        let mut run = SequentialRun::new(windows(), memory);
        let of = |v: ValueId| run.input_statistics(&model.graph, &model.weights, v.into(), &mut |_, _, _| {});
        linear_inputs(&model.graph).into_iter().map(of).collect::<Result<_, _>>().expect("statistics")
    })
}

/// Extremes asked for alone are those of statistics of the same windows.
#[test]
fn sizes_are_those_of_statistics() {
    let model = tiny("tiny/smollm2");
    let mut run = SequentialRun::new(windows(), 0);
    let expected = all_statistics(&model, 1 << 30, 2);
    assert!(expected.len() > 4);
    for (value, expected) in linear_inputs(&model.graph).into_iter().zip(expected) {
        let sizes = run.input_sizes(&model.graph, &model.weights, value, &mut |_, _, _| {}).expect("sizes");
        assert_eq!(sizes, expected.max_abs());
    }
}

#[test]
fn moments_are_those_of_the_interpreter() {
    for name in ["tiny/llama2", "tiny/mistral", "tiny/qwen2", "tiny/qwen3", "tiny/smollm2", "gguf/qwen3.gguf"]
    {
        let model = tiny(name);
        let ours = all_statistics(&model, 1 << 30, 2);
        for (value, ours) in linear_inputs(&model.graph).into_iter().zip(ours) {
            let mut graph = model.graph.clone();
            graph.set_outputs(vec![value]);
            let k = ours.width;
            let mut moment = vec![0.0f64; k * k];
            let (mut low, mut high, mut fourth) = (vec![f64::MAX; k], vec![f64::MIN; k], vec![0.0f64; k]);
            for window in windows() {
                let tokens: Vec<i32> = window.iter().map(|t| *t as i32).collect();
                let step = Step::new(&tokens, 0).all_rows();
                let mut cache = KvState::default();
                let out =
                    run_step(&graph, &model.weights, Precision::F64, &mut cache, &step).expect("a step");
                for row in out[0].as_real().chunks_exact(k) {
                    for i in 0..k {
                        (low[i], high[i]) = (low[i].min(row[i]), high[i].max(row[i]));
                        fourth[i] += row[i].powi(4);
                        for j in 0..k {
                            moment[i * k + j] += row[i] * row[j];
                        }
                    }
                }
            }
            let size = moment.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (a, b) in ours.second_moment.iter().zip(&moment) {
                let node = graph.describe(value.node);
                assert!((f64::from(*a) - b).abs() < 3e-5 * size, "{name}, {node}: {a} for {b} beside {size}");
            }
            let close =
                |a: f64, b: f64, size: f64| assert!((a - b).abs() < 1e-4 * size, "{name}: {a} for {b}");
            let count = windows().iter().map(|w| w.len()).sum::<usize>() as f64;
            for i in 0..k {
                close(f64::from(ours.minimum[i]), low[i], 1.0 + low[i].abs());
                close(f64::from(ours.maximum[i]), high[i], 1.0 + high[i].abs());
                close(ours.fourth_moment[i], fourth[i], fourth[i] + 1e-6 * size * size / count);
                let square = moment[i * k + i] / count;
                let kurtosis = fourth[i] / count / (square * square);
                assert!((ours.kurtosis()[i] / kurtosis - 1.0).abs() < 1e-2, "{name}: {kurtosis}");
            }
            let square = (0..k).map(|i| moment[i * k + i]).sum::<f64>() / count / k as f64;
            let layer = fourth.iter().sum::<f64>() / count / k as f64 / (square * square);
            close(ours.layer_kurtosis(), layer, layer);
            assert_eq!(ours.n_tokens, windows().iter().map(|w| w.len() as u64).sum::<u64>());
        }
    }
}

#[test]
fn threads_and_memory_change_nothing() {
    let model = tiny("tiny/smollm2");
    let expected = all_statistics(&model, 1 << 30, 1);
    for (memory, threads) in [(0, 1), (1 << 30, 3), (20_000, 2)] {
        assert!(all_statistics(&model, memory, threads) == expected, "{memory} bytes, {threads} threads");
    }
}

#[test]
fn going_back_starts_again_with_the_weights_as_they_are() {
    let mut model = tiny("tiny/smollm2");
    let inputs = linear_inputs(&model.graph);
    let mut run = SequentialRun::new(windows(), 1 << 30);
    let mut of = |model: &Imported, v: ValueId| {
        run.input_statistics(&model.graph, &model.weights, v.into(), &mut |_, _, _| {}).expect("statistics")
    };
    let last = inputs[inputs.len() - 1];
    let (first, end) = (of(&model, inputs[0]), of(&model, last));
    assert!(of(&model, inputs[0]) == first && of(&model, last) == end);
    let name = "model.layers.0.mlp.down_proj.weight";
    let shape = model.weights.info(name).expect("a weight").shape.clone();
    model.weights.add_values(name, &shape, vec![0.0; shape.iter().product()]);
    // What has run is not run again for a value that comes later.
    assert!(of(&model, inputs[0]) == first);
    assert!(of(&model, last) != end);
}

#[test]
fn a_value_that_is_no_number_is_named() {
    let mut model = tiny("tiny/smollm2");
    let name = "model.layers.0.input_layernorm.weight";
    let shape = model.weights.info(name).expect("a weight").shape.clone();
    model.weights.add_values(name, &shape, vec![f32::INFINITY; shape[0]]);
    let mut run = SequentialRun::new(windows(), 1 << 30);
    let first = linear_inputs(&model.graph)[0];
    let e = run
        .input_statistics(&model.graph, &model.weights, first.into(), &mut |_, _, _| {})
        .expect_err("damage");
    assert!(e.to_string().contains("%l0_attn_norm holds"), "{e}");
}

/// A probe that goes on from a layer's input tells what a run from the beginning tells, and what the interpreter does.
#[test]
fn probes_tell_how_far_predictions_move() {
    for name in ["tiny/llama2", "tiny/qwen3", "tiny/smollm2"] {
        let model = tiny(name);
        let (graph, weights) = (&model.graph, &model.weights);
        let mut probe = Probe::new(&windows(), graph, weights, 1 << 30).expect("a probe");
        for value in linear_inputs(graph) {
            let reads = |id: &attar_ir::NodeId| graph.inputs_of(*id).first() == Some(&value);
            let linear = graph.topo().into_iter().find(reads).expect("a linear");
            let OpKind::Weight(w) = graph.op(graph.inputs_of(linear)[1].node) else { continue };
            // A tied head is an embedding too: nothing comes before it.
            let from = (!w.name.contains("embed")).then_some(value);
            let same = weights.read_f32(&w.name).expect("values");
            let other: Vec<f32> =
                same.iter().enumerate().map(|(i, v)| v * (1.0 + 0.2 * ((i % 7) as f32 - 3.0))).collect();
            let mut ask = |from, values: &[f32]| {
                let changed = [(w.name.clone(), values.to_vec())];
                probe.divergence(graph, weights, from, &changed).expect("a divergence")
            };
            assert!(ask(from, &same) < 1e-9, "{name}: {}", w.name);
            let moved = ask(from, &other);
            assert_eq!(moved, ask(None, &other), "{name}: {}", w.name);
            let expected = divergence_by_interpreter(&model, &w.name, &other);
            assert!((moved - expected).abs() < 1e-3 * expected + 1e-7, "{name}: {moved} for {expected}");
        }
    }
}

/// Mean divergence over the positions that a probe scores.
fn divergence_by_interpreter(model: &Imported, name: &str, values: &[f32]) -> f64 {
    let mut other = attar_ir::WeightStore::new();
    for n in model.weights.names() {
        let shape = model.weights.info(n).expect("a weight").shape.clone();
        let own = if &**n == name { values.to_vec() } else { model.weights.read_f32(n).expect("values") };
        other.add_values(n, &shape, own);
    }
    let mut each = Vec::new();
    for window in windows() {
        let tokens: Vec<i32> = window.iter().map(|t| *t as i32).collect();
        let step = Step::new(&tokens, 0).all_rows();
        let run = |weights: &attar_ir::WeightStore| {
            let mut cache = KvState::default();
            run_step(&model.graph, weights, Precision::F64, &mut cache, &step).expect("a step")
        };
        let (base, new) = (run(&model.weights), run(&other));
        let vocab = model.model.vocab;
        let rows = base[0].as_real().chunks_exact(vocab).zip(new[0].as_real().chunks_exact(vocab));
        each.extend(rows.skip(1).step_by(2).map(|(p, q)| {
            let log_sum = |x: &[f64]| x.iter().map(|v| v.exp()).sum::<f64>().ln();
            let (a, b) = (log_sum(p), log_sum(q));
            p.iter().zip(q).map(|(p, q)| (p - a).exp() * ((p - a) - (q - b))).sum::<f64>()
        }));
    }
    each.iter().sum::<f64>() / each.len() as f64
}

/// Derivatives of a whole model's error by each of its weights are what small steps along them show.
#[test]
fn gradients_are_slopes() {
    for name in ["tiny/llama2", "tiny/mistral", "tiny/qwen2", "tiny/qwen3", "tiny/smollm2"] {
        let model = tiny(name);
        let (graph, weights) = (&model.graph, &model.weights);
        let embed = graph.topo().into_iter().find(|id| matches!(graph.op(*id), OpKind::Embed(_)));
        let from = ValueId { node: embed.expect("an embedding"), slot: 0 };
        let part = Part { from, to: graph.outputs()[0] };
        let mut run = SequentialRun::new(windows()[..2].to_vec(), 1 << 30);
        let mut original = run.of_original(1 << 30);
        let mut part_run = PartRun::enter(&mut run, graph, weights, part, &mut |_, _, _| {}).expect("a part");
        let mut names: Vec<WeightName> = graph.weights().map(|(_, w)| w.name.clone()).collect();
        names.retain(|n| !n.contains("embed") && !n.contains("lm_head"));
        let moved = |name: &WeightName| {
            let values = weights.read_f32(name).expect("a weight");
            let value = |(i, v): (usize, &f32)| v * (1.0 + 0.1 * (((i * 37 + 11) % 17) as f32 / 8.0 - 1.0));
            (name.clone(), values.iter().enumerate().map(value).collect::<Vec<f32>>())
        };
        let changed: Vec<(WeightName, Vec<f32>)> = names.iter().map(moved).collect();
        let mut ask = |changed: &[(WeightName, Vec<f32>)], batch| {
            part_run
                .gradient((&run, &mut original), graph, weights, changed, batch, &mut |_, _, _| {})
                .expect("a gradient")
        };
        let found = ask(&changed, Some(0));
        let tokens: usize = windows()[..2].iter().map(Vec::len).sum();
        assert!(found.loss > 1e-6, "{name}: nothing has changed");
        assert_eq!(ask(&changed, None).loss, found.loss);
        assert!(ask(&changed, Some(7)).weights == found.weights, "batches begin again");
        for (at, gradient) in found.weights.iter().enumerate() {
            let length = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
            let size = changed[at].1.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
            let step = 2e-3 * size / length;
            let mut side = |sign: f64| {
                let mut changed = changed.clone();
                let moved = changed[at].1.iter_mut().zip(gradient);
                moved.for_each(|(v, g)| *v += (sign * step * f64::from(*g)) as f32);
                ask(&changed, None).loss * tokens as f64
            };
            let slope = (side(1.0) - side(-1.0)) / (2.0 * step);
            let expected = length * length;
            assert!(
                (slope / expected - 1.0).abs() < 0.03,
                "{name}, {}: {slope} for {expected}",
                changed[at].0
            );
        }
    }
}

/// After a part whose weights have changed, values are those of a run from the beginning.
#[test]
fn a_part_left_is_run_again() {
    let mut model = tiny("tiny/smollm2");
    let inputs = linear_inputs(&model.graph);
    let sum = |id: &attar_ir::NodeId| matches!(model.graph.op(*id), OpKind::Add(_));
    let sums: Vec<_> =
        model.graph.topo().into_iter().filter(sum).map(|node| ValueId { node, slot: 0 }).collect();
    let part = Part { from: sums[1], to: sums[3] };
    let mut run = SequentialRun::new(windows(), 1 << 30);
    let entered =
        PartRun::enter(&mut run, &model.graph, &model.weights, part, &mut |_, _, _| {}).expect("a part");
    let last = inputs[inputs.len() - 1];
    let of = |run: &mut SequentialRun, model: &Imported| {
        run.input_statistics(&model.graph, &model.weights, last.into(), &mut |_, _, _| {})
            .expect("statistics")
    };
    let before = of(&mut run, &model);
    let name = "model.layers.1.mlp.down_proj.weight";
    let shape = model.weights.info(name).expect("a weight").shape.clone();
    model.weights.add_values(name, &shape, vec![0.0; shape.iter().product()]);
    entered.leave(&mut run).expect("the beginning");
    let after = of(&mut run, &model);
    assert!(after != before);
    assert!(after == of(&mut SequentialRun::new(windows(), 1 << 30), &model));
}

/// Drift is nothing while nothing is encoded, and what its definition says afterwards.
#[test]
fn drift_is_measured_from_the_original() {
    let mut model = tiny("tiny/smollm2");
    let inputs = linear_inputs(&model.graph);
    let sum = |id: &attar_ir::NodeId| matches!(model.graph.op(*id), OpKind::Add(_));
    let residual =
        model.graph.topo().into_iter().find(sum).map(|node| ValueId { node, slot: 0 }).expect("a sum");
    // What goes into the first layer's down projection, with the sum before it.
    let down = inputs[3];
    let values = |model: &Imported, value| {
        let mut all = Vec::new();
        let mut run = SequentialRun::new(windows(), 1 << 30);
        run.advance(&model.graph, &model.weights, value, &mut |_, _, _| {}, &mut |v| all.extend(v.concat()))
            .expect("values");
        all
    };
    let (x, r) = (values(&model, down), values(&model, residual));
    let drift = |model: &Imported| {
        let mut run = SequentialRun::new(windows(), 1 << 30);
        let mut original = run.of_original(1 << 30);
        run.input_drift(
            &mut original,
            &model.graph,
            &model.weights,
            down.into(),
            Some(residual),
            &mut |_, _, _| {},
        )
        .expect("drift")
    };
    assert!(drift(&model).of_input.iter().all(|v| *v == 0.0));
    let name = "model.layers.0.self_attn.o_proj.weight";
    let info = model.weights.info(name).expect("a weight").clone();
    let coarse = attar_format::by_name("bf16").expect("a format");
    let values_of =
        model.weights.read_f32(name).expect("values").iter().map(|v| v * 1.5).collect::<Vec<f32>>();
    let encoded =
        attar_format::Encoded::from_f32(coarse, info.shape[0], info.shape[1], &values_of).expect("codes");
    model.weights.set_encoded(name, &encoded).expect("encoded");
    let (x_now, r_now) = (values(&model, down), values(&model, residual));
    let found = drift(&model);
    let tokens: usize = windows().iter().map(Vec::len).sum();
    let check = |found: &[f32], was: &[f32], now: &[f32]| {
        let (m, k) = (was.len() / tokens, x_now.len() / tokens);
        assert_eq!(found.len(), m * k);
        let mut largest = 0.0f64;
        for (i, j) in (0..m).flat_map(|i| (0..k).map(move |j| (i, j))) {
            let term = |t: usize| f64::from(was[t * m + i] - now[t * m + i]) * f64::from(x_now[t * k + j]);
            let expected: f64 = (0..tokens).map(term).sum();
            largest = largest.max(expected.abs());
            assert!(
                (f64::from(found[i * k + j]) - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                "{i} {j}"
            );
        }
        assert!(largest > 0.0);
    };
    check(&found.of_input, &x, &x_now);
    check(&found.of_sum.expect("the sum's"), &r, &r_now);
}

/// Tokens that count double are as good as seen twice.
#[test]
fn moments_and_drift_count_tokens() {
    let mut model = tiny("tiny/smollm2");
    let down = linear_inputs(&model.graph)[3];
    let counts: Vec<Vec<f32>> =
        windows().iter().map(|w| (0..w.len()).map(|t| (t % 3) as f32).collect()).collect();
    let name = "model.layers.0.self_attn.o_proj.weight";
    let info = model.weights.info(name).expect("a weight").clone();
    let coarse = attar_format::by_name("bf16").expect("a format");
    let halved: Vec<f32> = model.weights.read_f32(name).expect("values").iter().map(|v| v * 0.5).collect();
    let encoded =
        attar_format::Encoded::from_f32(coarse, info.shape[0], info.shape[1], &halved).expect("codes");
    model.weights.set_encoded(name, &encoded).expect("encoded");
    let (graph, weights) = (&model.graph, &model.weights);
    let values = |original: bool| {
        let run = SequentialRun::new(windows(), 1 << 30);
        let mut run = if original { run.of_original(1 << 30) } else { run };
        let mut all = Vec::new();
        run.advance(graph, weights, down, &mut |_, _, _| {}, &mut |v| all.extend(v.concat()))
            .expect("values");
        all
    };
    let (was, now) = (values(true), values(false));
    let mut run = SequentialRun::new(windows(), 1 << 30);
    let mut silent = |_: &str, _, _| {};
    let counted = Counted { value: down, counts: Some(&counts) };
    let moments = run.input_statistics(graph, weights, counted, &mut silent).expect("statistics");
    let mut run = SequentialRun::new(windows(), 1 << 30);
    let mut original = run.of_original(1 << 30);
    let drift = run.input_drift(&mut original, graph, weights, counted, None, &mut silent).expect("drift");
    let flat: Vec<f64> = counts.concat().into_iter().map(f64::from).collect();
    let k = moments.width;
    for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
        let at = |all: &[f32], t: usize, i: usize| f64::from(all[t * k + i]);
        let sum =
            |term: &dyn Fn(usize) -> f64| flat.iter().enumerate().map(|(t, c)| c * term(t)).sum::<f64>();
        let moment = sum(&|t| at(&now, t, i) * at(&now, t, j));
        let moved = sum(&|t| (at(&was, t, i) - at(&now, t, i)) * at(&now, t, j));
        let close = |a: f32, b: f64| (f64::from(a) - b).abs() < 1e-4 * (1.0 + b.abs());
        assert!(close(moments.second_moment[i * k + j], moment) && close(drift.of_input[i * k + j], moved));
    }
    // Counts 0, 1 and 2 in turns: three tokens are worth 3² / 5.
    let expected = flat.iter().sum::<f64>().powi(2) / flat.iter().map(|c| c * c).sum::<f64>();
    assert!((drift.n_effective - expected).abs() < 1e-9 && expected < 0.7 * flat.len() as f64);
    assert_eq!(moments.n_tokens, flat.len() as u64);
}
