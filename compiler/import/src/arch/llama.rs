//! `llama`: Llama 2 and 3, SmolLM2, TinyLlama and all that share their blocks. Biases where the checkpoint asks for them.
//! GGUF files of Mistral call themselves so too; a window they give is kept.
//! Source: Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783.

use super::{Architecture, Blocks, Has};
use crate::config::{ModelConfig, Setting};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    class: "LlamaForCausalLM",
    gguf: Some("llama"),
    gguf_interleaves: true,
    blocks,
};

fn blocks(config: &ModelConfig, has: &Has<'_>) -> Blocks {
    let attention_bias = config.attention_bias.unwrap_or_else(|| has("model.layers.0.self_attn.q_proj.bias"));
    // `config.json` of a Llama never means a window; only a GGUF leaves both biases open.
    let from_gguf = config.attention_bias.is_none();
    let window = match config.window.size {
        Setting::Value(n) if from_gguf => Some(n),
        _ => None,
    };
    Blocks {
        qkv_bias: attention_bias,
        o_bias: if from_gguf { has("model.layers.0.self_attn.o_proj.bias") } else { attention_bias },
        mlp_bias: config.mlp_bias.unwrap_or_else(|| has("model.layers.0.mlp.gate_proj.bias")),
        qk_norm: false,
        windows: vec![window; config.layers],
    }
}
