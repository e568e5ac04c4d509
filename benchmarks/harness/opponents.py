"""The crosscoder as everybody writes it: dense torch, autograd, Adam. It stands in no relation to the package's code.

Everything of shape (B, K, F) exists; the thresholds' straight-through gradient is exact. `tests/benchmarks` checks
that loss and gradients are those of the package's own definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosscoder import Crosscoder


class DenseCrosscoder(nn.Module):
    """The parameters of `model` (copied) and its loss, for the gates "snapshot" with the penalty "tanh-quad"."""

    def __init__(self, model: Crosscoder, sparsity_coefficient: float) -> None:
        super().__init__()
        config = model.config
        if (config.gate, config.penalty) != ("snapshot", "tanh-quad"):
            raise ValueError(f"not written for gate {config.gate!r} with penalty {config.penalty!r}")
        for name, parameter in model.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))
        self.window = config.threshold_window
        self.tanh_scale = config.tanh_scale
        self.frequency_scale = config.frequency_scale
        self.sparsity_coefficient = sparsity_coefficient

    def forward(self, x_BKD: Tensor) -> Tensor:
        """The loss ()."""
        B, K, _ = x_BKD.shape
        h_BF = x_BKD.flatten(1) @ self.W_enc.flatten(1).T + self.b_enc
        norms_KF = torch.linalg.vector_norm(self.W_dec, dim=2).T
        f_BKF = _JumpReLU.apply(h_BF, norms_KF.detach(), self.log_threshold.exp(), self.window)  # type: ignore[no-untyped-call]
        reconstruction_BKD = torch.einsum("bkf,fkd->bkd", f_BKF, self.W_dec) + self.b_dec
        p_F = (self.tanh_scale * f_BKF * norms_KF).tanh().mean(dim=(0, 1))
        sparsity = (p_F * (1 + p_F / self.frequency_scale)).sum()
        return (reconstruction_BKD - x_BKD).square().sum() / (B * K) + self.sparsity_coefficient * sparsity


class _JumpReLU(torch.autograd.Function):
    """f = h where h n > theta; the rectangular straight-through window for theta (docs/method.md, section 3)."""

    @staticmethod
    def forward(ctx: Any, h_BF: Tensor, norms_KF: Tensor, theta_F: Tensor, window: float) -> Tensor:
        ctx.save_for_backward(h_BF, norms_KF, theta_F)
        ctx.window = window
        h_B1F = h_BF[:, None, :]
        return h_B1F * (h_B1F * norms_KF > theta_F)

    @staticmethod
    def backward(ctx: Any, df_BKF: Tensor) -> Any:
        h_BF, norms_KF, theta_F = ctx.saved_tensors
        scores_BKF = h_BF[:, None, :] * norms_KF
        dh_BF = (df_BKF * (scores_BKF > theta_F)).sum(dim=1)
        inside_BKF = ((scores_BKF - theta_F).abs() < ctx.window / 2) & (scores_BKF > 0)
        dtheta_F = (df_BKF * inside_BKF * (-theta_F / (ctx.window * norms_KF))).sum(dim=(0, 1))
        return dh_BF, None, dtheta_F, None


class DenseTrainer:
    """One training step with torch.optim.Adam in its fastest form, optionally with the loss compiled."""

    def __init__(self, model: DenseCrosscoder, lr: float, *, compiled: bool = False) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self._loss = torch.compile(model) if compiled else model

    def step(self, x_BKD: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(x_BKD)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
