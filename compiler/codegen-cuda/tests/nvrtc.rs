//! What is said of libraries that are not the NVRTC that is needed. They are made here, by the C compiler.

use attar_codegen_cuda::{Error, Nvrtc};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A shared library of that source; `None`, after saying so, without a C compiler.
fn library(folder: &Path, source: &str) -> Option<PathBuf> {
    let (text, out) = (folder.join("stub.c"), folder.join("libnvrtc.so.13"));
    std::fs::write(&text, source).expect("writable");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&out).arg(&text).status();
    if built.is_ok_and(|s| s.success()) {
        return Some(out);
    }
    let _ = writeln!(std::io::stderr(), "skipped 1 test of NVRTC's loader: no C compiler");
    None
}

#[test]
fn a_library_of_another_version_is_refused_by_its_number() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = "int nvrtcVersion(int *major, int *minor) { *major = 12; *minor = 9; return 0; }";
    let Some(path) = library(folder.path(), source) else { return };
    let error = Nvrtc::load(&path).expect_err("another version");
    assert_eq!(error, Error::Version { path: path.clone(), found: (12, 9) });
    let said = error.to_string();
    assert!(said.contains("is NVRTC 12.9, and version 13 is needed"), "{said}");
    assert!(said.contains("nvidia-cuda-nvrtc==13.0.88") && said.contains("ATTAR_NVRTC"), "{said}");
    assert!(error.is_environment());
}

#[test]
fn what_is_no_nvrtc_is_told_as_such() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("absent.so");
    assert!(matches!(Nvrtc::load(&missing), Err(Error::Load { .. })));
    let text = folder.path().join("text.so");
    std::fs::write(&text, "not a library").expect("writable");
    assert!(matches!(Nvrtc::load(&text), Err(Error::Load { .. })));
    let Some(path) = library(folder.path(), "int something_else(void) { return 0; }") else { return };
    assert!(matches!(Nvrtc::load(&path), Err(Error::Symbol { symbol: "nvrtcVersion", .. })));
    let right = "int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }";
    let Some(path) = library(folder.path(), &format!("{right} int other;")) else { return };
    // A library that was loaded stays, so the new one goes by another name.
    let other = path.with_file_name("libnvrtc-new.so.13");
    std::fs::rename(&path, &other).expect("a rename");
    assert!(matches!(Nvrtc::load(&other), Err(Error::Symbol { symbol: "nvrtcCreateProgram", .. })));
}
