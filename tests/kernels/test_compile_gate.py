"""The kernels compile for GPUs that are not here: no spills, shared memory and instructions within their limits.

One size and architecture by default; `python tools/compile_gate.py` does all of them, and its table is
benchmarks/results/compile-gate.json.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from compile_gate import INSTRUCTIONS_A_PARAMETER, SHARED_LIMIT, VARIANTS, Compiled, committed, update_work
from sass import Program

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compile-gate.json"
GOOD = Compiled(90, "6.9b", "plain", "update_rows", "EIGHT_BIT=1 EVEN=1", 1, 150, 8, 1, 0, 1000, 0, 0, 57.0, 4.0)


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
    kernels = {row.kernel for rows in committed(out).values() for row in rows}
    assert {
        "mark_candidates",
        "score_parts",
        "decode_rows",
        "pair_gradients",
        "window_sums",
        "update_rows",
    } <= kernels


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gate_fails_on_a_kernel_that_spills() -> None:
    code = """
import compile_gate
from crosscoder.backends import triton
triton.ROW_REGISTERS = 48
rows = compile_gate.gate([90], ["6.9b"], ["dense"])
print([row.kernel for row in rows if row.faults()])
"""
    result = run_gate(code)
    assert "['update_rows']" in result.stdout, result.stdout + result.stderr


def test_faults() -> None:
    assert GOOD.faults() == []
    for change in (
        {"spill_bytes": 24},
        {"shared_bytes": SHARED_LIMIT[90] + 1},
        {"products": 1},
        {"a_parameter": 60.1},
    ):
        assert len(dataclasses.replace(GOOD, **change).faults()) == 1, change  # type: ignore[arg-type]
    assert dataclasses.replace(GOOD, products=1, tensor_core=4).faults() == []
    assert dataclasses.replace(GOOD, arch=80, a_parameter=70).faults() == []
    assert dataclasses.replace(GOOD, instructions=1049).faults(GOOD) == []
    assert len(dataclasses.replace(GOOD, instructions=1051).faults(GOOD)) == 1, "it has grown"


CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
                                                              /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 FMUL R2, R2, R3 ;
        /*0020*/                   FADD R4, R4, R2 ;
        /*0030*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP;
"""


def test_loops_of_a_program_are_counted_apart() -> None:
    program = Program.parse(CODE)
    assert len(program.addresses) == 8 and program.names["LDG"] == 1 and program.names["NOP"] == 0
    assert program.straight() == 3
    (outer,) = program.outermost()
    (inner,) = program.inside(outer)
    assert (outer, inner) == ((0x10, 0x50), (0x30, 0x40))
    assert program.body(outer) == 3 and program.body(inner) == 2
    constants = "DENSE=0 SPAN=4 LANES=256 PAIRS=2"
    assert update_work(program, constants) == (round((3 / 4 + 3) / 16, 2), round(2 / 2 / 16, 2))


def test_the_committed_table_is_complete_and_without_faults() -> None:
    tables = committed(RESULTS)
    assert {version.rsplit(".", 1)[0] for version in tables} == {"3.6", "3.9"}
    for rows in tables.values():
        assert 90 in {row.arch for row in rows}
        assert {row.size for row in rows} == {"160m", "6.9b"}
        assert {row.variant for row in rows} == {*VARIANTS, "operations"}
        assert [row for row in rows if row.faults()] == []
        low = [row.a_parameter for row in rows if "WHAT=2" in row.constants and "EIGHT_BIT=1" in row.constants]
        assert low and all(count is not None and 30 < count <= INSTRUCTIONS_A_PARAMETER for count in low)
