#!/usr/bin/env python3
"""Perplexity of a GGUF model by llama.cpp in f32, with the protocol of llama-perplexity; cross-checked by transformers.

usage: make_perplexity.py MODEL.gguf TEXT.txt OUT.json [N_WINDOWS [N_CROSS_CHECKED]]     (defaults 100 and 10)
needs: llama-cpp-python gguf numpy torch transformers accelerate (PyPI)

Protocol (llama.cpp, tools/perplexity/perplexity.cpp): one trailing newline is cut from the text; the whole text is
tokenized once (special tokens added, none parsed); window i is tokens[512 i .. 512 (i+1)], positions from 0, empty
cache; if the vocabulary says add_bos, the first token of every window is replaced by BOS; the logits at positions
256 ..= 510 predict tokens 257 ..= 511, 255 scores a window; PPL = exp(sum of nll / number of scores).

llama.cpp multiplies quantized weights with activations rounded to int8, so the weights are first written as an F32
GGUF (beside OUT, removed at the end), and the KV cache is f32, flash attention off: the number is that of the
weights alone.
"""
import ctypes
import hashlib
import json
import math
import pathlib
import sys
import time

import gguf
import llama_cpp
import numpy as np

N_CTX = 512
FIRST = N_CTX // 2
THREADS = 2


def write_f32(src, dst):
    """The same model, every tensor dequantized by the gguf package."""
    reader = gguf.GGUFReader(src)
    writer = gguf.GGUFWriter(dst, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for t in reader.tensors:
        writer.add_tensor(t.name, np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def nll(logits, targets):
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return lse - logits[np.arange(len(targets)), targets]


@llama_cpp.llama_log_callback
def silent(level, text, user_data):
    pass


class Llama:
    def __init__(self, path):
        llama_cpp.llama_log_set(silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = N_CTX
        params.n_threads = params.n_threads_batch = THREADS
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)

    def tokenize(self, text):
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), True, False)
        assert n >= 0
        return list(out[:n])

    def window(self, tokens):
        """Logits of positions FIRST.. as [n, vocabulary]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        batch = llama_cpp.llama_batch_init(N_CTX, 0, 1)
        batch.n_tokens = N_CTX
        for i, t in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = t, i, 1, i >= FIRST
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(self.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        n = llama_cpp.llama_vocab_n_tokens(self.vocab)
        p = llama_cpp.llama_get_logits_ith(self.ctx, FIRST)
        return np.ctypeslib.as_array(ctypes.cast(p, ctypes.POINTER(ctypes.c_float)), shape=(N_CTX - FIRST, n))


def main():
    src, text_path, out = map(pathlib.Path, sys.argv[1:4])
    n_windows = int(sys.argv[4]) if len(sys.argv) > 4 else 100
    n_cross = int(sys.argv[5]) if len(sys.argv) > 5 else 10
    raw = text_path.read_bytes()
    text = raw.decode().removesuffix("\n")
    f32 = out.with_suffix(".f32.gguf")
    f32.unlink(missing_ok=True)
    write_f32(src, f32)
    llama = Llama(f32)
    add_bos = llama_cpp.llama_vocab_get_add_bos(llama.vocab)
    tokens = llama.tokenize(text)
    windows = [tokens[i * N_CTX : (i + 1) * N_CTX] for i in range(min(n_windows, len(tokens) // N_CTX))]
    if add_bos:
        for w in windows:
            w[0] = llama_cpp.llama_vocab_bos(llama.vocab)
    nlls, started = [], time.time()
    for i, w in enumerate(windows):
        nlls.append(nll(llama.window(w)[:-1], np.array(w[FIRST + 1 :])))
        print(f"[{i + 1}] {math.exp(np.concatenate(nlls).mean()):.4f}  {time.time() - started:.0f} s", flush=True)
    f32.unlink()

    import torch
    import transformers

    torch.set_num_threads(1)
    tok = transformers.AutoTokenizer.from_pretrained(src.parent, gguf_file=src.name)
    other = tok(text, add_special_tokens=False)["input_ids"]
    differs = next((i for i, (a, b) in enumerate(zip(tokens, other)) if a != b), None)
    model = transformers.AutoModelForCausalLM.from_pretrained(src.parent, gguf_file=src.name, dtype=torch.float32).eval()
    cross = []
    for i, w in enumerate(windows[:n_cross]):
        with torch.no_grad():
            logits = model(torch.tensor([w])).logits[0, FIRST:-1].numpy()
        cross.append(nll(logits, np.array(w[FIRST + 1 :])))
        print(f"transformers [{i + 1}] {math.exp(np.concatenate(cross).mean()):.4f}  window differs by {abs(cross[i] - nlls[i]).max():.2g}", flush=True)

    def ppl(values):
        return round(math.exp(np.concatenate(values).mean()), 6)

    every = np.concatenate(nlls)
    prefixes = sorted({n for n in (1, 2, 4, 10, 20, 50, len(nlls)) if n <= len(nlls)})
    result = dict(
        version=1,
        made_by=f"make_perplexity.py, llama-cpp-python {llama_cpp.__version__}, gguf weights as F32, KV f32, no flash attention",
        model=dict(file=src.name, bytes=src.stat().st_size, sha256=hashlib.sha256(src.read_bytes()).hexdigest()),
        text=dict(name="WikiText-2 validation, tokenized form (not stored here)", bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()),
        protocol=dict(n_ctx=N_CTX, first=FIRST, scores_per_window=N_CTX - 1 - FIRST, add_bos=bool(add_bos), trailing_newline_cut=True),
        tokens=dict(
            count=len(tokens),
            first=tokens[:16],
            sha256_u32le=hashlib.sha256(np.array(tokens, dtype="<u4").tobytes()).hexdigest(),
            # transformers' GGUF loader forgets that this family isolates digits (½ counts as one), the checkpoint does not.
            first_difference_to_transformers_gguf_loader=differs,
        ),
        ppl={str(n): ppl(nlls[:n]) for n in prefixes},
        ppl_standard_error=round(float(every.std() / math.sqrt(len(every) - 1) * math.exp(every.mean())), 4),
        window_mean_nll=[round(float(v.mean()), 6) for v in nlls],
        cross_check=dict(
            made_by=f"transformers {transformers.__version__}, torch {torch.__version__}, f32",
            ppl={str(n): ppl(cross[:n]) for n in prefixes if n <= len(cross)},
            largest_token_nll_difference=float(f"{max(abs(a - b).max() for a, b in zip(cross, nlls)):.2g}"),
        ),
    )
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items()]
    out.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
