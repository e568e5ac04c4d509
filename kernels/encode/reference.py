"""Encode, densely: h = sum_k x_k W_enc[:, k]^T + b_enc, and which (token, snapshot, feature) gates are open.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.gate import Gate


def preactivations(x_BKD: Tensor, W_enc_FKD: Tensor, b_enc_F: Tensor) -> Tensor:
    """h (B, F): one scalar per (token, feature), summed over the snapshots."""
    return torch.addmm(b_enc_F, x_BKD.flatten(1), W_enc_FKD.flatten(1).T)


def open_features(h_BF: Tensor, norms_FK: Tensor, theta_F: Tensor, gate: Gate) -> tuple[Tensor, Tensor | None]:
    """(B, F) bool: is the gate open at one snapshot or more? And for BatchTopK in training the smallest score kept, ().

    By a threshold theta_f, or by rank: the `top_k` largest positive scores of each token, or B x `top_k` of the batch.
    (The smallest kept is 0 where none is positive: its running mean is the threshold for inference.) A gate is open at
    some snapshot iff it is at the one with the largest norm: rounding h n is monotone in n.
    """
    if not gate.ranked:
        return h_BF * gate.scale(norms_FK) > theta_F, None
    scores_BF = h_BF.relu() * gate.scale(norms_FK)
    if not gate.whole_batch:
        return _largest(scores_BF, gate.top_k), None
    open_BF = _largest(scores_BF.reshape(1, -1), gate.top_k * len(h_BF)).view_as(scores_BF)
    kept = scores_BF.masked_fill(~open_BF, torch.inf)
    smallest = kept.amin() if kept.numel() else kept.new_full((), torch.inf)
    return open_BF, torch.where(smallest.isinf(), 0.0, smallest)


def gates(h_BF: Tensor, norms_FK: Tensor, theta_F: Tensor, gate: Gate) -> tuple[Tensor, Tensor | None]:
    """(B, K, F) bool: every gate. And the smallest score kept, as from `open_features`."""
    if gate.by_snapshot:
        return h_BF[:, None, :] * norms_FK.T > theta_F, None
    open_BF, smallest = open_features(h_BF, norms_FK, theta_F, gate)
    return open_BF[:, None, :].expand(-1, norms_FK.shape[1], -1), smallest


def encode(h_BF: Tensor, norms_FK: Tensor, theta_F: Tensor, gate: Gate) -> SparseCode:
    """The pairs with an open gate: the same as `gates`, without anything of shape (B, K, F)."""
    open_BF, _ = open_features(h_BF, norms_FK, theta_F, gate)
    rows_N, features_N = open_BF.nonzero(as_tuple=True)
    h_N = h_BF[rows_N, features_N]
    if gate.by_snapshot:
        open_NK = h_N[:, None] * norms_FK[features_N] > theta_F[features_N, None]
    else:
        open_NK = torch.ones(len(h_N), norms_FK.shape[1], dtype=torch.bool, device=h_BF.device)
    return SparseCode.from_pairs(rows_N, features_N, h_N, open_NK, h_BF.shape)


def _largest(scores_RC: Tensor, count: int) -> Tensor:
    """(R, C) bool: the `count` largest positive scores of each row."""
    open_RC = torch.zeros_like(scores_RC, dtype=torch.bool)
    if scores_RC.numel():
        top = scores_RC.topk(min(count, scores_RC.shape[1]), dim=1, sorted=False)
        open_RC.scatter_(1, top.indices, top.values > 0)
    return open_RC
