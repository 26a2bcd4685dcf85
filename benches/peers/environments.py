"""Virtual environments of the peers, made once below the work folder from packages of PyPI.

An environment that cannot be made is `Absent` with the reason: the report names it, nothing is skipped in silence.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Versions are fixed, so that two runs compare the same peers; raise them together with the figures.
LLAMA = "llama-cpp-python==0.3.36"
TOOLS = ["numpy", "gguf==0.19.0", "matplotlib"]
OPENVINO = ["openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.15.0"]

# Only the library is wanted, none of its programs.
LLAMA_COMMON = ["-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
LLAMA_BUILDS = {
    "llama": ["-DGGML_NATIVE=ON"],
    "llama-avx2": ["-DGGML_NATIVE=OFF"]
    + [f"-DGGML_{f}=ON" for f in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")]
    + [f"-DGGML_{f}=OFF" for f in ("AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")]
    + [f"-DGGML_AMX_{f}=OFF" for f in ("TILE", "INT8", "BF16")],
}


class Absent(Exception):
    """Why a peer is not there."""


@dataclass
class Environment:
    name: str
    folder: Path

    @property
    def python(self):
        return str(self.folder / "bin" / "python")

    def run(self, script, *args, capture=False):
        """Runs a script of this folder or `-m MODULE`; raises `Absent` with its last words when it fails."""
        command = [self.python, *([script] if isinstance(script, str) else script), *map(str, args)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise Absent(f"{' '.join(command[1:4])} failed: {done.stdout.strip()[-800:]}")
        return done.stdout


def compiler(cc, cxx):
    missing = [c for c in (cc, cxx) if not shutil.which(c)]
    if missing:
        raise Absent(
            f"{' and '.join(missing)} not found; llama.cpp is built from source with clang "
            "(Debian: clang libomp-dev; with --cc and --cxx another compiler)"
        )


def make(name, work, options, say):
    """The environment `name`, made if needed."""
    folder = work / "env" / name
    marker = folder / "ready.json"
    env = dict(os.environ)
    if name in LLAMA_BUILDS:
        compiler(options.cc, options.cxx)
        flags = " ".join(LLAMA_COMMON + LLAMA_BUILDS[name])
        env.update(CC=options.cc, CXX=options.cxx, CMAKE_ARGS=flags)
        env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        # The same version builds differently for each environment, so a cached wheel would be the wrong one.
        packages = ["--no-cache-dir", "--no-binary=llama-cpp-python", options.llama_package or LLAMA]
        want = {"packages": [LLAMA], "cc": options.cc, "cxx": options.cxx, "cmake": flags}
    else:
        packages = {"tools": TOOLS, "openvino": OPENVINO}[name]
        want = {"packages": packages}
    if marker.is_file() and json.loads(marker.read_text()) == want:
        return Environment(name, folder)
    say(f"making environment {name}: {' '.join(want['packages'])}")
    made = Environment(name, folder)
    if not Path(made.python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    log = work / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        command = [made.python, "-m", "pip", "install", "-v", *packages]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, check=False).returncode
    if code != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise Absent(f"pip install failed ({log}): {' / '.join(last)}")
    marker.write_text(json.dumps(want, indent=2))
    return made
