//! `attar plugin check`: the conformance kit. Everything is tried in processes of its own, so that a plugin that crashes fails a
//! check and nothing else.

mod tiny_model;

use crate::failure::{Failure, Result};
use crate::terminal::table;
use attar_compiler::Plugin;
use serde::Serialize;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tiny_model::MODELS;

/// Longest time that one trial may take; valgrind makes everything some fifty times slower.
const LIMIT: Duration = Duration::from_secs(120);
const VALGRIND_LIMIT: Duration = Duration::from_secs(600);

/// What calibration reads.
const TEXT: &str = include_str!("calibration_text.txt");

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Passed,
    Failed,
    Skipped,
}

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Pass it is about; empty for the library.
    pub pass: String,
    pub what: String,
    pub outcome: Outcome,
    /// What was seen; what to change, where it failed.
    pub detail: String,
}

/// What was tried, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub library: PathBuf,
    /// For `--allow-plugins`.
    pub blake3: String,
    /// `name version`, once the library has said so.
    pub plugin: Option<String>,
    pub checks: Vec<Check>,
}

impl Report {
    /// How many checks failed.
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|c| c.outcome == Outcome::Failed).count()
    }

    fn skipped(&self) -> usize {
        self.checks.iter().filter(|c| c.outcome == Outcome::Skipped).count()
    }

    /// The report as a table.
    pub fn render(&self) -> String {
        let mut rows = vec![["", "PASS", "CHECK", "WHAT WAS SEEN"].map(str::to_owned).to_vec()];
        for c in &self.checks {
            let mark = match c.outcome {
                Outcome::Passed => "ok",
                Outcome::Failed => "FAILED",
                Outcome::Skipped => "skipped",
            };
            rows.push(vec![mark.to_owned(), c.pass.clone(), c.what.clone(), c.detail.clone()]);
        }
        let plugin = self.plugin.as_deref().unwrap_or("not loaded");
        let passed = self.checks.len() - self.failed() - self.skipped();
        format!(
            "{}: {plugin}\nblake3 {}\n\n{}\n{passed} passed, {} failed, {} skipped",
            self.library.display(),
            self.blake3,
            table(&rows),
            self.failed(),
            self.skipped()
        )
    }
}

/// Tries a plugin. `options` are `NAME=option:value,…` for passes that want others than their defaults.
///
/// # Errors
/// An input failure when there is no such file; those of the temporary folder.
pub fn check(library: &Path, options: &[String], valgrind: bool) -> Result<Report> {
    let library =
        library.canonicalize().map_err(|e| Failure::input(format!("{}: {e}", library.display())))?;
    let blake3 = Plugin::hash(&library).map_err(Failure::input)?;
    let folder = tempfile::tempdir()?;
    let mut kit = Kit {
        program: std::env::current_exe()?,
        report: Report { library, blake3, plugin: None, checks: Vec::new() },
        folder: folder.path().to_owned(),
    };
    for model in MODELS {
        model.write(&kit.folder.join(model.name))?;
    }
    fs::write(kit.folder.join("text.txt"), TEXT)?;
    let passes = kit.describes();
    if !passes.is_empty() {
        kit.leads_astray();
    }
    for (name, has_required) in passes {
        let given = options.iter().find(|o| o.split('=').next() == Some(&name));
        if has_required && given.is_none() {
            let detail = format!("an option has no default; give --pass {name}=option:value");
            kit.add(&name, "runs", Outcome::Skipped, detail);
            continue;
        }
        kit.tries(&name, given.unwrap_or(&name));
        if valgrind {
            kit.watches(&name, given.unwrap_or(&name));
        } else {
            kit.add(&name, "memory", Outcome::Skipped, "valgrind was left out".to_owned());
        }
    }
    Ok(kit.report)
}

struct Kit {
    program: PathBuf,
    report: Report,
    folder: PathBuf,
}

/// How a trial ended.
enum Ended {
    Well(Output),
    /// With an exit code that says so, and a message.
    Refused(i32, String),
    /// In a way that no pass may end a process.
    Badly(String),
}

impl Kit {
    fn add(&mut self, pass: &str, what: &str, outcome: Outcome, detail: String) {
        let check = Check { pass: pass.to_owned(), what: what.to_owned(), outcome, detail };
        self.report.checks.push(check);
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        self.end(command, LIMIT)
    }

    fn end(&self, mut command: Command, limit: Duration) -> Ended {
        command.current_dir(&self.folder).stdin(Stdio::null());
        match output_within(command, limit) {
            Ok(None) => Ended::Badly(format!("did not end within {} seconds", limit.as_secs())),
            Ok(Some(output)) => match output.status.code() {
                Some(0) => Ended::Well(output),
                Some(code) => Ended::Refused(code, last_line(&output.stderr)),
                None => Ended::Badly(format!("crashed ({})", output.status)),
            },
            Err(e) => Ended::Badly(format!("cannot be started: {e}")),
        }
    }

    fn library(&self) -> String {
        self.report.library.display().to_string()
    }

    /// Loads the library and reads what it says. Gives its passes, and whether they have options without defaults.
    fn describes(&mut self) -> Vec<(String, bool)> {
        let library = self.library();
        let output = match self.run(&["passes", "--plugin", &library, "--json"]) {
            Ended::Well(output) => output,
            Ended::Refused(_, said) | Ended::Badly(said) => {
                self.add("", "loads", Outcome::Failed, said);
                return Vec::new();
            }
        };
        self.add("", "loads", Outcome::Passed, "within a process of its own".to_owned());
        // It has been loaded once without harm, so its names can be asked for here.
        let plugin = match Plugin::load(&self.report.library, None) {
            Ok(plugin) => plugin,
            Err(e) => {
                self.add("", "describes itself", Outcome::Failed, e.to_string());
                return Vec::new();
            }
        };
        self.report.plugin = Some(format!(
            "{} {}, for interface {}.{}",
            plugin.name, plugin.version, plugin.abi.0, plugin.abi.1
        ));
        let listed: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let listed = listed.as_array().cloned().unwrap_or_default();
        let mut names = Vec::new();
        let mut problems = Vec::new();
        for decl in &plugin.passes {
            if !listed.iter().any(|p| p["name"] == decl.name) {
                problems.push(format!("{} is not listed by attar passes", decl.name));
            }
            if decl.summary.ends_with('.') {
                problems.push(format!("{}: the summary ends in a full stop", decl.name));
            }
            for option in decl.options.iter().filter(|o| o.doc.trim().is_empty()) {
                problems.push(format!("{}: option {} says nothing of what it means", decl.name, option.name));
            }
            names.push((decl.name.to_owned(), decl.options.iter().any(|o| o.default().is_none())));
        }
        if plugin.passes.is_empty() {
            problems.push("there are no passes".to_owned());
        }
        match problems.is_empty() {
            true => {
                let (passes, formats) = (plugin.passes.len(), plugin.formats.len());
                self.add(
                    "",
                    "describes itself",
                    Outcome::Passed,
                    format!("passes: {passes}, formats: {formats}"),
                );
            }
            false => self.add("", "describes itself", Outcome::Failed, problems.join("; ")),
        }
        names
    }

    /// Runs the passes where there is no run: they must neither crash nor say that they are done.
    fn leads_astray(&mut self) {
        let library = self.library();
        let (outcome, detail) = match self.run(&["plugin", "check", &library, "--astray"]) {
            Ended::Well(output) => match serde_json::from_slice::<Vec<String>>(&output.stdout) {
                Ok(deaf) if deaf.is_empty() => {
                    (Outcome::Passed, "every pass stops when the host answers with errors".to_owned())
                }
                Ok(deaf) => {
                    let advice = "hand on the status of every call that is not ATTAR_OK";
                    (
                        Outcome::Failed,
                        format!("{}: done, though every call failed: {advice}", deaf.join(", ")),
                    )
                }
                Err(e) => (Outcome::Failed, e.to_string()),
            },
            Ended::Refused(_, said) | Ended::Badly(said) => (Outcome::Failed, said),
        };
        self.add("", "misuse", outcome, detail);
    }

    /// Compiles a model with the pass.
    fn compile(&self, model: &str, pass: &str, artifact: &str, extra: &[&str]) -> Ended {
        let library = self.library();
        let base = ["compile", model, "--plugin", &library, "--pass", pass, "-o", artifact, "--json"];
        let few =
            ["--target", "x86-64-v2,aarch64", "--calibration-windows", "2", "--calibration-context", "64"];
        let quick = if extra.contains(&"--certify") { &[][..] } else { &["--no-certify"][..] };
        let calibrate =
            if extra.contains(&"--calibrate") { &[][..] } else { &["--calibrate", "text.txt"][..] };
        self.run(&[&base[..], &few, quick, calibrate, extra].concat())
    }

    /// Runs a pass on every model: in order, and out of it.
    fn tries(&mut self, name: &str, pass: &str) {
        for model in MODELS.map(|m| m.name) {
            let first = format!("{name}-{model}.attar");
            match self.compile(model, pass, &first, &["--threads", "1"]) {
                Ended::Well(output) => {
                    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
                    let detail = format!("model {model}: {} rewrites", rewrites(&report, name));
                    self.add(name, "runs", Outcome::Passed, detail);
                }
                Ended::Refused(_, said) | Ended::Badly(said) => {
                    self.add(name, "runs", Outcome::Failed, format!("model {model}: {said}"));
                    continue;
                }
            }
            self.repeats(name, pass, model, &first);
            self.comes_back(name, model, &first);
        }
        self.obeys_fuel(name, pass);
        self.stands_alone(name, pass);
        self.meets_codes(name, pass);
    }

    /// The same bytes again, on two threads.
    fn repeats(&mut self, name: &str, pass: &str, model: &str, first: &str) {
        let second = format!("{name}-{model}-again.attar");
        let outcome = match self.compile(model, pass, &second, &["--threads", "2"]) {
            Ended::Well(_) => {
                let read = |file: &str| fs::read(self.folder.join(file)).unwrap_or_default();
                if read(first) == read(&second) {
                    (Outcome::Passed, format!("model {model}: the same bytes twice"))
                } else {
                    let advice = "the pass must depend on nothing but model, options and seed";
                    (Outcome::Failed, format!("model {model}: two compiles differ; {advice}"))
                }
            }
            Ended::Refused(_, said) | Ended::Badly(said) => {
                (Outcome::Failed, format!("model {model}: {said}"))
            }
        };
        self.add(name, "is deterministic", outcome.0, outcome.1);
    }

    /// The artifact says how it was made, can be made again, and runs.
    fn comes_back(&mut self, name: &str, model: &str, artifact: &str) {
        let library = self.library();
        let again = [
            "compile",
            model,
            "--from",
            artifact,
            "--check",
            "--plugin",
            &library,
            "--calibrate",
            "text.txt",
        ];
        let outcome = match self.run(&again) {
            Ended::Well(_) => {
                match self.run(&["run", artifact, "--prompt", "the river", "--max-tokens", "4"]) {
                    Ended::Well(_) => {
                        (Outcome::Passed, format!("model {model}: made again from its recipe, and it runs"))
                    }
                    Ended::Refused(_, said) | Ended::Badly(said) => {
                        (Outcome::Failed, format!("model {model}: {said}"))
                    }
                }
            }
            Ended::Refused(_, said) | Ended::Badly(said) => {
                (Outcome::Failed, format!("model {model}: {said}"))
            }
        };
        self.add(name, "comes back", outcome.0, outcome.1);
    }

    /// Without leave for rewrites it does none.
    fn obeys_fuel(&mut self, name: &str, pass: &str) {
        let model = MODELS[0].name;
        let (without, with) = ("fuel.attar", "plain.attar");
        let library = self.library();
        let plain = [
            "compile",
            model,
            "--plugin",
            &library,
            "--quantize",
            "f32",
            "--fuel",
            "0",
            "--no-certify",
            "--target",
            "x86-64-v2,aarch64",
            "-o",
            with,
        ];
        let outcome = match (self.compile(model, pass, without, &["--fuel", "0"]), self.run(&plain)) {
            (Ended::Well(_), Ended::Well(_)) => {
                let hashes = |file: &str| self.hashes_of(file);
                match (hashes(without), hashes(with)) {
                    (Some(a), Some(b)) if a == b => {
                        (Outcome::Passed, "without leave it changes nothing".to_owned())
                    }
                    _ => {
                        let advice =
                            "ask cx.rewrite before every change, and leave the site alone when it says no";
                        (Outcome::Failed, format!("it changes the model without leave: {advice}"))
                    }
                }
            }
            (Ended::Refused(_, said) | Ended::Badly(said), _)
            | (_, Ended::Refused(_, said) | Ended::Badly(said)) => (Outcome::Failed, said),
        };
        self.add(name, "asks for rewrites", outcome.0, outcome.1);
    }

    /// Hashes of weights, graph and programs.
    fn hashes_of(&self, artifact: &str) -> Option<Vec<(String, String)>> {
        let artifact =
            attar_artifact::Artifact::open(self.folder.join(artifact), attar_artifact::Verify::None);
        let sections = &artifact.ok()?.manifest().sections.clone();
        let kept = sections.iter().map(|s| (s.kind.name(), s.hash.clone()));
        Some(kept.filter(|(name, _)| ["weights", "graph"].contains(&name.as_str())).collect())
    }

    /// Without calibration it works, or says that it needs some.
    fn stands_alone(&mut self, name: &str, pass: &str) {
        let ended = self.compile(MODELS[0].name, pass, "alone.attar", &["--calibrate", "none"]);
        let (outcome, detail) = match ended {
            Ended::Well(_) => (Outcome::Passed, "works without calibration".to_owned()),
            Ended::Refused(2, said) => (Outcome::Passed, format!("needs calibration and says so: {said}")),
            Ended::Refused(code, said) => (Outcome::Failed, format!("exit code {code}: {said}")),
            Ended::Badly(said) => (Outcome::Failed, said),
        };
        self.add(name, "without calibration", outcome, detail);
    }

    /// After a pass that has encoded every matrix it works, or says that it cannot.
    fn meets_codes(&mut self, name: &str, pass: &str) {
        let steps =
            format!("[[pass]]\nname = \"quantize-rtn\"\nformat = \"n4\"\n\n[[pass]]\nname = \"{name}\"\n");
        let recipe = self.folder.join("codes.toml");
        if pass.contains('=') {
            let detail = "tried with defaults alone".to_owned();
            self.add(name, "after encoding", Outcome::Skipped, detail);
            return;
        }
        if let Err(e) = fs::write(&recipe, steps) {
            self.add(name, "after encoding", Outcome::Failed, e.to_string());
            return;
        }
        let library = self.library();
        let ended = self.run(&[
            "compile",
            MODELS[0].name,
            "--plugin",
            &library,
            "--recipe",
            "codes.toml",
            "--no-certify",
            "--calibrate",
            "text.txt",
            "--calibration-windows",
            "2",
            "--calibration-context",
            "64",
            "-o",
            "codes.attar",
        ]);
        let (outcome, detail) = match ended {
            Ended::Well(_) => (Outcome::Passed, "leaves weights alone that are encoded".to_owned()),
            Ended::Refused(2, said) => (Outcome::Passed, format!("refuses them and says so: {said}")),
            Ended::Refused(code, said) => (Outcome::Failed, format!("exit code {code}: {said}")),
            Ended::Badly(said) => (Outcome::Failed, said),
        };
        self.add(name, "after encoding", outcome, detail);
    }

    /// Runs the pass under valgrind: no access beyond what it may touch, and no memory lost.
    fn watches(&mut self, name: &str, pass: &str) {
        const WHAT: &str = "memory";
        if !Command::new("valgrind").arg("--version").output().is_ok_and(|o| o.status.success()) {
            self.add(name, WHAT, Outcome::Skipped, "there is no valgrind".to_owned());
            return;
        }
        let log = self.folder.join("valgrind.xml");
        let mut command = Command::new("valgrind");
        command.args(["--quiet", "--leak-check=full", "--show-leak-kinds=definite", "--xml=yes"]);
        command.arg(format!("--xml-file={}", log.display())).arg(&self.program);
        command.args([
            "compile",
            MODELS[0].name,
            "--plugin",
            &self.library(),
            "--pass",
            pass,
            "--stop-after",
        ]);
        command.args(["compress", "--threads", "1", "--calibrate", "text.txt", "--calibration-windows", "1"]);
        command.args(["--calibration-context", "16"]);
        let ended = self.end(command, VALGRIND_LIMIT);
        let (outcome, detail) = match ended {
            Ended::Badly(said) => (Outcome::Failed, said),
            Ended::Refused(code, said) => {
                (Outcome::Failed, format!("under valgrind, exit code {code}: {said}"))
            }
            Ended::Well(_) => match fs::read_to_string(&log) {
                Err(e) => (Outcome::Failed, format!("valgrind wrote no report: {e}")),
                Ok(report) => {
                    let found = memory_errors(&report, &self.report.library);
                    match found.is_empty() {
                        true => (Outcome::Passed, "valgrind saw no wrong access and no loss".to_owned()),
                        false => (Outcome::Failed, found.join("; ")),
                    }
                }
            },
        };
        self.add(name, WHAT, outcome, detail);
    }
}

/// Errors of a valgrind report with the library among their frames.
fn memory_errors(report: &str, library: &Path) -> Vec<String> {
    let library = library.display().to_string();
    let within = |text: &str, tag: &str| {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let start = text.find(&open)? + open.len();
        Some(text[start..start + text[start..].find(&close)?].trim().to_owned())
    };
    let errors = report.split("<error>").skip(1).filter(|e| e.contains(&library));
    let said = errors.map(|e| {
        let what = within(e, "what").or_else(|| within(e, "text")).unwrap_or_else(|| "an error".to_owned());
        let frame = e.split("<frame>").find(|f| f.contains(&library)).and_then(|f| within(f, "fn"));
        format!("{what} in {}", frame.unwrap_or_else(|| "the library".to_owned()))
    });
    said.collect()
}

/// Rewrites of a pass in a compile's report.
fn rewrites(report: &Value, name: &str) -> u64 {
    let passes = report["passes"].as_array().cloned().unwrap_or_default();
    passes.iter().filter(|p| p["name"] == name).filter_map(|p| p["rewrites"].as_u64()).sum()
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned()
}

/// What a command writes; `None` when it had to be ended.
fn output_within(mut command: Command, limit: Duration) -> std::io::Result<Option<Output>> {
    let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command.stdout(out.try_clone()?).stderr(err.try_clone()?).spawn()?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(Output { status, stdout: all_of(out)?, stderr: all_of(err)? }));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn all_of(mut file: fs::File) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::memory_errors;
    use std::path::Path;

    #[test]
    fn errors_of_the_library_are_told_from_others() {
        let report = "<error><kind>InvalidRead</kind><what>Invalid read of size 4</what><stack><frame><obj>/l/libx.so</obj>\
                      <fn>run_pass</fn></frame></stack></error><error><what>other</what><frame><obj>/l/liby.so</obj></frame>\
                      </error>";
        assert_eq!(memory_errors(report, Path::new("/l/libx.so")), ["Invalid read of size 4 in run_pass"]);
        assert!(memory_errors(report, Path::new("/l/libz.so")).is_empty());
    }
}
