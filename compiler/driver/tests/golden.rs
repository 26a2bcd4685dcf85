//! Every tiny checkpoint, imported, fused and lowered, computes the logits transformers computed.
//!
//! Kernels are the scalar reference, which checks import, passes, lowering, packing and memory planning, and, where
//! this machine executes one of our targets, the compiled ones.

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::Target;
use attar_codegen_cpu::host::{HostRunner, Kernels, Room};
use attar_codegen_cpu::lower::LowerOptions;
use attar_compiler::{pipeline, registry};
use attar_ir::interp::Step;
use attar_pass::{Manager, Pipeline, Preset, Recipe};
use std::path::{Path, PathBuf};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data")
}

/// Every tiny checkpoint, as folder or GGUF file, with the file its golden logits stand in.
fn models() -> Vec<(PathBuf, PathBuf)> {
    let list = |folder: &str| {
        let folder = data().join(folder);
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        entries.map(|e| e.expect("an entry").path()).collect::<Vec<_>>()
    };
    let folders = list("tiny").into_iter().map(|p| (p.clone(), p.join("golden.json")));
    let files = list("gguf").into_iter().filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    let files = files.map(|p| (p.clone(), p.with_extension("golden.json")));
    let mut models: Vec<_> = folders.chain(files).filter(|(_, golden)| has_logits(golden)).collect();
    models.sort();
    assert!(models.len() >= 10, "checkpoints are missing from {}", data().display());
    models
}

/// Some goldens are of tokenizers alone.
fn has_logits(golden: &Path) -> bool {
    std::fs::read_to_string(golden).is_ok_and(|text| text.contains("\"last_logits\""))
}

fn llama2() -> (PathBuf, PathBuf) {
    let folder = data().join("tiny/llama2");
    (folder.clone(), folder.join("golden.json"))
}

struct Golden {
    tokens: Vec<i32>,
    last_logits: Vec<f64>,
    logits_sum_abs: Vec<f64>,
    argmax: Vec<usize>,
    greedy: Vec<i32>,
}

fn golden(file: &Path) -> Golden {
    let text = std::fs::read_to_string(file).expect("golden.json");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let numbers = |key: &str| -> Vec<f64> {
        let list = json[key].as_array().unwrap_or_else(|| panic!("{}: no list {key}", file.display()));
        list.iter().filter_map(serde_json::Value::as_f64).collect()
    };
    let ints = |key: &str| numbers(key).into_iter().map(|v| v as i32).collect::<Vec<_>>();
    Golden {
        tokens: ints("tokens"),
        last_logits: numbers("last_logits"),
        logits_sum_abs: numbers("logits_sum_abs"),
        argmax: numbers("argmax").into_iter().map(|v| v as usize).collect(),
        greedy: ints("greedy"),
    }
}

fn runner(model: &Path, preset: Preset, kernels: Kernels) -> HostRunner {
    let kv = if preset == Preset::F32 { KvType::F32 } else { KvType::F16 };
    runner_with(model, preset, kv, kernels)
}

fn runner_with(model: &Path, preset: Preset, kv: KvType, kernels: Kernels) -> HostRunner {
    let mut imported = attar_import::open(model).expect("imports");
    let registry = registry().expect("passes");
    let recipe = Recipe::parse(&preset.recipe(), "preset", &registry).expect("a recipe");
    let pipeline = Pipeline::new(&pipeline::default_passes(), &recipe, &registry).expect("a pipeline");
    let (graph, weights) = (&mut imported.graph, &mut imported.weights);
    Manager::default().run(&pipeline, graph, weights, &mut |_| {}).expect("passes run");
    let room = Room { sequences: 1, context: 128 };
    HostRunner::new(graph, weights, &LowerOptions::new(kv), kernels, room).expect("is ready")
}

fn argmax(row: &[f64]) -> usize {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i)
}

fn check((model, file): &(PathBuf, PathBuf), kernels: Kernels) {
    let golden = golden(file);
    let mut runner = runner(model, Preset::F32, kernels);
    let model = model.display();
    let logits = runner.step(&Step::new(&golden.tokens, 0).all_rows()).expect("runs").remove(0);
    let vocab = logits.shape[1];
    assert_eq!(logits.shape, [golden.tokens.len(), golden.last_logits.len()]);
    for (t, row) in logits.as_real().chunks(vocab).enumerate() {
        let sum: f64 = row.iter().map(|v| v.abs()).sum();
        let drift = (sum - golden.logits_sum_abs[t]).abs() / vocab as f64;
        assert!(drift < 1e-3, "{model}, position {t}: sum of |logits| drifts by {drift} per logit");
        assert_eq!(argmax(row), golden.argmax[t], "{model}, position {t}");
    }
    let last = &logits.as_real()[(golden.tokens.len() - 1) * vocab..];
    for (i, (got, expected)) in last.iter().zip(&golden.last_logits).enumerate() {
        assert!((got - expected).abs() < 1e-3, "{model}, logit {i}: {got} against {expected}");
    }
    let mut next = argmax(last) as i32;
    let mut position = golden.tokens.len() as i32;
    let mut greedy = Vec::new();
    while greedy.len() < golden.greedy.len() {
        greedy.push(next);
        let logits = runner.step(&Step::new(&[next], position)).expect("runs").remove(0);
        next = argmax(logits.as_real()) as i32;
        position += 1;
    }
    assert_eq!(greedy, golden.greedy, "{model}");
}

#[test]
fn reference_kernels_reach_the_golden_logits() {
    models().iter().for_each(|m| check(m, Kernels::Reference));
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
fn compiled_kernels_reach_the_golden_logits() {
    let Some(target) = Target::native() else {
        eprintln!("skipped {} models: no target fits this machine", models().len());
        return;
    };
    models().iter().for_each(|m| check(m, Kernels::Compiled(target)));
}

#[test]
fn compressed_weights_drift_but_do_not_break() {
    let (model, file) = llama2();
    let golden = golden(&file);
    let error = |preset| {
        let mut runner = runner(&model, preset, Kernels::Reference);
        let logits = runner.step(&Step::new(&golden.tokens, 0)).expect("runs").remove(0);
        let pairs = logits.as_real().iter().zip(&golden.last_logits);
        let square: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
        (square / golden.last_logits.len() as f64).sqrt()
    };
    let scale =
        (golden.last_logits.iter().map(|v| v * v).sum::<f64>() / golden.last_logits.len() as f64).sqrt();
    let (bf16, w8, n4) = (error(Preset::BF16), error(Preset::W8), error(Preset::N4));
    assert!(bf16 < 0.02 * scale, "bf16 drifts by {bf16} of {scale}");
    // These seeded models amplify: int8 activations cost as much as 8-bit weights, and both show.
    assert!(w8 < 0.1 * scale, "w8 drifts by {w8} of {scale}");
    assert!(n4 > bf16 && n4 < 0.5 * scale, "n4 drifts by {n4} of {scale}");
}

/// Seeded models amplify, in heads of 16; what counts is that logits stay those of the model.
#[test]
fn caches_of_codes_drift_but_do_not_break() {
    let kernels = [Some(Kernels::Reference), Target::native().map(Kernels::Compiled)];
    for (model, file) in models() {
        let golden = golden(&file);
        let scale = |v: &[f64]| (v.iter().map(|v| v * v).sum::<f64>() / v.len() as f64).sqrt();
        let size = scale(&golden.last_logits);
        for kernels in kernels.into_iter().flatten() {
            let error = |kv| {
                let mut runner = runner_with(&model, Preset::F32, kv, kernels);
                let logits = runner.step(&Step::new(&golden.tokens, 0)).expect("runs").remove(0);
                let pairs = logits.as_real().iter().zip(&golden.last_logits);
                scale(&pairs.map(|(a, b)| a - b).collect::<Vec<_>>()) / size
            };
            let (bytes, halves) = (error(KvType::Int8), error(KvType::Int4));
            let model = model.display();
            assert!(bytes < 0.06, "{model}: int8 drifts by {bytes}");
            assert!(halves > bytes && halves < 0.7, "{model}: int4 drifts by {halves}");
        }
    }
}
