#!/usr/bin/env python3
"""Fits the tables of `n2`, `n3`, `n5` and `n6` and measures how to spend a block's byte; prints Markdown tables.

usage: table_widths.py MODEL_DIR [--part bytes|shift|search|final|all] [--bits 2,3,5,6] [--every 16]
needs: numpy (PyPI) and a C compiler as `cc`

MODEL_DIR is a Hugging Face folder of a Llama-like model with one safetensors file. The search is the one of
passes/src/quantize/scale_search.rs; tables are fitted to Gaussian rows by Lloyd's algorithm under that search. Parts:
  bytes    how many bits of the byte choose a shift, and whether a scale has a sign, at a shift of about half a step
  shift    sizes of the shift for the byte that was taken
  search   fractions of the scale that clips nothing, and neighbours of the rounded scale
  final    the tables of the formats
"""
import argparse
import ctypes
import json
import math
import os
import subprocess
import tempfile

import numpy as np

KERNEL = r"""
#include <math.h>
#include <string.h>
enum { CELLS = 1024, G = 32 };
typedef struct { float values[CELLS]; unsigned char codes[CELLS]; float sign, low, high, moved; } Way;
static int cell(float y) { float c = y * 2 + 512; return c < 0 ? 0 : c > CELLS - 1 ? CELLS - 1 : (int)c; }
static float try_scale(const float *w, float square, const Way *way, float d) {
    float inverse = way->sign / d, wt = 0, tt = 0, t[G];
    int c[G];
    for (int j = 0; j < G; j++) c[j] = cell(w[j] * inverse);
    for (int j = 0; j < G; j++) t[j] = way->values[c[j]];
    for (int j = 0; j < G; j++) { wt += w[j] * t[j]; tt += t[j] * t[j]; }
    return square - 2 * d * way->sign * wt + d * d * tt;
}
/* Sums for Lloyd's algorithm go to num and den (per code); returns the squared error. */
double rows(const float *w, long N, long K, const float *table, int L, float shift, int choices, int signs, int smax,
            const float *f, int nf, int window, double *num, double *den, float *first, int *best_way) {
    static Way ways[64];
    int nw = 0;
    for (int c = 0; c < choices; c++) for (int s = 0; s < signs; s++) {
        Way *way = &ways[nw++];
        way->sign = s ? -1 : 1; way->moved = c * shift;
        way->low = table[0] + way->moved; way->high = table[L - 1] + way->moved;
        for (int i = 0; i < CELLS; i++) {
            float y = (i + 0.5f) / 2 - 256; int code = 0;
            for (int j = 1; j < L; j++) if (y > (table[j - 1] + table[j]) / 2 + way->moved) code = j;
            way->codes[i] = code; way->values[i] = table[code] + way->moved;
        }
    }
    double total = 0;
    for (long n = 0; n < N; n++) {
        const float *row = w + n * K; long nb = K / G; float top = 0; double power = 0;
        for (long j = 0; j < K; j++) power += (double)row[j] * row[j];
        if (power == 0) continue;
        for (long g = 0; g < nb; g++) {
            const float *x = row + g * G; float square = 0, low = 0, high = 0, least = INFINITY;
            for (int j = 0; j < G; j++) { square += x[j] * x[j]; low = x[j] < low ? x[j] : low; high = x[j] > high ? x[j] : high; }
            for (int v = 0; v < nw; v++) {
                const Way *way = &ways[v];
                float lo = way->sign < 0 ? -high : low, hi = way->sign < 0 ? -low : high;
                float a = hi / way->high, b = lo / way->low, d0 = a > b ? a : b, here = INFINITY, scale = 0;
                if (d0 > 0) for (int i = 0; i < nf; i++) {
                    float e = try_scale(x, square, way, d0 * f[i]);
                    if (e < here) { here = e; scale = d0 * f[i]; }
                }
                first[g * nw + v] = scale;
                if (here < least) { least = here; best_way[g] = v; }
            }
            if (first[g * nw + best_way[g]] > top) top = first[g * nw + best_way[g]];
        }
        float unit = top / smax;
        for (long g = 0; g < nb; g++) {
            const float *x = row + g * G; float square = 0; int scale = 0, way = 0;
            for (int j = 0; j < G; j++) square += x[j] * x[j];
            float least = square;
            for (int v = 0; v < nw; v++) {
                int m = (int)roundf(first[g * nw + v] / unit);
                for (int s = m - window; s <= m + window; s++) if (s >= 1 && s <= smax) {
                    float e = try_scale(x, square, &ways[v], s * unit);
                    if (e < least) { least = e; scale = s; way = v; }
                }
            }
            if (!scale) { total += square; continue; }
            float d = scale * unit * ways[way].sign;
            for (int j = 0; j < G; j++) {
                int c = ways[way].codes[cell(x[j] / d)]; double r = x[j] - d * (table[c] + ways[way].moved);
                total += r * r;
                double y = x[j] / d - ways[way].moved, weight = (double)d * d / power;
                num[c] += weight * y; den[c] += weight;
            }
        }
    }
    return total;
}
"""


def compile_kernel():
    folder = tempfile.mkdtemp()
    source, library = os.path.join(folder, "kernel.c"), os.path.join(folder, "kernel.so")
    with open(source, "w") as file:
        file.write(KERNEL)
    flags = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC"]
    subprocess.check_call(["cc", *flags, source, "-o", library, "-lm"])
    library = ctypes.CDLL(library)
    library.rows.restype = ctypes.c_double
    return library


LIB = compile_kernel()
F32 = np.float32
N4 = [-127, -101, -79, -62, -47, -34, -22, -10, 1, 13, 25, 37, 51, 66, 82, 110]
# Fractions tried of the scale that clips nothing.
STEPS = {bits: [0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05] for bits in (3, 4, 5, 6)}
STEPS[2] = [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7] + STEPS[3]


class How:
    """A table and how its blocks are read."""

    def __init__(self, table, shift, choice_bits, signed=True, steps=None, window=1):
        self.table, self.shift, self.choice_bits, self.signed, self.window = table, shift, choice_bits, signed, window
        bits = 8 - choice_bits
        self.smax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.steps = steps or STEPS[int(math.log2(len(table)))]

    def measure(self, data):
        """Mean over matrices of the relative squared error, and what Lloyd's algorithm wants."""
        table, f = np.array(self.table, dtype=F32), np.array(self.steps, dtype=F32)
        num, den, errors = np.zeros(len(table)), np.zeros(len(table)), []
        at = lambda a: a.ctypes.data_as(ctypes.c_void_p)
        for w in data:
            (n, k), ways = w.shape, 2 << self.choice_bits
            first, best = np.empty(k // 32 * ways, F32), np.empty(k // 32, np.int32)
            e = LIB.rows(at(w), ctypes.c_long(n), ctypes.c_long(k), at(table), len(table), ctypes.c_float(self.shift),
                         1 << self.choice_bits, 2 if self.signed else 1, self.smax, at(f), len(f), self.window,
                         at(num), at(den), at(first), at(best))
            errors.append(e / float((w.astype(np.float64) ** 2).sum()))
        return float(np.mean(errors)), num, den


def fit(data, bits, shift, choice_bits, signed, rounds):
    """Lloyd's algorithm: alternates the search with the best table for its codes, within the range of a byte.

    It ends in the nearest local optimum, so it begins at six places, three in two forms: at the optimum for single Gaussian numbers, at
    that for numbers divided by the largest magnitude of their block, and at equal steps."""
    entries, most = 1 << bits, ((1 << choice_bits) - 1) * shift
    blocks = data[0].reshape(-1, 32)
    starts = []
    for x in (blocks, blocks / np.abs(blocks).max(1, keepdims=True)):
        x = np.sort(x.ravel())[::31]
        t = np.interp((np.arange(entries) + 0.5) / entries, np.linspace(0, 1, len(x)), x)
        for _ in range(100):
            code = np.searchsorted((t[1:] + t[:-1]) / 2, x)
            t = np.array([x[code == i].mean() if (code == i).any() else t[i] for i in range(entries)])
        starts.append(t)
    starts.append(np.linspace(-1, 1, entries))

    def within(t):
        return t * min(127 / -t[0], (127 - most) / t[-1])

    best = (math.inf, None)
    # A slope makes the halves differ, so that turning a table over gives another one.
    for t in [t * (1 + slope * np.sign(t)) for t in starts for slope in (-0.08, 0.08)]:
        t = within(t)
        for _ in range(rounds):
            _, num, den = How(t, shift, choice_bits, signed).measure(data)
            t = within(np.sort(np.where(den > 0, num / np.maximum(den, 1e-30), t)))
        t = [int(v) for v in np.round(t)]
        best = min(best, (How(t, shift, choice_bits, signed).measure(data)[0], t))
    return best[1]


def load(folder, every):
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    raw = np.memmap(os.path.join(folder, "model.safetensors"), dtype=np.uint8, mode="r", offset=8 + size)
    out = []
    for name, t in header.items():
        if not name.endswith("proj.weight"):
            continue
        values = raw[t["data_offsets"][0] : t["data_offsets"][1]]
        if t["dtype"] == "BF16":
            values = (values.view(np.uint16).astype(np.uint32) << 16).view(F32)
        else:
            values = values.view({"F16": np.float16, "F32": F32}[t["dtype"]])
        out.append(np.ascontiguousarray(values.reshape(t["shape"])[::every].astype(F32)))
    return out


class Samples:
    def __init__(self, folder, every):
        self.model = load(folder, every)
        rng = np.random.default_rng(0)
        self.gauss = [rng.standard_normal((1000, 576)).astype(F32)]
        size = np.exp(rng.standard_normal((128, 128, 1)))
        self.uneven = [(rng.standard_normal((128, 128, 32)) * size).reshape(128, 4096).astype(F32)]

    def line(self, name, how):
        cells = " | ".join(f"{1e3 * how.measure(d)[0]:.4g}" for d in (self.model, self.gauss, self.uneven))
        print(f"| {name} | {cells} |", flush=True)


def head(title):
    print(f"\n{title}\n\n| | model | Gaussian | uneven |\n|---|---|---|---|")


HALF_STEP = {2: 24, 3: 20, 4: 8, 5: 4, 6: 2}
# Table, shift and choice bits of each format.
FINAL = {
    2: ([-88, -31, 20, 91], 12, 2),
    3: ([-97, -64, -39, -16, 7, 30, 59, 103], 8, 2),
    5: ([-127, -107, -94, -84, -75, -66, -58, -50, -43, -36, -30, -24, -19, -13, -8, -3,
         2, 7, 11, 16, 21, 26, 31, 37, 43, 50, 57, 65, 73, 83, 97, 107], 3, 2),
    6: ([-127, -121, -107, -100, -94, -87, -81, -75, -70, -64, -60, -56, -52, -48, -44, -41,
         -37, -35, -32, -29, -27, -24, -22, -19, -17, -15, -12, -10, -8, -5, -3, -1,
         1, 3, 4, 6, 8, 11, 13, 15, 17, 19, 21, 23, 25, 28, 30, 32,
         35, 38, 41, 44, 47, 51, 55, 59, 63, 68, 73, 79, 86, 95, 102, 106], 2, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--part", default="all", choices=["bytes", "shift", "search", "final", "all"])
    parser.add_argument("--bits", default="2,3,5,6")
    parser.add_argument("--every", type=int, default=16)
    args = parser.parse_args()
    x = Samples(args.model, args.every)
    x.line("n4, as a check", How(N4, 4, 2))
    for bits in map(int, args.bits.split(",")):
        rounds = 40
        if args.part in ("bytes", "all"):
            head(f"{bits}-bit codes: the byte of a block")
            for choice_bits, signed in ((0, False), (1, False), (0, True), (1, True), (2, True), (3, True)):
                shift = HALF_STEP[bits] * 2 / max(2, 1 << choice_bits) if choice_bits else 0
                t = fit(x.gauss, bits, shift, choice_bits, signed, rounds)
                sign = "sign, " if signed else ""
                name = f"{sign}{8 - choice_bits - signed}-bit scale, {choice_bits}-bit shift {shift}: {t}"
                x.line(name, How(t, shift, choice_bits, signed))
        if args.part in ("shift", "all"):
            head(f"{bits}-bit codes: sign, 5-bit scale, 2-bit shift")
            for shift in {2: (6, 8, 10, 12, 14, 16), 3: (5, 6, 7, 8, 9, 10), 4: (3, 4, 5), 5: (1, 2, 3, 4), 6: (1, 2)}[bits]:
                t = fit(x.gauss, bits, shift, 2, True, rounds)
                x.line(f"shift {shift}: {t}", How(t, shift, 2))
        if bits in FINAL and args.part in ("search", "all"):
            head(f"{bits}-bit codes: the search")
            for first in (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9, 1.0):
                steps = [first + 0.05 * i for i in range(round((1.05 - first) / 0.05) + 1)]
                x.line(f"{len(steps)} steps from {first}, ± 1", How(*FINAL[bits], steps=steps))
            x.line("± 0", How(*FINAL[bits], window=0))
            x.line("± 2", How(*FINAL[bits], window=2))
            for choice_bits in (1, 3):
                shift = FINAL[bits][1] * 2 / (1 << choice_bits >> 1)
                x.line(f"the same table, {7 - choice_bits}-bit scale", How(FINAL[bits][0], shift, choice_bits))
            uniform = np.round(np.linspace(-127, 127 - 3 * FINAL[bits][1], 1 << bits)).tolist()
            x.line("equal steps", How(uniform, FINAL[bits][1], 2))
        if bits in FINAL and args.part in ("final", "all"):
            head(f"n{bits}")
            x.line(f"n{bits}", How(*FINAL[bits]))


if __name__ == "__main__":
    main()
