//! Interrupted compiles: they go on where they stopped, and give the bytes of one that was never interrupted.

use attar_compiler::{
    CalibrationOptions, CalibrationSource, CompileOptions, CompileReport, ErrorKind, Event, Family, Session,
    registry, resolve_targets,
};
use attar_pass::{Preset, Recipe};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Blocks of three bits, reconstructed.
const BLOCKS: &str = "[[pass]]\nname = \"quantize-gptq\"\ntensors = [\"model.layers.*\"]\nformat = \"n3\"\n\
    reconstruct_steps = 8\n[[pass]]\nname = \"quantize-rtn\"\nformat = \"n6\"\n";
/// Tokens count by what predictions depend on.
const GUIDED: &str = "[[pass]]\nname = \"quantize-gptq\"\nformat = \"n4\"\nguidance = 1.0\n";
/// Factors of rows and norms follow what the model predicts.
const DISTILLED: &str = "[[pass]]\nname = \"quantize-gptq\"\nformat = \"n2\"\n\
    [[pass]]\nname = \"distil-gains\"\nrate = 0.005\n";
const MIXED: &str = "[[pass]]\nname = \"quantize-mixed\"\nmax_kld = 0.05\n";

fn options(recipe: &str, out: &Path) -> CompileOptions {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny/smollm2");
    let recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
    let targets = resolve_targets(&["native".to_owned()]).expect("targets");
    let mut options = CompileOptions::new(source, recipe, targets, out.to_owned());
    options.calibration =
        CalibrationOptions { windows: 6, context: 24, ..CalibrationOptions::new(CalibrationSource::Sampled) };
    options.threads = Some(1);
    options
}

/// What was told while compiling, each once.
fn compile(options: CompileOptions) -> (CompileReport, Vec<String>) {
    let mut told: Vec<String> = Vec::new();
    let session = Session::new(options).expect("a session");
    let report = session.run(&mut |event| {
        if let Event::Progress { what, .. } = event
            && told.last().is_none_or(|last| last != what)
        {
            told.push(what.to_owned());
        }
    });
    (report.expect("compiles"), told)
}

/// Compiles, and is killed when `stop` holds of something that is told: whoever listens panics, which ends the compile, or the pass
/// that tells it and with it the compile.
fn interrupted(options: CompileOptions, stop: impl Fn(&str) -> bool + Sync) {
    let session = Session::new(options).expect("a session");
    let killed = catch_unwind(AssertUnwindSafe(|| {
        session.run(&mut |event| {
            if let Event::Progress { what, .. } = event {
                assert!(!stop(what), "killed");
            }
        })
    }));
    assert!(!matches!(killed, Ok(Ok(_))), "it was to be killed");
}

fn partial(out: &Path) -> PathBuf {
    let mut name = out.to_owned().into_os_string();
    name.push(".partial");
    name.into()
}

fn entries(out: &Path) -> Vec<PathBuf> {
    let Ok(folder) = std::fs::read_dir(partial(out)) else { return Vec::new() };
    let mut all: Vec<PathBuf> = folder.map(|e| e.expect("an entry").path()).collect();
    all.retain(|p| p.extension().is_some_and(|e| e == "entry"));
    all.sort();
    all
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("an artifact")
}

#[test]
fn resuming_gives_the_bytes_of_an_uninterrupted_compile() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipes = [Preset::N4.calibrated_recipe(), MIXED.to_owned(), BLOCKS.to_owned(), GUIDED.to_owned()];
    for (i, recipe) in recipes.iter().enumerate() {
        let whole = dir.path().join(format!("whole{i}.attar"));
        let (report, told) = compile(options(recipe, &whole));
        assert_eq!(report.resumed_tensors, 0);
        assert!(told.iter().any(|t| t.starts_with("writing calibration text")), "{told:?}");
        assert!(!partial(&whole).exists());
        let weighs = |told: &[String]| told.iter().any(|t| t.starts_with("weighing tokens"));
        assert_eq!(weighs(&told), recipe == GUIDED, "{told:?}");
        let points =
            ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj", "sensitivity of model.layers.1"];
        for (at, point) in points.iter().enumerate() {
            if !told.iter().any(|t| t.starts_with(point)) {
                continue;
            }
            let out = dir.path().join(format!("{i}-{at}.attar"));
            interrupted(options(recipe, &out), |what| what.starts_with(point));
            assert!(!out.exists() && !entries(&out).is_empty());
            let (report, told) = compile(options(recipe, &out));
            assert!(bytes(&whole) == bytes(&out), "{point}");
            assert!(!partial(&out).exists());
            // The model does not write its text again, and what was measured or chosen is not again.
            assert!(!weighs(&told), "{told:?}");
            assert!(!told.iter().any(|t| t.starts_with("writing calibration text")), "{told:?}");
            if point.starts_with("model") {
                assert!(report.resumed_tensors >= 4, "{}", report.resumed_tensors);
                let said = format!("resumed: {} of ", report.resumed_tensors);
                assert!(told.iter().any(|t| t.starts_with(&said)), "{told:?}");
                // No text is read for a layer whose tensors are all there.
                assert!(!told.iter().any(|t| t.contains("%l0_attn_norm,")), "{told:?}");
            }
        }
    }
}

/// Steps that were taken are not taken again.
#[test]
fn distilling_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, out) = (dir.path().join("whole.attar"), dir.path().join("out.attar"));
    let options = |out: &Path| {
        let mut options = options(DISTILLED, out);
        options.calibration.windows = 12;
        options
    };
    let steps = |told: &[String]| told.iter().filter(|t| t.starts_with("predictions")).count();
    let (_, told) = compile(options(&whole));
    assert_eq!(steps(&told), 1, "{told:?}");
    let seen = std::sync::atomic::AtomicUsize::new(0);
    interrupted(options(&out), |what| {
        what == "predictions" && seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 3
    });
    let (_, told) = compile(options(&out));
    assert!(told.iter().any(|t| t == "resumed: 3 of 5 steps"), "{told:?}");
    assert!(bytes(&whole) == bytes(&out));
}

#[test]
fn all_tensors_there_already_still_give_the_same_artifact() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, out) = (dir.path().join("whole.attar"), dir.path().join("out.attar"));
    let recipe = Preset::N4.calibrated_recipe();
    compile(options(&recipe, &whole));
    // Packaging tells of tensors too, so stop at the certificate's phase: after the last pass.
    interrupted(options(&recipe, &out), |what| {
        what == "lm_head.weight" || what == "model.embed_tokens.weight"
    });
    let (report, told) = compile(options(&recipe, &out));
    assert!(report.resumed_tensors >= 14);
    assert!(!told.iter().any(|t| t.starts_with("reading text")), "{told:?}");
    assert!(bytes(&whole) == bytes(&out));
}

#[test]
fn damaged_entries_are_made_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let whole = dir.path().join("whole.attar");
    compile(options(MIXED, &whole));
    for keep in [0, 20, 40] {
        let out = dir.path().join(format!("{keep}.attar"));
        interrupted(options(MIXED, &out), |what| what.starts_with("model.layers.1.mlp.gate_proj"));
        for entry in entries(&out) {
            let mut content = bytes(&entry);
            content.truncate(keep);
            std::fs::write(&entry, &content).expect("a file");
        }
        let (report, _) = compile(options(MIXED, &out));
        assert_eq!(report.resumed_tensors, 0);
        assert!(bytes(&whole) == bytes(&out), "{keep}");
    }
    // Some damaged, others not.
    let out = dir.path().join("some.attar");
    interrupted(options(MIXED, &out), |what| what.starts_with("model.layers.1.mlp.gate_proj"));
    for entry in entries(&out).iter().step_by(2) {
        std::fs::write(entry, b"damaged").expect("a file");
    }
    compile(options(MIXED, &out));
    assert!(bytes(&whole) == bytes(&out));
}

#[test]
fn another_recipe_or_no_resume_begins_anew() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out.attar");
    let stop = |what: &str| what.starts_with("model.layers.1.mlp.gate_proj");
    let recipe = Preset::N4.calibrated_recipe();
    interrupted(options(&recipe, &out), stop);
    let n5 = Preset::by_name("n5").expect("a preset").calibrated_recipe();
    let (report, _) = compile(options(&n5, &out));
    assert_eq!(report.resumed_tensors, 0);

    interrupted(options(&recipe, &out), stop);
    let (report, told) = compile(CompileOptions { resume: false, ..options(&recipe, &out) });
    assert_eq!(report.resumed_tensors, 0);
    assert!(told.iter().any(|t| t.starts_with("writing calibration text")), "{told:?}");
    assert!(!partial(&out).exists());
}

#[test]
fn files_above_their_budget_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out.attar");
    let recipe = Preset::N4.recipe();
    let (report, _) = compile(CompileOptions { max_bytes: Some(1 << 30), ..options(&recipe, &out) });
    assert_eq!(report.artifact_bytes, std::fs::metadata(&out).expect("a file").len());
    let exact = dir.path().join("exact.attar");
    compile(CompileOptions { max_bytes: Some(report.artifact_bytes), ..options(&recipe, &exact) });
    let over = dir.path().join("over.attar");
    let one_less = CompileOptions { max_bytes: Some(report.artifact_bytes - 1), ..options(&recipe, &over) };
    let e = Session::new(one_less).expect("a session").run(&mut |_| {}).expect_err("one byte too many");
    assert!(matches!(*e.kind, ErrorKind::TooLarge { .. }) && e.family() == Family::Input, "{e}");
    for number in [report.artifact_bytes, report.artifact_bytes - 1] {
        assert!(e.to_string().contains(&number.to_string()), "{e}");
    }
    assert!(!over.exists());
}
