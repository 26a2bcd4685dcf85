//! `attar compile MODEL --from ARTIFACT`: makes an artifact again, and with `--check` proves that the bytes are the same.

use crate::failure::{Failure, Result};
use crate::terminal::{Terminal, bytes_text};
use attar_artifact::manifest::Section;
use attar_artifact::{Artifact, Verify};
use attar_compiler::{Again, CompileReport, GENERATOR, Origin, Remake, describe_inputs, remake};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// Options that make `artifact` again from `source`. Refuses another checkpoint when the bytes are to be compared.
///
/// # Errors
/// Those of opening it; an input failure when it does not say how it was made, or from something else.
pub(crate) fn options(
    artifact: &Path,
    source: PathBuf,
    out: PathBuf,
    again: Again,
    check: bool,
    terminal: Terminal,
) -> Result<Remake> {
    let opened = Artifact::open(artifact, Verify::Full)?;
    let remake = remake(&opened, source, out, again)?;
    if check && let Some(problem) = remake.origin.changed_input(&describe_inputs(&remake.options.source)?) {
        return Err(Failure::input(format!("--check: {problem}")));
    }
    if remake.origin.by != GENERATOR {
        terminal
            .note(format!("made by {}; this is {GENERATOR}, which may make other bytes", remake.origin.by));
    }
    Ok(remake)
}

/// Says that the artifact made again is the same, or in what it differs.
///
/// # Errors
/// An input failure when it is not the same.
pub(crate) fn compare(was: &Path, report: &CompileReport, is: &Path, origin: &Origin) -> Result<String> {
    if same_bytes(was, is)? {
        let (bytes, hash) =
            (bytes_text(report.artifact_bytes), report.artifact_hash.as_deref().unwrap_or(""));
        return Ok(format!("{} was made again byte by byte: {bytes}, content {hash}", was.display()));
    }
    let sections = |path: &Path| -> Result<Vec<Section>> {
        Ok(Artifact::open(path, Verify::None)?.manifest().sections.clone())
    };
    let (before, after) = (sections(was)?, sections(is)?);
    let find = |of: &[Section], name: &str| of.iter().find(|s| s.kind.name() == name).map(|s| s.hash.clone());
    let mut names: Vec<String> = before.iter().chain(&after).map(|s| s.kind.name()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| find(&before, name) != find(&after, name));
    let differ = if names.is_empty() { "the manifest".to_owned() } else { names.join(", ") };
    Err(Failure::input(format!(
        "{} was not made again: {differ} differ; it was made by {}, and this is {GENERATOR}",
        was.display(),
        origin.by
    )))
}

fn same_bytes(a: &Path, b: &Path) -> Result<bool> {
    let open = |path: &Path| {
        let file = File::open(path).map_err(|e| Failure::environment(format!("{}: {e}", path.display())))?;
        Ok::<_, Failure>((file.metadata()?.len(), BufReader::with_capacity(1 << 20, file)))
    };
    let ((a_len, mut a), (b_len, mut b)) = (open(a)?, open(b)?);
    if a_len != b_len {
        return Ok(false);
    }
    let (mut x, mut y) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    let mut left = a_len;
    while left > 0 {
        let n = left.min(1 << 20) as usize;
        a.read_exact(&mut x[..n])?;
        b.read_exact(&mut y[..n])?;
        if x[..n] != y[..n] {
            return Ok(false);
        }
        left -= n as u64;
    }
    Ok(true)
}
