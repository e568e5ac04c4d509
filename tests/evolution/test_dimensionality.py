"""Dimensionality through the (D, D) matrix against the naive (F, F) sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.errors import DataError, NonFiniteError
from crosscoder.evolution import feature_dimensionality, kind_dimensionality, random_dimensionality


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


def test_by_kind_is_the_kind_alone() -> None:
    W_dec = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    W_dec[7] = 0
    masks = {"even": np.arange(60) % 2 == 0, "seven": np.arange(60) == 7, "none": np.zeros(60, bool)}
    found = kind_dimensionality(W_dec, masks, block_bytes=7 * 2 * 8 * 8)
    alone = feature_dimensionality(W_dec[::2])
    np.testing.assert_allclose(found.rate_within["even"], alone.rate, rtol=1e-12)
    np.testing.assert_allclose(found.null_within["even"], alone.null_rate, rtol=1e-12)
    part = feature_dimensionality(W_dec, masks=masks)
    assert (found.rate_within["even"] > part.rate_by_mask["even"]).all()
    assert not found.rate_within["seven"].any() and not found.rate_within["none"].any()
    np.testing.assert_allclose(
        part.null_rate_by_mask["even"] + part.null_rate_by_mask["seven"],
        (part.null_rate - random_dimensionality((W_dec**2).sum(2), 8)[1::2].sum(axis=0) / 8),
        rtol=1e-12,
    )


@pytest.mark.parametrize(("width", "spread"), [(1, 1.0), (2, 0.5), (12, 0.0), (12, 1.5)])
def test_the_null_is_what_random_directions_give(width: int, spread: float) -> None:
    """Also with a few norms that dominate, where the mean interference would be a wrong guess."""
    rng = np.random.default_rng(0)
    norms = np.exp(spread * rng.standard_normal((30, 2)))
    norms[4] = 0
    expected = random_dimensionality(norms**2, width, n_draws=4000)
    simulated = []
    for _ in range(600):
        directions = rng.standard_normal((30, 2, width))
        directions *= (norms / np.linalg.norm(directions, axis=2))[:, :, None]
        simulated.append(feature_dimensionality(torch.from_numpy(directions)).per_feature)
    error = np.std(simulated, axis=0) / np.sqrt(600)
    assert (abs(np.mean(simulated, axis=0) - expected) <= 5 * error + 0.01).all()
    assert not expected[4].any()


def test_shared_directions_lie_under_the_null() -> None:
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(400, 1, 32, generator=generator)
    shared = free + 2 * torch.randn(1, 1, 32, generator=generator)
    apart, together = feature_dimensionality(free), feature_dimensionality(shared)
    assert apart.rate[0] == pytest.approx(apart.null_rate[0], rel=0.03)
    assert together.rate[0] < 0.8 * together.null_rate[0]


def test_bad_squares() -> None:
    with pytest.raises(DataError, match="at least 0"):
        random_dimensionality([[-1.0]], 4)
    with pytest.raises(NonFiniteError, match="NaN"):
        random_dimensionality([[np.nan]], 4)
