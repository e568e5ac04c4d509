#!/usr/bin/env bash
# All GPU tests and benchmarks on a CUDA machine, results into benchmarks/results/ (or the folder given):
#
#   benchmarks/gpu.sh [FOLDER]
#
# Needs crosscoder installed with its tests (pip install -e '.[dev]'); PYTHON names another interpreter. Without a GPU it
# does the same with sizes so tiny that Triton's interpreter can: that shows that everything runs, no more.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=${1:-}
if [[ $("$python" -c 'import torch; print(torch.cuda.is_available())') == True ]]; then
  results=${results:-benchmarks/results}
  tests=(tests/kernels tests/backends tests/model tests/train)
  gate=()
  size=()
else
  echo "no CUDA device: tiny sizes in the interpreter" >&2
  results=${results:-$(mktemp -d)}
  tests=(tests/backends/test_triton_step.py -k "(each_gradient and snapshot-tanh-quad) or wrong_shape or device")
  gate=(--arch 90 --size 160m --variant plain)
  size=(--tiny)
  export TRITON_INTERPRET=1
fi
mkdir -p "$results"

status=0
stage() { printf '\n=== %s (%ds)\n' "$1" "$SECONDS"; }
try() { "$@" || { status=1; echo "failed: $*" >&2; }; } # the rest still runs

stage "device"
try "$python" -m crosscoder doctor
if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv; fi

stage "tests"
try "$python" -m pytest -q "${tests[@]}"

stage "kernels as compiled"
try env -u TRITON_INTERPRET "$python" -W ignore tools/compile_gate.py "${gate[@]}" --json "$results/compile-gate.json"

stage "the model of time"
try "$python" benchmarks/gpu_model.py

stage "steps"
try "$python" benchmarks/gpu_step.py "${size[@]}" --json "$results/gpu-step.json"

if ((${#size[@]} == 0)); then
  stage "benchmarks"
  try "$python" -m pytest -q benchmarks --device cuda --full --results "$results"
fi

stage "done: $results"
exit "$status"
