"""Detection of CPU features and the choice of the instruction-set level."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from levels import python_at

from crosscoder import _core

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
CPUINFO_NAMES = {
    "avx2": {"avx2"},
    "f16c": {"f16c"},
    "fma": {"fma"},
    "avx512f": {"avx512f"},
    "avx512bw": {"avx512bw"},
    "avx512dq": {"avx512dq"},
    "avx512vl": {"avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx_bf16", "amx_tile"},
}


def import_core(isa: str) -> subprocess.CompletedProcess[str]:
    return python_at(isa, "-c", "from crosscoder import _core; print(_core.isa_level())", timeout=60)


def test_levels_are_a_prefix_of_all_levels_and_one_is_chosen() -> None:
    available = _core.isa_levels()
    assert available == LEVELS[: len(available)]
    assert _core.isa_level() == (os.environ.get("CROSSCODER_ISA") or available[-1])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="compares with Linux on x86-64",
)
def test_features_are_those_that_the_kernel_reports() -> None:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.partition(":")[2].split())
    assert _core.cpu_features() == {name: needed <= flags for name, needed in CPUINFO_NAMES.items()}


@pytest.mark.parametrize("isa", [*_core.isa_levels(), ""])
def test_environment_forces_a_level(isa: str) -> None:
    result = import_core(isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (isa or _core.isa_levels()[-1])


def test_unknown_level_is_an_import_error_that_lists_the_known() -> None:
    result = import_core("sse9")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: CROSSCODER_ISA=sse9 is not one of portable, avx2, avx512, avx512_bf16"
    )
