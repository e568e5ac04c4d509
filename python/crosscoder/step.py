"""Loss and gradients of one batch in closed form, without autograd (docs/method.md, section 3).

The dense path: it goes through the snapshots one at a time, so that what is dense is only ever (B, F), small enough
to stay in a cache, and never (B, K, F). It works at any density and in any floating dtype.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs with an open gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.model import Crosscoder, LossTerms
from crosscoder.penalty import Penalty


@dataclass(frozen=True)
class Gradients:
    """The loss's gradient in each parameter, in the parameter's shape."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    log_threshold: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold"):
            yield name, getattr(self, name)


@dataclass(frozen=True)
class StepResult:
    """What one batch gives: its loss, its gradients and the figures that the metrics are made of."""

    loss: LossTerms
    gradients: Gradients
    residual_BKD: Tensor
    """x^ - x."""
    open_K: Tensor
    """(K,) int64: open gates at each snapshot, over all tokens and features."""
    fired_F: Tensor
    """(F,) int64: tokens on which the feature was on at one snapshot or more."""
    smallest_score: Tensor | None
    """(): BatchTopK's smallest score kept."""


@torch.no_grad()
def loss_and_gradients(
    model: Crosscoder,
    x_BKD: Tensor,
    *,
    sparsity_coefficient: float,
    preactivation_coefficient: float = 0.0,
    generator: torch.Generator | None = None,
) -> StepResult:
    """The same loss as `model.loss` and its gradient in every parameter.

    `generator` draws the tokens of threshold_mode "sampled". Raises `DataError` on a wrong shape, `ConfigError` for
    a folded crosscoder.
    """
    model.require_trainable(preactivation_coefficient)
    config, penalty = model.config, Penalty.of(model.config)
    x_BKD = model.check_input(x_BKD)
    B, K, _ = x_BKD.shape
    terms = max(1, B * K)
    W_dec_FKD, norms_FK, theta_F = model.W_dec, model.decoder_norms(), model.threshold
    norms_KF = norms_FK.T.contiguous()
    h_BF = model.preactivations(x_BKD)
    # The pairs: everything of the penalty and of the encoder's gradient lives on them alone.
    code, smallest = model.code_of(h_BF, norms_FK)
    feature_N, open_NK = code.features.long(), code.open_gates()
    flat_N = code.rows() * h_BF.shape[1] + feature_N
    f_NK = torch.where(open_NK, code.values[:, None], 0.0)
    f_BF = torch.zeros_like(h_BF)  # one snapshot's activations, refilled at the pairs for each
    n_NK = norms_FK[feature_N]
    p_F = _sum_by(feature_N, penalty.activity(f_NK * n_NK).sum(dim=1), len(theta_F)) / terms
    weight_F = sparsity_coefficient * penalty.total_slope(p_F) / terms
    activity_slope_NK = penalty.activity_slope(f_NK * n_NK)

    residual_BKD = torch.empty_like(x_BKD)
    for k in range(K):
        f_BF.view(-1)[flat_N] = f_NK[:, k]
        residual_BKD[:, k] = torch.addmm(model.b_dec[k], f_BF, W_dec_FKD[:, k]) - x_BKD[:, k]
    g_BKD = residual_BKD * (2 / terms)

    # dl/dn of the penalty, and W / n (0 where the norm is exactly 0).
    dn_FK = weight_F[:, None] * _sum_by(feature_N, f_NK * activity_slope_NK, len(theta_F))
    dh_N = torch.zeros_like(code.values)
    dlog_threshold_F = torch.zeros_like(theta_F)
    tokens, factor = None, 1.0
    if config.threshold_mode == "sampled" and not config.selects_by_rank:
        tokens, factor = sample_tokens(B, config.threshold_sample, generator)
    dW_dec_FKD = torch.empty_like(W_dec_FKD)
    positive_BF = h_BF > 0
    for k in range(K):
        f_BF.view(-1)[flat_N] = f_NK[:, k]
        dW_dec_FKD[:, k] = f_BF.T @ g_BKD[:, k]
        # df on all pairs: <g, W_dec> plus the penalty's slope, which is that of a closed gate but for the N pairs.
        closed_slope_F = weight_F * norms_KF[k] * penalty.slope_at_zero
        df_BF = torch.addmm(closed_slope_F, g_BKD[:, k], W_dec_FKD[:, k].T)
        open_slope_N = weight_F[feature_N] * n_NK[:, k] * (activity_slope_NK[:, k] - penalty.slope_at_zero)
        df_N = df_BF.view(-1)[flat_N] + open_slope_N
        df_BF.view(-1)[flat_N] = df_N
        dh_N += torch.where(open_NK[:, k], df_N, 0.0)
        if not config.selects_by_rank:
            dlog_threshold_F += factor * _threshold_gradient(
                h_BF, positive_BF, norms_KF[k], theta_F, df_BF, tokens, config.threshold_window, config.gate
            )

    dh_BF = torch.zeros_like(h_BF)
    dh_BF.view(-1)[flat_N] = dh_N
    preactivation = h_BF.new_zeros(())
    if preactivation_coefficient:
        weight = preactivation_coefficient / terms
        below_BF = h_BF < theta_F
        gap_F = torch.where(below_BF, theta_F - h_BF, 0.0).sum(dim=0)
        norm_sum_F = norms_FK.sum(dim=1)
        preactivation = weight * (gap_F @ norm_sum_F)
        dh_BF -= below_BF * (weight * norm_sum_F)
        dlog_threshold_F += (weight * theta_F * norm_sum_F) * below_BF.sum(dim=0)
        dn_FK += weight * gap_F[:, None]
    dW_dec_FKD += (dn_FK / torch.where(norms_FK > 0, norms_FK, 1.0))[:, :, None] * W_dec_FKD

    reconstruction = residual_BKD.square().sum() / terms
    sparsity = sparsity_coefficient * penalty.total(p_F)
    return StepResult(
        loss=LossTerms(reconstruction + sparsity + preactivation, reconstruction, sparsity, preactivation),
        gradients=Gradients(
            W_enc=(dh_BF.T @ x_BKD.flatten(1)).view_as(model.W_enc),
            W_dec=dW_dec_FKD,
            b_enc=dh_BF.sum(dim=0),
            b_dec=g_BKD.sum(dim=0),
            log_threshold=dlog_threshold_F,
        ),
        residual_BKD=residual_BKD,
        open_K=open_NK.sum(dim=0),
        fired_F=torch.bincount(feature_N, minlength=len(theta_F)),
        smallest_score=smallest,
    )


def _sum_by(feature_N: Tensor, values: Tensor, n_features: int) -> Tensor:
    """Sums of `values` (N,) or (N, K) feature by feature; always in the order of the pairs, so repeatable."""
    sums = values.new_zeros(n_features, *values.shape[1:])
    return sums.index_add_(0, feature_N, values)


def _threshold_gradient(
    h_BF: Tensor,
    positive_BF: Tensor,
    norms_F: Tensor,
    theta_F: Tensor,
    df_BF: Tensor,
    tokens: Tensor | None,
    window: float,
    gate: str,
) -> Tensor:
    """One snapshot's part of dlog_theta (F,): kernels/threshold/reference.py with as few sweeps as possible."""
    if tokens is not None:
        h_BF, positive_BF, df_BF = h_BF[tokens], positive_BF[tokens], df_BF[tokens]
    units_F = torch.ones_like(norms_F) if gate == "shared" else norms_F
    distance_BF = torch.addcmul(-theta_F, h_BF, units_F).abs_()
    inside_BF = distance_BF.lt_(window / 2).mul_(positive_BF)
    factor_F = torch.where(units_F > 0, -(theta_F**2) / (window * torch.where(units_F > 0, units_F, 1.0)), 0.0)
    return factor_F * inside_BF.mul_(df_BF).sum(dim=0)
