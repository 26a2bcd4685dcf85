#!/usr/bin/env python3
"""Measures the choices behind the weight formats `n4` and `w8`; prints the tables of docs/formats.md as Markdown.

usage: weight_formats.py MODEL_DIR TEXT_FILE [--part tables|scales|uneven|search|w8|quality|all] [--windows 12] [--every 16]
       [--only NAME[;NAME...]]     (quality: only configurations whose name contains one of these)
needs: torch transformers safetensors numpy (PyPI) and a C compiler as `cc`

MODEL_DIR is a Hugging Face folder of a Llama-like model with one safetensors file and tied embeddings. Its weights
should not come from a 4-bit grid. Parts:
  tables   error of code tables and of the meaning of the choice bit and the sign, on every 16th row of every linear
  scales   error of the types of block scales
  uneven   whether scales of few bits suffice where blocks of a row differ in size
  search   error and time of the search for block scales
  w8       error of bf16 against f16 scales for 8-bit codes
  quality  KLD, top-1 agreement and perplexity ratio of whole models against the f32 model
"""
import argparse
import ctypes
import math
import os
import subprocess
import tempfile
import time
from statistics import NormalDist

import numpy as np

KERNEL = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define INLINE static inline __attribute__((always_inline))
INLINE float keep(float d, int type) {             /* a scale as the format stores it */
    if (type == 2) return (float)(_Float16)d;
    if (type == 3) { uint32_t u; memcpy(&u, &d, 4); u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u; memcpy(&d, &u, 4); }
    return d;
}
/* Error of block w (G weights, importances p) on the ascending table t with scale d. The values chosen go to q,
   the sums of a least-squares refit of d to num and den. */
INLINE float attempt(const float *w, const float *p, int G, const float *t, float d, float *q, float *num, float *den) {
    for (int j = 0; j < G; j++) q[j] = t[0];
    for (int i = 1; i < 16; i++) {
        float mid = 0.5f * (t[i] + t[i - 1]) * d, step = t[i] - t[i - 1];
        for (int j = 0; j < G; j++) q[j] += w[j] > mid ? step : 0.0f;
    }
    float e = 0, a = 0, b = 0;
    for (int j = 0; j < G; j++) { float r = w[j] - d * q[j]; e += p[j] * r * r; a += p[j] * w[j] * q[j]; b += p[j] * q[j] * q[j]; }
    *num = a; *den = b;
    return e;
}
INLINE float no_clip(const float *w, int G, const float *t) {   /* smallest scale that puts no weight outside the table */
    float hi = 0, lo = 0;
    for (int j = 0; j < G; j++) { hi = w[j] > hi ? w[j] : hi; lo = w[j] < lo ? w[j] : lo; }
    float a = hi / t[15], b = lo / t[0];
    return a > b ? a : b;
}
/* type 0: f32 scales; 1: integers 1..smax times an f32 per row; 2: f16; 3: bf16. window < 0: the scale of the first
   stage is rounded to an integer and its table kept; otherwise every table and 2*window+1 integers are tried. */
INLINE void row(const float *w, long K, int G, const float *tabs, int nt, const float *f, int nf, int type, int smax,
        int refit, int weighting, int window, const float *rho, int nrho, float *out, float *scale, uint8_t *pick,
        float *imp, float *first, float *rs, uint8_t *rp) {
    long nb = K / G; float q[64], num, den, top = 0;
    for (long g = 0; g < nb; g++) {
        const float *x = w + g * G; float *p = imp + g * G, s2 = 0, best = INFINITY;
        for (int j = 0; j < G; j++) s2 += x[j] * x[j];
        for (int j = 0; j < G; j++)
            p[j] = weighting == 1 ? sqrtf(s2 / G + x[j] * x[j]) : weighting == 2 ? fabsf(x[j]) : weighting == 3 ? x[j] * x[j] : 1.0f;
        for (int t = 0; t < nt; t++) {
            const float *tab = tabs + t * 16;
            float d0 = no_clip(x, G, tab), be = INFINITY, bd = 0;
            if (d0 > 0) for (int c = 0; c < nf; c++) {
                float d = keep(d0 * f[c], type);
                if (!(d > 0)) continue;
                float e = attempt(x, p, G, tab, d, q, &num, &den);
                if (e < be) { be = e; bd = d; }
                for (int r = 0; r < refit && num > 0 && den > 0; r++) {
                    d = keep(num / den, type);
                    if (!(d > 0)) break;
                    e = attempt(x, p, G, tab, d, q, &num, &den);
                    if (e < be) { be = e; bd = d; }
                }
            }
            first[g * nt + t] = bd;
            if (be < best) { best = be; scale[g] = bd; pick[g] = t; }
        }
        if (scale[g] > top) top = scale[g];
    }
    if (type == 1 && top > 0) {
        float least = INFINITY;
        for (int m = 0; m < nrho; m++) {
            float r = top / smax * rho[m], total = 0;
            for (long g = 0; g < nb; g++) {
                float be = INFINITY; rs[g] = 0; rp[g] = pick[g];
                for (int t = 0; t < nt; t++) {
                    if (window < 0 && t != pick[g]) continue;
                    int c = (int)lrintf(first[g * nt + t] / r), n = window < 0 ? 0 : window;
                    if (first[g * nt + t] <= 0) continue;
                    c = c < 1 ? 1 : c > smax ? smax : c;
                    for (int s = c - n; s <= c + n; s++) {
                        if (s < 1 || s > smax) continue;
                        float e = attempt(w + g * G, imp + g * G, G, tabs + t * 16, s * r, q, &num, &den);
                        if (e < be) { be = e; rs[g] = s * r; rp[g] = t; }
                    }
                }
                if (be < INFINITY) total += be;
            }
            if (total < least) { least = total; memcpy(scale, rs, nb * sizeof(float)); memcpy(pick, rp, nb); }
        }
    }
    for (long g = 0; g < nb; g++) {
        float *o = out + g * G;
        if (!(scale[g] > 0)) { memset(o, 0, G * sizeof(float)); continue; }
        attempt(w + g * G, imp + g * G, G, tabs + pick[g] * 16, scale[g], q, &num, &den);
        for (int j = 0; j < G; j++) o[j] = scale[g] * q[j];
    }
}
void quantize(const float *w, long N, long K, int G, const float *tabs, int nt, const float *f, int nf, int type, int smax,
        int refit, int weighting, int window, const float *rho, int nrho, float *out, float *scale, uint8_t *pick,
        float *imp, float *first, float *rs, uint8_t *rp) {
    for (long n = 0; n < N; n++) {
        const float *x = w + n * K; float *o = out + n * K, *s = scale + n * (K / G); uint8_t *p = pick + n * (K / G);
        if (G == 32) row(x, K, 32, tabs, nt, f, nf, type, smax, refit, weighting, window, rho, nrho, o, s, p, imp, first, rs, rp);
        else row(x, K, 64, tabs, nt, f, nf, type, smax, refit, weighting, window, rho, nrho, o, s, p, imp, first, rs, rp);
    }
}
"""


def compile_kernel():
    folder = tempfile.mkdtemp()
    source, library = os.path.join(folder, "kernel.c"), os.path.join(folder, "kernel.so")
    with open(source, "w") as file:
        file.write(KERNEL)
    flags = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
    subprocess.check_call(["cc", *flags, source, "-o", library, "-lm"])
    return ctypes.CDLL(library)


LIB = compile_kernel()
F32 = np.float32
FREE, ROW, F16, BF16 = 0, 1, 2, 3
STEPS = np.linspace(0.75, 1.05, 9)


def quantize(w, tabs, f=STEPS, type=ROW, smax=127, refit=0, weighting=0, window=2, rho=(1.0,), group=32):
    """Rounds w; returns the decoded weights, the magnitudes of the block scales and the index of each block's table.

    A table used with a negative scale is passed as a table of its own with the signs turned."""
    w = np.ascontiguousarray(w, dtype=F32)
    (n, k), blocks = w.shape, w.shape[1] // group
    tabs = np.ascontiguousarray([np.sort(t) for t in tabs], dtype=F32)
    f, rho = np.array(f, dtype=F32), np.array(rho, dtype=F32)
    out, scale, pick = np.empty_like(w), np.zeros((n, blocks), F32), np.zeros((n, blocks), np.uint8)
    scratch = [np.empty(k, F32), np.empty(blocks * len(tabs), F32), np.empty(blocks, F32), np.empty(blocks, np.uint8)]
    at = lambda a: a.ctypes.data_as(ctypes.c_void_p)
    LIB.quantize(at(w), ctypes.c_long(n), ctypes.c_long(k), group, at(tabs), len(tabs), at(f), len(f), type, smax, refit,
                 weighting, window, at(rho), len(rho), at(out), at(scale), at(pick), *map(at, scratch))
    return out, scale, pick


def w8(w, scale_type):
    b = w.reshape(-1, 32)
    s = np.abs(b).max(1, keepdims=True) / 127
    if scale_type == "f16":
        s = s.astype(np.float16).astype(F32)
    elif scale_type == "bf16":
        u = np.ascontiguousarray(s, dtype=F32).view(np.uint32)
        s = ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).view(F32)
    s = np.where(s == 0, 1, s)
    return (np.clip(np.rint(b / s), -127, 127) * s).reshape(w.shape).astype(F32)


def error(w, decoded):
    return float(((decoded - w) ** 2).sum(dtype=np.float64) / (w**2).sum(dtype=np.float64))


# Tables. LINEAR is the integer grid, CUBIC the grid of llama.cpp's IQ4_NL, NF4 that of QLoRA rounded to int8.
LINEAR = np.arange(-8, 8) * 15
CUBIC = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
GAUSS = np.array([-127, -100, -79, -62, -47, -34, -22, -10, 1, 13, 25, 38, 52, 66, 84, 111])  # fitted to Gaussian rows, sign and shift 6
N4 = np.array([-127, -101, -79, -62, -47, -34, -22, -10, 1, 13, 25, 37, 51, 66, 82, 110])  # the same, sign and 2-bit shift 4


def normal_float():
    inv, end = NormalDist().inv_cdf, 1 - 0.5 * (1 / 32 + 1 / 30)
    up, down = [inv(x) for x in np.linspace(end, 0.5, 9)[:-1]], [-inv(x) for x in np.linspace(end, 0.5, 8)[:-1]]
    t = np.array(sorted(up + [0] + down))
    return np.round(127 * t / np.abs(t).max())


def shifted(t, d):
    return [t, t + d]


def flipped(t):
    return [t, -t]


def signed(t, d):
    return [t, t + d, -t, -t - d]


def signed4(t, d):
    return [sign * (t + i * d) for i in range(4) for sign in (1, -1)]


def fit(data, variants, smax, start=CUBIC, rounds=12):
    """Lloyd's algorithm: alternates the search with the best table for its codes. variants: (sign, shift) per table."""
    t = start.astype(float)
    for _ in range(rounds):
        num, den = np.zeros(16), np.zeros(16)
        for w in data:
            power = (w**2).mean()
            _, scale, pick = quantize(w, [s * (t + d) for s, d in variants], smax=smax)
            b = w.reshape(len(w), -1, 32)
            for i, (sign, shift) in enumerate(variants):
                m = (pick == i) & (scale > 0)
                s = scale[m][:, None]
                y = sign * b[m] / s - shift
                code = np.searchsorted((t[1:] + t[:-1]) / 2, y.ravel())
                weight = np.broadcast_to(s**2 / power, y.shape).ravel()
                num += np.bincount(code, weight * y.ravel(), 16)
                den += np.bincount(code, weight, 16)
        t = np.sort(np.where(den > 0, num / np.maximum(den, 1e-30), t))
        t *= 127 / np.abs(t).max()
    return np.round(t)


VARIANTS = {"shift 6": ([(1, 0), (1, 6)], 127, lambda t: shifted(t, 6)), "sign": ([(1, 0), (-1, 0)], 127, flipped),
            "sign and shift 6": ([(s, 6 * c) for s in (1, -1) for c in (0, 1)], 63, lambda t: signed(t, 6)),
            "sign and 2-bit shift 4": ([(s, 4 * c) for c in range(4) for s in (1, -1)], 31, lambda t: signed4(t, 4))}


class Samples:
    """Rows of the model, and two synthetic sets: Gaussian rows, and rows whose blocks differ widely in size."""

    def __init__(self, folder, every):
        from safetensors.torch import load_file

        state = load_file(os.path.join(folder, "model.safetensors"))
        self.linear = [np.ascontiguousarray(w.float().numpy()[::every]) for n, w in state.items() if n.endswith("proj.weight")]
        self.embedding = state["model.embed_tokens.weight"].float().numpy()
        rng = np.random.default_rng(0)
        self.gauss = [rng.standard_normal((1000, 576)).astype(F32)]
        self.student = [rng.standard_t(6, (1000, 576)).astype(F32)]
        size = np.exp(rng.standard_normal((128, 128, 1)))
        self.uneven = [(rng.standard_normal((128, 128, 32)) * size).reshape(128, 4096).astype(F32)]

    def line(self, name, **how):
        start = time.time()
        model = np.mean([error(w, quantize(w, **how)[0]) for w in self.linear])
        cost = (time.time() - start) / sum(w.size for w in self.linear) * 1e9
        gauss, uneven = (np.mean([error(w, quantize(w, **how)[0]) for w in d]) for d in (self.gauss, self.uneven))
        print(f"| {name} | {1e3 * model:.3f} | {1e3 * gauss:.3f} | {1e3 * uneven:.3f} | {cost:.0f} |", flush=True)


def head(title):
    print(f"\n{title}\n\n| | model | Gaussian | uneven | ns per weight |\n|---|---|---|---|---|")


def part_tables(x):
    head("Tables; 7-bit scale, no choice bit")
    for name, t in (("linear", LINEAR), ("cubic", CUBIC), ("NF4", normal_float())):
        x.line(name, tabs=[t])
    head("Meaning of the spare bits; cubic table")
    for d in (2, 4, 6, 8, 10, 14):
        x.line(f"7-bit scale, shift {d}", tabs=shifted(CUBIC, d))
    x.line("7-bit scale, bit turns the sign", tabs=flipped(CUBIC))
    for d in (4, 6, 8):
        x.line(f"sign, 6-bit scale, shift {d}", tabs=signed(CUBIC, d), smax=63)
    for d in (3, 4, 5):
        x.line(f"sign, 5-bit scale, 2-bit shift {d}", tabs=signed4(CUBIC, d), smax=31)
    x.line("linear: sign, 6-bit scale, shift of half a step", tabs=signed(LINEAR, 7), smax=63)
    x.line("NF4: sign, 6-bit scale, shift 6", tabs=signed(normal_float(), 6), smax=63)
    head("Fitted tables")
    few = [np.ascontiguousarray(w[:: max(1, len(w) // 24)]) for w in x.linear]
    for what, (variants, smax, tabs) in VARIANTS.items():
        for source, data in (("model", few), ("Gaussian", x.gauss), ("Student t", x.student)):
            t = fit(data, variants, smax)
            x.line(f"{what}, fitted to {source}: {t.astype(int).tolist()}", tabs=tabs(t), smax=smax)
    a, b = independent(x.gauss)
    x.line(f"two tables fitted to Gaussian: {a.astype(int).tolist()} {b.astype(int).tolist()}", tabs=[a, b])
    head("Shift for the table fitted to Gaussian rows; sign, 6-bit scale")
    for d in range(3, 9):
        x.line(f"{d}", tabs=signed(GAUSS, d), smax=63)
    head("The final table; sign, 5-bit scale")
    for d in (3, 4, 5):
        x.line(f"2-bit shift {d}", tabs=signed4(N4, d), smax=31, window=1)


def independent(data, rounds=25):
    """Two tables without a relation to each other."""
    tabs = [CUBIC.astype(float), CUBIC + 6.0]
    for _ in range(rounds):
        num, den = np.zeros((2, 16)), np.full((2, 16), 1e-30)
        for w in data:
            _, scale, pick = quantize(w, tabs)
            b = w.reshape(len(w), -1, 32)
            for i, t in enumerate(tabs):
                m = (pick == i) & (scale > 0)
                s = scale[m][:, None]
                y = (b[m] / s).ravel()
                code = np.searchsorted((t[1:] + t[:-1]) / 2, y)
                weight = np.broadcast_to(s**2, b[m].shape).ravel()
                num[i] += np.bincount(code, weight * y, 16)
                den[i] += np.bincount(code, weight, 16)
        tabs = [np.sort(n / d) for n, d in zip(num, den)]
        tabs = [t * 127 / np.abs(t).max() for t in tabs]
    return [np.round(t) for t in tabs]


def part_scales(x):
    head("Types of block scales")
    for name, how in (
        ("f32 per row, sign, 6 bits, choice (4.25 bits)", dict(tabs=signed(GAUSS, 6), smax=63)),
        ("f32 per row, sign, 7 bits, choice (4.28 bits)", dict(tabs=signed(GAUSS, 6), smax=127)),
        ("f16 per 32 with sign (4.5 bits)", dict(tabs=flipped(GAUSS), type=F16)),
        ("bf16 per 32 with sign (4.5 bits)", dict(tabs=flipped(GAUSS), type=BF16)),
        ("f16 per 32 with sign, choice (4.53 bits)", dict(tabs=signed(GAUSS, 6), type=F16)),
        ("f16 per 64 with sign (4.25 bits)", dict(tabs=flipped(GAUSS), type=F16, group=64)),
        ("f16 per 64 with sign, choice (4.27 bits)", dict(tabs=signed(GAUSS, 6), type=F16, group=64)),
        ("f32 per 32 with sign, choice: the bound", dict(tabs=signed(GAUSS, 6), type=FREE)),
    ):
        x.line(name, **how)


def part_search(x):
    head("Search for the block scale; sign, 6-bit scale, shift 6")
    how = dict(tabs=signed(GAUSS, 6), smax=63)
    x.line("no search: largest weight at the end of the table", f=[1.0], window=-1, **how)
    x.line("17 steps 0.70 to 1.10, best one rounded", f=np.linspace(0.7, 1.1, 17), window=-1, **how)
    for window in (0, 1, 2, 4):
        x.line(f"17 steps 0.70 to 1.10, then integers ±{window} for every table", f=np.linspace(0.7, 1.1, 17), window=window, **how)
    for n in (4, 5, 7, 9, 13):
        x.line(f"{n} steps 0.75 to 1.05, ±1", f=np.linspace(0.75, 1.05, n), window=1, **how)
    for a, b in ((0.7, 1.0), (0.8, 1.0), (0.8, 1.1), (0.6, 1.1)):
        x.line(f"9 steps {a:.2f} to {b:.2f}, ±1", f=np.linspace(a, b, 9), window=1, **how)
    for n in (5, 9):
        x.line(f"{n} steps 0.75 to 1.05 with one refit each, ±1", f=np.linspace(0.75, 1.05, n), refit=1, window=1, **how)
    for rho in ((0.9, 1.0, 1.1), np.linspace(0.95, 1.1, 7)):
        x.line(f"9 steps 0.75 to 1.05, ±1, best of {len(rho)} row scales {rho[0]:.2f} to {rho[-1]:.2f}", window=1, rho=rho, **how)
    x.line("81 steps 0.50 to 1.30, ±8: the bound", f=np.linspace(0.5, 1.3, 81), window=8, **how)
    head("The same; sign, 5-bit scale, 2-bit shift 4")
    how = dict(tabs=signed4(N4, 4), smax=31)
    x.line("1.00 only, ±1", f=[1.0], window=1, **how)
    x.line("4 steps 0.90 to 1.05, ±1", f=np.linspace(0.9, 1.05, 4), window=1, **how)
    for n in (5, 7, 9, 13):
        x.line(f"{n} steps 0.75 to 1.05, ±1", f=np.linspace(0.75, 1.05, n), window=1, **how)
    x.line("9 steps 0.75 to 1.05, ±0", window=0, **how)
    x.line("9 steps 0.75 to 1.05, ±2", window=2, **how)


def part_uneven(x):
    print("\nUneven blocks\n\n| sigma | 7-bit, shift 6 | sign, 6-bit, shift 6 | sign, 5-bit, 2-bit shift 4 |\n|---|---|---|---|")
    three = (shifted(GAUSS, 6), 127), (signed(GAUSS, 6), 63), (signed4(GAUSS, 4), 31)
    rng = np.random.default_rng(1)
    for sigma in (0.5, 1, 1.5, 2):
        d = rng.standard_normal((32, 128, 32)) * np.exp(sigma * rng.standard_normal((32, 128, 1)))
        d = d.reshape(32, 4096).astype(F32)
        e = [1e3 * error(d, quantize(d, tabs=t, smax=m, window=1)[0]) for t, m in three]
        print(f"| {sigma} | " + " | ".join(f"{v:.3f}" for v in e) + " |", flush=True)
    done = [[quantize(w, tabs=t, smax=m, window=1) for t, m in three[1:]] for w in x.linear]
    worse = sum(error(w, five[0]) > error(w, six[0]) for w, (six, five) in zip(x.linear, done))
    ratio = np.concatenate([(s / s.max(1, keepdims=True)).ravel() for (_, s, _), _ in done])
    print(f"5 bits worse in {worse} of {len(done)} tensors; block scale over the row's largest: "
          f"{np.quantile(ratio, 0.001):.2f} at 0.1 %, {np.quantile(ratio, 0.01):.2f} at 1 %, median {np.median(ratio):.2f}")


def part_w8(x):
    print("\nScales of 8-bit codes\n\n| | model | Gaussian | uneven |\n|---|---|---|---|")
    for kind in ("f32", "f16", "bf16"):
        e = [np.mean([error(w, w8(w, kind)) for w in d]) for d in (x.linear, x.gauss, x.uneven)]
        print(f"| {kind} | {1e6 * e[0]:.2f}e-6 | {1e6 * e[1]:.2f}e-6 | {1e6 * e[2]:.2f}e-6 |", flush=True)
    small = [w * 1e-4 for w in x.linear]
    print("weights 1e-4 times as large:", {k: f"{np.mean([error(w, w8(w, k)) for w in small]):.2e}" for k in ("f16", "bf16")})


def part_quality(args):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer(open(args.text).read(), return_tensors="pt")["input_ids"][0]
    total = len(ids) // 512
    windows = ids[: total * 512].view(total, 512)[[i * total // args.windows for i in range(args.windows)]]

    @torch.no_grad()
    def predict(w):
        return torch.log_softmax(model.lm_head(model.model(w[None])[0][0, 256:511]), -1)

    base = [predict(w).half() for w in windows]
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    weights = {n: m.weight.data.clone().numpy() for n, m in linear}
    embedding = model.model.embed_tokens.weight.data.clone().numpy()

    @torch.no_grad()
    def measure():
        kld, top, nll, count = [], 0, 0.0, 0
        for w, b in zip(windows, base):
            b, p, target = b.float(), predict(w), w[257:512, None]
            kld.append((b.exp() * (b - p)).sum(-1).mean().item())
            top += (b.argmax(-1) == p.argmax(-1)).sum().item()
            nll += (b.gather(1, target) - p.gather(1, target)).sum().item()
            count += len(p)
        return np.mean(kld), np.std(kld, ddof=1) / math.sqrt(len(kld)), 100 * top / count, math.exp(nll / count)

    nll = -np.mean([b.float().gather(1, w[257:512, None]).mean().item() for b, w in zip(base, windows)])
    print(f"\n{args.windows} of {total} windows of 512 tokens; perplexity of the f32 model {math.exp(nll):.2f}\n")
    print("| linear layers | embedding and head | error | KLD | top-1 | perplexity ratio |\n|---|---|---|---|---|---|", flush=True)

    def run(name, body, emb="f32"):
        if args.only and not any(o in f"{name}/{emb}" for o in args.only.split(";")):
            return
        errors = []
        for n, m in linear:
            decoded = body(weights[n]) if body else weights[n]
            errors.append(error(weights[n], decoded))
            m.weight.data = torch.from_numpy(decoded)
        e = {"f32": lambda w: w, "n4": n4, "w8": lambda w: w8(w, "bf16")}[emb](embedding)
        model.model.embed_tokens.weight.data = torch.from_numpy(e)
        model.lm_head.weight = model.model.embed_tokens.weight
        k, k_error, top, ratio = measure()
        print(f"| {name} | {emb} | {1e3 * np.mean(errors):.3f} | {k:.4f} ± {k_error:.4f} | {top:.1f} % | {ratio:.3f} |", flush=True)

    def rounded(**how):
        return lambda w: quantize(w, **how)[0]

    def per_tensor(w):
        few = [np.ascontiguousarray(w[:: max(1, len(w) // 96)])]
        t = fit(few, VARIANTS["sign and shift 6"][0], 63, start=GAUSS, rounds=5)
        return quantize(w, signed(t, 6), smax=63, window=1)[0]

    six = dict(tabs=signed(GAUSS, 6), smax=63, window=1)
    n4 = rounded(tabs=signed4(N4, 4), smax=31, window=1)
    run("n4 as decided", n4)
    run("Gaussian fit; sign, 6-bit scale, shift 6", rounded(**six))
    run("linear, 7-bit scale", rounded(tabs=[LINEAR]))
    run("linear, sign, 6-bit scale, shift 7", rounded(tabs=signed(LINEAR, 7), smax=63))
    run("cubic, 7-bit scale, shift 4", rounded(tabs=shifted(CUBIC, 4)))
    run("cubic, 7-bit scale, shift 6", rounded(tabs=shifted(CUBIC, 6)))
    run("cubic, sign, 6-bit scale, shift 6", rounded(tabs=signed(CUBIC, 6), smax=63))
    run("Gaussian fit, 7-bit scale, bit turns the sign", rounded(tabs=flipped(GAUSS)))
    run("Gaussian fit, sign, 5-bit scale, 2-bit shift 4", rounded(tabs=signed4(GAUSS, 4), smax=31))
    run("6-bit scale, table fitted per tensor", per_tensor)
    run("f16 per 32 with sign", rounded(tabs=flipped(GAUSS), type=F16))
    run("f16 per 64 with sign and choice", rounded(tabs=signed(GAUSS, 6), type=F16, group=64))
    run("6-bit scale, no scale search", rounded(**(six | dict(f=[1.0], window=-1))))
    fine = dict(tabs=signed4(N4, 4), smax=31)
    run("n4, no scale search", rounded(f=[1.0], window=-1, **fine))
    run("n4, 4 steps 0.90 to 1.05", rounded(f=np.linspace(0.9, 1.05, 4), window=1, **fine))
    run("n4, 7 steps 0.75 to 1.05", rounded(f=np.linspace(0.75, 1.05, 7), window=1, **fine))
    for i, name in enumerate(("1", "sqrt(mean w² + w²)", "|w|", "w²")):
        more = dict(weighting=i, f=np.linspace(0.7, 1.1, 17), window=2)
        run(f"6-bit scale, errors weighted {name}", rounded(**(six | more)))
    run("w8 bf16", lambda w: w8(w, "bf16"))
    run("w8 f16", lambda w: w8(w, "f16"))
    run("f32", None, "w8")
    run("f32", None, "n4")
    run("n4 as decided", n4, "w8")
    run("n4 as decided", n4, "n4")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--part", default="all", choices=["tables", "scales", "uneven", "search", "w8", "quality", "all"])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    parts = dict(tables=part_tables, scales=part_scales, uneven=part_uneven, search=part_search, w8=part_w8)
    if args.part != "quality":
        samples = Samples(args.model, args.every)
        for name, part in parts.items():
            if args.part in (name, "all"):
                part(samples)
    if args.part in ("quality", "all"):
        part_quality(args)


if __name__ == "__main__":
    main()
