"""Nearest neighbours, blockwise against the full matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import nearest_neighbours


@pytest.mark.parametrize("snapshot", [None, 0, -1])
def test_equals_the_full_matrix(snapshot: int | None) -> None:
    W_dec = torch.randn(53, 3, 6, generator=torch.Generator().manual_seed(1))
    W_dec[7] = 0
    alive = np.ones(53, dtype=bool)
    alive[[3, 20]] = False
    result = nearest_neighbours(W_dec, n_neighbours=4, snapshot=snapshot, alive_F=alive, chunk_features=9)
    vectors = (W_dec.flatten(1) if snapshot is None else W_dec[:, snapshot]).double().numpy()
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    out = [3, 7, 20]
    cosine[:, out] = -2
    expected = np.argsort(-cosine, axis=1)[:, :4]
    kept = np.setdiff1d(np.arange(53), out)
    assert (result.features[kept] == expected[kept]).all()
    np.testing.assert_allclose(result.cosines[kept], np.take_along_axis(cosine, expected, 1)[kept], atol=1e-6)
    assert (result.features[out] == -1).all() and (result.cosines[out] == 0).all()
    assert result.snapshot == (2 if snapshot == -1 else snapshot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_by_snapshot_is_that_of_scaled_decoders(dtype: torch.dtype) -> None:
    W_dec = torch.randn(40, 3, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    scale_K = torch.tensor([1.0, 8.0, 0.0])
    result = nearest_neighbours(W_dec, n_neighbours=3, scale_K=scale_K)
    expected = nearest_neighbours(W_dec.double() * scale_K[:, None], n_neighbours=3)
    assert (result.features == expected.features).all()
    np.testing.assert_allclose(result.cosines, expected.cosines, atol=1e-6)
    with pytest.raises(DataError, match=r"scale_K has shape \(2,\)"):
        nearest_neighbours(W_dec, scale_K=torch.ones(2))


def test_fewer_features_than_neighbours_and_ties() -> None:
    W_dec = torch.ones(4, 2, 3)
    W_dec[3] = -1
    result = nearest_neighbours(W_dec, n_neighbours=5, chunk_features=2)
    assert result.features.tolist() == [
        [1, 2, 3, -1, -1],
        [0, 2, 3, -1, -1],
        [0, 1, 3, -1, -1],
        [0, 1, 2, -1, -1],
    ]
    np.testing.assert_allclose(result.cosines[0], [1, 1, -1, 0, 0], atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="snapshot 2 does not exist"):
        nearest_neighbours(torch.ones(4, 2, 3), snapshot=2)
