//! `attar inspect FILE`: what is inside an artifact.

use crate::failure::{Failure, Result};
use crate::quality;
use crate::report::{self, Subject};
use crate::speed;
use crate::terminal::{Terminal, bytes_text, table};
use attar_artifact::certificate::Certificate;
use attar_artifact::manifest::{Model as Shape, SectionKind, device_of_target};
use attar_artifact::program::{ProgramKind, StepSize};
use attar_artifact::{Artifact, Verify};
use attar_runtime::{Model, OpenOptions};
use clap::Args;
use serde::Serialize;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
#[command(
    after_help = "--html writes a page for a browser that needs nothing else: where the bytes are, bits and errors layer by layer, the
certificate, and, of several artifacts, size against divergence and (with --speed) speed.

Examples:
  attar inspect model.attar
  attar inspect model.attar --verify
  attar inspect model.attar --json | jq .code
  attar inspect n3.attar n4.attar w8.attar --speed --html report.html"
)]
pub struct Inspect {
    /// The artifact; several may be given
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare every byte with its hash
    #[arg(long)]
    verify: bool,
    /// Also list every tensor
    #[arg(long)]
    tensors: bool,
    /// Write a page for a browser instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "tensors"])]
    html: Option<PathBuf>,
    /// Measure the speed of generation for the page: 128 tokens from an empty cache
    #[arg(long, requires = "html")]
    speed: bool,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    file: PathBuf,
    bytes: u64,
    /// Of the container, major and minor.
    format_version: (u32, u32),
    generator: String,
    /// BLAKE3 of the manifest: names the content of the whole file.
    hash: String,
    /// Whether every byte was compared with its hash.
    verified: bool,
    model: Shape,
    sections: Vec<SectionRow>,
    code: Vec<CodeRow>,
    /// The code section this CPU would run.
    chosen_target: Option<String>,
    programs: Vec<ProgramRow>,
    formats: Vec<FormatRow>,
    tensors: Vec<TensorRow>,
    graph: Option<GraphSummary>,
    recipe: Option<String>,
    certificate: Option<Certificate>,
    /// Why there is no certificate, where the compiler says.
    uncertified: Option<String>,
}

#[derive(Serialize)]
struct SectionRow {
    name: String,
    offset: u64,
    bytes: u64,
    blake3: String,
    required: bool,
}

#[derive(Serialize)]
struct CodeRow {
    target: String,
    features: Vec<String>,
    kernels: usize,
    bytes: u64,
    /// Why this CPU cannot run it.
    refused: Option<String>,
}

#[derive(Serialize)]
struct ProgramRow {
    device: String,
    kind: ProgramKind,
    max_tokens: u32,
    launches: usize,
    /// Bytes of weights that one step reads.
    weight_bytes: u64,
    /// Activation arena of the largest step.
    arena_bytes: u64,
}

#[derive(Serialize)]
struct FormatRow {
    format: String,
    tensors: usize,
    weights: u64,
    bytes: u64,
    bits_per_weight: f64,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    format: String,
    shape: Vec<u64>,
    bytes: u64,
    bits_per_weight: f64,
}

#[derive(Serialize)]
struct GraphSummary {
    nodes: usize,
    /// How often each op occurs.
    ops: BTreeMap<String, usize>,
}

impl Inspect {
    /// Reads and prints.
    ///
    /// # Errors
    /// Whatever is wrong with the file.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        if let Some(path) = &self.html {
            return self.write_page(path, terminal);
        }
        let mut reports = Vec::new();
        for file in &self.files {
            reports.push(examine(&self.open(file)?, file, self.verify)?);
        }
        match &reports[..] {
            [one] if self.json => terminal.json(one),
            all if self.json => terminal.json(&all),
            all => {
                let texts: Vec<String> = all.iter().map(|r| render(r, self.tensors)).collect();
                terminal.line(texts.join("\n\n"))
            }
        }
    }

    fn open(&self, file: &Path) -> Result<Artifact> {
        let verify = if self.verify { Verify::Full } else { Verify::Code };
        Ok(Artifact::open(file, verify)?)
    }

    fn write_page(&self, path: &Path, terminal: Terminal) -> Result<()> {
        let spinner = terminal.spinner("reading");
        let mut subjects = Vec::new();
        for file in &self.files {
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            spinner.set_message(name.clone());
            let speed = if self.speed { Some(generation_speed(file)?) } else { None };
            subjects.push(Subject::of(&self.open(file)?, name, speed)?);
        }
        let page = report::html(&subjects)?;
        spinner.finish_and_clear();
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let written = builder.tempfile_in(folder).and_then(|mut file| {
            std::io::Write::write_all(&mut file, page.as_bytes())?;
            Ok(file.persist(path).map(drop)?)
        });
        written.map_err(|e| Failure::environment(format!("--html {}: {e}", path.display())))?;
        terminal.line(format_args!("wrote {}", path.display()))
    }
}

/// Median tokens per second of `tg128`, or of as many tokens as the model takes.
fn generation_speed(file: &Path) -> Result<f64> {
    let model = Model::open(file, &OpenOptions::default())?;
    let generate = (model.manifest().model.context_length as usize).min(128);
    let plan = speed::Plan { prompt: 0, generate, context: 0, batch: 1, repetitions: 3 };
    let speeds = speed::measure(&model, plan, |_| {})?;
    Ok(speeds.first().map_or(0.0, |s| s.tokens_per_second))
}

fn examine(artifact: &Artifact, file: &Path, verified: bool) -> Result<Report> {
    let manifest = artifact.manifest();
    let refusals: BTreeMap<String, Option<String>> =
        attar_runtime::code_targets(manifest).into_iter().collect();
    // Asked only where there is code for one.
    let gpu = OnceCell::new();
    let no_gpu = || gpu.get_or_init(|| attar_runtime::gpus().err().map(|e| e.to_string())).clone();
    let mut code = Vec::new();
    let mut programs = Vec::new();
    for section in &manifest.sections {
        match &section.kind {
            SectionKind::Code { target, features, entries, .. } => code.push(CodeRow {
                target: target.clone(),
                features: features.clone(),
                kernels: entries.len(),
                bytes: section.len,
                refused: match device_of_target(target) {
                    "cuda" => no_gpu(),
                    _ => refusals.get(target).cloned().flatten(),
                },
            }),
            SectionKind::Programs { device } => {
                for p in artifact.programs(device).unwrap_or_default() {
                    let most = u64::from(p.max_tokens);
                    let m = &manifest.model;
                    let spans = m.kv.spans(m.context_length.into());
                    programs.push(ProgramRow {
                        device: device.clone(),
                        kind: p.kind,
                        max_tokens: p.max_tokens,
                        launches: p.launches.len(),
                        weight_bytes: p.launches.iter().map(|l| l.weight_bytes).sum(),
                        arena_bytes: p.arena.at(StepSize { tokens: most, rows: most, spans }).unwrap_or(0),
                    });
                }
            }
            _ => {}
        }
    }
    let tensors: Vec<TensorRow> = manifest
        .tensors
        .iter()
        .map(|t| {
            let weights: u64 = t.shape.iter().product();
            let bits_per_weight = t.len as f64 * 8.0 / weights.max(1) as f64;
            let (name, format, shape) = (t.name.clone(), t.format.clone(), t.shape.clone());
            TensorRow { name, format, shape, bytes: t.len, bits_per_weight }
        })
        .collect();
    let sections = manifest
        .sections
        .iter()
        .map(|s| SectionRow {
            name: s.kind.name(),
            offset: s.offset,
            bytes: s.len,
            blake3: s.hash.clone(),
            required: s.required,
        })
        .collect();
    Ok(Report {
        file: file.to_owned(),
        bytes: artifact.file_len(),
        format_version: artifact.version(),
        generator: manifest.generator.clone(),
        hash: artifact.manifest_hash(),
        verified,
        model: manifest.model.clone(),
        sections,
        chosen_target: attar_runtime::chosen_target(manifest),
        code,
        programs,
        formats: by_format(&tensors),
        tensors,
        graph: artifact.text(&SectionKind::Graph)?.map(|text| summarize(&text)),
        recipe: artifact.text(&SectionKind::Recipe)?,
        certificate: artifact.certificate()?,
        uncertified: manifest.uncertified.clone(),
    })
}

/// Sums tensors by format, largest first.
fn by_format(tensors: &[TensorRow]) -> Vec<FormatRow> {
    let mut formats: BTreeMap<&str, FormatRow> = BTreeMap::new();
    for t in tensors {
        let row = formats.entry(&t.format).or_insert_with(|| FormatRow {
            format: t.format.clone(),
            tensors: 0,
            weights: 0,
            bytes: 0,
            bits_per_weight: 0.0,
        });
        row.tensors += 1;
        row.weights += t.shape.iter().product::<u64>();
        row.bytes += t.bytes;
        row.bits_per_weight = row.bytes as f64 * 8.0 / row.weights.max(1) as f64;
    }
    let mut rows: Vec<FormatRow> = formats.into_values().collect();
    rows.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.format.cmp(&b.format)));
    rows
}

/// Counts the ops of `.air` text: one `%name = op …` per line.
fn summarize(air: &str) -> GraphSummary {
    let mut ops = BTreeMap::new();
    for line in air.lines() {
        let Some((left, right)) = line.split_once(" = ") else { continue };
        if !left.trim_start().starts_with('%') {
            continue;
        }
        let op = right.split_whitespace().next().unwrap_or("");
        *ops.entry(op.to_owned()).or_insert(0) += 1;
    }
    GraphSummary { nodes: ops.values().sum(), ops }
}

fn render(r: &Report, tensors: bool) -> String {
    let m = &r.model;
    let mut out = String::new();
    let mut say = |label: &str, text: String| out.push_str(&format!("{label:<10} {text}\n"));
    say(
        "file",
        format!(
            "{}, {}, format {}.{}",
            r.file.display(),
            bytes_text(r.bytes),
            r.format_version.0,
            r.format_version.1
        ),
    );
    say("made by", r.generator.clone());
    say("content", format!("{}{}", r.hash, if r.verified { ", every byte verified" } else { "" }));
    say("model", format!("{} ({}, {:.1} M parameters)", m.name, m.architecture, m.parameters as f64 / 1e6));
    say(
        "shape",
        format!(
            "{} layers, width {}, {} heads of {} ({} for keys and values), vocabulary {}, context {}",
            m.layers, m.hidden, m.heads, m.head_dim, m.kv_heads, m.vocab, m.context_length
        ),
    );
    let page_len = u64::from(m.kv.page_len).max(1);
    let kv = crate::plan::kv_bytes(m, m.layers.into(), page_len) / page_len;
    say("kv cache", format!("{:?}, {} per token", m.kv.dtype, bytes_text(kv)).to_lowercase());
    for c in &r.code {
        let state = match (&c.refused, r.chosen_target.as_ref() == Some(&c.target)) {
            (None, true) => "chosen here".to_owned(),
            (None, false) => "runs here".to_owned(),
            (Some(reason), _) => reason.clone(),
        };
        say("code", format!("{:<16} {} kernels, {}; {state}", c.target, c.kernels, bytes_text(c.bytes)));
    }
    for p in &r.programs {
        let kind = format!("{:?}", p.kind).to_lowercase();
        let (weights, arena) = (bytes_text(p.weight_bytes), bytes_text(p.arena_bytes));
        say(
            "program",
            format!(
                "{kind:<16} {} launches, reads {weights}, up to {} tokens, arena {arena}",
                p.launches, p.max_tokens
            ),
        );
    }
    for f in &r.formats {
        let size = bytes_text(f.bytes);
        say(
            "weights",
            format!(
                "{:<6} {:>4} tensors  {size:>9}  {:.2} bits per weight",
                f.format, f.tensors, f.bits_per_weight
            ),
        );
    }
    if let Some(g) = &r.graph {
        let ops: Vec<String> = g.ops.iter().map(|(op, n)| format!("{op} ×{n}")).collect();
        say("graph", format!("{} nodes: {}", g.nodes, ops.join(", ")));
    }
    let mut rows = vec![["SECTION", "OFFSET", "BYTES", "BLAKE3"].map(str::to_owned).to_vec()];
    for s in &r.sections {
        let hash = s.blake3.get(..16).unwrap_or(&s.blake3).to_owned();
        rows.push(vec![s.name.clone(), s.offset.to_string(), s.bytes.to_string(), hash]);
    }
    out.push_str(&format!("\n{}\n", table(&rows)));
    match (&r.certificate, &r.uncertified) {
        (Some(c), _) => out.push_str(&format!("\n{}\n", certificate(c))),
        (None, Some(reason)) => out.push_str(&format!("\nno certificate: {reason}\n")),
        (None, None) => out.push_str("\nno certificate\n"),
    }
    if tensors {
        if let Some(c) = r.certificate.as_ref().filter(|c| !c.tensors.is_empty()) {
            out.push_str(&format!("\n{}\n", errors(c)));
        }
        let mut rows = vec![["STORED", "FORMAT", "SHAPE", "BYTES", "BITS"].map(str::to_owned).to_vec()];
        for t in &r.tensors {
            let (shape, bits) = (format!("{:?}", t.shape), format!("{:.2}", t.bits_per_weight));
            rows.push(vec![t.name.clone(), t.format.clone(), shape, t.bytes.to_string(), bits]);
        }
        out.push_str(&format!("\n{}\n", table(&rows)));
    }
    if let Some(recipe) = &r.recipe {
        out.push_str(&format!("\n{}\n", recipe.trim_end()));
    }
    out.truncate(out.trim_end().len());
    out
}

/// What compression did to each tensor of the checkpoint.
fn errors(c: &Certificate) -> String {
    let sensitive = c.tensors.iter().any(|t| t.sensitivity.is_some());
    let mut heading = ["TENSOR", "FORMAT", "BITS", "ERROR"].map(str::to_owned).to_vec();
    if sensitive {
        heading.push("KLD ALONE".to_owned());
    }
    let mut rows = vec![heading];
    for t in &c.tensors {
        let (bits, error) =
            (format!("{:.2}", t.bits_per_weight), format!("{:.3} %", 100.0 * t.relative_error));
        let mut row = vec![t.name.clone(), t.format.clone(), bits, error];
        if sensitive {
            row.push(t.sensitivity.map_or("-".to_owned(), |s| format!("{s:.2e}")));
        }
        rows.push(row);
    }
    table(&rows)
}

fn certificate(c: &Certificate) -> String {
    format!(
        "certificate: measured with {} against {} weights, in {} windows of {} tokens\n\
         of {} ({} tokens, blake3 {})\n{}\n{:<17} {}",
        c.target,
        c.reference,
        c.windows,
        c.context,
        c.text.name,
        c.text.tokens,
        c.text.blake3.get(..16).unwrap_or(&c.text.blake3),
        quality::table(&c.quality),
        "scored tokens",
        c.quality.scores
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ops_of_a_graph_are_counted() {
        let air = "func @f(%x: f32[T]) -> f32[T] {\n  %0 = silu %x\n  %1 = silu %0\n  %2 = mul %0, %1\n  return %2\n}\n";
        let summary = summarize(air);
        assert_eq!(summary.nodes, 3);
        assert_eq!(summary.ops["silu"], 2);
    }
}
