"""Is the dictionary stable? Two crosscoders (seeds) matched one to one by the cosine of their decoders.

Letters: F features of the first, G of the second, K snapshots, D width, A and B features of either that take part.

The paper's reviewers asked for it; the definitions are ours. Features are compared by their decoders at one snapshot,
the last by default, and only those take part that the caller names (alive, and present there: the direction of a norm
near 0 is noise). How they are matched stands in `crosscoder.evolution.matching`. *Stable* is a feature whose match has
a cosine of at least `STABLE`.

Nulls: the nearest of as many random directions with the second moments of the second dictionary's (so as anisotropic as
it), without the one-to-one condition, so an upper bound of what matching them gives; and the matched pairs' emergence,
permuted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.common.statistics import spearman
from crosscoder.errors import DataError
from crosscoder.evolution.checks import Decoders, decoders_of
from crosscoder.evolution.matching import Matching, match_features, taken

STABLE = 0.7
"""A match of at least this cosine is the same feature."""
PERMUTATIONS = 500
NULL_FEATURES = 4096
"""Features of the first dictionary, at most, that random directions are compared with."""
BLOCK = 4096
"""Random directions that are looked at at once."""


@dataclass(frozen=True)
class Stability:
    """Two dictionaries compared. Names with `_null` are what chance gives."""

    matching: Matching
    n_first: int
    """Features of the first dictionary that take part."""
    n_second: int
    share_stable: float
    """Share of the smaller dictionary with a match of at least `STABLE`."""
    share_stable_null: float
    """Share of the first one's features with a random direction that near."""
    nearest_median: float
    """Median cosine of the first dictionary's features with the nearest of the second one's."""
    nearest_median_null: float
    nearest_null: NDArray[np.float32]
    """(F,) largest cosine with any of the random directions; NaN for features that do not take part, and for all but
    `NULL_FEATURES` of them, chosen at random."""
    bars: NDArray[np.float64]
    """(10,) cosines from 0.5 to 0.95."""
    share_at: NDArray[np.float64]
    """(10,) share of the smaller dictionary with a match of at least that cosine."""
    share_at_null: NDArray[np.float64]
    """(10,) share of the first one's features with a random direction that near."""
    n_pairs: int
    """Stable pairs of which both have an emergence; the rest is about them."""
    emergence_correlation: float
    """Spearman correlation of their emergence (index of the snapshot); NaN if one of them is constant."""
    emergence_p: float
    """Share of the permutations with a rank correlation at least as large (itself counted)."""
    emergence_same: float
    """Share that emerges at the same snapshot."""
    emergence_same_null: float
    """Mean of it over permutations of the pairs."""
    emergence_within_one: float
    """Share that emerges at most one snapshot apart."""
    emergence_within_one_null: float
    emergence_pairs: NDArray[np.int64]
    """(K, K) of these pairs, how many have the emergence (row) in the first and (column) in the second dictionary."""
    n_pairs_emerging: int
    """Pairs of which one or both are not there from the first snapshot on. Where few features emerge, the shares over
    all pairs say little; these do."""
    emergence_same_emerging: float
    """`emergence_same` over these."""
    emergence_same_emerging_null: float
    emergence_within_one_emerging: float
    """`emergence_within_one` over these."""
    emergence_within_one_emerging_null: float


@torch.no_grad()
def compare_dictionaries(
    first: Decoders,
    second: Decoders,
    emergence_first: ArrayLike,
    emergence_second: ArrayLike,
    *,
    snapshot: int = -1,
    take_first: ArrayLike | None = None,
    take_second: ArrayLike | None = None,
    candidates: int | None = None,
    seed: int = 0,
) -> Stability:
    """Match two dictionaries, decoders (F, K, D) and (G, K, D), and compare the emergence (F,), (G,) of the matched
    features (index of the snapshot, -1 for none). Arguments and errors as for `match_features`."""
    first, second = decoders_of(first), decoders_of(second)
    emerged = np.asarray(emergence_first), np.asarray(emergence_second)
    for decoders, emergence in zip((first, second), emerged, strict=True):
        if emergence.shape != decoders.shape[:1]:
            raise DataError(f"emergence has shape {emergence.shape}, expected ({len(decoders)},)")
        if ((emergence < -1) | (emergence >= decoders.shape[1])).any():
            raise DataError(f"emergence must lie between -1 and {decoders.shape[1] - 1}, the last snapshot")
    matching = match_features(
        first, second, snapshot=snapshot, take_first=take_first, take_second=take_second, candidates=candidates
    )
    units_AD, ids_A = taken(first, snapshot, take_first, "first")
    units_BD, ids_B = taken(second, snapshot, take_second, "second")
    some_a = np.arange(len(ids_A))
    if len(some_a) > NULL_FEATURES:
        some_a = np.sort(np.random.default_rng(seed).choice(some_a, NULL_FEATURES, replace=False))
    of_a = units_AD[torch.from_numpy(some_a).to(units_AD.device)]
    nearest_A, chance_a = matching.nearest[ids_A], _nearest(of_a, _random_like(units_BD, seed))

    bars = np.arange(50, 100, 5) / 100
    size = min(len(ids_A), len(ids_B))
    stable = np.flatnonzero(matching.cosine >= STABLE)
    own, other = emerged[0][stable], emerged[1][matching.match[stable]]
    both = (own >= 0) & (other >= 0)
    own, other = own[both].astype(np.int64), other[both].astype(np.int64)
    n_snapshots = first.shape[1]
    pairs_KK = np.bincount(own * n_snapshots + other, minlength=n_snapshots**2).reshape(n_snapshots, n_snapshots)
    nearest_null = np.full(len(first), np.nan, dtype=np.float32)
    nearest_null[ids_A[some_a]] = chance_a
    rng = np.random.default_rng(seed)
    measured = _agreement(own, other)
    permuted = np.array([_agreement(own, rng.permutation(other)) for _ in range(PERMUTATIONS)])
    chance = permuted.mean(axis=0)
    at_least = int((permuted[:, 0] >= measured[0]).sum())
    return Stability(
        matching=matching,
        n_first=len(ids_A),
        n_second=len(ids_B),
        share_stable=_share(matching.cosine >= STABLE, size),
        share_stable_null=_share(chance_a >= STABLE, len(chance_a)),
        nearest_median=_median(nearest_A),
        nearest_median_null=_median(chance_a),
        nearest_null=nearest_null,
        bars=bars,
        share_at=np.array([_share(matching.cosine >= bar, size) for bar in bars]),
        share_at_null=np.array([_share(chance_a >= bar, len(chance_a)) for bar in bars]),
        n_pairs=len(own),
        emergence_correlation=measured[0],
        emergence_p=(1 + at_least) / (1 + PERMUTATIONS) if np.isfinite(measured[0]) else float("nan"),
        emergence_same=measured[1],
        emergence_same_null=float(chance[1]),
        emergence_within_one=measured[2],
        emergence_within_one_null=float(chance[2]),
        emergence_pairs=pairs_KK,
        n_pairs_emerging=int(((own > 0) | (other > 0)).sum()),
        emergence_same_emerging=measured[3],
        emergence_same_emerging_null=float(chance[3]),
        emergence_within_one_emerging=measured[4],
        emergence_within_one_emerging_null=float(chance[4]),
    )


def _agreement(own: NDArray[np.int64], other: NDArray[np.int64]) -> tuple[float, float, float, float, float]:
    """Rank correlation; share equal and share within one, over all and where one or both are not 0."""
    distance, emerging = np.abs(own - other), (own > 0) | (other > 0)
    shares = [
        _share(near[where], int(where.sum()))
        for where in (np.ones_like(emerging), emerging)
        for near in (distance == 0, distance <= 1)
    ]
    return (spearman(own, other), *shares)  # type: ignore[return-value]


def _share(flags: NDArray[np.bool_], of: int) -> float:
    return float(flags.sum()) / of if of else float("nan")


def _median(values: NDArray[np.floating]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _random_like(units_BD: Tensor, seed: int) -> Tensor:
    """(B, D) random directions with the same second moments."""
    # A stream of its own: a dictionary that was drawn with the same seed would meet its own numbers again.
    own = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint32)
    generator = torch.Generator().manual_seed(int(own[0]))
    noise_BD = torch.randn(units_BD.shape, generator=generator).to(units_BD)
    moments_DD = (units_BD.T @ units_BD).double() / max(1, len(units_BD))
    values_D, vectors_DD = torch.linalg.eigh(moments_DD)
    root_DD = (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return torch.nn.functional.normalize(noise_BD @ root_DD.to(units_BD), dim=1)


def _nearest(units_AD: Tensor, units_BD: Tensor) -> NDArray[np.float64]:
    """(A,) largest cosine; -1 where there is none."""
    best_A = units_AD.new_full((len(units_AD),), -1.0)
    for first in range(0, len(units_BD), BLOCK):
        best_A = torch.maximum(best_A, (units_AD @ units_BD[first : first + BLOCK].T).amax(dim=1))
    return np.asarray(best_A.double().cpu().numpy())
