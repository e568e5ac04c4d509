"""Pythia-160M's true shape on two cores: the whole command, with random weights, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GIB = 1 << 30
MOST = 12 * GIB


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_pythia_160m_with_24576_features(tokenizer: Any, tmp_path: Path) -> None:
    """K = 4, F = 24,576, D = 768, 12 blocks: prompts in all snapshots; attribution and curves at the last.

    `pythia_shape.py` by hand does all four, in four times as long.
    """
    script = Path(__file__).with_name("pythia_shape.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(script), str(tmp_path / "run"), str(tokenizer.name_or_path), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr[-3000:]
    print(f"peak {result['peak'] / GIB:.2f} GiB")
    assert result["peak"] < MOST, f"{result['peak'] / GIB:.1f} GiB"
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["attribution"]["induction"]
    assert figures["above_chance"] == ["step143000"] and figures["n_prompts"] == 8
    assert figures["ig_completeness_error"] < 0.05 and figures["disrupt_top50"] is not None
    assert set(figures["rank_correlation_with_exact"].values()) != {None}
