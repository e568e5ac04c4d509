"""kill -9 at random moments, and the same command again: the same bits in the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from faults.forking import Forks
from faults.killing import crosscoder, files_of, run_with_kills
from support.language_models import text_and_snapshots

from crosscoder import ActivationStore

KILLS = 20
SHARE = 8
"""The longest time to a kill, as a part of an undisturbed run: twenty of them are spread over most of it."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def timed_run(forks: Forks, folder: Path, *arguments: object) -> float:
    """Run `crosscoder ARGUMENTS` to its end; how many seconds it took."""
    began = time.monotonic()
    forks.run(folder, *arguments)
    return time.monotonic() - began


def test_training_killed_twenty_times(tmp_path: Path, forks: Forks) -> None:
    x = torch.randn(4000, 3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("whole", "killed"):
        ActivationStore.from_array(tmp_path / name / "run" / "activations" / "train", x, rows_per_shard=1500)
    options = ["--n-features", 256, "--n-steps", 2000, "--batch-size", 256, "--lr", 1e-3, "--checkpoint-every", 25]
    command = ("train", "run", *options)
    seconds = timed_run(forks, tmp_path / "whole", *command)
    seed = int(os.environ.get("KILL_SEED", "0"))
    killed = run_with_kills(forks, tmp_path / "killed", KILLS, seconds / SHARE, seed, *command)
    whole = files_of(tmp_path / "whole" / "run", "crosscoder/*")
    assert whole and whole == files_of(tmp_path / "killed" / "run", "crosscoder/*")
    rows = [
        [json.loads(line) for line in (tmp_path / name / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    for row in rows[0] + rows[1]:
        for name in ("seconds", "tokens_per_second", "loader_wait_fraction", "checksum"):
            row.pop(name)
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(10, 2001, 10))
    assert not list((tmp_path / "killed").rglob(".tmp-*")), "left-overs of killed writes"
    print(f"killed {killed} times")


def collection(folder: Path, dtype: str = "int8") -> list[object]:
    """The arguments of `crosscoder` that collect from three small snapshots into `folder / "run"`."""
    text_and_snapshots(folder, (300, 60), vocab_size=300, num_hidden_layers=2)
    options = ["--layer", 1, "--text", "text.txt", "--context", 64, "--rows-per-shard", 512, "--batch-sequences", 4]
    return ["collect", "run", "--model", "models", *options, "--dtype", dtype]


SEGMENTS = ("run/activations/*/shard-*/*.seg", "run/activations/*/manifest.json", "run/tokens/*/*.npy")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_collection_killed_at_random_moments(tmp_path: Path, forks: Forks, dtype: str) -> None:
    """4 moments; COLLECT_KILLS=50 tries as many as the bar asks for."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        command = collection(tmp_path / name, dtype)
    seconds = timed_run(forks, tmp_path / "whole", *command)
    whole = files_of(tmp_path / "whole", *SEGMENTS)
    assert len(whole) > 30
    kills, total, moments = int(os.environ.get("COLLECT_KILLS", "4")), 0, 0
    while total < kills:
        # A collection that ends begins anew, in part or in whole, so that every moment is as likely.
        folder = tmp_path / "killed"
        total += run_with_kills(forks, folder, kills - total, seconds * 1.1, moments, *command)
        assert files_of(folder, *SEGMENTS) == whole, f"after {total} kills"
        assert not list((folder / "run").rglob(".tmp-*")), "left-overs of killed writes"
        shutil.rmtree(folder / "run")
        moments += 1
    print(f"killed {total} times, at up to {seconds * 1.1:.1f} s")


def test_several_processes_fill_one_store(tmp_path: Path, forks: Forks) -> None:
    """Three at a time, one of them killed; the bytes of a single one."""
    for name in ("whole", "shared"):
        (tmp_path / name).mkdir()
        command = collection(tmp_path / name)
    forks.run(tmp_path / "whole", *command)
    with (tmp_path / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                crosscoder(*command),
                cwd=tmp_path / "shared",
                stdout=log,
                stderr=log,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "3"},
            )
            for rank in range(3)
        ]
        while not list((tmp_path / "shared").glob(SEGMENTS[0])) and processes[0].poll() is None:
            time.sleep(0.01)
        processes[1].kill()
        codes = [process.wait(timeout=300) for process in processes]
    assert codes[0] == codes[2] == 0, (tmp_path / "log").read_text()[-3000:]
    assert files_of(tmp_path / "shared", *SEGMENTS) == files_of(tmp_path / "whole", *SEGMENTS)


def test_quickstart_killed_twenty_times(tmp_path: Path, forks: Forks) -> None:
    pytest.importorskip("tokenizers")
    options = ["--max-characters", 250_000, "--lm-steps", 30, "--lm-snapshots", 7, "--n-features", 96]
    options += ["--train-steps", 80, "--batch-size", 128]
    command = ("quickstart", "--out", "run", *options)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    seconds = timed_run(forks, tmp_path / "whole", *command)
    seed = int(os.environ.get("KILL_SEED", "1"))
    killed = run_with_kills(forks, tmp_path / "killed", KILLS, seconds / SHARE, seed, *command)
    patterns = ["crosscoder/*", "language_model/step*/model.safetensors", "tokens/*/*.npy", "evolution/*.npz"]
    patterns += ["activations/*/shard-*/*.seg", "report.html", "figures/*.csv"]
    whole, other = files_of(tmp_path / "whole" / "run", *patterns), files_of(tmp_path / "killed" / "run", *patterns)
    assert len(whole) > 30 and whole.keys() == other.keys()
    assert [name for name in whole if whole[name] != other[name]] == []
    print(f"killed {killed} times")
