#!/usr/bin/env bash
# Everything that needs a GPU, in one go: makes models of three shapes with random weights from a seed, compares the GPU's
# results with the CPU's, and times the GPU beside PyTorch. Needs an NVIDIA driver for CUDA 13, NVRTC 13 (see `attar doctor`),
# Python 3 with numpy, and for comparison torch and transformers, and a `llama-batched-bench` in PATH with Python's gguf; says what
# is missing. Downloads nothing.
#
#   benches/gpu.sh [FOLDER]
#
# ATTAR names the command (default: built here). SHAPES chooses among smollm2, 1b and 8b. FOLDER gets the models (25 GB with
# 8b, removed one after the other) and results.json.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/gpu}
attar=${ATTAR:-target/release/attar}
if [ -z "${ATTAR:-}" ]; then
  cargo build --release --locked -p attar
fi
"$attar" doctor
exec python3 benches/gpu.py --attar "$attar" --folder "$folder" --shapes "${SHAPES:-smollm2,1b,8b}"
