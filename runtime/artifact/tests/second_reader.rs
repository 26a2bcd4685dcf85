//! The reader in Python, written from `docs/artifact.md`, decodes what this library packs.

mod sample;

use attar_artifact::manifest::SectionKind;
use attar_artifact::{Artifact, Verify, Writer};
use attar_format::Encoded;
use attar_format::formats::ALL;
use std::path::Path;
use std::process::Command;

/// A matrix of every code and scale there is.
fn matrix(format: attar_format::FormatRef, n: usize, k: usize) -> Encoded {
    let noise = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    if format.is_uncompressed() {
        let values: Vec<f32> = (0..n * k).map(|i| noise(i) as f32 / 1000.0 - 8000.0).collect();
        return Encoded::from_f32(format, n, k, &values).unwrap();
    }
    let mut m = Encoded::zeros(format, n, k).unwrap();
    let table = format.table().is_some();
    m.row_scale.iter_mut().enumerate().for_each(|(i, s)| *s = 0.01 * (i + 1) as f32);
    let narrow = |i: usize| if table { noise(i) & 255 } else { 0x3c00 + (noise(i) & 0x1ff) };
    m.field.iter_mut().enumerate().for_each(|(i, f)| *f = narrow(i) as u16);
    m.codes.iter_mut().enumerate().for_each(|(i, c)| *c = (noise(i) & ((1 << format.code_bits()) - 1)) as u8);
    m
}

#[test]
fn python_decodes_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let mut w = Writer::create(&path).unwrap();
    let mut weights = w.weights().unwrap();
    let vector: Vec<u8> = [1f32, -2.5, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    weights.add("vector", "f32", &[3], &vector).unwrap();
    let mut expected = vec![("vector".to_owned(), vec![1.0, -2.5, 3.0])];
    for format in ALL {
        for (n, k) in [(16, 64), (19, 96)] {
            let name = format!("{}.{n}x{k}", format.name);
            let m = matrix(format, n, k);
            weights.add(&name, format.name, &[n as u64, k as u64], &m.pack().unwrap()).unwrap();
            expected.push((name, m.decode()));
        }
    }
    let odd = matrix(ALL[1], 5, 7);
    weights.add("odd", ALL[1].name, &[5, 7], &odd.pack().unwrap()).unwrap();
    expected.push(("odd".to_owned(), odd.decode()));
    weights.finish();
    w.add_section(SectionKind::Recipe, b"[recipe]").unwrap();
    w.finish("attar tests", sample::model()).unwrap();
    Artifact::open(&path, Verify::Full).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/read_artifact.py");
    let python = |args: &[&str]| Command::new("python3").arg(&script).arg(&path).args(args).output();
    let Ok(listing) = python(&[]) else {
        writeln_stderr("skipped: python3 is not installed");
        return;
    };
    let text = String::from_utf8(listing.stdout).unwrap();
    assert!(listing.status.success(), "{}", String::from_utf8_lossy(&listing.stderr));
    assert!(text.contains("recipe") && text.contains("n4.19x96"), "{text}");
    for (name, values) in expected {
        let out = python(&[&name]).unwrap();
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        let got: Vec<f32> =
            String::from_utf8(out.stdout).unwrap().split_whitespace().map(|x| x.parse().unwrap()).collect();
        assert_eq!(got, values, "{name}");
    }
}

fn writeln_stderr(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}
