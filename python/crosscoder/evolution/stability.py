"""Is the dictionary stable? Two crosscoders (seeds) matched one to one by the cosine of their decoders.

Letters: F features of the first, G of the second, K snapshots, D width, A and B features of either that take part,
n candidates, E candidate pairs.

The paper's reviewers asked for it; the definitions are ours. Features are compared by their decoders at one snapshot,
the last by default, and only those take part that the caller names (alive, and present there: the direction of a norm
near 0 is noise). The matching is the one-to-one assignment with the largest sum of cosines (the Hungarian method's);
a pair with a cosine of 0 or less is none. *Stable* is a feature whose match has a cosine of at least 0.7.

The matrix of all cosines is too large for large dictionaries. There all pairs are looked at, a block at a time, and
those of at least 0.5 kept, at most n for a feature of the first dictionary, the nearest. The assignment of these is
exact (scipy's LAPJVsp, with a partner of cosine 0 for everybody). Leaving out the pairs under 0.5, which are not the
same feature in any case, changes the problem a little: where two dictionaries share 3 % of 2,000 features, 61 stable
pairs were found and 67 with all pairs; `nearest` bounds the number from above. What the restriction to n can cost
beyond that is known without solving the problem of all pairs of at least 0.5: with prices p_g >= 0 that are
optimal for the sparse one, sum_g p_g + sum_f max(0, max_g cos_fg - p_g) over *all* pairs of at least 0.5 is no less
than the full optimum (weak duality), and only features with a list that was cut can add anything.

Nulls: the nearest of as many random directions with the second moments of the second dictionary's (so as anisotropic as
it), without the one-to-one condition, so an upper bound of what matching them gives; and the matched pairs' emergence,
permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import ConfigError, DataError, MissingDependencyError
from crosscoder.evolution.checks import checked_decoders
from crosscoder.evolution.statistics import spearman

FULL_PAIRS = 1 << 25
"""Up to so many pairs of features all of them are candidates (5,792 by 5,792; 0.5 GB)."""
FLOOR = 0.5
"""Beyond that, a pair of a smaller cosine is none."""
STABLE = 0.7
"""A match of at least this cosine is the same feature."""
CANDIDATES = 16
"""Nearest features that a feature of the first dictionary may be matched with there."""
PERMUTATIONS = 500
BLOCK = 4096
"""Rows and columns of a block of cosines."""


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment."""

    match: NDArray[np.int32]
    """(F,) feature of the second dictionary, -1 where there is none."""
    cosine: NDArray[np.float32]
    """(F,) of the pair, 0 where there is none."""
    nearest: NDArray[np.float32]
    """(F,) largest cosine with any feature of the second dictionary, one to one or not; NaN for features that do not
    take part."""
    candidates: int
    """n; 0 where all pairs are candidates."""
    loss: float
    """Upper bound of what the restriction to n cost: the sum of cosines of the best assignment of all pairs of at least
    0.5 minus this one's, over the number of features that could be matched."""
    n_cut: int
    """Features with more than n such pairs: 0 means that nothing was lost."""


@dataclass(frozen=True)
class Stability:
    """Two dictionaries compared. Names with `_null` are what chance gives."""

    matching: Matching
    n_first: int
    """Features of the first dictionary that take part."""
    n_second: int
    share_stable: float
    """Share of the smaller dictionary with a match of cosine at least 0.7."""
    share_stable_null: float
    """Share of the first one's features with a random direction that near."""
    nearest_median: float
    """Median cosine of the first dictionary's features with the nearest of the second one's."""
    nearest_median_null: float
    nearest_null: NDArray[np.float32]
    """(F,) largest cosine with any of the random directions; NaN for features that do not take part."""
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
def match_features(
    first: Tensor,
    second: Tensor,
    *,
    snapshot: int = -1,
    take_first: ArrayLike | None = None,
    take_second: ArrayLike | None = None,
    candidates: int | None = None,
) -> Matching:
    """Match decoders (F, K, D) with (G, K, D) at one snapshot.

    `take_first` (F,), `take_second` (G,) bool: the features that take part (those with a norm of 0 never do).
    `candidates`: n; 0 means all pairs, in memory at once. By default 0 up to 33 million pairs, beyond that 16.
    Raises `DataError` for decoders that do not fit together, `ConfigError` for a snapshot that does not exist,
    `MissingDependencyError` without scipy.
    """
    if candidates is not None and candidates < 0:
        raise ConfigError(f"the number of candidates must be 0 (all) or more, got {candidates}")
    if first.shape[1:] != second.shape[1:]:
        raise DataError(f"decoders {tuple(first.shape)} and {tuple(second.shape)} differ in snapshots or width")
    units_AD, ids_A = _taken(first, snapshot, take_first, "first")
    units_BD, ids_B = _taken(second, snapshot, take_second, "second")
    if candidates is None:
        candidates = 0 if len(ids_A) * len(ids_B) <= FULL_PAIRS else CANDIDATES
    loss, n_cut = 0.0, 0
    if candidates:
        near = _search(units_AD, units_BD, candidates)
        nearest_A, n_cut = near.nearest_A, int(near.cut_A.sum())
        match_A, cosine_A = _assign(near, (len(ids_A), len(ids_B)))
        if n_cut:
            loss = _loss(near, units_AD, units_BD, match_A, cosine_A)
    else:
        cosine_AB = (units_AD @ units_BD.T).cpu().numpy()
        nearest_A = cosine_AB.max(axis=1, initial=-1.0)
        match_A, cosine_A = _assign_all(cosine_AB)
    match, cosine = np.full(len(first), -1, dtype=np.int32), np.zeros(len(first), dtype=np.float32)
    nearest = np.full(len(first), np.nan, dtype=np.float32)
    matched = match_A >= 0
    match[ids_A[matched]] = ids_B[match_A[matched]]
    cosine[ids_A], nearest[ids_A] = cosine_A, nearest_A
    return Matching(match, cosine, nearest, candidates, loss, n_cut)


@torch.no_grad()
def compare_dictionaries(
    first: Tensor,
    second: Tensor,
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
    emerged = np.asarray(emergence_first), np.asarray(emergence_second)
    for decoders, emergence in zip((first, second), emerged, strict=True):
        if emergence.shape != decoders.shape[:1]:
            raise DataError(f"emergence has shape {emergence.shape}, expected ({len(decoders)},)")
        if ((emergence < -1) | (emergence >= decoders.shape[1])).any():
            raise DataError(f"emergence must lie between -1 and {decoders.shape[1] - 1}, the last snapshot")
    matching = match_features(
        first, second, snapshot=snapshot, take_first=take_first, take_second=take_second, candidates=candidates
    )
    units_AD, ids_A = _taken(first, snapshot, take_first, "first")
    units_BD, ids_B = _taken(second, snapshot, take_second, "second")
    nearest_A, chance_A = matching.nearest[ids_A], _nearest(units_AD, _random_like(units_BD, seed))

    bars = np.arange(50, 100, 5) / 100
    size = min(len(ids_A), len(ids_B))
    stable = np.flatnonzero(matching.cosine >= STABLE)
    own, other = emerged[0][stable], emerged[1][matching.match[stable]]
    both = (own >= 0) & (other >= 0)
    own, other = own[both].astype(np.int64), other[both].astype(np.int64)
    n_snapshots = first.shape[1]
    pairs_KK = np.bincount(own * n_snapshots + other, minlength=n_snapshots**2).reshape(n_snapshots, n_snapshots)
    nearest_null = np.full(len(first), np.nan, dtype=np.float32)
    nearest_null[ids_A] = chance_A
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
        share_stable_null=_share(chance_A >= STABLE, len(ids_A)),
        nearest_median=_median(nearest_A),
        nearest_median_null=_median(chance_A),
        nearest_null=nearest_null,
        bars=bars,
        share_at=np.array([_share(matching.cosine >= bar, size) for bar in bars]),
        share_at_null=np.array([_share(chance_A >= bar, len(ids_A)) for bar in bars]),
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


def _taken(decoders: Tensor, snapshot: int, take: ArrayLike | None, which: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Unit decoders (A, D) of the features that take part, and their ids (A,)."""
    n_features, n_snapshots, _ = checked_decoders(decoders)
    if not -n_snapshots <= snapshot < n_snapshots:
        raise ConfigError(f"snapshot {snapshot} does not exist; there are {n_snapshots}")
    chosen = np.ones(n_features, dtype=bool) if take is None else np.asarray(take, dtype=bool)
    if chosen.shape != (n_features,):
        raise DataError(f"the mask of the {which} dictionary has shape {chosen.shape}, expected ({n_features},)")
    vectors_FD = decoders[:, snapshot].detach()
    vectors_FD = vectors_FD if vectors_FD.dtype == torch.float64 else vectors_FD.float()
    chosen = chosen & (torch.linalg.vector_norm(vectors_FD, dim=1) > 0).cpu().numpy()
    ids = np.flatnonzero(chosen)
    taken = vectors_FD[torch.from_numpy(ids).to(vectors_FD.device)]
    return torch.nn.functional.normalize(taken, dim=1, eps=0.0), ids


def _random_like(units_BD: Tensor, seed: int) -> Tensor:
    """(B, D) random directions with the same second moments."""
    generator = torch.Generator().manual_seed(seed)
    noise_BD = torch.randn(units_BD.shape, generator=generator).to(units_BD)
    moments_DD = (units_BD.T @ units_BD).double() / max(1, len(units_BD))
    values_D, vectors_DD = torch.linalg.eigh(moments_DD)
    root_DD = (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return torch.nn.functional.normalize(noise_BD @ root_DD.to(units_BD), dim=1)


# ------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class _Near:
    rows: NDArray[np.int64]
    """(E,) candidate pairs."""
    columns: NDArray[np.int64]
    cosines: NDArray[np.float64]
    nearest_A: NDArray[np.float64]
    """(A,) largest cosine."""
    cut_A: NDArray[np.bool_]
    """(A,) rows that have more pairs than candidates."""


def _search(units_AD: Tensor, units_BD: Tensor, n: int) -> _Near:
    """The pairs of at least `FLOOR`, the n nearest of each row; equal ones by column."""
    nearest_A = np.full(len(units_AD), -1.0)
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))]
    cut_A = np.zeros(len(units_AD), dtype=bool)
    for first in range(0, len(units_AD), BLOCK):
        row_E, column_E, cosine_E = found[0]
        for columns, cosine in _blocks(units_AD[first : first + BLOCK], units_BD):
            rows = slice(first, first + len(cosine))
            nearest_A[rows] = np.maximum(nearest_A[rows], cosine.amax(dim=1).double().cpu().numpy())
            row, column = (cosine >= FLOOR).nonzero(as_tuple=True)
            value = cosine[row, column].double().cpu().numpy()
            row_E = np.concatenate([row_E, first + row.cpu().numpy()])
            column_E = np.concatenate([column_E, columns.start + column.cpu().numpy()])
            cosine_E = np.concatenate([cosine_E, value])
            order = np.lexsort((column_E, -cosine_E, row_E))
            row_E, column_E, cosine_E = row_E[order], column_E[order], cosine_E[order]
            rank_E = np.arange(len(row_E)) - np.searchsorted(row_E, row_E)
            cut_A[row_E[rank_E >= n]] = True
            row_E, column_E, cosine_E = row_E[rank_E < n], column_E[rank_E < n], cosine_E[rank_E < n]
        found.append((row_E, column_E, cosine_E))
    rows_E, columns_E, cosines_E = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _Near(rows_E, columns_E, cosines_E, nearest_A, cut_A)


def _nearest(units_AD: Tensor, units_BD: Tensor) -> NDArray[np.float64]:
    """(A,) largest cosine."""
    best_A = units_AD.new_full((len(units_AD),), -1.0)
    for first in range(0, len(units_AD), BLOCK):
        for _, cosine in _blocks(units_AD[first : first + BLOCK], units_BD):
            rows = slice(first, first + len(cosine))
            best_A[rows] = torch.maximum(best_A[rows], cosine.amax(dim=1))
    return best_A.double().cpu().numpy()


def _blocks(units_AD: Tensor, units_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines of some rows, a block of columns at a time."""
    for first in range(0, len(units_BD), BLOCK):
        columns = slice(first, first + BLOCK)
        yield columns, units_AD @ units_BD[columns].T


# ------------------------------------------------------------------------------------------- assignment


def _assign_all(cosine_AB: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(A,) column of each row (-1 for none) in the best assignment, and its cosine."""
    match, cosine = np.full(len(cosine_AB), -1), np.zeros(len(cosine_AB))
    rows, columns = _scipy("optimize").linear_sum_assignment(np.maximum(cosine_AB, 0), maximize=True)
    paired = cosine_AB[rows, columns] > 0
    rows, columns = rows[paired], columns[paired]
    match[rows], cosine[rows] = columns, cosine_AB[rows, columns]
    return match, cosine


def _assign(near: _Near, shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The same of the candidates alone."""
    csgraph, sparse = _scipy("sparse.csgraph"), _scipy("sparse")
    n_rows, n_columns = shape
    match, cosine = np.full(n_rows, -1), np.zeros(n_rows)
    if not len(near.rows):
        return match, cosine
    # Each row has a column of its own, of cosine 0: so a matching of all rows exists. Weights must not be 0.
    alone = np.arange(n_rows)
    cost = np.concatenate([2 - near.cosines, np.full(n_rows, 2.0)])
    places = (np.concatenate([near.rows, alone]), np.concatenate([near.columns, n_columns + alone]))
    graph = sparse.csr_matrix((cost, places), shape=(n_rows, n_columns + n_rows))
    rows, columns = csgraph.min_weight_full_bipartite_matching(graph)
    paired = columns < n_columns
    match[rows[paired]] = columns[paired]
    cosine[rows[paired]] = 2 - np.asarray(graph[rows[paired], columns[paired]]).ravel()
    return match, cosine


def _loss(
    near: _Near, units_AD: Tensor, units_BD: Tensor, match_A: NDArray[np.int64], cosine_A: NDArray[np.float64]
) -> float:
    """`Matching.loss`: the dual value over all pairs minus the primal one."""
    prices_B = _prices(near, match_A, cosine_A, len(units_BD))
    profit_A = np.zeros(len(units_AD))
    np.maximum.at(profit_A, near.rows, near.cosines - prices_B[near.columns])
    price_B = torch.from_numpy(prices_B).to(units_AD)
    for rows in torch.split(torch.from_numpy(np.flatnonzero(near.cut_A)).to(units_AD.device), BLOCK):
        best = units_AD.new_zeros(len(rows))
        for columns, cosine in _blocks(units_AD[rows], units_BD):
            gain = torch.where(cosine >= FLOOR, cosine - price_B[columns], 0)
            best = torch.maximum(best, gain.amax(dim=1))
        at = rows.cpu().numpy()
        profit_A[at] = np.maximum(profit_A[at], best.double().cpu().numpy())
    gap = float(prices_B.sum() + profit_A.sum() - cosine_A.sum())
    return max(0.0, gap) / min(len(units_AD), len(units_BD))


def _prices(
    near: _Near, match_A: NDArray[np.int64], cosine_A: NDArray[np.float64], n_columns: int
) -> NDArray[np.float64]:
    """(B,) the smallest prices at which every row likes its own match best: p_g >= cos_fg - (cos_f - p_match(f)).

    Longest paths by Bellman and Ford's method; in an optimal matching no cycle gains anything.
    """
    prices_B = np.zeros(n_columns)
    for _ in range(n_columns + 1):
        profit_A = np.where(match_A >= 0, cosine_A - prices_B[match_A], 0.0)
        raised_B = prices_B.copy()
        np.maximum.at(raised_B, near.columns, near.cosines - profit_A[near.rows])
        if (raised_B - prices_B).max(initial=0.0) <= 1e-9:
            break
        prices_B = raised_B
    return prices_B


def _scipy(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            "matching two dictionaries needs scipy, which is not installed; pip install 'crosscoder[compare]'"
        ) from error
