#!/usr/bin/env bash
# Everything for the day a GPU is there, in at most 9 minutes, most informative first:
#
#   benchmarks/gpu.sh [FOLDER]              on a CUDA machine; results into benchmarks/results/gpu, or FOLDER
#   benchmarks/gpu.sh --tiny [FOLDER]       anywhere, in Triton's interpreter: does every part run? Times mean nothing.
#
# It needs no network. The interpreter is $PYTHON, or .venv/bin/python where it has crosscoder, or python3; where that has
# no crosscoder, a wheel from .whl/ is installed beside it (or the source is built), into a folder of its own.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
tiny=()
if [[ ${1:-} == --tiny ]]; then
  tiny=(--tiny)
  export TRITON_INTERPRET=1
  shift
fi
status=0
stage() { printf '\n=== %s (%ds)\n' "$1" "$SECONDS"; }
try() { "$@" || { status=1; echo "failed: $*" >&2; }; } # the rest still runs

stage "install"
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import crosscoder._core' 2>/dev/null || {
  python=${PYTHON:-python3}
  site=${TMPDIR:-/tmp}/crosscoder-site
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl 2>/dev/null ||
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$site" . ||
    { echo "crosscoder cannot be installed here: put a wheel for this Python into .whl/" >&2; exit 1; }
  export PYTHONPATH=$site
}
if ((${#tiny[@]} == 0)); then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no CUDA device here; nothing is measured. --tiny runs the parts in the interpreter." >&2
    exit 1
  }
fi
results=${1:-$( ((${#tiny[@]})) && mktemp -d || echo benchmarks/results/gpu)}
mkdir -p "$results"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv

stage "tests"
workers=() # compiling hundreds of small kernels is the CPU's work
"$python" -c 'import xdist' 2>/dev/null && ((${#tiny[@]} == 0)) && workers=(-n 8)
if ((${#tiny[@]})); then
  try "$python" -m pytest -q -p no:cacheprovider tests/backends/test_triton_step.py \
    -k "(each_gradient and snapshot-tanh-quad) or wrong_shape or device"
else
  try timeout 180 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels tests/backends -k triton \
    >"$results/tests.txt" 2>&1
  tail -25 "$results/tests.txt"
fi

stage "measurements"
budget=240
((${#tiny[@]})) && budget=3000
try timeout $((budget + 60)) "$python" benchmarks/gpu_run.py "${tiny[@]}" --budget "$budget" --out "$results/gpu.jsonl"

if ((${#tiny[@]})); then
  echo "compute-sanitizer needs a GPU: left out"
elif command -v compute-sanitizer >/dev/null; then
  stage "compute-sanitizer"
  try timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
    tests/backends/test_triton_step.py -k "each_gradient and sparse and tanh-quad" >"$results/sanitizer.txt" 2>&1
  tail -3 "$results/sanitizer.txt"
else
  echo "compute-sanitizer is not here: memory accesses are not checked" >&2
fi

stage "done: $results"
exit "$status"
