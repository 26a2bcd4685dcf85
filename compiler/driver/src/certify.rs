//! Certification: the artifact that was just packaged is compared with the uncompressed model on held-out text.
//!
//! It runs the kernels that users run, on the best target of the artifact that this machine supports. The reference is the
//! same checkpoint compiled with weights that keep all it holds, f32 activations and an f32 cache, into a temporary
//! artifact. What is measured depends on the artifact, the text and the target, not on time or threads.

use crate::calibrate::CalibrationSource;
use crate::error::{Error, ErrorKind, Result};
use crate::evaluate::{self, Comparison, Windows};
use crate::events::Event;
use crate::report::CompileReport;
use crate::session::{Clock, CompileOptions, Session, registry};
use attar_artifact::certificate::{Certificate, Reported, ReportedValue, TensorError, Text, VERSION, round};
use attar_artifact::manifest::{KvType, Manifest};
use attar_codegen_cpu::Target;
use attar_pass::{Family, MetricValue, Phase, Preset, Recipe};
use attar_runtime::{DeviceChoice, ErrorKind as RunError, Model, OpenOptions, Tokenizer};
use std::collections::BTreeMap;
use std::path::Path;
use std::slice;

/// Whether an artifact gets a certificate, and on which text.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Certify {
    /// It gets none; the manifest says that none was asked for.
    #[default]
    No,
    /// On [`HELD_OUT_TEXT`]. Where that cannot be, because no code of the artifact runs on this machine, or the model has no
    /// tokenizer, the manifest says why.
    BuiltIn,
    /// On this text. It is an error when that cannot be.
    Text {
        /// For people, and in the artifact: no path.
        name: String,
        text: String,
    },
}

/// Text that certificates are measured on by default: prose, instructions, dialogue and code, written for this purpose, so
/// that no model has been trained or calibrated on it.
pub const HELD_OUT_TEXT: &str = include_str!("held_out_text.txt");
/// Name of [`HELD_OUT_TEXT`] in certificates; another text needs another name.
const HELD_OUT_NAME: &str = "attar held-out text 1";
/// Tokens of a window, where the model's context is as long.
const CONTEXT: usize = 512;
/// Windows measured when the options do not say.
pub const DEFAULT_WINDOWS: usize = 8;
/// Shortest context that a certificate makes sense for.
const SHORTEST: usize = 16;

/// What came of it: a certificate, or why there is none.
pub(crate) type Outcome = std::result::Result<Certificate, Reason>;

/// Why an artifact has no certificate.
pub(crate) struct Reason {
    /// Goes into the artifact, and so holds nothing of the machine.
    pub(crate) reason: String,
    /// For the report alone.
    pub(crate) detail: Option<String>,
}

impl Reason {
    fn plain(reason: &str) -> Reason {
        Reason { reason: reason.to_owned(), detail: None }
    }
}

/// What a certificate says depends on the artifact's targets for CPUs alone.
fn on_cpu() -> OpenOptions {
    OpenOptions { device: DeviceChoice::Cpu, ..OpenOptions::default() }
}

/// What is to be certified.
pub(crate) struct Subject<'a> {
    pub(crate) options: &'a CompileOptions,
    /// The artifact, complete but for its certificate.
    pub(crate) path: &'a Path,
    pub(crate) kv: KvType,
    pub(crate) report: &'a CompileReport,
}

/// Refuses before the compile what could not be certified after it.
///
/// # Errors
/// A text was given but no target runs here, or it is the one that the model is calibrated on.
pub(crate) fn check(options: &CompileOptions) -> Result<()> {
    if options.certify_windows == 0 {
        return Err(Error::option("--certify-windows", "must be 1 or more"));
    }
    if matches!(options.certify, Certify::Text { .. }) && !options.targets.iter().any(|t| t.runs_here()) {
        let names: Vec<&str> = options.targets.iter().map(|t| t.name()).collect();
        let problem = format!(
            "no code for {} runs on this machine, so nothing can be measured; add --target native, or leave it out",
            names.join(", ")
        );
        return Err(Error::option("--certify", problem));
    }
    // A file that cannot be read is calibration's affair to tell.
    if let (Certify::Text { name, text }, CalibrationSource::File(path)) =
        (&options.certify, &options.calibration.source)
        && std::fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes())
    {
        let problem = format!(
            "{name} is also what the model is calibrated on, so it would say too little of other texts; give another"
        );
        return Err(Error::option("--certify", problem));
    }
    Ok(())
}

/// Refuses a text of the user's that is too short, before the work of compiling is done.
///
/// # Errors
/// When the model's tokenizer makes less than a window of it, or cannot read it.
pub(crate) fn check_text(
    options: &CompileOptions,
    tokenizer: Option<&str>,
    context_length: u32,
) -> Result<()> {
    let Certify::Text { name, text } = &options.certify else { return Ok(()) };
    let windows = || -> evaluate::Result<Windows> {
        let missing = RunError::Missing { what: "tokenizer", hint: " from a folder that has one" };
        let tokenizer = Tokenizer::from_json(tokenizer.ok_or(attar_runtime::Error::from(missing))?)?;
        Windows::of(&tokenizer, text, window(context_length)?, Some(options.certify_windows))
    };
    match windows() {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::option("--certify", format!("{name}: {e}"))),
    }
}

/// Measures the artifact.
///
/// # Errors
/// Those of compiling and running the reference; with a text of the user's, also when that text or this model cannot be
/// measured.
pub(crate) fn certify(subject: &Subject<'_>, clock: &mut Clock<'_, '_>) -> Result<Outcome> {
    let options = subject.options;
    let (name, text, given) = match &options.certify {
        Certify::No => return Ok(Err(Reason::plain("none was asked for"))),
        Certify::BuiltIn => (HELD_OUT_NAME, HELD_OUT_TEXT, false),
        Certify::Text { name, text } => (name.as_str(), text.as_str(), true),
    };
    if !options.targets.iter().any(|t| t.runs_here()) {
        return Ok(Err(Reason::plain("no code of the artifact runs on the machine that compiled it")));
    }
    match measure(subject, text, clock) {
        Ok((tokens, target, reference, comparison)) => {
            let text = Text {
                name: name.to_owned(),
                blake3: blake3::hash(text.as_bytes()).to_hex().to_string(),
                bytes: text.len() as u64,
                tokens,
            };
            Ok(Ok(certificate(subject.report, text, target, &reference, &comparison)))
        }
        // A model that cannot read text at all can still be compiled.
        Err(e) if !given && unmeasurable(&e) => Ok(Err(Reason::plain(&e.to_string()))),
        // Nor shall a large one be lost because the uncompressed one does not fit beside it.
        Err(e) if !given && e.family() == Family::Environment => {
            let reason = "the uncompressed model could not be run on the machine that compiled it".to_owned();
            Ok(Err(Reason { reason, detail: Some(e.to_string()) }))
        }
        Err(e) => Err(e),
    }
}

/// Whether the model, rather than Attar or the machine, is why it could not be measured.
fn unmeasurable(e: &Error) -> bool {
    matches!(&*e.kind, ErrorKind::Evaluate(e) if !e.is_environment())
}

fn measure(
    subject: &Subject<'_>,
    text: &str,
    clock: &mut Clock<'_, '_>,
) -> Result<(u64, String, String, Comparison)> {
    let options = subject.options;
    let fail = |e: evaluate::Error| Error::new(Phase::Certify, ErrorKind::Evaluate(e));
    let model = open(subject.path, options).map_err(fail)?;
    let manifest = model.manifest();
    let context = window(manifest.model.context_length).map_err(fail)?;
    let windows = Windows::new(&model, text, context, Some(options.certify_windows)).map_err(fail)?;
    let (preset, reference) = if is_exact(manifest, subject.kv) {
        // Nothing was compressed: it is its own reference.
        (Preset::F32, model.clone())
    } else {
        reference(options, &model, clock)?
    };
    let total = windows.count() as u64;
    let mut progress = |done: usize, _: &[f64]| {
        clock.tell(Event::Progress { phase: Phase::Certify, what: "windows", done: done as u64, total });
    };
    progress(0, &[]);
    let mut compared =
        evaluate::compare(slice::from_ref(&model), &reference, &windows, progress).map_err(fail)?;
    let comparison = compared.remove(0);
    Ok((windows.tokens().len() as u64, model.target().to_owned(), preset.name(), comparison))
}

/// Tokens of a window for a model of that context.
fn window(context_length: u32) -> evaluate::Result<usize> {
    let most = context_length as usize;
    let context = CONTEXT.min(most - most % 2);
    if context < SHORTEST { Err(evaluate::Error::Context { context }) } else { Ok(context) }
}

fn open(path: &Path, options: &CompileOptions) -> evaluate::Result<Model> {
    // Mapped, so that the system may drop what is not being read: a compile needs no memory for the whole model.
    let open = OpenOptions { threads: options.threads, mmap: true, ..on_cpu() };
    Ok(Model::open(path, &open)?)
}

fn is_exact(manifest: &Manifest, kv: KvType) -> bool {
    kv == KvType::F32 && manifest.tensors.iter().all(|t| t.format == "f32")
}

/// The same checkpoint with weights that keep all it holds.
fn reference(options: &CompileOptions, model: &Model, clock: &mut Clock<'_, '_>) -> Result<(Preset, Model)> {
    let preset = reference_preset(&options.source)?;
    let bug = |problem: String| Error::new(Phase::Certify, ErrorKind::Bug { problem });
    let recipe = Recipe::parse(&preset.recipe(), &preset.name(), &registry()?)?;
    // Where prompts have kernels of less exact arithmetic, the reference uses those of the level below.
    let measured = Target::by_name(model.target());
    let target = measured
        .and_then(|m| {
            let mut able = Target::ALL.into_iter().filter(|t| t.arch() == m.arch() && t.runs_here());
            if m.prefill_differs() { able.rfind(|t| !t.prefill_differs()) } else { Some(m) }
        })
        .ok_or_else(|| bug(format!("no target for a reference of {}", model.target())))?;
    let beside = match options.out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = tempfile::Builder::new()
        .prefix(".attar-reference-")
        .tempdir_in(beside)
        .map_err(|e| Error::io(Phase::Certify, "make a folder for the reference model in it", beside, e))?;
    let path = folder.path().join("reference.attar");
    let compile = CompileOptions {
        kv: Some(KvType::F32),
        context_length: Some(model.manifest().model.context_length),
        ..CompileOptions::new(options.source.clone(), recipe, vec![target], path.clone())
    };
    let total = Phase::ALL.len() as u64;
    Session::new(compile)?.run(&mut |event| {
        if let Event::PhaseStarted { phase } = event {
            let what = format!("reference model, {phase}");
            clock.tell(Event::Progress { phase: Phase::Certify, what: &what, done: phase as u64, total });
        }
    })?;
    let opened = open(&path, options);
    let reference = opened.map_err(|e| Error::new(Phase::Certify, ErrorKind::Evaluate(e)))?;
    // It stays mapped without its name, and so leaves nothing behind however the compile ends.
    if cfg!(unix) {
        folder
            .close()
            .map_err(|e| Error::io(Phase::Certify, "remove the reference model from it", beside, e))?;
    }
    Ok((preset, reference))
}

/// bf16 when no matrix of the checkpoint holds more, else f32.
fn reference_preset(source: &Path) -> Result<Preset> {
    let imported =
        attar_import::open(source).map_err(|e| Error::new(Phase::Certify, ErrorKind::Import(e)))?;
    let weights = &imported.weights;
    let mut matrices = weights.names().filter_map(|n| weights.info(n).ok()).filter(|i| i.shape.len() > 1);
    Ok(if matrices.all(|i| i.stored_as.eq_ignore_ascii_case("bf16")) { Preset::BF16 } else { Preset::F32 })
}

fn certificate(
    report: &CompileReport,
    text: Text,
    target: String,
    reference: &str,
    comparison: &Comparison,
) -> Certificate {
    let weights: u64 = report.formats.iter().map(|f| f.weights).sum();
    let weight_bytes: u64 = report.formats.iter().map(|f| f.bytes).sum();
    Certificate {
        version: VERSION,
        reference: reference.to_owned(),
        target,
        text,
        context: comparison.context,
        windows: comparison.windows,
        quality: comparison.quality.rounded(),
        weight_bytes,
        bits_per_weight: round(weight_bytes as f64 * 8.0 / weights.max(1) as f64),
        tensors: tensor_errors(report),
        reported: reported(report),
    }
}

/// What passes of plugins measured.
fn reported(report: &CompileReport) -> Vec<Reported> {
    let value = |value: &MetricValue| match value {
        MetricValue::Count(n) => ReportedValue::Count(*n),
        MetricValue::Number(x) => ReportedValue::Number(round(*x)),
        MetricValue::Text(text) => ReportedValue::Text(text.clone()),
    };
    let record = |m: &attar_pass::Metric| Reported {
        pass: m.pass.clone(),
        subject: m.subject.clone(),
        values: m.values.iter().map(|(name, v)| (name.to_string(), value(v))).collect(),
    };
    report.metrics.iter().filter(|m| m.certified).map(record).collect()
}

/// What passes measured about tensors; of one that several passes changed, what the last one did.
fn tensor_errors(report: &CompileReport) -> Vec<TensorError> {
    let number = |value: Option<&MetricValue>| match value {
        Some(MetricValue::Number(x)) => Some(round(*x)),
        Some(MetricValue::Count(n)) => Some(*n as f64),
        _ => None,
    };
    let mut errors = BTreeMap::new();
    for metric in &report.metrics {
        let (Some(MetricValue::Text(format)), Some(relative_error), Some(bits_per_weight)) = (
            metric.values.get("format"),
            number(metric.values.get("relative_rmse")),
            number(metric.values.get("bits_per_weight")),
        ) else {
            continue;
        };
        let (name, format) = (metric.subject.clone(), format.clone());
        let error =
            TensorError { name: name.clone(), format, bits_per_weight, relative_error, sensitivity: None };
        errors.insert(name, error);
    }
    for metric in &report.metrics {
        if let (Some(error), Some(sensitivity)) =
            (errors.get_mut(&metric.subject), number(metric.values.get("sensitivity")))
        {
            error.sensitivity = Some(sensitivity);
        }
    }
    errors.into_values().collect()
}
