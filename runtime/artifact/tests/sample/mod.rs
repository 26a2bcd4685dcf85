//! A small complete artifact, and the means to damage it while keeping its hashes right.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its share")]

use attar_artifact::Writer;
use attar_artifact::certificate::{Certificate, Quality, Text};
use attar_artifact::header::{HEADER_BYTES, Header};
use attar_artifact::manifest::{KvSpec, KvType, Manifest, Model, RopeTable, SectionKind};
use attar_artifact::program::{Arg, Entry, EntryBlocks, Extent, Launch, Program, ProgramKind, StepBuffer};
use std::path::Path;

pub fn model() -> Model {
    Model {
        name: "sample".to_owned(),
        architecture: "llama".to_owned(),
        layers: 2,
        hidden: 8,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocab: 16,
        context_length: 64,
        parameters: 1000,
        rope: vec![RopeTable { inv_freq: vec![1.0, 0.1234567890123456], mscale: 1.0 }],
        kv: KvSpec { dtype: KvType::F16, page_len: 32, span: 32 },
        eos: vec![2],
        bos: Some(1),
    }
}

pub fn programs() -> Vec<Program> {
    let launch = |kernel: &str, args, grid| Launch {
        kernel: kernel.to_owned(),
        args,
        grid,
        weight_bytes: 64,
        tail: false,
        blocks: None,
        note: "a note".to_owned(),
    };
    let launches = vec![
        launch(
            "embed",
            vec![
                Arg::Step(StepBuffer::Tokens),
                Arg::Weight { offset: 0, len: 64 },
                Arg::Arena { offset: Extent::fixed(0), len: Extent::per_token(32) },
            ],
            Extent::per_token(1),
        ),
        launch(
            "head",
            vec![
                Arg::Arena { offset: Extent::per_token(32), len: Extent::per_row(32) },
                Arg::Step(StepBuffer::Rope { table: 0 }),
                Arg::Keys { layer: 1 },
                Arg::Values { layer: 0 },
                Arg::Imm(7),
                Arg::Count(Extent::per_row(1)),
                Arg::BlockTableStride,
                Arg::Spans,
                Arg::PrefetchDistance,
                Arg::Step(StepBuffer::Logits),
            ],
            Extent::fixed(1),
        ),
    ];
    let arena = Extent { per_token: 32, per_row: 32, ..Extent::default() };
    [(ProgramKind::Decode, 1), (ProgramKind::SmallBatch, 16), (ProgramKind::Prefill, 512)]
        .into_iter()
        .map(|(kind, max_tokens)| Program { kind, max_tokens, arena, launches: launches.clone() })
        .collect()
}

pub fn code(target: &str, features: &[&str]) -> SectionKind {
    let entry = |kernel: &str, offset| Entry {
        kernel: kernel.to_owned(),
        offset,
        len: 3,
        blocks: EntryBlocks::PLAIN,
    };
    SectionKind::Code {
        target: target.to_owned(),
        features: features.iter().map(|f| (*f).to_owned()).collect(),
        entries: vec![entry("embed", 0), entry("head", 64)],
        prefill_differs: false,
    }
}

/// 2.25 MiB of weights: three chunks.
pub fn write(path: &Path) -> Manifest {
    let mut w = Writer::create(path).unwrap();
    let mut weights = w.weights().unwrap();
    let vector: Vec<u8> = (0..5u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    weights.add("gain", "f32", &[5], &vector).unwrap();
    let big: Vec<u8> = (0..576 * 1024u32).flat_map(|i| ((i % 1000) as f32).to_le_bytes()).collect();
    weights.add("matrix", "f32", &[576, 1024], &big).unwrap();
    weights.finish();
    w.add_section(code("x86-64-v3", &["avx2"]), &[0xc3; 100]).unwrap();
    w.add_section(code("aarch64", &["neon"]), &[0xd6; 100]).unwrap();
    w.add_programs("cpu", &programs()).unwrap();
    w.add_section(SectionKind::Tokenizer, b"{\"tokens\": \"\xc3\xa9\"}").unwrap();
    w.add_section(SectionKind::ChatTemplate, b"{{ messages }}").unwrap();
    w.add_section(SectionKind::Graph, b"func @main() {}").unwrap();
    w.add_section(SectionKind::Recipe, b"[recipe]").unwrap();
    w.add_certificate(&certificate()).unwrap();
    let (manifest, len) = w.finish("attar test", model()).unwrap();
    assert_eq!(len, std::fs::metadata(path).unwrap().len());
    manifest
}

pub fn certificate() -> Certificate {
    let text = Text { name: "a text".to_owned(), blake3: "0".repeat(64), bytes: 9, tokens: 4 };
    let quality =
        Quality { scores: 3, ppl: 8.0, ppl_ratio: 1.25, kld: 0.04, top1: 0.9, ..Quality::default() };
    Certificate {
        version: 1,
        reference: "f32".to_owned(),
        target: "x86-64-v3".to_owned(),
        text,
        context: 4,
        windows: 1,
        quality,
        weight_bytes: 100,
        bits_per_weight: 4.25,
        tensors: Vec::new(),
        reported: Vec::new(),
    }
}

pub fn bytes() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.attar");
    write(&path);
    std::fs::read(path).unwrap()
}

pub fn header(file: &[u8]) -> Header {
    Header::from_bytes(file[..HEADER_BYTES].try_into().unwrap(), file.len() as u64).unwrap()
}

pub fn manifest_json(file: &[u8]) -> serde_json::Value {
    let h = header(file);
    serde_json::from_slice(&file[h.manifest_offset as usize..]).unwrap()
}

/// The file with another manifest, all hashes and lengths of the header right.
pub fn with_manifest(file: &[u8], manifest: &[u8]) -> Vec<u8> {
    let mut h = header(file);
    let mut out = file[..h.manifest_offset as usize].to_vec();
    out.extend_from_slice(manifest);
    h.manifest_len = manifest.len() as u64;
    h.file_len = out.len() as u64;
    h.manifest_hash = *blake3::hash(manifest).as_bytes();
    out[..HEADER_BYTES].copy_from_slice(&h.to_bytes());
    out
}

/// The file with its manifest edited as JSON.
pub fn edit(file: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut json = manifest_json(file);
    change(&mut json);
    with_manifest(file, &serde_json::to_vec(&json).unwrap())
}

/// Index of the first section of a kind.
pub fn section(json: &serde_json::Value, kind: &str) -> usize {
    json["sections"].as_array().unwrap().iter().position(|s| s["kind"] == kind).unwrap()
}

/// The file with a section's bytes replaced by others of the same or a smaller length, hashes right.
pub fn with_section(file: &[u8], kind: &str, bytes: &[u8]) -> Vec<u8> {
    let json = manifest_json(file);
    let i = section(&json, kind);
    let offset = json["sections"][i]["offset"].as_u64().unwrap() as usize;
    let mut out = file.to_vec();
    let room = out[offset..].iter().len().min(4096);
    assert!(bytes.len() <= room);
    out[offset..offset + bytes.len()].copy_from_slice(bytes);
    edit(&out, |m| {
        m["sections"][i]["len"] = bytes.len().into();
        m["sections"][i]["hash"] = blake3::hash(bytes).to_hex().to_string().into();
    })
}
