"""Turning and growing against the vectors themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from crosscoder.errors import DataError
from crosscoder.evolution.analyses.change import CHANGE, decoder_change, shares, summary, turning_or_growing
from crosscoder.figures.results import Results

F, K, D = 40, 5, 16
MASKS = {"even": np.arange(F) % 2 == 0, "none": np.zeros(F, dtype=bool)}


def vectors(seed: int = 0) -> np.ndarray:
    """(F, K, D) random walks: directions that turn a little, norms that grow and shrink."""
    rng = np.random.default_rng(seed)
    w = np.cumsum(rng.normal(size=(F, K, D)) * np.array([3, 1, 0.5, 1, 0.2])[:, None], axis=1)
    return np.asarray(w * rng.uniform(0.5, 1.5, (F, K, 1)))


def norms_and_cosines(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(w, axis=2)
    unit = w / norms[:, :, None]
    cosines = np.full((F, K), np.nan)
    cosines[:, 1:] = (unit[:, 1:] * unit[:, :-1]).sum(axis=2)
    return norms, cosines


def test_the_parts_are_those_of_the_vectors() -> None:
    w = vectors()
    norms, cosines = norms_and_cosines(w)
    absent = np.random.default_rng(1).random((F, K)) < 0.3
    cosines[absent] = np.nan
    found = decoder_change(norms, cosines, MASKS)
    for part, members in ((found.overall, np.ones(F, dtype=bool)), (found.by_kind["even"], MASKS["even"])):
        for k in range(1, K):
            those = members & ~absent[:, k]
            after, before = w[those, k], w[those, k - 1]
            change = ((after - before) ** 2).sum()
            radial = np.linalg.norm(after, axis=1) - np.linalg.norm(before, axis=1)
            assert part.growing[k] == pytest.approx((radial[radial > 0] ** 2).sum() / change)
            assert part.shrinking[k] == pytest.approx((radial[radial < 0] ** 2).sum() / change)
            assert part.turning[k] == pytest.approx((change - (radial**2).sum()) / change)
            assert part.size[k] == pytest.approx(change / ((after**2).sum() + (before**2).sum()))
            assert part.n[k] == those.sum()
    total = found.overall.turning + found.overall.growing + found.overall.shrinking
    np.testing.assert_allclose(total[1:], 1)
    assert np.isnan(found.overall.turning[0]) and found.overall.n[0] == 0
    assert np.isnan(found.by_kind["none"].turning).all() and not found.by_kind["none"].n.any()


def test_growing_and_turning_alone_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    start = rng.normal(size=(F, 1, D))
    grown = decoder_change(*norms_and_cosines(start * np.arange(1, K + 1)[None, :, None]))
    np.testing.assert_allclose(grown.overall.growing[1:], 1)
    shrunk = decoder_change(*norms_and_cosines(start * np.arange(K, 0, -1)[None, :, None]))
    np.testing.assert_allclose(shrunk.overall.shrinking[1:], 1)
    turned = rng.normal(size=(F, K, D))
    turned /= np.linalg.norm(turned, axis=2, keepdims=True)
    found = decoder_change(*norms_and_cosines(turned))
    np.testing.assert_allclose(found.overall.turning[1:], 1)
    np.testing.assert_allclose(found.overall.turning_random[1:], 1)


def test_random_directions_give_the_null() -> None:
    rng = np.random.default_rng(3)
    n, width = 4000, 64
    norms = rng.uniform(0.2, 2, (n, 2))
    unit = rng.normal(size=(n, 2, width))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    cosines = np.stack([np.full(n, np.nan), (unit[:, 0] * unit[:, 1]).sum(axis=1)], axis=1)
    found = decoder_change(norms, cosines)
    assert found.overall.turning[1] == pytest.approx(found.overall.turning_random[1], abs=0.01)
    assert found.overall.size[1] == pytest.approx(1, abs=0.01)
    assert abs(found.correlation[1]) < 4 * found.correlation_spread[1]


def test_what_does_not_change_has_no_shares() -> None:
    norms, cosines = np.ones((3, 2)), np.array([[np.nan, 1.0]] * 3)
    found = decoder_change(norms, cosines)
    assert np.isnan(found.overall.turning).all() and found.overall.size[1] == 0 and np.isnan(found.correlation).all()


def test_features_that_turn_more_and_grow_more() -> None:
    rng = np.random.default_rng(4)
    pace = rng.random(F)
    norms = np.stack([np.ones(F), 1 + pace], axis=1)
    cosines = np.stack([np.full(F, np.nan), 1 - pace * rng.uniform(0.8, 1.2, F)], axis=1)
    found = decoder_change(norms, cosines)
    assert found.correlation[1] == pytest.approx(spearmanr(1 - cosines[:, 1], np.log(norms[:, 1])).statistic)
    assert found.correlation[1] > 0.8 and np.isnan(found.correlation[0])
    assert found.correlation_spread[1] == pytest.approx(1 / np.sqrt(F - 1))


def test_the_summary_is_json_by_snapshot() -> None:
    found = decoder_change(*norms_and_cosines(vectors()))
    figures = json.loads(json.dumps(summary(found, ["a", "b", "c", "d", "e"]), allow_nan=False))["change"]
    assert list(figures["turning_share_by_snapshot"]) == ["b", "c", "d", "e"]
    assert figures["size_by_snapshot"]["c"] == found.overall.size[2]


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(DataError, match=r"norms \(3, 2\) and cosines \(2, 2\) must be alike"):
        decoder_change(np.ones((3, 2)), np.ones((2, 2)))


def test_the_page_says_where_turning_is_least_and_most() -> None:
    found = decoder_change(*norms_and_cosines(vectors()))
    results = Results(np.array([0, 1, 8, 64, 512]), [found])
    sentence = turning_or_growing(found, results)
    least, most = (int(pick(found.overall.turning)) for pick in (np.nanargmin, np.nanargmax))
    assert f"between {found.overall.turning[least]:.0%} (step {[0, 1, 8, 64][least - 1]} to" in sentence
    assert f"and {found.overall.turning[most]:.0%} (step {[0, 1, 8, 64][most - 1]} to" in sentence
    table = shares(found, results)
    assert table is not None and table.columns["turning"][0] is None
    assert table.columns["growing"][2] == pytest.approx(found.overall.growing[2], rel=1e-5)
    assert table.columns["random directions"][4] == pytest.approx(found.overall.turning_random[4], rel=1e-5)
    assert {len(column) for column in table.columns.values()} == {K}


def test_a_run_without_the_result_has_no_figure_and_no_sentence() -> None:
    nothing, page = Results(np.arange(K), []), CHANGE.page
    assert page is not None and page.tables(nothing) == [] and page.found(nothing) == []
    still = Results(np.arange(2), [decoder_change(np.ones((3, 2)), np.full((3, 2), np.nan))])
    assert page.tables(still) == [] and page.found(still) == []
