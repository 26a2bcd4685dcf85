"""Drives OpenVINO GenAI's `LLMPipeline` on the CPU. Runs inside the environment that has openvino-genai.

Prompts are raw token ids, without a chat template; generation is greedy and ignores the end of text. `pp N`: N divided by
the time to the first token of an N-token prompt. `tg N`: N divided by the time of the N tokens after the first, behind a
prompt of one token; `tg N @ D`: behind a prompt of D tokens. Each run has a prompt of its own, since the pipeline keeps
a prefix cache. Load time is the construction of the pipeline: reading, compiling, repacking. Prints one JSON object.
"""

import argparse
import json
import random
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


class Bench:
    def __init__(self, folder, threads, seed):
        start = time.perf_counter()
        self.pipeline = genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
        self.load_seconds = time.perf_counter() - start
        self.random = random.Random(seed)
        with open(f"{folder}/config.json") as f:
            self.n_vocab = json.load(f)["vocab_size"]

    def run(self, prompt, generate):
        """Seconds to the first token and seconds of those that follow."""
        ids = np.array([[self.random.randrange(self.n_vocab) for _ in range(prompt)]], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = generate + 1
        config.ignore_eos = True
        config.do_sample = False
        times = []

        def on_token(_):
            times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        start = time.perf_counter()
        result = self.pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        assert len(result.tokens[0]) == generate + 1, (len(result.tokens[0]), generate + 1)
        first = metrics.get_ttft().mean / 1e3
        stamps = [float(t) for t in metrics.raw_metrics.m_new_token_times]
        rest = (stamps[-1] - stamps[0]) / 1e3 if len(stamps) > 1 else 0.0
        return first, rest, time.perf_counter() - start

    def samples(self, test, repetitions):
        """`repetitions` samples after one warm-up."""
        samples = []
        for _ in range(repetitions + 1):
            if test["kind"] == "pp":
                first, rest, wall = self.run(test["tokens"], 0)
                samples.append(test["tokens"] / first)
            else:
                first, rest, wall = self.run(max(test["depth"], 1), test["tokens"])
                samples.append(test["tokens"] / rest)
        return samples[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that optimum-cli export openvino wrote")
    parser.add_argument("--tests", required=True, help="JSON: list of {name, kind: pp|tg, tokens, depth}")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bench = Bench(options.model, options.threads, options.seed)
    results = [
        {"test": test["name"], "variant": "", "samples": bench.samples(test, options.repetitions)}
        for test in json.loads(options.tests)
    ]
    system = f"openvino {ov.__version__}, openvino-genai {genai.__version__}"
    print(json.dumps({"load_seconds": bench.load_seconds, "system": system, "results": results}))


if __name__ == "__main__":
    main()
