//! `attar bench FILE`: prompt and generation speed as llama-bench counts them.

use crate::failure::{Failure, Result};
use crate::generation::OpenArgs;
use crate::profile::{self, ProfilePlan, StepProfile};
use crate::speed::{self, Plan, Speed};
use crate::terminal::{Terminal, bytes_text, seconds_text, table};
use attar_artifact::manifest::SectionKind;
use attar_runtime::{DeviceChoice, Requirement};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Args, Debug)]
#[command(
    after_help = "pp N: N prompt tokens at once. tg N: N tokens one at a time from an empty cache, tg N@C after C tokens that are not
timed, tg NxB by B sequences together, one token each per step. Tokens are arbitrary, nothing is
sampled, and one run of each comes before those that count. Reported is the median; spread is (max - min) / median.

Examples:
  attar bench model.attar
  attar bench model.attar --threads 1,2 --repetitions 9 --json
  attar bench model.attar --prompt 0 --generate 64
  attar bench model.attar --prompt 0 --generate 64 --context 4096
  attar bench model.attar --prompt 0 --batch 4
  attar bench model.attar --profile --threads 2"
)]
pub struct Bench {
    /// The artifact
    file: PathBuf,
    /// Threads to compute with; several counts separated by commas (default: as many as the process may use)
    #[arg(long, value_name = "N", value_delimiter = ',')]
    threads: Vec<usize>,
    /// Tokens of the prompt; 0 leaves the test out
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate; 0 leaves the test out
    #[arg(long, visible_alias = "gen", value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Tokens that are there before generation is timed
    #[arg(long, value_name = "N", default_value_t = 0)]
    context: usize,
    /// Let this many sequences generate together too, to compare with one
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Time every launch of a token, of a small batch (of --batch, or 4) and of a prompt instead of whole tests
    #[arg(long)]
    profile: bool,
    /// Runs that count
    #[arg(long, visible_alias = "repeat", value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// What to run on: cpu, or cuda:N for a GPU (default: the first GPU that the artifact has code for, else the CPU)
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Use this code target of the artifact instead of the best one
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// Use the weights as mapped from the file instead of copying them into huge pages
    #[arg(long)]
    mmap: bool,
    /// The same logits, bit by bit, for any number of threads, batch and cut of the prompt (slower only with AMX)
    #[arg(long)]
    deterministic: bool,
    /// Refuse an artifact whose certificate does not say this, e.g. 'kld<=0.05,top1>=90%'
    #[arg(long, value_name = "CONDITIONS", value_delimiter = ',')]
    require: Vec<Requirement>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    model: String,
    target: String,
    artifact_bytes: u64,
    /// Mapping, checking and copying weights; the first opening, so the file may come from the disk.
    open_seconds: f64,
    /// The same in milliseconds, and its parts; weights and texts overlap.
    open_ms: f64,
    open_phases_ms: OpenPhases,
    /// Largest resident memory of this process.
    peak_memory_bytes: Option<u64>,
    memory: Memory,
    /// Bytes that kernels prefetch ahead of the weights.
    prefetch_bytes: Option<u64>,
    repetitions: usize,
    tests: Vec<Speed>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profiles: Vec<StepProfile>,
}

/// Resident memory of this process in bytes, as the system tells it.
#[derive(Serialize, Default)]
struct Memory {
    /// Of the packed weights alone.
    weights: u64,
    after_opening: Option<u64>,
    /// What of that are pages of the program and its libraries, which the system maps around those in use, as many as its
    /// cache holds together, and takes back when it likes.
    program_after_opening: Option<u64>,
    after_tests: Option<u64>,
}

#[derive(Serialize, Default)]
struct OpenPhases {
    file: f64,
    code: f64,
    weights: f64,
    texts: f64,
    assembly: f64,
}

impl Bench {
    /// Measures and prints.
    ///
    /// # Errors
    /// Those of opening and running the artifact.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        if self.repetitions == 0 || (self.prompt == 0 && self.generate == 0) {
            return Err(Failure::input(
                "nothing to measure: --repetitions and --prompt or --generate must be above 0",
            ));
        }
        if !(1..=1024).contains(&self.batch) {
            return Err(Failure::input(format!("--batch {}: expected 1 to 1024", self.batch)));
        }
        let plan = Plan {
            prompt: self.prompt,
            generate: self.generate,
            context: self.context,
            batch: self.batch,
            repetitions: self.repetitions,
        };
        let counts: Vec<Option<usize>> = match self.threads.as_slice() {
            [] => vec![None],
            some => some.iter().copied().map(Some).collect(),
        };
        let artifact_bytes = std::fs::metadata(&self.file)
            .map_err(|e| Failure::from(e).context(self.file.display().to_string()))?
            .len();
        let mut report = Report {
            model: String::new(),
            target: String::new(),
            artifact_bytes,
            open_seconds: 0.0,
            open_ms: 0.0,
            open_phases_ms: OpenPhases::default(),
            peak_memory_bytes: None,
            memory: Memory::default(),
            prefetch_bytes: None,
            repetitions: self.repetitions,
            tests: Vec::new(),
            profiles: Vec::new(),
        };
        for (i, threads) in counts.into_iter().enumerate() {
            let open = OpenArgs {
                threads,
                device: self.device,
                target: self.target.clone(),
                mmap: self.mmap,
                deterministic: self.deterministic,
                require: self.require.clone(),
            };
            let start = Instant::now();
            let model = open.open(&self.file)?;
            if i == 0 {
                report.open_seconds = start.elapsed().as_secs_f64();
                report.open_ms = report.open_seconds * 1e3;
                report.memory.after_opening = status("VmRSS:");
                report.memory.program_after_opening = status("RssFile:").filter(|_| !self.mmap);
                let sections = &model.manifest().sections;
                report.memory.weights =
                    sections.iter().filter(|s| s.kind == SectionKind::Weights).map(|s| s.len).sum();
                let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
                let t = model.opening();
                report.open_phases_ms = OpenPhases {
                    file: ms(t.file),
                    code: ms(t.code),
                    weights: ms(t.weights),
                    texts: ms(t.texts),
                    assembly: ms(t.assembly),
                };
                report.model = model.manifest().model.name.clone();
                report.target = model.target().to_owned();
            }
            let spinner = terminal.spinner("warming up");
            let message = |test: &str| spinner.set_message(format!("{test} on {} threads", model.threads()));
            if self.profile {
                let plan = ProfilePlan {
                    prompt: self.prompt,
                    batch: if self.batch > 1 { self.batch } else { 4 },
                    context: self.context,
                    repetitions: self.repetitions,
                };
                report.profiles.extend(profile::measure(&model, plan, message)?);
            } else {
                report.tests.extend(speed::measure(&model, plan, message)?);
            }
            spinner.finish_and_clear();
            report.prefetch_bytes = model.prefetch_bytes();
            report.memory.after_tests = status("VmRSS:");
        }
        report.peak_memory_bytes = status("VmHWM:");
        if self.json { terminal.json(&report) } else { terminal.line(render(&report)) }
    }
}

fn render(r: &Report) -> String {
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), bytes_text);
    let p = &r.open_phases_ms;
    let mut out = format!(
        "{} on {}: artifact {}, opened in {} (file {:.1}, code {:.1}, weights {:.1} beside texts {:.1}, threads {:.1} ms)\n\
         memory: weights {}, after opening {}{}, after the tests {}, at most {}\n",
        r.model,
        r.target,
        bytes_text(r.artifact_bytes),
        seconds_text(r.open_seconds),
        p.file,
        p.code,
        p.weights,
        p.texts,
        p.assembly,
        bytes_text(r.memory.weights),
        memory(r.memory.after_opening),
        r.memory
            .program_after_opening
            .map_or(String::new(), |n| format!(" ({} the program and its libraries)", bytes_text(n))),
        memory(r.memory.after_tests),
        memory(r.peak_memory_bytes),
    );
    for p in &r.profiles {
        out.push_str(&format!("\n{}\n", profile::render(p)));
    }
    if r.tests.is_empty() {
        out.truncate(out.trim_end().len());
        return out;
    }
    let mut rows =
        vec![["TEST", "THREADS", "TOKENS/S", "MIN", "MAX", "SPREAD", "MS/STEP"].map(str::to_owned).to_vec()];
    for t in &r.tests {
        rows.push(vec![
            t.test.clone(),
            t.threads.to_string(),
            format!("{:.1}", t.tokens_per_second),
            format!("{:.1}", t.min),
            format!("{:.1}", t.max),
            format!("{:.1} %", t.spread * 100.0),
            format!("{:.3}", t.step_ms),
        ]);
    }
    out.push_str(&table(&rows));
    out
}

/// A figure of this process's memory, by its name in the system's list; `None` where the system does not say.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
