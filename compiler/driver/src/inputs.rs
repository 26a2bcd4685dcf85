//! Hashes of the files a model was compiled from.

use crate::error::{Error, Result};
use attar_import::SourceFile;
use attar_pass::Phase;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A file that went into an artifact.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InputFile {
    /// File name without its folder, so that the artifact does not depend on where the checkpoint stood.
    pub name: String,
    pub bytes: u64,
    /// BLAKE3, hexadecimal.
    pub blake3: String,
}

/// Hashes files, by name.
///
/// # Errors
/// When a file cannot be read.
pub(crate) fn hash_files(files: &[SourceFile]) -> Result<Vec<InputFile>> {
    let mut hashed = files.iter().map(|f| hash_file(&f.path)).collect::<Result<Vec<_>>>()?;
    hashed.sort();
    hashed.dedup();
    Ok(hashed)
}

pub(crate) fn hash_file(path: &Path) -> Result<InputFile> {
    let fail = |source| Error::io(Phase::Import, "read it", path, source);
    let mut file = File::open(path).map_err(fail)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0u8; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut chunk).map_err(fail)?;
        if n == 0 {
            break;
        }
        hasher.update(&chunk[..n]);
        bytes += n as u64;
    }
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(InputFile { name, bytes, blake3: hasher.finalize().to_hex().to_string() })
}
