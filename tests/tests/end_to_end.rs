//! From checkpoint to text: compiled artifacts, opened by the engine, against truth from outside.
//!
//! Truth: `golden.json` beside every tiny checkpoint (transformers), `data/golden/` for SmolLM2 (transformers and
//! llama.cpp). What needs the weights of SmolLM2 fetches them as the quickstart does; what needs the WikiText-2
//! validation text takes it from `ATTAR_WIKITEXT`, or from `../shared/data/wikitext2-valid.tokens.txt` beside the
//! repository. What is missing is reported as skipped, with a count, on standard error.

use attar_cli::fetch::download::hash_file;
use attar_cli::home::Home;
use attar_cli::terminal::Terminal;
use attar_compiler::evaluate::{self, Windows};
use attar_compiler::{Certify, CompileOptions, HELD_OUT_TEXT, Session, registry, resolve_targets};
use attar_ir::Tensor;
use attar_ir::interp::{self, KvState, Precision};
use attar_pass::{Preset, Recipe};
use attar_runtime::{
    Control, Engine, GenerateOptions, Model, OpenOptions, SequenceId, SessionOptions, StepBatch, top_logits,
};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use tempfile::TempDir;

/// f32 rounding in another order of summation; the goldens' own `f64_error` is a tenth of it.
const TINY_TOLERANCE: f64 = 1e-3;
/// As above, for 30 layers: the golden was itself computed in f32.
const SMOLLM2_TOLERANCE: f64 = 2e-3;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(path)
}

/// Writes past the test harness, which hides what passing tests print.
fn report(text: &str) {
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

struct Case {
    name: String,
    checkpoint: PathBuf,
    golden: Value,
}

/// Every small checkpoint with logits: folders of `tiny/` and files of `gguf/`.
fn cases() -> Vec<Case> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data("tiny")).expect("tests/data/tiny").flatten() {
        if entry.path().join("golden.json").is_file() {
            found.push((entry.path(), entry.path().join("golden.json")));
        }
    }
    for entry in fs::read_dir(data("gguf")).expect("tests/data/gguf").flatten() {
        let golden = entry.path().with_extension("golden.json");
        if entry.path().extension().is_some_and(|e| e == "gguf") && golden.is_file() {
            found.push((entry.path(), golden));
        }
    }
    found.sort();
    let read = |(checkpoint, golden): (PathBuf, PathBuf)| {
        let golden: Value = serde_json::from_slice(&fs::read(golden).expect("a golden")).expect("JSON");
        let name = checkpoint.strip_prefix(data("")).expect("inside data").display().to_string();
        golden.get("last_logits").is_some().then_some(Case { name, checkpoint, golden })
    };
    let cases: Vec<Case> = found.into_iter().filter_map(read).collect();
    assert!(cases.len() >= 9, "only {} cases", cases.len());
    cases
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("an id") as u32).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
}

fn options(checkpoint: &Path, preset: Preset, out: &Path) -> CompileOptions {
    options_with(checkpoint, &preset.recipe(), out)
}

fn options_with(checkpoint: &Path, recipe: &str, out: &Path) -> CompileOptions {
    let recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
    let targets = resolve_targets(&["native"]).expect("a target for this machine");
    CompileOptions::new(checkpoint.to_owned(), recipe, targets, out.to_owned())
}

fn compile(checkpoint: &Path, preset: Preset, out: &Path) {
    let session = Session::new(options(checkpoint, preset, out)).expect("options");
    session.run(&mut |_| ()).unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()));
}

fn open(path: &Path, threads: usize) -> Model {
    let options = OpenOptions { threads: Some(threads), ..OpenOptions::default() };
    Model::open(path, &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The model of a small checkpoint, compiled in a folder of its own.
fn small_model(checkpoint: &Path, preset: Preset) -> (TempDir, Model) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.attar");
    compile(checkpoint, preset, &path);
    let model = open(&path, 2);
    (folder, model)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

fn argmax(row: &[f32]) -> u32 {
    top_logits(row, 1)[0].0
}

fn greedy(model: &Model, prompt: &[u32], count: usize, ignore_eos: bool) -> Vec<u32> {
    let mut session = model.session(&SessionOptions::default()).expect("a session");
    let options = GenerateOptions { max_tokens: Some(count), ignore_eos, ..GenerateOptions::default() };
    session.generate(prompt, &options, |_| Control::Continue).expect("text").tokens
}

/// Logits after every token, computed in chunks of the given sizes (the last one repeats).
fn all_logits(model: &Model, tokens: &[u32], chunks: &[usize]) -> Vec<Vec<f32>> {
    let mut session = model.session(&SessionOptions::default()).expect("a session");
    let (mut rest, mut rows) = (tokens, Vec::new());
    let mut sizes = chunks.iter().chain(std::iter::repeat(chunks.last().expect("a size")));
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at((*sizes.next().expect("endless")).min(rest.len()));
        session.append_with_logits(chunk, |_, row| rows.push(row.to_vec())).expect("logits");
        rest = after;
    }
    rows
}

/// The interpreter's logits after the last token.
fn interpreted(checkpoint: &Path, tokens: &[u32]) -> Vec<f32> {
    let imported = attar_import::open(checkpoint).expect("a checkpoint");
    let n = tokens.len();
    let inputs = [
        Tensor::int([n], tokens.iter().map(|t| *t as i32).collect()),
        Tensor::int([n], (0..n as i32).collect()),
        Tensor::int([1], vec![n as i32 - 1]),
    ];
    let mut cache = KvState::default();
    let out = interp::run(&imported.graph, &imported.weights, Precision::F32, &mut cache, &inputs);
    out.expect("logits")[0].as_real().iter().map(|v| *v as f32).collect()
}

#[test]
fn every_small_checkpoint_reaches_its_golden() {
    for case in cases() {
        let (_folder, model) = small_model(&case.checkpoint, Preset::F32);
        let (name, golden) = (&case.name, &case.golden);
        let tokens = ids(&golden["tokens"]);
        let text = golden["text"].as_str().expect("a text");
        assert_eq!(
            model.tokenizer().expect("a tokenizer").encode(text, true).expect("ids"),
            tokens,
            "{name}"
        );

        let rows = all_logits(&model, &tokens, &[tokens.len()]);
        let expected: Vec<f32> = numbers(&golden["last_logits"]).iter().map(|v| *v as f32).collect();
        let last = rows.last().expect("a row");
        let error = largest_difference(last, &expected);
        assert!(error < TINY_TOLERANCE, "{name}: compiled logits differ by {error}");
        let error = largest_difference(&interpreted(&case.checkpoint, &tokens), &expected);
        assert!(error < TINY_TOLERANCE, "{name}: interpreted logits differ by {error}");
        for (i, (row, sum)) in rows.iter().zip(numbers(&golden["logits_sum_abs"])).enumerate() {
            let got: f64 = row.iter().map(|v| f64::from(v.abs())).sum();
            let allowed = TINY_TOLERANCE * row.len() as f64;
            assert!(
                (got - sum).abs() < allowed,
                "{name}, position {i}: sum of |logit| {got}, expected {sum}"
            );
        }
        let best: Vec<u32> = rows.iter().map(|r| argmax(r)).collect();
        assert_eq!(best, ids(&golden["argmax"]), "{name}");
        assert_eq!(greedy(&model, &tokens, 16, true), ids(&golden["greedy"]), "{name}");
    }
}

#[test]
fn texts_become_the_golden_tokens_and_back() {
    for case in cases() {
        let (_folder, model) = small_model(&case.checkpoint, Preset::F32);
        let tokenizer = model.tokenizer().expect("a tokenizer");
        for e in case.golden["encodings"].as_array().expect("encodings") {
            let text = e["text"].as_str().expect("a text");
            assert_eq!(
                tokenizer.encode(text, false).expect("ids"),
                ids(&e["ids"]),
                "{}: {text:?}",
                case.name
            );
        }
        let chat = &case.golden["chat"];
        if chat.is_null() {
            continue;
        }
        let template = model.chat_template().expect("a template");
        let text = template.render_json(&chat["messages"].to_string(), true).expect("text");
        assert_eq!(Some(text.as_str()), chat["text"].as_str(), "{}", case.name);
        assert_eq!(tokenizer.encode(&text, false).expect("ids"), ids(&chat["ids"]), "{}", case.name);
    }
}

/// 150 tokens: five pages of the cache, and far beyond Mistral's window of 8.
fn long_prompt(vocab: u32) -> Vec<u32> {
    (0..150u32).map(|i| 3 + (i * 7919 + i * i * 31) % (vocab - 3)).collect()
}

#[test]
fn chunks_give_what_one_step_gives_across_pages_and_beyond_windows() {
    for case in cases() {
        let (_folder, model) = small_model(&case.checkpoint, Preset::F32);
        let tokens = long_prompt(model.manifest().model.vocab);
        let whole = all_logits(&model, &tokens, &[tokens.len()]);
        // Decode program, small-batch program, prefill program, and cuts inside of pages.
        for chunks in [&[1usize][..], &[5], &[17, 31, 1], &[32], &[100, 1]] {
            let parts = all_logits(&model, &tokens, chunks);
            assert_eq!(parts.len(), whole.len());
            for (i, (a, b)) in whole.iter().zip(&parts).enumerate() {
                let error = largest_difference(a, b);
                assert!(error < TINY_TOLERANCE, "{}, chunks {chunks:?}, position {i}: {error}", case.name);
            }
        }
        let error = largest_difference(whole.last().expect("a row"), &interpreted(&case.checkpoint, &tokens));
        assert!(error < TINY_TOLERANCE, "{}: {error} from the interpreter", case.name);
    }
}

#[test]
fn sequences_in_one_batch_do_not_see_each_other() {
    for case in cases() {
        let (_folder, model) = small_model(&case.checkpoint, Preset::F32);
        let vocab = model.manifest().model.vocab;
        let long = long_prompt(vocab);
        let prompts: [&[u32]; 3] = [&long[..40], &long[7..9], &long[60..130]];
        let mut engine = Engine::new(model.clone(), 160, 3).expect("an engine");
        let sequences: Vec<SequenceId> =
            prompts.iter().map(|_| engine.add_sequence().expect("room")).collect();
        let mut batch = StepBatch::default();
        for (sequence, prompt) in sequences.iter().zip(prompts) {
            for (i, token) in prompt.iter().enumerate() {
                batch.push(*sequence, *token, i + 1 == prompt.len());
            }
        }
        let mut together = engine.step(&batch).expect("logits").to_vec();
        // One more token each: a batched decode.
        batch.clear();
        for (sequence, token) in sequences.iter().zip([11, 12, 13]) {
            batch.push(*sequence, token, true);
        }
        together.extend_from_slice(engine.step(&batch).expect("logits"));
        let rows: Vec<&[f32]> = together.chunks_exact(vocab as usize).collect();
        assert_eq!(rows.len(), 6);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut tokens = prompt.to_vec();
            tokens.push(11 + i as u32);
            let alone = all_logits(&model, &tokens, &[prompt.len(), 1]);
            for (row, expected) in [(rows[i], &alone[prompt.len() - 1]), (rows[3 + i], &alone[prompt.len()])]
            {
                let error = largest_difference(row, expected);
                assert!(error < TINY_TOLERANCE, "{}, sequence {i}: {error}", case.name);
            }
        }
    }
}

/// Every format with a table, from the checkpoint to logits: by one token at a time, by a few, and as a prompt.
#[test]
fn more_bits_bring_logits_nearer_to_the_checkpoint() {
    let all = cases();
    let case = all.iter().find(|c| c.name.ends_with("tiny/smollm2")).expect("a case whose widths fit");
    let prompt = ids(&case.golden["tokens"]);
    let (_folder, exact) = small_model(&case.checkpoint, Preset::F32);
    let exact = all_logits(&exact, &prompt, &[prompt.len()]);
    let distance = |rows: &[Vec<f32>], others: &[Vec<f32>]| -> f64 {
        let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        rows.iter().flatten().zip(others.iter().flatten()).map(square).sum::<f64>().sqrt()
    };
    let size = distance(&exact, &vec![vec![0.0; exact[0].len()]; exact.len()]);
    // Two bits leave nothing of a model of random weights, and are only the first to compare with.
    let mut before = f64::INFINITY;
    for name in ["n2", "n3", "n4", "n5", "n6"] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.attar");
        let recipe = format!("[[pass]]\nname = \"quantize-rtn\"\nformat = \"{name}\"\n");
        let session = Session::new(options_with(&case.checkpoint, &recipe, &path)).expect("options");
        session.run(&mut |_| ()).expect("an artifact");
        let model = open(&path, 2);
        let rows = all_logits(&model, &prompt, &[prompt.len()]);
        for chunks in [1, 5] {
            let others = all_logits(&model, &prompt, &[chunks]);
            // Tiles of bf16 round otherwise; everything else gives the same bits.
            let apart = distance(&rows, &others) / size;
            assert!(apart < 0.01, "{name}: {apart} between chunks");
        }
        let error = distance(&rows, &exact);
        report(&format!("{name}: error {:.4}", error / size));
        assert!(error < 0.9 * before, "{name}: {error} after {before} with a bit less");
        before = error;
    }
}

#[test]
fn threads_and_repetition_do_not_change_a_generation() {
    let case = &cases()[0];
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.attar");
    compile(&case.checkpoint, Preset::N4, &path);
    let prompt = ids(&case.golden["tokens"]);
    let reference = all_logits(&open(&path, 1), &prompt, &[prompt.len()]);
    for threads in [1, 2, 3] {
        let rows = all_logits(&open(&path, threads), &prompt, &[prompt.len()]);
        assert!(rows == reference, "{threads} threads give other bits");
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let case = &cases()[0];
    for preset in Preset::all() {
        let folder = tempfile::tempdir().expect("a folder");
        let (first, second) = (folder.path().join("a.attar"), folder.path().join("deep/er/b.attar"));
        fs::create_dir_all(second.parent().expect("a parent")).expect("a folder");
        compile(&case.checkpoint, preset, &first);
        let elsewhere = folder.path().join("copy");
        copy(&case.checkpoint, &elsewhere);
        let threads = Some(1);
        let again = CompileOptions { threads, ..options(&elsewhere, preset, &second) };
        Session::new(again).expect("options").run(&mut |_| ()).expect("an artifact");
        assert!(fs::read(&first).expect("bytes") == fs::read(&second).expect("bytes"), "{}", preset.name());
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        fs::create_dir_all(to).expect("a folder");
        fs::copy(from, to.join(from.file_name().expect("a name"))).expect("a copy");
        return;
    }
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
}

/// What a comparison says is what the logits say, position by position; the certificate says the same of the same text.
#[test]
fn comparisons_and_certificates_agree_with_the_logits() {
    for name in ["tiny/smollm2", "tiny/qwen3", "gguf/llama2.gguf"] {
        let folder = tempfile::tempdir().expect("a folder");
        let (ours, exact) = (folder.path().join("n4.attar"), folder.path().join("f32.attar"));
        let certified = CompileOptions {
            certify: Certify::BuiltIn,
            certify_windows: 2,
            ..options(&data(name), Preset::N4, &ours)
        };
        let report = Session::new(certified).expect("options").run(&mut |_| ());
        let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
        let certificate = report.certificate.unwrap_or_else(|| panic!("{name}: {:?}", report.uncertified));
        compile(&data(name), Preset::F32, &exact);
        let (model, reference) = (open(&ours, 2), open(&exact, 1));
        let windows = Windows::new(&model, HELD_OUT_TEXT, certificate.context, Some(2)).expect("windows");
        windows.check_reference(&model, &reference, HELD_OUT_TEXT).expect("the same tokens");
        let compared =
            evaluate::compare(&[model.clone(), reference.clone()], &reference, &windows, |_, _| ())
                .expect("comparisons");
        let [compared, itself] = [&compared[0].quality, &compared[1].quality];
        assert_eq!(compared.rounded(), certificate.quality, "{name}");
        assert_eq!(itself.kld, 0.0, "{name}: the reference against itself");

        let bos = model.tokenizer().expect("a tokenizer").encode("", true).expect("ids").first().copied();
        let context = windows.context();
        let (mut kl, mut same, mut count) = (0.0, 0, 0);
        for window in windows.tokens().chunks(context).take(windows.count()) {
            let mut tokens = window.to_vec();
            tokens[0] = bos.unwrap_or(tokens[0]);
            let (a, b) =
                (all_logits(&model, &tokens, &[context]), all_logits(&reference, &tokens, &[context]));
            for (a, b) in a.iter().zip(&b).take(context - 1).skip(context / 2) {
                kl += divergence(b, a);
                same += usize::from(argmax(a) == argmax(b));
                count += 1;
            }
        }
        assert_eq!(count, compared.scores, "{name}");
        let mean = kl / count as f64;
        assert!(
            (mean - compared.kld).abs() < 1e-6 + 1e-4 * mean,
            "{name}: {mean}, compared {}",
            compared.kld
        );
        assert_eq!(same as f64 / count as f64, compared.top1, "{name}");
    }
}

/// The GGUF that the goldens were made from, or why it cannot be had.
fn smollm2_gguf() -> Result<PathBuf, String> {
    const NAME: &str = "smollm2-135m-q4_1";
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let find = || {
        let home = Home::from_env().map_err(|e| e.to_string())?;
        // The quickstart's copy will do, where it is the same file.
        for name in ["smollm2-135m", NAME] {
            if let Some((path, _)) =
                home.find(name).filter(|(p, _)| p.extension().is_some_and(|e| e == "gguf"))
            {
                return Ok(path);
            }
        }
        let pulled = attar_cli::commands::pull::pull(&home, NAME, false, Terminal { quiet: true });
        let (path, _) = pulled.map_err(|e| e.to_string())?;
        Ok(path)
    };
    FOUND.get_or_init(find).clone()
}

/// SmolLM2 compiled with a preset, once for all tests of this process; `None` (and a report) without the weights.
/// `tests` is how many checks are left out then.
fn smollm2(preset: Preset, tests: usize) -> Option<Model> {
    static COMPILED: Mutex<Vec<(Preset, Model)>> = Mutex::new(Vec::new());
    let checkpoint = match smollm2_gguf() {
        Ok(path) => path,
        Err(why) => {
            report(&format!("skipped: {tests} (no weights of SmolLM2: {why})"));
            return None;
        }
    };
    let mut compiled = COMPILED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, model)) = compiled.iter().find(|(p, _)| *p == preset) {
        return Some(model.clone());
    }
    let (_folder, model) = small_model(&checkpoint, preset);
    compiled.push((preset, model.clone()));
    Some(model)
}

fn smollm2_golden() -> Vec<Value> {
    let text = fs::read(data("golden/smollm2.json")).expect("the golden");
    serde_json::from_slice(&text).expect("JSON")
}

#[test]
fn smollm2_in_f32_agrees_with_transformers() {
    let golden = smollm2_golden();
    let Some(model) = smollm2(Preset::F32, golden.len()) else { return };
    let tokenizer = model.tokenizer().expect("a tokenizer");
    for case in &golden {
        let text = case["text"].as_str().expect("a text");
        let prompt = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, true).expect("ids"), prompt, "{text:?}");

        let mut session = model.session(&SessionOptions { context: Some(1024) }).expect("a session");
        session.append(&prompt).expect("logits");
        let top = top_logits(session.logits(), 10);
        for (i, ((id, logit), expected)) in top.iter().zip(case["top10"].as_array().expect("ten")).enumerate()
        {
            let expected_logit = expected[1].as_f64().expect("a logit");
            let error = (f64::from(*logit) - expected_logit).abs();
            assert!(error < SMOLLM2_TOLERANCE, "{text:?}: place {i} is {logit}, expected {expected_logit}");
            let of_expected = session.logits()[expected[0].as_u64().expect("an id") as usize];
            // Ids may trade places only where their logits cannot be told apart.
            let near = (f64::from(of_expected) - f64::from(*logit)).abs() < 2.0 * SMOLLM2_TOLERANCE;
            assert!(
                Some(u64::from(*id)) == expected[0].as_u64() || near,
                "{text:?}: place {i} is token {id}"
            );
        }
        let expected = ids(&case["greedy"]);
        assert_eq!(greedy(&model, &prompt, expected.len(), false), expected, "{text:?}");
    }
}

#[test]
fn smollm2_compressed_drifts_as_far_as_its_bits_allow() {
    let golden = smollm2_golden();
    // Largest mean KL divergence over the prompts' positions that still counts as the same model, from the measured
    // one with a factor of about three to spare.
    for (preset, most) in [(Preset::BF16, 0.0004), (Preset::W8, 0.025), (Preset::N4, 1.0)] {
        let Some(reference) = smollm2(Preset::F32, 1) else { continue };
        let Some(model) = smollm2(preset, 1) else { continue };
        let (mut kl, mut same, mut count) = (0.0, 0, 0);
        for case in &golden {
            let prompt = ids(&case["ids"]);
            let ours = all_logits(&model, &prompt, &[prompt.len()]);
            for (a, b) in all_logits(&reference, &prompt, &[prompt.len()]).iter().zip(&ours) {
                kl += divergence(a, b);
                same += usize::from(argmax(a) == argmax(b));
                count += 1;
            }
        }
        let (kl, agreement) = (kl / f64::from(count), same as f64 / f64::from(count));
        let name = preset.name();
        report(&format!(
            "smollm2 {name}: KL divergence {kl:.5}, top-1 agreement {agreement:.3} on {count} positions"
        ));
        assert!(kl < most, "{name}: KL divergence {kl}");
    }
}

/// KL divergence of two distributions given by logits, in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |l: &[f32]| {
        let top = l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(top) + l.iter().map(|v| f64::from(v - top).exp()).sum::<f64>().ln()
    };
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    p.iter()
        .zip(q)
        .map(|(p, q)| {
            let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
            p.exp() * (p - q)
        })
        .sum()
}

/// The validation text the golden perplexity was measured on.
fn wikitext(sha256: &str) -> Result<String, String> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/wikitext2-valid.tokens.txt");
    let path = std::env::var_os("ATTAR_WIKITEXT").map_or(beside, PathBuf::from);
    let (_, found) = hash_file(&path).map_err(|e| e.to_string())?;
    if found != sha256 {
        return Err(format!("{} is another text", path.display()));
    }
    fs::read_to_string(&path).map_err(|e| e.to_string())
}

#[test]
fn smollm2_perplexity_agrees_with_llama_cpp() {
    let golden: Value =
        serde_json::from_slice(&fs::read(data("golden/smollm2_perplexity.json")).expect("the golden"))
            .expect("JSON");
    let text = match wikitext(golden["text"]["sha256"].as_str().expect("a hash")) {
        Ok(text) => text,
        Err(why) => {
            return report(&format!("skipped: 1 (no WikiText-2 validation text; set ATTAR_WIKITEXT: {why})"));
        }
    };
    let Some(model) = smollm2(Preset::F32, 1) else { return };
    const WINDOWS: usize = 2;
    let windows = Windows::new(&model, &text, 512, Some(WINDOWS)).expect("windows");
    let tokens: Vec<u8> = windows.tokens().iter().flat_map(|t| t.to_le_bytes()).collect();
    assert_eq!(Some(windows.tokens().len() as u64), golden["tokens"]["count"].as_u64());
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), tokens).expect("bytes");
    let (_, hash) = hash_file(file.path()).expect("a hash");
    assert_eq!(Some(hash.as_str()), golden["tokens"]["sha256_u32le"].as_str(), "the text's tokens");

    let result = evaluate::perplexity(&model, &windows, |_, _| ()).expect("a perplexity");
    let expected = golden["ppl"][WINDOWS.to_string()].as_f64().expect("a value");
    let ratio = result.perplexity / expected;
    report(&format!("smollm2 f32: perplexity {:.4}, llama.cpp {expected:.4}", result.perplexity));
    assert!((ratio - 1.0).abs() < 0.005, "perplexity {} against {expected}", result.perplexity);
}
