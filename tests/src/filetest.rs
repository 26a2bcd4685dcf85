//! The filetest harness: `.air` files whose comments say what is tested and what must come out.
//!
//! Directives stand above the first function, one per line: `; test MODE[=ARG] [key=value …]`. Each applies to every
//! function of the file.
//!
//! | directive | tests |
//! |---|---|
//! | `roundtrip` | printing what was read gives the function as it stands (or its `; expect:` block), and reading that gives the same graph |
//! | `verify` | the error in `; error: …` on the guilty line, and no other; without one the function is valid. `; store @w : f32[2,3]` lines say what the weight store holds |
//! | `pass=NAME[,NAME…] [option=value …]` | the function after the passes is the `; expect:` block (or `unchanged`), is valid, and a second run changes nothing. `tensors=GLOB` selects weights |
//! | `eval` | `; with %x = [[1, 2]]`, `; with @w = …`, `; with seqs = …` and then `; gives [[3]]` per output (or `; fails TEXT`); several groups are steps that follow each other. Fused ops must give the same when decomposed |
//! | `eval tol=CLASS` | beside `pass`: random inputs and weights give the same before and after, within the class of [`crate::tolerance`] |
//! | `size` | the `; size:` block: bytes and bits per weight of each tensor as packed |
//! | `lower [kv=f16] [program=decode]` | the `; lower:` block: launches one per line, and the tensors as packed |
//! | `run [tol=CLASS] [kv=f16]` | lowered, with reference kernels and with kernels compiled for this machine, the function gives what the interpreter gives; skipped where no target fits this machine |
//!
//! A block is a line `; name:` behind the function and the lines starting with `;   ` that follow. With
//! `ATTAR_UPDATE_FILETESTS=1` blocks, errors and results are rewritten to what came out.

mod eval;
mod file;
mod lower;
mod pass;
mod roundtrip;
mod run;
mod size;
mod verify;

use anyhow::{Context, Result, bail};
use file::{Directive, Edit, File, Function};
use std::path::{Path, PathBuf};

/// What happened to all files below a folder.
#[derive(Debug, Default)]
pub struct Summary {
    /// Functions times directives.
    pub tests: usize,
    /// File, function, mode, and what came out.
    pub failures: Vec<String>,
    /// File, function, mode, and why it was not run.
    pub skipped: Vec<String>,
}

/// One directive applied to one function.
struct Case<'a> {
    file: &'a File,
    directive: &'a Directive,
    function: &'a Function,
    /// Rewrite expectations instead of failing.
    update: bool,
}

/// What a mode has to say besides failing.
#[derive(Default)]
struct Verdict {
    edits: Vec<Edit>,
    skipped: Option<String>,
}

/// Runs every `.air` file below `root`.
///
/// # Errors
/// When a file cannot be read or written. Tests that fail are in the summary.
pub fn run_all(root: &Path, update: bool) -> Result<Summary> {
    let mut summary = Summary::default();
    let mut paths = Vec::new();
    find(root, &mut paths)?;
    paths.sort();
    for path in paths {
        run_file(root, &path, update, &mut summary).with_context(|| path.display().to_string())?;
    }
    Ok(summary)
}

fn find(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, paths)?;
        } else if path.extension().is_some_and(|e| e == "air") {
            paths.push(path);
        }
    }
    Ok(())
}

fn run_file(root: &Path, path: &Path, update: bool, summary: &mut Summary) -> Result<()> {
    let name = path.strip_prefix(root).unwrap_or(path).display().to_string();
    let text = std::fs::read_to_string(path)?;
    let file = File::read(&text);
    if file.directives.is_empty() || file.functions.is_empty() {
        summary.failures.push(format!("{name}: no `; test` directive, or no function"));
        return Ok(());
    }
    let mut edits = Vec::new();
    for directive in &file.directives {
        for function in &file.functions {
            summary.tests += 1;
            let case = Case { file: &file, directive, function, update };
            let what = format!("{name}:{}: {}", function.first + 1, directive.text);
            match case.run() {
                Ok(verdict) => {
                    edits.extend(verdict.edits);
                    summary.skipped.extend(verdict.skipped.map(|why| format!("{what}: {why}")));
                }
                Err(error) => summary.failures.push(format!("{what}: {error:#}")),
            }
        }
    }
    let updated = file.edited(edits);
    if update && updated != text {
        std::fs::write(path, updated)?;
    }
    Ok(())
}

impl Case<'_> {
    fn run(&self) -> Result<Verdict> {
        match self.directive.mode.as_str() {
            "roundtrip" => roundtrip::test(self),
            "verify" => verify::test(self),
            "pass" => pass::test(self),
            "eval" => match self.directive.get("tol") {
                Some(class) => eval::compare_around_pass(self, class),
                None => eval::test(self),
            },
            "size" => size::test(self),
            "lower" => lower::test(self),
            "run" => run::test(self),
            other => bail!("no such mode: {other}"),
        }
    }

    /// Compares a block behind the function with what came out.
    fn check_block(&self, name: &str, actual: &str) -> Result<Verdict> {
        let block = self.file.block(self.function, name);
        let held = block.as_ref().map(|b| b.lines.join("\n")).unwrap_or_default();
        if held == actual.trim_end() {
            return Ok(Verdict::default());
        }
        if !self.update {
            bail!("the `; {name}:` block differs\n--- expected\n{held}\n+++ got\n{}", actual.trim_end());
        }
        let lines = actual.trim_end().lines().map(|l| format!(";   {l}").trim_end().to_owned());
        let lines = std::iter::once(format!("; {name}:")).chain(lines).collect();
        let range = block.map_or(self.function.end..self.function.end, |b| b.range);
        Ok(Verdict { edits: vec![Edit { range, lines }], skipped: None })
    }
}
