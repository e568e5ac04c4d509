"""The kernels compile for GPUs that are not here: no spills, tensor cores, shared memory within the limit.

One size and architecture by default; `python tools/compile_gate.py` does all of them, and its table is
benchmarks/results/compile-gate.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compile_gate import SHARED_LIMIT, Compiled

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compile-gate.json"
GOOD = Compiled(90, "160m", "plain", "threshold_tiles", "", 8, 128, 0, 0, 4096, 1000, 12)


def run_gate(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here Triton may be its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tools")
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gate_passes(tmp_path: Path) -> None:
    out = tmp_path / "gate.json"
    arguments = ["gate", "--arch", "90", "--size", "160m", "--variant", "plain", "--json", str(out)]
    result = run_gate(f"import sys; sys.argv = {arguments}; from compile_gate import main; main()")
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = {row["kernel"] for row in json.loads(out.read_text())["rows"]}
    assert {
        "mark_candidates",
        "score_parts",
        "decode_rows",
        "pair_gradients",
        "threshold_tiles",
        "update_rows",
    } <= kernels


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gate_fails_on_a_kernel_that_spills() -> None:
    code = """
import torch
import compile_gate
from crosscoder.kernels.threshold import triton as threshold
threshold.TILES[torch.float32] = (128, 128, 32, 8)
rows = compile_gate.gate([90], ["160m"], ["plain"])
print([row.kernel for row in rows if row.faults()])
"""
    result = run_gate(code)
    assert "['threshold_tiles']" in result.stdout, result.stdout + result.stderr


def test_faults() -> None:
    assert GOOD.faults() == []
    for change in (
        {"spill_bytes": 8},
        {"spill_instructions": 1},
        {"shared_bytes": SHARED_LIMIT[90] + 1},
        {"tensor_core": 0},
    ):
        assert len(dataclasses.replace(GOOD, **change).faults()) == 1, change  # type: ignore[arg-type]


def test_the_committed_table_is_complete_and_without_faults() -> None:
    document = json.loads(RESULTS.read_text())
    rows = [Compiled(**row) for row in document["rows"]]
    assert {row.arch for row in rows} == set(SHARED_LIMIT)
    assert {row.size for row in rows} == {"160m", "6.9b"}
    assert [row for row in rows if row.faults()] == []
