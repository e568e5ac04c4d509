"""How many dimensions the features use: total feature dimensionality at each snapshot.

Letters: F features, K snapshots, D width of one activation.

Source (P): D_fk = n_fk^2 / sum_j (What_fk . W_jk)^2, with j = f included, and the rate sum_f D_fk / D. The
denominator is What^T (W^T W) What, so a (D, D) matrix a snapshot is enough and no (F, F) one exists. Which
features enter is open in the paper; here all of them do (one with a small norm adds little), `masks` splits
the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import NonFiniteError
from crosscoder.evolution.checks import checked_decoders, checked_masks, inverse


@dataclass(frozen=True)
class Dimensionality:
    """Feature dimensionality."""

    per_feature: NDArray[np.float32]
    """(F, K) D_fk, in [0, 1]; 0 where the decoder is exactly 0."""
    rate: NDArray[np.float64]
    """(K,) sum_f D_fk / D, at most rank(W_k) / D."""
    rate_by_mask: dict[str, NDArray[np.float64]]
    """(K,) for each mask: its features' part of `rate` (the denominators still run over all features)."""


@torch.no_grad()
def feature_dimensionality(
    W_dec: Tensor,
    *,
    masks: Mapping[str, ArrayLike] | None = None,
    chunk_features: int = 8192,
) -> Dimensionality:
    """Feature dimensionality of decoders (F, K, D), any floating dtype; computed in float32, or float64 if
    given so.

    `masks`: name -> (F,) bool. Memory beyond W_dec: one snapshot's chunk of features and a few (D, D)
    matrices. Raises `DataError` for wrong shapes, `NonFiniteError` for weights that are not finite.
    """
    n_features, n_snapshots, width = checked_decoders(W_dec)
    chosen = checked_masks(masks, n_features)
    dtype = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    per_feature = torch.zeros(n_features, n_snapshots, dtype=dtype)
    chunks = [slice(start, start + chunk_features) for start in range(0, n_features, chunk_features)]
    for k in range(n_snapshots):
        gram_DD = torch.zeros(width, width, dtype=dtype, device=W_dec.device)
        for rows in chunks:
            w_FD = W_dec[rows, k].to(dtype)
            gram_DD.addmm_(w_FD.T, w_FD)
        if not bool(gram_DD.diagonal().sum().isfinite()):
            raise NonFiniteError(f"the decoder of snapshot {k} holds NaN or infinity (or overflows its square)")
        for rows in chunks:
            w_FD = W_dec[rows, k].to(dtype)
            norm_F1 = torch.linalg.vector_norm(w_FD, dim=1, keepdim=True)
            unit_FD = w_FD * inverse(norm_F1)
            interference_F = torch.linalg.vecdot(unit_FD @ gram_DD, unit_FD)
            # j = f is one of the terms, so D_fk <= 1; rounding may say otherwise.
            square_F = norm_F1[:, 0].square()
            share_F = torch.where(square_F > 0, square_F / torch.maximum(interference_F, square_F), 0)
            per_feature[rows, k] = share_F.cpu()
    result = per_feature.numpy()
    return Dimensionality(
        per_feature=result.astype(np.float32),
        rate=result.sum(axis=0, dtype=np.float64) / width,
        rate_by_mask={name: result[mask].sum(axis=0, dtype=np.float64) / width for name, mask in chosen.items()},
    )
