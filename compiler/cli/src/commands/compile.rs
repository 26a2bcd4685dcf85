//! `attar compile MODEL`: a checkpoint becomes one artifact.

use crate::calibration::CalibrationArgs;
use crate::commands::run::read_text;
use crate::failure::{Failure, Result};
use crate::home::Home;
use crate::interrupt::{passes_ended, stop_passes_on_ctrl_c};
use crate::model::find_checkpoint;
use crate::plugins::{PluginArgs, joined, steps};
use crate::quality;
use crate::remake;
use crate::terminal::{Terminal, bytes_text, seconds_text, table};
use attar_artifact::manifest::KvType;
use attar_compiler::{
    Again, CalibrationSource, Certify, CompileOptions, CompileReport, DEFAULT_WINDOWS, Event, Family, Phase,
    Plugin, Remake, Session, Sizes, registry, registry_with, resolve_all_targets, sizes,
};
use attar_pass::{Fuel, MetricValue, NoteLevel, Preset, PrintAfter, Recipe};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("weights"))]
#[command(
    after_help = "MODEL is a folder with config.json and safetensors, a .gguf file, or a name that was pulled.

--quantize: f32 and bf16 keep the weights; w8 takes 8.5 bits per weight; n4 takes 4.25 for the layers, with embedding
and head at w8; codes of n2 to n6 are chosen by calibration, see --calibrate. --max-bytes and --max-kld choose a format
for every matrix, and print what each choice is worth. A recipe (TOML) says it tensor by tensor; `attar passes` lists what it may name.

The artifact just made is compared with the uncompressed model on a text that comes with Attar, or on another one
(--certify); the result goes into the artifact as its certificate, which `attar inspect` shows and --require of other
commands checks. That takes seconds for a small model and needs disk for the uncompressed one beside the artifact.

A compile that was interrupted goes on where it stopped when it is started again with the same checkpoint, recipe and calibration:
until the artifact is there, codes already chosen are kept in a folder beside it, OUTPUT.partial.

Phases: import, canonicalize, compress, fuse, lower, emit, package, certify.

Examples:
  attar compile smollm2-135m --quantize n4 -o smollm2.attar
  attar compile ./Qwen3-0.6B --quantize w8 --target native,aarch64+dotprod -o qwen3.attar
  attar compile smollm2-135m --quantize n4 --target native,cuda:sm_90a -o smollm2.attar
  attar compile model.gguf --recipe recipe.toml -o model.attar --json
  attar compile smollm2-135m --quantize n4 --certify wiki.valid.txt --certify-windows 40 -o smollm2.attar
  attar compile smollm2-135m --quantize n4 --no-certify -o smollm2.attar
  attar compile smollm2-135m --max-bytes 84MB --calibrate mixed.txt -o smollm2.attar
  attar compile smollm2-135m --from smollm2.attar --check
  attar compile smollm2-135m --plugin ./libmine.so --pass mine=strength:0.5 --quantize n4 -o smollm2.attar
  attar compile smollm2-135m --quantize n4 --stop-after fuse --emit-ir ir/"
)]
pub struct Compile {
    /// The checkpoint
    model: String,
    /// What happens to the weights: a format of the layers, or two with that of embedding and head, as in n4/n6
    #[arg(long, value_name = "FORMAT", group = "weights", value_parser = preset)]
    quantize: Option<Preset>,
    /// A file that says which passes run on which tensors
    #[arg(long, value_name = "FILE", group = "weights")]
    recipe: Option<PathBuf>,
    /// Give every matrix the format that serves the model best in a file of at most so many bytes, e.g. 84MB
    #[arg(long, value_name = "BYTES", group = "weights", value_parser = decimal_bytes)]
    max_bytes: Option<u64>,
    /// The same with the smallest file whose divergence from the uncompressed model is foretold to be at most this
    #[arg(long, value_name = "NATS", group = "weights")]
    max_kld: Option<f64>,
    /// Run this pass before what the recipe or preset says; OPTIONS are `option:value`, `tensors:GLOB`, with commas between
    #[arg(long = "pass", value_name = "NAME[=OPTIONS]")]
    passes: Vec<String>,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Make this artifact again: its recipe, targets, context and cache, with MODEL as the checkpoint
    #[arg(long, value_name = "ARTIFACT", group = "weights", conflicts_with_all = ["target", "context", "kv",
        "calibration_windows", "calibration_context", "certify_windows", "no_certify", "stop_after", "passes"])]
    from: Option<PathBuf>,
    /// Compare the bytes with those of --from, and write nothing
    #[arg(long, requires = "from", conflicts_with = "output")]
    check: bool,
    #[command(flatten)]
    text: CalibrationArgs,
    /// Statistics of `attar calibrate` instead of text
    #[arg(long, value_name = "FILE", conflicts_with = "calibrate")]
    calibration: Option<PathBuf>,
    /// What to make code for: native, all, x86-64-v2, x86-64-v3, aarch64, aarch64+dotprod, riscv64; GPUs as cuda:sm_90a,
    /// cuda:sm_80 or cuda, which is both
    #[arg(long, value_name = "TARGETS", value_delimiter = ',', default_value = "native")]
    target: Vec<String>,
    /// The artifact to write
    #[arg(long, short, value_name = "FILE", required_unless_present_any = ["stop_after", "check"])]
    output: Option<PathBuf>,
    /// Longest context in tokens (default: what the model was made for)
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// Element of cached keys and values (default: f32 when all weights are f32, else f16)
    ///
    /// int8 and int4 take a half and a quarter of the memory of f16. int8 costs next to nothing; what
    /// int4 costs says docs/quality.md.
    #[arg(long, value_name = "TYPE")]
    kv: Option<Kv>,
    /// Threads to compile with; never changes the artifact
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Forget what an interrupted compile of the same inputs left beside the artifact, and begin anew
    #[arg(long)]
    no_resume: bool,
    /// Measure the certificate on this text instead of the built-in one
    #[arg(long, value_name = "FILE", conflicts_with = "no_certify")]
    certify: Option<PathBuf>,
    /// Most windows of 512 tokens that the certificate is measured on
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WINDOWS)]
    certify_windows: usize,
    /// Make no certificate; the artifact says so
    #[arg(long)]
    no_certify: bool,
    /// Write the graph's text after every pass, and the programs, into this folder
    #[arg(long, value_name = "DIR")]
    emit_ir: Option<PathBuf>,
    /// Stop after this phase or pass
    #[arg(long, value_name = "PHASE")]
    stop_after: Option<String>,
    /// Print the graph's text after these passes (`all`: after every one)
    #[arg(long, value_name = "PASS", value_delimiter = ',')]
    print_after: Vec<String>,
    /// Allow only so many rewrites, to find the one that breaks something
    #[arg(long, value_name = "N")]
    fuel: Option<u64>,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

/// Values of `--kv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    F32,
    F16,
    Int8,
    Int4,
}

impl Kv {
    /// The element behind the name.
    pub fn element(self) -> KvType {
        match self {
            Kv::F32 => KvType::F32,
            Kv::F16 => KvType::F16,
            Kv::Int8 => KvType::Int8,
            Kv::Int4 => KvType::Int4,
        }
    }
}

/// Bits per weight from which a budget begins with smoothing: with more bits, more of the error comes from rounded activations, which
/// it helps, and less from weights, which it may not. Between two sizes that were measured (docs/quality.md).
const SMOOTHED_BITS: f64 = 4.5;

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    /// `None` when the compile was asked to stop early.
    artifact: Option<&'a PathBuf>,
    #[serde(flatten)]
    report: &'a CompileReport,
}

impl Compile {
    /// Compiles and reports.
    ///
    /// # Errors
    /// Those of the compiler.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let source = find_checkpoint(&self.model)?;
        let targets = resolve_all_targets(&self.target)?;
        let output = self.output.clone().unwrap_or_else(|| PathBuf::from("model.attar"));
        let plugins = self.plugins.load(terminal)?;
        if let Some(from) = &self.from {
            return self.run_again(from, source, output, plugins, terminal);
        }
        let mut calibration = self.text.options();
        if let Some(saved) = &self.calibration {
            calibration.source = CalibrationSource::Saved(saved.clone());
        }
        let recipe = self.recipe(calibration.source != CalibrationSource::None, &plugins)?;
        let mut options = CompileOptions::new(source, recipe, targets.cpu, output);
        options.cuda = targets.cuda;
        options.kernel_cache = kernel_cache();
        options.calibration = calibration;
        options.plugins = plugins;
        options.context_length = self.context;
        options.kv = self.kv.map(Kv::element);
        options.threads = self.threads;
        options.resume = !self.no_resume;
        options.max_bytes = self.max_bytes;
        options.certify = self.certify()?;
        options.certify_windows = self.certify_windows;
        options.emit_ir.clone_from(&self.emit_ir);
        options.stop_after.clone_from(&self.stop_after);
        options.fuel = self.fuel.map_or(Fuel::UNLIMITED, Fuel::limited);
        options.print_after = match self.print_after.as_slice() {
            [] => PrintAfter::Nothing,
            [all] if all == "all" => PrintAfter::All,
            names => PrintAfter::Passes(names.to_vec()),
        };
        let report = compile(options.clone(), terminal, self.json)?;
        let artifact = report.stopped_after.is_none().then_some(&options.out);
        if self.json {
            return terminal.json(&Report { artifact, report: &report });
        }
        terminal.line(render(&report))?;
        match (artifact, &report.stopped_after) {
            (Some(path), _) => terminal.line(format_args!("wrote {}", path.display())),
            (None, Some(phase)) => terminal.line(format_args!("stopped after {phase}; nothing was written")),
            (None, None) => Ok(()),
        }
    }

    /// The recipe that shares a budget out.
    fn budget(&self) -> Result<Recipe> {
        let mut bits = 0.0;
        let option = match (self.max_bytes, self.max_kld) {
            (Some(file), _) => {
                let Sizes { beside, elements } =
                    sizes(&find_checkpoint(&self.model)?, &resolve_all_targets(&self.target)?)?;
                let left = file.checked_sub(beside).filter(|left| *left > 0).ok_or_else(|| {
                    let (asked, least) = (bytes_text(file), bytes_text(beside));
                    Failure::input(format!(
                        "--max-bytes {asked}: tokenizer, code and vectors alone take about {least}"
                    ))
                })?;
                bits = 8.0 * left as f64 / elements.max(1) as f64;
                format!("max_bytes = {left}")
            }
            (None, Some(kld)) if kld.is_finite() && kld > 0.0 => format!("max_kld = {kld:?}"),
            (None, Some(kld)) => {
                return Err(Failure::input(format!("--max-kld {kld}: expected a number above 0")));
            }
            (None, None) => {
                return Err(Failure::input("give --quantize, --recipe, --max-bytes, --max-kld or --pass"));
            }
        };
        Ok(Recipe::parse(&recipe_of_budget(&option, bits), "the budget", &registry()?)?)
    }

    fn run_again(
        &self,
        from: &Path,
        source: PathBuf,
        output: PathBuf,
        plugins: Vec<Plugin>,
        terminal: Terminal,
    ) -> Result<()> {
        let folder = if self.check { Some(tempfile::tempdir()?) } else { None };
        let output = folder.as_ref().map_or(output, |f| f.path().join("again.attar"));
        let text = match self.text.options().source {
            CalibrationSource::File(file) => Some(file),
            _ => None,
        };
        let certify = match self.certify()? {
            Certify::Text { name, text } => Some((name, text)),
            _ => None,
        };
        let again = Again { calibration: self.calibration.clone().or(text), certify, plugins };
        let Remake { mut options, origin } =
            remake::options(from, source, output.clone(), again, self.check, terminal)?;
        options.threads = self.threads;
        options.kernel_cache = kernel_cache();
        options.resume = !self.no_resume;
        options.calibration.max_memory = self.text.options().max_memory;
        options.emit_ir.clone_from(&self.emit_ir);
        let report = compile(options, terminal, self.json)?;
        let artifact = (!self.check).then_some(&output);
        if self.check {
            let same = remake::compare(from, &report, &output, &origin)?;
            if !self.json {
                return terminal.line(same);
            }
            terminal.note(same);
        }
        if self.json {
            return terminal.json(&Report { artifact, report: &report });
        }
        terminal.line(render(&report))?;
        terminal.line(format_args!("wrote {}", output.display()))
    }

    fn certify(&self) -> Result<Certify> {
        match &self.certify {
            _ if self.no_certify || self.stop_after.is_some() => Ok(Certify::No),
            None => Ok(Certify::BuiltIn),
            Some(file) => {
                let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
                Ok(Certify::Text { name, text: read_text(file)? })
            }
        }
    }

    fn recipe(&self, calibrated: bool, plugins: &[Plugin]) -> Result<Recipe> {
        let passes = steps(&self.passes, plugins)?;
        let rest = match (&self.recipe, self.quantize) {
            (Some(file), _) => {
                let text = read_text(file)?;
                Recipe::parse(&text, &file.display().to_string(), &registry_with(plugins)?)?
            }
            (None, Some(q)) if calibrated => recipe_of(q, &q.calibrated_recipe())?,
            (None, Some(q)) => preset_recipe(q)?,
            (None, None) if self.max_bytes.is_none() && self.max_kld.is_none() && !self.passes.is_empty() => {
                Recipe::default()
            }
            (None, None) => self.budget()?,
        };
        Ok(joined(passes, rest))
    }
}

fn preset(text: &str) -> std::result::Result<Preset, String> {
    Preset::by_name(text).map_err(|e| e.to_string())
}

/// The recipe of a budget, of so many bits per weight where that is known.
fn recipe_of_budget(option: &str, bits: f64) -> String {
    let smooth = if bits >= SMOOTHED_BITS { "[[pass]]\nname = \"smooth-activations\"\n\n" } else { "" };
    format!("{smooth}[[pass]]\nname = \"quantize-mixed\"\n{option}\n")
}

/// `84MB`, `1.5GB`, `900kB`, or plain bytes; decimal, as files are listed.
fn decimal_bytes(text: &str) -> std::result::Result<u64, String> {
    let expected = || "expected bytes, with kB, MB or GB if you like, such as 84MB".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        _ => return Err(expected()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| expected())?;
    let bytes = number * unit;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(expected()) }
}

/// The recipe of a preset that knows nothing of activations.
///
/// # Errors
/// A bug when the preset's own text does not parse.
pub fn preset_recipe(preset: Preset) -> Result<Recipe> {
    recipe_of(preset, &preset.recipe())
}

fn recipe_of(preset: Preset, text: &str) -> Result<Recipe> {
    let parsed = Recipe::parse(text, &preset.name(), &registry()?);
    parsed.map_err(|e| Failure::bug(format!("preset {}: {e}", preset.name())))
}

/// Compiles with a progress bar. Dumps go to standard output, or to standard error when that is for JSON.
///
/// # Errors
/// Those of the compiler; a bug leaves the guilty graph in a file.
pub fn compile(mut options: CompileOptions, terminal: Terminal, json: bool) -> Result<CompileReport> {
    let cancel = Arc::new(AtomicBool::new(false));
    options.cancel = Some(cancel.clone());
    let session = Session::new(options)?;
    stop_passes_on_ctrl_c(&cancel)?;
    let bar = terminal.spinner("starting");
    let mut pace = Pace::default();
    let dumps_failed = Mutex::new(None);
    let result = session.run(&mut |event| match event {
        Event::PhaseStarted { phase } => {
            if phase == Phase::Lower {
                passes_ended();
            }
            bar.set_message(phase.name());
        }
        Event::Note { decl, level, text } if level != NoteLevel::Debug => {
            bar.suspend(|| terminal.note(format!("{}: {text}", decl.name)));
        }
        Event::PassStarted { index, total, decl } => {
            pace = Pace::default();
            bar.set_message(format!("{}: {} ({index} of {total})", decl.phase, decl.name));
        }
        Event::Progress { phase, what, done, total } => {
            bar.set_message(format!("{}{}", progress_text(phase, what, done, total), pace.left(done, total)));
        }
        Event::Dump(dump) => {
            let text = format!("; after {}\n{}", dump.name, dump.text);
            let written = if json {
                terminal.note(text);
                Ok(())
            } else {
                bar.suspend(|| terminal.line(text))
            };
            if let (Err(e), Ok(mut slot)) = (written, dumps_failed.lock()) {
                *slot = Some(e);
            }
        }
        _ => {}
    });
    passes_ended();
    bar.finish_and_clear();
    if let Ok(Some(e)) = dumps_failed.into_inner() {
        return Err(e);
    }
    result.map_err(|e| {
        let air = e.air().filter(|_| e.family() == Family::Bug).map(str::to_owned);
        let failure = Failure::from(e);
        match air.and_then(keep_air) {
            Some(path) => failure.context(format!("the graph that shows it is in {}", path.display())),
            None => failure,
        }
    })
}

/// How fast a pass works, and so how long it will go on.
#[derive(Debug)]
struct Pace {
    since: Instant,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { since: Instant::now() }
    }
}

impl Pace {
    /// The time left in words; nothing while there is no telling, or not worth it.
    fn left(&mut self, done: u64, total: u64) -> String {
        if done == 0 {
            // What comes before the first step is no measure of the others.
            self.since = Instant::now();
            return String::new();
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let left = seconds * total.saturating_sub(done) as f64 / done as f64;
        match left {
            _ if seconds < 3.0 || left < 3.0 => String::new(),
            0.0..90.0 => format!(", about {left:.0} s left"),
            _ => format!(", about {:.0} min left", left / 60.0),
        }
    }
}

fn progress_text(phase: Phase, what: &str, done: u64, total: u64) -> String {
    match phase {
        Phase::Package => format!("{phase}: {} of {}", bytes_text(done), bytes_text(total)),
        _ => format!("{phase}: {what} ({done} of {total})"),
    }
}

/// Writes the `.air` text of a bug where the user finds it.
fn keep_air(text: String) -> Option<PathBuf> {
    let mut file = tempfile::Builder::new().prefix("attar-bug-").suffix(".air").tempfile().ok()?;
    std::io::Write::write_all(&mut file, text.as_bytes()).ok()?;
    file.keep().ok().map(|(_, path)| path)
}

/// What `quantize-mixed` chose, and why.
fn choices(r: &CompileReport) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for m in r.metrics.iter().filter(|m| m.values.contains_key("why")) {
        let format = r.metrics.iter().find(|o| o.subject == m.subject && o.values.contains_key("format"));
        let text = |of: Option<&MetricValue>| match of {
            Some(MetricValue::Text(t)) => t.clone(),
            Some(MetricValue::Number(n)) => format!("{n:.1e}"),
            Some(MetricValue::Count(n)) => n.to_string(),
            None => String::new(),
        };
        rows.push(vec![
            m.subject.clone(),
            text(format.and_then(|f| f.values.get("format"))),
            text(m.values.get("sensitivity")),
            text(m.values.get("why")),
        ]);
    }
    if !rows.is_empty() {
        rows.insert(
            0,
            ["TENSOR", "FORMAT", "KLD", "ONE STEP LESS; ONE STEP MORE"].map(str::to_owned).to_vec(),
        );
    }
    rows
}

/// Where compiled kernels for GPUs are kept; without a cache folder they are compiled each time.
fn kernel_cache() -> Option<PathBuf> {
    Home::from_env().ok().map(|h| h.root.join("kernels"))
}

/// The report as tables.
pub fn render(r: &CompileReport) -> String {
    let mut out = format!(
        "{} ({}, {:.1} M parameters) in {}\n",
        r.model.name,
        r.model.architecture,
        r.model.parameters as f64 / 1e6,
        seconds_text(r.seconds)
    );
    let mut rows = vec![["PHASE", "TIME", "WHAT"].map(str::to_owned).to_vec()];
    for p in &r.phases {
        let passes = r.passes.iter().filter(|x| x.pass.phase == p.phase && x.pass.rewrites > 0);
        let mut what: Vec<String> = passes.map(|x| format!("{} ×{}", x.pass.name, x.pass.rewrites)).collect();
        match p.phase {
            Phase::Import => what = r.inputs.iter().map(|i| i.name.clone()).collect(),
            Phase::Lower => what.push(format!("{} launches per token", r.decode_launches)),
            Phase::Emit => {
                let code = r.sections.iter().filter(|s| s.name.starts_with("code "));
                what.extend(code.map(|s| format!("{} ({})", &s.name[5..], bytes_text(s.bytes))));
                what.push(format!("{} kernels", r.kernels));
            }
            _ => {}
        }
        rows.push(vec![p.phase.name().to_owned(), seconds_text(p.seconds), what.join(", ")]);
    }
    out.push_str(&table(&rows));
    out.push('\n');
    if r.resumed_tensors > 0 {
        out.push_str(&format!("resumed: codes of {} tensors had been chosen before\n", r.resumed_tensors));
    }
    if let Some(reason) = &r.not_resumable {
        out.push_str(&format!("had it been interrupted, all would have been lost: {reason}\n"));
    }
    let before: u64 = r.inputs.iter().map(|i| i.bytes).sum();
    for f in &r.formats {
        let size = bytes_text(f.bytes);
        out.push_str(&format!(
            "{:<5} {:>4} tensors  {size:>9}  {:.2} bits per weight\n",
            f.format, f.tensors, f.bits_per_weight
        ));
    }
    let mixed = choices(r);
    if !mixed.is_empty() {
        out.push_str(&format!("{}\n", table(&mixed)));
    }
    if r.artifact_bytes > 0 {
        let (from, to) = (bytes_text(before), bytes_text(r.artifact_bytes));
        out.push_str(&format!("checkpoint {from}, artifact {to}\n"));
    }
    match (&r.certificate, &r.uncertified) {
        (Some(c), _) => out.push_str(&format!("{}\n", quality::summary(c))),
        (None, Some(reason)) => out.push_str(&format!("no certificate: {reason}\n")),
        (None, None) => {}
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_budgets_begin_with_smoothing() {
        let registry = registry().expect("passes");
        for (bits, smooths) in [(0.0, false), (4.49, false), (4.5, true), (8.0, true)] {
            let text = recipe_of_budget("max_bytes = 1000", bits);
            Recipe::parse(&text, "the budget", &registry).expect("a recipe");
            assert!(text.contains("max_bytes = 1000"), "{text}");
            let names: Vec<&str> = text.lines().filter(|line| line.starts_with("name")).collect();
            assert_eq!(names.last(), Some(&"name = \"quantize-mixed\""));
            assert_eq!(text.contains("smooth-activations"), smooths, "{bits}: {text}");
        }
    }
}
