//! Model hubs that speak the Hugging Face HTTP interface.
//!
//! `GET {endpoint}/api/models/{id}/revision/{rev}?blobs=true` lists a revision's files; each is at
//! `{endpoint}/{id}/resolve/{commit}/{file}`. `HF_ENDPOINT` chooses another hub, `HF_TOKEN` opens gated models.
//! Only what a compile needs is fetched: configuration, tokenizer, safetensors, licence.

use crate::failure::{Failure, Result};
use crate::fetch::download::{self, Want};
use crate::fetch::http::{self, Patience};
use crate::home::{Home, Pulled};
use crate::terminal::Terminal;
use serde::Deserialize;
use std::path::PathBuf;

/// `org/model` at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    pub id: String,
    pub revision: String,
}

/// The hub in use, without a trailing slash.
pub fn endpoint() -> String {
    let set = std::env::var("HF_ENDPOINT").ok().filter(|v| !v.is_empty());
    set.unwrap_or_else(|| "https://huggingface.co".to_owned()).trim_end_matches('/').to_owned()
}

/// The user's token, if there is one.
pub fn token() -> Option<String> {
    std::env::var("HF_TOKEN").ok().map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
}

impl Repository {
    /// Reads `org/model[@rev]`.
    ///
    /// # Errors
    /// An input failure when it is not of that form.
    pub fn parse(text: &str) -> Result<Repository> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let part = |s: &str| {
            !s.is_empty()
                && !s.starts_with('.')
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let good = id.split_once('/').is_some_and(|(org, model)| part(org) && part(model));
        if !good || revision.is_empty() || revision.contains(['?', '#', ' ']) || revision.contains("..") {
            return Err(Failure::input(format!("hf:{text}: expected hf:org/model or hf:org/model@revision")));
        }
        Ok(Repository { id: id.to_owned(), revision: revision.to_owned() })
    }

    fn file_url(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", endpoint(), self.id)
    }
}

#[derive(Deserialize)]
struct RevisionInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// Fetches a checkpoint of the hub. The caller holds the lock of `name`.
///
/// # Errors
/// Failures of network and disk; an input failure when the repository holds no safetensors.
pub fn pull(home: &Home, name: &str, repository: &Repository, terminal: Terminal) -> Result<Pulled> {
    let revision = repository.revision.replace('/', "%2F");
    let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", endpoint(), repository.id);
    let headers: Vec<_> = token().map(|t| ("Authorization", format!("Bearer {t}"))).into_iter().collect();
    let (_, text) = http::get_text(&url, &headers)?;
    let info: RevisionInfo = serde_json::from_str(&text)
        .map_err(|e| Failure::environment(format!("{url}: not the answer of a hub: {e}")))?;
    if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(Failure::environment(format!("{url}: {:?} is no commit", info.sha)));
    }
    let mut siblings: Vec<&Sibling> = info.siblings.iter().filter(|s| wanted(&s.rfilename)).collect();
    if siblings.iter().any(|s| s.rfilename == "model.safetensors.index.json") {
        siblings.retain(|s| s.rfilename != "model.safetensors");
    }
    if !siblings.iter().any(|s| s.rfilename.ends_with(".safetensors")) {
        let files: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).take(20).collect();
        let problem = format!("hf:{}: no model*.safetensors among {}", repository.id, files.join(", "));
        return Err(Failure::input(problem));
    }
    // Small files first: a wrong configuration shows before the weights have been fetched.
    siblings.sort_by_key(|s| (s.rfilename.ends_with(".safetensors"), s.rfilename.clone()));
    let wants = siblings.iter().map(|s| {
        let want = Want {
            url: repository.file_url(&info.sha, &s.rfilename),
            sha256: s.lfs.as_ref().and_then(|l| l.sha256.clone()),
            bytes: s.lfs.as_ref().and_then(|l| l.size).or(s.size),
            token: token(),
            patience: Patience::Long,
        };
        (s.rfilename.clone(), want)
    });
    fetch_all(home, name, repository, &info.sha, wants.collect(), terminal)
}

/// Fetches files whose hashes are known beforehand: `(name, bytes, sha256)`. With short patience a hub that does not
/// answer the first request is given up at once.
///
/// # Errors
/// Failures of network and disk.
pub fn pull_pinned(
    home: &Home,
    name: &str,
    repository: &Repository,
    files: &[(&str, u64, &str)],
    patience: Patience,
    terminal: Terminal,
) -> Result<Pulled> {
    let wants = files.iter().enumerate().map(|(i, (file, bytes, sha256))| {
        let want = Want {
            url: repository.file_url(&repository.revision, file),
            sha256: Some((*sha256).to_owned()),
            bytes: Some(*bytes),
            token: token(),
            patience: if i == 0 { patience } else { Patience::Long },
        };
        ((*file).to_owned(), want)
    });
    fetch_all(home, name, repository, &repository.revision, wants.collect(), terminal)
}

fn fetch_all(
    home: &Home,
    name: &str,
    repository: &Repository,
    commit: &str,
    wants: Vec<(String, Want)>,
    terminal: Terminal,
) -> Result<Pulled> {
    // One folder per commit: files of two commits never mix.
    let inner = PathBuf::from(commit);
    let folder = home.folder(name).join(&inner);
    crate::home::make_folder(&folder)?;
    let mut files = Vec::new();
    for (file, want) in wants {
        let mut got = download::fetch(&want, &folder, &file, terminal)?;
        got.file = inner.join(&got.file);
        files.push(got);
    }
    Ok(Pulled {
        name: name.to_owned(),
        source: format!("{}/{}", endpoint(), repository.id),
        revision: Some(commit.to_owned()),
        model: inner,
        files,
    })
}

/// Whether a file of a repository belongs to the checkpoint. Names with a folder never do.
fn wanted(file: &str) -> bool {
    const SMALL: [&str; 7] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    let plain =
        file.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !file.starts_with('.');
    plain
        && (SMALL.contains(&file)
            || (file.starts_with("model") && file.ends_with(".safetensors"))
            || file.to_ascii_uppercase().starts_with("LICENSE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_parse() {
        let r = Repository::parse("org/model-1.5").unwrap();
        assert_eq!((r.id.as_str(), r.revision.as_str()), ("org/model-1.5", "main"));
        assert_eq!(Repository::parse("org/model@v1").unwrap().revision, "v1");
        for bad in ["model", "a/b/c", "/b", "a/", "../b", "a/b@", "a/b@../x", "a b/c"] {
            assert!(Repository::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_checkpoint_is_fetched() {
        for yes in ["config.json", "model-00001-of-00002.safetensors", "LICENSE", "license.txt"] {
            assert!(wanted(yes), "{yes}");
        }
        for no in ["pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors", "../config.json", ".x"]
        {
            assert!(!wanted(no), "{no}");
        }
    }
}
