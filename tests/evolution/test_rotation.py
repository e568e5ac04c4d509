"""Cosines between snapshots against a dense float64 version, and turning points that are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import decoder_cosines, rotation, turning_point

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64])


def turning(n_features: int, boundary: int, *, noise: float, seed: int, drift: float = 0.0) -> torch.Tensor:
    """(F, 8, 16) decoders with one direction before `boundary` and another from it on."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, 2, 16, generator=generator)
    W_dec = directions[:, (torch.arange(8) >= boundary).long()]
    steps = torch.randn(n_features, 8, 16, generator=generator).cumsum(dim=1)
    return W_dec + drift * steps + noise * torch.randn(n_features, 8, 16, generator=generator)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:All-NaN slice")
def test_equals_the_dense_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_BLOCK_BYTES", 6 * 4 * 5 * 4)  # several chunks
    W_dec = torch.randn(41, 4, 5, generator=torch.Generator().manual_seed(0))
    W_dec[3, 2] = 0
    W_dec[:, 1] = W_dec[:, 0] * 3
    present = np.random.default_rng(0).random((41, 4)) < 0.7
    present[:, 3] = False
    present[[8, 30], 3] = True
    present[8, 0] = True
    mask = np.arange(41) < 20
    result = decoder_cosines(W_dec, present, masks={"early": mask}, n_groups=7, seed=3)

    w = W_dec.double().numpy()
    unit = w / np.maximum(np.linalg.norm(w, axis=2, keepdims=True), 1e-300)
    cosine = np.einsum("fid,fjd->fij", unit, unit)
    usable = present & (np.linalg.norm(w, axis=2) > 0)
    both = usable[:, :, None] & usable[:, None, :]
    cosine[~both] = np.nan
    for summary, rows in ((result.overall, slice(None)), (result.by_mask["early"], mask)):
        assert (summary.counts == both[rows].sum(axis=0)).all()
        np.testing.assert_allclose(summary.mean, np.nanmean(cosine[rows], axis=0), atol=1e-6)
        np.testing.assert_allclose(
            summary.quantiles, np.nanquantile(cosine[rows], result.levels, axis=0), atol=1 / 2048
        )
    assert np.isnan(decoder_cosines(W_dec, present & False).overall.mean).all()
    np.testing.assert_allclose(result.to_final, cosine[:, :, -1], atol=1e-6)
    np.testing.assert_allclose(result.to_previous[:, 1:], cosine[:, [0, 1, 2], [1, 2, 3]], atol=1e-6)
    assert np.isnan(result.to_previous[:, 0]).all()
    assert len(result.group_sums) == 7
    np.testing.assert_allclose(result.group_sums.sum(axis=0), np.nansum(cosine, axis=0), atol=1e-5)
    assert (result.group_counts.sum(axis=0) == result.overall.counts).all()


def test_quantiles_of_many_values_are_exact_to_a_bin() -> None:
    W_dec = torch.randn(4001, 2, 6, generator=torch.Generator().manual_seed(2))
    result = decoder_cosines(W_dec, np.ones((4001, 2)), levels=(0.0, 0.1, 0.5, 0.9, 1.0))
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, 0].double(), W_dec[:, 1].double()).numpy()
    expected = np.quantile(cosine, result.levels)
    np.testing.assert_allclose(result.overall.quantiles[:, 0, 1], expected, atol=1 / 2048)
    assert (result.overall.quantiles[:, 0, 0] > 1 - 1e-6).all()


@pytest.mark.parametrize("boundary", range(1, 8))
@pytest.mark.parametrize("spacing", ["index", "log"])
def test_finds_every_boundary(boundary: int, spacing: str) -> None:
    W_dec = turning(400, boundary, noise=0.3, seed=boundary)
    rows = decoder_cosines(W_dec, np.ones((400, 8)))
    result = turning_point(rows, STEPS, spacing=spacing)  # type: ignore[arg-type]
    assert result.boundary == boundary
    assert result.boundary_low <= boundary <= result.boundary_high
    assert (result.step_before, result.step_after) == (STEPS[boundary - 1], STEPS[boundary])
    assert result.step_before < result.step < result.step_after
    assert result.bootstrap[boundary] > 0.9
    assert abs(result.across) < 0.05 < 0.8 < result.within
    assert result.explained_by_blocks > 0.98
    assert result.p_random < 0.01
    # 8! orders, of which those that keep the two blocks whole split as well: no p can be smaller.
    assert result.p_shuffled < (0.3 if boundary in (1, 7) else 0.1)


def test_interval_widens_with_little_data() -> None:
    """15 features that turn by different amounts at 3 or at 4: the bootstrap must not be sure."""
    W_dec = torch.cat([turning(8, 3, noise=0.5, seed=1), turning(7, 4, noise=0.5, seed=2)])
    result = turning_point(decoder_cosines(W_dec, np.ones((15, 8))), STEPS)
    assert (result.boundary_low, result.boundary_high) == (3, 4)
    assert result.step_low == STEPS[2] and result.step_high == STEPS[4]
    assert result.bootstrap.sum() == pytest.approx(1)


def test_no_evolution_gives_no_turning_point() -> None:
    """Constant directions seen through noise: p is uniform under the null, so few of 40 lie under 0.1."""
    small = 0
    for seed in range(40):
        W_dec = turning(200, 8, noise=0.3, seed=seed)
        found = turning_point(decoder_cosines(W_dec, np.ones((200, 8))), STEPS, n_bootstrap=50, n_null=199)
        small += found.p_shuffled < 0.1
        assert found.boundary == -1 or found.within - found.across < 0.02
    assert small <= 9  # binomial(40, 0.1): under 1 % beyond
    constant = torch.randn(50, 1, 16).repeat(1, 8, 1)
    result = turning_point(decoder_cosines(constant, np.ones((50, 8))), STEPS)
    assert result.boundary == -1 and result.boundary_low == -1 and np.isnan(result.step)
    assert result.p_shuffled == 1 and result.p_random == 1 and not result.bootstrap.any()


def test_structure_that_is_no_block() -> None:
    """Cosines that are equal for all pairs, and a direction that comes back: nothing to split."""
    shared = torch.cat([torch.full((20, 8, 1), np.sqrt(3 / 7)), torch.eye(8).expand(20, 8, 8)], dim=2)
    for spacing in ("index", "log"):
        rows = decoder_cosines(shared, np.ones((20, 8)))
        equal = turning_point(rows, STEPS, spacing=spacing)  # type: ignore[arg-type]
        assert equal.boundary == -1 and equal.explained_by_blocks == 0 and equal.p_shuffled == 1
        assert equal.explained_by_lag == 0
    # Equal values stay equal whatever their rounding.
    split = rotation._Split(8, np.random.default_rng(0).random(8))
    values = np.linspace(-1, 1, 999)[:, None].repeat(28, axis=1)
    assert not split.gain(values).any()
    assert not any(split.lag_share(row) for row in values)
    back = torch.eye(2)[[0, 1, 0]].expand(20, 3, 2)
    assert turning_point(decoder_cosines(back, np.ones((20, 3))), [0, 1, 2]).boundary == -1


def test_random_directions_are_no_turning_point() -> None:
    small = 0
    for seed in range(40):
        W_dec = torch.randn(200, 8, 16, generator=torch.Generator().manual_seed(seed))
        rows = decoder_cosines(W_dec, np.ones((200, 8)))
        small += turning_point(rows, STEPS, n_bootstrap=50, n_null=199).p_random < 0.1
    assert small <= 9
    off = ~np.eye(8, dtype=bool)
    assert np.std(rows.overall.mean[off]) == pytest.approx(1 / np.sqrt(16 * 200), rel=0.4)


def test_drift_is_told_from_a_turn() -> None:
    still = np.ones((300, 8))
    turn = turning_point(decoder_cosines(turning(300, 4, noise=0.1, seed=0), still), STEPS)
    drift = turning_point(decoder_cosines(turning(300, 8, noise=0.1, seed=0, drift=1.0), still), STEPS)
    assert turn.explained_by_blocks > turn.explained_by_lag
    assert drift.explained_by_lag > drift.explained_by_blocks


def test_presence_decides_which_features_count() -> None:
    """Features that are absent on one side say nothing across: they must not hide the turn."""
    W_dec = torch.cat([turning(100, 5, noise=0.2, seed=4), turning(300, 2, noise=0.2, seed=5)])
    present = np.ones((400, 8), dtype=bool)
    present[100:, :] = np.arange(8) == 7
    result = turning_point(decoder_cosines(W_dec, present), STEPS)
    assert result.boundary == 5
    assert result.null_mean[0, 3] == pytest.approx(1 / np.sqrt(16 * 100))


def test_deterministic() -> None:
    W_dec = turning(60, 4, noise=1.0, seed=0)
    first, second = (turning_point(decoder_cosines(W_dec, np.ones((60, 8)), seed=5), STEPS, seed=7) for _ in range(2))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_bad_input() -> None:
    W_dec = turning(5, 4, noise=0.1, seed=0)
    with pytest.raises(DataError, match="present_FK"):
        decoder_cosines(W_dec, np.ones((5, 7)))
    rows = decoder_cosines(W_dec, np.ones((5, 8)))
    with pytest.raises(DataError, match="3 training steps"):
        turning_point(rows, [0, 1, 2])
    with pytest.raises(DataError, match="at least 3 snapshots"):
        turning_point(decoder_cosines(W_dec[:, :2], np.ones((5, 2))), [0, 1])
    with pytest.raises(ConfigError, match="spacing"):
        turning_point(rows, STEPS, spacing="linear")  # type: ignore[arg-type]
    W_dec[4, 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="feature 4"):
        decoder_cosines(W_dec, np.ones((5, 8)))
