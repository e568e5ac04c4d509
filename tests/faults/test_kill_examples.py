"""kill -9 in the middle of the pass over the tokens: the next call goes on from there, to the same bytes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.killing import files_of, run

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig
from crosscoder.activations.collect import plan_shards, token_rows
from crosscoder.activations.tokens import TokenSet
from crosscoder.config import StudySettings
from crosscoder.errors import DataError
from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.study import Study
from crosscoder.files import write_json
from crosscoder.runs import Run

KILLS = 3
S, C, K, D, F = 400, 32, 3, 16, 96

CHILD = """
from pathlib import Path
from crosscoder.activations.store import ActivationStore
from crosscoder.config import StudySettings
from crosscoder.evolution import partial
from crosscoder.evolution.analyses import examples
from crosscoder.evolution.study import Study
from crosscoder.runs import Run

partial.SECONDS, partial.MOST_SHARE, examples.BATCH_TOKENS = 0.0, 1.0, 64
read = ActivationStore.whole_sequences

def told(store, batch_tokens, *, skip=0):
    print("from", skip, flush=True)
    return read(store, batch_tokens, skip=skip)

ActivationStore.whole_sequences = told
Study(Run("run"), StudySettings(samples=8)).result(examples.EXAMPLES)
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_run(folder: Path) -> Run:
    """Random tokens, activations and features: as much of a run as the examples need."""
    run = Run(folder / "run")
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (S, C)).astype(np.int32)
    ids[:, 0] = 0
    document = np.arange(S, dtype=np.int32)[:, None].repeat(C, axis=1)
    tokens = TokenSet(ids, document, [f"text {s}" for s in range(S)], "none")
    tokens.save(run.tokens("train"))
    shards = plan_shards(tokens, 3000, seed=0)
    store = ActivationStore.create(
        run.activations("train"), K, D, "fp32", shard_rows=[len(shard.rows) for shard in shards]
    )
    for number, shard in enumerate(shards):
        store.write_tokens(number, token_rows(tokens, shard))
        for k in range(K):
            x = rng.standard_normal((len(shard.rows), D), dtype=np.float32)
            store.write_segment(number, k, torch.from_numpy(x))
    Crosscoder(CrosscoderConfig(K, D, F), seed=0).save_pretrained(run.crosscoder)
    write_json(run.snapshots_file, {"model": "none", "revisions": [f"step{k}" for k in range(K)], "layer": 0})
    return run


def tokens_done(partial: Path) -> int:
    with np.load(partial, allow_pickle=False) as state:
        return int(state["n_tokens"])


def written(partial: Path) -> int:
    """Another number for each time that the state was written; 0 if it is not there."""
    return partial.stat().st_mtime_ns if partial.exists() else 0


@pytest.mark.slow
def test_examples_killed_at_random_moments(tmp_path: Path) -> None:
    runs = {name: make_run(tmp_path / name) for name in ("whole", "killed")}
    command = [sys.executable, "-c", CHILD]
    run(command, tmp_path / "whole")
    whole = files_of(runs["whole"].evolution, "*")
    assert sorted(whole) == ["examples.json", "examples.npz"]

    moments = random.Random(0)
    partial = runs["killed"].evolution / ".examples.partial.npz"
    done, last = [0], 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=tmp_path / "killed", stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["from", str(done[-1])], "it goes on from what was saved"
        while process.poll() is None and written(partial) == last:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        assert process.wait() != 0, "it ended before it was killed: the pass is too short"
        done.append(tokens_done(partial))
        last = written(partial)
    assert done == sorted(set(done)) and done[-1] < S * (C - 1)
    run(command, tmp_path / "killed")
    assert files_of(runs["killed"].evolution, "*") == whole, "the same bytes, and nothing left over"


def test_the_state_of_another_result_is_not_used(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    study = Study(run, StudySettings(samples=8))
    plain = study.result(EXAMPLES)
    partial = study.partial(EXAMPLES, "another order")
    partial._due = 0
    partial.offer(lambda: {"n_tokens": np.array(5)})
    assert partial.load() == {"n_tokens": 5}
    (run.evolution / "examples.json").unlink()
    again = Study(run, StudySettings(samples=8)).result(EXAMPLES)
    np.testing.assert_equal(asdict(again), asdict(plain))
    assert not partial.path.exists()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    partial = Study(run, StudySettings()).partial(EXAMPLES)
    partial._due = 0
    partial.offer(lambda: {"n_tokens": np.arange(1000)})
    partial.path.write_bytes(partial.path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"examples\.partial\.npz is damaged"):
        partial.load()
