//! Resumable downloads: into `FILE.part`, checked, then renamed.
//!
//! A broken transfer is taken up where it stopped when the server still has the same file (`If-Range` with its ETag,
//! or a hash known beforehand). Errors that may pass are retried with growing pauses as long as bytes keep arriving.

use crate::failure::{Failure, Result};
use crate::fetch::http::{self, Answer, Patience};
use crate::home::PulledFile;
use crate::terminal::Terminal;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::StatusCode;

/// Attempts without a new byte before giving up.
const ATTEMPTS: u32 = 5;

/// What to fetch, and what it must be.
#[derive(Clone, Debug, Default)]
pub struct Want {
    pub url: String,
    /// Hexadecimal; unchecked when unknown.
    pub sha256: Option<String>,
    pub bytes: Option<u64>,
    /// Sent as a bearer token, to this host only.
    pub token: Option<String>,
    pub patience: Patience,
}

/// Fetches into `folder/name`. A file that is already there and right is kept.
///
/// # Errors
/// Environment failures of network and disk; an input failure when the server has no such file or another one.
pub fn fetch(want: &Want, folder: &Path, name: &str, terminal: Terminal) -> Result<PulledFile> {
    let target = folder.join(name);
    if let Some(kept) = already_there(want, &target)? {
        return Ok(PulledFile { file: PathBuf::from(name), ..kept });
    }
    let part = folder.join(format!("{name}.part"));
    let bar = terminal.bytes(want.bytes, name);
    let mut failed = 0;
    let mut hash_retry = true;
    loop {
        let before = length(&part);
        match transfer(want, &part, &bar) {
            Ok(()) => match check(want, &part) {
                Ok(done) => {
                    fs::rename(&part, &target)
                        .map_err(|e| Failure::environment(format!("{}: {e}", target.display())))?;
                    // Only a note for the next attempt; it may not exist.
                    let _ = fs::remove_file(etag_path(&part));
                    bar.finish_and_clear();
                    return Ok(PulledFile { file: PathBuf::from(name), ..done });
                }
                // Leftovers of another file may have been continued: once from the beginning.
                Err(_) if hash_retry && before > 0 => {
                    hash_retry = false;
                    remove(&part)?;
                }
                Err(e) => {
                    remove(&part)?;
                    return Err(e);
                }
            },
            Err(Stopped::For(failure)) => return Err(failure),
            Err(Stopped::Passing { problem, pause }) => {
                failed = if length(&part) > before { 0 } else { failed + 1 };
                if failed > 0 && want.patience == Patience::Short {
                    return Err(Failure::environment(problem));
                }
                if failed >= ATTEMPTS {
                    let problem =
                        format!("{problem}; gave up after {ATTEMPTS} attempts, run it again to resume");
                    return Err(Failure::environment(problem));
                }
                let pause = pause.unwrap_or(Duration::from_secs(1 << failed.min(4)));
                terminal.note(format!("{problem}; again in {} s", pause.as_secs()));
                std::thread::sleep(pause);
            }
        }
    }
}

/// Why one attempt ended without the whole file.
enum Stopped {
    For(Failure),
    Passing { problem: String, pause: Option<Duration> },
}

impl From<io::Error> for Stopped {
    fn from(e: io::Error) -> Stopped {
        Stopped::For(Failure::environment(e))
    }
}

fn transfer(want: &Want, part: &Path, bar: &indicatif::ProgressBar) -> std::result::Result<(), Stopped> {
    let have = length(part);
    if have > 0 && want.bytes == Some(have) {
        return Ok(());
    }
    let etag = fs::read_to_string(etag_path(part)).ok();
    let resume = have > 0 && (etag.is_some() || want.sha256.is_some());
    let mut headers = Vec::new();
    if let Some(token) = &want.token {
        headers.push(("Authorization", format!("Bearer {token}")));
    }
    if resume {
        headers.push(("Range", format!("bytes={have}-")));
        if let Some(etag) = &etag {
            headers.push(("If-Range", etag.clone()));
        }
    }
    let answer = match http::get(&want.url, &headers, want.patience) {
        Ok(answer) => answer,
        Err(e) if e.transient => return Err(Stopped::Passing { problem: e.to_string(), pause: None }),
        Err(e) => return Err(Stopped::For(e.into())),
    };
    let header = |name: &str| answer.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let append = match answer.status {
        StatusCode::OK => false,
        StatusCode::PARTIAL_CONTENT if resume && starts_at(header("content-range"), have) => true,
        StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
            remove(part).map_err(Stopped::For)?;
            let problem = format!("{}: the server has another file than before", want.url);
            return Err(Stopped::Passing { problem, pause: Some(Duration::ZERO) });
        }
        s if s.is_server_error()
            || s == StatusCode::TOO_MANY_REQUESTS
            || s == StatusCode::REQUEST_TIMEOUT =>
        {
            let pause = header("retry-after").and_then(|v| v.parse().ok());
            let pause = pause.map(|s: u64| Duration::from_secs(s.min(60)));
            return Err(Stopped::Passing { problem: format!("{}: {s}", want.url), pause });
        }
        s => return Err(Stopped::For(http::status_failure(&want.url, s))),
    };
    if !append {
        match header("etag").filter(|e| e.starts_with('"')) {
            Some(etag) => fs::write(etag_path(part), etag)?,
            None => remove(&etag_path(part)).map_err(Stopped::For)?,
        }
    }
    let total = header("content-length").and_then(|v| v.parse::<u64>().ok());
    let start = if append { have } else { 0 };
    if let Some(total) = total {
        bar.set_length(start + total);
    }
    bar.set_position(start);
    receive(answer, part, append, total, bar).map_err(|e| match e {
        Stopped::Passing { problem, pause } => {
            Stopped::Passing { problem: format!("{}: {problem}", want.url), pause }
        }
        other => other,
    })
}

fn receive(
    mut answer: Answer,
    part: &Path,
    append: bool,
    total: Option<u64>,
    bar: &indicatif::ProgressBar,
) -> std::result::Result<(), Stopped> {
    let mut file = File::options().create(true).write(true).append(append).truncate(!append).open(part)?;
    let mut buffer = vec![0u8; 1 << 17];
    let mut received = 0u64;
    loop {
        let n = match answer.body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Stopped::Passing { problem: e.to_string(), pause: None }),
        };
        file.write_all(&buffer[..n])?;
        received += n as u64;
        bar.inc(n as u64);
    }
    if total.is_some_and(|t| received < t) {
        return Err(Stopped::Passing { problem: "the connection ended early".to_owned(), pause: None });
    }
    Ok(file.sync_all()?)
}

/// Whether `Content-Range: bytes 100-199/200` begins at `at`.
fn starts_at(content_range: Option<String>, at: u64) -> bool {
    let start = content_range
        .as_deref()
        .and_then(|v| v.strip_prefix("bytes "))
        .and_then(|v| v.split('-').next())
        .and_then(|v| v.trim().parse::<u64>().ok());
    start == Some(at)
}

fn already_there(want: &Want, target: &Path) -> Result<Option<PulledFile>> {
    if want.sha256.is_none() || !target.is_file() {
        return Ok(None);
    }
    Ok(check(want, target).ok())
}

/// Length and hash of a received file, compared with what was wanted.
fn check(want: &Want, path: &Path) -> Result<PulledFile> {
    let (bytes, sha256) = hash_file(path)?;
    if want.bytes.is_some_and(|b| b != bytes) {
        let expected = want.bytes.unwrap_or(0);
        return Err(Failure::environment(format!("{}: expected {expected} bytes, got {bytes}", want.url)));
    }
    if let Some(expected) = want.sha256.as_ref().filter(|e| !e.eq_ignore_ascii_case(&sha256)) {
        let problem = format!("{}: SHA-256 is {sha256}, expected {expected}: not the pinned file", want.url);
        return Err(Failure::environment(problem));
    }
    Ok(PulledFile { file: PathBuf::new(), bytes, sha256 })
}

/// Length and SHA-256 (hexadecimal) of a file.
///
/// # Errors
/// When it cannot be read.
pub fn hash_file(path: &Path) -> Result<(u64, String)> {
    let problem = |e: io::Error| Failure::environment(format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(problem)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 17];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer).map_err(problem)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
    let hex = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok((bytes, hex))
}

fn etag_path(part: &Path) -> PathBuf {
    part.with_extension("part.etag")
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Failure::environment(format!("{}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}
