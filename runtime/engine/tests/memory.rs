//! Resident memory: weights, what the KV cache holds, activations, and little more; nothing of the file stays mapped in.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[allow(dead_code, reason = "shared by test programs, each of which uses a part")]
mod successor;

use attar_runtime::{Control, GenerateOptions, Model, OpenOptions, SessionOptions};

/// What may come on top of weights, KV cache and activations.
const BESIDES: u64 = 15_000_000;
const WEIGHTS: u64 = 96 << 20;

fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

/// One test only: the memory is the process's.
#[test]
fn a_model_takes_its_weights_and_little_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    {
        let weights: Vec<u8> = (0..WEIGHTS).map(|i| (i % 251) as u8).collect();
        successor::write_with(&path, &[("x86-64-v2", &["sse2"], successor::X86)], &weights);
    }
    let before = status("VmRSS:");
    // From here on, not from the writing of the file.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    for mmap in [false, true] {
        let options = OpenOptions { threads: Some(2), mmap, ..OpenOptions::default() };
        let model = Model::open(&path, &options).unwrap();
        let mut session = model.session(&SessionOptions::default()).unwrap();
        let options = GenerateOptions { max_tokens: Some(50), ..GenerateOptions::default() };
        session.generate(&[50, 51], &options, |_| Control::Continue).unwrap();
        // The cache of all of the 4096 tokens of context would be 32 KiB, its logits another 64.
        let (now, most) = (status("VmRSS:"), status("VmHWM:"));
        let expected = if mmap { 0 } else { WEIGHTS };
        assert!(now >= expected, "{now}: the weights are not there");
        assert!(now <= before + expected + BESIDES, "mmap {mmap}: {before} before, {now} now");
        assert!(most <= before + WEIGHTS + BESIDES, "mmap {mmap}: {before} before, at most {most}");
    }
}
