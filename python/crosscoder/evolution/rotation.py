"""How decoder directions turn: cosines between snapshots, and the turning point.

Letters: F features, K snapshots, D width of one activation, G random groups of features, Q quantiles,
P = K (K - 1) / 2 pairs of snapshots.

The paper's (P, Fig. 3c): the cosine between a feature's decoder directions at two snapshots, averaged over
features, as a (K, K) heat map. Ours: that the average runs over the features present at both snapshots, the
quantiles, and the turning point with its interval and nulls.

The turning point (ours). A boundary b splits the snapshots into 0 .. b-1 and b .. K-1, and the pairs of snapshots into
those within a block and those across. The estimate is the b whose two mean cosines explain most of the variance of the
mean cosines over pairs, among those with within > across. Every snapshot counts the same (`spacing="index"`), wherever
it lies: snapshots at 0, 1, 2, 4, ... and then evenly make an axis that is logarithmic at first and linear later, and
the boundary is one of that axis. `spacing="log"` weights each snapshot by the distance between its neighbours in
log10(1 + step) instead. The interval comes from a bootstrap over features: it says how far the estimate depends on
which features there are, not how sharp the turn is (see `explained_by_lag`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from crosscoder import _core
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import Decoders, checked_decoders, checked_masks, checked_steps, decoders_of, inverse
from crosscoder.evolution.geometry import blocks, cosines
from crosscoder.kernels.arrays import n_threads

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_BINS = 4096
# Of decoders at once: their cosines, (n, K, K), then stay in the cache.
_BLOCK_BYTES = 1 << 24
# Cosines of float32 directions carry errors of about 1e-7: smaller differences are no structure.
_RESOLUTION = 1e-6


@dataclass(frozen=True)
class CosineSummary:
    """Cosines between decoder directions at snapshots i and j, over features present at both."""

    mean: NDArray[np.float64]
    """(K, K) in [-1, 1]; NaN where no feature is present at both."""
    quantiles: NDArray[np.float64]
    """(Q, K, K) at `Rotation.levels`, exact to 1/2048; NaN as in `mean`."""
    counts: NDArray[np.int64]
    """(K, K) features present at both."""


@dataclass(frozen=True)
class Cosines:
    """Cosines between the directions of features at different snapshots."""

    overall: CosineSummary
    """Over all features."""
    by_mask: dict[str, CosineSummary]
    """Over each mask's features."""
    levels: tuple[float, ...]
    """(Q,) levels of the quantiles."""
    to_final: NDArray[np.float32]
    """(F, K) cosine to the direction at the last snapshot; NaN unless present at both."""
    to_previous: NDArray[np.float32]
    """(F, K) cosine to the direction at the snapshot before; NaN unless present at both, and at k = 0."""


@dataclass(frozen=True)
class Rotation(Cosines):
    """What one pass over the decoders gives."""

    width: int
    """D."""
    group_sums: NDArray[np.float64]
    """(G, K, K) sums of cosines over random groups of features: what the bootstrap resamples."""
    group_counts: NDArray[np.int64]
    """(G, K, K) features in each of these sums."""


@dataclass(frozen=True)
class TurningPoint:
    """Where directions turn. Boundary b lies between snapshots b - 1 and b."""

    boundary: int
    """Index b of the first snapshot after the turn, 1 .. K - 1; -1 if no split has within > across."""
    step_before: float
    """Training step of snapshot b - 1; NaN without a boundary."""
    step_after: float
    """Training step of snapshot b; NaN without a boundary."""
    step: float
    """The middle of the two on a log10(1 + step) axis, for drawing."""
    boundary_low: int
    """Lower end of the bootstrap interval, an index like `boundary`; -1 without a boundary."""
    boundary_high: int
    """Upper end, inclusive."""
    step_low: float
    """Step of snapshot `boundary_low` - 1: the turn is after it, at the interval's level."""
    step_high: float
    """Step of snapshot `boundary_high`: the turn is before it."""
    level: float
    """Coverage aimed at, for example 0.9."""
    bootstrap: NDArray[np.float64]
    """(K,) share of bootstrap samples with the boundary at each index; the rest found none."""
    within: float
    """Mean cosine of pairs within a block at the best split; NaN without a boundary."""
    across: float
    """Mean cosine of pairs across the boundary."""
    explained_by_blocks: float
    """Share of the variance of the mean cosines over pairs that the split explains (1 parameter beside the mean)."""
    explained_by_lag: float
    """The same for a model without a turn, where the cosine depends on |i - j| alone (K - 2 parameters): if it is near
    1 and `explained_by_blocks` is not above it, a steady drift describes the data as well as a turn does."""
    p_shuffled: float
    """Share of orderings of the snapshots that split as well: are the blocks contiguous in time? At most K!
    orders exist, so for a small K it cannot be small (K = 8: about 0.03)."""
    p_random: float
    """Share of random directions (independent at each snapshot, same presence) that split as well."""
    null_mean: NDArray[np.float64]
    """(K, K) standard deviation of a mean cosine of random directions, 1 / sqrt(D n): the level of no relation."""
    spacing: str
    """How snapshots were weighted."""

    @property
    def is_split(self) -> bool:
        """Whether the snapshots fall in two parts more clearly than in shuffled order (p of at most 0.05)."""
        return bool(np.isfinite(self.step)) and self.p_shuffled <= 0.05

    @property
    def is_sharp(self) -> bool:
        """Whether such a split is a turn: a steady drift explains less of the cosines than it does."""
        return self.is_split and self.explained_by_blocks > self.explained_by_lag


@torch.no_grad()
def decoder_cosines(
    W_dec: Decoders,
    present_FK: ArrayLike,
    *,
    masks: Mapping[str, ArrayLike] | None = None,
    levels: tuple[float, ...] = QUANTILES,
    n_groups: int = 256,
    seed: int = 0,
) -> Rotation:
    """Cosines between snapshots of decoders (F, K, D), any floating dtype, over features `present_FK` (F, K) bool.

    One pass in blocks of features; nothing of shape (F, K, K) exists, and weights mapped from disk stay there.
    Quantiles come from histograms of 4,096 bins. `masks`: name -> (F,) bool, for example one a kind. `seed` draws
    the groups. Raises `DataError` for wrong shapes, `NonFiniteError` for weights that are not finite, `ConfigError`
    for levels outside [0, 1].
    """
    W_dec = decoders_of(W_dec)
    n_features, n_snapshots, width = checked_decoders(W_dec)
    present = np.asarray(present_FK, dtype=bool)
    if present.shape != (n_features, n_snapshots):
        raise DataError(f"present_FK has shape {present.shape}, expected {(n_features, n_snapshots)}")
    if not all(0 <= level <= 1 for level in levels):
        raise ConfigError(f"quantile levels must lie in [0, 1], got {levels}")
    chosen = checked_masks(masks, n_features)
    n_groups = min(n_groups, n_features)
    groups = np.random.default_rng(seed).permutation(n_features) % n_groups

    overall = _Accumulator(n_snapshots, n_groups)
    by_mask = {name: _Accumulator(n_snapshots, 1) for name in chosen}
    to_final = np.full((n_features, n_snapshots), np.nan, dtype=np.float32)
    to_previous = to_final.copy()
    for rows in blocks(W_dec, _BLOCK_BYTES):
        cosines_nKK, norm_nK = cosines(W_dec[rows], rows.start)
        usable = torch.from_numpy(present[rows]) & (inverse(norm_nK) > 0)
        # 0 where present, NaN else: added, it takes away what is not known.
        unknown_nK = torch.where(usable, 0.0, torch.nan)
        cosines_nKK.add_(unknown_nK[:, :, None]).add_(unknown_nK[:, None, :])
        known = cosines_nKK.numpy()
        overall.add(known, groups[rows])
        for name, mask in chosen.items():
            by_mask[name].add(known, np.where(mask[rows], 0, -1))
        to_final[rows] = known[:, :, -1]
        to_previous[rows, 1:] = np.diagonal(known, offset=1, axis1=1, axis2=2)
    return Rotation(
        overall=overall.summary(levels),
        by_mask={name: accumulator.summary(levels) for name, accumulator in by_mask.items()},
        levels=tuple(levels),
        to_final=to_final,
        to_previous=to_previous,
        width=width,
        group_sums=overall.square(overall.sums),
        group_counts=overall.square(overall.counts),
    )


def turning_point(
    rotation: Rotation,
    steps_K: ArrayLike,
    *,
    level: float = 0.9,
    spacing: Literal["index", "log"] = "index",
    n_bootstrap: int = 1000,
    n_null: int = 1000,
    seed: int = 0,
) -> TurningPoint:
    """The change point of the mean cosines (see the module's text), with interval and two nulls.

    Raises `DataError` if the steps do not match or K is under 3 (no pair would be within a block and another
    across), `ConfigError` for a level outside (0, 1) or an unknown spacing.
    """
    steps = checked_steps(steps_K)
    n_snapshots = rotation.group_sums.shape[1]
    if steps.size != n_snapshots:
        raise DataError(f"{steps.size} training steps do not match {n_snapshots} snapshots")
    if n_snapshots < 3:
        raise DataError(f"a turning point needs at least 3 snapshots, got {n_snapshots}")
    if not 0 < level < 1:
        raise ConfigError(f"the level of the interval must lie in (0, 1), got {level:g}")
    split = _Split(n_snapshots, _snapshot_weights(steps, spacing))
    rng = np.random.default_rng(seed)
    first, second = split.first, split.second
    group_sums = rotation.group_sums[:, first, second]
    group_counts = rotation.group_counts[:, first, second].astype(np.float64)
    counts = group_counts.sum(axis=0)
    means = _means(group_sums.sum(axis=0), counts)

    gain = split.gain(means[None])[0]
    boundary = int(gain.argmax()) + 1 if gain.max() > 0 else -1

    n_groups = len(group_sums)
    draws = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_bootstrap).astype(np.float64)
    resampled = split.gain(_means(draws @ group_sums, draws @ group_counts))
    found = np.where(resampled.max(axis=1) > 0, resampled.argmax(axis=1) + 1, 0)
    shares = np.bincount(found, minlength=n_snapshots) / n_bootstrap
    shares[0] = 0

    orders = np.array([rng.permutation(n_snapshots) for _ in range(n_null)])
    square = np.zeros((n_snapshots, n_snapshots))
    square[first, second] = square[second, first] = means
    shuffled = split.gain(square[orders[:, first], orders[:, second]]).max(axis=1)
    # The mean of n cosines of random directions in D dimensions: variance 1 / (D n), pairs uncorrelated.
    spread = 1 / np.sqrt(rotation.width * np.maximum(counts, 1))
    noise = np.where(counts > 0, rng.standard_normal((n_null, len(first))) * spread, np.nan)
    random = split.gain(noise).max(axis=1)

    all_counts = rotation.overall.counts
    null = np.where(all_counts > 0, 1 / np.sqrt(rotation.width * np.maximum(all_counts, 1)), np.nan)
    np.fill_diagonal(null, np.nan)
    low, high = _interval(found[found > 0], level) if boundary > 0 else (-1, -1)
    within, across = split.levels(means, boundary)
    before, after = (float(steps[boundary - 1]), float(steps[boundary])) if boundary > 0 else (np.nan, np.nan)
    return TurningPoint(
        boundary=boundary,
        step_before=before,
        step_after=after,
        step=float(np.sqrt((1 + before) * (1 + after)) - 1),
        boundary_low=low,
        boundary_high=high,
        step_low=float(steps[low - 1]) if low > 0 else np.nan,
        step_high=float(steps[high]) if high > 0 else np.nan,
        level=level,
        bootstrap=shares,
        within=within,
        across=across,
        explained_by_blocks=split.share(means, float(max(gain.max(), 0))),
        explained_by_lag=split.lag_share(means),
        p_shuffled=_p_value(float(gain.max()), shuffled),
        p_random=_p_value(float(gain.max()), random),
        null_mean=null,
        spacing=spacing,
    )


class _Accumulator:
    """Mean and quantiles of cosines by pair of snapshots, streaming: sums, counts, extremes and histograms.

    P here is K (K + 1) / 2: each snapshot with itself too.
    """

    def __init__(self, n_snapshots: int, n_groups: int) -> None:
        self._k = n_snapshots
        self._pairs = np.triu_indices(n_snapshots)
        n_pairs = len(self._pairs[0])
        self.sums = np.zeros((n_groups, n_pairs))
        self.counts = np.zeros((n_groups, n_pairs), dtype=np.int64)
        self._histogram = np.zeros((n_pairs, _BINS), dtype=np.int64)
        self._extremes = np.stack([np.full(n_pairs, np.inf), np.full(n_pairs, -np.inf)]).astype(np.float32)

    def add(self, cosines_nKK: NDArray[np.float32], group_n: NDArray[Any]) -> None:
        """Cosines, NaN where there is none, of features of these groups (below 0: not counted)."""
        group = np.ascontiguousarray(group_n, dtype=np.int32)
        _core.add_cosines(cosines_nKK, group, self.sums, self.counts, self._histogram, self._extremes, n_threads())

    def summary(self, levels: tuple[float, ...]) -> CosineSummary:
        counts = self.counts.sum(axis=0)
        mean = _means(self.sums.sum(axis=0), counts.astype(np.float64))
        cumulative = self._histogram.cumsum(axis=1)
        quantiles = [self._quantile(level, counts, cumulative) for level in levels]
        stacked = np.stack(quantiles) if quantiles else np.zeros((0, len(counts)))
        return CosineSummary(self.square(mean), self.square(stacked), self.square(counts))

    def _quantile(self, level: float, counts: NDArray[np.int64], cumulative: NDArray[np.int64]) -> NDArray[np.float64]:
        """(P,): between the two observations around rank level * (n - 1), as numpy's default."""
        rank = level * np.maximum(counts - 1, 0)
        below = np.floor(rank).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(counts - 1, 0))
        low, high = self._ranked(below, counts, cumulative), self._ranked(above, counts, cumulative)
        return np.where(counts > 0, low + (rank - below) * (high - low), np.nan)

    def _ranked(
        self, rank: NDArray[np.int64], counts: NDArray[np.int64], cumulative: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(P,): the observation of each rank, those of a bin taken as evenly spread over it."""
        bins = (cumulative <= rank[:, None]).sum(axis=1).clip(0, _BINS - 1)
        rows = np.arange(len(rank))
        before = np.where(bins > 0, cumulative[rows, bins - 1], 0)
        inside = np.maximum(cumulative[rows, bins] - before, 1)
        value = (bins + (rank - before + 0.5) / inside) * (2 / _BINS) - 1
        smallest, largest = np.where(counts > 0, self._extremes.astype(np.float64), 0.0)
        return np.asarray(np.clip(value, smallest, largest))

    def square(self, values: NDArray[Any]) -> NDArray[Any]:
        """(..., P) as symmetric (..., K, K)."""
        i, j = self._pairs
        square = np.zeros((*values.shape[:-1], self._k, self._k), dtype=values.dtype)
        square[..., i, j] = values
        square[..., j, i] = values
        return square


class _Split:
    """The statistic of the turning point: all boundaries of many (P,) vectors of mean cosines at once."""

    def __init__(self, n_snapshots: int, weights_K: NDArray[np.float64]) -> None:
        self.first, self.second = np.triu_indices(n_snapshots, 1)
        self._weight = weights_K[self.first] * weights_K[self.second]
        boundary = np.arange(1, n_snapshots)[:, None]
        self._across = ((self.first < boundary) & (self.second >= boundary)).astype(np.float64)

    def gain(self, means: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, K - 1): variance between within-pairs and across-pairs of `means` (n, P), 0 unless within > across."""
        known = ~np.isnan(means)
        weight = known * self._weight
        total = weight.sum(axis=1, keepdims=True)
        rounded = np.round(np.where(known, means, 0) / _RESOLUTION) * _RESOLUTION
        # Centred, so that equal cosines give differences of 0.
        centre = (weight * rounded).sum(axis=1, keepdims=True) / np.maximum(total, np.finfo(float).tiny)
        centred = np.where(known, rounded - centre, 0)
        across_weight = weight @ self._across.T
        across_sum = (weight * centred) @ self._across.T
        within_weight = total - across_weight
        within_sum = (weight * centred).sum(axis=1, keepdims=True) - across_sum
        possible = (across_weight > 0) & (within_weight > 0)
        across = across_sum / np.where(possible, across_weight, 1)
        within = within_sum / np.where(possible, within_weight, 1)
        between = across_weight * within_weight / np.maximum(total, np.finfo(float).tiny) * (within - across) ** 2
        return np.where(possible & (within > across), between, 0)

    def levels(self, means: NDArray[np.float64], boundary: int) -> tuple[float, float]:
        """Mean cosine within and across at one boundary."""
        if boundary < 1:
            return np.nan, np.nan
        known = ~np.isnan(means)
        across = self._across[boundary - 1] > 0
        inside, outside = known & ~across, known & across
        return (
            float(np.average(means[inside], weights=self._weight[inside])),
            float(np.average(means[outside], weights=self._weight[outside])),
        )

    def share(self, means: NDArray[np.float64], between: float) -> float:
        """`between` over the weighted sum of squares; 0 where all mean cosines are equal."""
        total = self._squares(means, np.zeros(len(means), dtype=np.int64))
        return min(between / total, 1.0) if total > 0 else 0.0

    def lag_share(self, means: NDArray[np.float64]) -> float:
        """Share of the sum of squares explained by the mean of each lag |i - j|."""
        total = self._squares(means, np.zeros(len(means), dtype=np.int64))
        return 1 - self._squares(means, self.second - self.first) / total if total > 0 else 0.0

    def _squares(self, means: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
        """Weighted sum of squares around the mean of each label."""
        known = ~np.isnan(means)
        weight, label = self._weight[known], labels[known]
        values = np.round(means[known] / _RESOLUTION) * _RESOLUTION
        sums, totals = np.bincount(label, weight * values), np.bincount(label, weight)
        centre = (sums / np.maximum(totals, np.finfo(float).tiny))[label]
        difference = values - centre
        difference[np.abs(difference) < _RESOLUTION] = 0
        return float((weight * difference**2).sum())


def _snapshot_weights(steps: NDArray[np.int64], spacing: str) -> NDArray[np.float64]:
    """(K,) weight of each snapshot, mean 1: equal, or half the distance between its neighbours on a log axis."""
    if spacing == "index":
        return np.ones(len(steps))
    if spacing != "log":
        raise ConfigError(f'spacing must be "index" or "log", not {spacing!r}')
    position = np.log10(1.0 + steps)
    gaps = np.diff(position)
    weights = (np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0])) / 2
    return np.asarray(weights / weights.mean())


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    means = np.full(np.shape(sums), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _interval(found: NDArray[np.int64], level: float) -> tuple[int, int]:
    """The bootstrap's central interval of indices, inclusive at both ends."""
    if not found.size:
        return -1, -1
    tail = (1 - level) / 2
    low = np.quantile(found, tail, method="lower")
    return int(low), int(np.quantile(found, 1 - tail, method="higher"))


def _p_value(observed: float, null: NDArray[np.float64]) -> float:
    """Share of the null at or above the observed value, itself counted; 1e-9 relative slack for rounding."""
    return float((1 + (null >= observed * (1 - 1e-9)).sum()) / (1 + len(null)))
