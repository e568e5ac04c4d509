"""The thresholds' straight-through gradient with a rectangular window. Source: docs/method.md, section 3.

dlog_theta_f = sum_{b,k} 1[|h n - theta| < eps/2 and h > 0] df_b,f,k (-theta_f^2 / (eps n_f,k)); with the shared gate
the window is |h - theta| < eps/2 and the factor is -theta^2 / eps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def threshold_gradient(h_BF: Tensor, units_FK: Tensor, theta_F: Tensor, df_BKF: Tensor, window: float) -> Tensor:
    """dlog_theta (F,), summed over the tokens given. `df_BKF` is the loss's gradient in each f_b,f,k.

    `units_FK` is what the gate multiplies h by (`Gate.units`); a pair where that is exactly 0 adds nothing.
    """
    h_B1F, units_KF = h_BF[:, None, :], units_FK.T
    inside_BKF = ((h_B1F * units_KF - theta_F).abs() < window / 2) & (h_B1F > 0) & (units_KF > 0)
    factor_KF = -(theta_F**2) / (window * torch.where(units_KF > 0, units_KF, 1.0))
    return torch.where(inside_BKF, df_BKF * factor_KF, 0.0).sum(dim=(0, 1))


def sample_tokens(n_tokens: int, share: float, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """A random subset of the tokens, (n,) int64, and the factor that makes a sum over it unbiased."""
    count = max(1, round(n_tokens * share))
    return torch.randperm(n_tokens, generator=generator)[:count], n_tokens / count
