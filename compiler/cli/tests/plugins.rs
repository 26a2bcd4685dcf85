//! Plugins through the command: those of this repository, one in C, one of another compiler, one that panics, and a built-in
//! pass as a library.

mod building;

use attar_artifact::manifest::SectionKind;
use attar_artifact::{Artifact, Verify};
use building::{
    attar, failure, has, plugin_in, root, skipped, stderr, test_in, text, tiny, utf8, workspace_plugin,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Options of a quick compile.
const QUICK: [&str; 6] =
    ["--calibration-windows", "2", "--calibration-context", "64", "--certify-windows", "1"];

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn compile(folder: &Path, library: &Path, pass: &str, extra: &[&str]) -> Value {
    let model = tiny("smollm2");
    let base =
        ["compile", utf8(&model), "--plugin", utf8(library), "--pass", pass, "-o", "m.attar", "--json"];
    let out = text(folder, &[&base[..], &QUICK, extra].concat());
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

fn open(path: PathBuf) -> Artifact {
    Artifact::open(&path, Verify::Full).expect("an artifact")
}

/// Metrics of a pass with a value of that name.
fn metrics(report: &Value, pass: &str, name: &str) -> Vec<Value> {
    let all = report["metrics"].as_array().expect("metrics");
    let of = all.iter().filter(|m| m["pass"] == pass && !m["values"][name].is_null());
    of.map(|m| m["values"][name].clone()).collect()
}

#[test]
fn a_pruned_model_says_by_whom_and_can_be_made_again() {
    let folder = folder();
    let library = workspace_plugin("attar-example-prune-nm");
    let report =
        compile(folder.path(), &library, "prune-nm=n:2,m:4,tensors:model.layers.*", &["--quantize", "w8"]);
    let zeros = metrics(&report, "prune-nm", "zeros");
    assert_eq!((zeros.len(), zeros.iter().all(|z| z == 0.5)), (14, true), "{zeros:?}");
    // What it measured is in the certificate.
    let certified = report["certificate"]["reported"].as_array().expect("records");
    assert_eq!(certified.len(), 14);
    let hash = text(folder.path(), &["plugin", "hash", utf8(&library)]);
    let recipe =
        open(folder.path().join("m.attar")).text(&SectionKind::Recipe).expect("readable").expect("there");
    assert!(recipe.contains(&format!("blake3 = \"{}\"", hash.trim())), "{recipe}");
    assert!(recipe.contains("name = \"prune-nm\"") && recipe.contains("weigh = true"), "{recipe}");
    let model = tiny("smollm2");
    let again = ["compile", utf8(&model), "--from", "m.attar", "--check"];
    assert!(failure(folder.path(), 2, &again).contains("give that with --plugin"));
    let again = text(folder.path(), &[&again[..], &["--plugin", utf8(&library)]].concat());
    assert!(again.contains("byte by byte"), "{again}");
    // Every group of four has two zeros.
    let said = failure(
        folder.path(),
        2,
        &["compile", utf8(&model), "--plugin", utf8(&library), "--pass", "prune-nm=n:5", "-o", "x.attar"],
    );
    assert!(said.contains("prune-nm: plugin attar-example-prune-nm 0.1.0: n is 5 and m is 4"), "{said}");
    assert!(!folder.path().join("x.attar").exists());
}

#[test]
fn layers_that_change_least_go() {
    let folder = folder();
    let library = workspace_plugin("attar-example-drop-layers");
    let options = "drop-layers=count:1,keep_ends:false,windows:2";
    let report = compile(folder.path(), &library, options, &["--quantize", "f32"]);
    let similarity = metrics(&report, "drop-layers", "similarity");
    assert_eq!(similarity.len(), 2, "{similarity:?}");
    assert!(
        similarity.iter().all(|s| (0.0..=1.0).contains(&s.as_f64().expect("a number"))),
        "{similarity:?}"
    );
    let artifact = open(folder.path().join("m.attar"));
    let graph = artifact.text(&SectionKind::Graph).expect("readable").expect("there");
    assert_eq!(graph.matches(" = attention ").count(), 1, "{graph}");
    assert!(graph.contains("layer = 0"), "{graph}");
    let layers = |a: &Artifact| a.manifest().tensors.iter().filter(|t| t.name.contains("down_proj")).count();
    assert_eq!(layers(&artifact), 1);
    text(folder.path(), &["run", "m.attar", "--prompt", "the", "--max-tokens", "3"]);
    // Without calibration it reads its own text.
    compile(folder.path(), &library, options, &["--quantize", "f32", "--calibrate", "none"]);
    let model = tiny("smollm2");
    let all = [
        "compile",
        utf8(&model),
        "--plugin",
        utf8(&library),
        "--pass",
        "drop-layers=count:3",
        "-o",
        "x.attar",
    ];
    assert!(failure(folder.path(), 2, &all).contains("only 0 of the 2 layers may go"));
}

#[test]
fn a_described_format_needs_its_plugin_no_more() {
    let folder = folder();
    let library = workspace_plugin("attar-example-format-nf4");
    let report = compile(folder.path(), &library, "quantize-nf4=tensors:model.layers.*", &[]);
    let formats: Vec<&str> =
        report["formats"].as_array().expect("formats").iter().filter_map(|f| f["format"].as_str()).collect();
    assert!(formats.contains(&"nf4"), "{formats:?}");
    // About as good as the built-in format of nearly that size.
    let recipe = "[[pass]]\nname = \"quantize-rtn\"\nformat = \"n4\"\ntensors = [\"model.layers.*\"]\n";
    std::fs::write(folder.path().join("n4.toml"), recipe).expect("a recipe");
    let model = tiny("smollm2");
    let n4 = ["compile", utf8(&model), "--recipe", "n4.toml", "-o", "n4.attar", "--json"];
    let n4: Value = serde_json::from_str(&text(folder.path(), &[&n4[..], &QUICK].concat())).expect("JSON");
    let kld = |report: &Value| report["certificate"]["quality"]["kld"].as_f64().expect("a number");
    assert!(kld(&report) < 2.0 * kld(&n4), "{} and {}", kld(&report), kld(&n4));
    let artifact = open(folder.path().join("m.attar"));
    assert_eq!(artifact.manifest().formats[0].name, "nf4");
    text(folder.path(), &["run", "m.attar", "--prompt", "the", "--max-tokens", "3"]);
    let shown = text(folder.path(), &["inspect", "m.attar", "--tensors"]);
    assert!(shown.contains("nf4"), "{shown}");
}

#[test]
fn outliers_are_listed_and_nothing_changes() {
    let folder = folder();
    let library = workspace_plugin("attar-example-list-outliers");
    let options = "list-outliers=path:table.csv,factor:1.5,most:3";
    let report = compile(folder.path(), &library, options, &["--quantize", "f32"]);
    let table = std::fs::read_to_string(folder.path().join("table.csv")).expect("a table");
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[0], "layer,column,max_abs,rms_of_column,times_rms_of_layer");
    assert!(lines.len() > 4 && lines[1..].iter().all(|l| l.split(',').count() == 5), "{table}");
    assert!(metrics(&report, "list-outliers", "outlier_columns").len() >= 8);
    let model = tiny("smollm2");
    let uncalibrated = [
        "compile",
        utf8(&model),
        "--plugin",
        utf8(&library),
        "--pass",
        "list-outliers",
        "-o",
        "x.attar",
        "--calibrate",
        "none",
    ];
    assert!(failure(folder.path(), 2, &uncalibrated).contains("list-outliers: plugin"));
}

#[test]
fn a_plugin_in_c_works() {
    if !has("gcc", "--version") {
        return skipped("no gcc");
    }
    let folder = folder();
    let library = folder.path().join("libclip_weights.so");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-I"]);
    gcc.arg(root().join("plugins/sdk/include"))
        .arg(root().join("plugins/examples/clip-weights-c/clip_weights.c"));
    let output = gcc.arg("-o").arg(&library).arg("-lm").output().expect("gcc starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let report = compile(folder.path(), &library, "clip-weights=deviations:2", &["--quantize", "n4"]);
    let clipped = metrics(&report, "clip-weights", "clipped");
    assert!(!clipped.is_empty() && clipped.iter().all(|c| c.as_u64() > Some(0)), "{clipped:?}");
    let listed = text(folder.path(), &["passes", "clip-weights", "--plugin", utf8(&library)]);
    assert!(listed.contains("deviations") && listed.contains("a number from 1 to 100"), "{listed}");
    let model = tiny("smollm2");
    let wrong = [
        "compile",
        utf8(&model),
        "--plugin",
        utf8(&library),
        "--pass",
        "clip-weights=deviations:0",
        "-o",
        "x",
    ];
    assert!(failure(folder.path(), 2, &wrong).contains("option deviations must be a number from 1 to 100"));
}

#[test]
fn built_in_passes_as_a_library_give_the_same_bytes() {
    let folder = folder();
    let library = workspace_plugin("attar-test-built-in-passes");
    // One with biases, one without.
    for model in ["qwen2", "smollm2"].map(tiny) {
        let base = ["compile", utf8(&model), "--pass", "prune-magnitude=pattern:2:4", "--quantize", "n4"];
        let built_in = [&base[..], &QUICK, &["-o", "in.attar"]].concat();
        text(folder.path(), &built_in);
        let plugged = [&base[..], &QUICK, &["-o", "out.attar", "--plugin", utf8(&library)]].concat();
        let plugged = attar(folder.path(), &plugged);
        assert!(plugged.status.success(), "{}", stderr(&plugged));
        // All but those that need the compiler itself.
        let replaced = stderr(&plugged).matches("takes the place of the built-in pass").count();
        assert_eq!(replaced, 10, "{}", stderr(&plugged));
        let (a, b) = (open(folder.path().join("in.attar")), open(folder.path().join("out.attar")));
        let sections = |a: &Artifact| -> Vec<(String, u64, String)> {
            let all = a.manifest().sections.iter();
            all.map(|s| (s.kind.name(), s.len, s.hash.clone())).filter(|s| s.0 != "recipe").collect()
        };
        assert_eq!(sections(&a), sections(&b));
        assert!(sections(&a).len() >= 6, "{:?}", sections(&a));
        // The recipes differ in what the artifact must say: which library it was.
        let recipe = |a: &Artifact| a.text(&SectionKind::Recipe).expect("readable").expect("there");
        let (a, b) = (recipe(&a), recipe(&b));
        let kept: Vec<&str> = b.lines().filter(|l| !a.contains(*l)).collect();
        assert!(
            kept.iter().all(|l| ["[[made.plugins]]", "name = ", "version = ", "blake3 = "]
                .iter()
                .any(|s| l.starts_with(s))),
            "{kept:?}"
        );
    }
}

#[test]
fn a_new_plugin_works_as_it_is_and_with_another_compiler() {
    let folder = folder();
    text(folder.path(), &["plugin", "new", "my-pass"]);
    let made = folder.path().join("my-pass");
    test_in(&made);
    let library = plugin_in(&made, "my-pass", None);
    let report = compile(folder.path(), &library, "my-pass=strength:0.5", &["--quantize", "w8"]);
    let zeros = metrics(&report, "my-pass", "zeros");
    assert!(!zeros.is_empty(), "{report}");
    assert!(failure(folder.path(), 2, &["plugin", "new", "my-pass"]).contains("exists"));
    assert!(failure(folder.path(), 2, &["plugin", "new", "My Pass"]).contains("no name for a plugin"));
    let pinned = ["--allow-plugins", &"0".repeat(64)];
    let model = tiny("smollm2");
    let base = ["compile", utf8(&model), "--plugin", utf8(&library), "--pass", "my-pass", "-o", "x.attar"];
    assert!(failure(folder.path(), 2, &[&base[..], &pinned].concat()).contains("it was not loaded"));

    // The same source by another compiler gives the same model.
    let nightly = has("rustup", "--version")
        && Command::new("rustup")
            .args(["run", "nightly", "rustc", "--version"])
            .output()
            .is_ok_and(|o| o.status.success());
    if nightly {
        let weights = |artifact: &Artifact| -> Vec<String> {
            artifact
                .manifest()
                .sections
                .iter()
                .filter(|s| s.kind.name() != "recipe")
                .map(|s| s.hash.clone())
                .collect()
        };
        let stable = weights(&open(folder.path().join("m.attar")));
        let library = plugin_in(&made, "my-pass", Some("nightly"));
        compile(folder.path(), &library, "my-pass=strength:0.5", &["--quantize", "w8"]);
        assert_eq!(weights(&open(folder.path().join("m.attar"))), stable);
    } else {
        skipped("no nightly Rust");
    }

    // One that panics.
    let source = made.join("src/lib.rs");
    let panics = std::fs::read_to_string(&source).expect("the source");
    let panics = panics.replace(
        "        let names = cx.tensors()?;\n",
        "        let names = cx.tensors()?;\n        \
        if options.strength > 0.9 { panic!(\"the sky fell at {}\", names.len()); }\n",
    );
    std::fs::write(&source, panics).expect("the source");
    let library = plugin_in(&made, "my-pass", None);
    let base = [
        "compile",
        utf8(&model),
        "--plugin",
        utf8(&library),
        "--pass",
        "my-pass=strength:1",
        "-o",
        "x.attar",
    ];
    let said = failure(folder.path(), 2, &base);
    assert!(
        said.contains("my-pass: plugin my-pass 0.1.0") && said.contains("it panicked: the sky fell at"),
        "{said}"
    );
    assert!(!folder.path().join("x.attar").exists());
}

#[test]
fn the_conformance_kit_tells_good_from_bad() {
    let folder = folder();
    let good = workspace_plugin("attar-example-prune-nm");
    let report: Value =
        serde_json::from_str(&text(folder.path(), &["plugin", "check", utf8(&good), "--json"]))
            .expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    let of = |what: &str| checks.iter().filter(|c| c["what"] == what).collect::<Vec<_>>();
    for what in [
        "loads",
        "describes itself",
        "misuse",
        "runs",
        "is deterministic",
        "comes back",
        "asks for rewrites",
        "without calibration",
        "after encoding",
    ] {
        assert!(
            !of(what).is_empty() && of(what).iter().all(|c| c["outcome"] == "passed"),
            "{what}: {report}"
        );
    }
    let memory = of("memory");
    if memory[0]["outcome"] == "skipped" {
        skipped("no valgrind");
    } else {
        assert_eq!(memory[0]["outcome"], "passed", "{report}");
    }

    if !has("gcc", "--version") {
        return skipped("no gcc");
    }
    // A pass that hears no errors, changes weights without leave, loses memory, and depends on when it runs.
    let source = folder.path().join("bad.c");
    let bad = "#include \"attar_plugin.h\"\n#include <stdlib.h>\n#include <time.h>\n\
        #define STR(text) {(const uint8_t *)(text), sizeof(text) - 1}\n\
        static AttarStatus run(const void *c, const AttarHost *h, AttarRun r, const AttarOptionValue *o, uintptr_t n) {\n\
        (void)c, (void)o, (void)n;\n\
        AttarStr name; size_t count; AttarEdit edit; struct timespec now;\n\
        if (h->tensors(r, 0, &name, 1, &count) != ATTAR_OK) return ATTAR_OK;\n\
        if (h->tensor_edit(r, name, &edit) != ATTAR_OK) return ATTAR_ERROR;\n\
        char *volatile lost = malloc(1000); lost[0] = 1; lost = NULL;\n\
        clock_gettime(CLOCK_REALTIME, &now);\n\
        edit.data[0] = (float)(now.tv_nsec % 100003) / 100003.0f;\n\
        return h->tensor_commit(r, edit.buffer); }\n\
        static const AttarPass PASS = {.name = STR(\"bad\"), .summary = STR(\"is bad\"), .phase = 1, .numerics = 2, \
        .takes_tensors = 1, .run = run};\n\
        static const AttarPlugin PLUGIN = {.size = sizeof(AttarPlugin), .abi_major = 1, .name = STR(\"bad\"), \
        .version = STR(\"1\"), .passes = &PASS, .passes_len = 1};\n\
        const AttarPlugin *attar_plugin_entry(const AttarHost *h) { (void)h; return &PLUGIN; }\n";
    std::fs::write(&source, bad).expect("a source");
    let library = folder.path().join("libbad.so");
    let mut gcc = Command::new("gcc");
    gcc.args(["-g", "-O0", "-shared", "-fPIC", "-I"]).arg(root().join("plugins/sdk/include")).arg(&source);
    let output = gcc.arg("-o").arg(&library).output().expect("gcc starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let output = attar(folder.path(), &["plugin", "check", utf8(&library)]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let report = String::from_utf8_lossy(&output.stdout);
    let failed = |what: &str| report.lines().any(|l| l.starts_with("FAILED") && l.contains(what));
    assert!(failed("is deterministic") && failed("asks for rewrites") && failed("misuse"), "{report}");
    assert!(failed("memory") || !has("valgrind", "--version"), "{report}");
}
