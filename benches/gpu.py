#!/usr/bin/env python3
"""What benches/gpu.sh runs: verifies and times CUDA kernels on models with random weights, beside PyTorch.

Prints one table per shape, medians in milliseconds per step, and what they are of the limits that are measured first: bytes
per second of a large copy within the GPU's memory, and operations per second of a large product in bf16 (both with torch).
Beside them stand PyTorch's steps in bf16, and llama.cpp's in Q4_0 where a `llama-batched-bench` with CUDA is there.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
}


def shape(hidden, ffn, layers, heads, kv_heads, vocab, tied, theta):
    return COMMON | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
    }


SHAPES = {
    "smollm2": shape(576, 1536, 30, 9, 3, 49152, True, 100000.0),
    "1b": shape(2048, 8192, 16, 32, 8, 128256, True, 500000.0),
    "8b": shape(4096, 14336, 32, 32, 8, 128256, False, 500000.0),
}
# Rounds to the nearest codes: weights are random, so there is nothing to search for.
RECIPE = """
[[pass]]
name = "quantize-rtn"
format = "n4"
search = false
tensors = ["model.layers.*"]
[[pass]]
name = "quantize-rtn"
format = "w8"
exclude = ["model.layers.*"]
"""
BATCHES = (1, 8, 16, 32, 128)
CONTEXTS = (128, 4096)
PROMPT = 2048
# Largest difference of a logit between GPU and CPU, in spreads of the logits: rounding to bf16 in a prompt's products.
TOLERANCE = 0.15


def tensors(c):
    d, f, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], d), 0.02
    out = (2 * c["num_hidden_layers"]) ** -0.5
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        yield f"{p}.input_layernorm.weight", (d,), None
        yield f"{p}.self_attn.q_proj.weight", (d, d), d**-0.5
        yield f"{p}.self_attn.k_proj.weight", (kv, d), d**-0.5
        yield f"{p}.self_attn.v_proj.weight", (kv, d), d**-0.5
        yield f"{p}.self_attn.o_proj.weight", (d, d), out * d**-0.5
        yield f"{p}.post_attention_layernorm.weight", (d,), None
        yield f"{p}.mlp.gate_proj.weight", (f, d), d**-0.5
        yield f"{p}.mlp.up_proj.weight", (f, d), d**-0.5
        yield f"{p}.mlp.down_proj.weight", (d, f), out * f**-0.5
    yield "model.norm.weight", (d,), None
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], d), d**-0.5


def write_checkpoint(folder, config):
    """bf16 safetensors; large matrices repeat one block of random numbers, whose length no row divides."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = Path("tests/data/tiny/smollm2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    header, offset = {}, 0
    for name, dims, _ in tensors(config):
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.SFC64(1))
    block = random.standard_normal((1 << 22) - 3, np.float32)
    blocks = {}
    with open(folder / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (_, dims, deviation) in enumerate(tensors(config)):
            if deviation not in blocks:
                values = 1 + 0.1 * block if deviation is None else block * np.float32(deviation)
                blocks[deviation] = memoryview((values.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)).cast("B")
            left, start = 2 * int(np.prod(dims)), 2 * (index * 7919 % (1 << 20))
            while left > 0:
                left -= file.write(blocks[deviation][start : start + left])
                start = 0


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def verify(attar, model):
    """Logits of the GPU and of the CPU after a short prompt, which few rows serve, and after a long one."""
    short = "The quick brown fox jumps over"
    ok = True
    for prompt in (short, " ".join(f"{short} the lazy dog for the {n}th time." for n in range(12))):
        top = {}
        for device in ("cpu", "cuda:0"):
            said = run(attar, "run", model, "--prompt", prompt, "--max-tokens", "8", "--top-logits", "20", "--context",
                       "2048", "--device", device, "--json")
            top[device] = json.loads(said)
        a, b = (dict(map(tuple, top[d]["top_logits"])) for d in ("cpu", "cuda:0"))
        shared = sorted(set(a) & set(b))
        spread = max(a.values()) - min(a.values())
        worst = max((abs(a[i] - b[i]) for i in shared), default=float("inf"))
        good = len(shared) >= 15 and worst <= TOLERANCE * max(spread, 1.0)
        print(f"  verified: {len(shared)} of 20 likeliest tokens are the CPU's, logits differ by {worst:.3f} at most"
              f" (spread {spread:.2f}){'' if good else ': TOO FAR'}", flush=True)
        ok &= good
    return ok


def limits(torch):
    """Bytes per second of a copy, read and written counted; operations per second of a bf16 product."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy, product = timed(torch, lambda: y.copy_(x)), timed(torch, lambda: a @ a)
    return 2 * x.numel() / copy, 2 * 8192**3 / product


def timed(torch, work, repetitions=20):
    for _ in range(3):
        work()
    samples = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def bench(attar, model, *arguments):
    said = run(attar, "bench", model, "--device", "cuda:0", "--repetitions", "3", "--json", *arguments)
    return json.loads(said)["tests"]


def torch_steps(torch, config, deadline):
    """Milliseconds of a step in bf16, by batch and context, as far as time allows: transformers with a static cache, decoder
    layers compiled, the step replayed as a CUDA graph."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    torch.set_default_dtype(torch.float32)
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    out = {}
    for context in CONTEXTS:
        for batch in BATCHES:
            if time.monotonic() > deadline:
                return out
            # Every replay goes one place further.
            cache = StaticCache(config=model.config, max_cache_len=context + 64)
            ids = torch.ones(batch, 1, dtype=torch.long, device="cuda")
            where = torch.full((batch, 1), context, dtype=torch.long, device="cuda")

            def step():
                with torch.no_grad():
                    return model(ids, position_ids=where, past_key_values=cache, use_cache=True).logits

            try:
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step()
                torch.cuda.synchronize()
                work = step
                try:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        step()
                    work = graph.replay
                except RuntimeError as problem:
                    print(f"  torch, batch {batch}, context {context}: without a graph ({str(problem).splitlines()[0]})")
                out[batch, context] = timed(torch, work) * 1e3
            except (torch.cuda.OutOfMemoryError, RuntimeError, TypeError, ValueError) as problem:
                print(f"  torch, batch {batch}, context {context}: {str(problem).splitlines()[0]}")
    return out


def table(rows):
    print(f"  {'batch':>5} {'context':>7} {'ms/step':>9} {'of copy':>8} {'torch bf16 ms':>14} {'llama.cpp ms':>13}")
    for row in rows:
        cells = [f"{row['batch']:>5} {row['context']:>7} {row['ms']:>9.3f}"]
        for key, style, width in (("of_copy", ".0%", 8), ("torch_ms", ".3f", 14), ("llama_cpp_ms", ".3f", 13)):
            cells.append(f"{format(row[key], style) if row[key] else '-':>{width}}")
        print("  " + " ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attar", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shapes", default="smollm2,1b,8b")
    parser.add_argument("--target", default="native,cuda:sm_90a", help="what to make code for, as attar compile takes it")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing is timed but Attar")
    parser.add_argument("--llama-batched-bench", default=shutil.which("llama-batched-bench"), help="of a llama.cpp with CUDA")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    started, other = time.monotonic(), options.llama_batched_bench
    if other and not llama_cpp.has_cuda(other):
        print(f"{other} shows no GPU and is not timed")
        other = None
    elif not other:
        print("without llama-batched-bench: llama.cpp is not timed")
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        import torch

        copy, matrix = limits(torch)
        print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 product {matrix / 1e12:.0f} TFLOP/s")
    except ImportError as problem:
        torch, copy, matrix = None, None, None
        print(f"without PyTorch ({problem}): no limits, nothing to compare with")
    results, right = {"copy_bytes_per_second": copy, "matrix_flops": matrix}, True
    for place, name in enumerate(shapes):
        config, folder = SHAPES[name], options.folder / name
        print(f"\n{name}: making the checkpoint and compiling it")
        write_checkpoint(folder, config)
        model = options.folder / f"{name}.attar"
        recipe = options.folder / "recipe.toml"
        recipe.write_text(RECIPE)
        run(options.attar, "compile", folder, "--recipe", recipe, "--no-certify", "--no-resume",
            "--target", options.target, "-o", model)
        shutil.rmtree(folder)
        right &= verify(options.attar, model)
        # Of the embedding a step reads one row, unless it is the head as well.
        read = [t for t in json.loads(run(options.attar, "inspect", model, "--json"))["tensors"]
                if config["tie_word_embeddings"] or "embed" not in t["name"]]
        weights = sum(t["bytes"] for t in read)
        rows = []
        for context in CONTEXTS:
            for batch in BATCHES:
                tests = bench(options.attar, model, "--prompt", 0, "--generate", 32, "--context", context, "--batch", batch)
                rows.append({"batch": batch, "context": context, "ms": tests[-1]["step_ms"]})
                print(f"    batch {batch}, context {context}: {tests[-1]['step_ms']:.3f} ms", flush=True)
        prompt = bench(options.attar, model, "--prompt", PROMPT, "--generate", 0)[0]["step_ms"]
        # Of the time, each shape gets its share, and of that each of two peers.
        share = 60 * options.minutes / len(shapes)
        until = started + share * (place + 1)
        theirs = {}
        if torch:
            try:
                theirs = torch_steps(torch, config, until - (share / 2 if other else 0))
            except Exception as problem:  # What is timed beside must not cost what was timed already.
                print(f"  torch: {problem}")
            torch.cuda.empty_cache()
        others, other_prompt = {}, None
        if other and time.monotonic() < until:
            path = options.folder / f"{name}.gguf"
            try:
                llama_cpp.write_gguf(path, config, tensors(config))
                others, other_prompt = llama_cpp.steps(other, path, CONTEXTS, BATCHES, PROMPT, lambda: until - time.monotonic(),
                                                       ("-ngl", 99, "-fa", "on"))
            except Exception as problem:  # As above.
                print(f"  llama.cpp: {problem}")
            path.unlink(missing_ok=True)
        for row in rows:
            case = row["batch"], row["context"]
            row["of_copy"] = weights / (row["ms"] / 1e3) / copy if copy else None
            row["torch_ms"], row["llama_cpp_ms"] = theirs.get(case), others.get(case)
        table(rows)
        # The head is multiplied with the last row only.
        matrices = sum(int(np.prod(d)) for n, d, _ in tensors(config) if len(d) == 2 and ".layers." in n)
        rate = 2 * matrices * PROMPT / (prompt / 1e3)
        fraction = f", {rate / matrix:.0%} of the product's rate" if matrix else ""
        beside = f", llama.cpp {other_prompt:.1f} ms" if other_prompt else ""
        print(f"  prompt of {PROMPT}: {prompt:.1f} ms, {rate / 1e12:.0f} TFLOP/s{fraction}{beside}")
        results[name] = {"weight_bytes": weights, "steps": rows, "prompt_ms": prompt, "prompt_flops": rate,
                         "llama_cpp_prompt_ms": other_prompt}
        model.unlink()
        (options.folder / "results.json").write_text(json.dumps(results, indent=1))
    if not right:
        sys.exit("results differ from the CPU's by more than rounding explains")


if __name__ == "__main__":
    main()
