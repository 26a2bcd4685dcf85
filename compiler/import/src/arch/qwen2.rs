//! `qwen2`: Qwen2 and Qwen2.5. Llama's blocks with biases on queries, keys and values.
//! Source: Yang et al. 2024, arXiv:2407.10671.

use super::decoder::windows_of_upper_layers;
use super::{Architecture, Blocks, Has};
use crate::config::ModelConfig;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen2",
    class: "Qwen2ForCausalLM",
    gguf: Some("qwen2"),
    gguf_interleaves: false,
    blocks,
};

fn blocks(config: &ModelConfig, _has: &Has<'_>) -> Blocks {
    Blocks {
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: windows_of_upper_layers(config),
    }
}
