"""The planted dictionary itself, and that the analyses find its truth in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import decoder_cosines, life_cycles, turning_point
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary, score


@pytest.mark.parametrize("seed", range(3))
def test_analyses_find_the_truth(seed: int) -> None:
    truth = PlantedDictionary(PlantedConfig(seed=seed))
    assert truth.directions.shape == (512, 8, 64) and truth.strengths.shape == (512, 8)
    assert truth.rates.sum() == pytest.approx(8, rel=0.01)
    assert 4 < (truth.rates @ truth.present).mean() < 6.5
    cycles = life_cycles(truth.strengths.numpy(), truth.steps)
    for name in ("emergence", "peak", "death"):
        assert (getattr(cycles, name) == getattr(truth, name)).all()
    assert cycles.n_by_kind["initialization"] == round(0.35 * 512)
    assert (truth.death >= 0).sum() > 50
    found = turning_point(decoder_cosines(truth.decoders(), truth.present), truth.steps)
    assert found.boundary == found.boundary_low == found.boundary_high == truth.turning_point == 4
    assert found.p_shuffled < 0.05  # 4 and 4 of 8: 1/35 is the smallest possible
    assert found.within == pytest.approx(1, abs=1e-5) and found.across == pytest.approx(0.1, abs=1e-5)


def test_score_of_the_truth_and_of_noise() -> None:
    truth = PlantedDictionary(PlantedConfig(n_features=100, l0=4.0))
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    scale = np.geomspace(20, 1, 8)
    padded = torch.cat([truth.decoders()[shuffled], torch.zeros(20, 8, 64)])
    result = score(padded * torch.tensor(scale, dtype=torch.float32)[:, None], truth, scale_K=scale)
    assert result.share_recovered == 1 and result.precision == 1
    assert (shuffled.numpy()[result.match] == np.arange(100)).all()
    assert result.emergence_correlation == pytest.approx(1) and result.emergence_exact == 1
    assert result.turning_point == 4 and result.turning_point_covered

    noise = torch.randn(200, 8, 64, generator=torch.Generator().manual_seed(1))
    nothing = score(noise, truth)
    assert nothing.share_recovered == 0 and not nothing.recovered.any()
    assert np.isnan(nothing.emergence_correlation) and (nothing.emergence == -1).all()
    assert len(np.unique(nothing.match)) == 100  # one to one

    half = padded[:100].clone()
    half[::2] = noise[:50]
    assert score(half, truth).share_recovered == pytest.approx(0.5)


def test_a_vanished_feature_is_compared_where_it_was() -> None:
    truth = PlantedDictionary(PlantedConfig(n_features=100, l0=4.0))
    feature = int(np.flatnonzero(truth.death >= 0)[0])
    learned = truth.decoders().clone()
    learned[feature, truth.death[feature] :] = torch.randn(64) * 0.01  # what a crosscoder leaves behind
    result = score(learned, truth)
    assert result.recovered[feature] and result.match[feature] == feature


def test_the_null_has_no_evolution() -> None:
    truth = PlantedDictionary(PlantedConfig(evolution=False))
    assert truth.turning_point == -1 and not truth.emergence.any()
    learned = truth.decoders() + 0.1 * torch.randn(512, 8, 64, generator=torch.Generator().manual_seed(0))
    result = score(learned, truth, cosine=0.7)
    assert result.share_emergent + result.share_other <= 0.02
    assert result.turning_point_p > 0.05
    assert not result.turning_point_covered
    exact = score(truth.decoders(), truth)
    assert exact.turning_point == -1 and exact.turning_point_p == 1 and exact.share_emergent == 0


def test_samples_have_the_planted_statistics() -> None:
    truth = PlantedDictionary(PlantedConfig(n_features=40, l0=3.0, d_model=32))
    x = truth.sample(20_000, seed=3)
    assert x.shape == (20_000, 8, 32) and x.dtype == torch.float32
    assert torch.equal(x, truth.sample(20_000, seed=3))
    assert not torch.equal(x, truth.sample(20_000, seed=4))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(truth.sample(50, generator), truth.sample(50, seed=3))
    assert not torch.equal(truth.sample(50, generator), truth.sample(50, seed=3))
    # Magnitudes have mean 1, so the mean of x is sum of rate * strength * direction.
    expected = (torch.from_numpy(truth.rates).float()[:, None, None] * truth.decoders()).sum(dim=0)
    assert (x.mean(dim=0) - expected).norm() < 0.05 * expected.norm()
    # Second moments: E[m^2] = exp(sigma^2).
    rates = torch.from_numpy(truth.rates)
    square = (rates * np.exp(0.5**2)) @ truth.strengths.double() ** 2 - rates**2 @ truth.strengths.double() ** 2
    variance = x.double().var(dim=0).sum(dim=1)
    np.testing.assert_allclose(variance, square + 32 * 0.02**2, rtol=0.03)


def test_pairs_and_dense_features_fire_as_told() -> None:
    config = PlantedConfig(n_features=60, d_model=64, l0=6.0, noise=0.0, correlated_share=0.2, anticorrelated_share=0.2)
    truth = PlantedDictionary(config)
    assert len(truth.correlated) == len(truth.anticorrelated) == 6
    assert len(np.unique(np.concatenate([truth.correlated, truth.anticorrelated]))) == 24
    # With orthogonal directions at the end each feature's activation can be read off.
    truth.directions = torch.linalg.qr(torch.randn(64, 64))[0][:60, None].repeat(1, 8, 1)
    truth.strengths = torch.ones(60, 8)
    fires = (truth.sample(40_000)[:, 0] @ truth.directions[:, 0].T > 1e-3).double().numpy()
    np.testing.assert_allclose(fires.mean(axis=0), truth.rates, atol=0.01)
    assert (np.sort(truth.rates)[-4:] == 0.3).all()
    leader, follower = truth.correlated.T
    together = (fires[:, leader] * fires[:, follower]).mean(axis=0) / truth.rates[leader]
    np.testing.assert_allclose(together, 0.5 + truth.rates[leader] / 2, atol=0.1)
    leader, follower = truth.anticorrelated.T
    assert not (fires[:, leader] * fires[:, follower]).any() and fires[:, follower].any(axis=0).all()


def test_bad_configurations() -> None:
    with pytest.raises(ConfigError, match="turning_point"):
        PlantedDictionary(PlantedConfig(turning_point=8))
    with pytest.raises(ConfigError, match="zipf_offset"):
        PlantedDictionary(PlantedConfig(n_features=4, n_dense=0, correlated_share=0, anticorrelated_share=0))
    with pytest.raises(ConfigError, match="dense"):
        PlantedDictionary(PlantedConfig(l0=1.0))
    with pytest.raises(ConfigError, match="in pairs"):
        PlantedDictionary(PlantedConfig(correlated_share=0.6, anticorrelated_share=0.5))
    with pytest.raises(ConfigError, match="vanishing_share"):
        PlantedDictionary(PlantedConfig(vanishing_share=2))
    with pytest.raises(DataError, match="do not fit"):
        score(torch.ones(5, 7, 64), PlantedDictionary())
