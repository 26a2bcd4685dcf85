//! `quantize-gptq`: never worse than rounding in the norm of the inputs' second moment, refining never worse than not,
//! the same on any number of threads, and inputs that are missing, dead, degenerate or damaged.

use attar_format::{Encoded, FormatRef, formats};
use attar_ir::ops::{Linear, Silu};
use attar_ir::{Dim, Graph, TensorType, ValueId, WeightName, WeightStore};
use attar_pass::{
    Calibrator, Error, ErrorKind, Family, InputStatistics, Manager, MetricValue, Pipeline, Recipe, Registry,
    Report,
};
use attar_passes::quantize::curvature::Curvature;
use attar_passes::quantize::quantize_gptq::{choose, row_errors};
use attar_passes::quantize::vector_level::Level;
use proptest::prelude::*;

/// Uniform numbers in -1..1 from a 64-bit state.
fn noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    ((*state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32
}

/// Roughly normal numbers.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count).map(|_| (0..6).map(|_| noise(&mut state)).sum::<f32>() * 0.7).collect()
}

/// Inputs of `k` channels that share a few causes and differ in size; channels below `dead` are always zero.
fn statistics(k: usize, n_tokens: usize, seed: u64, dead: usize) -> InputStatistics {
    let causes = 6;
    let (mix, size) = (normal(causes * k, seed + 1), normal(k, seed + 2));
    let mut s = InputStatistics::zeros(k);
    s.n_tokens = n_tokens as u64;
    for token in 0..n_tokens {
        let cause = normal(causes, seed + 10 + token as u64);
        let own = normal(k, seed + 1_000_003 + token as u64);
        let x: Vec<f32> = (0..k)
            .map(|i| {
                let shared: f32 = (0..causes).map(|c| cause[c] * mix[c * k + i]).sum();
                if i < dead { 0.0 } else { (shared + 0.5 * own[i]) * (1.5 * size[i]).exp() }
            })
            .collect();
        for i in 0..k {
            (s.minimum[i], s.maximum[i]) = (s.minimum[i].min(x[i]), s.maximum[i].max(x[i]));
            for j in 0..k {
                s.second_moment[i * k + j] += x[i] * x[j];
            }
        }
    }
    s
}

/// `silu(x a) b` for given matrices.
fn model(a: Vec<f32>, b: Vec<f32>, k: usize) -> (Graph, WeightStore) {
    let mut weights = WeightStore::new();
    let a = weights.add_values("a.weight", &[a.len() / k, k], a);
    let b = weights.add_values("b.weight", &[b.len() / k, k], b);
    let mut g = Graph::new("step");
    let x = g.add_input("x", TensorType::f32([Dim::T, k.into()]));
    let a = g.add_weight(&a, TensorType::f32([k.into(), k.into()]));
    let b = g.add_weight(&b, TensorType::f32([k.into(), k.into()]));
    let y = g.add1(Linear {}, &[x, a]).unwrap();
    let y = g.add1(Silu {}, &[y]).unwrap();
    let z = g.add1(Linear {}, &[y, b]).unwrap();
    g.set_outputs(vec![z]);
    (g, weights)
}

/// Answers every question alike, and remembers what was asked.
struct Fixed {
    statistics: InputStatistics,
    asked: Vec<ValueId>,
}

impl Calibrator for Fixed {
    fn input_statistics(
        &mut self,
        _: &Graph,
        _: &WeightStore,
        input: ValueId,
        _: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<InputStatistics, Error> {
        self.asked.push(input);
        Ok(self.statistics.clone())
    }

    fn divergence(
        &mut self,
        _: &Graph,
        _: &WeightStore,
        _: Option<ValueId>,
        _: &[(WeightName, Vec<f32>)],
        _: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<f64> {
        Err(Error::new(ErrorKind::Uncalibrated))
    }
}

fn run(
    keys: &str,
    graph: &mut Graph,
    weights: &mut WeightStore,
    calibrator: Option<&mut dyn Calibrator>,
) -> Result<Report, Error> {
    let registry = Registry::new()?;
    let recipe = format!("[[pass]]\nname = \"quantize-gptq\"\n{keys}\n");
    let recipe = Recipe::parse(&recipe, "test", &registry)?;
    let pipeline = Pipeline::new(&[], &recipe, &registry)?;
    Manager::default().run_calibrated(&pipeline, graph, weights, calibrator, &mut |_| {})
}

fn rounded(format: FormatRef, k: usize, weights: &[f32]) -> Encoded {
    let (mut g, mut store) = model(weights.to_vec(), weights.to_vec(), k);
    let registry = Registry::new().unwrap();
    let recipe = format!("[[pass]]\nname = \"quantize-rtn\"\nformat = \"{}\"\n", format.name);
    let recipe = Recipe::parse(&recipe, "test", &registry).unwrap();
    let pipeline = Pipeline::new(&[], &recipe, &registry).unwrap();
    Manager::default().run(&pipeline, &mut g, &mut store, &mut |_| {}).unwrap();
    store.read_encoded("a.weight").unwrap()
}

/// Codes for a matrix as wide as the curvature.
fn chosen(format: FormatRef, curvature: &Curvature, weights: &[f32], rounds: usize) -> Encoded {
    let n = weights.len() / curvature.width();
    choose(format, n, curvature, weights, rounds, Level::widest()).unwrap().encoded
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
fn every_level_of_vectors_gives_the_same_codes() {
    let k = 160;
    let (s, weights) = (statistics(k, 400, 5, 3), normal(45 * k, 6));
    let curvature = Curvature::new(&s, 0.01, true).unwrap();
    let levels = Level::available();
    for format in coded() {
        let at = |level| choose(format, 45, &curvature, &weights, 4, level).unwrap();
        let expected = at(Level::PORTABLE);
        for level in &levels[1..] {
            let got = at(*level);
            assert!(got.encoded == expected.encoded, "{}: {level:?}", format.name);
            assert_eq!(got.relative_error, expected.relative_error, "{}: {level:?}", format.name);
        }
    }
    if levels.len() < 3 {
        eprintln!("skipped: {} of 3 levels of vectors are not on this machine", 3 - levels.len());
    }
}

/// Errors as the curvature has them, by another route: decoded codes, and sums over all pairs of columns.
#[test]
fn reported_errors_are_those_of_the_codes() {
    let (k, n) = (96, 96);
    let (s, weights) = (statistics(k, 300, 8, 0), normal(n * k, 9));
    let curvature = Curvature::new(&s, 0.01, true).unwrap();
    for format in coded() {
        let got = choose(format, n, &curvature, &weights, 4, Level::widest()).unwrap();
        let sum = |e: Vec<f64>| e.iter().sum::<f64>();
        let square = sum(curvature.row_errors(&weights));
        let expected = (sum(row_errors(&curvature, &weights, &got.encoded)) / square).sqrt();
        assert!((got.relative_error / expected - 1.0).abs() < 1e-3, "{} {expected}", got.relative_error);
        let plain = rounded(format, k, &weights);
        let expected = (sum(row_errors(&curvature, &weights, &plain)) / square).sqrt();
        assert!((got.rounded_error / expected - 1.0).abs() < 1e-3, "{} {expected}", got.rounded_error);
    }
}

fn coded() -> impl Iterator<Item = FormatRef> {
    formats::ALL.iter().copied().filter(|f| f.wants_int8_activations())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_row_is_worse_than_rounded_and_refining_is_never_worse(seed in 0u64..1000, dead in 0usize..40) {
        let k = 64;
        let s = statistics(k, 90, seed, dead);
        let mut weights = normal(k * k, seed + 77);
        // One row of zeros, one of a single large weight.
        weights[..k].fill(0.0);
        weights[k..2 * k].fill(0.0);
        weights[k + 5] = 1e4;
        let curvature = Curvature::new(&s, 0.01, true).unwrap();
        for format in coded() {
            let plain = rounded(format, k, &weights);
            let before = row_errors(&curvature, &weights, &plain);
            let unrefined = row_errors(&curvature, &weights, &chosen(format, &curvature, &weights, 0));
            let refined = row_errors(&curvature, &weights, &chosen(format, &curvature, &weights, 4));
            for row in 0..k {
                // Sums in f32 are not exact.
                let slack = 1e-5 * before[row] + 1e-12;
                prop_assert!(unrefined[row] <= before[row] + slack, "{}: row {row}: {} > {}", format.name, unrefined[row], before[row]);
                prop_assert!(refined[row] <= unrefined[row] * (1.0 + 1e-3) + slack, "{}: row {row}: {} > {}", format.name, refined[row], unrefined[row]);
            }
        }
    }
}

#[test]
fn it_pays_where_inputs_are_correlated() {
    let k = 256;
    let (s, weights) = (statistics(k, 1500, 3, 0), normal(k * k, 4));
    let curvature = Curvature::new(&s, 0.01, true).unwrap();
    let total = |e: &Encoded| row_errors(&curvature, &weights, e).iter().sum::<f64>();
    let plain = rounded(&formats::N4, k, &weights);
    let before = total(&plain);
    let feedback = total(&chosen(&formats::N4, &curvature, &weights, 0));
    let refined = total(&chosen(&formats::N4, &curvature, &weights, 4));
    assert!(feedback < 0.5 * before && refined < 0.99 * feedback, "{before} {feedback} {refined}");
}

#[test]
fn threads_change_nothing() {
    let k = 160;
    let (s, weights) = (statistics(k, 300, 5, 3), normal(k * k, 6));
    let of = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut g, mut store) = model(weights.clone(), weights.clone(), k);
            let mut calibrator = Fixed { statistics: s.clone(), asked: Vec::new() };
            let report = run("format = \"n4\"", &mut g, &mut store, Some(&mut calibrator)).unwrap();
            (store.read_encoded("a.weight").unwrap(), store.read_encoded("b.weight").unwrap(), report.metrics)
        })
    };
    assert!(of(1) == of(4));
}

#[test]
fn inputs_are_asked_for_in_the_order_they_are_computed() {
    let k = 64;
    let (mut g, mut store) = model(normal(k * k, 1), normal(k * k, 2), k);
    let mut calibrator = Fixed { statistics: statistics(k, 80, 1, 0), asked: Vec::new() };
    let report = run("format = \"n4\"", &mut g, &mut store, Some(&mut calibrator)).unwrap();
    assert_eq!(calibrator.asked.len(), 2);
    assert_eq!(calibrator.asked[0], g.input_named("x").unwrap());
    assert_eq!(report.passes[0].rewrites, 2);
    for m in report.metrics.iter().filter(|m| m.values.contains_key("relative_output_error")) {
        let number = |key: &str| match m.values[key] {
            MetricValue::Number(v) => v,
            _ => panic!("{m:?}"),
        };
        assert!(number("relative_output_error") < 0.8 * number("relative_output_error_rounded"), "{m:?}");
    }
}

/// Statistics alone tell nothing of gradients; the codes are those without guidance, and the metrics say why.
#[test]
fn guidance_that_cannot_be_had_is_refused() {
    let k = 64;
    let of = |keys: &str| {
        let (mut g, mut store) = model(normal(k * k, 1), normal(k * k, 2), k);
        let mut calibrator = Fixed { statistics: statistics(k, 80, 1, 0), asked: Vec::new() };
        let report = run(keys, &mut g, &mut store, Some(&mut calibrator)).unwrap();
        let refused = report.metrics.iter().any(|m| m.subject == "guidance");
        (store.read_encoded("a.weight").unwrap(), refused)
    };
    let (plain, guided) = (of("format = \"n4\""), of("format = \"n4\"\nguidance = 1.0"));
    assert!(plain.0 == guided.0);
    assert_eq!((plain.1, guided.1), (false, true));
}

#[test]
fn without_calibration_it_says_what_to_do() {
    let k = 64;
    let (mut g, mut store) = model(normal(k * k, 1), normal(k * k, 2), k);
    for keys in ["format = \"n4\"", "format = \"n4\"\nguidance = 1.0"] {
        let e = run(keys, &mut g, &mut store, None).unwrap_err();
        assert_eq!((e.family(), e.at.tensor.as_deref()), (Family::Input, Some("a.weight")));
        assert!(e.to_string().contains("--calibrate") && e.to_string().contains("quantize-rtn"), "{e}");
    }
}

#[test]
fn inputs_that_were_zero_or_never_varied_are_handled() {
    let k = 64;
    for s in [InputStatistics::zeros(k), statistics(k, 1, 9, 0), statistics(k, 200, 9, k)] {
        let (mut g, mut store) = model(normal(k * k, 1), vec![0.0; k * k], k);
        let mut calibrator = Fixed { statistics: s, asked: Vec::new() };
        run("format = \"n4\"", &mut g, &mut store, Some(&mut calibrator)).unwrap();
        assert!(store.read_f32("b.weight").unwrap().iter().all(|w| *w == 0.0));
    }
}

#[test]
fn damaged_inputs_and_weights_are_errors_that_name_the_tensor() {
    let k = 64;
    let mut broken = statistics(k, 50, 2, 0);
    broken.second_moment[3] = f32::INFINITY;
    let (mut g, mut store) = model(normal(k * k, 1), normal(k * k, 2), k);
    let mut calibrator = Fixed { statistics: broken, asked: Vec::new() };
    let e = run("format = \"n4\"", &mut g, &mut store, Some(&mut calibrator)).unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::Calibration { .. }), "{e}");
    assert_eq!(e.at.tensor.as_deref(), Some("a.weight"));

    let mut weights = normal(k * k, 2);
    weights[k + 3] = f32::NAN;
    let (mut g, mut store) = model(normal(k * k, 1), weights, k);
    let mut calibrator = Fixed { statistics: statistics(k, 50, 2, 0), asked: Vec::new() };
    let e = run("format = \"n4\"", &mut g, &mut store, Some(&mut calibrator)).unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::NotFinite { row: 1, column: 3, .. }), "{e}");
    assert_eq!(e.at.tensor.as_deref(), Some("b.weight"));
}
