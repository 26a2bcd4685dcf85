//! Where NVRTC may be.

use super::Nvrtc;
use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Major version of NVRTC whose machine code and PTX the runtime's drivers take.
pub const MAJOR: i32 = 13;

/// Environment variable that names NVRTC's file, or the folder it is in.
pub const VARIABLE: &str = "ATTAR_NVRTC";

/// The Python package that brings NVRTC without a toolkit. Its PTX is the oldest of version 13, so any driver for it loads it.
pub const WHEEL: &str = "nvidia-cuda-nvrtc==13.0.88";

const FILE: &str = "libnvrtc.so.13";

/// As [`Nvrtc::find`].
pub(super) fn find() -> Result<Nvrtc> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = set(VARIABLE) {
        if path.is_dir() {
            return from_folder(&path).unwrap_or_else(|| {
                Err(Error::Unavailable { searched: vec![format!("{} of {VARIABLE}", path.display())] })
            });
        }
        return Nvrtc::load(&path);
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set);
    let toolkits = toolkits.chain(["/usr/local/cuda", "/usr/local/cuda-13", "/opt/cuda"].map(PathBuf::from));
    let mut folders: Vec<PathBuf> =
        toolkits.flat_map(|t| ["lib64", "targets/x86_64-linux/lib", "lib"].map(|l| t.join(l))).collect();
    let homes = set("VIRTUAL_ENV").into_iter().chain(set("HOME").map(|h| h.join(".local")));
    for prefix in homes.chain(["/usr/local", "/usr"].map(PathBuf::from)) {
        folders.extend(wheels(&prefix));
    }
    let mut searched = Vec::new();
    // One of another version is worth telling only when no right one is found.
    let mut wrong = None;
    for folder in folders {
        match from_folder(&folder) {
            Some(Ok(found)) => return Ok(found),
            Some(Err(e)) => wrong = wrong.or(Some(e)),
            None => searched.push(folder.display().to_string()),
        }
    }
    match Nvrtc::load(Path::new(FILE)) {
        Ok(found) => Ok(found),
        Err(_) => {
            searched.retain(|s| Path::new(s).is_dir());
            searched.push(format!("{FILE} of the system"));
            Err(wrong.unwrap_or(Error::Unavailable { searched }))
        }
    }
}

/// NVRTC in a folder: the right version if it is there, else the fault of any other; `None` when there is none.
fn from_folder(folder: &Path) -> Option<Result<Nvrtc>> {
    let right = folder.join(FILE);
    if right.is_file() {
        return Some(Nvrtc::load(&right));
    }
    let mut others = files(folder, "libnvrtc.so");
    others.sort();
    others.first().map(|path| Nvrtc::load(path))
}

/// The library of built-in functions beside NVRTC.
pub(super) fn builtins_beside(path: &Path) -> Option<PathBuf> {
    let mut found = files(path.parent()?, "libnvrtc-builtins.so");
    found.sort();
    found.into_iter().next_back()
}

/// Folders of NVIDIA's wheels in the Python installations below a prefix.
fn wheels(prefix: &Path) -> Vec<PathBuf> {
    let pythons = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
    let mut pythons: Vec<PathBuf> =
        pythons.map(|e| e.path()).filter(|p| name_of(p).starts_with("python3")).collect();
    pythons.sort();
    let packages = |p: &PathBuf| ["site-packages", "dist-packages"].map(|s| p.join(s));
    pythons.iter().flat_map(packages).map(|p| p.join("nvidia/cu13/lib")).collect()
}

fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    if folder.as_os_str().is_empty() {
        return Vec::new();
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| name_of(p).starts_with(prefix) && p.is_file()).collect()
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default()
}
