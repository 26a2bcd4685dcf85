//! The cache folder: where pulled checkpoints live and how a name leads to one.
//!
//! `$ATTAR_HOME`, else `$XDG_CACHE_HOME/attar`, else `~/.cache/attar`. A pulled checkpoint is a folder
//! `models/<slug>/` whose `pulled.json` is written last: without it the pull is unfinished.

use crate::failure::{Failure, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The cache folder of this user.
#[derive(Clone, Debug)]
pub struct Home {
    pub root: PathBuf,
}

/// What `pulled.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// As the user typed it.
    pub name: String,
    /// Where the files came from.
    pub source: String,
    /// Commit or version, where there is one.
    pub revision: Option<String>,
    /// What `attar compile` reads, relative to the folder: a file or `.`.
    pub model: PathBuf,
    pub files: Vec<PulledFile>,
}

/// One file of a pulled checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledFile {
    /// Relative to the folder.
    pub file: PathBuf,
    pub bytes: u64,
    /// Hexadecimal.
    pub sha256: String,
}

impl Home {
    /// The folder the environment asks for.
    ///
    /// # Errors
    /// An environment failure when neither `ATTAR_HOME`, `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn from_env() -> Result<Home> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = set("ATTAR_HOME")
            .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("attar")))
            .or_else(|| set("HOME").map(|p| p.join(".cache/attar")))
            .or_else(|| set("LOCALAPPDATA").map(|p| p.join("attar")))
            .ok_or_else(|| Failure::environment("no cache folder: set ATTAR_HOME"))?;
        Ok(Home { root })
    }

    /// Folder of one pulled name.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.root.join("models").join(slug(name))
    }

    /// A finished pull of that name whose files are all there with the right sizes.
    pub fn find(&self, name: &str) -> Option<(PathBuf, Pulled)> {
        let folder = self.folder(name);
        let text = fs::read(folder.join("pulled.json")).ok()?;
        let pulled: Pulled = serde_json::from_slice(&text).ok()?;
        let whole = |f: &PulledFile| fs::metadata(folder.join(&f.file)).is_ok_and(|m| m.len() == f.bytes);
        pulled.files.iter().all(whole).then(|| (folder.join(&pulled.model), pulled))
    }

    /// Every finished pull, by folder name.
    pub fn all(&self) -> Vec<(PathBuf, Pulled)> {
        let Ok(entries) = fs::read_dir(self.root.join("models")) else { return Vec::new() };
        let mut folders: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        folders.sort();
        let read = |folder: PathBuf| {
            let pulled: Pulled = serde_json::from_slice(&fs::read(folder.join("pulled.json")).ok()?).ok()?;
            Some((folder, pulled))
        };
        folders.into_iter().filter_map(read).collect()
    }

    /// Marks a pull as finished.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self, pulled: &Pulled) -> Result<()> {
        let path = self.folder(&pulled.name).join("pulled.json");
        let temporary = path.with_extension("json.part");
        fs::write(&temporary, serde_json::to_vec_pretty(pulled)?)?;
        Ok(fs::rename(&temporary, &path)?)
    }

    /// Creates the folder of a name and locks it against a second pull; waits while another holds it. The lock ends
    /// when the file is dropped.
    ///
    /// # Errors
    /// When the folder or the lock file cannot be made.
    pub fn lock(&self, name: &str, on_wait: impl FnOnce()) -> Result<File> {
        let folder = self.folder(name);
        make_folder(&folder)?;
        let path = folder.join(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| Failure::environment(format!("{}: {e}", path.display())))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                on_wait();
                file.lock()?;
            }
            Err(fs::TryLockError::Error(e)) => {
                return Err(Failure::environment(format!("{}: {e}", path.display())));
            }
        }
        Ok(file)
    }
}

/// Creates a folder and its parents.
///
/// # Errors
/// An environment failure naming the folder.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Failure::environment(format!("{}: {e}", path.display())))
}

/// A folder name for a model name: letters, digits, `.`, `_`, `-` stay; `/` becomes `--`; what else there is becomes
/// `_`, and then a hash keeps different names apart.
fn slug(name: &str) -> String {
    let mut out = String::new();
    let mut lossy = name.starts_with('.');
    for c in name.chars() {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '-' => out.push(c),
            '/' => out.push_str("--"),
            ':' | '@' => out.push('-'),
            _ => {
                lossy = true;
                out.push('_');
            }
        }
    }
    lossy |= out.len() > 100 || name.contains("--") || name.contains("://");
    if lossy {
        let end = out.rsplit("--").next().unwrap_or("").trim_start_matches(['.', '-']).to_owned();
        let end: String = end.chars().take(60).collect();
        out = format!("{}-{end}", &blake3::hash(name.as_bytes()).to_hex()[..16]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_stay_inside_the_folder_and_apart() {
        assert_eq!(slug("smollm2-135m"), "smollm2-135m");
        assert_eq!(slug("hf:org/model@main"), "hf-org--model-main");
        for name in ["..", ".", "../x", "a/../../b", "https://h/x?y=1", "ü"] {
            let s = slug(name);
            assert!(!s.contains('/') && s != ".." && s != ".", "{name} became {s}");
        }
        assert_ne!(slug("https://h/x?y"), slug("https://h/x&y"));
    }

    #[test]
    fn a_pull_counts_only_when_finished_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home { root: dir.path().to_owned() };
        assert!(home.find("m").is_none());
        let lock = home.lock("m", || ()).unwrap();
        fs::write(home.folder("m").join("m.gguf"), b"1234").unwrap();
        assert!(home.find("m").is_none(), "no pulled.json yet");
        let file = PulledFile { file: "m.gguf".into(), bytes: 4, sha256: String::new() };
        let pulled = Pulled {
            name: "m".into(),
            source: "test".into(),
            revision: None,
            model: "m.gguf".into(),
            files: vec![file],
        };
        home.finish(&pulled).unwrap();
        drop(lock);
        assert_eq!(home.find("m").unwrap().1, pulled);
        assert_eq!(home.all().len(), 1);
        fs::write(home.folder("m").join("m.gguf"), b"123").unwrap();
        assert!(home.find("m").is_none(), "a cut file is no finished pull");
    }
}
