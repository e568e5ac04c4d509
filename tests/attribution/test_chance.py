"""When a task is above chance, and the circuit's shares."""

from __future__ import annotations

import numpy as np
import pytest

from crosscoder.attribution.chance import above_chance, chance_probability
from crosscoder.attribution.circuits import circuit, relative
from crosscoder.evolution.strength import life_cycles


def test_chance() -> None:
    assert chance_probability(0, 10) == pytest.approx(1)
    assert chance_probability(10, 10) == pytest.approx(2**-10)
    assert chance_probability(8, 10) == pytest.approx((45 + 10 + 1) / 1024)
    # Summed term by term with lgamma, before scipy computed them.
    for n_right, n, expected in ((37, 60, 0.04623049053646364), (130, 200, 1.3264377797632807e-05)):
        assert chance_probability(n_right, n) == pytest.approx(expected, rel=1e-12)
    assert chance_probability(700, 1200) == pytest.approx(4.267683040516559e-09, rel=1e-11)
    rng = np.random.default_rng(0)
    assert sum(above_chance(rng.normal(0, 1, 200)) for _ in range(200)) <= 2
    assert above_chance(rng.normal(0.8, 1, 200))
    skewed = np.r_[np.full(150, 0.01), np.full(50, -5.0)]
    assert not above_chance(skewed), "right more often than not, yet wrong in the mean"


def test_who_dominates_when() -> None:
    steps = [0, 1, 10, 100]
    norms = np.array([[1, 1, 0.1, 0.0], [0, 0.5, 1, 0.2], [0, 0, 0.6, 1], [1, 1, 1, 1]], dtype=float)
    attribution = np.array([[0, 3, 0.5, 0], [0, 1, 2, 0.2], [0, 0, 1.5, 4], [0, -5, 0.01, 0]], dtype=float)
    found = circuit(attribution, norms, life_cycles(norms, steps), 3)
    assert found.features.tolist() == [0, 1, 2], "in order of emergence; the one that only harms is left out"
    assert found.emergence.tolist() == [0, 1, 2]
    assert found.dominant.tolist() == [-1, 0, 1, 2] and found.handovers == 2
    np.testing.assert_allclose(found.share[:, 1], [0.75, 0.25, 0])
    np.testing.assert_allclose(found.relative_effect.sum(axis=1), 1)
    np.testing.assert_allclose(found.relative_effect[0], [0, 6 / 7, 1 / 7, 0])
    np.testing.assert_allclose(found.relative_norm[1], np.array([0, 0.5, 1, 0.2]) / 1.7)
    np.testing.assert_array_equal(relative(np.zeros((2, 3))), 0)
