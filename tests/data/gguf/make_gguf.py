#!/usr/bin/env python3
"""GGUF truth: block formats, small complete models, a sentencepiece vocabulary. Written by the gguf package.

usage: make_gguf.py TINY_DIR OUT_DIR        (TINY_DIR: the checkpoints made by ../tiny/make_tiny.py)
needs: torch transformers tokenizers gguf numpy sentencepiece llama-cpp-python (PyPI)

types.json   per ggml type: four blocks (64 values for the float types) of random bits under finite scales, and the
             f32 values the gguf package reads out of them. Both as hex, f32 little-endian. The first block of a type
             with f16 scales has a subnormal one, the second a negative one; MXFP4 exponents are 0, 1, 127 and 140.
*.gguf       models of the tiny checkpoints, mixed types per tensor. As in llama.cpp's converter, q and k rows of
             architecture `llama` are interleaved for its rotation of neighbours, those of `qwen2`, `qwen3` are not.
             llama2.gguf carries one metadata entry of each GGUF value type (`test.*`), llama2-v2.gguf is the same
             file with version 2, qwen2.gguf is aligned to 64 bytes and has a chat template.
*.golden.json  as in ../tiny/make_tiny.py, computed by transformers from the dequantized weights, plus `tensors` (type
             per tensor) and `metadata` (the `test.*` entries). `llama_cpp_error` is the largest |logit| difference to
             llama.cpp on the same weights as F32. `encodings` are those of a checkpoint of the family; `llama_cpp_ids`
             where llama.cpp differs (it does not normalize to NFC; nothing in a GGUF says that Qwen does).
spm.gguf     vocabulary only, `tokenizer.ggml.model` = llama: scores, byte tokens, a user-defined and control tokens.
spm.golden.json  `encodings`: ids by the sentencepiece package (no BOS), `decoded` where decoding does not restore
             the text; `llama_cpp_ids` where llama.cpp differs (it prefixes a space after every special token).
             `special`: by llama.cpp, BOS added and special tokens recognised in the text.
"""
import ctypes
import io
import json
import pathlib
import sys
import tempfile
from importlib.metadata import version

import gguf
import llama_cpp
import numpy as np
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as T

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tiny"), str(HERE.parent / "golden")]
from make_perplexity import silent, write_f32  # noqa: E402
from make_tiny import CHATML, MESSAGES, STRINGS, TEXT, golden, make_tokenizer, write_json  # noqa: E402

TOOLS = f"gguf {version('gguf')}, numpy {np.__version__}"

# Offsets of the f16 scales in a block.
F16_SCALES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.IQ4_NL: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.MXFP4: [],
}  # fmt: skip
N_BLOCKS = 4


def random_blocks(kind, rng):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (N_BLOCKS, size), dtype=np.uint8)
    for at in F16_SCALES[kind]:
        scales = np.float16(rng.uniform(0.01, 2.0, N_BLOCKS))
        scales[0] = np.float16(rng.uniform(1e-5, 5e-5))
        scales[1] = -scales[1]
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(N_BLOCKS, 2)
    if kind == T.MXFP4:
        blocks[:, 0] = [0, 1, 127, 140]
    return blocks


def ggml_reads(kind, data, n):
    """What ggml's own C code makes of the same bytes."""
    library = ctypes.CDLL(str(next(pathlib.Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so"))))
    out = np.zeros(n, dtype=np.float32)
    name = {T.F16: "ggml_fp16_to_fp32_row", T.BF16: "ggml_bf16_to_fp32_row"}.get(kind, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    buffer = (ctypes.c_ubyte * len(data)).from_buffer_copy(data)
    getattr(library, name)(buffer, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(n))
    return out


def make_types(out):
    rng = np.random.default_rng(2024)
    rows = {}
    floats = np.float32(np.concatenate([rng.normal(size=56), [0.0, -0.0, 1.0, -2.5, 65504.0, 1e-7, 6e-5, -3.4e4]]))
    for kind in (T.F32, T.F16, T.BF16, *F16_SCALES):
        if kind == T.F32:
            data = floats.view(np.uint8)
        elif kind == T.F16:
            data = floats.astype(np.float16).view(np.uint8)
        elif kind == T.BF16:
            data = gguf.quants.quantize(floats, kind).view(np.uint8)
        else:
            data = random_blocks(kind, rng).reshape(-1)
        typed = data.view({T.F32: np.float32, T.F16: np.float16}.get(kind, np.uint8))
        values = np.ascontiguousarray(gguf.quants.dequantize(typed, kind).reshape(-1), dtype="<f4")
        assert np.isfinite(values).all(), kind
        if kind != T.F32:
            c = ggml_reads(kind, data.tobytes(), values.size)
            # The C compiler may contract d * q - m into one rounding, so a last bit is allowed to differ.
            worst = np.abs(c - values) / np.maximum(np.abs(values), np.abs(values).max() * 1e-3)
            assert worst.max() < 1e-5, (kind, worst.max())
            exact = bool((c.view(np.uint32) == values.view(np.uint32)).all())
            print(f"{kind.name}: ggml reads {'the same bits' if exact else f'the same up to {worst.max():.1g}'}")
        rows[kind.name] = dict(
            ggml_id=int(kind),
            block_values=gguf.GGML_QUANT_SIZES[kind][0],
            block_bytes=gguf.GGML_QUANT_SIZES[kind][1],
            n_values=int(values.size),
            bytes_hex=data.tobytes().hex(),
            f32_hex=values.tobytes().hex(),
        )
    write_json(out / "types.json", dict(version=1, made_by=f"make_gguf.py, {TOOLS}", types=rows))


ROLES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
TYPES = {
    "llama2": dict(token_embd=T.Q8_0, output=T.F16, attn_q=T.Q4_0, attn_k=T.Q8_0, attn_v=T.F16, attn_output=T.Q4_0, ffn_gate=T.Q4_0, ffn_up=T.Q8_0, ffn_down=T.Q4_1),
    "qwen2": dict(token_embd=T.F16, attn_q=T.Q8_0, attn_k=T.Q5_0, attn_v=T.Q5_1, attn_output=T.Q8_0, ffn_gate=T.Q4_0, ffn_up=T.Q4_1, ffn_down=T.Q8_0),
    "qwen3": dict(token_embd=T.Q8_0, attn_q=T.BF16, attn_k=T.F16, attn_v=T.F32, attn_output=T.Q5_0, ffn_gate=T.MXFP4, ffn_up=T.Q5_1, ffn_down=T.Q4_0),
}
EXTRA = [
    ("test.u8", 200, "UINT8"), ("test.i8", -100, "INT8"), ("test.u16", 60000, "UINT16"), ("test.i16", -30000, "INT16"),
    ("test.u32", 4000000000, "UINT32"), ("test.i32", -2000000000, "INT32"), ("test.u64", 2**63 + 5, "UINT64"), ("test.i64", -(2**62), "INT64"),
    ("test.f32", 0.15625, "FLOAT32"), ("test.f64", 0.1, "FLOAT64"), ("test.bool", True, "BOOL"), ("test.string", "naïve ✓", "STRING"),
    ("test.u8s", [0, 1, 255], "UINT8"), ("test.i64s", [-1, 2**40], "INT64"), ("test.f64s", [0.5, -1e300], "FLOAT64"),
    ("test.bools", [True, False, True], "BOOL"), ("test.strings", ["", "a", "日本"], "STRING"),
]  # fmt: skip


def gguf_name(name):
    if name in TOP:
        return TOP[name]
    _, _, block, rest = name.split(".", 3)
    role, kind = rest.rsplit(".", 1)
    return f"blk.{block}.{ROLES[role]}.{kind}"


def permute(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def add_tokenizer(writer, tok, specials, pre, chat):
    vocab = json.loads(tok.to_str())["model"]
    tokens = [t for t, _ in sorted(vocab["vocab"].items(), key=lambda e: e[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in specials else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(m) for m in vocab["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if chat:
        writer.add_chat_template(CHATML)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(path, ids):
    """Of all positions, from an F32 copy of the file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "f32.gguf"
        write_f32(path, copy)
        llama = llama_cpp.Llama(str(copy), n_ctx=64, n_threads=1, logits_all=True, flash_attn=False, type_k=0, type_v=0, verbose=False)
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])


def make_model(tiny, out, name):
    family, pre = ("smollm", "smollm") if name == "llama2" else ("qwen", "qwen2")
    arch = "llama" if name == "llama2" else name
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / name, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    tok, specials = make_tokenizer(family)
    path = out / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    if name == "qwen2":
        writer.add_custom_alignment(64)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(f"tiny {name}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if arch == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_quantization_version(2)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    add_tokenizer(writer, tok, specials, pre, chat=name == "qwen2")
    if name == "llama2":
        for key, value, kind in EXTRA:
            kind = gguf.GGUFValueType[kind]
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors, exact = {}, {}
    for key, w in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = gguf_name(key)
        role = target.split(".")[-2]
        turn = heads.get(role) if arch == "llama" else None
        w = w.numpy()
        if turn:
            w = permute(w, turn)
        kind = TYPES[name][role] if w.ndim == 2 else T.F32
        data = gguf.quants.quantize(np.ascontiguousarray(w), kind)
        writer.add_tensor(target, data, raw_dtype=kind)
        tensors[target] = kind.name
        back = gguf.quants.dequantize(data, kind).reshape(w.shape)
        exact[key] = torch.from_numpy(np.ascontiguousarray(unpermute(back, turn) if turn else back, dtype=np.float32))
    finish(writer)
    if config.tie_word_embeddings:
        exact["lm_head.weight"] = exact["model.embed_tokens.weight"]
    model.load_state_dict(exact)

    # The text is turned until no two candidates nearly tie anywhere.
    for cut in range(len(TEXT)):
        text = TEXT[cut:] + TEXT[:cut]
        ids = tok.encode(text).ids
        found = golden(model, ids)
        if found["margin"] > 0.03 and len(set(found["greedy"])) > 8:
            break
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    error = float(np.abs(logits - llama_cpp_logits(path, ids)).max())
    assert error < 1e-3, error
    encodings = [dict(text=s, ids=tok.encode(s).ids) for s in (t.replace("{SOT}", specials[1]).replace("{EOT}", specials[2]) for t in STRINGS)]
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for e in encodings:
        other = llama.tokenize(e["text"].encode(), add_bos=True, special=True)
        if other != e["ids"]:
            print(f"{name}: llama.cpp tokenizes {e['text']!r} differently")
            e["llama_cpp_ids"] = other
    made_by = f"make_gguf.py, {TOOLS}, transformers {transformers.__version__}, torch {torch.__version__}, llama-cpp-python {llama_cpp.__version__}"
    head = dict(version=1, made_by=made_by, text=text)
    tail = dict(llama_cpp_error=float(f"{error:.2g}"), tensors=tensors, encodings=encodings)
    if name == "llama2":
        tail["metadata"] = {key: value for key, value, _ in EXTRA}
        raw = bytearray(path.read_bytes())
        assert raw[4:8] == b"\x03\0\0\0"
        raw[4] = 2
        (out / "llama2-v2.gguf").write_bytes(raw)
        assert [t.name for t in gguf.GGUFReader(out / "llama2-v2.gguf").tensors] == list(tensors)
    if name == "qwen2":
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=CHATML)
        text = fast.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        tail["chat"] = dict(messages=MESSAGES, add_generation_prompt=True, text=text, ids=tok.encode(text).ids)
    write_json(out / f"{name}.golden.json", head | found | tail)
    print(f"{name}: {path.stat().st_size} bytes, {len(ids)} tokens, margin {found['margin']}, llama.cpp differs by {error:.2g}")


SPM_TEXT = """
The compiler reads a model and writes one file. The file holds weights, kernels and a tokenizer; nothing else is needed.
When the first token arrives, the engine looks for pages it already has, and the rest of the prompt is computed in chunks.
A token is a piece of a word, a whole word, a space and a word, or a single byte when there is no better piece.
She said that the weather in the north would be better than in the south, but they did not believe her at all.
There were three other people there: the teacher, the writer, and another one whose name nobody could remember.
In 1987 and 2024 there were 365 and 366 days; 3.14159 is not 22/7, and 10,000 is more than 9,999.
for i in range(10):
    if i % 2 == 0:
        print(i, "is even")
    else:
        return None
Le café est très près de la forêt où l'été n'a jamais été. Straße, größer, Übung. El niño comió piña.
Это простой текст для проверки. Это тест. 日本語のテスト。日本の本。 한국어 시험.
"""
SPM_STRINGS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "Hello, world!",
    "hello  world   again",
    "   leading and trailing   ",
    "the other weather there together",
    "The compiler writes one file.",
    "THE THEN thEn",
    "line one\nline two\r\n\tindented",
    "        if x:\n            return x\n",
    "0123456789 3.14159 10,000",
    "don't can't l'été",
    "café Übung naïve piñata cafe\u0301",
    "Это проверка текста",
    "日本語のテスト 日本の本 中文",
    "한국어 시험 안녕",
    "שלום مرحبا नमस्ते",
    "🙂🦀 👩‍👩‍👧 🏳️‍🌈",
    "a\u00a0b\u3000c\u200bd",
    "\u2581already marked\u2581\u2581",
    "<0x41> <unk> <s> </s>",
    "a<|tool|>b",
    "<|tool|> x <|tool|><|tool|>",
    "x = {\"k\": [1, 2, null]}; // §±µ",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "ththththe ererer ininin",
    "\x00\x01\x7f",
    "supercalifragilisticexpialidocious",
    "https://example.org/?q=a%20b&c=d",
]
SPM_SPECIAL = ["Hello", "", "<s>Hello</s>", "a</s>b", "a </s> b", "x<|tool|>the <s> other"]


def make_spm(out):
    image = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SPM_TEXT.strip("\n").split("\n") * 4),
        model_writer=image,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        user_defined_symbols=["<|tool|>"],
        num_threads=1,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=image.getvalue())
    pieces = range(sp.get_piece_size())
    T_ = gguf.TokenType

    def kind(i):
        if sp.is_unknown(i):
            return T_.UNKNOWN
        if sp.is_control(i):
            return T_.CONTROL
        if sp.is_byte(i):
            return T_.BYTE
        return T_.USER_DEFINED if sp.id_to_piece(i) == "<|tool|>" else T_.NORMAL

    path = out / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("sentencepiece vocabulary")
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length, writer.add_head_count):
        add(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(1)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([sp.id_to_piece(i) for i in pieces])
    writer.add_token_scores([sp.get_score(i) for i in pieces])
    writer.add_token_types([kind(i) for i in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    finish(writer)

    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    encodings = []
    for text in SPM_STRINGS:
        e = dict(text=text, ids=sp.encode(text))
        other = llama.tokenize(text.encode(), add_bos=False, special=False)
        if other != e["ids"]:
            print(f"spm: llama.cpp tokenizes {text!r} differently: {other} for {e['ids']}")
            e["llama_cpp_ids"] = other
        e["decoded"] = sp.decode(e["ids"])
        if e["decoded"] == text:
            del e["decoded"]
        encodings.append(e)
    special = [dict(text=s, ids=llama.tokenize(s.encode(), add_bos=True, special=True)) for s in SPM_SPECIAL]
    made_by = f"make_gguf.py, gguf {version('gguf')}, sentencepiece {sentencepiece.__version__}, llama-cpp-python {llama_cpp.__version__}"
    write_json(out / "spm.golden.json", dict(version=1, made_by=made_by, encodings=encodings, special=special))
    print(f"spm: {len(pieces)} pieces, {path.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    llama_cpp.llama_log_set(silent, None)
    tiny, out = map(pathlib.Path, sys.argv[1:3])
    make_types(out)
    make_spm(out)
    for name in TYPES:
        make_model(tiny, out, name)
