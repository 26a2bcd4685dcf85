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

/// The real SmolLM2 as GGUF, if `ATTAR_SMOLLM2_GGUF` names it; a test without it says so.
pub(crate) fn smollm2_gguf() -> Option<PathBuf> {
    let path = std::env::var_os("ATTAR_SMOLLM2_GGUF").map(PathBuf::from).filter(|p| p.exists());
    if path.is_none() {
        // Written past the test harness, which would swallow it.
        let line = "skipped 1: ATTAR_SMOLLM2_GGUF names no SmolLM2-135M-Instruct.Q4_1.gguf\n";
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    path
}
