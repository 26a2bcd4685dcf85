//! `attar doctor`: what this machine supports, and what stands in the way.

use crate::failure::Result;
use crate::fetch::http::{self, Patience};
use crate::fetch::hub;
use crate::home::Home;
use crate::terminal::{Terminal, bytes_text};
use attar_compiler::{Nvrtc, Target, resolve_targets};
use attar_runtime::gpus;
use clap::Args;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  attar doctor
  attar doctor --online
  attar doctor --json")]
pub struct Doctor {
    /// Also ask the hub whether it can be reached
    #[arg(long)]
    online: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    cpu: String,
    /// Of the names that targets ask for, those this CPU has.
    features: Vec<&'static str>,
    targets: Vec<TargetReport>,
    /// What `--target native` means here.
    native: Option<&'static str>,
    threads: usize,
    memory_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    /// State of transparent huge pages, as the kernel spells it.
    huge_pages: Option<String>,
    cache: Option<PathBuf>,
    cache_writable: bool,
    pulled: Vec<String>,
    hub: String,
    hub_token: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hub_reachable: Option<bool>,
    /// What compiles code for GPUs, and what runs it.
    cuda: Cuda,
    /// Emulators and cross linkers the tests of other targets use.
    cross_tools: Vec<CrossTool>,
}

#[derive(Serialize)]
struct TargetReport {
    name: &'static str,
    runs_here: bool,
    /// Why it does not.
    refused: Option<String>,
}

#[derive(Serialize)]
struct Cuda {
    /// File of the library that compiles kernels, and its version.
    nvrtc: Option<String>,
    /// How to get it.
    nvrtc_missing: Option<String>,
    gpus: Vec<String>,
    /// Why there is none.
    gpus_missing: Option<String>,
}

impl Cuda {
    fn look() -> Cuda {
        let nvrtc = Nvrtc::find().map(|n| {
            let (major, minor) = n.version();
            format!("NVRTC {major}.{minor}, {}", n.path().display())
        });
        let gpus = gpus().map(|all| {
            let each = all.iter().map(|g| {
                let (major, minor) = g.compute;
                let memory = bytes_text(g.memory_bytes);
                format!("cuda:{} {}, compute capability {major}.{minor}, {memory}", g.index, g.name)
            });
            each.collect()
        });
        let (nvrtc, nvrtc_missing) = match nvrtc {
            Ok(found) => (Some(found), None),
            Err(e) => (None, Some(e.to_string())),
        };
        match gpus {
            Ok(gpus) => Cuda { nvrtc, nvrtc_missing, gpus, gpus_missing: None },
            Err(e) => Cuda { nvrtc, nvrtc_missing, gpus: Vec::new(), gpus_missing: Some(e.to_string()) },
        }
    }
}

#[derive(Serialize)]
struct CrossTool {
    name: &'static str,
    path: Option<PathBuf>,
}

const CROSS_TOOLS: [&str; 4] =
    ["aarch64-linux-gnu-gcc", "qemu-aarch64", "riscv64-linux-gnu-gcc", "qemu-riscv64"];

impl Doctor {
    /// Looks around and reports.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let report = self.examine();
        if self.json {
            return terminal.json(&report);
        }
        terminal.line(render(&report))
    }

    fn examine(&self) -> Report {
        let targets: Vec<TargetReport> = Target::ALL.into_iter().map(target_report).collect();
        let mut features: Vec<&'static str> =
            Target::ALL.iter().flat_map(|t| t.features()).copied().filter(|f| cpu_has(f)).collect();
        features.sort_unstable();
        features.dedup();
        let home = Home::from_env().ok();
        let pulled = home.iter().flat_map(Home::all).map(|(_, p)| p.name).collect();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Report {
            version: env!("CARGO_PKG_VERSION"),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            cpu: cpu_name(),
            features,
            native: native().map(Target::name),
            targets,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: meminfo(&memory, "MemTotal"),
            memory_available_bytes: meminfo(&memory, "MemAvailable"),
            huge_pages: huge_pages(),
            cache_writable: home.as_ref().is_some_and(|h| writable(&h.root)),
            cache: home.map(|h| h.root),
            pulled,
            hub: hub::endpoint(),
            hub_token: hub::token().is_some(),
            hub_reachable: self.online.then(hub_answers),
            cuda: Cuda::look(),
            cross_tools: CROSS_TOOLS.map(|name| CrossTool { name, path: which(name) }).into(),
        }
    }
}

fn render(r: &Report) -> String {
    let mut out = format!("attar {} on {} {}, {}\n", r.version, r.os, r.arch, r.cpu);
    let mut say = |label: &str, text: String| out.push_str(&format!("{label:<12} {text}\n"));
    let memory = r.memory_bytes.map_or("unknown".to_owned(), bytes_text);
    let available = r.memory_available_bytes.map(|b| format!(", {} available", bytes_text(b)));
    say("machine", format!("{} threads, memory {memory}{}", r.threads, available.unwrap_or_default()));
    say("features", if r.features.is_empty() { "none known".to_owned() } else { r.features.join(" ") });
    for t in &r.targets {
        let state = match (t.runs_here, r.native == Some(t.name)) {
            (true, true) => "runs here; this is `native`".to_owned(),
            (true, false) => "runs here".to_owned(),
            _ => format!("cross-compile only ({})", t.refused.as_deref().unwrap_or_default()),
        };
        say("target", format!("{:<18} {state}", t.name));
    }
    say("huge pages", r.huge_pages.clone().unwrap_or_else(|| "not known on this system".to_owned()));
    match &r.cache {
        Some(path) => {
            let state = if r.cache_writable { "" } else { " — NOT WRITABLE: set ATTAR_HOME" };
            say("cache", format!("{}{state}", path.display()));
        }
        None => say("cache", "none: set ATTAR_HOME".to_owned()),
    }
    say("pulled", if r.pulled.is_empty() { "nothing yet".to_owned() } else { r.pulled.join(", ") });
    let reachable = match r.hub_reachable {
        Some(true) => ", reachable",
        Some(false) => ", NOT REACHABLE (set HF_ENDPOINT, or pull a catalogue name)",
        None => "",
    };
    let token = if r.hub_token { ", with HF_TOKEN" } else { "" };
    say("hub", format!("{}{token}{reachable}", r.hub));
    let compiler =
        r.cuda.nvrtc.clone().or_else(|| r.cuda.nvrtc_missing.clone().map(|m| format!("missing: {m}")));
    say("cuda compile", compiler.unwrap_or_default());
    for gpu in &r.cuda.gpus {
        say("cuda run", gpu.clone());
    }
    if let Some(reason) = &r.cuda.gpus_missing {
        say("cuda run", reason.clone());
    }
    for tool in &r.cross_tools {
        let state = tool
            .path
            .as_ref()
            .map_or("missing (tests of that target are skipped)".to_owned(), |p| p.display().to_string());
        say("cross tool", format!("{:<22} {state}", tool.name));
    }
    out.truncate(out.trim_end().len());
    out
}

/// What `--target native` means here.
fn native() -> Option<Target> {
    resolve_targets(&["native"]).ok()?.first().copied()
}

fn target_report(target: Target) -> TargetReport {
    let refused = attar_runtime::target_refusal(target.name(), target.features());
    TargetReport { name: target.name(), runs_here: refused.is_none(), refused }
}

/// Whether this CPU has a feature that some target of its architecture asks for.
fn cpu_has(feature: &str) -> bool {
    let asks = |t: &Target| t.features().contains(&feature);
    Target::ALL
        .iter()
        .filter(|t| asks(t))
        .any(|t| attar_runtime::target_refusal(t.name(), &[feature]).is_none())
}

/// Whether the hub's model list can be asked; a proxy's refusal is no answer.
fn hub_answers() -> bool {
    let url = format!("{}/api/models?limit=1", hub::endpoint());
    http::get(&url, &[], Patience::Short).is_ok_and(|a| a.status.is_success())
}

fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, v)| v.trim()));
    name.unwrap_or("unknown CPU").to_owned()
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn huge_pages() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let chosen = text.split_once('[')?.1.split_once(']')?.0;
    Some(format!("transparent: {chosen}"))
}

/// Whether the folder, or the nearest parent that exists, takes a new file.
fn writable(path: &Path) -> bool {
    path.ancestors().find(|p| p.is_dir()).is_some_and(|p| tempfile::tempfile_in(p).is_ok())
}

fn which(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(program)).find(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_lines_are_read() {
        let text = "MemTotal:       16 kB\nMemAvailable:    8 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(16 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
    }

    #[test]
    fn the_target_called_native_runs_here() {
        let native = native();
        for target in Target::ALL {
            let report = target_report(target);
            assert!(native != Some(target) || report.runs_here, "{:?}", report.refused);
        }
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert!(native.is_some());
        }
    }
}
