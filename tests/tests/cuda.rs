//! Whole models through the CUDA driver's interface: the runtime as it is, over a fake driver whose device is the PTX interpreter.
//! No GPU takes part.
//!
//! The driver is found where the system's loader looks when a process starts, so each test starts this program again, with a
//! folder that has the fake driver; [`child`] is what runs there.

use attar_artifact::manifest::SectionKind;
use attar_artifact::{Artifact, Verify, Writer};
use attar_compiler::{CompileOptions, CudaTarget, Nvrtc, Session, registry, resolve_targets};
use attar_pass::{Preset, Recipe};
use attar_runtime::{
    Control, DeviceChoice, Engine, GenerateOptions, Model, OpenOptions, Progress, Sampler, SamplingOptions,
    SessionOptions, StepBatch, gpus, top_logits,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// Names the artifact in the child.
const ARTIFACT: &str = "ATTAR_TEST_CUDA_ARTIFACT";
/// Names the device in the child.
const DEVICE: &str = "ATTAR_TEST_CUDA_DEVICE";

/// Models whose kernels differ: tied and biased products, norms of heads, caches.
const MODELS: [(&str, &str); 3] = [("smollm2", "n4"), ("qwen2", "w8"), ("qwen3", "bf16")];

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// The folder with the fake driver.
static DRIVER: LazyLock<PathBuf> =
    LazyLock::new(|| attar_fake_cuda::install(&FOLDER.path().join("driver")).expect("the fake driver"));

/// Whether kernels can be compiled here; says so where they cannot.
fn has_nvrtc() -> bool {
    match Nvrtc::find() {
        Ok(_) => true,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "skipped 1 test of models on the PTX interpreter: {e}");
            false
        }
    }
}

/// A small model, compiled for this CPU and, with `cuda`, for a GPU.
fn compile(model: &str, preset: &str, cuda: bool) -> PathBuf {
    let target = CudaTarget::by_name("cuda:sm_90").expect("a target");
    compile_for(model, preset, cuda.then_some(target), None)
}

/// The same for a certain kind of GPU. Sources of its kernels go to `ir`.
fn compile_for(model: &str, preset: &str, cuda: Option<CudaTarget>, ir: Option<&Path>) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // Tests run at once, each with files of its own.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let out = FOLDER.path().join(format!("{model}-{preset}-{count}.attar"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny").join(model);
    let recipe = Preset::by_name(preset).expect("a preset").recipe();
    let recipe = Recipe::parse(&recipe, "test", &registry().expect("passes")).expect("a recipe");
    let targets = resolve_targets(&["native"]).expect("a target");
    let mut options = CompileOptions::new(source, recipe, targets, out.clone());
    options.emit_ir = ir.map(Path::to_owned);
    if let Some(target) = cuda {
        options.cuda = vec![target];
        options.kernel_cache = Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    }
    Session::new(options).expect("options").run(&mut |_| ()).unwrap_or_else(|e| panic!("{model}: {e}"));
    out
}

/// What the child says: its line, or the error it ends with.
fn on_fake(artifact: &Path, device: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["child", "--exact", "--nocapture", "--ignored"]);
    command.env("LD_LIBRARY_PATH", &*DRIVER).env(ARTIFACT, artifact).env(DEVICE, device);
    command.envs(environment.iter().copied());
    let output = command.output().expect("this program runs");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let said = text.lines().find_map(|l| l.split_once("said: ")).map(|(_, said)| said.to_owned());
    said.unwrap_or_else(|| panic!("the child said nothing:\n{text}"))
}

/// Not a test of its own: what [`on_fake`] runs.
#[test]
#[ignore = "runs in a child process of the others"]
fn child() {
    let (Some(artifact), Some(device)) = (std::env::var_os(ARTIFACT), std::env::var_os(DEVICE)) else {
        return;
    };
    let device = device.to_string_lossy().into_owned();
    let said = match device.as_str() {
        "list" => gpus().map(|all| format!("{all:?}")),
        _ => {
            let device =
                if device == "best" { DeviceChoice::Best } else { device.parse().expect("a device") };
            speak(Path::new(&artifact), device)
        }
    };
    let said = said.unwrap_or_else(|e| format!("error: {e}"));
    let _ = writeln!(std::io::stdout(), "said: {}", said.replace('\n', " "));
}

/// Logits after a prompt that takes the program for many rows; then greedy tokens; then logits of a script of steps for few
/// rows, in which sequences fork, share pages and are cut.
fn speak(artifact: &Path, device: DeviceChoice) -> attar_runtime::Result<String> {
    let heard = Arc::new(AtomicU64::new(0));
    let hear = heard.clone();
    let progress = Progress::new(move |done, total| {
        hear.store(done * 1000 / total, Ordering::Relaxed);
    });
    let options =
        OpenOptions { device, threads: Some(1), progress: Some(progress), ..OpenOptions::default() };
    let model = Model::open(artifact, &options)?;
    let on_gpu = model.target().starts_with("cuda");
    assert_eq!(heard.load(Ordering::Relaxed), if on_gpu { 1000 } else { 0 }, "all weights were copied");
    let vocab = model.manifest().model.vocab;
    let mut engine = Engine::new(model.clone(), 96, 3)?;
    let top = |logits: &[f32]| -> String {
        let top: Vec<String> = top_logits(logits, 5).iter().map(|(id, x)| format!("{id}:{x:.3}")).collect();
        top.join(" ")
    };
    let prompt: Vec<u32> = (0..37u32).map(|i| (7 + 13 * i) % vocab).collect();
    let long = engine.add_sequence()?;
    let mut batch = StepBatch::default();
    // Longer than a small batch, and than a page of the cache.
    prompt.iter().enumerate().for_each(|(i, t)| batch.push(long, *t, i == 36));
    let after_prompt = top(engine.step(&batch)?);
    engine.remove(long);
    // The same in pieces, which GPUs and CPUs compute with the same numbers.
    let first = engine.add_sequence()?;
    let mut tokens = Vec::new();
    for piece in prompt.chunks(13) {
        batch.clear();
        piece.iter().enumerate().for_each(|(i, t)| batch.push(first, *t, i + 1 == piece.len()));
        tokens.push(top_logits(engine.step(&batch)?, 1)[0].0);
    }
    for _ in 0..4 {
        batch.clear();
        batch.push(first, *tokens.last().expect("a token"), true);
        tokens.push(top_logits(engine.step(&batch)?, 1)[0].0);
    }
    // The page that is not full is copied when one of them goes on.
    let second = engine.fork(first)?;
    let mut after = vec![after_prompt];
    let last = *tokens.last().expect("a token");
    for turn in 0..3 {
        batch.clear();
        batch.push(first, last, true);
        batch.push(second, (last + 1 + turn) % vocab, true);
        batch.push(second, (last + 5) % vocab, true);
        let logits = engine.step(&batch)?;
        after.extend(logits.chunks_exact(vocab as usize).map(top));
    }
    // The likeliest tokens, of few rows and of more than come back through pinned memory, are those of the logits.
    for rows in [1, 3, 17, 33] {
        let before = engine.len(second);
        batch.clear();
        for i in 0..rows {
            batch.push(second, (last + 11 * i) % vocab, true);
        }
        let chosen = engine.step_greedy(&batch)?.to_vec();
        engine.truncate(second, before)?;
        let logits = engine.step(&batch)?;
        let want: Vec<u32> = logits.chunks_exact(vocab as usize).map(|row| top_logits(row, 1)[0].0).collect();
        assert_eq!(chosen, want, "{rows} rows");
        let logits = logits.to_vec();
        engine.truncate(second, before)?;
        if rows == 17 {
            after.extend(logits.chunks_exact(vocab as usize).skip(14).map(top));
        }
        // A size that comes again is replayed, which says the same.
        for turn in 0..3 {
            assert_eq!(engine.step(&batch)?, logits, "{rows} rows, turn {turn}");
            engine.truncate(second, before)?;
        }
        // As many as a GPU finds, and more.
        for k in [1, 7, 64, 65] {
            let found: Vec<(u32, f32)> =
                engine.step_top_k(&batch, k)?.iter().map(|t| (t.token, t.logit)).collect();
            let want: Vec<_> =
                logits.chunks_exact(vocab as usize).flat_map(|row| top_logits(row, k)).collect();
            assert_eq!(found, want, "{rows} rows, the {k} largest");
            engine.truncate(second, before)?;
        }
    }
    // Two engines at once, each on a thread of its own, of sizes that are captured and that are not yet.
    let alone = |engine: &mut Engine| -> attar_runtime::Result<Vec<f32>> {
        let sequence = engine.add_sequence()?;
        let (mut batch, mut all) = (StepBatch::default(), Vec::new());
        for count in [1u32, 33, 3, 33, 17, 33, 1, 3, 33] {
            batch.clear();
            (0..count).for_each(|i| batch.push(sequence, (5 + 7 * i) % vocab, true));
            all.extend_from_slice(engine.step(&batch)?);
            engine.truncate(sequence, 0)?;
        }
        Ok(all)
    };
    let said = std::thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| alone(&mut Engine::new(model.clone(), 64, 1)?)));
        threads.map(|thread| thread.join().expect("a thread that ends"))
    });
    let [one, other] = said;
    assert_eq!(one?, other?, "two engines at once");
    // A GPU takes more tokens in a step than it gives rows of logits.
    batch.clear();
    (0..513).for_each(|_| batch.push(second, 1, true));
    let refused = engine.step(&batch).expect_err("too many").to_string();
    let why =
        if model.target().starts_with("cuda") { "the logits of 513 tokens" } else { "a step of 513 tokens" };
    assert!(refused.contains(why), "{refused}");
    if model.tokenizer().is_ok() {
        let mut session = model.session(&SessionOptions { context: Some(48) })?;
        let options = GenerateOptions { max_tokens: Some(6), ignore_eos: true, ..GenerateOptions::default() };
        let generation = session.generate(&[5, 9, 2], &options, |_| Control::Continue)?;
        // The last token is not held, so the logits are those it was chosen by, wherever that was.
        let next: Vec<u32> = top_logits(session.logits(), 1).iter().map(|(id, _)| *id).collect();
        assert_eq!(next, generation.tokens[5..], "{:?}", generation.tokens);
        tokens.extend(generation.tokens);
        // What is drawn of the largest logits is what is drawn of all.
        let sampling =
            SamplingOptions { temperature: 1.5, top_k: 9, top_p: 0.9, seed: 3, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(sampling.clone(), vocab as usize)?;
        let options = GenerateOptions { sampling, ..options };
        let generation = session.generate(&[5, 9, 2], &options, |_| Control::Continue)?;
        session.truncate(0)?;
        session.append(&[5, 9, 2])?;
        for token in &generation.tokens {
            assert_eq!(*token, sampler.sample(session.logits(), &[]), "{:?}", generation.tokens);
            session.append(&[*token])?;
        }
    }
    engine.truncate(first, 20)?;
    batch.clear();
    batch.push(first, 3, true);
    after.push(top(engine.step(&batch)?));
    Ok(format!("{} {tokens:?} {}", model.target(), after.join(" | ")))
}

/// Ids and logits, likeliest first.
type Top = Vec<(u32, f32)>;

/// Target, greedy tokens, and logits after the prompt and after each later row.
fn parse(said: &str) -> (String, String, Vec<Top>) {
    let split = || {
        let (target, rest) = said.split_once(" [")?;
        let (tokens, rest) = rest.split_once("] ")?;
        let top = |text: &str| -> Option<Top> {
            let pair =
                |p: &str| p.split_once(':').and_then(|(i, x)| Some((i.parse().ok()?, x.parse().ok()?)));
            text.split(' ').map(pair).collect()
        };
        let tops = rest.split(" | ").map(top).collect::<Option<Vec<Top>>>()?;
        Some((target.to_owned(), tokens.to_owned(), tops))
    };
    split().unwrap_or_else(|| panic!("the child said {said}"))
}

/// Fails unless the likeliest tokens of the first are among the others', with logits that are no further apart.
fn near(at: &str, cpu: &Top, gpu: &Top, most: f32) {
    for (id, x) in &cpu[..2] {
        let other = gpu.iter().find(|(i, _)| i == id);
        assert!(other.is_some_and(|(_, y)| (x - y).abs() <= most), "{at}: {cpu:?} and {gpu:?}");
    }
}

#[test]
fn whole_models_say_what_the_cpu_says() {
    if !has_nvrtc() {
        return;
    }
    for (model, preset) in MODELS {
        let path = compile(model, preset, true);
        let cpu = parse(&speak(&path, DeviceChoice::Cpu).unwrap_or_else(|e| panic!("{model}: {e}")));
        for mode in ["lazy", "eager"] {
            let said = on_fake(&path, "best", &[(attar_fake_cuda::MODE, mode)]);
            let gpu = parse(&said);
            let at = format!("{model} {preset} {mode}");
            // Machine code is for GPUs; the interpreter takes PTX, as a driver does for a GPU that is newer than the code.
            assert_eq!(gpu.0, "cuda:compute_80", "{at}: {said}");
            assert_eq!(gpu.1, cpu.1, "{at}: other tokens than the CPU's");
            // A prompt's products are of operands rounded to bf16; all else differs by the order of sums. Either may put a code of
            // an activation to the other side of its border, and then all that follows is rounded anew: in rows of 64 that
            // is about a hundredth of the logits.
            assert_eq!(cpu.2.len(), gpu.2.len(), "{at}");
            for (row, (c, g)) in cpu.2.iter().zip(&gpu.2).enumerate() {
                near(&format!("{at}, row {row}"), c, g, 0.03 * c[0].1.abs());
            }
        }
    }
}

/// A copy of an artifact whose machine code for a target is what the fake driver takes as such: the PTX that NVRTC makes of the
/// sources in `ir`. All else, how its kernels are launched included, stays as it was.
fn with_fake_cubins(path: &Path, target: CudaTarget, ir: &Path) -> PathBuf {
    let nvrtc = Nvrtc::find().expect("it was there");
    let artifact = Artifact::open(path, Verify::Full).expect("a whole artifact");
    let manifest = artifact.manifest();
    let image = |kernel: &str| {
        let own = ir.join(format!("cuda/{kernel}.{target}.cu"));
        let file = if own.exists() { own } else { ir.join(format!("cuda/{kernel}.cu")) };
        let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let output = nvrtc.compile(kernel, &source, target).unwrap_or_else(|e| panic!("{kernel}: {e}"));
        attar_fake_cuda::fake_cubin(&target.to_string(), &output.ptx)
    };
    let out = path.with_extension("fake.attar");
    let mut writer = Writer::create(&out).expect("a file");
    for section in &manifest.sections {
        match &section.kind {
            SectionKind::Weights => {
                let weights = artifact.weights().expect("weights");
                let mut tensors: Vec<_> = manifest.tensors.iter().collect();
                tensors.sort_by_key(|t| t.offset);
                let mut into = writer.weights().expect("room");
                for t in tensors {
                    let bytes = weights.tensor(&t.name).expect("a tensor");
                    let placed = into.add(&t.name, &t.format, &t.shape, bytes).expect("written");
                    assert_eq!(placed.offset, t.offset, "programs know where it is");
                }
                into.finish();
            }
            SectionKind::Code { target: name, features, entries, prefill_differs }
                if *name == target.name() =>
            {
                let (mut bytes, mut entries) = (Vec::new(), entries.clone());
                for entry in &mut entries {
                    let image = image(&entry.kernel);
                    bytes.resize(usize::next_multiple_of(bytes.len(), 64), 0);
                    (entry.offset, entry.len) = (bytes.len() as u64, image.len() as u64);
                    bytes.extend(image);
                }
                let (target, features) = (name.clone(), features.clone());
                let kind = SectionKind::Code { target, features, entries, prefill_differs: *prefill_differs };
                writer.add_section(kind, &bytes).expect("written");
            }
            SectionKind::Code { .. } => {
                let bytes = artifact.read(section).expect("readable");
                writer.add_section(section.kind.clone(), &bytes).expect("written");
            }
            SectionKind::Programs { device } => {
                let programs = artifact.programs(device).expect("programs");
                writer.add_programs(device, programs).expect("written");
            }
            // Tokens go in and come out.
            _ => {}
        }
    }
    writer.set_uncertified("a copy for a test");
    writer.finish("test", manifest.model.clone()).expect("written");
    out
}

/// Kernels that only one architecture has, with more shared memory than a launch has without asking, and other blocks than the
/// launch says.
#[test]
fn code_of_one_architecture_says_what_the_cpu_says() {
    if !has_nvrtc() {
        return;
    }
    let target = CudaTarget::by_name("cuda:sm_90a").expect("a target");
    let ir = FOLDER.path().join("ir");
    let (model, preset) = MODELS[0];
    let path = compile_for(model, preset, Some(target), Some(&ir));
    let fake = with_fake_cubins(&path, target, &ir);
    let cpu = parse(&speak(&fake, DeviceChoice::Cpu).unwrap_or_else(|e| panic!("{e}")));
    let log = FOLDER.path().join("launches");
    for mode in ["lazy", "eager"] {
        let log = log.to_string_lossy();
        let said = on_fake(&fake, "best", &[(attar_fake_cuda::MODE, mode), (attar_fake_cuda::LOG, &log)]);
        let gpu = parse(&said);
        assert_eq!(gpu.0, "cuda:sm_90a", "{said}");
        assert_eq!(gpu.1, cpu.1, "{mode}: other tokens than the CPU's");
    }
    let launches = std::fs::read_to_string(log).expect("a log");
    let artifact = Artifact::open(&fake, Verify::Full).expect("a whole artifact");
    let entries = artifact.manifest().sections.iter().find_map(|s| match &s.kind {
        SectionKind::Code { target: name, entries, .. } if *name == target.name() => Some(entries),
        _ => None,
    });
    let mut own = entries.expect("its code").iter().filter(|e| e.blocks.shared_bytes > 48 << 10).peekable();
    assert!(own.peek().is_some(), "no kernel of its own");
    for entry in own {
        assert!(launches.contains(&entry.kernel), "{} was never launched", entry.kernel);
    }
    // A step of many rows whose size comes again is a graph: that of the script from its third time on, when it is replayed for
    // more largest logits than a GPU finds as well, and those of both engines.
    let graphs = launches.split("graph\t").skip(1).filter(|graph| {
        let (items, launches) = graph.split_once('\n').expect("a line");
        launches.lines().take(items.parse().expect("a number")).any(|launch| launch.contains("_rn_"))
    });
    assert_eq!(graphs.count(), 2 * (4 + 2 * 3), "graphs of many rows");
    // More than 16 rows of few are two blocks.
    assert!(
        launches.lines().any(|l| l.contains("_r16_") && l.contains(", 2, 1]")),
        "no launch of 17 to 32 rows"
    );
}

#[test]
fn devices_are_chosen_and_refused_with_reasons() {
    if !has_nvrtc() {
        return;
    }
    let (model, preset) = MODELS[0];
    let (both, plain) = (compile(model, preset, true), compile(model, preset, false));
    let fake = |device: &str, environment: &[(&str, &str)]| on_fake(&both, device, environment);
    let refused = |said: String, words: &[&str]| {
        assert!(said.starts_with("error: "), "{said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
    };
    let cpu = "x86-64";
    let native = speak(&both, DeviceChoice::Cpu).expect("this CPU").starts_with(cpu);

    assert!(fake("cuda:1", &[(attar_fake_cuda::DEVICES, "2")]).starts_with("cuda:compute_80"));
    refused(fake("cuda:2", &[(attar_fake_cuda::DEVICES, "2")]), &["cuda:2 is not available", "2 GPUs"]);
    assert_eq!(fake("cpu", &[]).starts_with(cpu), native);
    // Whoever names a GPU gets that or nothing; whoever does not gets the CPU where there is none that fits.
    for (environment, words) in [
        ((attar_fake_cuda::DEVICES, "0"), ["not available", "shows no GPU"]),
        ((attar_fake_cuda::CAPABILITY, "7.5"), ["compute capability 7.5", "8.0 or later"]),
        ((attar_fake_cuda::DRIVER, "12080"), ["12.8", "13.0 is needed"]),
    ] {
        refused(fake("cuda:0", &[environment]), &words);
        assert_eq!(fake("best", &[environment]).starts_with(cpu), native);
    }
    refused(fake("best", &[(attar_fake_cuda::MEMORY, "100000")]), &["no room for", "bytes are needed"]);
    refused(fake("cuda:0", &[(attar_fake_cuda::FAIL_COPY, "1")]), &["cuda:0 failed while copying weights"]);
    refused(fake("cuda:0", &[(attar_fake_cuda::LOSE_AFTER, "20")]), &["cuda:0 failed while running a step"]);
    refused(on_fake(&plain, "cuda:0", &[]), &["no code for GPUs", "--target native,cuda:sm_90a"]);
    assert!(fake("list", &[]).contains("compute: (9, 0)"), "{}", fake("list", &[]));
}

/// Code for GPUs that was damaged is refused when the file is opened, before a driver sees it.
#[test]
fn damaged_code_for_gpus_is_refused() {
    if !has_nvrtc() {
        return;
    }
    let (model, preset) = MODELS[0];
    let path = compile(model, preset, true);
    let artifact = Artifact::open(&path, Verify::Full).expect("a whole artifact");
    let sections = &artifact.manifest().sections;
    let names: Vec<String> = sections.iter().map(|s| s.kind.name()).collect();
    for name in ["code cuda:sm_90", "code cuda:compute_80", "programs cuda"] {
        let section = sections.iter().find(|s| s.kind.name() == name).unwrap_or_else(|| panic!("{names:?}"));
        let mut bytes = std::fs::read(&path).expect("the file");
        bytes[(section.offset + section.len / 2) as usize] ^= 1;
        let error = Artifact::from_bytes(bytes, Verify::Code).expect_err("it is damaged").to_string();
        assert!(error.contains(name) && error.contains("damaged"), "{error}");
    }
}

/// The same inputs give the same bytes, kernels for GPUs among them, whether they were compiled or kept from before.
#[test]
fn artifacts_with_code_for_gpus_are_the_same_each_time() {
    if !has_nvrtc() {
        return;
    }
    let (model, preset) = MODELS[0];
    let once = std::fs::read(compile(model, preset, true)).expect("the file");
    assert!(once == std::fs::read(compile(model, preset, true)).expect("the file"), "other bytes");
}
