"""Decode on a CPU: the rows of W_dec that a token needs, all snapshots in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, array_or_none, code_arrays, n_threads
from crosscoder.kernels.scratch import Scratch
from crosscoder.penalty import Penalty


def decode(code: SparseCode, W_dec_FKD: Tensor, b_dec_KD: Tensor, target_BKD: Tensor | None = None) -> Tensor:
    """x^ (B, K, D) float32, or x^ - target."""
    out_BKD = torch.empty(code.n_tokens, *b_dec_KD.shape)
    _core.decode(
        code_arrays(code),
        array(W_dec_FKD),
        array(b_dec_KD),
        array_or_none(target_BKD),
        array(out_BKD),
        None,
        n_threads(),
    )
    return out_BKD


@dataclass(frozen=True)
class Decoded:
    """A batch's residuals and what the pairs' gradients are."""

    residual_BKD: Tensor
    """x^ - x."""
    error_BK: Tensor
    """Squared norms of the residuals."""
    dh_N: Tensor
    """Gradient of the loss in each pair's h."""
    dlog_threshold_N: Tensor | None
    """Each pair's part of the gradient in log_threshold, for a narrow window."""


def decode_with_gradients(
    code: SparseCode,
    W_dec_FKD: Tensor,
    b_dec_KD: Tensor,
    x_BKD: Tensor,
    *,
    weight_F: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    penalty: Penalty,
    shared: bool,
    window: float,
    scratch: Scratch,
) -> Decoded:
    """Decode, and from each residual at once the gradient of its pairs (docs/method.md, section 3).

    `weight_F` is the penalty's a_f; a `window` of 0 leaves the thresholds out.
    """
    B, K, _ = x_BKD.shape
    residual_BKD = scratch.take("residual", tuple(x_BKD.shape))
    error_BK = torch.empty(B, K)
    dh_N = torch.empty(code.n_pairs)
    threshold_N = torch.empty(code.n_pairs) if window else None
    _core.decode_with_gradients(
        code_arrays(code),
        array(W_dec_FKD),
        array(b_dec_KD),
        array(x_BKD),
        2 / max(1, B * K),
        array(weight_F),
        array(norms_FK),
        array(theta_F),
        penalty_arguments(penalty, shared, window),
        array(residual_BKD),
        array(error_BK),
        array(dh_N),
        array_or_none(threshold_N),
        n_threads(),
    )
    return Decoded(residual_BKD, error_BK, dh_N, threshold_N)


def penalty_arguments(penalty: Penalty, shared: bool, window: float) -> tuple[float, bool, bool, float]:
    """Penalty and window as the core takes them."""
    return penalty.tanh_scale, penalty.kind == "l1", shared, window
