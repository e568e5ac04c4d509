"""Which features are alike: nearest neighbours by the cosine of their decoders.

Letters: F features, K snapshots, D width of one activation, n neighbours.

Ours: with `snapshot=None` a feature's vector is its decoder at all snapshots, concatenated (K D numbers), so
the cosine is sum_k n_ik n_jk cos_k / (|i| |j|): alike means the same direction with the same history. With a
snapshot's index it is the decoder there. Cost: 2 F^2 K D FLOP, or 2 F^2 D; for F = 98,304 in 768 dimensions
the second takes about a minute on a CPU, while the first asks for an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import Decoders, checked_decoders, checked_mask, decoders_of
from crosscoder.evolution.geometry import decoder_norms


@dataclass(frozen=True)
class Neighbours:
    """The n nearest features of each feature."""

    features: NDArray[np.int32]
    """(F, n) ids, the nearest first; -1 where there are fewer, and everywhere for a feature that is not alive."""
    cosines: NDArray[np.float32]
    """(F, n) in [-1, 1]; 0 where the id is -1."""
    snapshot: int | None
    """Index of the snapshot compared, or None for all of them concatenated."""


@torch.no_grad()
def nearest_neighbours(
    W_dec: Decoders,
    *,
    n_neighbours: int = 8,
    snapshot: int | None = None,
    scale_K: Tensor | None = None,
    alive_F: ArrayLike | None = None,
    chunk_features: int = 2048,
) -> Neighbours:
    """Nearest neighbours of decoders (F, K, D) on W_dec's device, blockwise: nothing of shape (F, F) exists.

    `scale_K` (K,), at least 0, multiplies each snapshot's decoders first (without a copy of them all). Only features
    alive (`alive_F` (F,) bool, default all) with a decoder that is not 0 take part. Equal cosines are ordered by id.
    Raises `DataError` for wrong shapes, `ConfigError` for a snapshot that does not exist.
    """
    W_dec = decoders_of(W_dec)
    n_features, n_snapshots, _ = checked_decoders(W_dec)
    if snapshot is not None and not -n_snapshots <= snapshot < n_snapshots:
        raise ConfigError(f"snapshot {snapshot} does not exist; there are {n_snapshots}")
    if n_neighbours < 1:
        raise ConfigError(f"n_neighbours must be at least 1, got {n_neighbours}")
    vectors = _Vectors(W_dec, snapshot, scale_K)
    alive = torch.from_numpy(checked_mask(alive_F, n_features))
    ids = (alive & (vectors.norms() > 0)).nonzero()[:, 0]

    features = torch.full((n_features, n_neighbours), -1, dtype=torch.int64)
    cosines = torch.zeros(n_features, n_neighbours)
    blocks = torch.split(ids, chunk_features)
    for rows in blocks:
        query = vectors.units(rows)
        best_cosine = query.new_empty(len(rows), 0)
        best_id = torch.empty(len(rows), 0, dtype=torch.int64, device=query.device)
        for columns in blocks:
            cosine = query @ vectors.units(columns).T
            if columns is rows:
                cosine.fill_diagonal_(-torch.inf)
            value, place = cosine.topk(min(n_neighbours, len(columns)), dim=1)
            best_cosine = torch.cat([best_cosine, value], dim=1)
            best_id = torch.cat([best_id, columns.to(query.device)[place]], dim=1)
            best_cosine, best_id = _ordered(best_cosine, best_id, n_neighbours)
        found = best_cosine > -torch.inf
        width = best_id.shape[1]
        features[rows, :width] = torch.where(found, best_id, -1).cpu()
        cosines[rows, :width] = torch.where(found, best_cosine, 0).clamp(-1, 1).float().cpu()
    return Neighbours(
        features.numpy().astype(np.int32), cosines.numpy(), None if snapshot is None else snapshot % n_snapshots
    )


def _ordered(cosine: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest, equal ones by id."""
    by_id = ids.argsort(dim=1, stable=True)
    cosine, ids = cosine.gather(1, by_id), ids.gather(1, by_id)
    order = cosine.argsort(dim=1, descending=True, stable=True)[:, :n]
    return cosine.gather(1, order), ids.gather(1, order)


class _Vectors:
    """A feature's vector: its decoders, each times its snapshot's scale, one behind the other, or one of them."""

    def __init__(self, W_dec: Tensor, snapshot: int | None, scale_K: Tensor | None) -> None:
        self._W_dec = W_dec if snapshot is None else W_dec[:, snapshot, None]
        scale = torch.ones(W_dec.shape[1]) if scale_K is None else scale_K
        if scale.shape != (W_dec.shape[1],):
            raise DataError(f"scale_K has shape {tuple(scale.shape)}, expected ({W_dec.shape[1]},)")
        self._scale = (scale if snapshot is None else scale[snapshot, None]).to(W_dec.device)

    def norms(self) -> Tensor:
        """(F,) on the CPU."""
        norms_FK = decoder_norms(self._W_dec) * self._scale.cpu()
        norms_F: Tensor = torch.linalg.vector_norm(norms_FK, dim=1)
        return norms_F

    def units(self, rows: Tensor) -> Tensor:
        """(n, K D) unit vectors of features `rows`."""
        chosen = self._W_dec[rows.to(self._W_dec.device)]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        scaled = chosen * self._scale.to(chosen)[:, None]
        return torch.nn.functional.normalize(scaled.flatten(1), dim=1, eps=0.0)
