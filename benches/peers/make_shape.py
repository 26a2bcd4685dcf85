#!/usr/bin/env python3
"""Writes a checkpoint with the exact shape of a published model and random weights: for speed, not for sense.

The shapes are `llama-3.2-1b` (1.236e9 weights, 2.5 GB of bf16 safetensors) and `qwen3-0.6b` (0.596e9, 1.2 GB), both with
tied embeddings. Scales are those of a trained model's order: activations stay near one through all layers. The same seed
gives the same bytes. The tokenizer is that of a GGUF of SmolLM2; rows of the embedding beyond its tokens are never asked for.

Needs numpy and gguf (PyPI); holds one chunk of rows in memory.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

import checkpoint

SHAPES = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}
ROWS = 4096


def shapes(c):
    """(name, shape, standard deviation; `None` for gains, which lie around one)."""
    d, f, width = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
    # What is added to the residual shrinks with depth, as initialisations of trained models have it.
    out = (2 * c["num_hidden_layers"]) ** -0.5
    yield "model.embed_tokens.weight", (c["vocab_size"], d), 0.02
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        yield f"{p}.input_layernorm.weight", (d,), None
        yield f"{p}.self_attn.q_proj.weight", (q, d), d**-0.5
        yield f"{p}.self_attn.k_proj.weight", (kv, d), d**-0.5
        yield f"{p}.self_attn.v_proj.weight", (kv, d), d**-0.5
        yield f"{p}.self_attn.o_proj.weight", (d, q), out * q**-0.5
        if c["model_type"] == "qwen3":
            yield f"{p}.self_attn.q_norm.weight", (width,), None
            yield f"{p}.self_attn.k_norm.weight", (width,), None
        yield f"{p}.post_attention_layernorm.weight", (d,), None
        yield f"{p}.mlp.gate_proj.weight", (f, d), d**-0.5
        yield f"{p}.mlp.up_proj.weight", (f, d), d**-0.5
        yield f"{p}.mlp.down_proj.weight", (d, f), out * f**-0.5
    yield "model.norm.weight", (d,), None


def chunks(seed, index, shape, deviation):
    """The tensor, some rows at a time."""
    random = np.random.Generator(np.random.SFC64([seed, index]))
    for first in range(0, shape[0], ROWS):
        part = (min(ROWS, shape[0] - first), *shape[1:])
        values = random.standard_normal(part, np.float32)
        yield 1 + 0.1 * values if deviation is None else values * np.float32(deviation)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="GGUF of SmolLM2 whose tokenizer is taken")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    meta = checkpoint.fields(gguf.GGUFReader(options.tokenizer))
    config = SHAPES[options.shape] | {key: meta[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    checkpoint.write_tokenizer(meta, options.out)
    tensors = [
        (name, shape, lambda i=index, s=shape, d=deviation: chunks(options.seed, i, s, d))
        for index, (name, shape, deviation) in enumerate(shapes(config))
    ]
    checkpoint.write_safetensors(options.out / "model.safetensors", tensors, "BF16")


if __name__ == "__main__":
    main()
