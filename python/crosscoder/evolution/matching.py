"""Features of two crosscoders matched one to one by the cosine of their decoders.

Letters: F features of the first, D width, A and B features of either that take part, n candidates, E candidate pairs.

The matching is the one-to-one assignment with the largest sum of cosines (the Hungarian method's); a pair with a cosine
of 0 or less is none. The matrix of all cosines is too large for large dictionaries. There all pairs are looked at, a
block at a time, and those of at least 0.5 kept, at most n for a feature of the first dictionary, the nearest. The
assignment of these is exact (scipy's LAPJVsp, with a partner of cosine 0 for everybody).

The blocks are products in bf16 where these are faster. They only say which pairs may be near enough: a cosine of
vectors rounded to bf16 is off by less than `SLACK`, and what passes is computed again in full precision, so the
candidates do not depend on the dtype.

Leaving out the pairs under 0.5, which are not the same feature in any case, changes the problem a little: where two
dictionaries share 3 % of 2,000 features, 61 stable pairs were found and 67 with all pairs; `nearest` bounds the number
from above. What the restriction to n costs depends on how many features are alike: in families of up to 200 features of
mean cosine 0.6 64 candidates cost nothing, at 0.8 0.03 of cosine a feature (`benchmarks/bench_matching.py`). What it
can cost beyond that is known without solving the problem of all pairs of at least 0.5: with prices p_g >= 0 that are
optimal for the sparse one, sum_g p_g + sum_f max(0, max_g cos_fg - p_g) over *all* pairs of at least 0.5 is no less
than the full optimum (weak duality). Only features with a list that was cut can add anything, and of these only such
that would gain more from a cosine of the last in their list, at the lowest price, than they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import Decoders, checked_decoders, checked_mask, decoders_of
from crosscoder.hardware import faster_gemm_dtype

FULL_PAIRS = 1 << 25
"""Up to so many pairs of features all of them are candidates (5,792 by 5,792; 0.5 GB)."""
FLOOR = 0.5
"""Beyond that, a pair of a smaller cosine is none."""
CANDIDATES = 64
"""Nearest features that a feature of the first dictionary may be matched with there."""
BLOCK = 2048
"""Rows and columns of a block of cosines."""
SLACK = 2**-7
"""Above the error of a cosine of unit vectors rounded to bf16: 2 * 2^-9 for the factors, 2^-9 for the result, and some
for sums of thousands of terms in float32."""
PAIRS_AT_ONCE = 1 << 13
"""Pairs whose cosine is computed at once where a block has few."""


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment."""

    match: NDArray[np.int32]
    """(F,) feature of the second dictionary, -1 where there is none."""
    cosine: NDArray[np.float32]
    """(F,) of the pair, 0 where there is none."""
    nearest: NDArray[np.float32]
    """(F,) largest cosine with any feature of the second dictionary, one to one or not; NaN for features that do not
    take part. Where it is under 0.5 and candidates were searched in bf16, another may be nearer by up to 0.016."""
    candidates: int
    """n; 0 where all pairs are candidates."""
    loss: float
    """Upper bound of what the restriction to n cost: the sum of cosines of the best assignment of all pairs of at least
    0.5 minus this one's, over the number of features that could be matched."""
    n_cut: int
    """Features with more than n such pairs: 0 means that nothing was lost."""


@torch.no_grad()
def match_features(
    first: Decoders,
    second: Decoders,
    *,
    snapshot: int = -1,
    take_first: ArrayLike | None = None,
    take_second: ArrayLike | None = None,
    candidates: int | None = None,
) -> Matching:
    """Match decoders (F, K, D) with (G, K, D) at one snapshot.

    `take_first` (F,), `take_second` (G,) bool: the features that take part (those with a norm of 0 never do).
    `candidates`: n; 0 means all pairs, in memory at once. By default 0 up to 33 million pairs, beyond that 64.
    Raises `DataError` for decoders that do not fit together, `ConfigError` for a snapshot that does not exist.
    """
    if candidates is not None and candidates < 0:
        raise ConfigError(f"the number of candidates must be 0 (all) or more, got {candidates}")
    first, second = decoders_of(first), decoders_of(second)
    if first.shape[1:] != second.shape[1:]:
        raise DataError(f"decoders {tuple(first.shape)} and {tuple(second.shape)} differ in snapshots or width")
    units_AD, ids_A = taken(first, snapshot, take_first, "first")
    units_BD, ids_B = taken(second, snapshot, take_second, "second")
    if candidates is None:
        candidates = 0 if len(ids_A) * len(ids_B) <= FULL_PAIRS else CANDIDATES
    loss, n_cut = 0.0, 0
    if candidates:
        pairs = _Pairs(units_AD, units_BD)
        near = _search(pairs, candidates)
        nearest_A, n_cut = near.nearest_A, int(near.cut_A.sum())
        match_A, cosine_A = _assign(near, (len(ids_A), len(ids_B)))
        if n_cut:
            loss = _loss(near, pairs, match_A, cosine_A)
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


def taken(decoders: Tensor, snapshot: int, take: ArrayLike | None, which: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Unit decoders (A, D) of the features that take part, and their ids (A,)."""
    n_features, n_snapshots, _ = checked_decoders(decoders)
    if not -n_snapshots <= snapshot < n_snapshots:
        raise ConfigError(f"snapshot {snapshot} does not exist; there are {n_snapshots}")
    chosen = checked_mask(take, n_features, f"the mask of the {which} dictionary")
    vectors_FD = decoders[:, snapshot].detach()
    vectors_FD = vectors_FD if vectors_FD.dtype == torch.float64 else vectors_FD.float()
    chosen = chosen & (torch.linalg.vector_norm(vectors_FD, dim=1) > 0).cpu().numpy()
    ids = np.flatnonzero(chosen)
    some_AD = vectors_FD[torch.from_numpy(ids).to(vectors_FD.device)]
    return torch.nn.functional.normalize(some_AD, dim=1, eps=0.0), ids


# ------------------------------------------------------------------------------------------- pairs


class _Pairs:
    """Cosines of unit vectors (A, D) with (B, D): nearly, a block at a time, and exactly where that matters."""

    def __init__(self, units_AD: Tensor, units_BD: Tensor) -> None:
        dtype = faster_gemm_dtype(str(units_AD.device))
        self.shape = len(units_AD), len(units_BD)
        self.device = units_AD.device
        self._units_AD, self._units_BD = units_AD, units_BD
        self._low_AD, self._low_BD = units_AD.to(dtype), units_BD.to(dtype)

    def blocks(self, rows_a: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Columns and the cosines (a, b) of `rows_a` with them, each off by less than `SLACK`."""
        low_aD = self._low_AD[rows_a]
        for first in range(0, self.shape[1], BLOCK):
            columns = slice(first, min(first + BLOCK, self.shape[1]))
            yield columns, low_aD @ self._low_BD[columns].T

    def exact(self, rows_e: Tensor, columns_e: Tensor) -> NDArray[np.float64]:
        """(e,) cosines of pairs."""
        found = [
            (self._units_AD[rows] * self._units_BD[columns]).sum(dim=1)
            for rows, columns in zip(*(torch.split(part, PAIRS_AT_ONCE) for part in (rows_e, columns_e)), strict=True)
        ]
        return np.asarray(torch.cat(found).double().cpu().numpy())

    def exact_where(
        self, rows_a: Tensor, columns: slice, wanted_ab: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The wanted pairs of a block: places in `rows_a`, columns, cosines."""
        place_e, column_e = wanted_ab.nonzero(as_tuple=True)
        if len(place_e) * 16 > wanted_ab.numel():  # many of them: one product is less work
            cosine_e = (self._units_AD[rows_a] @ self._units_BD[columns].T)[place_e, column_e].double().cpu().numpy()
        else:
            cosine_e = self.exact(rows_a[place_e], columns.start + column_e)
        return place_e.cpu().numpy(), columns.start + column_e.cpu().numpy(), cosine_e


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


class _Lists:
    """The pairs of some rows, the n nearest of each; equal ones by column."""

    def __init__(self, n_rows: int, n: int) -> None:
        self._n = n
        self._found = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
        self._waiting: list[tuple[NDArray[Any], ...]] = []
        self._room = n * n_rows
        self.cut_a = np.zeros(n_rows, dtype=bool)
        self.bar_a = np.full(n_rows, FLOOR)
        """Pairs of a smaller cosine need not be added."""

    def add(self, rows: NDArray[np.int64], columns: NDArray[np.int64], cosines: NDArray[np.float64]) -> None:
        near = cosines >= self.bar_a[rows]
        self._waiting.append((rows[near], columns[near], cosines[near]))
        if sum(len(part[0]) for part in self._waiting) > self._room:
            self.sorted()

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        parts = zip(self._found, *self._waiting, strict=True)
        row_E, column_E, cosine_E = (np.concatenate(part) for part in parts)
        order = np.lexsort((column_E, -cosine_E, row_E))
        row_E, column_E, cosine_E = row_E[order], column_E[order], cosine_E[order]
        rank_E = np.arange(len(row_E)) - np.searchsorted(row_E, row_E)
        self.cut_a[row_E[rank_E >= self._n]] = True
        kept = rank_E < self._n
        last = (rank_E == self._n - 1) & self.cut_a[row_E]
        self.bar_a[row_E[last]] = cosine_E[last]
        self._found, self._waiting = (row_E[kept], column_E[kept], cosine_E[kept]), []
        return self._found


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    """`BLOCK` rows at a time."""
    for first in range(0, len(rows), BLOCK):
        yield rows[first : first + BLOCK]


def _search(pairs: _Pairs, n: int) -> _Near:
    """The pairs of at least `FLOOR`, the n nearest of each row."""
    n_rows = pairs.shape[0]
    device = pairs.device
    nearest_A, cut_A = np.full(n_rows, -1.0), np.zeros(n_rows, dtype=bool)
    found = []
    for rows_a in _chunks(torch.arange(n_rows, device=device)):
        lists = _Lists(len(rows_a), n)
        best_a = torch.full((len(rows_a),), -torch.inf, device=device)
        best_column_a = torch.zeros(len(rows_a), dtype=torch.int64, device=device)
        for columns, cosine_ab in pairs.blocks(rows_a):
            most_a = cosine_ab.amax(dim=1).float()
            better = (most_a > best_a).nonzero()[:, 0]
            best_a[better] = most_a[better]
            best_column_a[better] = columns.start + cosine_ab[better].argmax(dim=1)
            bar_a = torch.from_numpy(lists.bar_a).to(most_a) - SLACK
            some = (most_a >= bar_a).nonzero()[:, 0]
            if len(some):
                wanted = cosine_ab[some] >= bar_a[some, None]
                place, column, cosine = pairs.exact_where(rows_a[some], columns, wanted)
                lists.add(some.cpu().numpy()[place], column, cosine)
        row_E, column_E, cosine_E = lists.sorted()
        first, at = int(rows_a[0]), rows_a.cpu().numpy()
        found.append((first + row_E, column_E, cosine_E))
        cut_A[at] = lists.cut_a
        if pairs.shape[1]:
            nearest_A[at] = pairs.exact(rows_a, best_column_a)
        np.maximum.at(nearest_A, first + row_E, cosine_E)
    nothing = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    rows_E, columns_E, cosines_E = (np.concatenate(parts) for parts in zip(nothing, *found, strict=True))
    return _Near(rows_E, columns_E, cosines_E, nearest_A, cut_A)


# ------------------------------------------------------------------------------------------- assignment


def _assign_all(cosine_AB: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(A,) column of each row (-1 for none) in the best assignment, and its cosine."""
    from scipy.optimize import linear_sum_assignment

    match, cosine = np.full(len(cosine_AB), -1), np.zeros(len(cosine_AB))
    rows, columns = linear_sum_assignment(np.maximum(cosine_AB, 0), maximize=True)
    paired = cosine_AB[rows, columns] > 0
    rows, columns = rows[paired], columns[paired]
    match[rows], cosine[rows] = columns, cosine_AB[rows, columns]
    return match, cosine


def _assign(near: _Near, shape: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The same of the candidates alone."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_rows, n_columns = shape
    match, cosine = np.full(n_rows, -1), np.zeros(n_rows)
    if not len(near.rows):
        return match, cosine
    # Each row has a column of its own, of cosine 0: so a matching of all rows exists. Weights must not be 0.
    alone = np.arange(n_rows)
    cost = np.concatenate([2 - near.cosines, np.full(n_rows, 2.0)])
    places = (np.concatenate([near.rows, alone]), np.concatenate([near.columns, n_columns + alone]))
    graph = csr_matrix((cost, places), shape=(n_rows, n_columns + n_rows))
    rows, columns = min_weight_full_bipartite_matching(graph)
    paired = columns < n_columns
    match[rows[paired]] = columns[paired]
    cosine[rows[paired]] = 2 - np.asarray(graph[rows[paired], columns[paired]]).ravel()
    return match, cosine


def _loss(near: _Near, pairs: _Pairs, match_A: NDArray[np.int64], cosine_A: NDArray[np.float64]) -> float:
    """`Matching.loss`: the dual value over all pairs minus the primal one."""
    n_rows, n_columns = pairs.shape
    prices_B = _prices(near, match_A, cosine_A, n_columns)
    profit_A, last_A = np.zeros(n_rows), np.ones(n_rows)
    np.maximum.at(profit_A, near.rows, near.cosines - prices_B[near.columns])
    np.minimum.at(last_A, near.rows, near.cosines)
    price_B = torch.from_numpy(prices_B).to(pairs.device, torch.float32)
    gaining = near.cut_A & (last_A - prices_B.min() > profit_A)
    for rows_a in _chunks(torch.from_numpy(np.flatnonzero(gaining)).to(pairs.device)):
        at = rows_a.cpu().numpy()
        for columns, cosine_ab in pairs.blocks(rows_a):
            gain_ab = torch.where(cosine_ab >= FLOOR - SLACK, cosine_ab - price_B[columns], -torch.inf)
            most_a = gain_ab.amax(dim=1)
            profit_a = torch.from_numpy(profit_A[at]).to(most_a)
            some = (most_a >= profit_a - SLACK).nonzero()[:, 0]
            if len(some):
                wanted = gain_ab[some] >= profit_a[some, None] - SLACK
                place, column, cosine = pairs.exact_where(rows_a[some], columns, wanted)
                gain = np.where(cosine >= FLOOR, cosine - prices_B[column], 0)
                np.maximum.at(profit_A, at[some.cpu().numpy()[place]], gain)
    gap = float(prices_B.sum() + profit_A.sum() - cosine_A.sum())
    return max(0.0, gap) / min(n_rows, n_columns)


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
