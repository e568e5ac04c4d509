"""kill -9 at random moments, and the same command again: the same bits in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from faults.killing import crosscoder, files_of, run, run_with_kills

from crosscoder import ActivationStore

KILLS = 20


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_training_killed_twenty_times(tmp_path: Path) -> None:
    x = torch.randn(4000, 3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("whole", "killed"):
        ActivationStore.from_array(tmp_path / name / "run" / "activations" / "train", x, rows_per_shard=1500)
    options = ["--n-features", 256, "--n-steps", 4000, "--batch-size", 256, "--lr", 1e-3, "--checkpoint-every", 25]
    command = crosscoder("train", "run", *options)
    run(command, tmp_path / "whole")
    killed = run_with_kills(command, tmp_path / "killed", KILLS, 6.0, int(os.environ.get("KILL_SEED", "0")))
    whole = files_of(tmp_path / "whole" / "run", "crosscoder/*")
    assert whole and whole == files_of(tmp_path / "killed" / "run", "crosscoder/*")
    rows = [
        [json.loads(line) for line in (tmp_path / name / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for row in rows[0] + rows[1]:
        row.pop("tokens_per_second")
        row.pop("loader_wait_fraction")
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(10, 4001, 10))
    assert not list((tmp_path / "killed").rglob(".tmp-*")), "left-overs of killed writes"
    print(f"killed {killed} times")


def test_quickstart_killed_twenty_times(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    options = ["--max-characters", 400_000, "--lm-steps", 60, "--lm-snapshots", 8, "--n-features", 128]
    options += ["--train-steps", 120, "--batch-size", 128]
    command = crosscoder("quickstart", "--out", "run", *options)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(command, tmp_path / "whole")
    killed = run_with_kills(command, tmp_path / "killed", KILLS, 10.0, int(os.environ.get("KILL_SEED", "1")))
    patterns = ["crosscoder/*", "language_model/step*/model.safetensors", "tokens/*/*.npy", "evolution/*.npz"]
    patterns += ["activations/*/shard-*/*.seg", "report.html", "figures/*.csv"]
    whole, other = files_of(tmp_path / "whole" / "run", *patterns), files_of(tmp_path / "killed" / "run", *patterns)
    assert len(whole) > 30 and whole.keys() == other.keys()
    assert [name for name in whole if whole[name] != other[name]] == []
    print(f"killed {killed} times")
