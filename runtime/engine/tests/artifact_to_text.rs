//! From an artifact file to text: opening, choosing code, running machine code, refusing what is damaged or foreign.
//!
//! The artifact's only kernel is assembled here: the next token is the last one plus one.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod successor;

use attar_artifact::certificate::{Certificate, Quality, Text};
use attar_runtime::{
    Control, ErrorKind, GenerateOptions, Model, OpenOptions, Requirement, SessionOptions, Verify,
};
use successor::{VOCAB, X86, write, write_certified};

fn run(model: &Model, first: u32, n: usize) -> Vec<u32> {
    let mut session = model.session(&SessionOptions::default()).unwrap();
    let options = GenerateOptions { max_tokens: Some(n), ..GenerateOptions::default() };
    session.generate(&[first], &options, |_| Control::Continue).unwrap().tokens
}

#[test]
fn every_way_of_opening_gives_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    write(&path, &[("x86-64-v2", &["sse2"], X86), ("aarch64", &["neon"], X86)]);
    let expected: Vec<u32> = (98..108).collect();
    for threads in [Some(1), Some(2), Some(5), None] {
        for verify in [Verify::None, Verify::Code, Verify::Full] {
            for (mmap, target) in [(false, None), (true, Some("x86-64-v2".to_owned()))] {
                let options = OpenOptions {
                    threads,
                    verify,
                    target,
                    mmap,
                    deterministic: true,
                    ..OpenOptions::default()
                };
                let model = Model::open(&path, &options).unwrap();
                assert_eq!(model.target(), "x86-64-v2");
                assert_eq!(run(&model, 97, 10), expected);
                assert_eq!(run(&model, VOCAB - 1, 1), [0]);
            }
        }
    }
}

#[test]
fn the_best_code_section_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let trap: &[u8] = &[0x0f, 0x0b];
    write(
        &path,
        &[("x86-64-v2", &["sse2"], trap), ("x86-64-v3", &["sse2"], X86), ("x86-64-v4", &["none-such"], trap)],
    );
    let model = Model::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!((model.target(), run(&model, 10, 2)), ("x86-64-v3", vec![11, 12]));
    let judged = attar_runtime::code_targets(model.manifest());
    assert_eq!(judged.len(), 3);
    assert_eq!(judged[2].1.as_deref(), Some("x86-64-v4 needs none-such"));
}

#[test]
fn foreign_code_is_refused_with_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    write(&path, &[("aarch64", &["neon"], X86), ("x86-64-v4", &["none-such"], X86)]);
    let e = Model::open(&path, &OpenOptions::default()).unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::NoCode { .. }));
    let e = e.to_string();
    assert!(e.contains("aarch64 is for aarch64") && e.contains("x86-64-v4 needs none-such"), "{e}");
    for (target, message) in
        [("x86-64-v4", "cannot run on this CPU"), ("x86-64-v2", "has no code for target")]
    {
        let options = OpenOptions { target: Some(target.to_owned()), ..OpenOptions::default() };
        let e = Model::open(&path, &options).unwrap_err().to_string();
        assert!(e.contains(message), "{e}");
    }
    write(&path, &[]);
    let e = Model::open(&path, &OpenOptions::default()).unwrap_err().to_string();
    assert!(e.contains("it has none at all"), "{e}");
}

#[test]
fn damage_is_found_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    write(&path, &[("x86-64-v2", &["sse2"], X86)]);
    let good = std::fs::read(&path).unwrap();
    let at = good.windows(X86.len()).position(|w| w == X86).unwrap();
    let mut bad = good.clone();
    bad[at + 3] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    let e = Model::open(&path, &OpenOptions::default()).unwrap_err().to_string();
    assert!(e.contains("section code x86-64-v2: damaged"), "{e}");

    let at = good.windows(8).position(|w| w == 1234.5f64.to_le_bytes()).unwrap();
    let mut bad = good.clone();
    bad[at] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    Model::open(&path, &OpenOptions::default()).unwrap();
    for mmap in [false, true] {
        let options = OpenOptions { verify: Verify::Full, mmap, ..OpenOptions::default() };
        let e = Model::open(&path, &options).unwrap_err().to_string();
        assert!(e.contains("section weights, chunk 0: damaged"), "{e}");
    }
    let options = OpenOptions { threads: Some(0), ..OpenOptions::default() };
    assert!(Model::open(&path, &options).unwrap_err().to_string().contains("option threads is 0"));
}

#[test]
fn what_the_certificate_does_not_say_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let open = |require: &str| {
        let require = Requirement::parse_list(require).unwrap();
        Model::open(&path, &OpenOptions { require, ..OpenOptions::default() })
    };
    let code: &[(&str, &[&str], &[u8])] = &[("x86-64-v2", &["sse2"], X86)];
    write(&path, code);
    let e = open("kld<=0.05").unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::Uncertified { .. }), "{e}");
    assert!(e.to_string().contains("kld<=0.05 is required, but the artifact has no certificate"), "{e}");
    Model::open(&path, &OpenOptions::default()).unwrap();

    let quality = Quality { scores: 255, kld: 0.04, top1: 0.9, ..Quality::default() };
    let certificate = Certificate {
        version: 1,
        reference: "f32".to_owned(),
        target: "x86-64-v2".to_owned(),
        text: Text { name: "t".to_owned(), blake3: "0".repeat(64), bytes: 1, tokens: 1 },
        context: 512,
        windows: 1,
        quality,
        weight_bytes: 8,
        bits_per_weight: 32.0,
        tensors: Vec::new(),
        reported: Vec::new(),
    };
    write_certified(&path, code, &[0; 8], Some(&certificate));
    open("kld<=0.05,top1>=90%").unwrap();
    let e = open("kld<=0.05,kld<0.04").unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::Requirement { .. }), "{e}");
    assert!(
        e.to_string().contains("kld<0.04 is required, but the artifact's certificate says kld 0.04"),
        "{e}"
    );
}

#[test]
fn no_memory_is_both_writable_and_executable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    write(&path, &[("x86-64-v2", &["sse2"], X86)]);
    let model = Model::open(&path, &OpenOptions::default()).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let modes: Vec<&str> = maps.lines().filter_map(|l| l.split_whitespace().nth(1)).collect();
    assert!(modes.iter().any(|m| m.starts_with("r-x")));
    assert!(!modes.iter().any(|m| m.contains('w') && m.contains('x')), "{maps}");
    assert_eq!(run(&model, 1, 1), [2]);
}
