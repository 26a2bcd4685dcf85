//! Small checkpoints with made-up weights, to try passes on: written as a model hub would serve them, so that everything from
//! importing to generating is what it is for real models.

use serde_json::{Value, json};
use std::fs;
use std::io;
use std::path::Path;

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiny {
    pub(super) name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    tied: bool,
}

/// What passes are tried on: a tied embedding and a head of its own, grouped heads, and rows that are no multiple of 32.
pub(super) const MODELS: [Tiny; 2] = [
    Tiny { name: "tied", hidden: 64, layers: 4, heads: 4, kv_heads: 2, ffn: 96, tied: true },
    Tiny { name: "untied", hidden: 48, layers: 3, heads: 3, kv_heads: 3, ffn: 80, tied: false },
];

/// Tokens: one per byte, and one that ends a text.
const VOCAB: usize = 257;
const END: &str = "<|end|>";

impl Tiny {
    /// Writes the checkpoint into a folder.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let text = |value: &Value| value.to_string();
        fs::write(folder.join("config.json"), text(&self.config()))?;
        fs::write(folder.join("tokenizer.json"), text(&tokenizer()))?;
        let configured = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END });
        fs::write(folder.join("tokenizer_config.json"), text(&configured))?;
        fs::write(folder.join("model.safetensors"), self.weights())
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "mlp_bias": false,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "eos_token_id": 256,
            "vocab_size": VOCAB,
        })
    }

    /// Names and shapes of the tensors.
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (d, kv) = (self.hidden, self.kv_heads * 16);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, d])];
        for layer in 0..self.layers {
            let parts: [(&str, Vec<usize>); 9] = [
                ("input_layernorm", vec![d]),
                ("self_attn.q_proj", vec![self.heads * 16, d]),
                ("self_attn.k_proj", vec![kv, d]),
                ("self_attn.v_proj", vec![kv, d]),
                ("self_attn.o_proj", vec![d, self.heads * 16]),
                ("post_attention_layernorm", vec![d]),
                ("mlp.gate_proj", vec![self.ffn, d]),
                ("mlp.up_proj", vec![self.ffn, d]),
                ("mlp.down_proj", vec![d, self.ffn]),
            ];
            all.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        all.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![VOCAB, d]));
        }
        all
    }

    /// A safetensors file of them: gains of 1, and numbers spread about zero.
    fn weights(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ self.hidden as u64;
        let mut number = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        for (name, shape) in self.shapes() {
            let (start, size) = (data.len(), shape.iter().product::<usize>());
            let spread = 2.0 / (self.hidden as f32).sqrt();
            for _ in 0..size {
                let value = if shape.len() == 1 { 1.0 } else { (number() + number()) * spread };
                data.extend_from_slice(&value.to_le_bytes());
            }
            let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
            header.insert(name, entry);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        file
    }
}

/// A byte-level tokenizer without merges.
fn tokenizer() -> Value {
    // Bytes are written as letters, those that can be as themselves, the others from U+0100 on: the mapping of GPT-2.
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut beyond = 0x100;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=u8::MAX {
        let letter = if printable(byte) {
            char::from(byte)
        } else {
            beyond += 1;
            char::from_u32(beyond - 1).unwrap_or(' ')
        };
        vocab.insert(letter.to_string(), json!(byte));
    }
    vocab.insert(END.to_owned(), json!(256));
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 256, "content": END, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}
