"""How many dimensions the features use: total feature dimensionality at each snapshot.

Letters: F features, K snapshots, D width of one activation.

Source (P): D_fk = n_fk^2 / sum_j (What_fk . W_jk)^2, with j = f included, and the rate sum_f D_fk / D. The
denominator is What^T (W^T W) What, so a (D, D) matrix a snapshot is enough and no (F, F) one exists. Which
features enter is open in the paper; here all of them do (one with a small norm adds little).

Ours: by kind, in two ways. `rate_by_mask` splits the sum, the denominators still over all features: how much of the
space in use is a kind's. `rate_within` counts the kind's features alone, in the sum and in the denominators: how many
dimensions the kind would fill by itself. The null (`null_*`) is what random directions with the same norms give:
independent, uniform on the sphere, so that (What_f . What_j)^2 is Beta(1/2, (D - 1) / 2) and the expected rate follows
from the norms alone. A rate under it means that features share directions more than chance has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import DataError, NonFiniteError
from crosscoder.evolution.checks import Decoders, checked_decoders, checked_masks, decoders_of
from crosscoder.evolution.geometry import blocks, grams

_NULL_DRAWS = 32
_NULL_BLOCK = 1024


@dataclass(frozen=True)
class Dimensionality:
    """Feature dimensionality."""

    per_feature: NDArray[np.float32]
    """(F, K) D_fk, in [0, 1]; 0 where the decoder is exactly 0."""
    rate: NDArray[np.float64]
    """(K,) sum_f D_fk / D, at most rank(W_k) / D."""
    rate_by_mask: dict[str, NDArray[np.float64]]
    """(K,) for each mask: its features' part of `rate` (the denominators still run over all features)."""
    null_rate: NDArray[np.float64]
    """(K,) the expected `rate` of random directions with the same norms."""
    null_rate_by_mask: dict[str, NDArray[np.float64]]
    """(K,) for each mask: the expected `rate_by_mask` of the same."""


@dataclass(frozen=True)
class KindDimensionality:
    """The dimensionality of each kind's features by themselves."""

    rate_within: dict[str, NDArray[np.float64]]
    """(K,) for each mask: sum_f D_fk / D over its features, denominators over its features too; at least
    `rate_by_mask`."""
    null_within: dict[str, NDArray[np.float64]]
    """(K,) the same, expected of random directions with the same norms."""


@torch.no_grad()
def feature_dimensionality(
    W_dec: Decoders, *, masks: Mapping[str, ArrayLike] | None = None, seed: int = 0, block_bytes: int = 1 << 26
) -> Dimensionality:
    """Feature dimensionality of decoders (F, K, D), any floating dtype, which are read twice, in blocks of features.

    Computed as `crosscoder.evolution.geometry` has it: in float32, or float64 if given so; bf16 weights in products
    that are exact to about 2^-16. `masks`: name -> (F,) bool. `seed` draws the null. Memory beyond W_dec: a block and
    K (D, D) matrices. Raises `DataError` for wrong shapes, `NonFiniteError` for weights that are not finite.
    """
    W_dec = decoders_of(W_dec)
    n_features, _, width = checked_decoders(W_dec)
    chosen = checked_masks(masks, n_features)
    share_FK, square_FK = _shares(W_dec, None, block_bytes)
    null_FK = random_dimensionality(square_FK, width, seed=seed)
    return Dimensionality(
        per_feature=share_FK.astype(np.float32),
        rate=share_FK.sum(axis=0, dtype=np.float64) / width,
        rate_by_mask={name: share_FK[mask].sum(axis=0, dtype=np.float64) / width for name, mask in chosen.items()},
        null_rate=null_FK.sum(axis=0) / width,
        null_rate_by_mask={name: null_FK[mask].sum(axis=0) / width for name, mask in chosen.items()},
    )


@torch.no_grad()
def kind_dimensionality(
    W_dec: Decoders, masks: Mapping[str, ArrayLike], *, seed: int = 0, block_bytes: int = 1 << 26
) -> KindDimensionality:
    """`feature_dimensionality` of each mask's features (F,) as if there were no others; 0 for an empty mask.

    For masks that cover all features once it costs as much again as `feature_dimensionality`. Raises as that does.
    """
    W_dec = decoders_of(W_dec)
    n_features, n_snapshots, width = checked_decoders(W_dec)
    rate_within: dict[str, NDArray[np.float64]] = {}
    null_within: dict[str, NDArray[np.float64]] = {}
    for name, mask in checked_masks(masks, n_features).items():
        rate_within[name] = null_within[name] = np.zeros(n_snapshots)
        if mask.any():
            share_FK, square_FK = _shares(W_dec, torch.from_numpy(np.flatnonzero(mask)), block_bytes)
            rate_within[name] = share_FK.sum(axis=0, dtype=np.float64) / width
            null_within[name] = random_dimensionality(square_FK, width, seed=seed).sum(axis=0) / width
    return KindDimensionality(rate_within, null_within)


def random_dimensionality(
    squares_FK: ArrayLike, width: int, *, n_draws: int = _NULL_DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """(F, K) expected D_fk of independent random directions in `width` dimensions with squared norms (F, K).

    The mean over `n_draws` draws of E_f = sum_{j != f} n_j^2 b_j, b_j ~ Beta(1/2, (D - 1) / 2), of n_f^2 / (n_f^2 +
    E_f): seen from one direction the others' cosines are independent. A draw of b serves all f and k, so the cost is
    O(F K). Raises `DataError` for another shape, `NonFiniteError` for norms that are not finite.
    """
    square_FK = np.asarray(squares_FK, dtype=np.float64)
    if square_FK.ndim != 2 or (square_FK < 0).any():
        raise DataError(f"squared norms must be (F, K) and at least 0, got the shape {square_FK.shape}")
    if not np.isfinite(square_FK).all():
        raise NonFiniteError("the squared decoder norms hold NaN or infinity")
    n_features = len(square_FK)
    rng = np.random.default_rng(seed)
    one = width == 1  # there is one direction only
    cosine2_MF = np.ones((n_draws, n_features)) if one else rng.beta(0.5, (width - 1) / 2, (n_draws, n_features))
    seen_MK = cosine2_MF @ square_FK
    share_FK = np.zeros_like(square_FK)
    for start in range(0, n_features, _NULL_BLOCK):  # what is worked on stays in the cache
        rows = slice(start, start + _NULL_BLOCK)
        square_nK = square_FK[rows]
        some_nK = square_nK > 0
        for cosine2_F, seen_K in zip(cosine2_MF, seen_MK, strict=True):
            # Its own term is not b_f but 1.
            all_nK = square_nK * (1 - cosine2_F[rows])[:, None] + seen_K
            share_FK[rows] += np.divide(square_nK, all_nK, out=np.zeros_like(all_nK), where=some_nK)
    return share_FK / n_draws


def _shares(W_dec: Tensor, features: Tensor | None, block_bytes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(F, K) D_fk and squared norms of the decoders of `features` (all if None), as if there were no others."""
    some = W_dec if features is None else W_dec[:1].expand(len(features), -1, -1)

    def block(rows: slice) -> Tensor:
        return W_dec[rows] if features is None else W_dec[features[rows].to(W_dec.device)]

    found = grams(W_dec)
    for rows in blocks(some, block_bytes):
        found.add(block(rows))
    found.close()
    share_FK, square_FK = [], []
    for rows in blocks(some, block_bytes):
        interference_nK, square_nK = found.interference(block(rows))
        # j = f is one of the terms, so D_fk <= 1; rounding may say otherwise.
        share = square_nK / torch.maximum(interference_nK, square_nK)
        share_FK.append(torch.where(square_nK > 0, share, 0).numpy())
        square_FK.append(square_nK.numpy())
    return np.concatenate(share_FK), np.concatenate(square_FK)
