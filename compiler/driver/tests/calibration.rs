//! Compiles with calibration on tiny checkpoints: the same bytes wherever, saved statistics, text that will not do.

use attar_compiler::{
    CalibrateOptions, CalibrationOptions, CalibrationSource, Certify, CompileOptions, CompileReport, Error,
    Family, Session, calibrate, registry, resolve_targets,
};
use attar_pass::{MetricValue, Preset, Recipe};
use std::path::{Path, PathBuf};

fn tiny(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny").join(model)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A few windows are enough for models this small.
fn calibration(source: CalibrationSource) -> CalibrationOptions {
    CalibrationOptions { windows: 6, context: 24, ..CalibrationOptions::new(source) }
}

fn options(model: &str, source: CalibrationSource, out: &Path) -> CompileOptions {
    let registry = registry().expect("passes");
    let recipe = Recipe::parse(&Preset::N4.calibrated_recipe(), "preset", &registry).expect("a recipe");
    let targets = resolve_targets(&["native".to_owned()]).expect("targets");
    let mut options = CompileOptions::new(tiny(model), recipe, targets, out.to_owned());
    options.calibration = calibration(source);
    options
}

fn compile(options: CompileOptions) -> Result<CompileReport, Error> {
    Session::new(options)?.run(&mut |_| {})
}

fn text(dir: &Path, name: &str, bytes: &[u8]) -> CalibrationSource {
    let path = dir.join(name);
    std::fs::write(&path, bytes).expect("a file");
    CalibrationSource::File(path)
}

/// Words without meaning, but not without end.
fn prose() -> String {
    (0..400u32)
        .map(|i| format!("{} the {}n of {}. ", i * 37 % 101, "abcdefgh".repeat(i as usize % 3), i))
        .collect()
}

#[test]
fn threads_change_nothing_and_errors_fall() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let bytes = |threads: usize| {
        let out = dir.path().join(format!("{threads}.attar"));
        let mut options = options("smollm2", source.clone(), &out);
        options.threads = Some(threads);
        let report = compile(options).expect("compiles");
        (std::fs::read(out).expect("an artifact"), report)
    };
    let ((one, report), (three, _)) = (bytes(1), bytes(3));
    assert!(one == three);
    let number = |m: &attar_pass::Metric, key: &str| match m.values.get(key) {
        Some(MetricValue::Number(v)) => *v,
        other => panic!("{key} of {}: {other:?}", m.subject),
    };
    let solved: Vec<_> =
        report.metrics.iter().filter(|m| m.values.contains_key("relative_output_error")).collect();
    assert!(solved.len() > 10);
    for m in solved {
        let (ours, rounded) =
            (number(m, "relative_output_error"), number(m, "relative_output_error_rounded"));
        assert!(ours <= rounded && ours > 0.0, "{}: {ours} against {rounded}", m.subject);
    }
}

/// Blocks get no worse, some get better, and threads change nothing.
#[test]
fn blocks_are_reconstructed() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let recipe = "[[pass]]\nname = \"quantize-gptq\"\ntensors = [\"model.layers.*\"]\nformat = \"n2\"\n\
        correct_drift = 0.0\nreconstruct_steps = 40\n[[pass]]\nname = \"quantize-rtn\"\nformat = \"n6\"\n";
    let bytes = |threads: usize| {
        let out = dir.path().join(format!("{threads}.attar"));
        let mut options = options("smollm2", source.clone(), &out);
        options.recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
        options.threads = Some(threads);
        let report = compile(options).expect("compiles");
        (std::fs::read(out).expect("an artifact"), report)
    };
    let ((one, report), (three, _)) = (bytes(1), bytes(3));
    assert!(one == three);
    let mut better = 0;
    let mut layers = std::collections::BTreeSet::new();
    for m in &report.metrics {
        let (Some(MetricValue::Number(after)), Some(MetricValue::Number(before))) =
            (m.values.get("block_error"), m.values.get("block_error_before"))
        else {
            continue;
        };
        assert!(after <= before && *after > 0.0, "{}: {after} against {before}", m.subject);
        better += usize::from(*after < 0.97 * before);
        layers.extend(m.subject.split('.').nth(2).map(str::to_owned));
    }
    assert!(better > 0, "nothing was gained");
    assert_eq!(layers.len(), 2, "{layers:?}");
}

const DISTILLED: &str = "[[pass]]\nname = \"quantize-rtn\"\ntensors = [\"model.layers.*\"]\nformat = \"n2\"\n\
    [[pass]]\nname = \"distil-gains\"\nwindows = 20\nrate = 0.005\n";

/// Predictions on windows that were not trained on come nearer, and threads change nothing.
#[test]
fn gains_are_distilled() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let made = |name: &str, recipe: &str, threads: usize| {
        let out = dir.path().join(name);
        let mut options = options("smollm2", source.clone(), &out);
        options.recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
        options.calibration.windows = 24;
        options.threads = Some(threads);
        let report = compile(options).expect("compiles");
        (std::fs::read(out).expect("an artifact"), report)
    };
    let ((one, report), (three, _)) = (made("one", DISTILLED, 1), made("three", DISTILLED, 3));
    assert!(one == three);
    let found = report.metrics.iter().find(|m| m.pass == "distil-gains" && m.subject == "predictions");
    let values = &found.expect("what was measured").values;
    let (Some(MetricValue::Number(after)), Some(MetricValue::Number(before))) =
        (values.get("divergence"), values.get("divergence_before"))
    else {
        panic!("{values:?}")
    };
    assert!(*after < 0.95 * before && *after > 0.0, "{after} against {before}");
    let (without, _) =
        made("without", DISTILLED.split("[[pass]]\nname = \"distil").next().expect("a pass"), 1);
    assert!(without != one);
}

/// Statistics of the text, saved in the folder.
fn statistics(dir: &Path, source: CalibrationSource) -> PathBuf {
    let out = dir.join("statistics");
    let of = CalibrateOptions {
        source: tiny("smollm2"),
        calibration: calibration(source),
        out: out.clone(),
        threads: None,
    };
    calibrate(&of, &mut |_, _, _| {}).expect("calibrates");
    out
}

/// What there is nothing to learn of or from stays as it is, and says so.
#[test]
fn nothing_is_distilled_without_codes_or_text() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let saved = statistics(dir.path(), source.clone());
    let refused = |recipe: &str, source: CalibrationSource| {
        let mut options = options("smollm2", source, &dir.path().join("out"));
        options.recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
        compile(options).map(|report| {
            let said = report.metrics.into_iter().find(|m| m.pass == "distil-gains").expect("a reason");
            format!("{:?}", said.values.get("refused"))
        })
    };
    let plain = "[[pass]]\nname = \"distil-gains\"\n";
    assert!(refused(plain, source).expect("compiles").contains("none is coded"));
    let said = refused(DISTILLED, CalibrationSource::Saved(saved)).expect("compiles");
    assert!(said.contains("there is no text"), "{said}");
    let e = refused(DISTILLED, CalibrationSource::None).expect_err("no calibration");
    assert!(e.to_string().contains("calibrat"), "{e}");
}

/// Smoothing before coding: the same bytes on any number of threads, factors that are not all 1, and saved statistics will do.
#[test]
fn activations_are_smoothed_before_matrices_are_coded() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let saved = statistics(dir.path(), source.clone());
    let recipe =
        "[[pass]]\nname = \"smooth-activations\"\n[[pass]]\nname = \"quantize-rtn\"\nformat = \"w8\"\n";
    let made = |source: CalibrationSource, threads: usize| {
        let out = dir.path().join("out.attar");
        let mut options = options("smollm2", source, &out);
        options.recipe = Recipe::parse(recipe, "test", &registry().expect("passes")).expect("a recipe");
        options.threads = Some(threads);
        let report = compile(options).expect("compiles");
        let smoothed = report.metrics.iter().filter(|m| m.values.contains_key("most_factor")).count();
        assert!(smoothed >= 4, "{smoothed} sites");
        std::fs::read(out).expect("an artifact")
    };
    let bytes = made(source.clone(), 1);
    assert!(made(source, 3) == bytes);
    made(CalibrationSource::Saved(saved), 1);
}

#[test]
fn models_write_the_same_text_each_time() {
    let dir = folder();
    let stats = |name: &str, threads: usize| {
        let options = CalibrateOptions {
            source: tiny("qwen2"),
            calibration: calibration(CalibrationSource::Sampled),
            out: dir.path().join(name),
            threads: Some(threads),
        };
        calibrate(&options, &mut |_, _, _| {}).expect("calibrates")
    };
    let (a, b) = (stats("a", 1), stats("b", 2));
    assert_eq!((a.windows, a.tokens, &a.text_hash), (6, 144, &b.text_hash));
    assert!(
        std::fs::read(dir.path().join("a")).expect("a") == std::fs::read(dir.path().join("b")).expect("b")
    );
}

#[test]
fn saved_statistics_serve_their_own_model_only() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let saved = dir.path().join("statistics");
    let of = CalibrateOptions {
        source: tiny("qwen3"),
        calibration: calibration(source),
        out: saved.clone(),
        threads: None,
    };
    let report = calibrate(&of, &mut |_, _, _| {}).expect("calibrates");
    assert_eq!(report.bytes, std::fs::metadata(&saved).expect("a file").len());
    assert!(report.outliers.is_sorted_by(|a, b| a.largest_over_rms >= b.largest_over_rms));
    assert!(report.outliers.iter().all(|o| o.largest_over_rms > 1.0 && o.channel_kurtosis >= 1.0));
    let out = dir.path().join("model.attar");
    compile(options("qwen3", CalibrationSource::Saved(saved.clone()), &out)).expect("compiles");

    // A file of an older version, which has no fourth moments.
    let old = dir.path().join("old");
    let mut bytes = std::fs::read(&saved).expect("a file");
    let at = bytes.windows(19).position(|w| w == b"attar calibration 2").expect("its version") + 18;
    bytes[at] = b'1';
    std::fs::write(&old, &bytes).expect("a file");
    let e = compile(options("qwen3", CalibrationSource::Saved(old), &out)).expect_err("an old version");
    assert!(e.to_string().contains("is version 1") && e.to_string().contains("attar calibrate"), "{e}");

    let other =
        compile(options("smollm2", CalibrationSource::Saved(saved), &out)).expect_err("another model");
    assert!(other.to_string().contains("another model"), "{other}");
    assert_eq!(other.family(), Family::Input);
    let no_file = compile(options("qwen3", CalibrationSource::Saved(tiny("qwen3/config.json")), &out));
    assert!(no_file.expect_err("no statistics").to_string().contains("attar calibrate"));
}

#[test]
fn text_that_will_not_do_is_told_apart() {
    let dir = folder();
    let out = dir.path().join("model.attar");
    for (name, bytes, said) in [
        ("empty.txt", &b"  \n"[..], "is empty"),
        ("binary.bin", b"\x7fELF\0\x01\xff", "is no text"),
        ("short.txt", b"Too short.", "one window takes 24"),
        ("lines.jsonl", b"{\"text\": \"a\"}\n{\"txet\": \"a\"}", "line 2"),
        ("broken.jsonl", b"{\"text\": ", "line 1"),
        ("chat.jsonl", b"{\"messages\": [{\"role\": \"user\"}]}", "line 1"),
    ] {
        let e = compile(options("qwen2", text(dir.path(), name, bytes), &out)).expect_err(name);
        assert!(e.to_string().contains(said) && e.to_string().contains(name), "{name}: {e}");
        assert_eq!(e.family(), Family::Input, "{name}");
    }
    let e = compile(options("qwen2", CalibrationSource::File(dir.path().join("none.txt")), &out))
        .expect_err("none");
    assert!(e.to_string().contains("cannot read it"), "{e}");
    let e = compile(options("qwen2", CalibrationSource::None, &out)).expect_err("no calibration");
    assert!(e.to_string().contains("--calibrate"), "{e}");
    let mut none = options("qwen2", CalibrationSource::Sampled, &out);
    none.calibration.windows = 0;
    assert!(compile(none).expect_err("no windows").to_string().contains("--calibration-windows"));
}

#[test]
fn lines_of_text_are_read() {
    let dir = folder();
    let line = serde_json::json!({ "text": prose() }).to_string();
    let source = text(dir.path(), "lines.jsonl", format!("{line}\n\n{line}\n").as_bytes());
    compile(options("qwen2", source, &dir.path().join("model.attar"))).expect("compiles");
}

#[test]
fn budgets_are_kept_and_shared_out() {
    let dir = folder();
    let source = text(dir.path(), "text.txt", prose().as_bytes());
    let mixed = |option: &str, out: &str, threads: usize| {
        let out = dir.path().join(out);
        let recipe = format!("[[pass]]\nname = \"quantize-mixed\"\n{option}\n");
        let recipe = Recipe::parse(&recipe, "test", &registry().expect("passes"))?;
        let certify = if threads == 1 { Certify::BuiltIn } else { Certify::No };
        let mut options = CompileOptions { recipe, certify, ..options("smollm2", source.clone(), &out) };
        options.threads = Some(threads);
        let report = compile(options)?;
        Ok::<_, Error>((std::fs::read(out).expect("an artifact"), report))
    };
    let matrices = |report: &CompileReport| -> u64 {
        report.tensors.iter().filter(|t| t.shape.len() > 1).map(|t| t.bytes).sum()
    };
    let all_in = |format: &str| {
        let option = format!("max_kld = 99.0\ncoarsest = \"{format}\"\nfinest = \"{format}\"");
        matrices(&mixed(&option, "all.attar", 2).expect("compiles").1)
    };
    let (least, most) = (all_in("n2"), all_in("w8"));
    let budget = (least + most) / 2;
    let (one, report) = mixed(&format!("max_bytes = {budget}"), "1.attar", 1).expect("compiles");
    assert!((least..=budget).contains(&matrices(&report)), "{} of {budget}", matrices(&report));
    let certificate = report.certificate.as_ref().expect("a certificate");
    assert!(!certificate.tensors.is_empty() && certificate.tensors.iter().all(|t| t.sensitivity.is_some()));
    let weights = |file: &[u8]| {
        let artifact = attar_artifact::Artifact::from_bytes(file.to_vec(), attar_artifact::Verify::Full);
        artifact.expect("an artifact").weights().expect("weights").bytes().to_vec()
    };
    let (three, _) = mixed(&format!("max_bytes = {budget}"), "3.attar", 3).expect("compiles");
    assert!(weights(&one) == weights(&three), "threads change the bytes");
    let explained = report.metrics.iter().filter(|m| m.values.contains_key("why")).count();
    assert!(explained > 10, "{explained} tensors are explained");

    let (_, close) = mixed("max_kld = 0.005", "close.attar", 2).expect("compiles");
    let (_, far) = mixed("max_kld = 0.5", "far.attar", 2).expect("compiles");
    assert!(matrices(&close) > matrices(&far));

    for (option, parts) in [
        ("max_bytes = 9000".to_owned(), vec!["cannot be met", "n2", "bytes"]),
        ("max_kld = 1e-12".to_owned(), vec!["cannot be met", "w8"]),
        ("max_kld = 1.0\nmax_bytes = 5".to_owned(), vec!["not both"]),
        (String::new(), vec!["max_bytes or max_kld"]),
        ("max_kld = 1.0\ncoarsest = \"n5\"\nfinest = \"n3\"".to_owned(), vec!["coarsest"]),
    ] {
        let e = mixed(&option, "refused.attar", 2).expect_err(&option);
        assert_eq!(e.family(), Family::Input);
        for part in parts {
            assert!(e.to_string().contains(part), "{option}: {e}");
        }
        assert!(!dir.path().join("refused.attar").exists());
    }
}
