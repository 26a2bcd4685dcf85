//! Our statistics of two models' logits against numpy's, and against what llama.cpp's own code prints for the same logits.
//!
//! `tests/data/divergence/make_divergence.py` made logits and figures.

use attar_artifact::certificate::Quality;
use attar_compiler::evaluate::Divergence;
use serde_json::Value;
use std::path::Path;

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/divergence").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn golden() -> (Value, Quality) {
    let golden: Value = serde_json::from_slice(&data("golden.json")).expect("JSON");
    let size = |name: &str| golden[name].as_u64().expect("a size") as usize;
    let (scores, vocab) = (size("scores"), size("vocab"));
    let numbers: Vec<u16> =
        data("logits.bin").chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    assert_eq!(numbers.len(), 2 * scores * vocab + scores);
    let logits = |from: usize| -> Vec<f32> {
        numbers[from..from + scores * vocab].iter().map(|n| f32::from(*n) / 4096.0 - 8.0).collect()
    };
    let targets: Vec<u32> = numbers[2 * scores * vocab..].iter().map(|t| u32::from(*t)).collect();
    let mut divergence = Divergence::default();
    divergence.add_rows(&logits(scores * vocab), &logits(0), &targets).expect("finite");
    (golden, divergence.quality())
}

#[test]
fn statistics_are_those_of_numpy() {
    let (golden, quality) = golden();
    assert_eq!(quality.scores, golden["scores"]);
    for (name, ours) in quality.numbers() {
        let expected = golden["numpy"][name].as_f64().unwrap_or_else(|| panic!("no {name}"));
        // Exponentials are computed in f32, here alone.
        assert!((ours - expected).abs() < 2e-6 * expected.abs().max(0.1), "{name}: {ours}, numpy {expected}");
    }
}

#[test]
fn statistics_are_those_that_llama_perplexity_prints() {
    let (golden, q) = golden();
    let lines = golden["llama_cpp"]["printed"].as_array().expect("lines");
    let printed = |label: &str| -> Vec<String> {
        let line = lines.iter().filter_map(Value::as_str).find(|l| l.starts_with(label));
        let line = line.unwrap_or_else(|| panic!("nothing about {label}"));
        let rest = line[label.len()..].replace([':', '±', '%'], " ");
        rest.split_whitespace().map(str::to_owned).collect()
    };
    let check = |label: &str, ours: &[f64]| {
        let theirs = printed(label);
        assert_eq!(theirs.len(), ours.len(), "{label}");
        for (theirs, ours) in theirs.iter().zip(ours) {
            let digits = theirs.rsplit_once('.').map_or(0, |(_, d)| d.len() as i32);
            let value: f64 = theirs.parse().expect("a number");
            // It sums in f32 at places: the last digit printed may be one off.
            assert!((value - ours).abs() < 1.5 * 10f64.powi(-digits), "{label}: {ours}, llama.cpp {theirs}");
        }
    };
    check("Mean PPL(Q)                   ", &[q.ppl, q.ppl_error]);
    check("Mean PPL(base)", &[q.ppl_reference, q.ppl_reference_error]);
    check("Mean ln(PPL(Q)/PPL(base))", &[q.ln_ppl_ratio, q.ln_ppl_ratio_error]);
    check("Mean PPL(Q)/PPL(base)", &[q.ppl_ratio, q.ppl_ratio_error]);
    check("Mean    KLD", &[q.kld, q.kld_error]);
    check("Median  KLD", &[q.kld_median]);
    check("90.0%   KLD", &[q.kld_p90]);
    check("99.0%   KLD", &[q.kld_p99]);
    check("99.9%   KLD", &[q.kld_p999]);
    check("Maximum KLD", &[q.kld_max]);
    check("Mean    Δp", &[100.0 * q.dp_mean, 100.0 * q.dp_mean_error]);
    check("RMS Δp", &[100.0 * q.dp_rms, 100.0 * q.dp_rms_error]);
    check("Same top p", &[100.0 * q.top1, 100.0 * q.top1_error]);
}
