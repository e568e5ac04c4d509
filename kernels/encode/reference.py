"""Encode, densely: h = sum_k x_k W_enc[:, k]^T + b_enc, and which (token, snapshot, feature) gates are open.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode


def preactivations(x_BKD: Tensor, W_enc_FKD: Tensor, b_enc_F: Tensor) -> Tensor:
    """h (B, F): one scalar per (token, feature), summed over the snapshots."""
    return torch.addmm(b_enc_F, x_BKD.flatten(1), W_enc_FKD.flatten(1).T)


def jumprelu_gates(h_BF: Tensor, norms_FK: Tensor, theta_F: Tensor, *, shared: bool) -> Tensor:
    """(B, K, F) bool: h n_fk > theta_f snapshot by snapshot, or h > theta_f for all snapshots (`shared`)."""
    if shared:
        return for_all_snapshots(h_BF > theta_F, norms_FK.shape[1])
    return h_BF[:, None, :] * norms_FK.T > theta_F


def rank_scores(h_BF: Tensor, norms_FK: Tensor) -> Tensor:
    """(B, F): what TopK and BatchTopK rank by, relu(h) times the feature's largest decoder norm."""
    return h_BF.relu() * norms_FK.amax(dim=1)


def topk_gates(h_BF: Tensor, norms_FK: Tensor, top_k: int) -> Tensor:
    """(B, F) bool: the `top_k` features of each token with the largest positive scores."""
    return _largest(rank_scores(h_BF, norms_FK), top_k)


def batchtopk_gates(h_BF: Tensor, norms_FK: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The B x `top_k` largest positive scores of the whole batch.

    Returns the gates (B, F) bool and the smallest score that was kept, () (0 where none is positive): its
    running mean is the threshold for inference.
    """
    scores_BF = rank_scores(h_BF, norms_FK)
    open_BF = _largest(scores_BF.reshape(1, -1), top_k * len(h_BF)).view_as(scores_BF)
    kept = scores_BF.masked_fill(~open_BF, torch.inf)
    smallest = kept.amin() if kept.numel() else kept.new_full((), torch.inf)
    return open_BF, torch.where(smallest.isinf(), 0.0, smallest)


def threshold_gates(h_BF: Tensor, norms_FK: Tensor, threshold: Tensor) -> Tensor:
    """(B, F) bool: every feature whose score is above one `threshold` (): BatchTopK at inference."""
    return rank_scores(h_BF, norms_FK) > threshold


def jumprelu_code(h_BF: Tensor, norms_FK: Tensor, theta_F: Tensor, *, shared: bool) -> SparseCode:
    """The pairs with an open gate. The same as `jumprelu_gates`, without anything of shape (B, K, F).

    A gate is open at some snapshot iff it is at the one with the largest norm: rounding h n is monotone in n.
    """
    kept_BF = h_BF > theta_F if shared else h_BF * norms_FK.amax(dim=1) > theta_F
    rows_N, features_N = kept_BF.nonzero(as_tuple=True)
    h_N = h_BF[rows_N, features_N]
    if shared:
        open_NK = torch.ones(len(h_N), norms_FK.shape[1], dtype=torch.bool, device=h_BF.device)
    else:
        open_NK = h_N[:, None] * norms_FK[features_N] > theta_F[features_N, None]
    return SparseCode.from_pairs(rows_N, features_N, h_N, open_NK, h_BF.shape)


def ranked_code(h_BF: Tensor, open_BF: Tensor, n_snapshots: int) -> SparseCode:
    """The pairs that a gate by rank keeps, open at all snapshots."""
    rows_N, features_N = open_BF.nonzero(as_tuple=True)
    open_NK = torch.ones(len(rows_N), n_snapshots, dtype=torch.bool, device=h_BF.device)
    return SparseCode.from_pairs(rows_N, features_N, h_BF[rows_N, features_N], open_NK, h_BF.shape)


def for_all_snapshots(open_BF: Tensor, n_snapshots: int) -> Tensor:
    """(B, K, F): the same gates (B, F) at every snapshot."""
    return open_BF[:, None, :].expand(-1, n_snapshots, -1)


def _largest(scores_RC: Tensor, count: int) -> Tensor:
    """(R, C) bool: the `count` largest positive scores of each row."""
    open_RC = torch.zeros_like(scores_RC, dtype=torch.bool)
    if scores_RC.numel():
        top = scores_RC.topk(min(count, scores_RC.shape[1]), dim=1, sorted=False)
        open_RC.scatter_(1, top.indices, top.values > 0)
    return open_RC
