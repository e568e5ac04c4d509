"""Statistics that several analyses share: rank tests with ties, correlations, intervals, corrections.

Letters: n values, G groups, P p-values or prompts.

Tests of ranks are scipy's, with the large-sample distributions, corrected for ties: emergence takes few values, so ties
are the rule. Ours are `pearson`, which resampling calls thousands of times (scipy's takes ten times as long and agrees
to the last digits), the bootstrap and the permutation test (scipy draws in another order, so the same seed would give
other intervals, and it knows no resamples without a statistic), and Holm's correction, which scipy does not have.
Values are taken as independent; where features share structure an interval is too narrow. scipy is imported where it is
used: its import takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.errors import DataError

Floats = NDArray[np.float64]

RESAMPLES = 999
LEVEL = 0.95


def ranks(values: ArrayLike) -> Floats:
    """Ranks (n,) from 1, ties sharing their mean."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=np.float64)


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation; NaN if an input is constant or has under 2 values. Raises `DataError` for different lengths."""
    a, b = _paired(first, second)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation with mean ranks for ties; NaN and errors as `pearson`."""
    a, b = _paired(first, second)
    return pearson(ranks(a), ranks(b))


def bootstrap_interval(
    statistic: Callable[..., float],
    *values: ArrayLike,
    n_resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic(*values)`, the i-th of all values (n,) drawn together, with replacement.

    Resamples whose statistic is NaN are left out; NaN if all are, or if there are no values. Raises `DataError` for
    values of different lengths.
    """
    columns = [np.asarray(column) for column in values]
    n = columns[0].shape[0]
    if any(column.shape[0] != n for column in columns):
        raise DataError(f"values resampled together have {', '.join(str(len(column)) for column in columns)} entries")
    if n == 0:
        return math.nan, math.nan
    rng = np.random.default_rng([seed, n])
    found = np.empty(n_resamples)
    for i in range(n_resamples):
        index = rng.integers(0, n, n)
        found[i] = statistic(*(column[index] for column in columns))
    found = found[~np.isnan(found)]
    if not found.size:
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_interval(
    numerator_P: Floats, denominator_P: Floats, seed: int, *, n_resamples: int = 1000, level: float = LEVEL
) -> tuple[float, float, float]:
    """Ratio of the means over prompts (P,), with its bootstrap interval: percentiles, the prompts drawn together."""
    n = len(numerator_P)
    index = np.random.default_rng([seed, n]).integers(0, n, (n_resamples, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = numerator_P[index].mean(axis=1) / denominator_P[index].mean(axis=1)
        ratio = numerator_P.mean() / denominator_P.mean()
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(ratio), float(low), float(high)


def permutation_p(
    statistic: Callable[[Floats, Floats], float],
    first: ArrayLike,
    second: ArrayLike,
    *,
    n_permutations: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided p: how often |statistic| is as large when `second` is shuffled, (1 + hits) / (1 + permutations).

    NaN where the statistic is.
    """
    a, b = _paired(first, second)
    observed = abs(statistic(a, b))
    if math.isnan(observed):
        return math.nan
    rng = np.random.default_rng([seed, a.size])
    bar = observed * (1 - 1e-12)  # the same pairs added up in another order may differ in the last bits
    hits = sum(abs(statistic(a, rng.permutation(b))) >= bar for _ in range(n_permutations))
    return (1 + hits) / (1 + n_permutations)


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's correlation of n pairs, each with bootstrap interval and permutation p."""

    n: int
    pearson: float
    pearson_low: float
    pearson_high: float
    pearson_p: float
    spearman: float
    spearman_low: float
    spearman_high: float
    spearman_p: float


def correlate(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Correlation:
    """Both correlations of (n,) with (n,), over the pairs where neither is NaN. NaN where they are not defined."""
    a, b = _paired(first, second)
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    rank_a, rank_b = ranks(a), ranks(b)
    pearson_low, pearson_high = bootstrap_interval(pearson, a, b, seed=seed)
    spearman_low, spearman_high = bootstrap_interval(spearman, a, b, seed=seed)
    return Correlation(
        n=a.size,
        pearson=pearson(a, b),
        pearson_low=pearson_low,
        pearson_high=pearson_high,
        pearson_p=permutation_p(pearson, a, b, seed=seed),
        spearman=pearson(rank_a, rank_b),
        spearman_low=spearman_low,
        spearman_high=spearman_high,
        spearman_p=permutation_p(pearson, rank_a, rank_b, seed=seed),
    )


@dataclass(frozen=True)
class KruskalWallis:
    """Do G groups differ in rank?"""

    n: int
    """Values in all groups."""
    statistic: float
    """H, corrected for ties; NaN if all values are equal."""
    p: float
    """From chi-squared with G - 1 degrees of freedom."""
    effect: float
    """Epsilon squared, H / (n - 1): 0 no difference, 1 the groups do not overlap."""


def kruskal_wallis(groups: Sequence[ArrayLike]) -> KruskalWallis:
    """Kruskal-Wallis test of two groups or more. Raises `DataError` for fewer, or an empty one."""
    values = [np.asarray(group, dtype=np.float64).ravel() for group in groups]
    if len(values) < 2 or any(not group.size for group in values):
        raise DataError(f"a comparison needs two groups with values, got {[group.size for group in values]}")
    n = sum(group.size for group in values)
    if np.ptp(np.concatenate(values)) == 0:
        return KruskalWallis(n, math.nan, math.nan, math.nan)
    from scipy.stats import kruskal

    found = kruskal(*values)
    statistic = max(float(found.statistic), 0.0)
    return KruskalWallis(n, statistic, float(found.pvalue), statistic / (n - 1))


@dataclass(frozen=True)
class MannWhitney:
    """Does one group lie above another?"""

    statistic: float
    """U of the first group: pairs in which its value is the larger one, ties counting half."""
    p: float
    """Two-sided, from the normal distribution with corrections for ties and continuity; NaN if all are equal."""
    effect: float
    """Cliff's delta, 2 U / (n m) - 1: 1 if all of the first lie above all of the second, -1 the reverse."""


def mann_whitney(first: ArrayLike, second: ArrayLike) -> MannWhitney:
    """Mann-Whitney test of (n,) against (m,). Raises `DataError` if one is empty."""
    a, b = (np.asarray(group, dtype=np.float64).ravel() for group in (first, second))
    if not (a.size and b.size):
        raise DataError(f"a comparison needs two groups with values, got {a.size} and {b.size}")
    from scipy.stats import mannwhitneyu

    found = mannwhitneyu(a, b, method="asymptotic")
    u = float(found.statistic)
    p = float(found.pvalue) if np.ptp(np.concatenate([a, b])) else math.nan
    return MannWhitney(u, p, 2 * u / (a.size * b.size) - 1)


def holm(p_P: ArrayLike) -> Floats:
    """p-values (P,) after Holm's correction for P tests; NaN stays and does not count.

    Raises `DataError` for values outside [0, 1].
    """
    p = np.asarray(p_P, dtype=np.float64).ravel()
    known = np.flatnonzero(~np.isnan(p))
    if (p[known] < 0).any() or (p[known] > 1).any():
        raise DataError(f"p-values must lie in [0, 1], got {p.tolist()}")
    corrected = np.full(p.size, np.nan)
    order = known[np.argsort(p[known], kind="stable")]
    raised = p[order] * np.arange(order.size, 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1) if order.size else raised
    return corrected


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (np.asarray(values, dtype=np.float64).ravel() for values in (first, second))
    if a.size != b.size:
        raise DataError(f"cannot pair {a.size} values with {b.size}")
    return a, b
