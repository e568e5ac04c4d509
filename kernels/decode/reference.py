"""Decode, densely: x^_k = sum_f f_fk W_dec[f, k] + b_dec[k]. Source: docs/method.md, section 1."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode


def decode(code: SparseCode, W_dec_FKD: Tensor, b_dec_KD: Tensor) -> Tensor:
    """x^ (B, K, D): the reconstruction of every snapshot."""
    snapshots = [torch.addmm(b_dec_KD[k], code.column(k), W_dec_FKD[:, k]) for k in range(code.n_snapshots)]
    return torch.stack(snapshots, dim=1)
