//! Damaged and hostile checkpoints are refused with an error that says what is wrong; nothing panics.

use crate::data::data;
use attar_import::container::{FileBytes, gguf, safetensors};
use attar_import::{ErrorKind, open, open_gguf};
use proptest::prelude::*;
use std::path::Path;

/// A safetensors file of that header.
fn file(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

#[test]
fn safetensors_headers_are_not_trusted() {
    let good = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}"#;
    assert_eq!(safetensors::parse(&file(good, 8)).unwrap()[0].shape, [2, 2]);
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![], "header's length needs 8 bytes"),
        (vec![0; 7], "header's length needs 8 bytes"),
        (vec![0xff; 64], "a header of at most 100000000 bytes, got 18446744073709551615"),
        (100u64.to_le_bytes().to_vec(), "the header needs 108 bytes, the file has 8"),
        (file("", 0), "a JSON header"),
        (file("[1]", 0), "an object of tensors"),
        (file(&deep, 0), "a JSON header"),
        (file(good, 7), "tensor a: truncated"),
        (file(good, 9), "1 bytes more"),
        (file("{\"\u{e9}", 0)[..11].to_vec(), "header needs"),
        ([&3u64.to_le_bytes()[..], b"{\"\xff"].concat(), "a JSON header"),
        (
            file(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                8,
            ),
            "one tensor of each name",
        ),
        (
            file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "tensor b: expected bytes of its own",
        ),
        (
            file(r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#, 2),
            "unsupported type F8_E4M3; supported: F32, F16, BF16",
        ),
        (
            file(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}}"#, 8),
            "shape whose bytes can be counted",
        ),
        (
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            "expected 8 bytes for F32 [2], got offsets 8 to 0",
        ),
        (
            file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]}}"#,
                8,
            ),
            "expected 8 bytes",
        ),
        (file(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), "a JSON header"),
        (file(r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4), "data_offsets"),
    ];
    for (bytes, says) in cases {
        let e = safetensors::parse(bytes).expect_err(says).to_string();
        assert!(e.contains(says), "expected {says:?} in {e:?}");
    }
}

#[test]
fn our_reading_of_safetensors_is_that_of_the_reference() {
    for name in ["llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm2"] {
        let bytes = std::fs::read(data("tiny").join(name).join("model.safetensors")).unwrap();
        let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ours = safetensors::parse(&bytes).unwrap();
        assert_eq!(ours.len(), reference.len());
        for t in ours {
            let view = reference.tensor(&t.name).unwrap();
            assert_eq!(view.shape(), t.shape);
            assert_eq!(view.data(), &bytes[t.range]);
            assert_eq!(format!("{:?}", view.dtype()), t.kind.name);
        }
    }
}

/// A GGUF file in parts.
struct File {
    version: u32,
    counts: Option<(u64, u64)>,
    metadata: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data_len: usize,
}

fn text(s: impl AsRef<[u8]>) -> Vec<u8> {
    let s = s.as_ref();
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

fn entry(key: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

fn array(key: &str, kind: u32, count: u64, values: &[u8]) -> Vec<u8> {
    entry(key, 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat())
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut b = text(name);
    b.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
    b.extend(kind.to_le_bytes());
    b.extend(offset.to_le_bytes());
    b
}

impl File {
    fn new(metadata: Vec<Vec<u8>>, tensors: Vec<Vec<u8>>) -> File {
        File { version: 3, counts: None, metadata, tensors, data_len: 256 }
    }

    fn bytes(&self) -> Vec<u8> {
        let (tensors, metadata) =
            self.counts.unwrap_or((self.tensors.len() as u64, self.metadata.len() as u64));
        let mut b = b"GGUF".to_vec();
        b.extend(self.version.to_le_bytes());
        b.extend(tensors.to_le_bytes());
        b.extend(metadata.to_le_bytes());
        self.metadata.iter().chain(&self.tensors).for_each(|part| b.extend(part));
        b.resize(b.len().next_multiple_of(32) + self.data_len, 0);
        b
    }
}

#[test]
fn gguf_headers_are_not_trusted() {
    let good = File::new(vec![entry("k", 7, &[1])], vec![tensor("t", &[32, 2], 2, 0)]);
    let parsed = gguf::parse(&good.bytes()).unwrap();
    assert_eq!(parsed.tensors[0].shape, [2, 32]);
    assert_eq!(parsed.tensors[0].range.len(), 36);

    let meta = |m: Vec<u8>| File::new(vec![m], vec![]).bytes();
    let one = |t: Vec<u8>| File::new(vec![], vec![t]).bytes();
    let counts = |t, m| File { counts: Some((t, m)), ..File::new(vec![], vec![]) }.bytes();
    let nested = |depth: usize| {
        let mut v = [&0u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
        for _ in 0..depth {
            v = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &v].concat();
        }
        meta(entry("k", 9, &v))
    };
    assert!(gguf::parse(&nested(3)).is_ok());
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![], "truncated: the magic"),
        (b"GGML\x03\0\0\0".to_vec(), "a file that begins with GGUF"),
        (b"GGUF\x03\0".to_vec(), "truncated: the version"),
        (File { version: 1, ..File::new(vec![], vec![]) }.bytes(), "unsupported GGUF version 1"),
        (File { version: 3 << 24, ..File::new(vec![], vec![]) }.bytes(), "big-endian"),
        (counts(u64::MAX, 0), "18446744073709551615 tensors"),
        (counts(1 << 40, 0), "1099511627776 tensors"),
        (counts(0, u64::MAX / 2), "metadata entries"),
        (counts(1, 0)[..24].to_vec(), "1 tensors needs 48 bytes"),
        (meta(entry([0xff], 7, &[1])), "a metadata key in UTF-8"),
        (meta(entry("k", 13, &[1])), "k: expected a value type from 0 to 12, got 13"),
        (meta(entry("k", 7, &[2])), "a bool of 0 or 1"),
        (meta(entry("k", 8, &u64::MAX.to_le_bytes())), "k: truncated: a string"),
        (meta(entry("k", 8, &text([0xc0]))), "a string in UTF-8"),
        (meta(array("k", 4, u64::MAX, &[])), "array elements"),
        (meta(array("k", 8, 1 << 60, &[])), "array elements"),
        (nested(4), "nested 4 deep"),
        (nested(10_000), "nested 4 deep"),
        (
            File::new(vec![entry("k", 7, &[1]), entry("k", 7, &[1])], vec![]).bytes(),
            "k: expected one value of each key",
        ),
        (
            meta(entry("general.alignment", 4, &0u32.to_le_bytes())),
            "general.alignment: expected a power of two",
        ),
        (
            meta(entry("general.alignment", 4, &24u32.to_le_bytes())),
            "general.alignment: expected a power of two",
        ),
        (meta(entry("general.alignment", 8, &text("x"))), "general.alignment: expected a power of two"),
        (one(tensor("t", &[1; 5], 0, 0)), "tensor t: expected 4 dimensions at most, got 5"),
        (one(tensor("t", &[32], 19, 0)), "tensor t: unsupported type IQ1_S; supported: F32, F16"),
        (one(tensor("t", &[32], 77, 0)), "number 77, which ggml does not define"),
        (one(tensor("t", &[31, 32], 2, 0)), "rows of a multiple of 32 values for Q4_0, got 31"),
        (one(tensor("t", &[u64::MAX, 2], 0, 0)), "shape whose bytes can be counted"),
        (one(tensor("t", &[1 << 62], 0, 0)), "shape whose bytes can be counted"),
        (one(tensor("t", &[1 << 40], 0, 0)), "tensor t: truncated"),
        (one(tensor("t", &[4], 0, u64::MAX - 31)), "tensor t: truncated"),
        (one(tensor("t", &[4], 0, 8)), "an offset that is a multiple of 32, got 8"),
        (one(tensor("t", &[4], 0, 1 << 50)), "tensor t: truncated"),
        (
            File::new(vec![], vec![tensor("t", &[4], 0, 0), tensor("t", &[4], 0, 32)]).bytes(),
            "one tensor of each name",
        ),
        (
            File::new(vec![], vec![tensor("t", &[16], 0, 0), tensor("u", &[4], 0, 32)]).bytes(),
            "tensor u: expected bytes of its own",
        ),
    ];
    for (bytes, says) in cases {
        let e = gguf::parse(bytes).expect_err(says).to_string();
        assert!(e.contains(says), "expected {says:?} in {e}");
    }
}

#[test]
fn every_bad_tensor_of_a_file_is_named() {
    let bytes = File::new(
        vec![],
        vec![
            tensor("a", &[32], 16, 0),
            tensor("b", &[4], 0, 0),
            tensor("c", &[4], 0, 3),
            tensor("d", &[1 << 30], 0, 0),
        ],
    )
    .bytes();
    let e = gguf::parse(&bytes).unwrap_err();
    let named: Vec<_> = e.problems().iter().map(|p| p.at.tensor.clone().unwrap()).collect();
    assert_eq!(named, ["a", "c", "d"]);
}

#[test]
fn every_truncation_is_an_error() {
    let whole = std::fs::read(data("gguf/llama2.gguf")).unwrap();
    let spm = std::fs::read(data("gguf/spm.gguf")).unwrap();
    let tensors = std::fs::read(data("tiny/qwen2/model.safetensors")).unwrap();
    for len in (0..whole.len()).step_by(97) {
        assert!(
            open_gguf(FileBytes::from_vec(Path::new("cut.gguf"), whole[..len].to_vec())).is_err(),
            "{len}"
        );
    }
    for len in 0..spm.len() - 32 {
        assert!(gguf::parse(&spm[..len]).is_err(), "{len}");
    }
    for len in (0..tensors.len()).step_by(31) {
        assert!(safetensors::parse(&tensors[..len]).is_err(), "{len}");
    }
}

/// A folder like `tiny/<name>`, to be damaged.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for f in std::fs::read_dir(data("tiny").join(name)).unwrap() {
        let f = f.unwrap();
        std::fs::copy(f.path(), folder.path().join(f.file_name())).unwrap();
    }
    folder
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join(file);
    let mut v = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut v);
    std::fs::write(path, v.to_string()).unwrap();
}

fn error(folder: &Path) -> String {
    open(folder).expect_err("a damaged folder was imported").to_string()
}

#[test]
fn one_error_lists_all_that_is_wrong_with_a_folder() {
    let folder = copy("llama2-sharded");
    std::fs::remove_file(folder.path().join("model-00003-of-00003.safetensors")).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    edit(folder.path(), "config.json", |c| {
        c["num_attention_heads"] = 0.into();
        c["rope_parameters"]["rope_type"] = "dynamic".into();
        c["hidden_act"] = "gelu".into();
    });
    let e = open(folder.path()).unwrap_err();
    let text = e.to_string();
    for says in [
        "num_attention_heads: expected a number from 1",
        "rotation type \"dynamic\"",
        "activation \"gelu\"",
        "tokenizer",
    ] {
        assert!(text.contains(says), "expected {says:?} in {text}");
    }
    assert!(e.problems().iter().all(|p| p.at.file.is_some()), "{text}");
    assert!(!e.is_environment() && !e.is_bug());
}

#[test]
fn wrong_tensors_are_listed() {
    let folder = copy("qwen2");
    edit(folder.path(), "config.json", |c| {
        c["intermediate_size"] = 128.into();
        c["num_hidden_layers"] = 3.into();
        c["layer_types"] = serde_json::Value::Null;
    });
    let e = open(folder.path()).unwrap_err();
    let missing = |p: &&&attar_import::Error| matches!(p.kind, ErrorKind::MissingTensor { .. });
    assert_eq!(e.problems().iter().filter(missing).count(), 12, "{e}");
    let says = "tensor model.layers.1.mlp.down_proj.weight: expected shape [64, 128], got [64, 96]";
    assert!(e.to_string().contains(says), "{e}");

    let folder = copy("qwen2");
    edit(folder.path(), "config.json", |c| {
        c["model_type"] = "llama".into();
        c["architectures"][0] = "LlamaForCausalLM".into();
    });
    let e = open(folder.path()).unwrap_err();
    let biases = e.problems().len();
    assert_eq!(biases, 6, "{e}");
    assert!(
        e.to_string().contains("tensor model.layers.0.self_attn.q_proj.bias: shape [64]: not part of"),
        "{e}"
    );
}

#[test]
fn damaged_folders_say_what_is_wrong() {
    type Damage = fn(&Path);
    let cases: &[(&str, Damage, &str)] = &[
        (
            "llama2-sharded",
            |f| std::fs::remove_file(f.join("model-00002-of-00003.safetensors")).unwrap(),
            "model-00002-of-00003.safetensors: shard named by model.safetensors.index.json does not exist",
        ),
        (
            "llama2-sharded",
            |f| {
                edit(f, "model.safetensors.index.json", |i| {
                    i["weight_map"]["lm_head.weight"] = "../../etc/passwd".into()
                })
            },
            "the name of a file in the same folder",
        ),
        (
            "llama2-sharded",
            |f| {
                edit(f, "model.safetensors.index.json", |i| {
                    i["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors".into()
                })
            },
            "tensor extra.weight: expected the tensor, as the index says",
        ),
        ("llama2-sharded", |f| edit(f, "model.safetensors.index.json", |i| *i = 1.into()), "a JSON object"),
        (
            "llama2-sharded",
            |f| {
                std::fs::copy(
                    f.join("model-00001-of-00003.safetensors"),
                    f.join("model-00002-of-00003.safetensors"),
                )
                .unwrap();
            },
            "one tensor of each name",
        ),
        (
            "llama2",
            |f| edit(f, "config.json", |c| c["model_type"] = "gpt_neox".into()),
            "unsupported architecture gpt_neox (LlamaForCausalLM); supported: llama, mistral, qwen2, qwen3",
        ),
        (
            "llama2",
            |f| edit(f, "config.json", |c| c["architectures"][0] = "LlamaForSequenceClassification".into()),
            "unsupported architecture llama (LlamaForSequenceClassification)",
        ),
        (
            "llama2",
            |f| edit(f, "config.json", |c| *c = serde_json::json!({})),
            "model_type: expected the name of an architecture",
        ),
        (
            "llama2",
            |f| edit(f, "config.json", |c| c["num_key_value_heads"] = 3.into()),
            "a multiple of the 3 KV heads, got 4",
        ),
        (
            "llama2",
            |f| edit(f, "config.json", |c| c["num_hidden_layers"] = 1e30.into()),
            "num_hidden_layers: expected a number from 1 to 4096",
        ),
        ("llama2", |f| edit(f, "config.json", |c| c["head_dim"] = 15.into()), "an even head width"),
        (
            "llama2",
            |f| {
                edit(f, "config.json", |c| {
                    c["quantization_config"] = serde_json::json!({"quant_method": "gptq"})
                })
            },
            "weights quantized by another tool",
        ),
        (
            "llama3",
            |f| edit(f, "config.json", |c| c["rope_parameters"]["factor"] = 0.into()),
            "rope_parameters.factor: expected a positive number, got 0",
        ),
        (
            "llama3",
            |f| edit(f, "config.json", |c| c["rope_parameters"]["low_freq_factor"] = 4.into()),
            "less than high_freq_factor 4",
        ),
        (
            "llama2",
            |f| std::fs::write(f.join("config.json"), [b'"', 0xff, b'"']).unwrap(),
            "config.json: expected UTF-8",
        ),
        (
            "llama2",
            |f| std::fs::write(f.join("config.json"), "[".repeat(1 << 20)).unwrap(),
            "config.json: expected JSON",
        ),
        ("llama2", |f| std::fs::write(f.join("config.json"), "").unwrap(), "config.json: expected JSON"),
        (
            "llama2",
            |f| std::fs::write(f.join("model.safetensors"), "").unwrap(),
            "model.safetensors: truncated",
        ),
        (
            "llama2",
            |f| std::fs::remove_file(f.join("model.safetensors")).unwrap(),
            "no checkpoint: expected model.safetensors",
        ),
        (
            "llama2",
            |f| std::fs::remove_file(f.join("config.json")).unwrap(),
            "config.json, or exactly one .gguf file, got a folder with 0",
        ),
        (
            "llama2",
            |f| edit(f, "tokenizer.json", |t| t["post_processor"]["special_tokens"] = serde_json::json!({})),
            "tokenizer",
        ),
    ];
    for (name, damage, says) in cases {
        let folder = copy(name);
        damage(folder.path());
        let text = error(folder.path());
        assert!(text.contains(says), "expected {says:?} in {text}");
    }
    let e = open(Path::new("no/such/folder")).unwrap_err();
    assert!(!e.is_environment() && e.to_string().contains("no/such/folder: cannot open"), "{e}");
}

#[test]
fn gguf_metadata_is_not_trusted() {
    let whole = std::fs::read(data("gguf/llama2.gguf")).unwrap();
    // Same length, so nothing moves.
    let swapped = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = whole.clone();
        let mut found = 0;
        for at in 0..bytes.len() - from.len() {
            if bytes[at..].starts_with(from.as_bytes()) {
                bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
                found += 1;
            }
        }
        assert!(found > 0, "{from}");
        open_gguf(FileBytes::from_vec(Path::new("m.gguf"), bytes)).expect_err(from).to_string()
    };
    let cases = [
        ("llama.block_count", "llama.block_kount", "llama.block_count: expected a number from 1"),
        ("general.architecture", "general.arkhitecture", "unsupported architecture"),
        ("smollm", "whoami", "unsupported pre-tokenizer whoami; supported: smollm"),
        ("gpt2", "bert", "unsupported tokenizer bert"),
        ("tokenizer.ggml.merges", "tokenizer.ggml.merxes", "tokenizer.ggml.merges: expected an array"),
        (
            "blk.1.ffn_up.weight",
            "blk.1.ffn_ub.weight",
            "tensor blk.1.ffn_up.weight: missing; expected shape [96, 64]",
        ),
        (
            "blk.1.ffn_up.weight",
            "blk.1.ffn_ub.weight",
            "tensor blk.1.ffn_ub.weight: shape [96, 64]: not part of",
        ),
    ];
    for (from, to, says) in cases {
        let text = swapped(from, to);
        assert!(text.contains(says) && text.contains("m.gguf"), "expected {says:?} in {text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_panic(flips in proptest::collection::vec((0usize..6000, any::<u8>()), 1..12), which in 0usize..4) {
        let name = ["gguf/llama2.gguf", "gguf/qwen3.gguf", "gguf/spm.gguf", "tiny/qwen3/model.safetensors"][which];
        let mut bytes = std::fs::read(data(name)).unwrap();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if which < 3 {
            if let Ok(m) = open_gguf(FileBytes::from_vec(Path::new("m.gguf"), bytes)) {
                for name in m.weights.names() {
                    m.weights.read_f32(name).unwrap();
                }
            }
        } else {
            drop(safetensors::parse(&bytes));
        }
    }
}

/// Seeds of the fuzz target of that name, and inputs that once broke it.
fn kept_inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut paths = Vec::new();
    for kept in ["seeds", "regressions"] {
        let Ok(files) = std::fs::read_dir(fuzz.join(kept).join(target)) else { continue };
        paths.extend(files.map(|f| f.unwrap().path()));
    }
    paths.sort();
    paths.iter().map(|p| (p.display().to_string(), std::fs::read(p).unwrap())).collect()
}

#[test]
fn what_fuzzing_found_stays_fixed() {
    for (name, bytes) in kept_inputs("safetensors_load") {
        for t in safetensors::parse(&bytes).into_iter().flatten() {
            assert_eq!(t.kind.decode_all(&bytes[t.range]).len(), t.shape.iter().product::<usize>(), "{name}");
        }
    }
    for (name, bytes) in kept_inputs("gguf_load") {
        if let Ok(m) = open_gguf(FileBytes::from_vec(Path::new(&name), bytes)) {
            attar_ir::verify(&m.graph, Some(&m.weights)).unwrap();
        }
    }
    for (name, bytes) in kept_inputs("config_load") {
        let Ok(serde_json::Value::Object(object)) = serde_json::from_slice(&bytes) else { continue };
        let mut problems = attar_import::Problems::new();
        let read = attar_import::config::from_hf(&object, &mut problems);
        assert!(read.is_some() || !problems.is_empty(), "{name}: refused without a word");
    }
}
