"""Reading tokens through all snapshots against one model after the other, densely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from activations.tiny import REVISIONS_OF_TEST, C, D, V, tiny_model

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.trunk import activations
from crosscoder.errors import DataError
from crosscoder.evolution import reading
from crosscoder.evolution.reading import snapshot_reader

LAYER, F = 1, 24


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotSet:
    for seed, revision in enumerate(REVISIONS_OF_TEST):
        tiny_model(seed).save_pretrained(tmp_path / revision)
    return SnapshotSet.open(str(tmp_path), LAYER, REVISIONS_OF_TEST)


def crosscoder(n_snapshots: int) -> Crosscoder:
    return Crosscoder(CrosscoderConfig(n_snapshots, D, F, threshold_init=1e-3), seed=1).eval()


@pytest.mark.parametrize("memory_bytes", [1, 3 * 4 * 3 * D * 4, 1 << 30])
def test_equals_one_model_after_the_other(
    snapshots: SnapshotSet, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_FORWARD_TOKENS", 3 * C)
    model, kept = crosscoder(3), 4
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, V, (5, C)), rng.integers(0, V, (0, C)), rng.integers(0, V, (4, 6))]
    found = snapshot_reader(snapshots, model, title="test", memory_bytes=memory_bytes)(texts, kept)
    assert [len(pairs.row) for pairs in found][1] == 0
    for ids, pairs in zip(texts[::2], found[::2], strict=True):
        models = [snapshots.load(k) for k in range(3)]
        x = torch.stack([activations(m, LAYER, torch.from_numpy(ids))[:, -kept:] for m in models], dim=2)
        dense = model.encode(x.reshape(-1, 3, D), backend="reference").to_dense().amax(dim=1)
        expected = np.zeros_like(dense.numpy())
        expected[pairs.row, pairs.feature] = pairs.value
        np.testing.assert_allclose(expected, dense.numpy(), atol=1e-5)
        assert (np.diff(pairs.row) >= 0).all() and (pairs.value > 0).all()
    assert len(found[0].row) > 50


def test_malformed_input_is_refused(snapshots: SnapshotSet) -> None:
    with pytest.raises(DataError, match="has 2 snapshots, the language model 3"):
        snapshot_reader(snapshots, crosscoder(2), title="test")
    read = snapshot_reader(snapshots, crosscoder(3), title="test")
    ids = np.ones((2, 5), dtype=np.int64)
    for kept in (0, 6):
        with pytest.raises(DataError, match=f"cannot keep the last {kept} tokens"):
            read([ids], kept)
    for wrong in (V, -1):
        with pytest.raises(DataError, match=f"0 to {V - 1}"):
            read([ids * wrong], 1)
    (Path(snapshots.model) / "step1" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="step1"):
        read([ids], 1)
