"""Dimensionality through the (D, D) matrix against the naive (F, F) sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.errors import DataError, NonFiniteError
from crosscoder.evolution import feature_dimensionality


def naive(W_dec: torch.Tensor) -> np.ndarray:
    """(F, K) D_fk, term by term."""
    w_FKD = W_dec.double().numpy()
    n_features, n_snapshots, _ = w_FKD.shape
    result = np.zeros((n_features, n_snapshots))
    for f in range(n_features):
        for k in range(n_snapshots):
            norm = np.linalg.norm(w_FKD[f, k])
            if norm > 0:
                result[f, k] = norm**2 / ((w_FKD[:, k] @ (w_FKD[f, k] / norm)) ** 2).sum()
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_equals_the_naive_sum(dtype: torch.dtype, tolerance: float) -> None:
    W_dec = torch.randn(37, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    W_dec[:, 1] *= torch.logspace(-6, 3, 37)[:, None].to(dtype)
    W_dec[5, 2] = 0
    W_dec[9] = 0
    mask = np.arange(37) % 3 == 0
    result = feature_dimensionality(W_dec, masks={"third": mask}, block_bytes=10 * 3 * 8 * 4)
    expected = naive(W_dec)
    np.testing.assert_allclose(result.per_feature, expected, rtol=tolerance, atol=1e-12)
    np.testing.assert_allclose(result.rate, expected.sum(axis=0) / 8, rtol=tolerance)
    np.testing.assert_allclose(result.rate_by_mask["third"], expected[mask].sum(axis=0) / 8, rtol=tolerance)
    assert result.per_feature[5, 2] == 0 and not result.per_feature[9].any()


def test_cases_by_hand() -> None:
    orthogonal = torch.eye(4)[:3, None, :] * torch.tensor([1.0, 7.0, 0.01])[:, None, None]
    assert feature_dimensionality(orthogonal).rate.tolist() == pytest.approx([3 / 4])
    same = torch.ones(5, 1, 4)  # five copies of one direction share its one dimension
    result = feature_dimensionality(same)
    assert result.per_feature[:, 0].tolist() == pytest.approx([0.2] * 5)
    assert result.rate.tolist() == pytest.approx([1 / 4])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_rate_is_at_most_the_rank(n_features: int, width: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, width)
    factors = rng.standard_normal((n_features, rank)), rng.standard_normal((rank, width))
    W_dec = torch.from_numpy((factors[0] @ factors[1]) * 10 ** rng.uniform(-3, 3, (n_features, 1)))
    result = feature_dimensionality(W_dec[:, None])
    assert 0 < result.rate[0] <= min(rank, n_features) / width + 1e-9
    assert (result.per_feature <= 1).all()
    scaled = feature_dimensionality(W_dec[:, None] * 8)
    np.testing.assert_allclose(scaled.rate, result.rate, rtol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="F, K, D"):
        feature_dimensionality(torch.zeros(3, 4))
    with pytest.raises(DataError, match="mask 'x'"):
        feature_dimensionality(torch.ones(3, 1, 4), masks={"x": [True]})
    broken = torch.ones(3, 2, 4)
    broken[1, 1, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="snapshot 1"):
        feature_dimensionality(broken)
