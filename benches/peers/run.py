#!/usr/bin/env python3
"""Attar against its peers on this machine: installs them, prepares one model for all, measures in turns, reports.

Contestants: llama.cpp (llama-cpp-python built natively), the same built for AVX2 only, OpenVINO GenAI, and Attar's native
and x86-64-v3 code. In each round every contestant runs once, in a process of its own with one warm-up, one after the
other, so that what disturbs the machine disturbs all. Reported are medians over the rounds.

Python of the standard library; what it needs it installs into virtual environments below the work folder.
"""

import argparse
import fnmatch
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bar
import environments
import report
from environments import Absent
from models import Models

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EXAMPLES = """examples:
  benches/peers/run.py --attar target/release/attar
  benches/peers/run.py --model 1b --attar target/release/attar --rounds 3
  benches/peers/run.py --skip attar,attar-v3,llama-avx2 --threads 1,2
  benches/peers/run.py --only 'llama/Q4_*' --tests tg128,tg128@4096
  benches/peers/run.py --report-only
"""
# name of the system: formats
CONTESTANTS = {
    "llama": ["Q4_0", "Q4_K_M", "Q8_0"],
    "llama-avx2": ["Q4_0", "Q4_K_M"],
    "openvino": ["int4", "int8"],
    "attar": ["n4", "w8"],
    "attar-v3": ["n4"],
}
TESTS = {
    "smollm2": ["pp512", "tg128", "tg128@4096", "tg128x4"],
    "1b": ["pp512", "tg64"],
}


def parse_test(name):
    """`pp512`, `tg128`, `tg128@4096` behind 4096 tokens, `tg128x4` for four sequences at once."""
    kind, rest = name[:2], name[2:]
    rest, _, depth = rest.partition("@")
    tokens, _, rows = rest.partition("x")
    numbers = [tokens, *(n for n in (depth, rows) if n)]
    if kind not in ("pp", "tg") or not all(n.isdigit() for n in numbers):
        raise SystemExit(f"--tests: {name} is not like pp512, tg128, tg128@4096 or tg128x4")
    return {"name": name, "kind": kind, "tokens": int(tokens), "depth": int(depth or 0), "rows": int(rows or 1)}


class Load:
    """How much other processes computed meanwhile, from the system's and the children's processor times."""

    def __init__(self):
        self.start, self.busy, self.own = time.monotonic(), self._busy(), self._own()

    @staticmethod
    def _busy():
        try:
            fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except OSError:
            return None
        # Everything but idle and waiting; stolen time counts, guest time is in user time already.
        return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    def cores(self):
        """Cores that others took on average since the start; `None` where the system does not say."""
        busy, wall = self._busy(), time.monotonic() - self.start
        if busy is None or self.busy is None or wall <= 0:
            return None
        return max(0.0, (busy - self.busy - (self._own() - self.own)) / wall)


def wait_until_quiet(limit, seconds):
    """Returns when others take less than `limit` cores, or after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load = Load()
        time.sleep(0.5)
        taken = load.cores()
        if taken is None or taken < limit:
            return


class Contestant:
    def __init__(self, system, quality, files, environment, options):
        self.name, self.system = f"{system}/{quality}", system
        self.options = options
        if system.startswith("llama"):
            self.environment = environment(system)
            self.file = files.gguf(quality)
        elif system == "openvino":
            self.environment = environment(system)
            self.file = files.openvino(quality)
        else:
            if not options.attar:
                raise Absent("no --attar BINARY was given")
            if not Path(options.attar).is_file():
                raise Absent(f"{options.attar} does not exist; cargo build --release makes target/release/attar")
            self.file = files.artifact(options.attar, quality)

    def takes(self, test):
        """Only Attar generates several sequences at once here; deep contexts are asked of the native builds."""
        ours = self.system.startswith("attar")
        return (ours or test["rows"] == 1) and (not test["depth"] or self.system not in ("llama-avx2", "attar-v3"))

    def command(self, tests, threads, seed):
        repetitions = str(self.options.repetitions)
        if not self.system.startswith("attar"):
            probe = "openvino_probe.py" if self.system == "openvino" else "llama_probe.py"
            command = [self.environment.python, str(HERE / probe)]
            command += [] if self.system == "openvino" else ["measure"]
            command += [str(self.file), "--tests", json.dumps(tests), "--threads", str(threads)]
            return [*command, "--repetitions", repetitions, "--seed", str(seed)]
        most = {kind: max((t["tokens"] for t in tests if t["kind"] == kind), default=0) for kind in ("pp", "tg")}
        rows = sorted({t["rows"] for t in tests if t["kind"] == "tg"}) or [1]
        command = [self.options.attar, "bench", str(self.file), "--threads", str(threads), "--json"]
        command += ["--repetitions", repetitions, "--prompt", str(most["pp"]), "--generate", str(most["tg"])]
        command += ["--context", str(tests[0]["depth"]), "--batch", str(max(rows))]
        return command + (["--target", "x86-64-v3"] if self.system == "attar-v3" else [])

    def measure(self, tests, threads, seed):
        """Samples as a list of {test, variant, samples}, load time, and how the system describes itself."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "GOMP_"))}
        done = subprocess.run(
            self.command(tests, threads, seed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, check=False
        )
        if done.returncode != 0:
            raise Absent(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        if self.system.startswith("attar"):
            results = [{"test": t["test"], "variant": "", "samples": t["samples"]} for t in answer["tests"]]
            system = f"attar {answer['target']}"
            return {"load_seconds": answer["open_seconds"], "system": system, "results": results}
        return answer


def measure_rounds(contestants, options, say, absent, bandwidth):
    samples, tests = [], options.tests
    for number in range(options.rounds):
        for threads in options.threads:
            wait_until_quiet(options.quiet, options.wait)
            read = read_bandwidth(options, threads)
            if read:
                bandwidth[threads].append(read)
                say(f"round {number + 1}, {threads} threads, pure read: {read / 1e9:.1f} GB/s")
            # Deep contexts run apart: filling them takes longer than all else together.
            for depth in sorted({t["depth"] for t in tests}):
                for contestant in contestants:
                    if contestant.name in absent:
                        continue
                    chosen = [t for t in tests if t["depth"] == depth and contestant.takes(t)]
                    if not chosen:
                        continue
                    wait_until_quiet(options.quiet, options.wait)
                    load = Load()
                    try:
                        answer = contestant.measure(chosen, threads, number + 1)
                    except Absent as reason:
                        say(f"{contestant.name}: {reason}")
                        absent[contestant.name] = str(reason)
                        continue
                    answer.update(contestant=contestant.name, round=number, threads=threads, others=load.cores())
                    samples.append(answer)
                    best = {}
                    for r in answer["results"]:
                        best[r["test"]] = max(best.get(r["test"], 0.0), statistics.median(r["samples"]))
                    words = ", ".join(f"{t} {v:.1f}" for t, v in best.items())
                    say(f"round {number + 1}, {threads} threads, {contestant.name}: {words} tok/s, others took {answer['others'] or 0:.2f} cores")
                    options.keep(samples)
    return samples


def machine():
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def read_bandwidth(options, threads):
    """Bytes per second of a pure read loop, from the kernel benchmark; `None` when it is not built."""
    if not options.benches or not Path(options.benches).is_file():
        return None
    command = [options.benches, "bandwidth", "--threads", str(threads), "--seconds", "0.5", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout)["bytes_per_second"] if done.returncode == 0 else None


def weight_bytes(attar, artifact):
    """What one decode step reads, as the artifact says."""
    done = subprocess.run([attar, "inspect", str(artifact), "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return None
    programs = json.loads(done.stdout)["programs"]
    return min(p["weight_bytes"] for p in programs)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"{s}/{q}" for s, qs in CONTESTANTS.items() for q in qs]
    add = parser.add_argument
    add("--work", type=Path, default=ROOT / "target" / "peers", help="environments, models and results (default: %(default)s)")
    add("--out", type=Path, help="where results go (default: WORK/results/MODEL)")
    add("--model", choices=list(TESTS), default="smollm2")
    add("--attar", help="the attar binary; without it only the peers are measured")
    add("--benches", help="the attar-benches binary, for the read bandwidth (default: beside --attar)")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--repetitions", type=int, default=2, help="samples a process takes after its warm-up (default: %(default)s)")
    add("--threads", default="2", help="thread counts, separated by commas (default: %(default)s)")
    add("--tests", help=f"default: {', '.join(TESTS['smollm2'])}; for 1b {', '.join(TESTS['1b'])}")
    add("--only", action="append", default=[], metavar="PATTERN", help=f"of {', '.join(names)}; may be repeated")
    add("--skip", default="", metavar="SYSTEMS", help=f"of {', '.join(CONTESTANTS)}, separated by commas")
    add("--cc", default="clang")
    add("--cxx", default="clang++")
    add("--llama-package", metavar="FILE", help="a source archive of llama-cpp-python instead of PyPI's")
    add("--quiet", type=float, default=0.2, metavar="CORES", help="wait before a run until others take less (default: %(default)s)")
    add("--wait", type=float, default=20, metavar="SECONDS", help="but not longer than this (default: %(default)s)")
    add("--prepare-only", action="store_true", help="install and make the models, measure nothing")
    add("--report-only", action="store_true", help="report what was measured last")
    options = parser.parse_args()
    options.threads = [int(t) for t in options.threads.split(",")]
    options.tests = [parse_test(t) for t in (options.tests.split(",") if options.tests else TESTS[options.model])]
    options.work = options.work.resolve()
    options.out = (options.out or options.work / "results" / options.model).resolve()
    if options.attar:
        options.attar = str(Path(options.attar).resolve())
        options.benches = options.benches or str(Path(options.attar).with_name("attar-benches"))
    unknown = {s for s in options.skip.split(",") if s} - set(CONTESTANTS)
    if unknown:
        parser.error(f"--skip: no system {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    for pattern in options.only:
        if not fnmatch.filter(names, pattern):
            parser.error(f"--only {pattern}: matches none of {', '.join(names)}")
    return options


def main():
    options = arguments()
    began = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    made = {}

    def environment(name):
        if name not in made:
            try:
                made[name] = environments.make(name, options.work, options, say)
            except Absent as reason:
                made[name] = reason
        if isinstance(made[name], Absent):
            raise made[name]
        return made[name]

    results = options.out / "results.json"
    if options.report_only:
        if not results.is_file():
            raise SystemExit(f"{results} does not exist: nothing was measured yet")
        outcome = json.loads(results.read_text())
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        files = Models(options.work, options.model, environment, say)
        contestants, absent = [], {}
        for system, qualities in CONTESTANTS.items():
            for quality in qualities:
                name = f"{system}/{quality}"
                if options.only and not any(fnmatch.fnmatch(name, p) for p in options.only):
                    continue
                if system in options.skip.split(","):
                    absent[name] = "left out by --skip"
                    continue
                try:
                    contestants.append(Contestant(system, quality, files, environment, options))
                except Absent as reason:
                    say(f"{name}: {reason}")
                    absent[name] = str(reason)
        if options.prepare_only:
            return
        outcome = {"machine": machine(), "model": options.model, "absent": absent, "rounds": options.rounds}
        outcome["tests"] = [t["name"] for t in options.tests]
        outcome["quiet"] = options.quiet
        outcome["bandwidth"] = {t: [] for t in options.threads}
        ours = next((c for c in contestants if c.name == "attar/n4"), None)
        outcome["weight_bytes"] = weight_bytes(options.attar, ours.file) if ours else None

        def keep(samples):
            outcome["samples"] = samples
            results.write_text(json.dumps(outcome, indent=1))

        options.keep = keep
        keep(measure_rounds(contestants, options, say, absent, outcome["bandwidth"]))
    summary = report.summarize(outcome)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    text = report.markdown(outcome, summary)
    (options.out / "results.md").write_text(text)
    print(text)
    try:
        print(environment("tools").run(str(HERE / "plot.py"), options.out / "summary.json", options.out).strip())
    except Absent as reason:
        print(f"no plot: {reason}")


if __name__ == "__main__":
    main()
