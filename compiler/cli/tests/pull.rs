//! `attar pull` through the built binary, against servers of our own on the loopback interface.

use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

/// A request as the server saw it: path, `Range`, `Authorization`.
type Seen = Arc<Mutex<Vec<(String, Option<String>, Option<String>)>>>;

/// What a server answers: status line, headers, body, and how much of the body it really sends.
struct Reply {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    send: usize,
}

impl Reply {
    fn whole(body: &[u8]) -> Reply {
        Reply { status: "200 OK", headers: Vec::new(), body: body.to_vec(), send: body.len() }
    }
}

/// Serves until the test process ends. `answer` gets the number of the request, its path and its range start.
fn serve(answer: impl Fn(usize, &str, u64) -> Reply + Send + 'static) -> (String, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    let seen = Seen::default();
    let log = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            // A client that hangs up early is part of the game.
            let _ = one_request(stream, &log, &answer);
        }
    });
    (address, seen)
}

fn one_request(
    mut stream: TcpStream,
    log: &Seen,
    answer: &impl Fn(usize, &str, u64) -> Reply,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or("").to_owned();
    let (mut range, mut authorization) = (None, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let start = range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let number = {
        let mut log = log.lock().expect("unpoisoned");
        log.push((path.clone(), range, authorization));
        log.len()
    };
    let r = answer(number, &path, start.unwrap_or(0));
    write!(stream, "HTTP/1.1 {}\r\nConnection: close\r\nContent-Length: {}\r\n", r.status, r.body.len())?;
    for (name, value) in &r.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n")?;
    stream.write_all(&r.body[..r.send])
}

fn attar(home: &Path, environment: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attar"));
    command.env("ATTAR_HOME", home).env("NO_PROXY", "127.0.0.1").env_remove("HF_TOKEN");
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name);
    }
    command.envs(environment.iter().copied()).args(args).output().expect("attar starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn content(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn a_broken_transfer_is_resumed_and_then_cached() {
    let body = content(300_000);
    let served = body.clone();
    let (server, seen) = serve(move |number, _, start| {
        let start = start as usize;
        let rest = &served[start..];
        let etag = ("ETag", "\"v1\"".to_owned());
        match number {
            1 => Reply { headers: vec![etag], send: 100_000, ..Reply::whole(rest) },
            2 => Reply {
                status: "503 Busy",
                headers: vec![("Retry-After", "0".to_owned())],
                body: Vec::new(),
                send: 0,
            },
            _ => {
                let range = format!("bytes {start}-{}/{}", served.len() - 1, served.len());
                let headers = vec![etag, ("Content-Range", range)];
                Reply { status: "206 Partial Content", headers, ..Reply::whole(rest) }
            }
        }
    });
    let home = tempfile::tempdir().expect("a folder");
    let url = format!("{server}/some/model.gguf");
    let out = attar(home.path(), &[], &["pull", &url, "--json"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(report["fetched"], true);
    assert_eq!(report["files"][0]["bytes"], 300_000);
    assert_eq!(std::fs::read(report["path"].as_str().expect("a path")).expect("the file"), body);
    let ranges: Vec<Option<String>> = seen.lock().expect("unpoisoned").iter().map(|s| s.1.clone()).collect();
    assert_eq!(ranges[0], None);
    assert!(ranges[1..].iter().all(|r| r.as_deref() == Some("bytes=100000-")), "{ranges:?}");

    let again = attar(home.path(), &[], &["pull", &url, "--json"]);
    let report: Value = serde_json::from_slice(&again.stdout).expect("JSON");
    assert_eq!(report["fetched"], false);
    assert_eq!(seen.lock().expect("unpoisoned").len(), ranges.len(), "no request for what is there");
}

#[test]
fn a_hub_repository_is_fetched_without_what_is_not_needed() {
    let (server, seen) = serve(|_, path, _| {
        if path.starts_with("/api/models/org/tiny/revision/main") {
            let files =
                ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "../evil.json"];
            let siblings: Vec<Value> = files.iter().map(|f| serde_json::json!({ "rfilename": f })).collect();
            let info = serde_json::json!({ "sha": "0123abcd", "siblings": siblings });
            return Reply::whole(info.to_string().as_bytes());
        }
        Reply::whole(path.as_bytes())
    });
    let home = tempfile::tempdir().expect("a folder");
    let environment = [("HF_ENDPOINT", server.as_str()), ("HF_TOKEN", "secret")];
    let out = attar(home.path(), &environment, &["pull", "hf:org/tiny"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let folder = String::from_utf8(out.stdout).expect("text");
    let config = std::fs::read_to_string(Path::new(folder.trim()).join("config.json")).expect("the file");
    assert_eq!(config, "/org/tiny/resolve/0123abcd/config.json");
    let seen = seen.lock().expect("unpoisoned");
    assert_eq!(seen.len(), 3, "the list and two files: {seen:?}");
    assert!(seen.iter().all(|s| s.2.as_deref() == Some("Bearer secret")), "{seen:?}");
}

#[test]
fn a_wrong_hash_is_refused() {
    let (server, _) = serve(|_, path, _| {
        if path.starts_with("/api/") {
            let lfs = serde_json::json!({ "sha256": "00".repeat(32), "size": 3 });
            let file = serde_json::json!({ "rfilename": "model.safetensors", "lfs": lfs });
            let info = serde_json::json!({ "sha": "0123abcd", "siblings": [file] });
            return Reply::whole(info.to_string().as_bytes());
        }
        Reply::whole(b"abc")
    });
    let home = tempfile::tempdir().expect("a folder");
    let out = attar(home.path(), &[("HF_ENDPOINT", &server)], &["pull", "hf:org/tiny"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(stderr(&out).contains("SHA-256"), "{}", stderr(&out));
    let found = attar(home.path(), &[], &["pull", "--list", "--json"]);
    let listed: Value = serde_json::from_slice(&found.stdout).expect("JSON");
    assert_eq!(listed["pulled"], serde_json::json!([]));
}

#[test]
fn what_is_wrong_with_a_name_is_said() {
    let home = tempfile::tempdir().expect("a folder");
    let cases: [(&str, i32, &str); 4] = [
        ("smollm", 2, "smollm2-135m"),
        ("hf:nothing", 2, "hf:org/model"),
        ("https://example.invalid/model.bin", 2, ".gguf"),
        ("hf:org/absent", 2, "not found"),
    ];
    let (server, _) = serve(|_, _, _| Reply { status: "404 Not Found", ..Reply::whole(b"") });
    for (name, code, text) in cases {
        let out = attar(home.path(), &[("HF_ENDPOINT", &server)], &["pull", name]);
        assert_eq!(out.status.code(), Some(code), "{name}: {}", stderr(&out));
        assert!(stderr(&out).contains(text), "{name}: {}", stderr(&out));
    }
}
