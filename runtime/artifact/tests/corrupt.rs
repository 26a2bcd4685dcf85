//! Damaged and hostile artifacts: each is refused with a message that says what is wrong, and none panics.

mod sample;

use attar_artifact::header::{HEADER_BYTES, MAGIC};
use attar_artifact::manifest::SectionKind;
use attar_artifact::program::{Arg, Extent, Launch, Program, ProgramKind, StepBuffer, StepSize};
use attar_artifact::{Artifact, Verify};
use proptest::prelude::*;
use serde_json::json;
use std::sync::LazyLock;

static GOOD: LazyLock<Vec<u8>> = LazyLock::new(sample::bytes);

fn refused(what: &str, file: Vec<u8>, verify: Verify, message: &str) {
    match Artifact::from_bytes(file, verify) {
        Ok(_) => panic!("{what}: opened"),
        Err(e) => assert!(e.to_string().contains(message), "{what}: {e}\nexpected: {message}"),
    }
}

#[test]
fn truncation_anywhere_is_noticed() {
    let good = &*GOOD;
    let manifest = sample::header(good).manifest_offset;
    let mut cuts: Vec<u64> = vec![0, 1, 7, 8, 12, 40, 64, 127, 128, 129, 4095, 4096];
    for s in sample::manifest_json(good)["sections"].as_array().unwrap() {
        let (offset, len) = (s["offset"].as_u64().unwrap(), s["len"].as_u64().unwrap());
        cuts.extend([offset - 1, offset, offset + 1, offset + len - 1, offset + len]);
    }
    cuts.extend([manifest - 1, manifest, manifest + 1, good.len() as u64 - 1]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.attar");
    for cut in cuts {
        let part = good[..cut as usize].to_vec();
        std::fs::write(&path, &part).unwrap();
        for verify in [Verify::None, Verify::Code, Verify::Full] {
            refused(&format!("cut at {cut}"), part.clone(), verify, "truncated");
            let e = Artifact::open(&path, verify).unwrap_err().to_string();
            assert!(e.contains("truncated") && e.contains("cut.attar"), "cut at {cut}: {e}");
        }
    }
    let mut longer = good.clone();
    longer.push(0);
    refused("one byte more", longer, Verify::None, "truncated or padded");
}

#[test]
fn a_flipped_byte_in_each_section_is_noticed() {
    let good = &*GOOD;
    let json = sample::manifest_json(good);
    for s in json["sections"].as_array().unwrap() {
        let (offset, len) = (s["offset"].as_u64().unwrap() as usize, s["len"].as_u64().unwrap() as usize);
        let kind = s["kind"].as_str().unwrap();
        for at in [0, len / 2, len - 1] {
            let mut bad = good.clone();
            bad[offset + at] ^= 0x20;
            let message = format!("section {kind}");
            if kind == "weights" {
                let a = Artifact::from_bytes(bad.clone(), Verify::Code).unwrap();
                let chunk = at >> 20;
                let e = a.verify_weights(2).unwrap_err().to_string();
                assert!(e.contains(&format!("section weights, chunk {chunk}: damaged")), "{e}");
                let mut copy = vec![0; len];
                assert_eq!(a.copy_weights(&mut copy, 2, true).unwrap_err().to_string(), e);
                a.copy_weights(&mut copy, 2, false).unwrap();
                // The small tensor lies in chunk 0 alone: the other chunks' damage does not touch it.
                assert_eq!(a.weights().unwrap().tensor("gain").is_err(), chunk == 0);
                refused("weights", bad, Verify::Full, "section weights, chunk");
            } else {
                refused(kind, bad.clone(), Verify::Code, &message);
                refused(kind, bad, Verify::Full, "its BLAKE3 hash does not match");
            }
        }
    }
}

#[test]
fn flipped_bytes_in_header_manifest_and_padding_are_noticed() {
    let good = &*GOOD;
    let flip = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 1;
        bad
    };
    for at in 0..8 {
        refused("magic", flip(at), Verify::None, "not an attar artifact");
    }
    for at in (12..40).chain(40..128) {
        refused("header", flip(at), Verify::None, "damaged header");
    }
    let manifest = sample::header(good).manifest_offset as usize;
    for at in [manifest, manifest + 100, good.len() - 1] {
        refused("manifest", flip(at), Verify::None, "damaged manifest");
    }
    refused("padding", flip(HEADER_BYTES), Verify::Full, "non-zero padding");
    refused("padding", flip(manifest - 1), Verify::Full, "non-zero padding");
}

#[test]
fn foreign_files_are_called_so() {
    refused("empty", Vec::new(), Verify::None, "truncated");
    refused("text", b"hello".to_vec(), Verify::None, "not an attar artifact");
    refused("gguf", [b"GGUF".as_slice(), &[0; 500]].concat(), Verify::None, "not an attar artifact");
    refused("magic only", MAGIC.to_vec(), Verify::None, "truncated");
    let dir = tempfile::tempdir().unwrap();
    assert!(Artifact::open(dir.path(), Verify::None).is_err());
    let e = Artifact::open(dir.path().join("none"), Verify::None).unwrap_err().to_string();
    assert!(e.contains("cannot open it"), "{e}");
}

#[test]
fn a_newer_major_version_is_refused_and_a_newer_minor_is_not() {
    let good = &*GOOD;
    let mut h = sample::header(good);
    let mut file = good.clone();
    h.minor = 99;
    file[..HEADER_BYTES].copy_from_slice(&h.to_bytes());
    assert_eq!(Artifact::from_bytes(file.clone(), Verify::Full).unwrap().version(), (1, 99));
    h.major = 2;
    file[..HEADER_BYTES].copy_from_slice(&h.to_bytes());
    refused("newer", file.clone(), Verify::None, "format 2.99 is newer");
    file[127] ^= 1;
    refused("newer with other hashing", file, Verify::None, "update attar");
}

#[test]
fn hostile_headers() {
    let good = &*GOOD;
    let with = |change: &dyn Fn(&mut attar_artifact::header::Header)| {
        let mut h = sample::header(good);
        change(&mut h);
        let mut file = good.clone();
        file[..HEADER_BYTES].copy_from_slice(&h.to_bytes());
        file
    };
    let len = good.len() as u64;
    refused("offset past end", with(&|h| h.manifest_offset = len + 1), Verify::None, "bad manifest range");
    refused(
        "offset overflows",
        with(&|h| h.manifest_offset = u64::MAX - 10),
        Verify::None,
        "bad manifest range",
    );
    refused("length overflows", with(&|h| h.manifest_len = u64::MAX), Verify::None, "bad manifest range");
    refused(
        "unaligned",
        with(&|h| {
            h.manifest_offset += 1;
            h.manifest_len -= 1
        }),
        Verify::None,
        "bad manifest range",
    );
    refused(
        "over header",
        with(&|h| {
            h.manifest_offset = 0;
            h.manifest_len = len
        }),
        Verify::None,
        "bad manifest range",
    );
    refused("file length", with(&|h| h.file_len = u64::MAX), Verify::None, "truncated or padded");
}

#[test]
fn hostile_manifest_text() {
    let good = &*GOOD;
    let cases: [(&[u8], &str); 5] = [
        (b"", "the manifest cannot be read"),
        (b"{", "the manifest cannot be read"),
        (b"[]", "the manifest cannot be read"),
        (b"{\"generator\": \"\xff\"}", "the manifest is not UTF-8"),
        (b"{\"generator\": 1}", "invalid type"),
    ];
    let deep = ["{\"sections\":[{\"x\":", &"[".repeat(100_000)].concat();
    refused("deep", sample::with_manifest(good, deep.as_bytes()), Verify::None, "recursion limit");
    for (text, message) in cases {
        refused("manifest", sample::with_manifest(good, text), Verify::None, message);
    }
}

#[test]
fn hostile_formats() {
    let good = &*GOOD;
    let format = |name: &str, entries: &[i64]| {
        json!({"name": name, "source": "a test", "group": 32, "scale": {"kind": "bf16"},
            "codes": {"kind": "table", "bits": 2, "entries": entries, "shift": 0}})
    };
    let with = |formats: serde_json::Value| sample::edit(good, |m| m["formats"] = formats);
    let fine = format("f2", &[-9, -3, 3, 9]);
    let opened = Artifact::from_bytes(with(json!([fine])), Verify::Full).unwrap();
    assert_eq!(opened.manifest().formats[0].name, "f2");
    for (formats, message) in [
        (json!([fine, fine]), "format f2: two formats are called so"),
        (json!([format("n4", &[-9, -3, 3, 9])]), "format n4: name n4: a built-in format"),
        (json!([format("f2", &[-9, 3, 3, 9])]), "format f2: entries: expected in ascending order"),
        (json!([format("f2", &[-9, 9])]), "format f2: table of 2 bits with 2 entries"),
        (json!([format("f2", &[-900, -3, 3, 9])]), "the manifest cannot be read"),
        (json!(vec![fine.clone(); 300]), "300 of them, and at most 256 are read"),
    ] {
        refused("formats", with(formats), Verify::None, message);
    }
    let mut wide = fine.clone();
    wide["group"] = json!(0);
    refused("a group of nothing", with(json!([wide])), Verify::None, "format f2: group 0");
    let of_tensor = |format: &str, k: u64| {
        sample::edit(good, |m| {
            m["formats"] = json!([fine]);
            m["tensors"][1]["format"] = json!(format);
            m["tensors"][1]["shape"] = json!([576, k]);
        })
    };
    refused("another length", of_tensor("f2", 1024), Verify::None, "shape and format ask for");
    refused("no group", of_tensor("f2", 1000), Verify::None, "format f2 cannot hold the shape");
    refused("overflow", of_tensor("f2", u64::MAX / 32 * 32), Verify::None, "format f2 cannot hold the shape");
    refused("another name", of_tensor("f3", 1024), Verify::None, "format f3 is unknown");
}

#[test]
fn hostile_manifest_fields() {
    let good = &*GOOD;
    let json = sample::manifest_json(good);
    let at = |kind| sample::section(&json, kind);
    let (weights, code, tokenizer) = (at("weights"), at("code"), at("tokenizer"));
    let end = sample::header(good).manifest_offset;
    type Change = Box<dyn Fn(&mut serde_json::Value)>;
    let set = |pointer: String, value: serde_json::Value| -> Change {
        Box::new(move |m| *m.pointer_mut(&pointer).unwrap() = value.clone())
    };
    let section = |i: usize, field: &str, value| set(format!("/sections/{i}/{field}"), value);
    let tensor = |i: usize, field: &str, value| set(format!("/tensors/{i}/{field}"), value);
    let model = |field: &str, value| set(format!("/model/{field}"), value);
    let launched = |blocks| json!({"kernel": "other", "offset": 64, "len": 3, "blocks": blocks});
    let cases: Vec<(Change, &str)> = vec![
        (section(tokenizer, "len", json!(u64::MAX)), "do not lie between the header and the manifest"),
        (
            section(tokenizer, "offset", json!(u64::MAX - 4095)),
            "do not lie between the header and the manifest",
        ),
        (section(tokenizer, "offset", json!(0)), "do not lie between the header and the manifest"),
        (section(tokenizer, "offset", json!(end)), "do not lie between the header and the manifest"),
        (section(tokenizer, "len", json!(-1)), "the manifest cannot be read"),
        (section(tokenizer, "offset", json!(4097)), "no multiple of 4096"),
        (section(tokenizer, "offset", json!(4096)), "overlaps section"),
        (section(weights, "len", json!(2_365_000)), "overlaps section"),
        (section(weights, "chunks", json!([])), "0 chunk hashes"),
        (section(weights, "len", json!(1)), "3 chunk hashes for 1 bytes, expected 1"),
        (section(tokenizer, "hash", json!("00")), "not 64 hexadecimal digits"),
        (section(tokenizer, "hash", json!("é".repeat(32))), "not 64 hexadecimal digits"),
        (section(weights, "chunks/1", json!("zz")), "hash Some(1) is not 64"),
        (section(tokenizer, "kind", json!("chat_template")), "section chat_template: appears twice"),
        (section(code, "target", json!("aarch64")), "section code aarch64: appears twice"),
        (section(code, "target", json!("")), "names no target"),
        (section(code, "entries/0/offset", json!(u64::MAX - 63)), "entry embed"),
        (section(code, "entries/0/len", json!(101)), "entry embed: 101 bytes at 0 reach outside"),
        (section(code, "entries/0/len", json!(0)), "entry embed"),
        (section(code, "entries/1/offset", json!(63)), "not aligned to 64"),
        (section(code, "entries/1/kernel", json!("embed")), "kernel embed has two entries"),
        (section(code, "entries/1", launched(json!({"merged": [1, 0]}))), "merges no blocks"),
        (
            section(code, "entries/1", launched(json!({"merged": [1, 1], "shared_bytes": 1 << 20}))),
            "shared memory",
        ),
        (
            section(code, "entries/1/kernel", json!("other")),
            "code section x86-64-v3 has no kernel of that name",
        ),
        (tensor(0, "offset", json!(u64::MAX - 63)), "reach outside the weights section"),
        (tensor(0, "offset", json!(1)), "no multiple of 64"),
        (tensor(1, "offset", json!(0)), "tensor matrix: overlaps tensor gain"),
        (tensor(0, "len", json!(24)), "24 bytes, but shape and format ask for 20"),
        (tensor(0, "shape", json!([])), "cannot hold the shape []"),
        (tensor(0, "shape", json!([0])), "cannot hold the shape [0]"),
        (tensor(0, "shape", json!([1, 1, 1])), "cannot hold the shape"),
        (tensor(0, "shape", json!([u64::MAX])), "cannot hold the shape"),
        (tensor(1, "shape", json!([u64::MAX, u64::MAX])), "cannot hold the shape"),
        (tensor(1, "shape", json!([1u64 << 62, 1u64 << 62])), "cannot hold the shape"),
        (tensor(1, "format", json!("n17")), "format n17 is unknown"),
        (tensor(0, "format", json!("bf16")), "format bf16 cannot hold the shape [5]"),
        (tensor(1, "name", json!("gain")), "tensor gain: appears twice"),
        (tensor(1, "name", json!("")), "the name is empty"),
        (model("layers", json!(0)), "model.layers is 0"),
        (model("layers", json!(4_000_000_000u32)), "model.layers is 4000000000"),
        (model("layers", json!(1)), "names layer 1, the model has 1"),
        (model("kv_heads", json!(3)), "model.kv_heads is 3"),
        (model("vocab", json!(0)), "model.vocab"),
        (model("context_length", json!(0)), "model.context_length"),
        (model("head_dim", json!(6)), "expected head_dim / 2 angles"),
        (model("kv/page_len", json!(0)), "model.kv.page_len"),
        (model("kv/page_len", json!(1 << 20)), "model.kv.page_len"),
        (model("kv/span", json!(0)), "model.kv.span"),
        (model("kv/span", json!(48)), "model.kv.span is 48"),
        (model("kv/dtype", json!("f13")), "unknown variant"),
        (model("kv/dtype", json!("int4")), "model.kv.dtype is int4 with heads of width 4"),
        (model("rope", json!([])), "names rotary table 0, the model has 0"),
        (model("rope/0/mscale", json!(null)), "the manifest cannot be read"),
        (Box::new(|m| m["requires"] = json!(["moe"])), "requires moe"),
        (
            Box::new(move |m| {
                m["sections"][tokenizer]["kind"] = json!("holograms");
                m["sections"][tokenizer]["required"] = json!(true);
            }),
            "requires a section of kind holograms",
        ),
    ];
    for (i, (change, message)) in cases.into_iter().enumerate() {
        refused(&format!("case {i}"), sample::edit(good, change), Verify::None, message);
    }
}

#[test]
fn what_is_unknown_and_not_required_is_ignored() {
    let file = sample::edit(&GOOD, |m| {
        let i = sample::section(m, "recipe");
        m["sections"][i]["kind"] = json!("holograms");
        m["sections"][i]["depth"] = json!(3);
        m["novelty"] = json!({"a": [1, 2]});
        m["model"]["experts"] = json!(8);
    });
    for verify in [Verify::None, Verify::Code, Verify::Full] {
        Artifact::from_bytes(file.clone(), verify).unwrap();
    }
}

#[test]
fn texts_must_be_utf8() {
    let file = sample::with_section(&GOOD, "tokenizer", b"\xff\xfe");
    refused("tokenizer", file, Verify::Code, "section tokenizer is not UTF-8");
    refused(
        "programs",
        sample::with_section(&GOOD, "programs", b"[{]"),
        Verify::None,
        "section programs cpu cannot be read",
    );
}

#[test]
fn hostile_programs() {
    let most = u64::MAX;
    let huge = Extent { base: most, per_token: most, per_row: most, per_token_span: most };
    let arena = |offset, len| Arg::Arena { offset, len };
    let with_arg = |arg| move |p: &mut Vec<Program>| p[2].launches[0].args[0] = arg;
    type Change = Box<dyn Fn(&mut Vec<Program>)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(with_arg(arena(huge, Extent::fixed(0)))), "argument 0 reaches outside the arena"),
        (Box::new(with_arg(arena(Extent::fixed(0), huge))), "argument 0 reaches outside the arena"),
        // Fits one token and 512 rows of 512, but not a step whose rows are fewer.
        (Box::new(with_arg(arena(Extent::fixed(0), Extent::per_token(64)))), "with 1 tokens, 0 rows"),
        // Fits every step of one token; only many tokens betray it.
        (
            Box::new(with_arg(arena(Extent::per_token(16), Extent::per_token(17)))),
            "reaches outside the arena with 1 tokens",
        ),
        // Fits contexts of one span.
        (
            Box::new(with_arg(arena(Extent::fixed(0), Extent::per_token_span(32)))),
            "with 1 tokens, 0 rows and 2 spans",
        ),
        (Box::new(with_arg(arena(Extent::fixed(2), Extent::fixed(0)))), "not aligned to 4"),
        (Box::new(with_arg(Arg::Weight { offset: u64::MAX, len: 2 })), "reach outside the weights section"),
        (Box::new(with_arg(Arg::Weight { offset: 0, len: 3 << 20 })), "reach outside the weights section"),
        (Box::new(with_arg(Arg::Weight { offset: 2, len: 2 })), "not aligned to 4"),
        (Box::new(with_arg(Arg::Keys { layer: 2 })), "names layer 2, the model has 2"),
        (Box::new(with_arg(Arg::Values { layer: u32::MAX })), "names layer 4294967295"),
        (
            Box::new(with_arg(Arg::Step(StepBuffer::Rope { table: 1 }))),
            "names rotary table 1, the model has 1",
        ),
        (Box::new(with_arg(Arg::Count(huge))), "argument 0: the number overflows"),
        (Box::new(move |p| p[0].launches[1].grid = huge), "decode"),
        (Box::new(move |p| p[0].launches[1].grid = Extent::fixed(1 << 40)), "a grid of more than"),
        (Box::new(move |p| p[0].arena = huge), "an arena of more than"),
        (Box::new(move |p| p[0].max_tokens = 2), "max_tokens is 2, allowed are 1 to 1"),
        (Box::new(move |p| p[1].max_tokens = 33), "max_tokens is 33, allowed are 1 to 32"),
        (Box::new(move |p| p[2].max_tokens = 0), "max_tokens is 0"),
        (Box::new(move |p| p[2].max_tokens = u32::MAX), "max_tokens is 4294967295"),
        (Box::new(move |p| p[2].kind = ProgramKind::Decode), "two programs of kind Decode"),
        (Box::new(move |p| p[2].launches[0].kernel = "nothing".to_owned()), "has no kernel of that name"),
        (Box::new(move |p| p[2].launches[0].args = vec![Arg::Imm(0); 33]), "33 arguments"),
    ];
    for (i, (change, message)) in cases.into_iter().enumerate() {
        let mut programs = sample::programs();
        change(&mut programs);
        let bytes = serde_json::to_vec(&programs).unwrap();
        let file = sample::with_section(&GOOD, "programs", &bytes);
        refused(
            &format!("case {i}"),
            file,
            Verify::Code,
            &message.to_lowercase().replace("decode", "Decode"),
        );
    }
}

/// A GPU's launches say how they are cut into blocks, within what every GPU takes.
#[test]
fn launches_of_gpus_are_checked_for_their_blocks() {
    let open = |blocks: Option<serde_json::Value>, offset: u64| {
        let mut programs = serde_json::to_value(&sample::programs()[..1]).unwrap();
        for launch in programs[0]["launches"].as_array_mut().unwrap() {
            if let Some(blocks) = &blocks {
                launch["blocks"] = blocks.clone();
            }
        }
        programs[0]["launches"][0]["args"][1] = json!({"weight": {"offset": offset, "len": 16}});
        let file = sample::with_section(&GOOD, "programs", &serde_json::to_vec(&programs).unwrap());
        let file = sample::edit(&file, |m| {
            let i = sample::section(m, "programs");
            m["sections"][i]["device"] = json!("cuda");
        });
        Artifact::from_bytes(file, Verify::Code).map(|_| ()).map_err(|e| e.to_string())
    };
    let blocks = |threads: u64, extent: u64, per: u64| {
        let tiles = json!({"extent": {"base": extent}, "per": per});
        Some(json!({"threads": threads, "x": tiles, "y": tiles}))
    };
    assert_eq!(open(blocks(256, 65535, 1), 16), Ok(()));
    assert_eq!(open(blocks(1024, 65535 * 7, 7), 0), Ok(()));
    let refused = |result: Result<(), String>, words: &str| {
        let error = result.unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    refused(open(None, 0), "says nothing of blocks of threads");
    for bad in
        [blocks(0, 1, 1), blocks(1025, 1, 1), blocks(32, 65536, 1), blocks(32, 1, 0), blocks(32, u64::MAX, 1)]
    {
        refused(open(bad, 0), "blocks of no thread or more than 1024");
    }
    refused(open(blocks(32, 1, 1), 4), "argument 1 is not aligned to 16 bytes");
}

/// The corner rule of the checks, against every step there is.
#[test]
fn corners_decide_as_every_step_would() {
    let extent = |e: (u64, u64, u64, u64)| Extent {
        base: e.0 * 4,
        per_token: e.1 * 4,
        per_row: e.2 * 4,
        per_token_span: e.3 * 4,
    };
    let spans = sample::model().kv.spans(sample::model().context_length.into());
    assert!(spans > 1);
    proptest!(ProptestConfig::with_cases(300), |(a in (0u64..40, 0u64..6, 0u64..6, 0u64..6),
            o in (0u64..20, 0u64..4, 0u64..4, 0u64..4), l in (0u64..20, 0u64..4, 0u64..4, 0u64..4), max in 1u32..16)| {
        let (arena, offset, len) = (extent(a), extent(o), extent(l));
        let fits = (1..=u64::from(max)).all(|tokens| (0..=tokens).all(|rows| (1..=spans).all(|spans| {
            let step = StepSize { tokens, rows, spans };
            offset.at(step).unwrap() + len.at(step).unwrap() <= arena.at(step).unwrap()
        })));
        let launch = Launch {
            kernel: "embed".to_owned(),
            args: vec![Arg::Arena { offset, len }],
            grid: Extent::fixed(1),
            weight_bytes: 0,
            tail: false,
            blocks: None,
            note: String::new(),
        };
        let program = Program { kind: ProgramKind::SmallBatch, max_tokens: max, arena, launches: vec![launch] };
        let bytes = serde_json::to_vec(&[program]).unwrap();
        let file = sample::with_section(&GOOD, "programs", &bytes);
        prop_assert_eq!(Artifact::from_bytes(file, Verify::Code).is_ok(), fits);
    });
}

#[test]
fn hostile_certificates_are_refused_when_they_are_read() {
    let good = serde_json::to_value(sample::certificate()).unwrap();
    let read = |bytes: &[u8]| {
        let file = sample::with_section(&GOOD, "certificate", bytes);
        Artifact::from_bytes(file, Verify::Code).and_then(|a| a.certificate())
    };
    let edited = |pointer: &str, value: serde_json::Value| {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        read(&serde_json::to_vec(&json).unwrap()).unwrap_err().to_string()
    };
    let said = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    for bytes in [b"".as_slice(), b"{}", b"[1]", b"not JSON", b"{\"version\": 1}", b"{\"version\": NaN}"] {
        assert!(said(bytes).contains("the certificate cannot be read"), "{}", said(bytes));
    }
    assert!(said(b"\xff\xfe").contains("not UTF-8"));
    assert!(said(&[b"[".repeat(2000), b"]".repeat(2000)].concat()).contains("cannot be read"));
    assert!(
        edited("/version", json!(2)).contains("certificate field version is 2, expected 1; update attar")
    );
    assert!(edited("/quality/kld", json!(null)).contains("cannot be read"));
    assert!(edited("/quality/kld", json!("0.01")).contains("cannot be read"));
    assert!(edited("/quality/kld", json!(-1)).contains("kld is -1, expected 0 or more"));
    assert!(edited("/quality/top1", json!(90)).contains("top1 is 90, expected 0 to 1"));
    assert!(edited("/quality/scores", json!(0)).contains("scores is 0, expected 1 or more"));
    assert!(edited("/tensors", json!([{"name": "a"}])).contains("cannot be read"));
    let text = serde_json::to_string(&good).unwrap();
    assert!(said(text.replace("0.04", "1e999").as_bytes()).contains("cannot be read"));
    // What a later writer adds is no reason to refuse.
    let mut more = good.clone();
    more["mood"] = json!("good");
    more["quality"]["elegance"] = json!(1);
    let kept = read(&serde_json::to_vec(&more).unwrap()).unwrap();
    assert_eq!(kept, Some(sample::certificate()));
    let long = sample::edit(&GOOD, |m| {
        let i = sample::section(m, "certificate");
        m["sections"][i]["len"] = (17 << 20).into();
        m["sections"][i]["offset"] = 4096.into();
    });
    let e = Artifact::from_bytes(long, Verify::None).unwrap_err().to_string();
    assert!(e.contains("section certificate"), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mutated_certificates_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = sample::certificate().to_json().unwrap();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let file = sample::with_section(&GOOD, "certificate", &bytes);
        if let Ok(Some(c)) = Artifact::from_bytes(file, Verify::Code).and_then(|a| a.certificate()) {
            prop_assert!(c.quality.numbers().iter().all(|(_, v)| v.is_finite()));
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut file = MAGIC.to_vec();
        file.extend_from_slice(&bytes);
        prop_assert!(Artifact::from_bytes(bytes, Verify::None).is_err());
        prop_assert!(Artifact::from_bytes(file, Verify::None).is_err());
    }

    #[test]
    fn mutated_manifests_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let good = &*GOOD;
        let start = sample::header(good).manifest_offset as usize;
        let mut text = good[start..].to_vec();
        for (at, byte) in edits {
            let at = at.index(text.len());
            text[at] = byte;
        }
        if let Ok(a) = Artifact::from_bytes(sample::with_manifest(good, &text), Verify::None) {
            let _ = a.verify_weights(1);
            for t in &a.manifest().tensors {
                let _ = a.weights().unwrap().tensor(&t.name);
            }
        }
    }

    #[test]
    fn mutated_numbers_never_panic(which in any::<prop::sample::Index>(), value in prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), 0u64..9000]) {
        let good = &*GOOD;
        let file = sample::edit(good, |m| {
            let mut numbers = Vec::new();
            collect_numbers(m, &mut String::new(), &mut numbers);
            let pointer = which.get(&numbers).clone();
            *m.pointer_mut(&pointer).unwrap() = json!(value);
        });
        let _ = Artifact::from_bytes(file, Verify::Full);
    }

    #[test]
    fn mutated_programs_never_panic(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = serde_json::to_vec(&sample::programs()).unwrap();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = Artifact::from_bytes(sample::with_section(&GOOD, "programs", &bytes), Verify::Code);
    }
}

fn collect_numbers(value: &serde_json::Value, path: &mut String, out: &mut Vec<String>) {
    let len = path.len();
    match value {
        serde_json::Value::Number(_) => out.push(path.clone()),
        serde_json::Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                path.push_str(&format!("/{i}"));
                collect_numbers(item, path, out);
                path.truncate(len);
            }
        }
        serde_json::Value::Object(fields) => {
            for (name, item) in fields {
                path.push_str(&format!("/{name}"));
                collect_numbers(item, path, out);
                path.truncate(len);
            }
        }
        _ => {}
    }
}

/// A text section that claims to be a stream, of a length that is not its own, or that memory would not hold.
#[test]
fn streams_that_are_none_are_refused() {
    let good = &*GOOD;
    let stream = miniz_oxide::deflate::compress_to_vec_zlib(&[b'a'; 1000], 6);
    let mut bomb = miniz_oxide::deflate::compress_to_vec_zlib(&[0; 1 << 20], 6);
    bomb.truncate(bomb.len() - 1);
    let cases: [(&[u8], u64, &str); 6] = [
        (b"no stream at all", 1000, "no zlib stream of 1000 bytes"),
        (&stream, 999, "no zlib stream of 999 bytes"),
        (&stream, 1001, "no zlib stream of 1001 bytes"),
        (&stream[..stream.len() - 1], 1000, "no zlib stream"),
        (&bomb, 1 << 20, "no zlib stream"),
        (&stream, u64::MAX, "more than the 268435456 allowed"),
    ];
    let open = |bytes: &[u8], inflated: u64| {
        let file = sample::edit(&sample::with_section(good, "graph", bytes), |m| {
            let i = sample::section(m, "graph");
            m["sections"][i]["inflated"] = inflated.into();
        });
        Artifact::from_bytes(file, Verify::Code).unwrap()
    };
    for (bytes, inflated, message) in cases {
        let e = open(bytes, inflated).text(&SectionKind::Graph).unwrap_err().to_string();
        assert!(e.contains("section graph") && e.contains(message), "{e}");
    }
    assert_eq!(open(&stream, 1000).text(&SectionKind::Graph).unwrap().unwrap(), "a".repeat(1000));
}
