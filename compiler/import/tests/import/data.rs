//! Where the goldens are.

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A path under `tests/data` of the repository.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(path)
}

/// A golden.
pub(crate) fn json(path: &str) -> Value {
    let path = data(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The real SmolLM2 as GGUF: `ATTAR_SMOLLM2_GGUF`, or what `attar pull smollm2-135m-q4_1` has left in the cache. A test
/// without it says so.
pub(crate) fn smollm2_gguf() -> Option<PathBuf> {
    let path = set("ATTAR_SMOLLM2_GGUF").filter(|p| p.exists()).or_else(pulled);
    if path.is_none() {
        // Written past the test harness, which would swallow it.
        let line = "skipped 1: no SmolLM2-135M-Instruct.Q4_1.gguf; pull smollm2-135m-q4_1 or set ATTAR_SMOLLM2_GGUF\n";
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    path
}

fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// A finished pull has a `pulled.json` that names the model.
fn pulled() -> Option<PathBuf> {
    let root = set("ATTAR_HOME")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("attar")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/attar")))?;
    let folder = root.join("models/smollm2-135m-q4_1");
    let note: Value = serde_json::from_slice(&std::fs::read(folder.join("pulled.json")).ok()?).ok()?;
    Some(folder.join(note["model"].as_str()?))
        .filter(|p| p.extension().is_some_and(|x| x == "gguf") && p.exists())
}
