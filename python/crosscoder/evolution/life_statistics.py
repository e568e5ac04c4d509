"""How sure the life cycles are: intervals over features, and what shuffled snapshots would show.

Letters: F features, K snapshots, N shuffles, S bootstrap samples, C cells (combinations of kind, birth and lifetime).

All ours; the paper shows neither. The intervals come from a bootstrap over features: how far a figure depends on which
features the dictionary happens to have, not on the seed that trained it. They use that resampling features is drawing
from the multinomial distribution of the cells that features lie in, so their cost does not grow with F.

The null takes the snapshots in random order, the same for all features: every norm, every correlation between features
and the strength of each snapshot stay, only the order in time goes. What is left of a statistic in this null is not
evidence of development. A reversed order has the same `contiguous` and `excess_variation`, so with few snapshots p
cannot be small: at least about 2 / K!.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crosscoder.errors import ConfigError
from crosscoder.evolution.strength import EMERGENT, KIND_NAMES, LifeCycles


@dataclass(frozen=True)
class LifeIntervals:
    """Figures of the life cycles with the bootstrap's central intervals."""

    level: float
    """Coverage aimed at, for example 0.9."""
    n_by_kind: NDArray[np.int64]
    """(4,) features of each kind, in the order of `KIND_NAMES`."""
    n_by_kind_low: NDArray[np.float64]
    """(4,)"""
    n_by_kind_high: NDArray[np.float64]
    """(4,)"""
    births: NDArray[np.int64]
    """(K,) emergent features born at each snapshot."""
    births_low: NDArray[np.float64]
    """(K,)"""
    births_high: NDArray[np.float64]
    """(K,)"""
    median_emergence_step: float
    """Median training step at which emergent features are born; NaN if there are none."""
    median_emergence_step_low: float
    """Over the samples with emergent features."""
    median_emergence_step_high: float
    median_lifetime: float
    """Median share of the snapshots at which a feature that is not dead is present; NaN if all are dead."""
    median_lifetime_low: float
    median_lifetime_high: float


@dataclass(frozen=True)
class Compared:
    """A statistic beside what shuffled snapshots give."""

    observed: float
    """With the snapshots in their order."""
    null_mean: float
    """Mean over the shuffles."""
    null_low: float
    """5 % quantile of the shuffles."""
    null_high: float
    """95 % quantile of the shuffles."""
    p: float
    """Share of the shuffles at least as extreme, the observed order itself counted."""


@dataclass(frozen=True)
class ShuffledLife:
    """Statistics of the features that are not dead, beside snapshots in random order. NaN if all are dead."""

    contiguous: Compared
    """Share of features whose presence is one interval without a gap (the others are revived). p: as high."""
    emergent: Compared
    """Share of features called emergent. p: two-sided, twice the smaller tail."""
    largest_births: Compared
    """Births at the snapshot with the most, as a share of features. p: as high."""
    excess_variation: Compared
    """Mean over features of sum_k |r_k+1 - r_k| - (2 - r_0 - r_K-1), r the relative norm: how far a profile goes up
    and down beyond one rise to its peak and one fall; 0 for unimodal profiles. No threshold. p: as low."""
    n_shuffles: int


def life_intervals(cycles: LifeCycles, *, level: float = 0.9, n_bootstrap: int = 1000, seed: int = 0) -> LifeIntervals:
    """Bootstrap intervals over features. Raises `ConfigError` for a level outside (0, 1) or no samples."""
    if not 0 < level < 1:
        raise ConfigError(f"the level of the intervals must lie in (0, 1), got {level:g}")
    if n_bootstrap < 1:
        raise ConfigError(f"n_bootstrap must be at least 1, got {n_bootstrap}")
    n_features, n_snapshots = cycles.present.shape
    lived = cycles.present.sum(axis=1)
    codes = np.stack([cycles.kind.astype(np.int64), cycles.emergence.astype(np.int64), lived])
    cells, observed = np.unique(codes, axis=1, return_counts=True)
    kind, emergence, lived = cells
    rng = np.random.default_rng(seed)
    samples = rng.multinomial(n_features, observed / n_features, size=n_bootstrap)
    counts_SC = np.concatenate([observed[None], samples])  # the observed one first

    emergent = kind == EMERGENT
    alive = lived > 0
    n_by_kind = _grouped(counts_SC, kind, len(KIND_NAMES))
    births = _grouped(counts_SC[:, emergent], emergence[emergent], n_snapshots)
    step = _medians(births, cycles.steps.astype(np.float64))
    lifetime = _medians(
        _grouped(counts_SC[:, alive], lived[alive], n_snapshots + 1), np.arange(n_snapshots + 1) / n_snapshots
    )

    def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(2, ...) of the samples, NaN where no sample has a value."""
        known = values[~np.isnan(values)] if values.ndim == 1 else values
        if not len(known):
            return np.full(2, np.nan)
        return np.asarray(np.quantile(known, [(1 - level) / 2, (1 + level) / 2], axis=0))

    by_kind, by_snapshot = interval(n_by_kind[1:]), interval(births[1:])
    of_step, of_lifetime = interval(step[1:]), interval(lifetime[1:])
    return LifeIntervals(
        level=level,
        n_by_kind=n_by_kind[0].astype(np.int64),
        n_by_kind_low=by_kind[0],
        n_by_kind_high=by_kind[1],
        births=births[0].astype(np.int64),
        births_low=by_snapshot[0],
        births_high=by_snapshot[1],
        median_emergence_step=float(step[0]),
        median_emergence_step_low=float(of_step[0]),
        median_emergence_step_high=float(of_step[1]),
        median_lifetime=float(lifetime[0]),
        median_lifetime_low=float(of_lifetime[0]),
        median_lifetime_high=float(of_lifetime[1]),
    )


def shuffled_life(cycles: LifeCycles, *, n_shuffles: int = 500, seed: int = 0) -> ShuffledLife:
    """The null of shuffled snapshots. Raises `ConfigError` if there are no shuffles."""
    if n_shuffles < 1:
        raise ConfigError(f"n_shuffles must be at least 1, got {n_shuffles}")
    n_snapshots = cycles.steps.size
    alive = cycles.alive
    if not alive.any():
        nothing = Compared(np.nan, np.nan, np.nan, np.nan, np.nan)
        return ShuffledLife(nothing, nothing, nothing, nothing, n_shuffles)
    rng = np.random.default_rng(seed)
    # The observed order first.
    orders_NK = np.stack([np.arange(n_snapshots), *(rng.permutation(n_snapshots) for _ in range(n_shuffles))])
    present_KF = np.ascontiguousarray(cycles.present[alive].T)
    starts_at_0 = bool(cycles.steps[0] == 0)
    contiguous_emergent_births = np.array([_in_order(present_KF[order], starts_at_0) for order in orders_NK])
    excess = _excess_variation(cycles.relative[alive], orders_NK)
    contiguous, emergent, births = contiguous_emergent_births.T
    return ShuffledLife(
        contiguous=_compared(contiguous, "high"),
        emergent=_compared(emergent, "both"),
        largest_births=_compared(births, "high"),
        excess_variation=_compared(excess, "low"),
        n_shuffles=n_shuffles,
    )


def _in_order(present_KF: NDArray[np.bool_], starts_at_0: bool) -> tuple[float, float, float]:
    """Shares of features that are contiguous, emergent, and born at the snapshot with most births, as `life_cycles`
    has them for these snapshots in this order."""
    n_snapshots, n_features = present_KF.shape
    entries_F = present_KF[0].astype(np.uint8)
    settled_F = present_KF[0].copy() if starts_at_0 else np.zeros(n_features, dtype=bool)
    births = np.zeros(n_snapshots, dtype=np.int64)
    for k in range(n_snapshots):
        if k:
            entries_F += present_KF[k] > present_KF[k - 1]
        lasting_F = present_KF[k] & present_KF[k + 1] if k + 1 < n_snapshots else present_KF[k]
        births[k] = np.count_nonzero(lasting_F > settled_F)
        settled_F |= lasting_F
    return float((entries_F == 1).mean()), births.sum() / n_features, births.max() / n_features


def _excess_variation(relative_FK: NDArray[np.float32], orders_NK: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,): a sum over pairs of neighbours, so their mean differences (K, K) are all that is needed."""
    profile_KF = np.ascontiguousarray(relative_FK.T)
    between_KK = np.array([np.abs(profile_KF - row).mean(axis=1, dtype=np.float64) for row in profile_KF])
    mean_K = profile_KF.mean(axis=1, dtype=np.float64)
    variation = between_KK[orders_NK[:, :-1], orders_NK[:, 1:]].sum(axis=1)
    excess: NDArray[np.float64] = variation - (2 - mean_K[orders_NK[:, 0]] - mean_K[orders_NK[:, -1]])
    return excess


def _compared(values_N: NDArray[np.float64], tail: Literal["high", "low", "both"]) -> Compared:
    """The first value beside the others; a slack of 1e-9 for rounding."""
    observed, null = float(values_N[0]), values_N[1:]
    slack = 1e-9 * max(1.0, abs(observed))
    high = (1 + (null >= observed - slack).sum()) / (1 + len(null))
    low = (1 + (null <= observed + slack).sum()) / (1 + len(null))
    p = {"high": high, "low": low, "both": min(1.0, 2 * min(high, low))}[tail]
    null_low, null_high = np.quantile(null, [0.05, 0.95])
    return Compared(observed, float(null.mean()), float(null_low), float(null_high), float(p))


def _grouped(counts_SC: NDArray[np.int64], label_C: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """(S, n): counts summed over the cells of each label."""
    membership = (label_C[:, None] == np.arange(n)).astype(np.float64)
    return np.asarray(counts_SC.astype(np.float64) @ membership)


def _medians(counts_SV: NDArray[np.float64], value_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S,) medians of values, ascending, that occur so often; NaN where none does."""
    cumulative = counts_SV.cumsum(axis=1)
    total = cumulative[:, -1:]
    lower = (cumulative <= (total - 1) // 2).sum(axis=1).clip(0, len(value_V) - 1)
    upper = (cumulative <= total // 2).sum(axis=1).clip(0, len(value_V) - 1)
    return np.where(total[:, 0] > 0, (value_V[lower] + value_V[upper]) / 2, np.nan)
