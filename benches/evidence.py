#!/usr/bin/env python3
"""What each format costs with each way of choosing codes: bytes, divergence, speed and the work of compiling, as one table.

Compiles a checkpoint once for every row, compares all artifacts with the uncompressed model on one text, times them, and, with
--llama, does the same with llama.cpp's formats: importance matrix of the same calibration text, divergence from its own f16
file by llama-perplexity. What is in the work folder already is not made again, so an interrupted run goes on.

    cargo build --release -p attar
    benches/evidence.py MODEL --calibrate mixed.txt --text wiki.valid.txt --work evidence
    benches/evidence.py MODEL ... --llama llama.cpp/build/bin --gguf model-f16.gguf

Needs Python 3.10, and nothing else. Run it on a quiet machine for the sake of the speeds; all else does not depend on that.
"""

import argparse
import json
import os
import re
import subprocess
import time
from pathlib import Path

# How codes are chosen: pass, options, and whether it reads calibration text.
METHODS = {
    "rounding": ("quantize-rtn", "search = false\nimportance = false", False),
    "scale search": ("quantize-rtn", "importance = false", False),
    "search by importance": ("quantize-rtn", "", True),
    "GPTQ": ("quantize-gptq", "correct_drift = 0.0", True),
    "GPTQ, drift corrected": ("quantize-gptq", "", True),
    "GPTQ, drift corrected, guided": ("quantize-gptq", "guidance = 1.0", True),
}
FORMATS = ["n2", "n3", "n4", "n5", "n6", "w8"]
# w8 has nothing to search.
UNSUITED = {("w8", "scale search"), ("w8", "search by importance")}
BUDGETS = ["60MB", "74MB", "84MB", "94MB"]
LLAMA = ["Q2_K", "IQ2_M", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
# Artifacts compared in one go: each has its weights in memory.
AT_ONCE = 8


def recipe(form, method):
    """Layers in the format, embedding and head in n6 (or w8), so that rows differ in what they are about."""
    name, options, _ = METHODS[method]
    head = "w8" if form == "w8" else "n6"
    return (
        f'[[pass]]\nname = "{name}"\ntensors = ["model.layers.*"]\nformat = "{form}"\n{options}\n\n'
        f'[[pass]]\nname = "quantize-rtn"\nexclude = ["model.layers.*"]\nformat = "{head}"\nimportance = false\n'
    )


def rows(options):
    """(name, label, method, arguments of `attar compile`)."""
    text = ["--calibrate", options.calibrate, "--calibration-windows", str(options.calibration_windows)]
    for form in FORMATS:
        for method, (_, _, calibrated) in METHODS.items():
            if (form, method) in UNSUITED:
                continue
            name = f"{form}-{method.replace(',', '').replace(' ', '-')}"
            file = options.work / f"{name}.toml"
            file.write_text(recipe(form, method))
            yield name, form, method, ["--recipe", file, *(text if calibrated else [])]
    for budget in BUDGETS:
        yield f"mixed-{budget}", f"mixed, {budget[:-2]} MB", "quantize-mixed", ["--max-bytes", budget, *text]


def timed(command, log):
    """Runs; wall-clock and processor seconds, and the most memory held, in bytes."""
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed, see {log}: {' '.join(map(str, command))}")
    return {
        "wall_seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def once(file, make):
    """The JSON in `file`; made and kept when it is not there."""
    if not file.exists():
        result = make()
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2))
        part.rename(file)
    return json.loads(file.read_text())


def answer(command):
    return json.loads(subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE).stdout)


def attar_rows(options):
    made = []
    reference = options.work / "reference.attar"
    exact = ["--quantize", "f32", "--kv", "f32", "--no-certify", "-o", reference]
    once(
        options.work / "reference.made.json",
        lambda: timed([options.attar, "compile", options.model, *exact], options.work / "reference.log"),
    )
    wanted = [r for r in rows(options) if not options.only or re.search(options.only, r[0])]
    for name, label, method, arguments in wanted:
        file = options.work / f"{name}.attar"
        command = [options.attar, "compile", options.model, *arguments, "--no-certify", "-o", file]
        print(f"compiling {name}", flush=True)
        cost = once(
            options.work / f"{name}.made.json", lambda: timed(command, options.work / f"{name}.log")
        )
        made.append({"name": name, "label": label, "method": method, "file": file, "cost": cost})
    missing = [m for m in made if not (options.work / f"{m['name']}.eval.json").exists()]
    for first in range(0, len(missing), AT_ONCE):
        part = missing[first : first + AT_ONCE]
        files = [m["file"] for m in part]
        print("evaluating " + " ".join(m["name"] for m in part), flush=True)
        told = answer(
            [options.attar, "eval", *files, "--against", reference, "--text", options.text]
            + ["--windows", options.windows, "--json"]
        )
        for m, quality in zip(part, told if isinstance(told, list) else [told]):
            (options.work / f"{m['name']}.eval.json").write_text(json.dumps(quality, indent=2))
    for m in made:
        m["quality"] = json.loads((options.work / f"{m['name']}.eval.json").read_text())
        print(f"timing {m['name']}", flush=True)
        speed = once(
            options.work / f"{m['name']}.bench.json",
            lambda: answer([options.attar, "bench", m["file"], "--repetitions", "3", "--json"]),
        )
        m["speed"] = {test["test"]: test["tokens_per_second"] for test in speed["tests"]}
    return made


def llama_rows(options):
    tool = lambda name: options.llama / f"llama-{name}"
    work, threads = options.work, ["-t", str(options.threads)]
    matrix, base = work / "imatrix.gguf", work / "base.kld"
    common = ["-f", options.text, "-c", "512", "--chunks", str(options.windows), *threads]
    chunks = ["--chunks", str(options.calibration_windows)]
    print("llama.cpp: importance matrix and reference", flush=True)
    once(
        work / "imatrix.made.json",
        lambda: timed(
            [tool("imatrix"), "-m", options.gguf, "-f", options.calibrate, "-o", matrix, "-c", "512", *chunks, *threads],
            work / "imatrix.log",
        ),
    )
    once(
        work / "base.made.json",
        lambda: timed(
            [tool("perplexity"), "-m", options.gguf, *common, "--kl-divergence-base", base], work / "base.log"
        ),
    )
    for form in options.llama_formats.split(","):
        file, log = work / f"{form}.gguf", work / f"{form}.log"
        print(f"llama.cpp: {form}", flush=True)
        cost = once(
            work / f"{form}.made.json",
            lambda: timed(
                [tool("quantize"), "--imatrix", matrix, options.gguf, file, form, str(options.threads)], log
            ),
        )
        compare = ["--kl-divergence-base", base, "--kl-divergence"]
        once(
            work / f"{form}.eval.json",
            lambda: timed([tool("perplexity"), "-m", file, *common, *compare], work / f"{form}.eval.log"),
        )
        speed = once(
            work / f"{form}.bench.json",
            lambda: answer([tool("bench"), "-m", file, "-p", "512", "-n", "128", "-r", "3", "-o", "json", *threads]),
        )
        yield {
            "name": form,
            "label": f"llama.cpp {form}",
            "method": "importance matrix",
            "file": file,
            "cost": cost,
            "quality": llama_quality((work / f"{form}.eval.log").read_text()),
            "speed": {("pp512" if s["n_gen"] == 0 else "tg128"): s["avg_ts"] for s in speed},
        }


def llama_quality(log):
    """What llama-perplexity prints at its end, under Attar's names."""

    def number(pattern, what):
        found = re.search(pattern + r"\s*:\s*(-?[\d.]+)(?:\s*±\s*([\d.]+))?", log)
        if not found:
            raise SystemExit(f"llama-perplexity printed no {what}")
        return [float(x) if x else None for x in found.groups()]

    ppl, _ = number(r"Mean PPL\(Q\)", "perplexity")
    ratio, _ = number(r"Mean PPL\(Q\)/PPL\(base\)", "ratio")
    kld, error = number(r"Mean\s+KLD", "divergence")
    p99, _ = number(r"99\.0%\s+KLD", "percentile")
    top1, _ = number(r"Same top p", "agreement")
    return {"ppl": ppl, "ppl_ratio": ratio, "kld": kld, "kld_error": error, "kld_p99": p99, "top1": top1 / 100}


def table(all_rows):
    head = ["format", "codes", "MB", "perplexity", "ratio", "KLD", "KLD 99 %", "top-1", "pp512", "tg128", "compile, processor min"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in all_rows:
        q, speed = row["quality"], row["speed"]
        pick = lambda test: next((f"{v:.0f}" for k, v in speed.items() if k.replace(" ", "").startswith(test)), "")
        cells = [
            row["label"],
            row["method"],
            f"{row['file'].stat().st_size / 1e6:.1f}",
            f"{q['ppl']:.3f}",
            f"{q['ppl_ratio']:.3f}",
            f"{q['kld']:.4f} ± {q['kld_error']:.4f}",
            f"{q['kld_p99']:.3f}",
            f"{100 * q['top1']:.1f} %",
            pick("pp512"),
            pick("tg128"),
            f"{row['cost']['cpu_seconds'] / 60:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, as `attar compile` takes it")
    parser.add_argument("--attar", type=Path, default=Path("target/release/attar"))
    parser.add_argument("--calibrate", type=Path, required=True, help="text that codes are chosen by")
    parser.add_argument("--calibration-windows", type=int, default=96)
    parser.add_argument("--text", type=Path, required=True, help="text that is predicted")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--only", help="regular expression over the names of rows, e.g. '^n4|mixed'")
    parser.add_argument("--llama", type=Path, help="folder with llama-imatrix, -quantize, -perplexity and -bench")
    parser.add_argument("--llama-formats", default=",".join(LLAMA), help="which of llama.cpp's formats")
    parser.add_argument("--gguf", type=Path, help="the checkpoint as f16 GGUF")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for llama.cpp")
    options = parser.parse_args()
    if options.llama and not options.gguf:
        parser.error("--llama needs --gguf")
    options.work.mkdir(parents=True, exist_ok=True)
    made = attar_rows(options)
    if options.llama:
        made += llama_rows(options)
    made.sort(key=lambda row: row["file"].stat().st_size)
    text = table(made)
    (options.work / "evidence.md").write_text(text)
    plain = [row | {"file": str(row["file"])} for row in made]
    (options.work / "evidence.json").write_text(json.dumps(plain, indent=2))
    print(text)


if __name__ == "__main__":
    main()
