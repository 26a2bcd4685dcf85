//! Checkpoints of every architecture, from folders and GGUF files, give the goldens' logits in the interpreter.

use crate::data::{data, json, smollm2_gguf};
use attar_import::{Imported, open};
use attar_ir::interp::{KvState, Precision, run};
use attar_ir::{Tensor, verify};
use serde_json::Value;
use std::path::Path;

const FOLDERS: [&str; 7] = ["llama2", "llama2-sharded", "llama3", "mistral", "qwen2", "qwen3", "smollm2"];

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ints(v: &Value) -> Vec<i32> {
    v.as_array().unwrap().iter().map(|x| x.as_i64().unwrap() as i32).collect()
}

/// Logits of every token of one sequence, row by row.
fn logits(model: &Imported, tokens: &[i32]) -> Vec<Vec<f64>> {
    let n = tokens.len();
    let steps = Tensor::int([n], (0..n as i32).collect());
    let inputs = [Tensor::int([n], tokens.to_vec()), steps.clone(), steps];
    let mut cache = KvState::default();
    let out = run(&model.graph, &model.weights, Precision::F32, &mut cache, &inputs).unwrap();
    out[0].as_real().chunks_exact(model.model.vocab).map(<[f64]>::to_vec).collect()
}

fn argmax(row: &[f64]) -> i32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as i32
}

fn check(path: &Path, golden: &Value) {
    let model = open(path).unwrap_or_else(|e| panic!("{e}"));
    verify(&model.graph, Some(&model.weights)).unwrap();
    let tokens = ints(&golden["tokens"]);
    let rows = logits(&model, &tokens);
    let what = path.display();
    let last = rows.last().unwrap();
    for (i, (got, want)) in last.iter().zip(floats(&golden["last_logits"])).enumerate() {
        assert!((got - want).abs() <= 1e-3, "{what}: logit {i} is {got} for {want}");
    }
    let sums = floats(&golden["logits_sum_abs"]);
    assert_eq!(sums.len(), rows.len(), "{what}");
    for (t, (row, want)) in rows.iter().zip(&sums).enumerate() {
        let got: f64 = row.iter().map(|x| x.abs()).sum();
        assert!(
            (got - want).abs() <= 1e-3 * want.max(1.0),
            "{what}: |logits| of token {t} sum to {got} for {want}"
        );
    }
    assert_eq!(rows.iter().map(|r| argmax(r)).collect::<Vec<_>>(), ints(&golden["argmax"]), "{what}");

    let mut text = tokens;
    for want in ints(&golden["greedy"]) {
        let next = argmax(logits(&model, &text).last().unwrap());
        assert_eq!(next, want, "{what}: continuation after {} tokens", text.len());
        text.push(next);
    }
}

#[test]
fn folders_give_the_golden_logits() {
    for name in FOLDERS {
        check(&data("tiny").join(name), &json(&format!("tiny/{name}/golden.json")));
    }
}

#[test]
fn gguf_files_give_the_golden_logits() {
    for name in ["llama2", "llama2-v2", "qwen2", "qwen3"] {
        let golden = json(&format!("gguf/{}.golden.json", name.trim_end_matches("-v2")));
        check(&data("gguf").join(format!("{name}.gguf")), &golden);
    }
}

#[test]
fn what_is_known_of_a_model_is_told() {
    let m = open(&data("tiny/smollm2")).unwrap();
    assert_eq!((m.model.architecture, m.model.layers, m.model.hidden), ("llama", 2, 64));
    assert_eq!((m.model.heads, m.model.kv_heads, m.model.head_dim), (4, 2, 16));
    assert_eq!((m.model.ffn, m.model.vocab, m.model.context_length), (96, 256, 256));
    assert!(m.model.tied);
    assert_eq!((m.model.eos.as_slice(), m.model.bos, m.model.add_bos), ([2].as_slice(), Some(1), false));
    assert_eq!(m.model.special_tokens["bos_token"], "<|im_start|>");
    assert!(m.chat_template.unwrap().contains("add_generation_prompt"));
    assert_eq!(m.source.container, "safetensors");
    let total: usize =
        m.weights.names().map(|n| m.weights.info(n).unwrap().shape.iter().product::<usize>()).sum();
    assert_eq!(m.model.parameters, total as u64);

    let m = open(&data("tiny/llama2")).unwrap();
    assert!(m.model.add_bos && !m.model.tied);
    let m = open(&data("tiny/mistral")).unwrap();
    assert_eq!(m.model.windows, [Some(8), Some(8)]);
    let m = open(&data("tiny/qwen3")).unwrap();
    assert!(m.chat_template.is_some(), "chat_template.jinja");
    let m = open(&data("gguf/qwen2.gguf")).unwrap();
    assert_eq!((m.source.container, m.model.name.as_str()), ("gguf", "tiny qwen2"));
    assert!(m.model.tied && m.chat_template.is_some());
    assert_eq!(m.weights.info("model.layers.0.self_attn.v_proj.weight").unwrap().stored_as, "q5_1");
}

#[test]
fn both_spellings_of_a_configuration_mean_the_same() {
    let five = open(&data("tiny/llama3")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(data("tiny/llama3").join(file), folder.path().join(file)).unwrap();
    }
    std::fs::copy(data("tiny/llama3/config.v4.json"), folder.path().join("config.json")).unwrap();
    let four = open(folder.path()).unwrap();
    assert_eq!(four.model, five.model);
    assert_eq!(attar_ir::text::print(&four.graph), attar_ir::text::print(&five.graph));
}

#[test]
fn a_table_of_factors_in_a_gguf_divides_the_frequencies() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/gguf_load");
    let m = open(&seeds.join("llama.gguf")).unwrap();
    let plain = (0..8).map(|i| 100f64.powf(-f64::from(i) / 8.0));
    for (got, want) in m.model.rope[0].inv_freq.iter().zip(plain) {
        assert!((got - want / 2.0).abs() < 1e-12, "{got} for half of {want}");
    }
    assert!(!m.weights.contains("rope_freqs.weight"));
    verify(&m.graph, Some(&m.weights)).unwrap();
}

#[test]
fn smollm2_imports_from_gguf() {
    let Some(path) = smollm2_gguf() else { return };
    let m = open(&path).unwrap();
    verify(&m.graph, Some(&m.weights)).unwrap();
    assert_eq!((m.model.layers, m.model.hidden, m.model.vocab), (30, 576, 49152));
    assert_eq!(m.model.eos, [2]);
    assert_eq!(m.model.parameters, 134_515_008);
    let golden = json("golden/smollm2.json");
    let case = &golden[0];
    let rows = logits(&m, &ints(&case["ids"]));
    for pair in case["top10"].as_array().unwrap() {
        let (id, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
        let got = rows.last().unwrap()[id];
        assert!((got - want).abs() < 2e-3, "token {id}: {got} for {want}");
    }
}
