//! Compiled kernels kept in a folder.
//!
//! The key is a hash of all that the bytes depend on: source, options, target and NVRTC's version. A file is written beside its
//! place and then moved there, so that two compiles at once do each other no harm. Whatever cannot be read, or is not what was
//! written, is compiled anew: a cache never makes a compile fail.

use crate::arch::CudaTarget;
use crate::nvrtc::{OPTIONS, Output};
use std::io::Write;
use std::path::{Path, PathBuf};

/// First bytes of a file; changes with its layout.
const MAGIC: &[u8; 8] = b"attarcu1";

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The folder is made when something is first put there.
    pub fn new(folder: PathBuf) -> Cache {
        Cache { folder }
    }

    /// The key of one compilation.
    pub fn key(source: &str, target: CudaTarget, version: (i32, i32)) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        let numbers = format!("{}.{}", version.0, version.1);
        for part in [source, &target.to_string(), &numbers, &OPTIONS.join(" ")] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.finalize()
    }

    /// What was kept under a key.
    pub fn get(&self, key: &blake3::Hash) -> Option<Output> {
        parse(&std::fs::read(self.path(key)).ok()?)
    }

    /// Keeps a result; does nothing where the folder cannot be written.
    pub fn put(&self, key: &blake3::Hash, output: &Output) {
        let written = std::fs::create_dir_all(&self.folder).and_then(|()| {
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&bytes(output))?;
            file.persist(self.path(key)).map_err(|e| e.error)
        });
        // What is not kept is compiled again.
        drop(written);
    }

    fn path(&self, key: &blake3::Hash) -> PathBuf {
        self.folder.join(Path::new(key.to_hex().as_str()).with_extension("cuda"))
    }
}

fn bytes(output: &Output) -> Vec<u8> {
    let mut body = Vec::new();
    for part in [output.ptx.as_bytes(), &output.cubin, output.log.as_bytes()] {
        body.extend_from_slice(&(part.len() as u64).to_le_bytes());
        body.extend_from_slice(part);
    }
    let hash = blake3::hash(&body);
    [MAGIC.as_slice(), hash.as_bytes(), &body].concat()
}

fn parse(file: &[u8]) -> Option<Output> {
    let (magic, rest) = file.split_at_checked(MAGIC.len())?;
    let (hash, mut body) = rest.split_at_checked(blake3::OUT_LEN)?;
    if magic != MAGIC || blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let mut part = || {
        let (len, rest) = body.split_first_chunk::<8>()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        body = rest;
        Some(part.to_vec())
    };
    let (ptx, cubin, log) = (part()?, part()?, part()?);
    Some(Output { ptx: String::from_utf8(ptx).ok()?, cubin, log: String::from_utf8(log).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_again_and_damaged_ones_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(folder.path().join("kernels"));
        let key = Cache::key("source", CudaTarget::Ptx, (13, 0));
        assert_eq!(cache.get(&key), None);
        let output = Output { ptx: ".version".to_owned(), cubin: vec![1, 2, 3], log: "a log".to_owned() };
        cache.put(&key, &output);
        assert_eq!(cache.get(&key), Some(output));
        let path = cache.path(&key);
        let mut bytes = std::fs::read(&path).expect("kept");
        for len in 0..bytes.len() {
            assert_eq!(parse(&bytes[..len]), None, "{len}");
        }
        *bytes.last_mut().expect("not empty") ^= 1;
        std::fs::write(&path, bytes).expect("writable");
        assert_eq!(cache.get(&key), None);
    }

    #[test]
    fn everything_the_bytes_depend_on_is_in_the_key() {
        let key = Cache::key("source", CudaTarget::Ptx, (13, 0));
        assert_ne!(key, Cache::key("source ", CudaTarget::Ptx, (13, 0)));
        assert_ne!(key, Cache::key("source", CudaTarget::ALL[0], (13, 0)));
        assert_ne!(key, Cache::key("source", CudaTarget::Ptx, (13, 1)));
        assert_eq!(key, Cache::key("source", CudaTarget::Ptx, (13, 0)));
    }
}
