"""The activation store: what is written is read, and whatever is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder import ActivationStore
from crosscoder.errors import ConfigError, DataError, NonFiniteError

N, K, D = 100, 3, 5


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, K, D, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 80.0])[:, None]


def make(path: Path, x: torch.Tensor, dtype: str = "fp32") -> ActivationStore:
    return ActivationStore.from_array(path, x, dtype, rows_per_shard=37)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_round_trip(tmp_path: Path, x: torch.Tensor, dtype: str) -> None:
    make(tmp_path / "s", x, dtype)
    store = ActivationStore.open(tmp_path / "s")
    assert (store.n_tokens, store.n_snapshots, store.d_model, store.dtype) == (N, K, D, dtype)
    assert store.shard_rows == [37, 37, 26]
    read = torch.cat([store.read(shard) for shard in range(3)])
    exact = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert torch.equal(read, x.to(exact).float())
    torch.testing.assert_close(store.read(1, slice(3, 9)), read[40:46], rtol=0, atol=0)
    store.verify()


def test_scales_and_means_are_of_the_whole_collection(tmp_path: Path, x: torch.Tensor) -> None:
    store = make(tmp_path / "s", x)
    expected = np.sqrt(D) / torch.linalg.vector_norm(x.double(), dim=2).mean(dim=0).numpy()
    np.testing.assert_allclose(store.scales(), expected, rtol=1e-12)
    np.testing.assert_allclose(store.means(), x.double().mean(dim=0).numpy(), rtol=1e-12)


def test_incomplete_store_names_what_is_missing(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp32", shard_rows=[N], snapshots=["step0", "step1", "step2"])
    store.write_segment(0, 0, x[:, 0])
    assert store.missing() == [(0, 1), (0, 2)]
    with pytest.raises(DataError, match="step1, step2 are missing"):
        store.require_complete()


def test_not_finite_names_the_snapshot(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp16", shard_rows=[N], snapshots=["step0", "step1", "step2"])
    x[3, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="snapshot step1"):
        store.write_segment(0, 1, x[:, 1])
    with pytest.raises(NonFiniteError, match="fp16"):  # finite, but not in the store's dtype
        store.write_segment(0, 0, x[:, 0] * 1e6)
    assert store.missing() == [(0, 0), (0, 1), (0, 2)]


def test_wrong_shapes(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp32", shard_rows=[N])
    with pytest.raises(DataError, match=r"needs rows of shape \(100, 5\), got \(100, 4\)"):
        store.write_segment(0, 0, x[:, 0, :4])
    with pytest.raises(DataError, match=r"\(tokens, snapshots, width\)"):
        ActivationStore.from_array(tmp_path / "t", x[0])
    with pytest.raises(ConfigError, match="dtype must be one of"):
        ActivationStore.from_array(tmp_path / "t", x, "int4")


def test_another_store_is_not_overwritten(tmp_path: Path, x: torch.Tensor) -> None:
    make(tmp_path / "s", x)
    with pytest.raises(ConfigError, match="already holds other activations"):
        make(tmp_path / "s", x[:50])


def test_all_zero_snapshot_has_no_scale(tmp_path: Path, x: torch.Tensor) -> None:
    x[:, 2] = 0
    with pytest.raises(DataError, match="snapshot2"):
        make(tmp_path / "s", x).scales()


def test_every_flipped_byte_of_a_segment_is_found(tmp_path: Path, x: torch.Tensor) -> None:
    make(tmp_path / "s", x)
    file = tmp_path / "s" / "shard-00002" / "snapshot-001.seg"
    good = file.read_bytes()
    for position in [*range(0, 600), *range(4000, 4800), *range(4800, 8100, 7), *range(8100, len(good))]:
        bad = bytearray(good)
        bad[position] ^= 0x10
        file.write_bytes(bad)
        with pytest.raises(DataError, match=r"snapshot-001\.seg"):
            ActivationStore.open(tmp_path / "s").verify()
    file.write_bytes(good)
    ActivationStore.open(tmp_path / "s").verify()


def test_truncations_and_swaps_are_found(tmp_path: Path, x: torch.Tensor) -> None:
    make(tmp_path / "s", x)
    folder = tmp_path / "s" / "shard-00000"
    file = folder / "snapshot-001.seg"
    good = file.read_bytes()
    for length in (0, 1, 4095, 4096, 4097, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"snapshot-001\.seg"):
            ActivationStore.open(tmp_path / "s").verify()
    file.write_bytes(good + b"x")
    with pytest.raises(DataError, match="appended"):
        ActivationStore.open(tmp_path / "s").verify()
    shutil.copy(folder / "snapshot-002.seg", file)
    with pytest.raises(DataError, match="does not belong there"):
        ActivationStore.open(tmp_path / "s").verify()
    shutil.copy(tmp_path / "s" / "shard-00001" / "tokens.seg", folder / "tokens.seg")
    with pytest.raises(DataError, match="tokens.seg"):
        ActivationStore.open(tmp_path / "s").tokens(0)


MALFORMED = [
    "",
    "[]",
    "{",
    '"text"',
    "{}",
    '{"format": "other"}',
    {"format_version": 2},
    {"format_version": None},
    {"n_snapshots": 0},
    {"n_snapshots": "3"},
    {"n_snapshots": True},
    {"d_model": -5},
    {"d_model": None},
    {"dtype": "int4"},
    {"byte_order": "big"},
    {"shard_rows": []},
    {"shard_rows": [37, 37, -26]},
    {"shard_rows": "100"},
    {"shard_rows": [37.5]},
    {"snapshots": ["a"]},
    {"snapshots": [1, 2, 3]},
    {"source": None},
]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_malformed_manifests(tmp_path: Path, x: torch.Tensor, change: str | dict[str, object]) -> None:
    make(tmp_path / "s", x)
    file = tmp_path / "s" / "manifest.json"
    text = change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change})
    file.write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ActivationStore.open(tmp_path / "s")


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an activation store"):
        ActivationStore.open(tmp_path)
