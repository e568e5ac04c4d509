"""What a store is made of is checked before anything of it is written."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosscoder import ActivationStore
from crosscoder.errors import ConfigError, CrosscoderError, DataError, NonFiniteError


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((9, 2, 3), 1j), "floating point, not torch.complex64"),
        (np.ones((9, 2, 3), dtype=np.int64), "floating point, not torch.int64"),
        (np.ones((9, 2, 3), dtype=object), "numbers that torch knows"),
        (torch.ones(9, 2, 3).to_sparse(), "dense"),
        ([[[1.0]]], "a torch tensor or a numpy array"),
    ],
)
def test_arrays_that_are_no_activations(tmp_path: Path, x: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ActivationStore.from_array(tmp_path / "s", x)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("x", [np.arange(54, dtype=">f4").reshape(9, 2, 3), np.arange(54.0).reshape(9, 2, 3)[::-1]])
def test_every_layout_of_an_array_is_stored_as_its_numbers(tmp_path: Path, x: np.ndarray) -> None:
    store = ActivationStore.from_array(tmp_path / "s", x, "fp32")
    assert np.array_equal(store.read(0).numpy(), x.astype(np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_rows": [-1]}, r"shard_rows must be whole numbers of at least 1, one a shard, not \[-1\]"),
        ({"shard_rows": []}, "shard_rows must be"),
        ({"shard_rows": [3.5]}, r"shard_rows must be .* not \[3.5\]"),
        ({"shard_rows": [3], "snapshots": ["", "b"]}, "snapshots must be 1 to 999 names"),
        ({"shard_rows": [3], "snapshots": [1, 2]}, "snapshots must be 1 to 999 names"),
        ({"shard_rows": [3], "snapshots": ["a" * 5000, "b"]}, "snapshots must be 1 to 999 names"),
    ],
)
def test_a_store_that_cannot_be_is_not_begun(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationStore.create(tmp_path / "s", 2, 3, **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("rows", [0, -1])
def test_shards_of_no_rows(tmp_path: Path, rows: int) -> None:
    with pytest.raises(ConfigError, match=f"rows_per_shard must be at least 1, not {rows}"):
        ActivationStore.from_array(tmp_path / "s", np.ones((9, 2, 3), np.float32), rows_per_shard=rows)
    assert not (tmp_path / "s").exists()


def test_a_store_that_was_read_can_be_copied_and_sent(tmp_path: Path) -> None:
    store = ActivationStore.from_array(tmp_path / "s", torch.randn(9, 2, 3), "fp32").select(["snapshot1"])
    x = store.read(0)
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store)):
        assert torch.equal(other.read(0), x)


@pytest.mark.parametrize("shard", [-1, 1])
def test_a_shard_that_is_not_there(tmp_path: Path, shard: int) -> None:
    store = ActivationStore.from_array(tmp_path / "s", torch.randn(9, 2, 3))
    with pytest.raises(CrosscoderError, match=f"has the shards 0 to 0, not {shard}"):
        store.read(shard)


def test_values_beyond_float32_are_not_told_to_be_stored_as_float32(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as raised:
        ActivationStore.from_array(tmp_path / "s", np.full((9, 2, 3), 1e300), "fp32")
    assert "store fp32" not in str(raised.value)
