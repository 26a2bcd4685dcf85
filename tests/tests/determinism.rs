//! `deterministic` mode: the logits after a prompt are the same bits whatever the number of threads, the way the prompt
//! is cut into steps, what else is in the batch, and how far ahead kernels prefetch.

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::Target;
use attar_compiler::{CompileOptions, Session, registry};
use attar_pass::{Preset, Recipe};
use attar_runtime::{Engine, Model, OpenOptions, SequenceId, StepBatch};
use proptest::prelude::*;
use std::path::Path;
use tempfile::TempDir;

const CONTEXT: usize = 120;

/// One tiny checkpoint compiled for every target of this machine, opened with 1 to 3 threads and as many prefetch distances.
struct Compiled {
    vocab: u32,
    models: Vec<(String, Vec<Model>)>,
    _folder: TempDir,
}

fn compiled(name: &str, preset: Preset, kv: KvType) -> Compiled {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.attar");
    let recipe =
        Recipe::parse(&preset.recipe(), &preset.name(), &registry().expect("passes")).expect("a preset");
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|t| t.runs_here()).collect();
    let names: Vec<String> = targets.iter().map(|t| t.name().to_owned()).collect();
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny").join(name);
    let mut options = CompileOptions::new(checkpoint, recipe, targets, path.clone());
    options.kv = Some(kv);
    let session = Session::new(options).expect("options");
    session.run(&mut |_| ()).expect("compiles");
    let open = |target: &String, threads| {
        let target = Some(target.clone());
        let prefetch_bytes = [0, 512, 65536].get(threads - 1).copied();
        let options = OpenOptions {
            threads: Some(threads),
            target,
            prefetch_bytes,
            deterministic: true,
            ..OpenOptions::default()
        };
        Model::open(&path, &options).expect("opens")
    };
    let models: Vec<_> = names
        .into_iter()
        .map(|name| {
            let opened = [1, 2, 3].map(|threads| open(&name, threads)).to_vec();
            (name, opened)
        })
        .collect();
    Compiled { vocab: models[0].1[0].manifest().model.vocab, models, _folder: folder }
}

/// Logits after each prompt when every step takes a part of each: `cuts` says how many tokens, in turn.
fn logits(model: &Model, prompts: &[Vec<u32>], cuts: &[usize]) -> Vec<Vec<u32>> {
    let mut engine = Engine::new(model.clone(), CONTEXT, prompts.len()).expect("an engine");
    let ids: Vec<SequenceId> =
        prompts.iter().map(|_| engine.add_sequence().expect("a free sequence")).collect();
    let mut done = vec![0; prompts.len()];
    let mut last = vec![Vec::new(); prompts.len()];
    let mut cuts = cuts.iter().copied().cycle();
    while done.iter().zip(prompts).any(|(done, p)| *done < p.len()) {
        let mut batch = StepBatch::default();
        let mut wanted = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let room = model.max_step_tokens() - batch.len();
            let take = cuts.next().unwrap_or(1).min(prompt.len() - done[i]).min(room);
            for token in &prompt[done[i]..done[i] + take] {
                done[i] += 1;
                let end = done[i] == prompt.len();
                batch.push(ids[i], *token, end);
                wanted.extend(end.then_some(i));
            }
        }
        let rows = engine.step(&batch).expect("a step");
        for (row, i) in rows.chunks_exact((rows.len() / wanted.len().max(1)).max(1)).zip(&wanted) {
            last[*i] = row.iter().map(|v| v.to_bits()).collect();
        }
    }
    last
}

fn check(model: &Compiled, prompts: &[Vec<u32>], cuts: &[usize]) -> Result<(), TestCaseError> {
    let prompts: Vec<Vec<u32>> =
        prompts.iter().map(|p| p.iter().map(|t| t % model.vocab).collect()).collect();
    for (target, opened) in &model.models {
        let whole: Vec<Vec<u32>> = prompts
            .iter()
            .map(|p| logits(&opened[0], std::slice::from_ref(p), &[usize::MAX]).remove(0))
            .collect();
        prop_assert!(whole.iter().all(|row| !row.is_empty()));
        for (threads, model) in (1..).zip(opened) {
            prop_assert!(logits(model, &prompts, cuts) == whole, "{} on {} threads", target, threads);
        }
    }
    Ok(())
}

fn prompts() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let prompt = proptest::collection::vec(0u32..1 << 16, 1..CONTEXT);
    proptest::collection::vec(prompt, 1..4)
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![Just(1), 2usize..17, 17usize..90], 1..6)
}

fn property(name: &str, preset: Preset, kv: KvType) {
    let model = compiled(name, preset, kv);
    let config = ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(prompts in prompts(), cuts in cuts())| {
        check(&model, &prompts, &cuts)?;
    });
}

#[test]
fn n4_logits_depend_on_the_tokens_alone() {
    property("smollm2", Preset::N4, KvType::F16);
}

#[test]
fn w8_logits_depend_on_the_tokens_alone() {
    property("qwen3", Preset::W8, KvType::F16);
}

#[test]
fn bf16_logits_depend_on_the_tokens_alone() {
    property("llama3", Preset::BF16, KvType::F16);
}

#[test]
fn logits_over_a_cache_of_codes_depend_on_the_tokens_alone() {
    property("qwen3", Preset::W8, KvType::Int8);
    property("qwen3", Preset::W8, KvType::Int4);
}
