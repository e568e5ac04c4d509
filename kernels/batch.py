"""Sums and mixtures over a batch on a CPU, in an order that does not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.kernels.arrays import arrays, n_threads


def column_sums(a_RC: Tensor) -> Tensor:
    """(C,): sums over the rows of a float32 matrix."""
    sums_C = torch.empty(a_RC.shape[1], dtype=torch.float32)
    _core.column_sums(*arrays(a_RC, sums_C), n_threads())
    return sums_C


def mix_snapshots(mix_KK: Tensor, x_BKD: Tensor, out_BKD: Tensor) -> Tensor:
    """`out_BKD` = sum over l of mix[k, l] x[b, l, d]; all float32 and contiguous."""
    _core.mix_snapshots(*arrays(x_BKD, mix_KK, out_BKD), n_threads())
    return out_BKD


def squared_distances(x_BKD: Tensor, mean_KD: Tensor) -> Tensor:
    """(B, K): squared distance of each activation from its snapshot's `mean_KD`; float32."""
    out_BK = torch.empty(x_BKD.shape[:2], dtype=torch.float32)
    _core.squared_distances(*arrays(x_BKD, mean_KD, out_BK), n_threads())
    return out_BK
