"""The definition of a crosscoder, in dense torch and differentiated by autograd (docs/method.md, sections 1 to 3).

Reconstruction and loss as one would write them down; only the thresholds' straight-through gradient is by hand. The
first of the two specifications: `backends/README.md` says what is held against what.

Letters: B tokens, K snapshots, D width of one activation, F features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from crosscoder.gate import Gate
from crosscoder.kernels.encode import reference as encode_reference
from crosscoder.kernels.threshold.reference import sample_tokens, threshold_gradient
from crosscoder.parameters import Weights
from crosscoder.penalty import LossSettings, LossTerms, Penalty


def preactivations(weights: Weights, x_BKD: Tensor) -> Tensor:
    """h (B, F) of activations (B, K, D)."""
    x_BKD = weights.encoder_input(weights.input(x_BKD))
    return encode_reference.preactivations(x_BKD, weights.W_enc.to(x_BKD.dtype), weights.b_enc.to(x_BKD.dtype))


def reconstruction(weights: Weights, x_BKD: Tensor) -> Tensor:
    """x^ (B, K, D) of activations (B, K, D); NaN for a token with a NaN or an infinity, whose gates are all closed."""
    x_BKD = weights.input(x_BKD)
    f_BKF, _, _ = _activations(weights, x_BKD, None)
    nothing_B = 0 * x_BKD.detach().abs().amax(dim=(1, 2))  # 0 times infinity is NaN
    return _reconstruct(weights, f_BKF) + nothing_B[:, None, None]


def loss(weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
    """The loss of a batch (docs/method.md, section 2)."""
    x_BKD = weights.input(x_BKD)
    penalty = Penalty.of(weights.config)
    f_BKF, h_BF, norms_FK = _activations(weights, x_BKD, settings.generator)
    terms = max(1, x_BKD.shape[0] * x_BKD.shape[1])
    error = (_reconstruct(weights, f_BKF) - x_BKD).square().sum() / terms
    p_F = penalty.activity(f_BKF * norms_FK.T).sum(dim=(0, 1)) / terms
    sparsity = settings.sparsity_coefficient * penalty.total(p_F)
    preactivation = error.new_zeros(())
    if settings.preactivation_coefficient:
        gap_BF = (weights.log_threshold.exp() - h_BF).relu()
        preactivation = settings.preactivation_coefficient * (gap_BF @ norms_FK).sum() / terms
    return LossTerms(error + sparsity + preactivation, error, sparsity, preactivation)


def _activations(weights: Weights, x_BKD: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """f (B, K, F), h (B, F) and the decoder norms (F, K)."""
    gate = weights.gate
    h_BF, norms_FK = preactivations(weights, x_BKD), weights.norms()
    with torch.no_grad():
        gates_BKF, smallest = encode_reference.gates(h_BF, norms_FK, weights.theta(gate, h_BF.dtype), gate)
    if smallest is not None:
        weights.update_batch_threshold(smallest)
    f_BKF = _Gated.apply(h_BF, norms_FK.detach(), weights.log_threshold, gates_BKF, weights, gate, generator)  # type: ignore[no-untyped-call]
    return cast(Tensor, f_BKF), h_BF, norms_FK


def _reconstruct(weights: Weights, f_BKF: Tensor) -> Tensor:
    dtype = f_BKF.dtype
    return torch.einsum("bkf,fkd->bkd", f_BKF, weights.W_dec.to(dtype)) + weights.b_dec.to(dtype)


class _Gated(torch.autograd.Function):
    """f = h where a gate is open, 0 elsewhere, with the straight-through gradient for the thresholds."""

    @staticmethod
    def forward(
        ctx: Any,
        h_BF: Tensor,
        norms_FK: Tensor,
        log_threshold_F: Tensor,
        gates_BKF: Tensor,
        weights: Weights,
        gate: Gate,
        generator: torch.Generator | None,
    ) -> Tensor:
        ctx.save_for_backward(h_BF, norms_FK, log_threshold_F, gates_BKF)
        ctx.weights, ctx.gate, ctx.generator = weights, gate, generator
        return torch.where(gates_BKF, h_BF[:, None, :], 0.0)

    @staticmethod
    def backward(ctx: Any, df_BKF: Tensor) -> Any:
        h_BF, norms_FK, log_threshold_F, gates_BKF = ctx.saved_tensors
        config, gate = ctx.weights.config, ctx.gate
        ctx.weights.writes.count += 1  # an optimiser is about to
        dh_BF = torch.where(gates_BKF, df_BKF, 0.0).sum(dim=1)
        if not gate.learned:
            return dh_BF, None, None, None, None, None, None
        tokens: Tensor | slice = slice(None)
        factor = 1.0
        if config.threshold_mode == "sampled":
            tokens, factor = sample_tokens(len(h_BF), config.threshold_sample, ctx.generator)
        dlog_threshold_F = factor * threshold_gradient(
            h_BF[tokens], gate.units(norms_FK), log_threshold_F.exp(), df_BKF[tokens], config.threshold_window
        )
        return dh_BF, None, dlog_threshold_F, None, None, None, None
