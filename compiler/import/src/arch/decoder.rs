//! The pre-norm decoder all architectures here share: which weights it has, and its graph in core ops.
//!
//! x = embed(tokens); per layer x += o(attention(rope(q), rope(k), v)) and x += down(silu(gate) * up), each after an RMS
//! norm; then only the wanted rows are normed and multiplied by the head.

use crate::config::{ModelConfig, Setting};
use crate::error::Result;
use crate::rope::RopeTable;
use attar_ir::ops::{Add, Attention, Embed, GatherRows, Linear, Mul, Reshape, RmsNorm, Rope, Silu};
use attar_ir::{Dim, Graph, OpKind, TensorType, ValueId, WeightName};

/// What tells the blocks of one architecture from another's.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMS norm on each head of q and k.
    pub qk_norm: bool,
    /// Attention window of each layer in tokens.
    pub windows: Vec<Option<usize>>,
}

/// A weight the graph needs.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSpec {
    /// Name in the graph and in a Hugging Face checkpoint.
    pub name: String,
    /// Name in a GGUF file.
    pub gguf: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Heads whose rows llama.cpp's converter may have interleaved.
    pub rotated_heads: Option<usize>,
}

/// Qwen's rule: when windows are enabled, layers from `max_window_layers` on slide, unless `layer_types` says which.
pub(super) fn windows_of_upper_layers(config: &ModelConfig) -> Vec<Option<usize>> {
    let size = match config.window.size {
        Setting::Value(n) if config.window.enabled == Some(true) => Some(n),
        _ => None,
    };
    let slides = |i: usize| match &config.window.layers {
        Some(list) => list.get(i).copied().unwrap_or(false),
        None => i >= config.window.from_layer.unwrap_or(28),
    };
    (0..config.layers).map(|i| size.filter(|_| slides(i))).collect()
}

/// All weights of the model; the head only when it is not the embedding.
pub fn weights(config: &ModelConfig, blocks: &Blocks, tied: bool) -> Vec<WeightSpec> {
    let (d, f, v) = (config.hidden, config.ffn, config.vocab);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut list = vec![spec("model.embed_tokens.weight", "token_embd.weight", vec![v, d])];
    for l in 0..config.layers {
        let mut add = |hf: &str, gguf: &str, shape: Vec<usize>, heads: Option<usize>| {
            let mut s = spec(&format!("model.layers.{l}.{hf}"), &format!("blk.{l}.{gguf}"), shape);
            s.rotated_heads = heads;
            list.push(s);
        };
        add("input_layernorm.weight", "attn_norm.weight", vec![d], None);
        for (hf, gguf, rows, heads) in [
            ("q_proj", "attn_q", q, Some(config.heads)),
            ("k_proj", "attn_k", kv, Some(config.kv_heads)),
            ("v_proj", "attn_v", kv, None),
        ] {
            add(&format!("self_attn.{hf}.weight"), &format!("{gguf}.weight"), vec![rows, d], heads);
            if blocks.qkv_bias {
                add(&format!("self_attn.{hf}.bias"), &format!("{gguf}.bias"), vec![rows], heads);
            }
        }
        if blocks.qk_norm {
            add("self_attn.q_norm.weight", "attn_q_norm.weight", vec![config.head_dim], None);
            add("self_attn.k_norm.weight", "attn_k_norm.weight", vec![config.head_dim], None);
        }
        add("self_attn.o_proj.weight", "attn_output.weight", vec![d, q], None);
        if blocks.o_bias {
            add("self_attn.o_proj.bias", "attn_output.bias", vec![d], None);
        }
        add("post_attention_layernorm.weight", "ffn_norm.weight", vec![d], None);
        for (hf, gguf, shape) in [
            ("gate_proj", "ffn_gate", [f, d]),
            ("up_proj", "ffn_up", [f, d]),
            ("down_proj", "ffn_down", [d, f]),
        ] {
            add(&format!("mlp.{hf}.weight"), &format!("{gguf}.weight"), shape.to_vec(), None);
            if blocks.mlp_bias {
                add(&format!("mlp.{hf}.bias"), &format!("{gguf}.bias"), vec![shape[0]], None);
            }
        }
    }
    list.push(spec("model.norm.weight", "output_norm.weight", vec![d]));
    if !tied {
        list.push(spec("lm_head.weight", "output.weight", vec![v, d]));
    }
    list
}

fn spec(name: &str, gguf: &str, shape: Vec<usize>) -> WeightSpec {
    WeightSpec { name: name.to_owned(), gguf: gguf.to_owned(), shape, rotated_heads: None }
}

/// The graph over weights of [`weights`].
///
/// # Errors
/// When an op's rule is broken, which is a bug here: the configuration has been checked.
pub fn build(
    name: &str,
    config: &ModelConfig,
    blocks: &Blocks,
    tied: bool,
    rope: &RopeTable,
) -> Result<Graph> {
    let mut b = Builder { graph: Graph::new(name), prefix: String::new() };
    let (d, dh) = (config.hidden, config.head_dim);
    let tokens = b.graph.add_input("tokens", TensorType::i32([Dim::T]));
    let positions = b.graph.add_input("positions", TensorType::i32([Dim::T]));
    let rows = b.graph.add_input("rows", TensorType::i32([Dim::R]));
    let embedding = b.weight("model.embed_tokens.weight", &[config.vocab, d]);
    let mut x = b.op("embed", Embed {}, &[tokens, embedding])?;

    for l in 0..config.layers {
        b.prefix = format!("l{l}_");
        let weight = |rest: &str| format!("model.layers.{l}.{rest}");
        let normed = b.norm("attn_norm", x, &weight("input_layernorm.weight"), d, config.rms_norm_eps)?;

        let project = |b: &mut Builder, short: &str, heads: usize| -> Result<ValueId> {
            let stem = weight(&format!("self_attn.{short}_proj"));
            let y = b.linear(short, normed, &stem, [heads * dh, d], blocks.qkv_bias)?;
            let shape = vec![Dim::T, heads.into(), dh.into()];
            b.op(&format!("{short}_heads"), Reshape { shape }, &[y])
        };
        let mut q = project(&mut b, "q", config.heads)?;
        let mut k = project(&mut b, "k", config.kv_heads)?;
        let v = project(&mut b, "v", config.kv_heads)?;
        if blocks.qk_norm {
            q = b.norm("q_norm", q, &weight("self_attn.q_norm.weight"), dh, config.rms_norm_eps)?;
            k = b.norm("k_norm", k, &weight("self_attn.k_norm.weight"), dh, config.rms_norm_eps)?;
        }
        let rotate = || Rope { inv_freq: rope.inv_freq.clone(), mscale: rope.mscale };
        let q = b.op("q_rot", rotate(), &[q, positions])?;
        let k = b.op("k_rot", rotate(), &[k, positions])?;
        let window = blocks.windows.get(l).copied().flatten();
        let attention = Attention { layer: l, scale: 1.0 / (dh as f64).sqrt(), window };
        let y = b.op("attn", attention, &[q, k, v, positions])?;
        let width = config.heads * dh;
        let y = b.op("attn_flat", Reshape { shape: vec![Dim::T, width.into()] }, &[y])?;
        let y = b.linear("o", y, &weight("self_attn.o_proj"), [d, width], blocks.o_bias)?;
        x = b.op("attn_out", Add {}, &[x, y])?;

        let norm = weight("post_attention_layernorm.weight");
        let normed = b.norm("mlp_norm", x, &norm, d, config.rms_norm_eps)?;
        let gate = b.linear("gate", normed, &weight("mlp.gate_proj"), [config.ffn, d], blocks.mlp_bias)?;
        let up = b.linear("up", normed, &weight("mlp.up_proj"), [config.ffn, d], blocks.mlp_bias)?;
        let gate = b.op("gate_silu", Silu {}, &[gate])?;
        let y = b.op("act", Mul {}, &[gate, up])?;
        let y = b.linear("down", y, &weight("mlp.down_proj"), [d, config.ffn], blocks.mlp_bias)?;
        x = b.op("out", Add {}, &[x, y])?;
    }

    b.prefix.clear();
    let x = b.op("wanted", GatherRows {}, &[x, rows])?;
    let x = b.norm("final_norm", x, "model.norm.weight", d, config.rms_norm_eps)?;
    let head = if tied { embedding } else { b.weight("lm_head.weight", &[config.vocab, d]) };
    let logits = b.op("logits", Linear {}, &[x, head])?;
    b.graph.set_outputs(vec![logits]);
    Ok(b.graph)
}

/// Adds nodes with readable names.
struct Builder {
    graph: Graph,
    /// Before every node's name.
    prefix: String,
}

impl Builder {
    fn op(&mut self, name: &str, op: impl Into<OpKind>, inputs: &[ValueId]) -> Result<ValueId> {
        let name = format!("{}{name}", self.prefix);
        let node = self.graph.add_named(op, inputs, Some(&name))?;
        Ok(ValueId { node, slot: 0 })
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let ty = TensorType::f32(shape.iter().map(|n| Dim::Fixed(*n)));
        self.graph.add_weight(&WeightName::from(name), ty)
    }

    fn norm(&mut self, name: &str, x: ValueId, weight: &str, width: usize, eps: f64) -> Result<ValueId> {
        let g = self.weight(weight, &[width]);
        self.op(name, RmsNorm { eps }, &[x, g])
    }

    /// `stem` is the weight's name without `.weight` or `.bias`; `shape` is `[N, K]`.
    fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        stem: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<ValueId> {
        let mut inputs = vec![x, self.weight(&format!("{stem}.weight"), &shape)];
        if bias {
            inputs.push(self.weight(&format!("{stem}.bias"), &shape[..1]));
        }
        self.op(name, Linear {}, &inputs)
    }
}
