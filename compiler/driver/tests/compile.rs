//! Whole compiles of tiny checkpoints: every target, the same bytes wherever and however, errors that say what to do.

use attar_artifact::manifest::{KvType, SectionKind};
use attar_artifact::{Artifact, Verify};
use attar_compiler::{
    CalibrationSource, Certify, CompileOptions, CompileReport, Error, Family, HELD_OUT_TEXT, Phase, Session,
    Target, registry,
};
use attar_pass::{Preset, Recipe};
use std::path::{Path, PathBuf};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(path)
}

fn tiny(model: &str) -> PathBuf {
    data("tiny").join(model)
}

fn options(source: PathBuf, preset: Preset, out: &Path) -> CompileOptions {
    let recipe = Recipe::parse(&preset.recipe(), "preset", &registry().expect("passes")).expect("a recipe");
    CompileOptions::new(source, recipe, Target::ALL.to_vec(), out.to_owned())
}

fn compile(options: CompileOptions) -> Result<CompileReport, Error> {
    Session::new(options)?.run(&mut |_| {})
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
    }
}

#[test]
fn every_architecture_compiles_for_every_target() {
    let dir = folder();
    for (model, preset) in [
        ("tiny/llama2", Preset::F32),
        ("tiny/llama2-sharded", Preset::BF16),
        ("tiny/llama3", Preset::N4),
        ("tiny/mistral", Preset::W8),
        ("tiny/qwen2", Preset::N4),
        ("tiny/qwen3", Preset::N4),
        ("tiny/smollm2", Preset::N4),
        ("gguf/qwen3.gguf", Preset::N4),
    ] {
        let out = dir.path().join("model.attar");
        let report = compile(options(data(model), preset, &out)).expect("compiles");
        let artifact = Artifact::open(&out, Verify::Full).expect("opens");
        let targets: Vec<&str> = artifact
            .manifest()
            .sections
            .iter()
            .filter_map(|s| {
                if let SectionKind::Code { target, .. } = &s.kind { Some(target.as_str()) } else { None }
            })
            .collect();
        assert_eq!(targets, Target::ALL.map(Target::name));
        assert_eq!(artifact.programs("cpu").map(<[_]>::len), Some(3));
        assert_eq!(report.artifact_bytes, artifact.file_len());
        assert_eq!(report.artifact_hash, Some(artifact.manifest_hash()));
        let f32_cache = artifact.manifest().model.kv.dtype == KvType::F32;
        assert_eq!(f32_cache, preset == Preset::F32, "{model}");
        let text = |kind| artifact.text(&kind).expect("reads").unwrap_or_default();
        assert!(text(SectionKind::Tokenizer).starts_with('{'));
        attar_ir::text::parse(&text(SectionKind::Graph)).expect("the graph's text parses");
        let recipe = text(SectionKind::Recipe);
        let input = if model.ends_with(".gguf") { "qwen3.gguf" } else { "config.json" };
        assert!(recipe.contains(&format!("name = {input:?}")) && recipe.contains("blake3"), "{recipe}");
        let again = Recipe::parse(&recipe, "recipe", &registry().expect("passes")).expect("parses");
        let preset = Recipe::parse(&preset.recipe(), "preset", &registry().expect("passes")).expect("parses");
        assert_eq!(again, preset);
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes_elsewhere_and_on_other_threads() {
    let (here, elsewhere) = (folder(), folder());
    let copied = elsewhere.path().join("a copy");
    copy(&tiny("qwen3"), &copied);
    let (a, b) = (here.path().join("a.attar"), elsewhere.path().join("another name.attar"));
    let one = CompileOptions { threads: Some(1), ..options(tiny("qwen3"), Preset::N4, &a) };
    let four = CompileOptions {
        threads: Some(4),
        emit_ir: Some(elsewhere.path().join("ir")),
        ..options(copied, Preset::N4, &b)
    };
    let (first, second) = (compile(one).expect("compiles"), compile(four).expect("compiles"));
    assert_eq!(first.artifact_hash, second.artifact_hash);
    let (a, b) = (std::fs::read(a).expect("reads"), std::fs::read(b).expect("reads"));
    assert!(a == b, "two compiles of one checkpoint differ");
    for needle in [here.path(), elsewhere.path()] {
        let needle = needle.to_string_lossy().into_owned().into_bytes();
        assert!(!a.windows(needle.len()).any(|w| w == needle), "the artifact holds a path");
    }
}

/// The graph of a small model after every pass, as `--emit-ir` writes it.
#[test]
fn fused_graph_of_a_tiny_llama() {
    let dir = folder();
    let stop = CompileOptions {
        stop_after: Some("fuse".to_owned()),
        emit_ir: Some(dir.path().to_owned()),
        ..options(tiny("llama2"), Preset::N4, &dir.path().join("never.attar"))
    };
    let report = compile(stop).expect("compiles");
    assert_eq!(report.stopped_after.as_deref(), Some("fuse"));
    assert!(!dir.path().join("never.attar").exists());
    let mut dumps: Vec<PathBuf> =
        std::fs::read_dir(dir.path()).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    dumps.sort();
    let got = std::fs::read_to_string(dumps.last().expect("a dump")).expect("reads");
    snapshot("llama2-after-fuse.air", &got);
}

/// The programs of the same model, as `--emit-ir` writes them.
#[test]
fn programs_of_a_tiny_llama() {
    let dir = folder();
    let stop = CompileOptions {
        stop_after: Some("lower".to_owned()),
        emit_ir: Some(dir.path().to_owned()),
        ..options(tiny("llama2"), Preset::N4, &dir.path().join("never.attar"))
    };
    compile(stop).expect("compiles");
    let got = std::fs::read_to_string(dir.path().join("lower.txt")).expect("reads");
    snapshot("llama2-n4-programs.txt", &got);
}

fn snapshot(name: &str, got: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("ATTAR_UPDATE_FILETESTS").is_some() {
        std::fs::write(&path, got).expect("writes");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let line = got.lines().zip(expected.lines()).position(|(a, b)| a != b);
    assert!(got == expected, "{name} differs from line {line:?} on; ATTAR_UPDATE_FILETESTS=1 rewrites it");
}

#[test]
fn phases_are_reported_in_order_with_times_and_sizes() {
    let dir = folder();
    let mut options = options(tiny("smollm2"), Preset::N4, &dir.path().join("m.attar"));
    options.targets = vec![Target::X86_64V3];
    let mut heard = Vec::new();
    let session = Session::new(options).expect("good options");
    let report = session
        .run(&mut |event| {
            if let attar_compiler::Event::PhaseStarted { phase } = event {
                heard.push(phase);
            }
        })
        .expect("compiles");
    assert_eq!(heard, Phase::ALL);
    assert_eq!(report.phases.iter().map(|p| p.phase).collect::<Vec<_>>(), Phase::ALL);
    let formats: u64 = report.formats.iter().map(|f| f.bytes).sum();
    assert_eq!(formats, report.tensors.iter().map(|t| t.bytes).sum::<u64>());
    assert!(
        report.formats.iter().any(|f| f.format == "n4") && report.formats.iter().any(|f| f.format == "w8")
    );
    let sections: u64 = report.sections.iter().map(|s| s.bytes).sum();
    assert!(sections <= report.artifact_bytes && sections > formats);
    serde_json::to_string(&report).expect("serializes");
}

#[test]
fn errors_belong_to_families_and_leave_nothing_behind() {
    let dir = folder();
    let out = dir.path().join("m.attar");
    let missing =
        compile(options(dir.path().join("no-such-model"), Preset::N4, &out)).expect_err("nothing there");
    assert_eq!(missing.family(), Family::Input, "{missing}");
    assert!(missing.to_string().contains("no-such-model"), "{missing}");

    let nowhere = dir.path().join("no/such/folder/m.attar");
    let unwritable = compile(options(tiny("llama2"), Preset::N4, &nowhere)).expect_err("no folder");
    assert_eq!(unwritable.family(), Family::Environment, "{unwritable}");

    let long = CompileOptions { context_length: Some(1 << 30), ..options(tiny("llama2"), Preset::N4, &out) };
    let error = compile(long).expect_err("too long").to_string();
    assert!(error.contains("--context"), "{error}");

    let stop =
        CompileOptions { stop_after: Some("fuze".to_owned()), ..options(tiny("llama2"), Preset::N4, &out) };
    let error = Session::new(stop).expect_err("no such phase").to_string();
    assert!(error.contains("fuze") && error.contains("fuse"), "{error}");

    let gguf = dir.path().join("m.gguf");
    std::fs::copy(data("gguf/qwen2.gguf"), &gguf).expect("copies");
    let itself = compile(options(gguf.clone(), Preset::N4, &gguf)).expect_err("would be lost");
    assert_eq!(itself.family(), Family::Input);
    assert!(itself.to_string().contains("--output"), "{itself}");

    let recipe = "[[pass]]\nname = \"quantize-rtn\"\ntensors = [\"model.layerz.*\"]\nformat = \"n4\"\n";
    let recipe = Recipe::parse(recipe, "r.toml", &registry().expect("passes")).expect("parses");
    let glob = CompileOptions { recipe, ..options(tiny("llama2"), Preset::N4, &out) };
    let error = compile(glob).expect_err("matches nothing").to_string();
    assert!(error.contains("model.layerz.*"), "{error}");
    assert!(!out.exists());
}

/// A compile with a certificate, for the targets given.
fn certified(
    model: &str,
    preset: Preset,
    certify: Certify,
    targets: &[Target],
    out: &Path,
) -> CompileOptions {
    CompileOptions { certify, targets: targets.to_vec(), ..options(data(model), preset, out) }
}

fn native() -> Target {
    Target::native().expect("a target for this machine")
}

#[test]
fn a_certificate_says_how_much_was_lost() {
    let dir = folder();
    let out = dir.path().join("m.attar");
    for (model, preset, reference) in [
        ("tiny/llama2", Preset::F32, "f32"),
        ("tiny/llama2", Preset::W8, "f32"),
        ("tiny/llama2", Preset::N4, "f32"),
        ("tiny/llama3", Preset::N4, "bf16"),
        ("gguf/qwen3.gguf", Preset::N4, "f32"),
    ] {
        let compiled = compile(certified(model, preset, Certify::BuiltIn, &[native()], &out));
        let report = compiled.unwrap_or_else(|e| panic!("{model}: {e}"));
        let artifact = Artifact::open(&out, Verify::Full).expect("opens");
        let c = artifact.certificate().expect("reads").unwrap_or_else(|| panic!("{model}: no certificate"));
        assert_eq!((report.certificate.as_ref(), report.uncertified.as_ref()), (Some(&c), None));
        assert_eq!(artifact.manifest().uncertified, None);
        assert_eq!((c.target.as_str(), c.reference.as_str()), (native().name(), reference), "{model}");
        assert_eq!(c.text.blake3, blake3::hash(HELD_OUT_TEXT.as_bytes()).to_hex().to_string());
        let q = &c.quality;
        assert_eq!(q.scores as usize, c.windows * (c.context / 2 - 1));
        let weights = report.formats.iter().map(|f| f.bytes).sum::<u64>();
        assert_eq!(c.weight_bytes, weights);
        if preset == Preset::F32 {
            assert!(q.kld == 0.0 && q.top1 == 1.0 && q.ppl == q.ppl_reference, "{q:?}");
        } else {
            assert!(q.kld > 0.0 && q.kld_p999 <= q.kld_max && q.kld_median <= q.kld_p99, "{q:?}");
        }
        assert_eq!(c.tensors.is_empty(), preset == Preset::F32, "{model}");
        assert!(c.tensors.iter().all(|t| t.relative_error < 0.2), "{:?}", c.tensors);
        // Neither the reference nor the preview stays.
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 1);
    }
}

#[test]
fn certificates_do_not_depend_on_threads_or_places() {
    let (here, elsewhere) = (folder(), folder());
    let (a, b) = (here.path().join("a.attar"), elsewhere.path().join("b.attar"));
    let build = |out: &Path, threads| {
        let one = certified("tiny/qwen3", Preset::N4, Certify::BuiltIn, &[native()], out);
        compile(CompileOptions { threads: Some(threads), ..one }).expect("compiles");
        std::fs::read(out).expect("reads")
    };
    assert!(build(&a, 1) == build(&b, 3), "two compiles of one checkpoint differ");
}

#[test]
fn artifacts_without_a_certificate_say_why() {
    let dir = folder();
    let out = dir.path().join("m.attar");
    let foreign = if cfg!(target_arch = "riscv64") { Target::X86_64V2 } else { Target::Riscv64 };
    let untold = dir.path().join("untold");
    copy(&tiny("llama2"), &untold);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(untold.join(file)).expect("a file");
    }
    for (source, certify, target, reason) in [
        (tiny("llama2"), Certify::No, native(), "none was asked for"),
        (tiny("llama2"), Certify::BuiltIn, foreign, "no code of the artifact runs on the machine"),
        (untold, Certify::BuiltIn, native(), "no tokenizer"),
    ] {
        let options = CompileOptions { certify, targets: vec![target], ..options(source, Preset::W8, &out) };
        let report = compile(options).expect("compiles");
        let artifact = Artifact::open(&out, Verify::Full).expect("opens");
        assert!(artifact.certificate().expect("reads").is_none());
        let said = artifact.manifest().uncertified.clone().expect("a reason");
        assert!(said.contains(reason), "{said}");
        assert_eq!(report.uncertified, Some(said));
    }
}

#[test]
fn a_text_that_cannot_be_measured_is_an_error_and_leaves_nothing() {
    let dir = folder();
    let out = dir.path().join("m.attar");
    let text = |text: &str| Certify::Text { name: "mine.txt".to_owned(), text: text.to_owned() };
    let fails = |certify: Certify, target: Target| {
        let error = certified("tiny/llama2", Preset::W8, certify, &[target], &out);
        let error = compile(error).expect_err("nothing to measure");
        assert_eq!(error.family(), Family::Input, "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
        error.to_string()
    };
    let short = fails(text("too short"), native());
    assert!(short.contains("a window alone takes 256"), "{short}");
    assert!(fails(text(""), native()).contains("the text has"));
    let foreign = if cfg!(target_arch = "riscv64") { Target::X86_64V2 } else { Target::Riscv64 };
    assert!(fails(text("any"), foreign).contains("--certify: no code for"));

    let elsewhere = folder();
    let calibration = elsewhere.path().join("calibration.txt");
    std::fs::write(&calibration, "seen before ".repeat(200)).expect("writes");
    let mut seen = certified("tiny/llama2", Preset::W8, text(&"seen before ".repeat(200)), &[native()], &out);
    seen.calibration.source = CalibrationSource::File(calibration);
    let error = compile(seen).expect_err("not held out").to_string();
    assert!(error.contains("--certify: mine.txt is also what the model is calibrated on"), "{error}");

    let own = certified("tiny/llama2", Preset::W8, text(&"of my own ".repeat(200)), &[native()], &out);
    let report = compile(CompileOptions { certify_windows: 2, ..own }).expect("compiles");
    let c = report.certificate.expect("a certificate");
    assert_eq!((c.text.name.as_str(), c.windows, c.context), ("mine.txt", 2, 256));
}

#[test]
fn default_passes_are_registered_and_stand_in_the_order_of_their_phases() {
    let registry = registry().expect("passes");
    let phases: Vec<Phase> = attar_compiler::pipeline::DEFAULT
        .iter()
        .map(|p| registry.find(p.pass).unwrap_or_else(|e| panic!("{e}")).phase)
        .collect();
    assert!(phases.is_sorted(), "{phases:?}");
    assert!(attar_compiler::pipeline::DEFAULT.iter().all(|p| p.reason.len() > 20));
}
