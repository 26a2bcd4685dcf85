//! Tokenizers rebuilt from GGUF metadata, and those of folders, give the ids of the goldens.

use crate::data::{data, json, smollm2_gguf};
use ::tokenizers::Tokenizer;
use serde_json::Value;

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

fn check_encodings(tokenizer: &Tokenizer, golden: &Value, what: &str) {
    let cases = golden["encodings"].as_array().unwrap();
    assert!(cases.len() > 5, "{what}: too few cases");
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(encode(tokenizer, text), ids(&case["ids"]), "{what}: {text:?}");
    }
}

#[test]
fn folders_pass_their_tokenizer_through() {
    for name in ["llama2", "llama2-sharded", "llama3", "mistral", "qwen2", "qwen3", "smollm2"] {
        let imported = attar_import::open(&data("tiny").join(name)).unwrap();
        let text = imported.tokenizer_json.unwrap();
        assert_eq!(text, std::fs::read_to_string(data("tiny").join(name).join("tokenizer.json")).unwrap());
        let tokenizer = Tokenizer::from_bytes(text).unwrap();
        let golden = json(&format!("tiny/{name}/golden.json"));
        check_encodings(&tokenizer, &golden, name);
    }
}

#[test]
fn byte_level_bpe_is_rebuilt_from_metadata() {
    for name in ["llama2", "llama2-v2", "qwen2", "qwen3"] {
        let imported = attar_import::open(&data("gguf").join(format!("{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_bytes(imported.tokenizer_json.unwrap()).unwrap();
        let golden = json(&format!("gguf/{}.golden.json", name.trim_end_matches("-v2")));
        assert!(!imported.model.add_bos);
        check_encodings(&tokenizer, &golden, name);
        for case in golden["encodings"].as_array().unwrap() {
            let decoded = tokenizer.decode(&ids(&case["ids"]), false).unwrap();
            assert_eq!(
                decoded.contains("<|im_start|>"),
                case["text"].as_str().unwrap().contains("<|im_start|>")
            );
        }
    }
}

#[test]
fn sentencepiece_bpe_is_rebuilt_from_metadata() {
    let bytes = std::fs::read(data("gguf/spm.gguf")).unwrap();
    let gguf = attar_import::container::gguf::parse(&bytes).unwrap();
    let rebuilt = attar_import::tokenizer::from_gguf(&gguf, &bytes).unwrap().unwrap();
    assert!(rebuilt.add_bos);
    let mut tokenizer = Tokenizer::from_bytes(&rebuilt.json).unwrap();
    let golden = json("gguf/spm.golden.json");
    for case in golden["special"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let mut got = encode(&tokenizer, text);
        got.insert(0, 1);
        assert_eq!(got, ids(&case["ids"]), "{text:?}");
    }
    // The other cases take the text of special tokens for plain text.
    tokenizer.set_encode_special_tokens(true);
    for case in golden["encodings"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let want = ids(case.get("llama_cpp_ids").unwrap_or(&case["ids"]));
        assert_eq!(encode(&tokenizer, text), want, "{text:?}");
        let decoded = case.get("decoded").map_or(text, |d| d.as_str().unwrap());
        if case.get("llama_cpp_ids").is_none() {
            assert_eq!(tokenizer.decode(&want, false).unwrap(), decoded, "{text:?}");
        }
    }
}

#[test]
fn smollm2_is_rebuilt_from_its_gguf() {
    let Some(path) = smollm2_gguf() else { return };
    let imported = attar_import::open(&path).unwrap();
    let tokenizer = Tokenizer::from_bytes(imported.tokenizer_json.unwrap()).unwrap();
    let tokens = json("golden/smollm2_tokens.json");
    for case in tokens["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(encode(&tokenizer, text), ids(&case["ids"]), "{text:?}");
    }
    for case in json("golden/smollm2.json").as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(encode(&tokenizer, text), ids(&case["ids"]), "{text:?}");
    }
}
