//! The default passes and every preset on the tiny checkpoint of every architecture: that they fired, that the
//! graph means the same, that threads do not matter, and that fuel stops where it should.

use attar_import::Imported;
use attar_ir::interp::{KvState, Precision, Step, run_step};
use attar_ir::{Elem, Graph, Op, WeightStore};
use attar_pass::{
    Fuel, Manager, MetricValue, Pipeline, Preset, Recipe, Registry, Report, reference_markdown,
};
use attar_passes as _;
use attar_tests::calibrator::InterpreterCalibrator;
use attar_tests::tolerance::tolerance;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TINY: [&str; 7] = ["llama2", "llama2-sharded", "llama3", "mistral", "qwen2", "qwen3", "smollm2"];

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(path)
}

fn open(name: &str) -> Imported {
    attar_import::open(&data("tiny").join(name)).unwrap()
}

fn compile(model: &mut Imported, preset: Preset, manager: &Manager) -> Report {
    let registry = Registry::new().unwrap();
    let recipe = Recipe::parse(&preset.recipe(), &preset.name(), &registry).unwrap();
    recipe.check_tensors(&model.graph).unwrap();
    let pipeline = Pipeline::new(&attar_compiler::pipeline::default_passes(), &recipe, &registry).unwrap();
    manager.run(&pipeline, &mut model.graph, &mut model.weights, &mut |_| {}).unwrap()
}

/// Logits of every token of a prompt, then of one more token, so that the cache is read too.
fn logits(graph: &Graph, weights: &WeightStore) -> Vec<f64> {
    let mut cache = KvState::default();
    let mut out = Vec::new();
    for step in [Step::new(&[3, 17, 60, 128, 5, 9, 200], 0).all_rows(), Step::new(&[44], 7)] {
        let values = run_step(graph, weights, Precision::F64, &mut cache, &step).unwrap();
        out.extend_from_slice(values[0].as_real());
    }
    out
}

fn op_counts(graph: &Graph) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for id in graph.topo() {
        *counts.entry(graph.op(id).name()).or_default() += 1;
    }
    counts
}

#[test]
fn fused_graphs_mean_the_same_and_nothing_is_left_unfused() {
    for name in TINY {
        let mut model = open(name);
        let layers = op_counts(&model.graph)["attention"];
        let before = logits(&model.graph, &model.weights);
        compile(&mut model, Preset::F32, &Manager::default());
        let after = logits(&model.graph, &model.weights);
        tolerance("exact").unwrap().check(&before, &after).unwrap_or_else(|e| panic!("{name}: {e}"));

        let counts = op_counts(&model.graph);
        let of = |op: &str| counts.get(op).copied().unwrap_or(0);
        let expected = [
            ("qkv_rope", layers),
            ("gate_up_swiglu", layers),
            ("linear_residual", 2 * layers),
            ("norm_linear", 1),
            ("linear", 0),
            ("rms_norm", 0),
            ("add", 0),
            ("slice", 0),
            ("silu", 0),
            ("rope", 0),
        ];
        for (op, count) in expected {
            assert_eq!(of(op), count, "{name}: {op} in {counts:?}");
        }

        // All default passes are idempotent, also on what the others left.
        let again = compile(&mut model, Preset::F32, &Manager::default());
        assert!(again.passes.iter().all(|p| p.rewrites == 0), "{name}: {:?}", again.passes);
    }
}

#[test]
fn presets_store_matrices_as_they_say() {
    for name in TINY {
        for preset in Preset::all() {
            let mut model = open(name);
            let before = logits(&model.graph, &model.weights);
            let report = compile(&mut model, preset, &Manager::default());
            let after = logits(&model.graph, &model.weights);
            // Root mean square over all logits: a random model makes single logits of one position jump.
            let square = |v: f64| v * v;
            let error: f64 = before.iter().zip(&after).map(|(a, b)| square(a - b)).sum();
            let drift = (error / before.iter().copied().map(square).sum::<f64>()).sqrt();
            let most = match preset.layers.code_bits() {
                32 => 0.0,
                16 => 0.03,
                8 => 0.1,
                6 => 0.3,
                5 => 0.5,
                4 => 0.8,
                _ => 2.0,
            };
            // Some checkpoints are in bf16 already.
            let changes = !preset.layers.is_uncompressed();
            assert!(drift <= most && (drift > 0.0 || !changes), "{name} as {}: {drift}", preset.name());

            for (id, w) in model.graph.weights() {
                let of_head = w.name.contains("embed_tokens") || w.name.contains("lm_head");
                let wanted = match (preset, w.ty.rank()) {
                    (_, 1) => &attar_format::formats::F32,
                    _ if of_head => preset.rest,
                    _ => preset.layers,
                };
                let fits = w.ty.last().unwrap() % wanted.group == 0;
                let wanted = if fits { wanted.name } else { "bf16" };
                assert_eq!(w.ty.elem.name(), wanted, "{name}: {}", model.graph.describe(id));
            }
            for m in report.metrics.iter().filter(|m| m.values.contains_key("relative_rmse")) {
                let MetricValue::Number(error) = m.values["relative_rmse"] else { panic!("{m:?}") };
                let MetricValue::Text(format) = &m.values["format"] else { panic!("{m:?}") };
                let most = match format.as_str() {
                    "bf16" => 0.0025,
                    "w8" => 0.008,
                    "n6" => 0.03,
                    "n5" => 0.05,
                    "n4" => 0.09,
                    "n3" => 0.2,
                    _ => 0.4,
                };
                assert!((error > 0.0 || format == "bf16") && error < most, "{name}: {m:?}");
            }
        }
    }
}

/// Runs one pass of a recipe with a calibrator and gives its rewrites.
fn equalize(model: &mut Imported, text: &str) -> u64 {
    let registry = Registry::new().unwrap();
    let recipe = Recipe::parse(text, "equalize", &registry).unwrap();
    let pipeline = Pipeline::new(&[], &recipe, &registry).unwrap();
    let calibrator = &mut InterpreterCalibrator { steps: 2 };
    let (graph, weights) = (&mut model.graph, &mut model.weights);
    let report =
        Manager::default().run_calibrated(&pipeline, graph, weights, Some(calibrator), &mut |_| {}).unwrap();
    report.passes.iter().map(|p| p.rewrites).sum()
}

#[test]
fn rotated_and_smoothed_models_mean_the_same_in_other_weights() {
    for name in TINY {
        let mut model = open(name);
        let layers = op_counts(&model.graph)["attention"] as u64;
        let before = logits(&model.graph, &model.weights);
        let weights = ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"]
            .map(|w| format!("model.layers.0.{w}.weight"));
        let read = |model: &Imported| weights.clone().map(|w| model.weights.read_f32(&w).unwrap());
        let same = |model: &Imported, what: &str| {
            let after = logits(&model.graph, &model.weights);
            let tolerance = tolerance("rounding").unwrap();
            tolerance.check(&before, &after).unwrap_or_else(|e| panic!("{name}, {what}: {e}"));
        };

        let original = read(&model);
        let rewrites = equalize(&mut model, "[[pass]]\nname = \"smooth-activations\"\n");
        // The last norm only where the head is no embedding.
        assert!((4 * layers..=4 * layers + 1).contains(&rewrites), "{name}: {rewrites}");
        let smoothed = read(&model);
        assert!(original.iter().zip(&smoothed).all(|(a, b)| a != b), "{name}");
        same(&model, "smoothed");

        let rewrites = equalize(&mut model, "[[pass]]\nname = \"rotate-hadamard\"\nuntie = true\n");
        assert_eq!(rewrites, layers + 1, "{name}");
        assert!(smoothed.iter().zip(&read(&model)).all(|(a, b)| a != b), "{name}");
        same(&model, "rotated");
        let gains = model.graph.weights().filter(|(_, w)| w.name.contains("layernorm")).count();
        assert_eq!(gains, 0, "{name}: gains are left");

        compile(&mut model, Preset::F32, &Manager::default());
        same(&model, "fused");
    }
}

#[test]
fn threads_change_nothing() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut model = open("qwen2");
            let report = compile(&mut model, Preset::N4, &Manager::default());
            let metrics = report.metrics;
            let text = attar_ir::text::print(&model.graph);
            let coded: Vec<_> = model
                .graph
                .weights()
                .filter(|(_, w)| matches!(w.ty.elem, Elem::Coded(_)))
                .map(|(_, w)| model.weights.read_encoded(&w.name).unwrap())
                .collect();
            (metrics, text, coded)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn fuel_stops_at_every_rewrite_with_a_valid_graph() {
    let total: u64 =
        compile(&mut open("qwen3"), Preset::N4, &Manager::default()).passes.iter().map(|p| p.rewrites).sum();
    let mut model = open("qwen3");
    let reference = logits(&model.graph, &model.weights);
    let mut spent = 0;
    for fuel in (0..=total).step_by(3) {
        model = open("qwen3");
        let manager = Manager { fuel: Fuel::limited(fuel), ..Manager::default() };
        let report = compile(&mut model, Preset::N4, &manager);
        spent = report.passes.iter().map(|p| p.rewrites).sum();
        assert_eq!(spent, fuel);
        let after = logits(&model.graph, &model.weights);
        tolerance("lossy-n4")
            .unwrap()
            .check(&reference, &after)
            .unwrap_or_else(|e| panic!("fuel {fuel}: {e}"));
    }
    assert!(spent + 3 > total && total > 20, "{total}");
}

#[test]
fn a_mixed_recipe_leaves_what_differs_unfused_and_says_so() {
    let registry = Registry::new().unwrap();
    let text = "[[pass]]\nname = \"quantize-rtn\"\ntensors = [\"*.layers.*\"]\nexclude = [\"*.1.self_attn.v_proj.*\"]\nformat = \"n4\"\n\
                [[pass]]\nname = \"quantize-rtn\"\ntensors = [\"model.layers.1.self_attn.v_proj.weight\"]\nformat = \"w8\"\n";
    let recipe = Recipe::parse(text, "mixed", &registry).unwrap();
    let mut model = open("llama3");
    recipe.check_tensors(&model.graph).unwrap();
    let layers = op_counts(&model.graph)["attention"];
    let pipeline = Pipeline::new(&attar_compiler::pipeline::default_passes(), &recipe, &registry).unwrap();
    let report =
        Manager::default().run(&pipeline, &mut model.graph, &mut model.weights, &mut |_| {}).unwrap();
    assert_eq!(op_counts(&model.graph)["qkv_rope"], layers - 1);
    let said = report.metrics.iter().find(|m| m.pass == "fuse-qkv").unwrap();
    assert_eq!(said.values["refused"], MetricValue::from("formats differ: n4, n4, w8"));
    logits(&model.graph, &model.weights);
}

#[test]
fn the_pass_reference_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/passes.md");
    let generated = reference_markdown(Registry::new().unwrap().all());
    if std::env::var_os("ATTAR_UPDATE_DOCS").is_some_and(|v| v == "1") {
        std::fs::write(&path, &generated).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == generated, "docs/passes.md is stale; ATTAR_UPDATE_DOCS=1 rewrites it");
}
