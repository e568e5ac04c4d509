"""Decode on a CPU: the rows of W_dec that a token needs, all snapshots in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.arrays import arrays, code_arrays, n_threads
from crosscoder.kernels.scratch import Scratch
from crosscoder.penalty import Penalty
from crosscoder.sharding import ONE_PROCESS, Sharding


def decode(
    code: SparseCode,
    W_dec_FKD: Tensor,
    b_dec_KD: Tensor,
    target_BKD: Tensor | None = None,
    out_BKD: Tensor | None = None,
) -> Tensor:
    """x^ (B, K, D) float32, or x^ - target; in `out_BKD` where that is given."""
    if out_BKD is None:
        out_BKD = torch.empty(code.n_tokens, *b_dec_KD.shape, dtype=torch.float32)
    _core.decode(code_arrays(code), *arrays(W_dec_FKD, b_dec_KD, target_BKD, out_BKD), n_threads())
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
    """Each pair's part of the gradient in log_threshold, for a gate with a window."""


def residual_and_pairs(
    code: SparseCode,
    W_dec_FKD: Tensor,
    b_dec_KD: Tensor,
    x_BKD: Tensor,
    *,
    weight_F: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    penalty: Penalty,
    gate: Gate,
    scratch: Scratch,
    sharding: Sharding = ONE_PROCESS,
) -> Decoded:
    """Decode | sum over processes | the gradient of each pair from the residuals (docs/method.md, section 3).

    `weight_F` is the penalty's a_f. Where all features are here the core does both halves token by token: the second
    reads W_dec's rows from the cache, with the same result.
    """
    B, K, _ = x_BKD.shape
    residual_BKD = scratch.take("residual", tuple(x_BKD.shape))
    if not sharding.alone:
        bias_KD, target_BKD = (b_dec_KD, x_BKD) if sharding.first else (torch.zeros_like(b_dec_KD), None)
        residual_BKD.copy_(sharding.sum(decode(code, W_dec_FKD, bias_KD, target_BKD)))
    error_BK = torch.empty(B, K, dtype=torch.float32)
    dh_N = torch.empty(code.n_pairs, dtype=torch.float32)
    threshold_N = torch.empty(code.n_pairs, dtype=torch.float32) if gate.window else None
    _core.pair_gradients(
        code_arrays(code),
        *arrays(W_dec_FKD, b_dec_KD if sharding.alone else None, x_BKD if sharding.alone else None),
        2 / max(1, B * K),
        *arrays(weight_F, norms_FK, theta_F),
        penalty_arguments(penalty, gate, gate.window),
        *arrays(residual_BKD, error_BK, dh_N, threshold_N),
        n_threads(),
    )
    return Decoded(residual_BKD, error_BK, dh_N, threshold_N)


def penalty_arguments(
    penalty: Penalty, gate: Gate | None = None, window: float = 0.0
) -> tuple[float, bool, bool, float]:
    """Penalty and window as the core takes them."""
    return penalty.tanh_scale, penalty.linear, gate is not None and gate.shared, window
