//! `qwen3`: Qwen3 dense models. Llama's blocks with an RMS norm on each query and key head before the rotation.
//! Source: Yang et al. 2025, arXiv:2505.09388.

use super::decoder::windows_of_upper_layers;
use super::{Architecture, Blocks, Has};
use crate::config::ModelConfig;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen3",
    class: "Qwen3ForCausalLM",
    gguf: Some("qwen3"),
    gguf_interleaves: false,
    blocks,
};

fn blocks(config: &ModelConfig, _has: &Has<'_>) -> Blocks {
    let bias = config.attention_bias.unwrap_or(false);
    Blocks {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: false,
        qk_norm: true,
        windows: windows_of_upper_layers(config),
    }
}
