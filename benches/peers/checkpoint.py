"""Checkpoints between containers, with numpy and the `gguf` package alone.

`folder_from_gguf`: a Llama-architecture GGUF becomes a Hugging Face folder (f16 safetensors, `config.json`,
`tokenizer.json`), which OpenVINO's exporter and `attar compile` read.
`gguf_from_folder`: such a folder becomes an f16 GGUF, with the tokenizer of another GGUF.

GGUF keeps the rows of `q` and `k` in the order of interleaved rotation, Hugging Face in that of halves.
"""

import argparse
import json
import struct
from pathlib import Path

import gguf
import numpy as np

# GGUF name of a block's tensor: (Hugging Face name, heads whose rows are permuted)
BLOCK = {
    "attn_norm": ("input_layernorm", None),
    "attn_q": ("self_attn.q_proj", "num_attention_heads"),
    "attn_k": ("self_attn.k_proj", "num_key_value_heads"),
    "attn_v": ("self_attn.v_proj", None),
    "attn_output": ("self_attn.o_proj", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "ffn_gate": ("mlp.gate_proj", None),
    "ffn_up": ("mlp.up_proj", None),
    "ffn_down": ("mlp.down_proj", None),
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def names(layers):
    """(GGUF name, Hugging Face name, key of the head count or None) of every tensor a Llama may have."""
    pairs = [(f"{g}.weight", f"{h}.weight", None) for g, h in WHOLE.items()]
    for layer in range(layers):
        for ours, (theirs, heads) in BLOCK.items():
            pairs.append((f"blk.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight", heads))
    return pairs


def interleaved(w, heads):
    """Rows in the order of halves to the order of interleaved rotation."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def halves(w, heads):
    """The inverse of `interleaved`."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def bf16_bits(x):
    """f32 to bf16, to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, dtype):
    """`tensors`: list of (name, shape, function that gives the f32 values in chunks of rows)."""
    convert = {"F16": lambda x: x.astype(np.float16), "BF16": bf16_bits}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for name, shape, make in tensors:
            rows = 0
            for values in make():
                f.write(convert(values).tobytes())
                rows += len(values)
            assert rows == shape[0], (name, rows, shape)
    part.rename(path)


def read_safetensors(path):
    """Name to f32 array, made when asked for."""
    data = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    body = data[8 + length :]

    def array(entry):
        begin, end = entry["data_offsets"]
        raw = body[begin:end]
        if entry["dtype"] == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"F16": np.float16, "F32": np.float32}[entry["dtype"]]).astype(np.float32)
        return values.reshape(entry["shape"])

    return {name: (lambda e=entry: array(e)) for name, entry in header.items() if name != "__metadata__"}


def fields(reader):
    return {key: field.contents() for key, field in reader.fields.items()}


def write_tokenizer(meta, folder):
    """`tokenizer.json` and its config from the metadata of a GGUF with SmolLM's byte-level BPE."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit("only SmolLM's tokenizer can be written; this GGUF has another")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    special = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **added} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def folder_from_gguf(path, folder):
    reader = gguf.GGUFReader(path)
    meta = fields(reader)
    if meta["general.architecture"] != "llama":
        raise SystemExit(f"{path}: architecture {meta['general.architecture']}, expected llama")
    present = {tensor.name: tensor for tensor in reader.tensors}
    heads = meta["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": "output.weight" not in present,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }

    def make(tensor, key):
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        yield values if key is None else halves(values, config[key])

    tensors, unknown = [], set(present)
    for theirs, ours, key in names(config["num_hidden_layers"]):
        if theirs in present:
            tensor = present[theirs]
            unknown.discard(theirs)
            shape = [int(d) for d in reversed(tensor.shape)]
            tensors.append((ours, shape, lambda t=tensor, k=key: make(t, k)))
    if unknown:
        raise SystemExit(f"{path}: tensors nobody knows: {sorted(unknown)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(meta, folder)
    write_safetensors(folder / "model.safetensors", tensors, "F16")


def llama3_factors(config):
    """What llama.cpp divides each frequency by; the formula is transformers' `rope_type` `llama3`."""
    scaling = config["rope_scaling"]
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    dim = config["head_dim"]
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = (context / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, factor, blended))
    return factors.astype(np.float32)


def add_shape(writer, config):
    """What a GGUF says of the shape of a Llama with that `config.json`."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def gguf_from_folder(folder, tokenizer, path):
    """`tokenizer`: a GGUF whose tokens are taken; rows of the embedding beyond them get unused tokens."""
    config = json.loads((folder / "config.json").read_text())
    # transformers 5 writes both of what used to be `rope_theta` and `rope_scaling` here.
    if rope := config.get("rope_parameters"):
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    meta = fields(gguf.GGUFReader(tokenizer))
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_name(folder.name)
    add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens, types = list(meta["tokenizer.ggml.tokens"]), list(meta["tokenizer.ggml.token_type"])
    extra = config["vocab_size"] - len(tokens)
    tokens += [f"<|unused_{i}|>" for i in range(extra)]
    types += [gguf.TokenType.UNUSED] * extra
    writer.add_tokenizer_model(meta["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(meta["tokenizer.ggml.pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(meta["tokenizer.ggml.merges"])
    writer.add_bos_token_id(meta["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(meta["tokenizer.ggml.eos_token_id"])
    if config.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    tensors = read_safetensors(folder / "model.safetensors")
    order = [n for n in names(config["num_hidden_layers"]) if n[1] in tensors]
    # Shapes come first, so that one tensor is in memory at a time.
    for theirs, ours, _ in order:
        values = tensors[ours]()
        kind = np.float32 if values.ndim == 1 else np.float16
        writer.add_tensor_info(theirs, values.shape, np.dtype(kind), values.size * np.dtype(kind).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if config.get("rope_scaling"):
        writer.write_tensor_data(llama3_factors(config))
    for theirs, ours, key in order:
        values = tensors[ours]()
        if key is not None:
            values = interleaved(values, config[key])
        writer.write_tensor_data(np.ascontiguousarray(values, np.float32 if values.ndim == 1 else np.float16))
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    folder = commands.add_parser("folder", help="GGUF to Hugging Face folder")
    folder.add_argument("gguf", type=Path)
    folder.add_argument("out", type=Path)
    file = commands.add_parser("gguf", help="Hugging Face folder to f16 GGUF")
    file.add_argument("folder", type=Path)
    file.add_argument("tokenizer", type=Path, help="a GGUF whose tokenizer is taken")
    file.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "folder":
        folder_from_gguf(options.gguf, options.out)
    else:
        gguf_from_folder(options.folder, options.tokenizer, options.out)


if __name__ == "__main__":
    main()
