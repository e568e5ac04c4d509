"""The thresholds' straight-through gradient on a CPU, on all pairs of some tokens, feature tile by feature tile.

Two products of the encoder's size for those tokens, and one sweep over each tile while it is in the cache; nothing of
shape (B, F) exists. A narrow window needs none of this: its pairs are in the code (`residual_and_pairs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.arrays import array, arrays, code_arrays, n_threads
from crosscoder.kernels.decode.native import penalty_arguments
from crosscoder.kernels.encode.products import TILE
from crosscoder.kernels.transpose.native import order_arrays
from crosscoder.kernels.transpose.reference import FeatureOrder
from crosscoder.penalty import Penalty


def threshold_gradient(
    x_BKD: Tensor,
    residual_BKD: Tensor,
    code: SparseCode,
    order: FeatureOrder,
    W_enc_FKD: Tensor,
    b_enc_F: Tensor,
    W_dec_FKD: Tensor,
    *,
    tokens: Tensor | None,
    dtype: torch.dtype,
    weight_F: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    penalty: Penalty,
    gate: Gate,
    window: float,
) -> Tensor:
    """dlog_theta (F,), summed over `tokens` (None: all); the products are made in `dtype`."""
    B, K, _ = x_BKD.shape
    F = len(theta_F)
    chosen = slice(None) if tokens is None else tokens
    x_nC = x_BKD[chosen].flatten(1).to(dtype)
    g_Kn = [residual_BKD[chosen, k].to(dtype) for k in range(K)]
    units_KF = gate.units(norms_FK).T.contiguous()
    closed_slope_KF = (weight_F * norms_FK.T * penalty.slope_at_zero).contiguous()
    sums_KF = torch.zeros(K, F, dtype=torch.float32)
    scale = 2 / max(1, B * K)
    for first in range(0, F, TILE):
        tile = slice(first, first + TILE)
        h_nT = x_nC @ W_enc_FKD[tile].flatten(1).to(dtype).T
        for k in range(K):
            products = arrays(h_nT, g_Kn[k] @ W_dec_FKD[tile, k].to(dtype).T)
            of_features = arrays(b_enc_F, units_KF[k], theta_F, closed_slope_KF[k])
            _core.threshold_tile(*products, first, *of_features, window, scale, array(sums_KF[k]), n_threads())
    factor_KF = torch.where(units_KF > 0, -(theta_F**2) / (window * torch.where(units_KF > 0, units_KF, 1.0)), 0.0)
    gradient_F = (factor_KF * sums_KF).sum(dim=0)
    mask_B = torch.ones(B, dtype=torch.uint8)
    if tokens is not None:
        mask_B.zero_()[tokens] = 1
    _core.threshold_open_gates(
        code_arrays(code),
        order_arrays(order),
        *arrays(mask_B, weight_F, norms_FK, theta_F),
        penalty_arguments(penalty, gate, window),
        array(gradient_F),
        n_threads(),
    )
    return gradient_F
