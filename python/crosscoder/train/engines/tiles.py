"""A training step at high density: dense products, a tile of features and a snapshot at a time.

Plain torch on any device; nothing larger than a tile, (B, features of the tile), ever exists beside x^ and the
residual, and no gradient of all features. Twice as much work for h (computed in both passes) buys that.

Letters: B tokens, K snapshots, D width of one activation, F features, T features of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosscoder.kernels.encode import reference as encode_reference
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.model import Crosscoder, LossTerms
from crosscoder.penalty import Penalty
from crosscoder.train.engines.base import StepSettings

TILE_BYTES = 64 * 2**20
"""Of one (B, T) float32 matrix."""


@dataclass(frozen=True)
class TileGradients:
    """The gradients of the features `first` to `first + T`, in float32."""

    first: int
    W_enc_TKD: Tensor
    W_dec_TKD: Tensor
    b_enc_T: Tensor
    log_threshold_T: Tensor


@dataclass
class TiledStep:
    """The dense step of one batch: `forward()`, then `gradients()` as often as needed."""

    model: Crosscoder
    x_BKD: Tensor
    """float32."""
    norms_FK: Tensor
    theta_F: Tensor
    settings: StepSettings
    residual_BKD: Tensor = field(init=False)
    open_K: Tensor = field(init=False)
    fired_F: Tensor = field(init=False)
    smallest: Tensor | None = field(init=False, default=None)
    loss: LossTerms = field(init=False)

    def __post_init__(self) -> None:
        self._penalty = Penalty.of(self.model.config)
        self._ranked_BF: Tensor | None = None

    def forward(self) -> None:
        """Fills residual, loss and statistics."""
        B, K, _ = self.x_BKD.shape
        F, model = len(self.theta_F), self.model
        self._choose_by_rank()
        self.residual_BKD = model.b_dec.float() - self.x_BKD
        self.open_K = torch.zeros(K, dtype=torch.int64, device=self.x_BKD.device)
        self.fired_F = torch.zeros(F, dtype=torch.int64, device=self.x_BKD.device)
        self._terms = max(1, B * K)
        p_F = torch.zeros_like(self.theta_F)
        gap_F = torch.zeros_like(self.theta_F)
        for tile in self._tiles():
            h_BT = self._scores(tile)
            W_TKD = model.W_dec[tile].float()
            any_BT = torch.zeros_like(h_BT, dtype=torch.bool)
            for k in range(K):
                open_BT = self._open(h_BT, tile, k)
                f_BT = torch.where(open_BT, h_BT, 0.0)
                self.residual_BKD[:, k].addmm_(f_BT, W_TKD[:, k])
                p_F[tile] += self._penalty.activity(f_BT * self.norms_FK[tile, k]).sum(dim=0)
                self.open_K[k] += open_BT.sum()
                any_BT |= open_BT
            self.fired_F[tile] = any_BT.sum(dim=0)
            if self.settings.preactivation_coefficient:
                gap_F[tile] = (self.theta_F[tile] - h_BT).relu().sum(dim=0)
        p_F /= self._terms
        self._gap_F = gap_F
        self._weight_F = self.settings.sparsity_coefficient * self._penalty.total_slope(p_F) / self._terms
        reconstruction = self.residual_BKD.square().sum() / self._terms
        sparsity = self.settings.sparsity_coefficient * self._penalty.total(p_F)
        lift = self.settings.preactivation_coefficient / self._terms
        preactivation = lift * (gap_F @ self.norms_FK.sum(dim=1))
        total = reconstruction + sparsity + preactivation
        self.loss = LossTerms(total, reconstruction, sparsity, preactivation)

    def gradients(self) -> Iterator[TileGradients]:
        """Tile by tile."""
        config, model, penalty = self.model.config, self.model, self._penalty
        B, K, _ = self.x_BKD.shape
        x_BI = self.x_BKD.flatten(1)
        scale = 2 / self._terms
        lift = self.settings.preactivation_coefficient / self._terms
        tokens: Tensor | slice = slice(None)
        factor = 1.0
        if config.threshold_mode == "sampled" and not config.selects_by_rank:
            generator = torch.Generator().manual_seed(self.settings.seed)
            drawn, factor = sample_tokens(B, config.threshold_sample, generator)
            tokens = drawn.to(x_BI.device, non_blocking=True)
        for tile in self._tiles():
            h_BT = self._scores(tile)
            W_TKD, norms_TK, theta_T = model.W_dec[tile].float(), self.norms_FK[tile], self.theta_F[tile]
            weight_T = self._weight_F[tile]
            dh_BT = torch.zeros_like(h_BT)
            dW_dec_TKD = torch.empty_like(W_TKD)
            dlog_T = torch.zeros_like(theta_T)
            for k in range(K):
                norm_T = norms_TK[:, k]
                open_BT = self._open(h_BT, tile, k)
                f_BT = torch.where(open_BT, h_BT, 0.0)
                slope_BT = penalty.activity_slope(f_BT * norm_T)
                g_BD = self.residual_BKD[:, k] * scale
                df_BT = torch.addmm(slope_BT * (weight_T * norm_T), g_BD, W_TKD[:, k].T)
                dh_BT += torch.where(open_BT, df_BT, 0.0)
                dn_T = weight_T * (f_BT * slope_BT).sum(dim=0) + lift * self._gap_F[tile]
                pull_T = torch.where(norm_T > 0, dn_T / torch.where(norm_T > 0, norm_T, 1.0), 0.0)
                dW_dec_TKD[:, k] = torch.addmm(pull_T[:, None] * W_TKD[:, k], f_BT.T, g_BD)
                if not config.selects_by_rank:
                    unit_T = torch.ones_like(norm_T) if config.gate == "shared" else norm_T
                    h = h_BT[tokens]
                    inside = ((h * unit_T - theta_T).abs() < config.threshold_window / 2) & (h > 0) & (unit_T > 0)
                    per_unit_T = theta_T**2 / (config.threshold_window * torch.where(unit_T > 0, unit_T, 1.0))
                    dlog_T -= factor * per_unit_T * torch.where(inside, df_BT[tokens], 0.0).sum(dim=0)
            if lift:
                below_BT = h_BT < theta_T
                norm_sum_T = norms_TK.sum(dim=1)
                dh_BT -= below_BT * (lift * norm_sum_T)
                dlog_T += lift * theta_T * norm_sum_T * below_BT.sum(dim=0)
            dW_enc_TI = dh_BT.T @ x_BI
            yield TileGradients(tile.start, dW_enc_TI.view_as(W_TKD), dW_dec_TKD, dh_BT.sum(dim=0), dlog_T)

    def _tiles(self) -> Iterator[slice]:
        F = len(self.theta_F)
        width = max(1, min(F, TILE_BYTES // (4 * max(1, len(self.x_BKD)))))
        for first in range(0, F, width):
            yield slice(first, min(F, first + width))

    def _scores(self, tile: slice) -> Tensor:
        W_TI = self.model.W_enc[tile].flatten(1).float()
        return torch.addmm(self.model.b_enc[tile].float(), self.x_BKD.flatten(1), W_TI.T)

    def _open(self, h_BT: Tensor, tile: slice, k: int) -> Tensor:
        if self._ranked_BF is not None:
            return self._ranked_BF[:, tile]
        if self.model.config.gate == "shared":
            return h_BT > self.theta_F[tile]
        return h_BT * self.norms_FK[tile, k] > self.theta_F[tile]

    def _choose_by_rank(self) -> None:
        """For gates by rank, (B, F) bool: they compare all features at once."""
        config = self.model.config
        if not config.selects_by_rank:
            return
        assert config.top_k is not None
        h_BF = torch.cat([self._scores(tile) for tile in self._tiles()], dim=1)
        if config.gate == "topk":
            self._ranked_BF = encode_reference.topk_gates(h_BF, self.norms_FK, config.top_k)
        else:
            self._ranked_BF, self.smallest = encode_reference.batchtopk_gates(h_BF, self.norms_FK, config.top_k)
