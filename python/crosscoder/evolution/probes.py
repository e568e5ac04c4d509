"""Is the norm honest? How well a linear probe of one snapshot tells that a feature is active, against its norm there.

Letters: n probed features, K snapshots, D width, B tokens in a batch, T held-out tokens.

The paper (P, arXiv 2509.17196) holds that a feature's decoder norm at a snapshot follows how linearly separable it is
there. How that is measured here is ours:

- *Active* at a token means that a gate of the feature is open at one snapshot or more. With a gate for each snapshot
  (h n_fk > theta_f) this is the gate at the snapshot of the largest norm, so the label does not depend on the norm at
  the snapshot that is probed.
- The probe of (f, k) is Fisher's linear discriminant on the activations of snapshot k alone,
  w = (C_k + ridge tr(C_k) / D)^-1 (mean of the active tokens - mean of the others). C_k may be the covariance of all
  tokens: it differs from the one within the classes by a multiple of the difference's outer product, which changes the
  length of w alone. So one matrix a snapshot serves all features, and one pass over the tokens is enough.
  Logistic regression is a little better: by 0.019 of AUC in the mean, 0.040 at most, on three features at three
  snapshots of the quickstart (40,000 tokens for training, 50,000 held out).
- Its score is the area under the ROC curve (AUC) on held-out tokens: the probability that a token where the feature is
  active scores higher than one where it is not.

The label is circular to a degree: h sums over the snapshots, the probed one included. Therefore a second AUC
(`auc_without`), of the same probe against labels without it: as many tokens, those with the largest
h - <x_k, W_enc[f, k]>. Nulls: a probe trained and tested on the labels of other tokens, and a random direction whose
sign is the training tokens'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.common.statistics import spearman
from crosscoder.errors import ConfigError, DataError

RIDGE = 1e-4
"""Added to the covariance's diagonal, as a multiple of its mean."""
FEWEST = 10
"""A feature that is active (or not) at fewer held-out tokens has no AUC."""
LOW_NORM, HIGH_NORM = 0.1, 0.5
"""Relative norms that count as "absent" and as "there" where they are compared with the AUC."""
LOW_AUC, HIGH_AUC = 0.7, 0.9
"""AUCs that count as "not separable" and as "separable" there."""
NORM_BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Probes:
    """One direction a feature and snapshot."""

    weights: Tensor
    """(n, K, D) float32, the probes."""
    shuffled: Tensor
    """(n, K, D) float32, the probes of the labels of other tokens: the null."""
    random: Tensor
    """(n, K, D) float32, random directions, with the sign that suits the training tokens."""
    n_active: NDArray[np.int64]
    """(n,) training tokens at which each feature is active."""
    n_tokens: int
    """Training tokens."""


@dataclass(frozen=True)
class Areas:
    """AUCs at one snapshot, NaN for a feature that is active (or not) at fewer than `FEWEST` held-out tokens."""

    auc: NDArray[np.float64]
    """(n,)"""
    without: NDArray[np.float64]
    """(n,) against the labels that this snapshot had no part in."""
    shuffled: NDArray[np.float64]
    """(n,) of the null: trained and tested on the labels of other tokens."""
    random: NDArray[np.float64]
    """(n,) of a random direction."""


@dataclass(frozen=True)
class NormHonesty:
    """How the AUC goes with the norm."""

    correlation: NDArray[np.float64]
    """(n,) Spearman correlation of AUC and relative norm over the snapshots; NaN if one of them is constant or
    missing."""
    correlation_overall: float
    """The same over all features and snapshots at once."""
    correlation_median: float
    """Median of `correlation`."""
    correlation_median_null: float
    """The same with the norms of another feature: what all features' common course alone gives."""
    bins: NDArray[np.float64]
    """(n_bins + 1,) edges of the relative norm."""
    bin_auc: NDArray[np.float64]
    """(n_bins,) mean AUC of the (feature, snapshot) pairs in each, weighted to the whole dictionary."""
    bin_auc_without: NDArray[np.float64]
    """(n_bins,) the same for `auc_without`."""
    bin_count: NDArray[np.int64]
    """(n_bins,) probed pairs in each."""
    hidden: NDArray[np.int32]
    """(m, 2) pairs (feature, snapshot): hardly a norm (at most 0.1 of the feature's largest) yet an AUC of at least
    0.9 with and without this snapshot's part in the label; the largest AUC first."""
    hollow: NDArray[np.int32]
    """(m, 2) pairs (feature, snapshot) with at least half of the largest norm and an AUC under 0.7, the smallest
    first."""
    share_hidden: float
    """Of the pairs with hardly a norm, the share that is hidden, weighted to the whole dictionary; NaN if there is
    none."""
    share_hollow: float
    """Of the pairs with at least half of the largest norm, the share that is hollow, weighted likewise."""


class ProbeTrainer:
    """Fits the probes of n features in one pass: `add` batches of training tokens, then `probes`.

    The tokens must come in a shuffled order: for the null, each token gets the labels of the one before it. How they
    are divided into batches does not matter. Sums are float64; memory K D^2 + 2 n K D numbers.
    """

    def __init__(self, mean_KD: Tensor, n_features: int, *, seed: int = 0) -> None:
        """`mean_KD`: about the mean activation, against loss of digits, on the device of the batches; `seed` draws the
        random directions."""
        n_snapshots, width = mean_KD.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=mean_KD.device)
        self._mean_KD = mean_KD
        self._seed = seed
        self._n_tokens = 0
        self._last_n = torch.zeros(1, n_features, dtype=torch.bool, device=mean_KD.device)
        self._count_2n = zeros(2, n_features)
        self._sum_KD = zeros(n_snapshots, width)
        self._outer_KDD = zeros(n_snapshots, width, width)
        self._active_K2nD = zeros(n_snapshots, 2 * n_features, width)

    def add(self, x_BKD: Tensor, active_Bn: Tensor) -> None:
        """Count B tokens: activations, and bool labels. Raises `DataError` for shapes that do not fit."""
        n_features = self._last_n.shape[1]
        if x_BKD.shape[1:] != self._mean_KD.shape or active_Bn.shape != (len(x_BKD), n_features):
            raise DataError(
                f"activations {tuple(x_BKD.shape)} and labels {tuple(active_Bn.shape)} do not fit (tokens, "
                f"{', '.join(map(str, self._mean_KD.shape))}) and (tokens, {n_features})"
            )
        if not len(x_BKD):
            return
        shuffled_Bn = torch.cat([self._last_n, active_Bn[:-1]])
        self._last_n = active_Bn[-1:].clone()
        label_B2n = torch.cat([active_Bn, shuffled_Bn], dim=1)
        x_KBD = (x_BKD - self._mean_KD.to(x_BKD)).transpose(0, 1).contiguous()
        for k, x_BD in enumerate(x_KBD):
            self._outer_KDD[k] += x_BD.T @ x_BD
            self._active_K2nD[k] += label_B2n.to(x_BD.dtype).T @ x_BD
        self._sum_KD += x_KBD.double().sum(dim=1)
        self._count_2n += label_B2n.sum(dim=0).view(2, -1)
        self._n_tokens += len(x_BKD)

    def probes(self, ridge: float = RIDGE) -> Probes:
        """The probes of all tokens so far. Raises `DataError` if there is none, `ConfigError` for a negative ridge."""
        if not self._n_tokens:
            raise DataError("probes need training tokens; there was none")
        if not ridge >= 0:
            raise ConfigError(f"the ridge must be 0 or more, got {ridge:g}")
        width = self._mean_KD.shape[1]
        mean_KD = self._sum_KD / self._n_tokens
        C_KDD = self._outer_KDD / self._n_tokens - mean_KD[:, :, None] * mean_KD[:, None, :]
        scale_K = C_KDD.diagonal(dim1=1, dim2=2).mean(dim=1)
        # A snapshot without any variance gets the unit matrix: its probes are 0, their AUC 0.5.
        added_K = torch.where(scale_K > 0, ridge * scale_K, 1.0)
        C_KDD += added_K[:, None, None] * torch.eye(width, dtype=C_KDD.dtype, device=C_KDD.device)
        count = self._count_2n.flatten()[:, None]
        others = (self._n_tokens - count).clamp_min(1)
        difference = self._active_K2nD / count.clamp_min(1) - (self._sum_KD[:, None] - self._active_K2nD) / others
        weights = torch.linalg.solve(C_KDD, difference.transpose(1, 2)).permute(2, 0, 1)
        own, shuffled = weights.unflatten(0, (2, -1))
        generator = torch.Generator().manual_seed(self._seed)
        random = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own.device)
        own_difference = difference[:, : len(own)].transpose(0, 1)
        random *= torch.where((own_difference * random).sum(dim=2) < 0, -1.0, 1.0)[:, :, None]
        return Probes(
            weights=own.float().contiguous(),
            shuffled=shuffled.float().contiguous(),
            random=random.float(),
            n_active=self._count_2n[0].long().cpu().numpy(),
            n_tokens=self._n_tokens,
        )


def fit_probes(
    batches: Iterable[tuple[Tensor, Tensor]], mean_KD: Tensor, n_features: int, *, ridge: float = RIDGE, seed: int = 0
) -> Probes:
    """The probes of (activations (B, K, D), labels (B, n) bool) batches, see `ProbeTrainer`."""
    trainer = ProbeTrainer(mean_KD, n_features, seed=seed)
    for x_BKD, active_Bn in batches:
        trainer.add(x_BKD, active_Bn)
    return trainer.probes(ridge)


def snapshot_areas(probes: Probes, k: int, x_TD: Tensor, active_Tn: Tensor, without_Tn: Tensor) -> Areas:
    """The AUCs at snapshot k on its held-out activations x_TD.

    `active_Tn`: the labels, bool; `without_Tn`: h without this snapshot's part, whose largest values (as many as there
    are labels) are the other labels. Raises `DataError` for shapes that do not fit.
    """
    if active_Tn.shape != (len(x_TD), len(probes.weights)) or without_Tn.shape != active_Tn.shape:
        raise DataError(
            f"activations {tuple(x_TD.shape)}, labels {tuple(active_Tn.shape)} and h {tuple(without_Tn.shape)} do not "
            f"fit {len(probes.weights)} probes"
        )
    active = [np.flatnonzero(column) for column in active_Tn.T.cpu().numpy()]
    without = [_largest(column, len(own)) for column, own in zip(without_Tn.T.cpu().numpy(), active, strict=True)]
    auc, auc_without = _areas(probes.weights[:, k], x_TD, active, without)
    (shuffled,) = _areas(probes.shuffled[:, k], x_TD, [(column + 1) % len(x_TD) for column in active])
    (random,) = _areas(probes.random[:, k], x_TD, active)
    return Areas(auc, auc_without, shuffled, random)


def area_under_curve(score_T: ArrayLike, active: ArrayLike) -> float:
    """Probability that a token of `active` (indices) scores higher than another one, ties counting half; NaN if there
    are under `FEWEST` of either."""
    score = np.asarray(score_T)
    return _area(score, np.sort(score), np.asarray(active))


def stratified_sample(
    kind_F: ArrayLike, emergence_F: ArrayLike, n: int, *, alive_F: ArrayLike, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """About equally many features of every (kind, emergence), n in all (or all that are alive, if fewer).

    Returns their ids (n,), ascending, and for each how many features of the dictionary it stands for: the size of its
    group over the number taken from it. Raises `ConfigError` for n under 1, `DataError` for shapes that do not match.
    """
    kind, emergence, alive = (np.asarray(values) for values in (kind_F, emergence_F, alive_F))
    if kind.ndim != 1 or kind.shape != emergence.shape or kind.shape != alive.shape:
        raise DataError(f"kinds {kind.shape}, emergence {emergence.shape} and alive {alive.shape} must be alike (F,)")
    if n < 1:
        raise ConfigError(f"the number of features to probe must be at least 1, got {n}")
    ids = np.flatnonzero(alive)
    strata = np.stack([kind[ids], emergence[ids]])
    _, group, sizes = np.unique(strata, axis=1, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    left, taken = n, np.zeros(len(sizes), dtype=np.int64)
    by_size = np.argsort(sizes, kind="stable")
    for place, g in enumerate(by_size):  # the smallest first, so that what they cannot give others do
        taken[g] = min(sizes[g], -(-left // (len(by_size) - place)))
        left -= taken[g]
    group = group.reshape(-1)
    chosen = [rng.permutation(ids[group == g])[: taken[g]] for g in range(len(sizes))]
    weights = [np.full(len(part), sizes[g] / max(1, taken[g])) for g, part in enumerate(chosen)]
    flat, flat_weights = np.concatenate([np.zeros(0, np.int64), *chosen]), np.concatenate([np.zeros(0), *weights])
    order = np.argsort(flat)
    return flat[order], flat_weights[order]


def norm_honesty(
    auc_nK: ArrayLike,
    relative_nK: ArrayLike,
    *,
    auc_without_nK: ArrayLike,
    features_n: ArrayLike,
    weights_n: ArrayLike,
    seed: int = 0,
) -> NormHonesty:
    """Compare AUCs with relative norms (largest over a feature's snapshots: 1) of features of the given ids and
    weights. NaN AUCs are left out. Raises `DataError` for shapes that do not match."""
    auc, relative, without = (np.asarray(values, dtype=np.float64) for values in (auc_nK, relative_nK, auc_without_nK))
    features, weights = np.asarray(features_n), np.asarray(weights_n, dtype=np.float64)
    if (
        auc.ndim != 2
        or not (auc.shape == relative.shape == without.shape)
        or not (features.shape == weights.shape == auc.shape[:1])
    ):
        raise DataError(f"AUCs of shape {auc.shape} do not match norms {relative.shape} and features {features.shape}")
    known = np.isfinite(auc)
    order = np.random.default_rng(seed).permutation(len(auc))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # nobody keeps its own norms (unless alone)
    correlation = np.array([spearman(a[ok], r[ok]) for a, r, ok in zip(auc, relative, known, strict=True)])
    null = np.array([spearman(a[ok], r[ok]) for a, r, ok in zip(auc, relative[other], known, strict=True)])

    weight = np.where(known, weights[:, None], 0.0)
    edges = np.array(NORM_BINS)
    place = np.clip(np.searchsorted(edges, relative, side="left") - 1, 0, len(edges) - 2)  # (low, high]
    bins = [(place == b) & known for b in range(len(edges) - 1)]
    low, high = (relative <= LOW_NORM) & known, (relative >= HIGH_NORM) & known
    hidden, hollow = low & (auc >= HIGH_AUC) & (without >= HIGH_AUC), high & (auc < LOW_AUC)
    return NormHonesty(
        correlation=correlation,
        correlation_overall=spearman(auc[known], relative[known]),
        correlation_median=_median(correlation),
        correlation_median_null=_median(null),
        bins=edges,
        bin_auc=np.array([_mean(auc, weight, where) for where in bins]),
        bin_auc_without=np.array([_mean(without, weight, where) for where in bins]),
        bin_count=np.array([where.sum() for where in bins]),
        hidden=_pairs(hidden, -auc, features),
        hollow=_pairs(hollow, auc, features),
        share_hidden=_mean(hidden, weight, low),
        share_hollow=_mean(hollow, weight, high),
    )


def _areas(w_nD: Tensor, x_TD: Tensor, *labels: list[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """(n,) AUC for each of the labels; a block of features at a time."""
    areas = [np.full(len(w_nD), np.nan) for _ in labels]
    for block in torch.split(torch.arange(len(w_nD)), 64):
        score_nT = (w_nD[block] @ x_TD.T).cpu().numpy()
        ordered_nT = np.sort(score_nT, axis=1)
        for i, score, ordered in zip(block.tolist(), score_nT, ordered_nT, strict=True):
            for area, label in zip(areas, labels, strict=True):
                area[i] = _area(score, ordered, label[i])
    return areas


def _area(score_T: NDArray[np.generic], ordered_T: NDArray[np.generic], active: NDArray[np.int64]) -> float:
    """By mean ranks: Mann and Whitney's U over the number of pairs."""
    n, rest = len(active), len(score_T) - len(active)
    if min(n, rest) < FEWEST:
        return float("nan")
    own = np.sort(score_T[active])
    ranks = (np.searchsorted(ordered_T, own, "left") + np.searchsorted(ordered_T, own, "right") + 1) / 2
    return float((ranks.sum() - n * (n + 1) / 2) / (n * rest))


def _largest(values_T: NDArray[np.generic], n: int) -> NDArray[np.int64]:
    return np.argpartition(values_T, len(values_T) - n)[len(values_T) - n :] if n else np.zeros(0, dtype=np.int64)


def _mean(
    values: NDArray[np.float64] | NDArray[np.bool_], weight: NDArray[np.float64], where: NDArray[np.bool_]
) -> float:
    total = weight[where].sum()
    return float((values[where] * weight[where]).sum() / total) if total > 0 else float("nan")


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else float("nan")


def _pairs(where: NDArray[np.bool_], key: NDArray[np.float64], features: NDArray[np.generic]) -> NDArray[np.int32]:
    rows, columns = np.nonzero(where)
    order = np.argsort(key[rows, columns], kind="stable")
    return np.stack([features[rows[order]], columns[order]], axis=1).astype(np.int32)
