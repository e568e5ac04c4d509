"""Synthetic activations with a known dictionary: does the pipeline find a truth that somebody planted?

Letters: n tokens, K snapshots, D width, T true features, F learned features.

All of it is ours. A true feature has a direction that turns once, at a turning point common to all, a
strength at each snapshot (0 before it emerges and after it dies), a firing rate (Zipf-like over features) and
log-normal magnitudes, the same at all snapshots. Features fire independently, but for pairs that fire together and
pairs that exclude each other; a few are dense:

    x[b, k] = sum_t a[b, t] * strengths[t, k] * directions[t, k] + noise

Every part of the truth follows from the configuration exactly, so the analyses can be tested on the
dictionary itself (`decoders()`) as well as on what a crosscoder learned from `sample`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.common.statistics import spearman
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import Decoders, checked_decoders, decoders_of
from crosscoder.evolution.rotation import decoder_cosines
from crosscoder.evolution.rotation import turning_point as estimate_turning_point
from crosscoder.evolution.strength import life_cycles

_EMERGING, _ENDING = 0.6, 0.7


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted. The defaults are the project's benchmark (docs/method.md, section 6)."""

    n_snapshots: int = 8
    """K."""
    d_model: int = 64
    """D."""
    n_features: int = 512
    """T."""
    l0: float = 8.0
    """Mean number of features a token fires, over the union of snapshots (about 5 of them at one snapshot)."""
    turning_point: int = 4
    """Index of the first snapshot with the turned directions."""
    turned_cosine: float = 0.1
    """Cosine of each direction before and after the turn."""
    initialization_share: float = 0.35
    """Share of features that are there at snapshot 0; the others emerge at 1 .. K - 1, all equally often."""
    vanishing_share: float = 0.2
    """Share of the features that emerge early enough (two snapshots of life) to vanish before the end."""
    zipf_offset: float = 10.0
    """The firing rate of the feature of rank r is proportional to 1 / (r + offset), but for the dense ones."""
    n_dense: int = 4
    """Features, the first in rank, that fire at a rate of `dense_rate`."""
    dense_rate: float = 0.3
    """Firing rate of the dense features."""
    correlated_share: float = 0.1
    """Share of features in pairs of which one fires, at half of the tokens, exactly where the other does."""
    anticorrelated_share: float = 0.1
    """Share of features in pairs of which one never fires where the other does."""
    magnitude_sigma: float = 0.5
    """Of the log-normal magnitudes, whose mean is 1."""
    noise: float = 0.02
    """Standard deviation of the noise in each number, independent at each snapshot."""
    evolution: bool = True
    """False: the null, in which every feature has one direction and strength 1 at all snapshots."""
    seed: int = 0
    """Draws the dictionary (not the samples)."""


class PlantedDictionary:
    """The truth, and samples from it."""

    directions: Tensor
    """(T, K, D) float32 unit vectors."""
    strengths: Tensor
    """(T, K) float32 in [0, 1]; 0 where the feature is absent, else at least 0.6."""
    rates: NDArray[np.float64]
    """(T,) probability of firing at a token."""
    correlated: NDArray[np.int64]
    """(n, 2) pairs that fire together: the second does as the first does on half of the tokens."""
    anticorrelated: NDArray[np.int64]
    """(n, 2) pairs of which the second never fires where the first does."""
    emergence: NDArray[np.int64]
    """(T,) index of the first snapshot where the feature is there."""
    peak: NDArray[np.int64]
    """(T,) index of the snapshot of strength 1, the later of ties."""
    death: NDArray[np.int64]
    """(T,) index of the first snapshot where it is gone for good; -1 if it never is."""
    turning_point: int
    """Index of the first snapshot after the turn; -1 in the null."""

    def __init__(self, config: PlantedConfig | None = None) -> None:
        """Raises `ConfigError` for a configuration that nothing can be planted with."""
        config = config or PlantedConfig()
        _check(config)
        self.config = config
        n_true, n_snapshots = config.n_features, config.n_snapshots
        rng = np.random.default_rng(config.seed)
        # Every array is drawn also where it is not used, so that the null keeps the directions and the rates.
        before_TD, other_TD = _unit(rng.standard_normal((2, n_true, config.d_model)))
        ranks = rng.permutation(n_true)
        self.rates = _rates(ranks, config)
        self.correlated, self.anticorrelated = _pairs(ranks, config)
        # What the first of a pair does, the second follows: this is then how often it fires.
        leader, follower = self.correlated.T
        self._own_rates = self.rates.copy()
        self.rates[follower] = (self.rates[leader] + self.rates[follower]) / 2
        leader, follower = self.anticorrelated.T
        self.rates[follower] *= 1 - self.rates[leader]
        aside_TD = _unit(other_TD - (other_TD * before_TD).sum(axis=1, keepdims=True) * before_TD)
        cosine = config.turned_cosine
        after_TD = cosine * before_TD + np.sqrt(1 - cosine**2) * aside_TD
        initial = rng.permutation(n_true) < round(config.initialization_share * n_true)
        born = 1 + rng.permutation(n_true) % (n_snapshots - 1)
        may_vanish = rng.random(n_true) < config.vanishing_share
        life, height = rng.random(n_true), rng.random(n_true)

        snapshots = np.arange(n_snapshots)
        if config.evolution:
            self.turning_point = config.turning_point
            self.emergence = np.where(initial, 0, born)
            choices = n_snapshots - self.emergence - 2  # deaths at emergence + 2 .. K - 1
            vanishes = may_vanish & (choices > 0)
            self.death = np.where(vanishes, self.emergence + 2 + np.floor(life * choices).astype(np.int64), -1)
            end = np.where(vanishes, self.death, n_snapshots)
            self.peak = self.emergence + np.floor(height * (end - self.emergence)).astype(np.int64)
            strengths = _profile(snapshots, self.emergence[:, None], self.peak[:, None], end[:, None])
            directions = np.where((snapshots >= config.turning_point)[:, None], after_TD[:, None], before_TD[:, None])
        else:
            self.turning_point = -1
            self.emergence = np.zeros(n_true, dtype=np.int64)
            self.death = np.full(n_true, -1)
            self.peak = np.full(n_true, n_snapshots - 1)
            strengths = np.ones((n_true, n_snapshots))
            directions = np.repeat(before_TD[:, None], n_snapshots, axis=1)
        self.directions = torch.from_numpy(directions.astype(np.float32))
        self.strengths = torch.from_numpy(strengths.astype(np.float32))

    @property
    def steps(self) -> NDArray[np.int64]:
        """(K,) training steps for these snapshots: 0, 1, 2, 4, 8, ..."""
        return np.concatenate([[0], 2 ** np.arange(self.config.n_snapshots - 1)]).astype(np.int64)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(T, K) where the strength is not 0."""
        return self.strengths.numpy() > 0

    @property
    def last_present(self) -> NDArray[np.int64]:
        """(T,) index of the last snapshot where the feature is there."""
        return np.where(self.death < 0, self.config.n_snapshots, self.death) - 1

    def decoders(self) -> Tensor:
        """(T, K, D) the true dictionary as a crosscoder's decoder: strengths times directions."""
        return self.strengths[:, :, None] * self.directions

    def sample(self, n_tokens: int, seed: int | torch.Generator = 0) -> Tensor:
        """(n, K, D) float32 activations. The same seed gives the same tokens; a generator goes on."""
        config = self.config
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        shape = (n_tokens, config.n_features)
        fires = torch.rand(shape, generator=generator) < torch.from_numpy(self._own_rates).float()
        leader, follower = torch.from_numpy(self.correlated).T
        follows = torch.rand(n_tokens, len(leader), generator=generator) < 0.5
        fires[:, follower] = torch.where(follows, fires[:, leader], fires[:, follower])
        leader, follower = torch.from_numpy(self.anticorrelated).T
        fires[:, follower] &= ~fires[:, leader]
        sigma = config.magnitude_sigma
        magnitude = (torch.randn(shape, generator=generator) * sigma - sigma**2 / 2).exp()
        x = (magnitude * fires) @ self.decoders().flatten(1)
        x += config.noise * torch.randn(x.shape, generator=generator)
        return x.reshape(n_tokens, config.n_snapshots, config.d_model)


@dataclass(frozen=True)
class PlantedScore:
    """How much of the truth a dictionary holds."""

    match: NDArray[np.int64]
    """(T,) learned feature matched to each true one, each used once; -1 if none is left or none is similar at all."""
    cosine: NDArray[np.float32]
    """(T,) cosine of the match, at the last snapshot where the true feature is there (the final one, unless
    it vanished); 0 without a match."""
    recovered: NDArray[np.bool_]
    """(T,) cosine above the bar."""
    share_recovered: float
    """Mean of `recovered`."""
    precision: float
    """Share of the learned features alive that are matched to a recovered true one."""
    emergence: NDArray[np.int64]
    """(T,) estimated index of emergence of the match; -1 if not recovered or without emergence."""
    emergence_correlation: float
    """Spearman correlation of estimated and true emergence over recovered features; NaN if one of them is constant."""
    emergence_exact: float
    """Share of the recovered features whose emergence is estimated exactly; NaN if none is recovered."""
    share_emergent: float
    """Share of the learned features alive that are called emergent: in the null, all falsely."""
    share_other: float
    """Share of the learned features alive that are there at single snapshots only."""
    turning_point: int
    """Estimated boundary, -1 if none was found."""
    turning_point_covered: bool
    """Whether the bootstrap interval holds the true boundary (false in the null, which has none)."""
    turning_point_p: float
    """p of the estimate under shuffled snapshots: large in the null."""


def score(
    W_dec: Decoders,
    truth: PlantedDictionary,
    *,
    cosine: float = 0.9,
    threshold: float = 0.3,
    scale_K: ArrayLike | None = None,
    alive_F: ArrayLike | None = None,
    seed: int = 0,
) -> PlantedScore:
    """Compare decoders (F, K, D) with the truth.

    Matching is greedy by descending cosine, one to one: above 0.9 it is the optimal assignment unless two true features
    lie within 52 degrees of each other. `scale_K` (K,): the factors by which the activations were scaled for the
    crosscoder, undone here; `threshold`: tau of `life_cycles`. Raises `DataError` for another K or D.
    """
    W_dec = decoders_of(W_dec)
    n_features, n_snapshots, width = checked_decoders(W_dec)
    if (n_snapshots, width) != (truth.config.n_snapshots, truth.config.d_model):
        raise DataError(
            f"decoders of {n_snapshots} snapshots and width {width} do not fit a planted dictionary of "
            f"{truth.config.n_snapshots} and {truth.config.d_model}"
        )
    decoders = W_dec.detach().float().cpu()
    if scale_K is not None:
        decoders = decoders / torch.as_tensor(np.asarray(scale_K), dtype=torch.float32)[:, None]
    norms_FK = torch.linalg.vector_norm(decoders, dim=2)
    cycles = life_cycles(norms_FK.numpy(), truth.steps, threshold=threshold, alive_F=alive_F)

    similar_TF = torch.empty(truth.config.n_features, n_features)
    for k in range(n_snapshots):
        rows = torch.from_numpy(np.flatnonzero(truth.last_present == k))
        unit_FD = decoders[:, k] / norms_FK[:, k, None].clamp_min(torch.finfo(torch.float32).tiny)
        similar_TF[rows] = truth.directions[rows, k] @ unit_FD.T
    similar_TF[:, torch.from_numpy(~cycles.alive)] = -1
    match, matched_cosine = _greedy(similar_TF.numpy())
    recovered = matched_cosine > cosine
    emergence = np.where(recovered, cycles.emergence[np.maximum(match, 0)], -1).astype(np.int64)

    kinds = cycles.n_by_kind
    n_alive = int(cycles.alive.sum())
    turn = estimate_turning_point(decoder_cosines(decoders, cycles.present, seed=seed), truth.steps, seed=seed)
    return PlantedScore(
        match=match,
        cosine=matched_cosine,
        recovered=recovered,
        share_recovered=float(recovered.mean()),
        precision=float(recovered.sum() / max(n_alive, 1)),
        emergence=emergence,
        emergence_correlation=spearman(emergence[recovered], truth.emergence[recovered]),
        emergence_exact=float((emergence == truth.emergence)[recovered].mean()) if recovered.any() else np.nan,
        share_emergent=kinds["emergent"] / max(n_alive, 1),
        share_other=kinds["other"] / max(n_alive, 1),
        turning_point=turn.boundary,
        turning_point_covered=truth.turning_point > 0
        and turn.boundary_low <= truth.turning_point <= turn.boundary_high,
        turning_point_p=turn.p_shuffled,
    )


def _greedy(similar_TF: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One-to-one pairs in order of descending cosine, ties by index; only positive ones."""
    n_true, n_learned = similar_TF.shape
    match, cosine = np.full(n_true, -1), np.zeros(n_true, dtype=np.float32)
    taken = np.zeros(n_learned, dtype=bool)
    rows, columns = np.nonzero(similar_TF > 0)
    for pair in np.argsort(-similar_TF[rows, columns], kind="stable"):
        row, column = rows[pair], columns[pair]
        if match[row] < 0 and not taken[column]:
            match[row], cosine[row], taken[column] = column, similar_TF[row, column], True
    return match, cosine


def _rates(ranks: NDArray[np.int64], config: PlantedConfig) -> NDArray[np.float64]:
    weight = 1 / (ranks + 1 + config.zipf_offset)
    dense = ranks < config.n_dense
    rates = (config.l0 - config.dense_rate * dense.sum()) * weight / max(weight[~dense].sum(), 1e-12)
    rates[dense] = config.dense_rate
    if rates.min() < 0:
        raise ConfigError(f"l0 = {config.l0:g} is less than the {config.n_dense} dense features alone fire; raise it")
    if rates.max() > 1:
        raise ConfigError(
            f"l0 = {config.l0:g} needs a firing rate of {rates.max():.2f}; raise zipf_offset or n_features"
        )
    return np.asarray(rates)


def _pairs(ranks: NDArray[np.int64], config: PlantedConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of neighbours in rank, spread evenly over the ranks behind the dense ones."""
    order = np.argsort(ranks)[config.n_dense :]
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    n_correlated, n_anticorrelated = (
        round(share * config.n_features / 2) for share in (config.correlated_share, config.anticorrelated_share)
    )
    chosen = np.linspace(0, len(pairs), n_correlated + n_anticorrelated, endpoint=False).astype(np.int64)
    rng = np.random.default_rng([config.seed, 1])
    correlated = rng.permutation(len(chosen)) < n_correlated
    return pairs[chosen[correlated]], pairs[chosen[~correlated]]


def _profile(
    snapshots: NDArray[np.int64], emergence: NDArray[np.int64], peak: NDArray[np.int64], end: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(T, K): from 0.6 at emergence straight up to 1 at the peak, straight down to 0.7 at the last, else 0."""
    rise = (snapshots - emergence) / np.maximum(peak - emergence, 1)
    fall = (snapshots - peak) / np.maximum(end - 1 - peak, 1)
    shape = np.where(snapshots <= peak, _EMERGING + (1 - _EMERGING) * rise, 1 - (1 - _ENDING) * fall)
    shape = np.where(snapshots == peak, 1.0, shape)
    return np.where((snapshots >= emergence) & (snapshots < end), shape, 0.0)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def _check(config: PlantedConfig) -> None:
    if config.n_snapshots < 3 or config.n_features < 1 or config.d_model < 2:
        raise ConfigError("a planted dictionary needs at least 3 snapshots, 1 feature and 2 dimensions")
    if not 0 < config.turning_point < config.n_snapshots:
        raise ConfigError(f"turning_point must lie in 1 .. {config.n_snapshots - 1}, got {config.turning_point}")
    for name in ("initialization_share", "vanishing_share", "correlated_share", "anticorrelated_share", "dense_rate"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {getattr(config, name):g}")
    in_pairs = config.correlated_share + config.anticorrelated_share
    if in_pairs > 1 - config.n_dense / config.n_features or config.n_dense < 0:
        raise ConfigError(f"{config.n_dense} dense features and a share of {in_pairs:g} in pairs do not fit together")
    if not -1 <= config.turned_cosine <= 1:
        raise ConfigError(f"turned_cosine must lie in [-1, 1], got {config.turned_cosine:g}")
