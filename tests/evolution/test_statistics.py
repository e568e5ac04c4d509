"""Rank tests, correlations and intervals against counted pairs, worked examples and our own earlier code."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.common.statistics import (
    bootstrap_interval,
    correlate,
    holm,
    kruskal_wallis,
    mann_whitney,
    pearson,
    permutation_p,
    ranks,
    ratio_interval,
    spearman,
)
from crosscoder.errors import DataError

GROUPS = ([1, 2, 2, 3, 5, 5, 5], [2, 4, 4, 6, 7, 9], [3, 5, 8, 8, 9])


@settings(deadline=None)  # the first call imports scipy
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_ranks_count_what_is_smaller(values: list[int]) -> None:
    for value, rank in zip(values, ranks(values), strict=True):
        smaller, equal = sum(v < value for v in values), values.count(value)
        assert rank == smaller + (equal + 1) / 2


def test_correlations() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks (1.5, 1.5, 3, 4) and (1, 2, 3, 4).
    assert spearman([5, 5, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    a, b = [1, 2, 2, 3, 5, 5, 5, 9], [2, 1, 4, 4, 6, 3, 9, 9]
    assert spearman(a, b) == pytest.approx(0.7641078192857804)
    assert pearson(a, b) == pytest.approx(0.7956144772687179)
    for correlation in (pearson, spearman):
        assert np.isnan([correlation([1, 1], [1, 2]), correlation([], []), correlation([1], [1])]).all()
        with pytest.raises(DataError, match="cannot pair 2 values with 3"):
            correlation([1, 2], [1, 2, 3])


def test_kruskal_wallis() -> None:
    found = kruskal_wallis(GROUPS)
    assert found.statistic == pytest.approx(4.832329377597511) and found.p == pytest.approx(0.08926331437300894)
    assert found.n == 18 and found.effect == pytest.approx(found.statistic / 17)
    apart = kruskal_wallis([[1] * 20, [2] * 20, [3] * 20])
    assert apart.effect == pytest.approx(1) and apart.p < 1e-10
    same = kruskal_wallis([[1, 2, 3], [1, 2, 3]])
    assert same.statistic == pytest.approx(0) and same.p == pytest.approx(1)
    constant = kruskal_wallis([[2, 2], [2]])
    assert np.isnan(constant.statistic) and np.isnan(constant.p)
    for groups in ([], [[1, 2]], [[1, 2], []]):
        with pytest.raises(DataError, match="two groups with values"):
            kruskal_wallis(groups)


@settings(deadline=None)  # the first call imports scipy
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_mann_whitney_counts_pairs(a: list[int], b: list[int]) -> None:
    found, turned = mann_whitney(a, b), mann_whitney(b, a)
    larger, equal = sum(x > y for x in a for y in b), sum(x == y for x in a for y in b)
    assert found.statistic == larger + equal / 2
    assert found.effect == pytest.approx(-turned.effect)
    assert (np.isnan(found.p) and len({*a, *b}) == 1) or found.p == pytest.approx(turned.p)


def test_mann_whitney_p() -> None:
    assert mann_whitney(GROUPS[0], GROUPS[1]).p == pytest.approx(0.16936768223501375)
    assert mann_whitney([1, 2, 3], [11, 12, 13]).effect == -1
    assert np.isnan(mann_whitney([1, 1], [1]).p) and mann_whitney([1, 1], [1]).effect == 0
    with pytest.raises(DataError, match="two groups with values, got 0 and 1"):
        mann_whitney([], [1])


def test_holm() -> None:
    # Worked by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, never falling.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([np.nan, 0.5, 0.9]), [np.nan, 1, 1])
    np.testing.assert_allclose(holm([np.nan, 0.01]), [np.nan, 0.01])
    assert holm([]).size == 0
    with pytest.raises(DataError, match="must lie in"):
        holm([1.5])


def test_permutation_p_is_the_share_of_all_orders() -> None:
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    observed = pearson(a, b)
    exact = np.mean([abs(pearson(a, np.array(order))) >= observed - 1e-12 for order in permutations(b)])
    assert permutation_p(pearson, a, b, n_permutations=4000) == pytest.approx(exact, abs=0.02)
    assert permutation_p(pearson, a, a, n_permutations=99) >= 0.01, "never 0"
    assert np.isnan(permutation_p(pearson, [1, 1], [1, 2]))


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(lambda v: float(v.mean()), values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)
    assert bootstrap_interval(lambda v: float(v.mean()), values) == (low, high)
    assert bootstrap_interval(lambda v: float(v.mean()), values, seed=1) != (low, high)
    assert np.isnan(bootstrap_interval(lambda v: float(v.mean()), [])).all()
    # Rows stay together: a column is correlated with itself in every resample.
    assert bootstrap_interval(pearson, values, values) == pytest.approx((1, 1))
    with pytest.raises(DataError, match="3, 2 entries"):
        bootstrap_interval(pearson, [1, 2, 3], [1, 2])


def test_correlate_leaves_out_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=60)
    b = a + rng.normal(size=60)
    found = correlate(np.append(a, [np.nan, 100]), np.append(b, [100, np.nan]))
    assert found.n == 60
    assert found.pearson == pytest.approx(pearson(a, b)) and found.spearman == pytest.approx(spearman(a, b))
    assert found.pearson_low < found.pearson < found.pearson_high < 1
    assert found.spearman_low < found.spearman < found.spearman_high < 1
    assert found.pearson_p == found.spearman_p == 0.001
    noise = correlate(a, rng.permutation(b))
    assert noise.pearson_p > 0.05 and noise.pearson_low < 0 < noise.pearson_high
    nothing = correlate([np.nan], [1.0])
    assert nothing.n == 0 and np.isnan(nothing.pearson) and np.isnan(nothing.spearman_p)


def test_intervals_of_a_ratio_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        denominator = rng.normal(2, 1, 60)
        numerator = 0.5 * denominator + rng.normal(0, 0.5, 60)
        ratio, low, high = ratio_interval(numerator, denominator, seed)
        assert low < ratio < high
        inside += low < 0.5 < high
    assert 0.88 < inside / 200 < 0.99
    assert ratio_interval(np.ones(10), np.ones(10), 0) == (1, 1, 1)
    assert ratio_interval(np.arange(5.0), np.ones(5), 3) == ratio_interval(np.arange(5.0), np.ones(5), 3)


def test_the_numbers_are_those_before_scipy_computed_them() -> None:
    """Recorded from the numpy code that scipy has replaced: equal to the last digits."""
    rng = np.random.default_rng(7)
    a = rng.integers(0, 6, 40).astype(float)
    b = np.round(a / 2 + rng.normal(size=40), 1)
    c = rng.normal(size=30)
    assert float(ranks(b) @ np.arange(40)) == 17858.0
    groups = kruskal_wallis([a[:15], b[:20], c])
    assert (groups.n, groups.statistic) == (65, pytest.approx(26.306135340759024, rel=1e-14))
    assert groups.p == pytest.approx(1.939524592408609e-06, rel=1e-13)
    two = mann_whitney(a, b)
    assert (two.statistic, two.effect) == (1227.0, 0.53375)
    assert two.p == pytest.approx(3.8753001586051365e-05, rel=1e-12)
    found = correlate(a, b, seed=3)
    assert (found.pearson, found.pearson_low, found.pearson_high, found.pearson_p) == (
        pytest.approx(0.6601799717360576, rel=1e-14),
        pytest.approx(0.44525505245497954, rel=1e-14),
        pytest.approx(0.8141360800685425, rel=1e-14),
        0.001,
    )
    assert (found.spearman, found.spearman_low, found.spearman_high, found.spearman_p) == (
        pytest.approx(0.6238431688537696, rel=1e-14),
        pytest.approx(0.3563171467439885, rel=1e-14),
        pytest.approx(0.80668979464402, rel=1e-14),
        0.001,
    )
    assert bootstrap_interval(lambda v: float(np.median(v)), b, seed=5) == (0.6499999999999999, 1.9)
    assert permutation_p(pearson, a[:20], c[:20], seed=2) == 0.625


def test_correlations_are_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(1)
    for n in (3, 10, 300):
        a, b = rng.integers(0, 4, n) + rng.normal(size=n), rng.integers(0, 4, n)
        b[:2] = 0, 1
        assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-13, abs=1e-14)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-13, abs=1e-14)
