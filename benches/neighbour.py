#!/usr/bin/env python3
"""Generation speed beside a busy process that is pinned to one of two cores.

    benches/neighbour.py ATTAR ARTIFACT [--rounds N] [--other ATTAR ARTIFACT] [--json]

In every round it measures one thread and two threads undisturbed, then two threads while a shell loop keeps core 1
busy, and prints medians over the rounds. Beside the neighbour two threads should keep 45 % of their own undisturbed
speed and 90 % of one thread's. `--other` measures a second program in the same rounds. On a machine that does other
work besides, nothing of this means much: run it where it is quiet.
"""

import argparse
import json
import statistics
import subprocess
import sys

TOKENS, RUNS = 64, 3
NEEDED = {"of two threads": 0.45, "of one thread": 0.90}


def speed(attar, artifact, threads):
    command = [attar, "--quiet", "bench", artifact, "--threads", str(threads), "--prompt", "0"]
    command += ["--generate", str(TOKENS), "--repetitions", str(RUNS), "--json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out)["tests"][0]["samples"]


def beside_a_neighbour(measure):
    loop = subprocess.Popen(["taskset", "-c", "1", "sh", "-c", "while :; do :; done"])
    try:
        return measure()
    finally:
        loop.kill()
        loop.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attar")
    parser.add_argument("artifact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", nargs=2, metavar=("ATTAR", "ARTIFACT"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    programs = [(args.attar, args.artifact)] + ([tuple(args.other)] if args.other else [])
    samples = [{"one": [], "two": [], "two beside a neighbour": []} for _ in programs]
    for _ in range(args.rounds):
        for program, found in zip(programs, samples):
            found["one"] += speed(*program, 1)
            found["two"] += speed(*program, 2)
            found["two beside a neighbour"] += beside_a_neighbour(lambda: speed(*program, 2))
    report = []
    for program, found in zip(programs, samples):
        median = {name: statistics.median(values) for name, values in found.items()}
        beside = median["two beside a neighbour"]
        kept = {"of two threads": beside / median["two"], "of one thread": beside / median["one"]}
        report.append({"program": program, "median": median, "kept": kept, "samples": found})
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    for r in report:
        print(r["program"][0])
        for name, value in r["median"].items():
            print(f"  {name:24} {value:8.1f} tokens/s")
        for name, value in r["kept"].items():
            print(f"  kept {name:19} {value:8.2f}   (needed {NEEDED[name]:.2f})")


if __name__ == "__main__":
    main()
