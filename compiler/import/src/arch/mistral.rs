//! `mistral`: Llama's blocks with a sliding window over all layers. A configuration without one has 4096, as
//! transformers has; `null` means none. GGUF files of Mistral say `llama`.
//! Source: Jiang et al. 2023, arXiv:2310.06825.

use super::{Architecture, Blocks, Has};
use crate::config::{ModelConfig, Setting};

pub(super) const ARCHITECTURE: Architecture =
    Architecture { name: "mistral", class: "MistralForCausalLM", gguf: None, gguf_interleaves: true, blocks };

fn blocks(config: &ModelConfig, _has: &Has<'_>) -> Blocks {
    let window = match config.window.size {
        Setting::Absent => Some(4096),
        Setting::Null => None,
        Setting::Value(n) => Some(n),
    };
    let slides = |i: usize| config.window.layers.as_ref().is_none_or(|l| l.get(i).copied().unwrap_or(true));
    Blocks {
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        windows: (0..config.layers).map(|i| window.filter(|_| slides(i))).collect(),
    }
}
