//! A compile session: options in, phases in order, report out.

use crate::calibrate::{CalibrationOptions, CalibrationSource, DriverCalibrator, Subject as Calibrated};
use crate::certify::{self, Certify, DEFAULT_WINDOWS, Reason, Subject};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Event;
use crate::inputs::{InputFile, hash_files};
use crate::model_runner::GraphRunner;
use crate::origin::{CalibrationOrigin, CertificateOrigin, Origin, PluginOrigin};
use crate::package::{self, Contents, CudaCode};
use crate::partial::PartialResults;
use crate::pipeline::default_passes;
use crate::report::{CompileReport, ModelReport, PhaseReport, SectionReport, TensorReport, by_format};
use crate::targets::Targets;
use attar_artifact::manifest::{KvSpec, KvType, Model};
use attar_artifact::program::ProgramKind;
use attar_artifact::{Artifact, Verify};
use attar_codegen_cpu::lower::{LowerOptions, Lowered, lower};
use attar_codegen_cpu::{CodeBlob, Target, compile_blob};
use attar_codegen_cuda::{Cache, CudaTarget, Nvrtc, emit, translate};
use attar_import::{Imported, ModelInfo};
use attar_ir::{Elem, Graph, OpKind};
use attar_pass::{Fuel, Manager, Phase, Pipeline, PrintAfter, Recipe, Registry, Report, Stop, Surroundings};
use attar_plugin_host::Plugin;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

// Passes register themselves; naming the crate links them.
use attar_passes as _;

/// Every pass of this build.
///
/// # Errors
/// When two passes have one name.
pub fn registry() -> Result<Registry> {
    Ok(Registry::new()?)
}

/// Every pass of this build, and those of plugins. A plugin's pass takes the place of a built-in one of its name.
///
/// # Errors
/// When two plugins have a pass of one name.
pub fn registry_with(plugins: &[Plugin]) -> Result<Registry> {
    let mut registry = registry()?;
    let mut added: Vec<&str> = Vec::new();
    for plugin in plugins {
        for decl in &plugin.passes {
            if added.contains(&decl.name) {
                let problem =
                    format!("a pass of {} is called {} like another's", plugin.path.display(), decl.name);
                return Err(Error::option("--plugin", problem));
            }
            registry.replace(decl);
            added.push(decl.name);
        }
    }
    Ok(registry)
}

/// What a checkpoint says of its model; no tensor is read.
///
/// # Errors
/// Those of importing it.
pub fn describe(source: &Path) -> Result<ModelInfo> {
    let imported = attar_import::open(source);
    Ok(imported.map_err(|e| Error::new(Phase::Import, ErrorKind::Import(e)))?.model)
}

/// Names, sizes and hashes of the files of a checkpoint.
///
/// # Errors
/// Those of importing it; when a file cannot be read.
pub fn describe_inputs(source: &Path) -> Result<Vec<InputFile>> {
    let imported = attar_import::open(source);
    hash_files(&imported.map_err(|e| Error::new(Phase::Import, ErrorKind::Import(e)))?.source.files)
}

/// What there is of a model before it is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// About how many bytes of an artifact are no matrices: vectors, code, programs, tokenizer, and what describes them. A
    /// little more than it will be.
    pub beside: u64,
    /// Elements of all matrices.
    pub elements: u64,
}

/// How large a checkpoint is, and what comes beside its matrices in an artifact.
///
/// # Errors
/// Those of importing the checkpoint.
pub fn sizes(source: &Path, targets: &Targets) -> Result<Sizes> {
    /// Code of one target; programs, graph and manifest of the model, and of each of its layers.
    const TARGET: u64 = 250_000;
    const MODEL: u64 = 100_000;
    const LAYER: u64 = 18_000;
    /// Some 30 kernels of 10 to 30 kB, as machine code or PTX; programs.
    const GPU: u64 = 900_000;
    let gpus = if targets.cuda.is_empty() { 0 } else { targets.cuda.len() as u64 + 1 };
    let imported = attar_import::open(source).map_err(|e| Error::new(Phase::Import, ErrorKind::Import(e)))?;
    let infos = || imported.weights.names().filter_map(|n| imported.weights.info(n).ok());
    let elements =
        infos().filter(|i| i.shape.len() > 1).map(|i| i.shape.iter().product::<usize>() as u64).sum();
    let vectors: u64 =
        infos().filter(|i| i.shape.len() == 1).map(|i| (i.shape[0] as u64 * 4).next_multiple_of(64)).sum();
    let tokenizer = imported.tokenizer_json.as_deref().map_or(0, attar_artifact::tokenizer_bytes);
    let template = imported.chat_template.as_ref().map_or(0, |t| t.len() as u64);
    let described =
        MODEL + LAYER * imported.model.layers as u64 + TARGET * targets.cpu.len() as u64 + GPU * gpus;
    Ok(Sizes { beside: vectors + tokenizer + template + described, elements })
}

/// What to compile, how, and where to.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// A folder with `config.json` and safetensors, or a `.gguf` file.
    pub source: PathBuf,
    /// What happens to the weights.
    pub recipe: Recipe,
    /// Code sections to make, see [`crate::resolve_targets`].
    pub targets: Vec<Target>,
    /// GPUs to make code for besides; with any, PTX is made too, for GPUs that come later.
    pub cuda: Vec<CudaTarget>,
    /// Folder in which compiled kernels for GPUs are kept; they take long.
    pub kernel_cache: Option<PathBuf>,
    /// The artifact; replaced when it exists, untouched when the compile fails.
    pub out: PathBuf,
    /// Element of cached keys and values; by default f32 when every weight is f32, and f16 otherwise.
    pub kv: Option<KvType>,
    /// What passes may know of activations; by default nothing.
    pub calibration: CalibrationOptions,
    /// Longest context in tokens; by default what the model was made for.
    pub context_length: Option<u32>,
    /// Folder for the graph's text before the first pass and after every one, and for the programs' text.
    pub emit_ir: Option<PathBuf>,
    /// Passes after which the graph's text goes to the caller.
    pub print_after: PrintAfter,
    /// Phase or pass after which to stop.
    pub stop_after: Option<String>,
    /// Rewrites allowed over all passes, to bisect.
    pub fuel: Fuel,
    /// Compile a model of this many layers and of the same shapes with made-up weights: what plans are measured on.
    pub sketch: Option<usize>,
    /// Threads to compile with; by default one per core. Never changes the artifact.
    pub threads: Option<usize>,
    /// Whether to go on from what an interrupted compile of the same inputs left beside the artifact; else it is forgotten.
    pub resume: bool,
    /// Most bytes that the artifact may have; a larger one is not put in its place.
    pub max_bytes: Option<u64>,
    /// Whether the artifact's quality is measured and written into it.
    pub certify: Certify,
    /// Plugins whose passes the recipe may name.
    pub plugins: Vec<Plugin>,
    /// Stops the compile when it is set: soon in passes of plugins, for others between tensors.
    pub cancel: Option<Arc<AtomicBool>>,
    /// Most windows of the text to measure.
    pub certify_windows: usize,
}

impl CompileOptions {
    /// Options with every choice left at its default.
    pub fn new(source: PathBuf, recipe: Recipe, targets: Vec<Target>, out: PathBuf) -> CompileOptions {
        CompileOptions {
            source,
            recipe,
            targets,
            cuda: Vec::new(),
            kernel_cache: None,
            out,
            kv: None,
            calibration: CalibrationOptions::new(CalibrationSource::None),
            context_length: None,
            emit_ir: None,
            print_after: PrintAfter::Nothing,
            stop_after: None,
            fuel: Fuel::UNLIMITED,
            sketch: None,
            threads: None,
            resume: true,
            max_bytes: None,
            certify: Certify::No,
            plugins: Vec::new(),
            cancel: None,
            certify_windows: DEFAULT_WINDOWS,
        }
    }
}

/// Runs something on that many threads; by default one per core.
///
/// # Errors
/// When there are no threads to be had; those of what is run.
pub(crate) fn with_threads<T: Send>(
    threads: Option<usize>,
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let Some(count) = threads else { return run() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
    let pool =
        pool.map_err(|e| Error::new(Phase::Import, ErrorKind::Threads { count, problem: e.to_string() }))?;
    pool.install(run)
}

/// Hears what happens, on whatever thread it happens.
type Listener<'a> = dyn FnMut(Event<'_>) + Send + 'a;

/// A checked set of options, ready to run.
#[derive(Debug)]
pub struct Session {
    options: CompileOptions,
    pipeline: Pipeline,
    stop: Option<Stop>,
    /// Present when there is to be code for GPUs.
    nvrtc: Option<Nvrtc>,
}

impl Session {
    /// Checks everything that can be checked without the model.
    ///
    /// # Errors
    /// For options that make no sense, with the flag and what would.
    pub fn new(options: CompileOptions) -> Result<Session> {
        let pipeline = Pipeline::new(&default_passes(), &options.recipe, &registry_with(&options.plugins)?)?;
        let stop = options.stop_after.as_deref().map(|s| Stop::parse(s, &pipeline)).transpose()?;
        if let PrintAfter::Passes(names) = &options.print_after {
            for name in names {
                if let Stop::Phase(phase) = Stop::parse(name, &pipeline)? {
                    let problem = format!("{phase} is a phase; name one of its passes");
                    return Err(Error::option("--print-after", problem));
                }
            }
        }
        if options.targets.is_empty() && options.cuda.is_empty() {
            return Err(Error::option("--target", "name at least one target"));
        }
        if options.sketch == Some(0) {
            return Err(Error::option("layers of a sketch", "must be 1 or more"));
        }
        if options.threads == Some(0) {
            return Err(Error::option("--threads", "must be 1 or more"));
        }
        certify::check(&options)?;
        options.calibration.check()?;
        // Before the work of compiling is done, not after.
        let nvrtc = if options.cuda.is_empty() { None } else { Some(Nvrtc::find().map_err(cuda)?) };
        Ok(Session { options, pipeline, stop, nvrtc })
    }

    /// Compiles. `listener` hears about phases, passes, progress and dumps.
    ///
    /// # Errors
    /// The first thing that went wrong; [`Error::family`] says whose fault it is.
    pub fn run(&self, listener: &mut Listener<'_>) -> Result<CompileReport> {
        with_threads(self.options.threads, || self.compile(listener))
    }

    fn compile(&self, listener: &mut Listener<'_>) -> Result<CompileReport> {
        let started = Instant::now();
        let mut clock = Clock::start(Phase::Import, listener);
        let imported = attar_import::open(&self.options.source).and_then(|model| match self.options.sketch {
            Some(layers) => model.into_sketch(layers),
            None => Ok(model),
        });
        let Imported { mut graph, mut weights, model, tokenizer_json, chat_template, source, .. } =
            imported.map_err(|e| Error::new(Phase::Import, ErrorKind::Import(e)))?;
        self.keep_inputs(&source.files)?;
        let inputs = if self.options.sketch.is_some() { Vec::new() } else { hash_files(&source.files)? };
        let context_length = self.context_length(&model)?;
        self.options.recipe.check_tensors(&graph)?;
        certify::check_text(&self.options, tokenizer_json.as_deref(), context_length)?;

        let subject = Calibrated {
            source: &self.options.source,
            info: &model,
            inputs: &inputs,
            tokenizer_json: tokenizer_json.as_deref(),
            chat_template: chat_template.as_deref(),
        };
        let partial = PartialResults::of(&self.options, &inputs);
        let journal = partial.as_ref().map(|p| p as &dyn attar_pass::Journal);
        let mut calibrator = DriverCalibrator::new(subject, &self.options.calibration, journal);
        let mut runner = GraphRunner::new(subject);
        let surroundings = Surroundings {
            calibrator: calibrator.as_mut().map(|c| c as &mut dyn attar_pass::Calibrator),
            journal,
            runner: Some(&mut runner),
            cancel: self.options.cancel.as_deref(),
        };
        let passes = self.run_passes(&mut graph, &mut weights, surroundings, &mut clock)?;
        let calibration = calibrator.and_then(|c| c.origin());
        let mut report = self.report(&model, inputs, context_length);
        report.passes = passes.passes.into_iter().map(Into::into).collect();
        report.metrics = passes.metrics;
        report.resumed_tensors = partial.as_ref().map_or(0, PartialResults::resumed);
        report.not_resumable = partial.as_ref().and_then(PartialResults::problem);
        if let Some(stop) = &self.stop
            && (passes.stopped || matches!(stop, Stop::Phase(p) if *p < Phase::Lower))
        {
            return Ok(clock.finish(report, self.options.stop_after.clone(), started));
        }

        clock.advance(Phase::Lower);
        let kv = self.options.kv.unwrap_or_else(|| default_kv(&graph));
        let lower_options = LowerOptions::new(kv);
        let lowered =
            lower(&graph, &lower_options).map_err(|e| Error::new(Phase::Lower, ErrorKind::Lower(e)))?;
        if lowered.ports.iter().any(|p| !p.inputs.is_empty() || !p.outputs.is_empty()) {
            let problem = "the graph takes more than tokens, positions and rows, or gives more than logits";
            return Err(Error::new(Phase::Lower, ErrorKind::Bug { problem: problem.to_owned() }));
        }
        describe_lowered(&lowered, &mut report);
        self.emit_text("lower.txt", &|| lowered.to_text())?;
        if self.stops_after(Phase::Lower) {
            return Ok(clock.finish(report, self.options.stop_after.clone(), started));
        }

        clock.advance(Phase::Emit);
        let code = self.emit(&lowered, &mut clock)?;
        let cuda = self.emit_cuda(&lowered, &mut clock)?;
        if self.stops_after(Phase::Emit) {
            return Ok(clock.finish(report, self.options.stop_after.clone(), started));
        }

        clock.advance(Phase::Package);
        let recipe = self.resolved_recipe(&report.inputs, kv, context_length, calibration)?;
        let contents = Contents {
            model: manifest_model(&model, &graph, context_length, &lower_options, &lowered),
            lowered: &lowered,
            weights: &weights,
            code: &code,
            cuda: &cuda,
            tokenizer: tokenizer_json.as_deref(),
            chat_template: chat_template.as_deref(),
            graph: &attar_ir::text::print(&graph),
            recipe: &recipe,
        };
        let mut progress = |what: &str, done, total| {
            clock.tell(Event::Progress { phase: Phase::Package, what, done, total })
        };
        let mut writer = package::write(&self.options.out, &contents, &mut progress)?;

        clock.advance(Phase::Certify);
        let artifact = |e| Error::new(Phase::Certify, ErrorKind::Artifact(e));
        let preview = writer.preview(crate::GENERATOR, contents.model.clone()).map_err(artifact)?;
        let subject =
            Subject { options: &self.options, path: &preview, kv: lower_options.kv, report: &report };
        match certify::certify(&subject, &mut clock)? {
            Ok(certificate) => {
                writer.add_certificate(&certificate).map_err(artifact)?;
                report.certificate = Some(certificate);
            }
            Err(Reason { reason, detail }) => {
                writer.set_uncertified(&reason);
                report.uncertified = Some(match detail {
                    Some(detail) => format!("{reason}: {detail}"),
                    None => reason,
                });
            }
        }
        if let Some(most) = self.options.max_bytes {
            let path = writer.preview(crate::GENERATOR, contents.model.clone()).map_err(artifact)?;
            let file = std::fs::metadata(&path);
            let bytes = file.map_err(|e| Error::io(Phase::Package, "read its size", &path, e))?.len();
            if bytes > most {
                let matrices = report.tensors.iter().filter(|t| t.shape.len() > 1).map(|t| t.bytes).sum();
                return Err(Error::new(Phase::Package, ErrorKind::TooLarge { bytes, most, matrices }));
            }
        }
        let (manifest, bytes) = writer.finish(crate::GENERATOR, contents.model).map_err(artifact)?;
        report.artifact_bytes = bytes;
        report.artifact_hash = Some(manifest_hash(&self.options.out)?);
        if let Some(partial) = &partial {
            partial.remove();
        }
        let section =
            |s: &attar_artifact::manifest::Section| SectionReport { name: s.kind.name(), bytes: s.len };
        report.sections = manifest.sections.iter().map(section).collect();
        Ok(clock.finish(report, None, started))
    }

    fn run_passes(
        &self,
        graph: &mut Graph,
        weights: &mut attar_ir::WeightStore,
        surroundings: Surroundings<'_>,
        clock: &mut Clock<'_, '_>,
    ) -> Result<Report> {
        if let Some(dir) = &self.options.emit_ir {
            std::fs::create_dir_all(dir)
                .map_err(|e| Error::io(Phase::Import, "create the folder", dir, e))?;
        }
        let all = self.options.emit_ir.is_some();
        let manager = Manager {
            print_after: if all { PrintAfter::All } else { self.options.print_after.clone() },
            fuel: self.options.fuel,
            stop_after: self.stop.clone(),
            ..Manager::default()
        };
        let mut failed: Option<Error> = None;
        let mut sink = |event: attar_pass::Event<'_>| match event {
            attar_pass::Event::Started { index, total, decl } => {
                clock.advance(decl.phase);
                clock.tell(Event::PassStarted { index, total, decl });
            }
            attar_pass::Event::Progress { decl, what, done, total } => {
                clock.tell(Event::Progress { phase: decl.phase, what, done, total });
            }
            attar_pass::Event::Note { decl, level, text } => clock.tell(Event::Note { decl, level, text }),
            attar_pass::Event::Finished(report) => clock.tell(Event::PassFinished(report)),
            attar_pass::Event::Dump(dump) => {
                let written = self.emit_text(&dump.file_name(), &|| dump.text.clone());
                failed = failed.take().or(written.err());
                let wanted = match &self.options.print_after {
                    PrintAfter::Nothing => false,
                    PrintAfter::Passes(names) => names.iter().any(|n| n == dump.name),
                    PrintAfter::All => true,
                };
                if wanted {
                    clock.tell(Event::Dump(&dump));
                }
            }
        };
        let report = manager.run_with(&self.pipeline, graph, weights, surroundings, &mut sink)?;
        match failed {
            Some(e) => Err(e),
            None => Ok(report),
        }
    }

    fn emit(&self, lowered: &Lowered, clock: &mut Clock<'_, '_>) -> Result<Vec<CodeBlob>> {
        let total = self.options.targets.len() as u64;
        let mut code = Vec::with_capacity(self.options.targets.len());
        for (done, target) in (0u64..).zip(&self.options.targets) {
            clock.tell(Event::Progress { phase: Phase::Emit, what: target.name(), done, total });
            let blob = compile_blob(*target, &lowered.specs);
            code.push(blob.map_err(|e| Error::new(Phase::Emit, ErrorKind::Codegen(e)))?);
        }
        Ok(code)
    }

    /// Code for GPUs. The sources go where the graph's text goes.
    fn emit_cuda(&self, lowered: &Lowered, clock: &mut Clock<'_, '_>) -> Result<CudaCode> {
        let Some(nvrtc) = &self.nvrtc else { return Ok(CudaCode::default()) };
        let translated = translate(&lowered.specs, &lowered.programs).map_err(cuda)?;
        if let Some(dir) = &self.options.emit_ir {
            let folder = dir.join("cuda");
            std::fs::create_dir_all(&folder)
                .map_err(|e| Error::io(Phase::Emit, "create the folder", &folder, e))?;
            for spec in &translated.kernels {
                let plain = emit(spec, CudaTarget::Ptx).map_err(cuda)?;
                self.emit_text(&format!("cuda/{}.cu", plain.name), &|| plain.source.clone())?;
                // What some target has of its own goes beside it.
                for target in &self.options.cuda {
                    let own = emit(spec, *target).map_err(cuda)?;
                    if own.source != plain.source {
                        self.emit_text(&format!("cuda/{}.{target}.cu", own.name), &|| own.source.clone())?;
                    }
                }
            }
        }
        let cache = self.options.kernel_cache.clone().map(Cache::new);
        let targets: Vec<CudaTarget> = self.options.cuda.iter().copied().chain([CudaTarget::Ptx]).collect();
        let total = (targets.len() * translated.kernels.len()) as u64;
        let mut blobs = Vec::with_capacity(targets.len());
        for (index, target) in targets.into_iter().enumerate() {
            let before = index * translated.kernels.len();
            let mut progress = |kernel: &str, done: usize| {
                let (what, done) = (format!("{} {kernel}", target.name()), (before + done) as u64);
                clock.tell(Event::Progress { phase: Phase::Emit, what: &what, done, total });
            };
            let blob = attar_codegen_cuda::compile(
                nvrtc,
                cache.as_ref(),
                &translated.kernels,
                target,
                &mut progress,
            );
            blobs.push(blob.map_err(cuda)?);
        }
        Ok(CudaCode { blobs, programs: translated.programs })
    }

    fn emit_text(&self, name: &str, text: &dyn Fn() -> String) -> Result<()> {
        let Some(dir) = &self.options.emit_ir else { return Ok(()) };
        let path = dir.join(name);
        std::fs::write(&path, text()).map_err(|e| Error::io(Phase::Lower, "write it", &path, e))
    }

    /// Refuses to put the artifact in the place of a file it is made from.
    fn keep_inputs(&self, files: &[attar_import::SourceFile]) -> Result<()> {
        let Ok(out) = self.options.out.canonicalize() else { return Ok(()) };
        match files.iter().find(|f| f.path.canonicalize().is_ok_and(|p| p == out)) {
            None => Ok(()),
            Some(f) => {
                let problem = format!("{} is part of the model; name another file", f.path.display());
                Err(Error::option("--output", problem))
            }
        }
    }

    fn stops_after(&self, phase: Phase) -> bool {
        self.stop == Some(Stop::Phase(phase))
    }

    fn context_length(&self, model: &ModelInfo) -> Result<u32> {
        let most = u32::try_from(model.context_length).unwrap_or(u32::MAX);
        match self.options.context_length {
            None => Ok(most),
            Some(asked) if (1..=most).contains(&asked) => Ok(asked),
            Some(asked) => {
                let problem = format!("{asked} is not within 1 to {most}, which the model was made for");
                Err(Error::option("--context", problem))
            }
        }
    }

    /// The recipe as it ran, and everything else the bytes depend on.
    fn resolved_recipe(
        &self,
        inputs: &[InputFile],
        kv: KvType,
        context: u32,
        calibration: Option<CalibrationOrigin>,
    ) -> Result<String> {
        let text = match &self.options.certify {
            Certify::No => None,
            Certify::BuiltIn => Some(None),
            Certify::Text { name, .. } => Some(Some(name.clone())),
        };
        let cpus = self.options.targets.iter().map(|t| t.name().to_owned());
        let origin = Origin {
            by: crate::GENERATOR.to_owned(),
            targets: cpus.chain(self.options.cuda.iter().map(|t| t.name())).collect(),
            nvrtc: self.nvrtc.as_ref().map(|n| format!("{}.{}", n.version().0, n.version().1)),
            kv,
            context,
            default_passes: default_passes().into_iter().map(str::to_owned).collect(),
            calibration,
            certificate: text.map(|text| CertificateOrigin { text, windows: self.options.certify_windows }),
            plugins: self.used_plugins(),
            inputs: inputs.to_vec(),
        };
        Ok(format!("{}\n{}", origin.to_toml()?, self.options.recipe.to_toml()))
    }

    /// Plugins a pass of which runs: the others leave no trace.
    fn used_plugins(&self) -> Vec<PluginOrigin> {
        let runs = |p: &&Plugin| {
            self.pipeline.steps.iter().any(|s| p.passes.iter().any(|d| std::ptr::eq(*d, s.decl)))
        };
        self.options.plugins.iter().filter(runs).map(PluginOrigin::of).collect()
    }

    fn report(&self, model: &ModelInfo, inputs: Vec<InputFile>, context_length: u32) -> CompileReport {
        CompileReport {
            generator: crate::GENERATOR.to_owned(),
            model: ModelReport {
                name: model.name.clone(),
                architecture: model.architecture.to_owned(),
                parameters: model.parameters,
                layers: model.layers,
                context_length: context_length as usize,
                tied_head: model.tied,
            },
            inputs,
            phases: Vec::new(),
            passes: Vec::new(),
            resumed_tensors: 0,
            not_resumable: None,
            metrics: Vec::new(),
            tensors: Vec::new(),
            formats: Vec::new(),
            sections: Vec::new(),
            kernels: 0,
            decode_launches: 0,
            artifact_bytes: 0,
            artifact_hash: None,
            certificate: None,
            uncertified: None,
            stopped_after: None,
            seconds: 0.0,
            peak_memory_bytes: None,
        }
    }
}

/// Measures phases, and tells the listener about them.
pub(crate) struct Clock<'a, 'b> {
    phase: Phase,
    since: Instant,
    done: Vec<PhaseReport>,
    listener: &'a mut Listener<'b>,
}

impl<'a, 'b> Clock<'a, 'b> {
    fn start(phase: Phase, listener: &'a mut Listener<'b>) -> Clock<'a, 'b> {
        listener(Event::PhaseStarted { phase });
        Clock { phase, since: Instant::now(), done: Vec::new(), listener }
    }

    pub(crate) fn tell(&mut self, event: Event<'_>) {
        (self.listener)(event);
    }

    /// Ends phases until `phase` is the current one; those without work in between take no time.
    fn advance(&mut self, phase: Phase) {
        for next in Phase::ALL.into_iter().filter(|p| *p > self.phase && *p <= phase).collect::<Vec<_>>() {
            self.close();
            (self.phase, self.since) = (next, Instant::now());
            self.tell(Event::PhaseStarted { phase: next });
        }
    }

    fn close(&mut self) {
        let (phase, time) = (self.phase, self.since.elapsed());
        self.done.push(PhaseReport::new(phase, time));
        self.tell(Event::PhaseFinished { phase, time });
    }

    fn finish(
        mut self,
        mut report: CompileReport,
        stopped_after: Option<String>,
        started: Instant,
    ) -> CompileReport {
        self.close();
        report.phases = self.done;
        report.stopped_after = stopped_after;
        report.seconds = started.elapsed().as_secs_f64();
        report.peak_memory_bytes = crate::memory::peak_bytes();
        report
    }
}

/// f32 when every weight matrix is f32: then the artifact computes what the checkpoint does to f32 accuracy.
fn default_kv(graph: &Graph) -> KvType {
    let compressed = |elem: Elem| matches!(elem, Elem::Coded(f) if *f != attar_format::formats::F32);
    let any = graph.ids().any(|id| matches!(graph.op(id), OpKind::Weight(w) if compressed(w.ty.elem)));
    if any { KvType::F16 } else { KvType::F32 }
}

fn describe_lowered(lowered: &Lowered, report: &mut CompileReport) {
    let tensor = |t: &attar_codegen_cpu::pack::PackedTensor| TensorReport {
        name: t.name.clone(),
        format: t.format_name(),
        shape: t.shape.clone(),
        bytes: t.len,
    };
    report.tensors = lowered.tensors.iter().map(tensor).collect();
    report.formats = by_format(&report.tensors);
    report.kernels = lowered.specs.len();
    let decode = lowered.programs.iter().find(|p| p.kind == ProgramKind::Decode);
    report.decode_launches = decode.map_or(0, |p| p.launches.len());
}

fn manifest_model(
    info: &ModelInfo,
    graph: &Graph,
    context_length: u32,
    options: &LowerOptions,
    lowered: &Lowered,
) -> Model {
    // Passes may have removed layers; caches are made for those that are left.
    let caches = graph.ids().filter_map(|id| match graph.op(id) {
        OpKind::Attention(attention) => Some(attention.layer as u32 + 1),
        _ => None,
    });
    Model {
        name: info.name.clone(),
        architecture: info.architecture.to_owned(),
        layers: caches.max().unwrap_or(info.layers as u32),
        hidden: info.hidden as u32,
        heads: info.heads as u32,
        kv_heads: info.kv_heads as u32,
        head_dim: info.head_dim as u32,
        vocab: info.vocab as u32,
        context_length,
        parameters: info.parameters,
        rope: lowered.rope.clone(),
        kv: KvSpec { dtype: options.kv, page_len: options.page_len, span: options.span },
        eos: info.eos.clone(),
        bos: info.bos,
    }
}

fn cuda(e: attar_codegen_cuda::Error) -> Error {
    Error::new(Phase::Emit, ErrorKind::Cuda(e))
}

/// Opens what was written as any reader would, which also proves that it can be read.
fn manifest_hash(path: &Path) -> Result<String> {
    let opened = Artifact::open(path, Verify::None);
    let artifact = opened.map_err(|e| Error::new(Phase::Package, ErrorKind::Artifact(e)))?;
    Ok(artifact.manifest_hash())
}
