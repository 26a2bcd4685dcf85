//! What is written can be read back, and is the same bytes every time.

mod sample;

use attar_artifact::manifest::{Manifest, SectionKind};
use attar_artifact::{Artifact, ErrorKind, Verify, Writer, place_tensor};
use std::io::Write;

#[test]
fn reads_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let manifest: Manifest = sample::write(&path);
    for verify in [Verify::None, Verify::Code, Verify::Full] {
        let a = Artifact::open(&path, verify).unwrap();
        assert_eq!(a.manifest(), &manifest);
        assert_eq!(a.programs("cpu").unwrap(), sample::programs());
        assert!(a.programs("cuda").is_none());
        assert_eq!(a.text(&SectionKind::ChatTemplate).unwrap().unwrap(), "{{ messages }}");
        assert_eq!(a.text(&SectionKind::Tokenizer).unwrap().unwrap(), "{\"tokens\": \"é\"}");
        let code =
            a.section(|k| matches!(k, SectionKind::Code { target, .. } if target == "aarch64")).unwrap();
        assert_eq!(a.read(code).unwrap(), [0xd6; 100]);
        assert_eq!(a.certificate().unwrap(), Some(sample::certificate()));
        let weights = a.weights().unwrap();
        assert_eq!(weights.tensor("gain").unwrap()[4..8], 1f32.to_le_bytes());
        assert!(matches!(*weights.tensor("none").unwrap_err().kind, ErrorKind::NoTensor { .. }));
        a.verify_weights(3).unwrap();
        let mut copy = vec![0; weights.bytes().len()];
        a.copy_weights(&mut copy, 2, true).unwrap();
        assert_eq!(copy, weights.bytes());
    }
    let from_memory = Artifact::from_bytes(std::fs::read(&path).unwrap(), Verify::Full).unwrap();
    assert_eq!(from_memory.manifest(), &manifest);
}

#[test]
fn long_texts_are_packed_and_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let long = "é, again and again; ".repeat(10_000);
    let mut w = Writer::create(&path).unwrap();
    w.add_text(SectionKind::Graph, &long).unwrap();
    w.add_text(SectionKind::Recipe, "short").unwrap();
    let (manifest, _) = w.finish("attar test", sample::model()).unwrap();
    let section = |kind: SectionKind| manifest.sections.iter().find(|s| s.kind == kind).unwrap();
    assert_eq!(section(SectionKind::Graph).inflated, Some(long.len() as u64));
    assert!(section(SectionKind::Graph).len < 5_000);
    assert_eq!(section(SectionKind::Recipe).inflated, None);
    for verify in [Verify::None, Verify::Code, Verify::Full] {
        let a = Artifact::open(&path, verify).unwrap();
        assert_eq!(a.text(&SectionKind::Graph).unwrap().unwrap(), long);
        assert_eq!(a.text(&SectionKind::Recipe).unwrap().unwrap(), "short");
    }
}

#[test]
fn same_inputs_give_the_same_bytes() {
    assert_eq!(sample::bytes(), sample::bytes());
}

#[test]
fn tensors_and_sections_are_aligned() {
    let file = sample::bytes();
    let manifest = Artifact::from_bytes(file, Verify::Full).unwrap().manifest().clone();
    assert!(manifest.sections.iter().all(|s| s.offset.is_multiple_of(4096)));
    let [gain, matrix] = manifest.tensors.as_slice() else { panic!("two tensors") };
    assert_eq!(matrix.offset, place_tensor(gain.offset + gain.len));
}

#[test]
fn a_preview_opens_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, preview: bool| {
        let path = dir.path().join(name);
        let mut w = Writer::create(&path).unwrap();
        w.add_section(SectionKind::Recipe, b"recipe").unwrap();
        if preview {
            // A note in the manifest makes the preview longer than what comes after it.
            w.set_uncertified(&"not yet ".repeat(1000));
            let shown = w.preview("attar test", sample::model()).unwrap();
            let a = Artifact::open(&shown, Verify::Full).unwrap();
            assert_eq!(a.text(&SectionKind::Recipe).unwrap().unwrap(), "recipe");
            assert!(a.certificate().unwrap().is_none() && !path.exists());
        }
        w.add_certificate(&sample::certificate()).unwrap();
        w.set_uncertified("for a test");
        w.finish("attar test", sample::model()).unwrap();
        assert!(Artifact::open(&path, Verify::Full).unwrap().certificate().unwrap().is_some());
        std::fs::read(path).unwrap()
    };
    assert!(write("a", true) == write("b", false));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn an_abandoned_writer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = Writer::create(dir.path().join("m.attar")).unwrap();
    w.add_section(SectionKind::Recipe, b"x").unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    drop(w);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_failed_write_keeps_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    sample::write(&path);
    let before = std::fs::read(&path).unwrap();
    let mut model = sample::model();
    model.heads = 0;
    let e = Writer::create(&path).unwrap().finish("attar test", model).unwrap_err();
    assert!(e.to_string().contains("model.heads is 0"), "{e}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    let mut w = Writer::create(&path).unwrap();
    w.add_section(sample::code("x86-64-v3", &[]), &[0xc3; 100]).unwrap();
    w.add_programs("cpu", &sample::programs()).unwrap();
    let e = w.finish("attar test", sample::model()).unwrap_err();
    assert!(e.to_string().contains("argument 1: 64 bytes at 0 reach outside the weights section"), "{e}");

    let mut w = Writer::create(&path).unwrap();
    let mut s = w.section(SectionKind::Recipe).unwrap();
    s.write_all(b"half").unwrap();
    drop(s);
    assert!(matches!(
        *w.finish("attar test", sample::model()).unwrap_err().kind,
        ErrorKind::Unfinished { .. }
    ));

    let mut w = Writer::create(&path).unwrap();
    let mut weights = w.weights().unwrap();
    for format in attar_format::formats::ALL.iter().filter(|f| !f.is_uncompressed()) {
        let name = format.name;
        let e = weights.add("w", name, &[16, 48], &[0; 10]).unwrap_err();
        assert!(e.to_string().contains(&format!("format {name} cannot hold the shape [16, 48]")), "{e}");
        let e = weights.add("w", name, &[1 << 62, 32], &[0; 10]).unwrap_err();
        assert!(e.to_string().contains("cannot hold the shape"), "{e}");
        let len = attar_format::PackedLayout::new(format, 20, 64).unwrap().total_bytes();
        for len in [len - 64, len + 64] {
            let e = weights.add("w", name, &[20, 64], &vec![0; len]).unwrap_err();
            assert!(e.to_string().contains(&format!("{len} bytes, but shape and format ask for")), "{e}");
        }
    }
    let e = weights.add("w", "f32", &[4], &[0; 10]).unwrap_err();
    assert!(e.to_string().contains("10 bytes, but shape and format ask for 16"), "{e}");
    assert!(!path.exists());
}

#[test]
fn a_missing_folder_is_named() {
    let e = Writer::create("/nonexistent-folder/m.attar").unwrap_err();
    assert!(e.to_string().starts_with("/nonexistent-folder/m.attar: cannot create"), "{e}");
}
