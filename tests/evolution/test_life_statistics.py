"""Intervals against a plain bootstrap, the null of shuffled snapshots against `life_cycles` itself."""

from __future__ import annotations

import numpy as np
import pytest

from crosscoder.errors import ConfigError
from crosscoder.evolution import life_cycles, life_intervals, shuffled_life
from crosscoder.evolution.life_statistics import _excess_variation, _in_order
from crosscoder.evolution.strength import EMERGENT

STEPS = [0, 1, 2, 4, 8, 16, 32]


def lives(n_features: int, seed: int, *, ordered: bool) -> np.ndarray:
    """(F, 7) norms: a rise, a plateau and a fall at random times (`ordered`), or that in one random order of time."""
    rng = np.random.default_rng(seed)
    birth, length = rng.integers(0, 6, n_features), rng.integers(2, 7, n_features)
    k = np.arange(7)
    inside = (k >= birth[:, None]) & (k < (birth + length)[:, None])
    norms = np.where(inside, 1.0, 0.05) * rng.uniform(0.9, 1.1, (n_features, 7))
    return norms if ordered else norms[:, rng.permutation(7)]


def excess(relative: np.ndarray) -> float:
    return float((np.abs(np.diff(relative, axis=1)).sum(axis=1) - (2 - relative[:, 0] - relative[:, -1])).mean())


@pytest.mark.parametrize("steps", [STEPS, [1, 2, 3, 4, 5, 6, 7]])
def test_shuffled_statistics_are_those_of_life_cycles(steps: list[int]) -> None:
    norms = np.random.default_rng(0).random((300, 7)) ** 2
    cycles = life_cycles(norms, steps)
    orders = np.array([np.random.default_rng(s).permutation(7) for s in range(20)])
    found = _excess_variation(cycles.relative, orders)
    for order, value in zip(orders, found, strict=True):
        again = life_cycles(norms[:, order], steps)
        contiguous, emergent, births = _in_order(np.ascontiguousarray(cycles.present[:, order].T), steps[0] == 0)
        assert contiguous == pytest.approx(1 - again.revived.mean())
        assert emergent == pytest.approx((again.kind == EMERGENT).mean())
        assert births == pytest.approx(again.births.max() / 300)
        assert value == pytest.approx(excess(again.relative), abs=1e-6)


def test_development_is_told_from_shuffled_snapshots() -> None:
    ordered = shuffled_life(life_cycles(lives(500, 0, ordered=True), STEPS))
    assert ordered.contiguous.observed == 1
    assert ordered.excess_variation.observed < 0.3 < ordered.excess_variation.null_mean
    for found in (ordered.contiguous, ordered.excess_variation):
        assert found.p < 0.02
    assert ordered.contiguous.null_high < 0.8


def test_no_order_in_time_is_not_significant() -> None:
    """The null itself: p is uniform, so few of 40 lie under 0.1 (binomial(40, 0.1): under 1 % beyond 9)."""
    small = {"contiguous": 0, "emergent": 0, "largest_births": 0, "excess_variation": 0}
    for seed in range(40):
        found = shuffled_life(life_cycles(lives(200, seed, ordered=False), STEPS), n_shuffles=99, seed=seed)
        for name in small:
            small[name] += getattr(found, name).p < 0.1
    assert max(small.values()) <= 9


def test_intervals_equal_a_plain_bootstrap() -> None:
    norms = np.random.default_rng(1).random((400, 7)) ** 3
    alive = np.random.default_rng(2).random(400) < 0.9
    cycles = life_cycles(norms, STEPS, alive_F=alive)
    found = life_intervals(cycles, n_bootstrap=4000, seed=3)
    assert found.n_by_kind.tolist() == list(cycles.n_by_kind.values())
    assert found.births.tolist() == cycles.births.tolist()
    emergent = cycles.kind == EMERGENT
    assert found.median_emergence_step == np.median(cycles.steps[cycles.emergence[emergent]])
    assert found.median_lifetime == pytest.approx(np.median(cycles.lifetime[cycles.alive]))

    rng = np.random.default_rng(4)
    kinds, births, steps, lifetimes = [], [], [], []
    for _ in range(2000):
        drawn = rng.integers(0, 400, 400)
        again = emergent[drawn]
        kinds.append(np.bincount(cycles.kind[drawn], minlength=4))
        births.append(np.bincount(cycles.emergence[drawn][again], minlength=7))
        steps.append(np.median(cycles.steps[cycles.emergence[drawn][again]]))
        lifetimes.append(np.median(cycles.lifetime[drawn][cycles.alive[drawn]]))
    for low, high, values in (
        (found.n_by_kind_low, found.n_by_kind_high, kinds),
        (found.births_low, found.births_high, births),
    ):
        np.testing.assert_allclose([low, high], np.quantile(values, [0.05, 0.95], axis=0), atol=3)
    for low, high, plain in (
        (found.median_emergence_step_low, found.median_emergence_step_high, steps),
        (found.median_lifetime_low, found.median_lifetime_high, lifetimes),
    ):
        np.testing.assert_allclose([low, high], np.quantile(plain, [0.05, 0.95]), rtol=1e-5)
    assert found.births_low[3] < found.births[3] < found.births_high[3]


def test_edge_cases() -> None:
    dead = life_cycles(np.zeros((5, 7)), STEPS)
    assert np.isnan(shuffled_life(dead).contiguous.p)
    none = life_intervals(dead)
    assert none.n_by_kind.tolist() == [0, 0, 5, 0] and np.isnan(none.median_lifetime_low)
    assert np.isnan(none.median_emergence_step)
    one = life_cycles([[1.0], [2.0]], [0])
    found = shuffled_life(one, n_shuffles=9)
    assert found.contiguous.observed == 1 and found.contiguous.p == 1
    assert found.excess_variation.observed == 0 and found.emergent.observed == 0
    assert life_intervals(one).median_lifetime_low == 1
    rare = life_cycles([[0.0, 1.0, 1.0]] + [[1.0, 1.0, 1.0]] * 30, [0, 1, 2])
    assert life_intervals(rare).median_emergence_step_high == 1  # over the samples that have it
    with pytest.raises(ConfigError, match="level"):
        life_intervals(one, level=1.0)
    with pytest.raises(ConfigError, match="n_bootstrap"):
        life_intervals(one, n_bootstrap=0)
    with pytest.raises(ConfigError, match="n_shuffles"):
        shuffled_life(one, n_shuffles=0)
