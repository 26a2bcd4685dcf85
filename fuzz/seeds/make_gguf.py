#!/usr/bin/env python3
"""Small seeds of the fuzz target gguf_load: one layer of width 32, eight tokens. usage: make_gguf.py OUT_DIR

needs: gguf numpy (PyPI). The goldens under tests/data/gguf are seeds too, but their size makes fuzzing slow.
"""
import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T


def make(path, arch, spm, kind):
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(1)
    w.add_context_length(16)
    w.add_embedding_length(32)
    w.add_feed_forward_length(32)
    w.add_head_count(2)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(100.0)
    tokens = ["<unk>", "<s>", "</s>", "<0x00>", "a", "b", "ab", "abb"]
    w.add_tokenizer_model("llama" if spm else "gpt2")
    w.add_token_list(tokens)
    w.add_token_types([2, 3, 4, 6 if spm else 1, 1, 1, 1, 1])
    if spm:
        w.add_token_scores([0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -1.0, -2.0])
    else:
        w.add_tokenizer_pre("smollm")
        w.add_token_merges(["a b", "ab b"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    shapes = {"token_embd": (8, 32), "output_norm": (32,)}
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    if arch == "qwen3":
        block |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    shapes |= {f"blk.0.{k}": v for k, v in block.items()}
    if arch == "llama":
        shapes["rope_freqs"] = (8,)
    for name, shape in shapes.items():
        values = np.full(shape, 2 if name == "rope_freqs" else 1, dtype=np.float32)
        t = kind if len(shape) == 2 else T.F32
        w.add_tensor(f"{name}.weight", gguf.quants.quantize(values, t), raw_dtype=t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
make(out / "llama.gguf", "llama", True, T.Q4_0)
make(out / "qwen3.gguf", "qwen3", False, T.Q4_1)
