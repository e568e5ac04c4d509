"""Intervals over prompts, rank correlation, and when a task is above chance."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from crosscoder.common import statistics

Floats = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
CHANCE_P = 0.001
"""A task is above chance where so many right answers would come by chance with a smaller probability than this."""


def resamples(n: int, seed: int) -> NDArray[np.int64]:
    """(RESAMPLES, n): prompts drawn with replacement."""
    return np.random.default_rng([seed, n]).integers(0, n, (RESAMPLES, n))


def ratio_interval(numerator_P: Floats, denominator_P: Floats, seed: int) -> tuple[float, float, float]:
    """Ratio of the means over prompts, with its bootstrap interval (percentiles, the prompts resampled together)."""
    index = resamples(len(numerator_P), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = numerator_P[index].mean(axis=1) / denominator_P[index].mean(axis=1)
        ratio = numerator_P.mean() / denominator_P.mean()
    low, high = np.nanquantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(ratio), float(low), float(high)


def mean_interval(values_P: Floats, seed: int) -> tuple[float, float, float]:
    """Mean over prompts with its bootstrap interval."""
    return ratio_interval(values_P, np.ones_like(values_P), seed)


def chance_probability(n_right: int, n: int) -> float:
    """Probability of at least `n_right` right answers of `n` by tossing a coin."""
    log_half = n * math.log(2)

    def log_binomial(k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    return min(1.0, math.fsum(math.exp(log_binomial(k) - log_half) for k in range(n_right, n + 1)))


def above_chance(metric_P: Floats) -> bool:
    """Whether prompts are answered right (metric above 0) more often than chance explains, and in the mean."""
    n_right = int((metric_P > 0).sum())
    return chance_probability(n_right, len(metric_P)) < CHANCE_P and float(metric_P.mean()) > 0


def spearman(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Rank correlation; NaN where one of the two is constant or there are fewer than three values."""
    return statistics.spearman(a, b) if len(a) >= 3 else math.nan
