//! The commands through the built binary: shapes of `--json`, exit codes, and what messages say.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny").join(name)
}

fn attar(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_attar")).args(arguments).output().expect("attar starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output of a command that must succeed.
fn text(arguments: &[&str]) -> String {
    let output = attar(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn json(arguments: &[&str]) -> Value {
    let text = text(arguments);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
}

/// Runs a command that must fail, and returns its message.
fn failure(code: i32, arguments: &[&str]) -> String {
    let output = attar(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// A compiled tiny model with a chat template.
struct Compiled {
    folder: TempDir,
    artifact: String,
    report: Value,
}

fn compiled(quantize: &str) -> Compiled {
    let folder = tempfile::tempdir().expect("a folder");
    let artifact = utf8(&folder.path().join("tiny.attar")).to_owned();
    let model = tiny("smollm2");
    // A few windows are enough for a model this small.
    let few = ["--calibration-windows", "4"];
    let compile = ["compile", utf8(&model), "--quantize", quantize, "-o", &artifact, "--json"];
    let report = json(&[&compile[..], &few].concat());
    Compiled { folder, artifact, report }
}

fn copy_of(name: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(tiny(name)).expect("a checkpoint").flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    folder
}

#[test]
fn compile_reports_phases_formats_and_sections() {
    let c = compiled("n4");
    assert_eq!(c.report["artifact"], Value::from(c.artifact.as_str()));
    assert_eq!(c.report["artifact_bytes"], fs::metadata(&c.artifact).expect("the artifact").len());
    let phases: Vec<&str> =
        c.report["phases"].as_array().expect("phases").iter().filter_map(|p| p["phase"].as_str()).collect();
    assert_eq!(phases, ["import", "canonicalize", "compress", "fuse", "lower", "emit", "package", "certify"]);
    let formats: Vec<&str> = c.report["formats"]
        .as_array()
        .expect("formats")
        .iter()
        .filter_map(|f| f["format"].as_str())
        .collect();
    assert!(formats.contains(&"n4") && formats.contains(&"w8"), "{formats:?}");
    assert!(c.report["model"]["parameters"].as_u64().expect("a count") > 0);
}

#[test]
fn compile_stops_dumps_and_emits() {
    let folder = tempfile::tempdir().expect("a folder");
    let ir = folder.path().join("ir");
    let model = tiny("llama2");
    let base = ["compile", utf8(&model), "--quantize", "w8"];
    let report = json(&[&base[..], &["--stop-after", "fuse", "--emit-ir", utf8(&ir), "--json"]].concat());
    assert_eq!(report["artifact"], Value::Null);
    assert_eq!(report["stopped_after"], "fuse");
    let dumps = fs::read_dir(&ir).expect("dumps").count();
    assert!(dumps > 5, "{dumps} dumps");
    let printed = text(&[&base[..], &["--stop-after", "fuse-qkv", "--print-after", "fuse-qkv"]].concat());
    assert!(printed.contains("; after fuse-qkv\nfunc @"), "{printed}");
    let none = json(&[&base[..], &["--stop-after", "fuse", "--fuel", "0", "--json"]].concat());
    let rewrites: u64 =
        none["passes"].as_array().expect("passes").iter().filter_map(|p| p["rewrites"].as_u64()).sum();
    assert_eq!(rewrites, 0);
}

#[test]
fn run_prints_what_programs_ask_for() {
    let c = compiled("f32");
    let r = json(&[
        "run",
        &c.artifact,
        "--prompt",
        "the other",
        "--max-tokens",
        "5",
        "--top-logits",
        "3",
        "--ignore-eos",
        "--json",
    ]);
    assert!(!r["prompt_tokens"].as_array().expect("ids").is_empty());
    assert_eq!(r["tokens"].as_array().expect("ids").len(), 5);
    assert_eq!(r["finish"], "length");
    let top = r["top_logits"].as_array().expect("pairs");
    assert_eq!(top.len(), 3);
    assert_eq!(top[0][0], r["tokens"][0], "greedy takes the largest logit");
    assert!(top[0][1].as_f64() >= top[1][1].as_f64());
    assert!(r["timings"]["prompt_seconds"].as_f64().expect("seconds") > 0.0);
    assert!(r["text"].is_string());

    let prompt = c.folder.path().join("prompt.txt");
    fs::write(&prompt, "the other").expect("a file");
    let from_file = json(&[
        "run",
        &c.artifact,
        "--prompt-file",
        utf8(&prompt),
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--json",
    ]);
    assert_eq!(from_file["tokens"], r["tokens"]);
    let sampled = |seed: &str| {
        json(&[
            "run",
            &c.artifact,
            "--prompt",
            "a",
            "--temperature",
            "2",
            "--seed",
            seed,
            "--max-tokens",
            "12",
            "--ignore-eos",
            "--json",
        ])["tokens"]
            .clone()
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn run_renders_chats() {
    let c = compiled("f32");
    let golden: Value =
        serde_json::from_slice(&fs::read(tiny("smollm2").join("golden.json")).expect("a golden"))
            .expect("JSON");
    let file = c.folder.path().join("chat.json");
    fs::write(&file, golden["chat"]["messages"].to_string()).expect("a file");
    let r = json(&["run", &c.artifact, "--chat-json", utf8(&file), "--max-tokens", "1", "--json"]);
    assert_eq!(r["prompt_tokens"], golden["chat"]["ids"]);
    fs::write(&file, "{\"role\": \"user\"}").expect("a file");
    assert!(failure(2, &["run", &c.artifact, "--chat-json", utf8(&file)]).contains("JSON list"));
}

#[test]
fn inspect_shows_what_is_inside_and_verifies() {
    let c = compiled("n4");
    let r = json(&["inspect", &c.artifact, "--verify", "--json"]);
    assert_eq!(r["verified"], true);
    assert_eq!(r["hash"], c.report["artifact_hash"]);
    assert_eq!(r["code"][0]["target"], r["chosen_target"]);
    assert!(r["graph"]["ops"]["attention"].as_u64().expect("a count") > 0);
    assert!(r["recipe"].as_str().expect("a recipe").contains("quantize-rtn"));
    assert_eq!(
        r["tensors"].as_array().expect("tensors").len(),
        c.report["tensors"].as_array().expect("tensors").len()
    );
    let shown = text(&["inspect", &c.artifact, "--tensors"]);
    assert!(
        shown.contains("chosen here") && shown.contains("SECTION") && shown.contains("TENSOR"),
        "{shown}"
    );
}

#[test]
fn eval_follows_the_protocol() {
    let c = compiled("f32");
    let file = c.folder.path().join("text.txt");
    fs::write(&file, "the other there then here ".repeat(20)).expect("a file");
    let base = ["eval", &c.artifact, "--text", utf8(&file), "--context", "32", "--json"];
    let r = json(&[&base[..], &["--windows", "3"]].concat());
    assert_eq!((r["windows"].as_u64(), r["scores"].as_u64()), (Some(3), Some(3 * 15)));
    let means = r["window_mean_nll"].as_array().expect("means");
    let mean = means.iter().filter_map(Value::as_f64).sum::<f64>() / 3.0;
    assert!((mean.exp() / r["perplexity"].as_f64().expect("a perplexity") - 1.0).abs() < 1e-9);
    let long = failure(2, &["eval", &c.artifact, "--text", utf8(&file), "--context", "256"]);
    assert!(long.contains("a window alone takes 256"), "{long}");
}

#[test]
fn eval_against_a_reference_measures_what_was_lost() {
    let (c, reference) = (compiled("n4"), compiled("f32"));
    let file = c.folder.path().join("text.txt");
    fs::write(&file, "the other there then here ".repeat(20)).expect("a file");
    let base = ["eval", &c.artifact, "--text", utf8(&file), "--context", "32"];
    let against = [&base[..], &["--against", &reference.artifact, "--windows", "3"]].concat();
    let r = json(&[&against[..], &["--json"]].concat());
    assert_eq!((r["windows"].as_u64(), r["scores"].as_u64()), (Some(3), Some(3 * 15)));
    let number = |name: &str| r[name].as_f64().unwrap_or_else(|| panic!("no {name}"));
    assert!(number("kld") > 0.0 && number("kld_max") >= number("kld_p99"));
    assert!((number("ln_ppl_ratio").exp() / number("ppl_ratio") - 1.0).abs() < 1e-9);
    assert!((number("ppl") / number("ppl_reference") / number("ppl_ratio") - 1.0).abs() < 1e-9);
    assert_eq!(r["reference"]["file"], Value::from(reference.artifact.as_str()));
    // Both figures agree with those of either model alone.
    let alone = |file: &str| {
        let r = json(&["eval", file, "--text", base[3], "--context", "32", "--windows", "3", "--json"]);
        r["perplexity"].as_f64().expect("a perplexity")
    };
    assert!((alone(&c.artifact) / number("ppl") - 1.0).abs() < 1e-6);
    assert!((alone(&reference.artifact) / number("ppl_reference") - 1.0).abs() < 1e-6);
    let shown = text(&against);
    assert!(shown.contains("KLD, 99.9 %") && shown.contains("same top token"), "{shown}");

    // Beside others a model scores what it scores alone.
    let several = ["eval", &reference.artifact, &c.artifact, &reference.artifact];
    let several = [&several[..], &against[2..]].concat();
    let all = json(&[&several[..], &["--json"]].concat());
    assert_eq!(all.as_array().map(Vec::len), Some(3));
    assert_eq!((all[0]["kld"].as_f64(), all[2]["kld"].as_f64()), (Some(0.0), Some(0.0)));
    assert_eq!((&all[1]["kld"], &all[1]["ppl"]), (&r["kld"], &r["ppl"]));
    assert_eq!(all[1]["file"], Value::from(c.artifact.as_str()));
    assert_eq!(all[1]["bytes"].as_u64(), fs::metadata(&c.artifact).ok().map(|m| m.len()));
    let shown = text(&several);
    assert!(shown.contains("KLD 99 %") && shown.lines().count() == 4, "{shown}");
    let nothing = failure(2, &["eval", &c.artifact, &reference.artifact, "--text", base[3]]);
    assert!(nothing.contains("add --against"), "{nothing}");

    let itself = [&base[..], &["--against", &c.artifact, "--json"]].concat();
    let r = json(&itself);
    assert_eq!((r["kld"].as_f64(), r["top1"].as_f64()), (Some(0.0), Some(1.0)));
}

#[test]
fn eval_refuses_models_that_read_other_tokens() {
    let c = compiled("n4");
    let other = utf8(&c.folder.path().join("other.attar")).to_owned();
    let file = c.folder.path().join("text.txt");
    fs::write(&file, "the other there then here ".repeat(20)).expect("a file");
    text(&["compile", utf8(&tiny("llama2")), "--quantize", "w8", "--no-certify", "-o", &other]);
    let arguments = [
        "eval",
        &c.artifact,
        "--against",
        &other,
        "--text",
        utf8(&file),
        "--context",
        "32",
        "--windows",
        "2",
    ];
    let said = failure(2, &arguments);
    assert!(said.contains("--against") && said.contains("same tokenizer"), "{said}");
    let absent = failure(2, &["eval", &c.artifact, "--against", "absent.attar", "--text", utf8(&file)]);
    assert!(absent.contains("absent.attar"), "{absent}");
}

#[test]
fn certificates_are_shown_and_required() {
    let c = compiled("n4");
    let certificate = &c.report["certificate"];
    let kld = certificate["quality"]["kld"].as_f64().expect("a divergence");
    assert!(kld > 0.0 && c.report["uncertified"].is_null());
    let inspected = json(&["inspect", &c.artifact, "--json"]);
    assert_eq!(&inspected["certificate"], certificate);
    let shown = text(&["inspect", &c.artifact]);
    assert!(shown.contains("certificate: measured with") && shown.contains("KLD, mean"), "{shown}");

    let run = |require: &str| -> Vec<String> {
        ["run", &c.artifact, "--prompt", "the other", "--max-tokens", "1", "--require", require]
            .map(str::to_owned)
            .to_vec()
    };
    let borrowed =
        |arguments: &[String]| -> Output { attar(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) };
    assert!(borrowed(&run(&format!("kld<={kld},top1>=1%"))).status.success());
    let refused = borrowed(&run("top1>=1%,kld<1e-9"));
    assert_eq!(refused.status.code(), Some(2));
    let said = stderr(&refused);
    for part in ["--require", "kld<0.000000001", &format!("says kld {kld}"), "require less"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let nonsense = stderr(&borrowed(&run("klb<=1")));
    assert!(nonsense.contains("--require") && nonsense.contains("known: kld"), "{nonsense}");
    for command in [["bench", "--prompt=4"], ["eval", "--text=absent"]] {
        let said = failure(2, &[command[0], &c.artifact, command[1], "--require", "kld<0"]);
        assert!(said.contains("kld<0 is required") || command[0] == "eval", "{said}");
    }

    let bare = utf8(&c.folder.path().join("bare.attar")).to_owned();
    let checkpoint = tiny("smollm2");
    let base = ["compile", utf8(&checkpoint), "--quantize", "n4", "-o", &bare];
    let made = text(&[&base[..], &["--no-certify"]].concat());
    assert!(made.contains("no certificate: none was asked for"), "{made}");
    assert!(text(&["inspect", &bare]).contains("no certificate: none was asked for"));
    let said = failure(2, &["run", &bare, "--prompt", "x", "--require", "kld<=1"]);
    assert!(said.contains("--require") && said.contains("no certificate (none was asked for)"), "{said}");

    let file = c.folder.path().join("mine.txt");
    fs::write(&file, "the other there then here ".repeat(60)).expect("a file");
    let own = [&base[..], &["--certify", utf8(&file), "--certify-windows", "1", "--json"]].concat();
    let r = json(&own);
    assert_eq!(r["certificate"]["text"]["name"], "mine.txt");
    assert_eq!(r["certificate"]["windows"], 1);
    fs::write(&file, "short").expect("a file");
    let said = failure(2, &[&base[..], &["--certify", utf8(&file)]].concat());
    assert!(said.contains("mine.txt") && said.contains("a window alone takes"), "{said}");
    fs::write(&file, [0xff, 0xfe]).expect("a file");
    assert!(failure(2, &[&base[..], &["--certify", utf8(&file)]].concat()).contains("not UTF-8"));
}

#[test]
fn diff_puts_two_artifacts_side_by_side() {
    let (a, b) = (compiled("n4"), compiled("w8"));
    let r = json(&["diff", &a.artifact, &b.artifact, "--json"]);
    assert_eq!(r["a"]["bytes"], fs::metadata(&a.artifact).expect("a file").len());
    assert_eq!(r["b"]["certificate"], b.report["certificate"]);
    assert!(r["a"]["bits_per_weight"].as_f64() < r["b"]["bits_per_weight"].as_f64());
    assert_eq!(r["same_content"], false);
    let tensors = r["tensors"].as_array().expect("tensors");
    assert_eq!(tensors.len(), a.report["tensors"].as_array().expect("tensors").len());
    assert!(tensors.iter().any(|t| t["a"]["format"] == "n4" && t["b"]["format"] == "w8"));
    let shown = text(&["diff", &a.artifact, &b.artifact]);
    for part in ["bits per weight", "CERTIFICATE", "KLD, mean", "TENSOR", "error 0.", "same format and size"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let same = text(&["diff", &a.artifact, &a.artifact]);
    assert!(same.contains("equal, byte by byte") && !same.contains("TENSOR"), "{same}");
    assert!(failure(2, &["diff", &a.artifact, "absent.attar"]).contains("absent.attar"));
}

#[test]
fn bench_measures_each_thread_count() {
    let c = compiled("n4");
    let r = json(&[
        "bench",
        &c.artifact,
        "--threads",
        "1,2",
        "--prompt",
        "16",
        "--generate",
        "4",
        "--repetitions",
        "3",
        "--json",
    ]);
    let tests = r["tests"].as_array().expect("tests");
    let named: Vec<(Option<&str>, Option<u64>)> =
        tests.iter().map(|t| (t["test"].as_str(), t["threads"].as_u64())).collect();
    let expected = [("pp16", 1), ("tg4", 1), ("pp16", 2), ("tg4", 2)].map(|(t, n)| (Some(t), Some(n)));
    assert_eq!(named, expected);
    for t in tests {
        assert_eq!(t["samples"].as_array().expect("samples").len(), 3);
        assert!(t["tokens_per_second"].as_f64().expect("a rate") > 0.0);
    }
}

/// Weights, cache and activations of these small models are all but nothing: what is left is the program itself.
const BESIDES_THE_MODEL: u64 = 15_000_000;

#[test]
fn bench_reports_contexts_batches_opening_and_memory() {
    let c = compiled("n4");
    let mut args =
        vec!["bench", &c.artifact, "--threads", "2", "--prompt", "0", "--gen", "4", "--repeat", "2"];
    args.extend(["--context", "20", "--batch", "3", "--json"]);
    let r = json(&args);
    let tests = r["tests"].as_array().expect("tests");
    let named: Vec<(&str, u64, u64)> = tests
        .iter()
        .map(|t| {
            let number = |f: &str| t[f].as_u64().expect("a number");
            (t["test"].as_str().expect("a name"), number("context"), number("batch"))
        })
        .collect();
    assert_eq!(named, [("tg4@20", 20, 1), ("tg4@20x3", 20, 3)]);
    for t in tests {
        let (rate, step) =
            (t["tokens_per_second"].as_f64().expect("a rate"), t["step_ms"].as_f64().expect("ms"));
        let batch = t["batch"].as_f64().expect("a number");
        assert!((rate * step / 1e3 / batch - 1.0).abs() < 1e-9, "{t}");
    }
    assert!(r["open_ms"].as_f64().expect("ms") >= r["open_phases_ms"]["file"].as_f64().expect("ms"));
    if cfg!(target_os = "linux") {
        let memory = &r["memory"];
        let resident = memory["after_tests"].as_u64().expect("bytes");
        let weights = memory["weights"].as_u64().expect("bytes");
        assert!(resident > weights && resident <= weights + BESIDES_THE_MODEL, "{memory}");
    }
}

#[test]
fn bench_profiles_launch_by_launch() {
    let c = compiled("n4");
    let mut args = vec!["bench", &c.artifact, "--threads", "2", "--prompt", "24", "--repetitions", "3"];
    args.extend(["--profile", "--json"]);
    let r = json(&args);
    let profiles = r["profiles"].as_array().expect("profiles");
    let programs: Vec<_> = profiles.iter().map(|p| (p["program"].as_str(), p["tokens"].as_u64())).collect();
    let expected = [("decode", 1), ("small_batch", 4), ("prefill", 24)].map(|(p, n)| (Some(p), Some(n)));
    assert_eq!(programs, expected);
    for p in profiles {
        let groups = p["groups"].as_array().expect("groups");
        let shares: f64 = groups.iter().map(|g| g["share"].as_f64().expect("a share")).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{p}");
        let swiglu = groups.iter().find(|g| g["what"].as_str().is_some_and(|w| w.contains("gate_up")));
        let swiglu = swiglu.expect("gate and up");
        assert!(swiglu["gop_per_second"].as_f64().expect("a rate") > 0.0 && swiglu["weight_bytes"] != 0);
        assert!(groups.iter().any(|g| g["gop_per_second"].is_null()), "{p}");
    }
}

/// Only where the process may use one core, there is one thread.
#[test]
#[cfg(target_os = "linux")]
fn bench_takes_as_many_threads_as_the_process_may_use() {
    let c = compiled("n4");
    let bench =
        [env!("CARGO_BIN_EXE_attar"), "bench", &c.artifact, "--prompt", "0", "--generate", "2", "--json"];
    let Ok(out) = std::process::Command::new("taskset").args(["-c", "0"]).args(bench).output() else {
        return;
    };
    let r: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(r["tests"][0]["threads"], 1);
}

#[test]
fn passes_doctor_and_completions_answer() {
    let passes = json(&["passes", "--json"]);
    let rtn = passes
        .as_array()
        .expect("passes")
        .iter()
        .find(|p| p["name"] == "quantize-rtn")
        .expect("quantize-rtn");
    assert!(
        rtn["options"]
            .as_array()
            .expect("options")
            .iter()
            .any(|o| o["name"] == "format" && o["enum"].is_array())
    );
    assert!(text(&["passes", "quantize-rtn"]).contains("format"));
    assert!(failure(2, &["passes", "quantise-rtn"]).contains("quantize-rtn"), "the nearest name is told");

    let doctor = json(&["doctor", "--json"]);
    assert!(doctor["threads"].as_u64().expect("a count") > 0);
    let targets = doctor["targets"].as_array().expect("targets");
    assert_eq!(targets.len(), attar_compiler::Target::ALL.len());
    assert!(text(&["completions", "bash"]).contains("quickstart"));
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_said() {
    let out = tempfile::tempdir().expect("a folder");
    let artifact = out.path().join("x.attar");
    let compile =
        |model: &Path| failure(2, &["compile", utf8(model), "--quantize", "f32", "-o", utf8(&artifact)]);

    let unknown = copy_of("llama2");
    let config = fs::read_to_string(unknown.path().join("config.json")).expect("a config");
    let changed = config.replace("LlamaForCausalLM", "MambaForCausalLM").replace("\"llama\"", "\"mamba\"");
    fs::write(unknown.path().join("config.json"), changed).expect("a file");
    let said = compile(unknown.path());
    assert!(said.contains("mamba") && said.contains("qwen3"), "the supported ones are listed: {said}");

    let missing = copy_of("llama2-sharded");
    fs::remove_file(missing.path().join("model-00002-of-00003.safetensors")).expect("a shard");
    assert!(compile(missing.path()).contains("model-00002-of-00003.safetensors"));

    let truncated = copy_of("llama2");
    let weights = truncated.path().join("model.safetensors");
    let bytes = fs::read(&weights).expect("weights");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("a file");
    assert!(compile(truncated.path()).contains("model.safetensors"));
    assert!(!artifact.exists(), "a failed compile leaves nothing");

    let nothing = failure(2, &["compile", "no-such-model", "--quantize", "f32", "-o", utf8(&artifact)]);
    assert!(nothing.contains("no such file or folder"), "{nothing}");
    let target = failure(
        2,
        &["compile", utf8(&tiny("llama2")), "--quantize", "f32", "--target", "z80", "-o", utf8(&artifact)],
    );
    assert!(target.contains("z80") && target.contains("x86-64-v3"), "{target}");
}

#[test]
fn a_recipe_is_checked_with_the_nearest_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let recipe = folder.path().join("recipe.toml");
    let model = tiny("llama2");
    let compile = |text: &str| {
        fs::write(&recipe, text).expect("a file");
        failure(2, &["compile", utf8(&model), "--recipe", utf8(&recipe), "--stop-after", "compress"])
    };
    let said = compile("[[pass]]\nname = \"quantize-rtm\"\nformat = \"n4\"\n");
    assert!(said.contains("quantize-rtn") && said.contains("recipe.toml"), "{said}");
    let said =
        compile("[[pass]]\nname = \"quantize-rtn\"\ntensors = [\"model.layerz.*\"]\nformat = \"n4\"\n");
    assert!(said.contains("matches no weight"), "{said}");
}

#[test]
fn what_is_wrong_with_an_artifact_is_said() {
    let c = compiled("w8");
    let bytes = fs::read(&c.artifact).expect("the artifact");
    let damaged = c.folder.path().join("damaged.attar");
    let open = |bytes: &[u8], verify: bool| {
        fs::write(&damaged, bytes).expect("a file");
        let arguments = ["inspect", utf8(&damaged), "--verify"];
        failure(2, if verify { &arguments } else { &arguments[..2] })
    };
    assert!(open(b"hello", false).contains("not an attar artifact"));
    assert!(open(&bytes[..bytes.len() - 1], false).contains("truncated"));
    let mut flipped = bytes.clone();
    // The first byte of the weights section, which an ordinary open does not read.
    flipped[4096] ^= 1;
    let said = open(&flipped, true);
    assert!(said.contains("weights") && said.contains("damaged"), "{said}");
    assert!(failure(2, &["run", "absent.attar", "--prompt", "x"]).contains("absent.attar"));
    assert!(failure(2, &["run", &c.artifact, "--prompt", "x", "--threads", "0"]).contains("threads"));
    let long = "the other ".repeat(200);
    let said = failure(2, &["run", &c.artifact, "--prompt", &long]);
    assert!(said.contains("context"), "{said}");
}

#[test]
fn chat_answers_each_line() {
    use std::io::Write;
    let c = compiled("f32");
    let mut child = Command::new(env!("CARGO_BIN_EXE_attar"))
        .args(["chat", &c.artifact, "--temperature", "0", "--max-tokens", "3"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("attar starts");
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(b"hello\n/nonsense\n/reset\nhello\n/exit\nlost\n")
        .expect("input");
    let output = child.wait_with_output().expect("an end");
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert_eq!(said.matches("prompt tokens").count(), 2, "{said}");
    assert!(said.contains("/nonsense: unknown") && said.contains("forgotten"), "{said}");
    let answers = String::from_utf8_lossy(&output.stdout).into_owned();
    let (first, second) = answers.split_at(answers.len() / 2);
    assert_eq!(first, second, "after /reset the same question has the same answer");
}

#[test]
fn a_plan_foretells_the_size_of_the_artifact() {
    let home = tempfile::tempdir().expect("a folder");
    let model = tiny("smollm2");
    let plan = |more: &[&str]| {
        let arguments = [
            &["plan", utf8(&model), "--formats", "n4,w8", "--prompt", "16", "--generate", "8"][..],
            &["--repetitions", "1", "--json"],
            more,
        ];
        let run = Command::new(env!("CARGO_BIN_EXE_attar"))
            .args(arguments.concat())
            .env("ATTAR_HOME", home.path())
            .output()
            .expect("attar starts");
        assert!(run.status.success(), "{}", stderr(&run));
        serde_json::from_slice::<Value>(&run.stdout).expect("JSON")
    };
    let r = plan(&["--price", "3.6", "--watts", "50"]);
    for (i, format) in ["n4", "w8"].into_iter().enumerate() {
        let row = &r["plans"][i];
        assert_eq!(row["formats"], format);
        let made = compiled(format);
        let mut weights = made.report["sections"].as_array().expect("sections").iter();
        let weights = weights.find(|s| s["name"] == "weights").map(|s| s["bytes"].clone());
        assert_eq!(Some(row["weight_bytes"].clone()), weights);
        // The certificate and the names of inputs are not foretold: some kilobytes, which count in so small a model.
        let (planned, is) = (row["file_bytes"].as_f64(), made.report["artifact_bytes"].as_f64());
        let (planned, is) = (planned.expect("a number"), is.expect("a number"));
        assert!((planned - is).abs() < 40_000.0, "{format}: planned {planned}, is {is}");
        let speed = row["tokens_per_second"].as_f64().expect("a number");
        let cost = row["cost"]["generated"].as_f64().expect("a number");
        assert!((cost * speed / 1e3 - 1.0).abs() < 1e-6, "{cost} at {speed}");
        assert!(row["energy"]["generated_grams_co2"].as_f64() > Some(0.0));
    }
    // The second time nothing is measured.
    assert_eq!(plan(&[])["plans"][0]["tokens_per_second"], r["plans"][0]["tokens_per_second"]);
    let described = plan(&["--machine", "read=1,int8=1,f32=1"]);
    assert!(described["plans"][0]["tokens_per_second"] != r["plans"][0]["tokens_per_second"]);

    let said = failure(2, &["plan", utf8(&model), "--formats", "n4,q4_k"]);
    assert!(said.contains("q4_k") && said.contains("n4"), "{said}");
    let said = failure(2, &["plan", utf8(&model), "--context", "999999"]);
    assert!(said.contains("--context 999999"), "{said}");
}

#[test]
fn a_page_shows_several_artifacts_and_needs_nothing_else() {
    let (a, b) = (compiled("n4"), compiled("w8"));
    let other = b.folder.path().join("other <w8>.attar");
    fs::rename(&b.artifact, &other).expect("renamed");
    let page = a.folder.path().join("page.html");
    text(&["inspect", &a.artifact, utf8(&other), "--speed", "--html", utf8(&page)]);
    let html = fs::read_to_string(&page).expect("a page");
    for part in [
        "tiny.attar",
        "other &lt;w8&gt;.attar",
        "<svg",
        "<polyline",
        "layer 1",
        "relative error",
        "the faster",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // No script, and nothing is fetched.
    for part in ["<script", "http:", "https:", "@import", "<link"] {
        assert!(!html.contains(part), "{part}");
    }
    assert!(failure(2, &["inspect", &a.artifact, "--speed"]).contains("--html"));
    let nowhere = a.folder.path().join("no/page.html");
    assert!(failure(3, &["inspect", &a.artifact, "--html", utf8(&nowhere)]).contains("page.html"));
}

#[test]
fn an_artifact_is_made_again_byte_by_byte() {
    let c = compiled("n4");
    let model = tiny("smollm2");
    for threads in ["1", "2"] {
        let said = text(&["compile", utf8(&model), "--from", &c.artifact, "--check", "--threads", threads]);
        assert!(said.contains("byte by byte"), "{said}");
    }
    let again = utf8(&c.folder.path().join("again.attar")).to_owned();
    text(&["compile", utf8(&model), "--from", &c.artifact, "-o", &again]);
    assert_eq!(fs::read(&again).expect("a file"), fs::read(&c.artifact).expect("a file"));

    let other = tiny("llama2");
    let said = failure(2, &["compile", utf8(&other), "--from", &c.artifact, "--check"]);
    assert!(said.contains("--check") && said.contains("another file"), "{said}");
    let said = failure(2, &["compile", utf8(&model), "--from", &c.artifact, "--check", "--kv", "f32"]);
    assert!(said.contains("--kv"), "{said}");
}

#[test]
fn statistics_are_made_once_and_used_by_compiles() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| utf8(&folder.path().join(name)).to_owned();
    let (statistics, artifact, model) = (at("statistics"), at("model.attar"), tiny("smollm2"));
    let made = json(&["calibrate", utf8(&model), "--calibration-windows", "4", "-o", &statistics, "--json"]);
    assert_eq!((&made["windows"], &made["inputs"]), (&Value::from(4), &Value::from(9)));

    let compile = ["compile", utf8(&model), "--quantize", "n4", "--no-certify", "-o", &artifact, "--json"];
    let metrics = |extra: &[&str]| {
        let report = json(&[&compile[..], extra].concat());
        report["metrics"].as_array().expect("metrics").clone()
    };
    let solved = |m: &Value| m["values"].get("relative_output_error").is_some();
    assert_eq!(metrics(&["--calibration", &statistics]).iter().filter(|m| solved(m)).count(), 14);
    assert_eq!(metrics(&["--calibrate", "none"]).iter().filter(|m| solved(m)).count(), 0);

    let other = failure(
        2,
        &["compile", utf8(&tiny("qwen3")), "--quantize", "n4", "--calibration", &statistics, "-o", &artifact],
    );
    assert!(other.contains("another model"), "{other}");
    let both = failure(2, &[&compile[..], &["--calibration", &statistics, "--calibrate", "none"]].concat());
    assert!(both.contains("cannot be used with"), "{both}");
}
