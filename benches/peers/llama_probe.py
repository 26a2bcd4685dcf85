"""Drives llama.cpp through its C API, as llama-bench does. Runs inside the environment that has llama-cpp-python.

`pp N`: one decode of N random tokens with n_batch = n_ubatch = 512. `tg N`: N tokens one at a time from an empty cache,
`tg N @ D`: behind D tokens that are already in the cache. Tokens are random and nothing is sampled, so no time goes into
sampling; logits of the last token are computed, as llama-bench has it. Prints one JSON object.

The other use is `quantize`: the library's own `llama_model_quantize` from an f16, bf16 or f32 GGUF.
"""

import argparse
import ctypes
import json
import random
import sys
import time

import llama_cpp

FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
# enum llama_flash_attn_type
FLASH = {"off": 0, "on": 1}
BATCH = 512


@llama_cpp.llama_log_callback
def only_errors(level, text, _):
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def quantize(source, target, file_type, requantize):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = requantize
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama_model_quantize failed: {source} to {file_type}")


class Bench:
    """One model with one context."""

    def __init__(self, model, threads, flash, context, seed):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH[flash]
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit(f"no context with flash attention {flash}")
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.random = random.Random(seed)

    def close(self):
        llama_cpp.llama_free(self.context)

    def decode(self, count):
        tokens = [self.random.randrange(self.n_vocab) for _ in range(count)]
        buffer = (llama_cpp.llama_token * count)(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(buffer, count)) != 0:
            raise SystemExit("llama_decode failed")

    def prompt(self, count):
        """Tokens per second of a prompt from an empty cache."""
        llama_cpp.llama_memory_clear(self.memory, False)
        start = time.perf_counter()
        for first in range(0, count, BATCH):
            self.decode(min(BATCH, count - first))
        llama_cpp.llama_synchronize(self.context)
        return count / (time.perf_counter() - start)

    def generate(self, count, depth):
        """Tokens per second behind `depth` tokens, which must be in the cache already."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1)
        start = time.perf_counter()
        for _ in range(count):
            self.decode(1)
            llama_cpp.llama_synchronize(self.context)
        return count / (time.perf_counter() - start)

    def samples(self, test, repetitions):
        """`repetitions` samples after one warm-up."""
        depth = test["depth"]
        if test["kind"] == "pp":
            runs = [self.prompt(test["tokens"]) for _ in range(repetitions + 1)]
        else:
            llama_cpp.llama_memory_clear(self.memory, False)
            if depth:
                self.prompt(depth)
            runs = [self.generate(test["tokens"], depth) for _ in range(repetitions + 1)]
        return runs[1:]


def measure(options):
    tests = json.loads(options.tests)
    start = time.perf_counter()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(options.model.encode(), params)
    if not model:
        raise SystemExit(f"cannot load {options.model}")
    load_seconds = time.perf_counter() - start
    results = []
    for flash in FLASH:
        for test in tests:
            if flash == "on" and options.flash == "off":
                continue
            context = -(-(test["tokens"] + test["depth"]) // 256) * 256
            bench = Bench(model, options.threads, flash, context, options.seed)
            samples = bench.samples(test, options.repetitions)
            bench.close()
            results.append({"test": test["name"], "variant": f"flash attention {flash}", "samples": samples})
    system = llama_cpp.llama_print_system_info().decode()
    return {"load_seconds": load_seconds, "system": system, "results": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    q = commands.add_parser("quantize", help="write a GGUF in another file type")
    q.add_argument("source")
    q.add_argument("target")
    q.add_argument("file_type", choices=FILE_TYPES)
    q.add_argument("--requantize", action="store_true", help="allow a source that is quantized already")
    m = commands.add_parser("measure", help="speed of one model")
    m.add_argument("model")
    m.add_argument("--tests", required=True, help="JSON: list of {name, kind: pp|tg, tokens, depth}")
    m.add_argument("--threads", type=int, required=True)
    m.add_argument("--repetitions", type=int, default=1)
    m.add_argument("--flash", choices=["both", "off"], default="both")
    m.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    llama_cpp.llama_log_set(only_errors, None)
    llama_cpp.llama_backend_init()
    if options.command == "quantize":
        quantize(options.source, options.target, options.file_type, options.requantize)
    else:
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
