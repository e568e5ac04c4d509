"""Loss and gradients of one batch in closed form, without autograd (docs/method.md, section 3): the dense path.

The second of the two specifications (`README.md` says what is held against what), and what the sparse steps fall back
to where many features are active. It goes through the features tile by tile and through the snapshots one at a time, so
that beside h (B, F) nothing larger than (B, tile) or a tile's own gradients exists. It works at any density, on any
device and in any floating dtype.

Letters: B tokens, K snapshots, D width of one activation, F features, T features of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.devices import sent
from crosscoder.gate import Gate
from crosscoder.kernels.encode.reference import open_features
from crosscoder.kernels.tensor_cores import bf16_product
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.parameters import PARAMETERS, Weights
from crosscoder.penalty import LossSettings, LossTerms, Penalty
from crosscoder.sharding import ONE_PROCESS, Sharding


@dataclass(frozen=True)
class Gradients:
    """The loss's gradient in each parameter, in the parameter's shape; of a tile: of its features."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    log_threshold: Tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in PARAMETERS:
            yield name, getattr(self, name)


class DensePass:
    """One batch: the loss at once, then the gradients of one tile of features after the other.

    `x_BKD` as from `Weights.input`; `tile`: features at a time (None: all). `narrow`: products of bf16 numbers with
    float32 sums, for tensor cores (None: with bf16 weights on a GPU). h is then made of two such products, so that its
    error is no larger than that of one in tf32, and gates are as good as the sparse way's.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: Weights,
        x_BKD: Tensor,
        settings: LossSettings,
        tile: int | None = None,
        sharding: Sharding = ONE_PROCESS,
        *,
        narrow: bool | None = None,
    ) -> None:
        config = weights.config
        F = len(weights.W_enc)
        self._weights, self._penalty = weights, Penalty.of(config)
        self._gate = gate = Gate.of(config, training=weights.training)
        # bf16 and fp16 weights are widened tile by tile: sums in 16 bits would be of no use.
        self._dtype = dtype = torch.promote_types(weights.W_enc.dtype, torch.float32)
        self._narrow = weights.W_enc.dtype == torch.bfloat16 and weights.W_enc.is_cuda if narrow is None else narrow
        x_BKD = x_BKD.to(dtype)
        B, K, _ = x_BKD.shape
        terms = max(1, B * K)
        size = tile or F
        self._tiles = [slice(first, min(first + size, F)) for first in range(0, F, size)]
        self._theta_F = weights.theta(gate, dtype)
        norms = [torch.linalg.vector_norm(weights.W_dec[t].to(dtype), dim=2) for t in self._tiles]
        self._norms_FK = norms_FK = torch.cat(norms)
        self._units_FK = gate.units(norms_FK)
        self._pre_weight = settings.preactivation_coefficient / terms
        self._tokens, self._sample_factor = None, 1.0
        if config.threshold_mode == "sampled" and gate.learned:
            tokens, self._sample_factor = sample_tokens(B, config.threshold_sample, settings.generator)
            self._tokens = sent(tokens, x_BKD.device)

        self._read_BC = weights.encoder_input(x_BKD).flatten(1)
        self._h = [self._scores(t) for t in self._tiles]
        self._ranked: list[Tensor] | None = None
        self.smallest_score: Tensor | None = None
        """(): BatchTopK's smallest score kept."""
        if gate.ranked:
            open_BF, self.smallest_score = open_features(torch.cat(self._h, dim=1), norms_FK, self._theta_F, gate)
            self._ranked = [open_BF[:, t] for t in self._tiles]

        self.open_K = torch.zeros(K, dtype=torch.int64, device=x_BKD.device)
        """(K,) int64: open gates at each snapshot, over all tokens and features."""
        fired, activity = [], []
        partial_BKD = weights.b_dec.to(dtype) - x_BKD if sharding.first else torch.zeros_like(x_BKD)
        for i, t in enumerate(self._tiles):
            any_BT = torch.zeros_like(self._h[i], dtype=torch.bool)
            p_T = torch.zeros_like(self._theta_F[t])
            for k in range(K):
                open_BT, f_BT = self._activations(i, k)
                any_BT |= open_BT
                self.open_K[k] += open_BT.sum()
                p_T += self._penalty.activity(f_BT * norms_FK[t, k]).mul_(open_BT).sum(dim=0)
                partial_BKD[:, k] += self._product(f_BT, weights.W_dec[t, k])
            fired.append(any_BT.sum(dim=0))
            activity.append(p_T)
        self.residual_BKD = sharding.sum(partial_BKD)
        """x^ - x."""
        self.fired_F = torch.cat(fired)
        """(F,) int64: tokens on which the feature was on at one snapshot or more."""
        p_F = torch.cat(activity) / terms
        self._weight_F = settings.sparsity_coefficient * self._penalty.total_slope(p_F) / terms
        self._g_BKD = self.residual_BKD * (2 / terms)

        reconstruction = self.residual_BKD.square().sum() / terms
        sparsity = settings.sparsity_coefficient * self._penalty.total(p_F)
        preactivation = reconstruction.new_zeros(())
        if settings.preactivation_coefficient:
            gap_F = torch.cat(
                [(self._theta_F[t] - h).relu().sum(dim=0) for t, h in zip(self._tiles, self._h, strict=True)]
            )
            preactivation = self._pre_weight * (gap_F @ norms_FK.sum(dim=1))
        self.loss = LossTerms(reconstruction + sparsity + preactivation, reconstruction, sparsity, preactivation)
        self.db_dec_KD = self._g_BKD.sum(dim=0)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b in the pass's dtype."""
        return bf16_product(a, b) if self._narrow else a.to(self._dtype) @ b.to(self._dtype)

    def _gradient(self, own_BT: Tensor, g_BD: Tensor, W_DT: Tensor) -> Tensor:
        """own + g W."""
        if not self._narrow:
            return torch.addmm(own_BT, g_BD, W_DT.to(self._dtype))
        return own_BT + self._product(g_BD, W_DT)

    def _scores(self, t: slice) -> Tensor:
        """h (B, T)."""
        W_CT, b_T = self._weights.W_enc[t].flatten(1).T, self._weights.b_enc[t].to(self._dtype)
        if not self._narrow:
            return torch.addmm(b_T, self._read_BC, W_CT.to(self._dtype))
        upper_BC = self._read_BC.to(torch.bfloat16)
        return b_T + self._product(upper_BC, W_CT) + self._product(self._read_BC - upper_BC, W_CT)

    def _activations(self, i: int, k: int) -> tuple[Tensor, Tensor]:
        """Open gates (B, T) bool and activations (B, T) of tile i at snapshot k."""
        t, h_BT = self._tiles[i], self._h[i]
        open_BT = h_BT * self._units_FK[t, k] > self._theta_F[t] if self._ranked is None else self._ranked[i]
        return open_BT, torch.where(open_BT, h_BT, 0.0)

    @torch.no_grad()
    def gradients(self) -> Iterator[tuple[slice, Gradients]]:
        """Tile by tile: its features, and the gradients of their parameters (b_dec's is the batch's every time)."""
        for i, t in enumerate(self._tiles):
            yield t, self._tile_gradients(i)

    def _tile_gradients(self, i: int) -> Gradients:
        t, h_BT, penalty = self._tiles[i], self._h[i], self._penalty
        norms_TK, theta_T, weight_T = self._norms_FK[t], self._theta_F[t], self._weight_F[t]
        W_dec_TKD = self._weights.W_dec[t]
        dW_dec_TKD = torch.empty_like(W_dec_TKD, dtype=self._dtype)
        dn_TK = torch.empty_like(norms_TK)
        dh_BT = torch.zeros_like(h_BT)
        dlog_threshold_T = torch.zeros_like(theta_T)
        positive_BT = h_BT > 0
        for k in range(norms_TK.shape[1]):
            open_BT, f_BT = self._activations(i, k)
            g_BD = self._g_BKD[:, k]
            slope_BT = penalty.activity_slope(f_BT * norms_TK[:, k])
            dW_dec_TKD[:, k] = self._product(f_BT.T, g_BD)
            dn_TK[:, k] = weight_T * (f_BT * slope_BT).sum(dim=0)
            df_BT = self._gradient(weight_T * norms_TK[:, k] * slope_BT, g_BD, W_dec_TKD[:, k].T)
            dh_BT += torch.where(open_BT, df_BT, 0.0)
            if self._gate.learned:
                dlog_threshold_T += self._sample_factor * _threshold_gradient(
                    h_BT, positive_BT, self._units_FK[t, k], theta_T, df_BT, self._tokens,
                    self._weights.config.threshold_window,
                )  # fmt: skip
        if self._pre_weight:
            below_BT = h_BT < theta_T
            gap_T = torch.where(below_BT, theta_T - h_BT, 0.0).sum(dim=0)
            norm_sum_T = norms_TK.sum(dim=1)
            dh_BT -= below_BT * (self._pre_weight * norm_sum_T)
            dlog_threshold_T += (self._pre_weight * theta_T * norm_sum_T) * below_BT.sum(dim=0)
            dn_TK += self._pre_weight * gap_T[:, None]
        # dl/dn times W / n, 0 where the norm is exactly 0.
        dW_dec_TKD += (dn_TK / torch.where(norms_TK > 0, norms_TK, 1.0))[:, :, None] * W_dec_TKD
        return Gradients(
            W_enc=self._product(dh_BT.T, self._read_BC).view_as(dW_dec_TKD),
            W_dec=dW_dec_TKD,
            b_enc=dh_BT.sum(dim=0),
            b_dec=self.db_dec_KD,
            log_threshold=dlog_threshold_T,
        )


def _threshold_gradient(
    h_BT: Tensor,
    positive_BT: Tensor,
    units_T: Tensor,
    theta_T: Tensor,
    df_BT: Tensor,
    tokens: Tensor | None,
    window: float,
) -> Tensor:
    """One snapshot's part of dlog_theta: kernels/threshold/reference.py with as few sweeps as possible."""
    if tokens is not None:
        h_BT, positive_BT, df_BT = h_BT[tokens], positive_BT[tokens], df_BT[tokens]
    distance_BT = torch.addcmul(-theta_T, h_BT, units_T).abs_()
    inside_BT = distance_BT.lt_(window / 2).mul_(positive_BT)
    factor_T = torch.where(units_T > 0, -(theta_T**2) / (window * torch.where(units_T > 0, units_T, 1.0)), 0.0)
    return factor_T * inside_BT.mul_(df_BT).sum(dim=0)
