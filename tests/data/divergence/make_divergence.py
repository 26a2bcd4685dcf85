#!/usr/bin/env python3
"""Two models' logits at 255 positions, and what llama.cpp and numpy say of them: the golden of our statistics.

usage: make_divergence.py OUT_DIR [LLAMA_CPP_SOURCE]
needs: numpy; for the llama.cpp part a C++ compiler as `c++` and a source tree of llama.cpp

Writes logits.bin, golden.json. logits.bin is u16, little-endian: logits of the reference [255, 64], those of the model
[255, 64], the target tokens [255]; a logit is its number / 4096 - 8. Without a source tree the figures of llama.cpp that
golden.json already holds stay.

llama-perplexity stores the reference's log-probabilities in 16 bits over the range of each row. Every row of ours
reaches from -8 to the largest number, so that range / 65535 is 1 / 4096 and nothing is lost: both programs see the same
logits. llama.cpp's own `kl_divergence` does the work. It is compiled out of tools/perplexity/perplexity.cpp, with the
functions of the library that it calls replaced by ones that hand it our logits.
"""
import hashlib
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

import numpy as np

N_CTX, VOCAB, SEED = 512, 64, 20250301
TOP = 65535 / 4096 - 8
SCORES = N_CTX - 1 - N_CTX // 2


def make_logits():
    rng = np.random.default_rng(SEED)
    base = rng.normal(0.0, 2.0, (SCORES, VOCAB))
    # A few favourites in each row, as language models have them; both ends of the range are reached.
    for row in base:
        favourites = rng.choice(VOCAB, rng.integers(2, 9), replace=False)
        row[favourites] = TOP - rng.exponential(1.5, len(favourites))
        row[row.argmin()], row[row.argmax()] = -8.0, TOP
    noise = rng.normal(0.0, 1.0, (SCORES, VOCAB)) * rng.exponential(0.25, (SCORES, 1))
    p = np.exp(base - base.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    targets = np.array([rng.choice(VOCAB, p=row) for row in p])

    def grid(x):
        return np.clip(np.round((x + 8) * 4096), 0, 65535).astype("<u2")

    # The model's logits lie a little lower, so that noise does not drive them out of the range.
    return grid(base), grid(0.9 * base + noise), targets.astype("<u2")


def by_numpy(q_base, q_model, targets):
    b, a = q_base / 4096.0 - 8, q_model / 4096.0 - 8
    n = len(targets)
    log_p = lambda x: x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
    lb, la = log_p(b), log_p(a)
    at = np.arange(n), targets.astype(int)
    nll, nll_b = -la[at], -lb[at]
    kld = (np.exp(lb) * (lb - la)).sum(1)
    dp = np.exp(-nll) - np.exp(-nll_b)
    error = lambda x: x.std(ddof=0) / np.sqrt(n - 1)
    ratio = nll.mean() - nll_b.mean()
    # The spread of the differences is what is left of both spreads and their covariance.
    ratio_error = error(nll - nll_b)
    same = (a.argmax(1) == b.argmax(1)).mean()
    rms = np.sqrt((dp**2).mean())
    return {
        "ppl": np.exp(nll.mean()), "ppl_error": np.exp(nll.mean()) * error(nll),
        "ppl_reference": np.exp(nll_b.mean()), "ppl_reference_error": np.exp(nll_b.mean()) * error(nll_b),
        "ln_ppl_ratio": ratio, "ln_ppl_ratio_error": ratio_error,
        "ppl_ratio": np.exp(ratio), "ppl_ratio_error": np.exp(ratio) * ratio_error,
        "kld": kld.mean(), "kld_error": error(kld), "kld_median": np.median(kld),
        "kld_p90": np.quantile(kld, 0.9), "kld_p99": np.quantile(kld, 0.99), "kld_p999": np.quantile(kld, 0.999),
        "kld_max": kld.max(), "top1": same, "top1_error": np.sqrt(same * (1 - same) / (n - 1)),
        "dp_rms": rms, "dp_rms_error": 0.5 / rms * error(dp**2), "dp_mean": dp.mean(), "dp_mean_error": error(dp),
    }


HARNESS = r"""
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <cmath>
#include <cfloat>
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define LOG(...)     std::printf(__VA_ARGS__)
#define LOG_INF(...) std::fprintf(stderr, __VA_ARGS__)
#define LOG_WRN(...) std::fprintf(stderr, __VA_ARGS__)
#define LOG_ERR(...) std::fprintf(stderr, __VA_ARGS__)
#define GGML_ASSERT(x) do { if (!(x)) { std::fprintf(stderr, "%s\n", #x); std::exit(1); } } while (0)

typedef int32_t llama_token;
struct llama_model {}; struct llama_vocab {}; struct llama_memory {};
struct llama_context { std::vector<float> logits; };
struct llama_batch {};
struct common_params { std::string logits_file; int n_batch = N_CTX_; int n_ctx = N_CTX_; };
struct common_batch {
    common_batch(llama_context *) {}
    void clear() {}
    void add(llama_token, int, int, bool) {}
    llama_batch get() { return {}; }
};
enum { LLAMA_PROCESS_TYPE_DECODE };
static llama_model the_model; static llama_vocab the_vocab; static llama_memory the_memory;
static const llama_model * llama_get_model(llama_context *) { return &the_model; }
static const llama_vocab * llama_model_get_vocab(const llama_model *) { return &the_vocab; }
static uint32_t llama_n_ctx(llama_context *) { return N_CTX_; }
static uint32_t llama_n_seq_max(llama_context *) { return 1; }
static int llama_vocab_n_tokens(const llama_vocab *) { return VOCAB_; }
static bool llama_vocab_get_add_bos(const llama_vocab *) { return false; }
static bool llama_vocab_get_add_eos(const llama_vocab *) { return false; }
static llama_token llama_vocab_bos(const llama_vocab *) { return 0; }
static llama_memory * llama_get_memory(llama_context *) { return &the_memory; }
static void llama_memory_clear(llama_memory *, bool) {}
static int llama_process(llama_context *, int, llama_batch) { return 0; }
static int llama_decode(llama_context *, llama_batch) { return 0; }
static void llama_synchronize(llama_context *) {}
static float * llama_get_logits(llama_context * ctx) { return ctx->logits.data(); }
static float * llama_get_logits_ith(llama_context * ctx, int) { return ctx->logits.data(); }

#include "extracted.inc"

int main(int argc, char ** argv) {
    llama_context ctx;
    ctx.logits.resize(size_t(SCORES_) * VOCAB_);
    std::ifstream in(argv[1], std::ios::binary);
    in.read((char *) ctx.logits.data(), ctx.logits.size() * sizeof(float));
    common_params params;
    params.logits_file = argv[2];
    kl_divergence(&ctx, params);
    return argc == 3 ? 0 : 1;
}
"""


def function(source, start):
    """The text from a line that begins with `start` up to the closing brace in the first column."""
    at = source.index("\n" + start) + 1
    end = re.compile(r"^\};?$", re.M).search(source, at).end()
    return source[at:end] + "\n"


def by_llama_cpp(tree, q_base, q_model, targets):
    source = (pathlib.Path(tree) / "tools/perplexity/perplexity.cpp").read_text()
    # The sums, the statistics of a row, the loop over rows that follows it, and the command.
    row = "static std::pair<double, float> log_softmax("
    after = source[source.index(row) - 1:]
    text = function(source, "struct kl_divergence_result") + function(after, row)
    text += function(after, "static void process_logits(") + function(source, "static void kl_divergence(")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "extracted.inc").write_text(text)
        (folder / "harness.cpp").write_text(HARNESS)
        sizes = [f"-DN_CTX_={N_CTX}", f"-DVOCAB_={VOCAB}", f"-DSCORES_={SCORES}"]
        subprocess.run(["c++", "-std=c++17", "-O1", "-pthread", *sizes, "-o", folder / "harness", folder / "harness.cpp"],
                       check=True)
        (q_model / np.float32(4096) - np.float32(8)).astype("<f4").tofile(folder / "logits")
        with open(folder / "base", "wb") as out:
            out.write(b"_logits_" + struct.pack("<Iii", N_CTX, VOCAB, 1))
            tokens = np.zeros(N_CTX, "<i4")
            tokens[N_CTX // 2 + 1:] = targets
            tokens.tofile(out)
            logits = (q_base / np.float32(4096) - np.float32(8)).astype(np.float32)
            for row, q in zip(logits, q_base):
                top = row.max()
                log_sum = np.float32(np.log(np.exp(row - top).sum(dtype=np.float64)))
                out.write(struct.pack("<ff", 1 / 4096, row.min() - top - log_sum) + q.tobytes())
        printed = subprocess.run([folder / "harness", folder / "logits", folder / "base"], check=True, text=True,
                                 stdout=subprocess.PIPE).stdout
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"perplexity_cpp_sha256": hashlib.sha256(source.encode()).hexdigest(), "extract_sha256": digest,
            "printed": printed[printed.index("====== Perplexity statistics"):].splitlines()}


def main():
    out = pathlib.Path(sys.argv[1])
    q_base, q_model, targets = make_logits()
    (out / "logits.bin").write_bytes(q_base.tobytes() + q_model.tobytes() + targets.tobytes())
    golden = out / "golden.json"
    if len(sys.argv) > 2:
        llama = by_llama_cpp(sys.argv[2], q_base, q_model, targets)
    else:
        llama = json.loads(golden.read_text()).get("llama_cpp") if golden.exists() else None
    figures = {k: float(v) for k, v in by_numpy(q_base, q_model, targets).items()}
    golden.write_text(json.dumps({"version": 1, "made_by": "make_divergence.py", "scores": SCORES, "vocab": VOCAB,
                                  "numpy": figures, "llama_cpp": llama}, indent=1, ensure_ascii=False) + "\n")


main()
