"""The loss's terms, and the sparsity penalties in one form:

l_s = lambda * total(p), p_f = mean over (b, k) of activity(f_b,f,k n_f,k).

Source: docs/method.md, section 2. "tanh-quad" is what the paper's code trains with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscoder.config import CrosscoderConfig


@dataclass(frozen=True)
class LossTerms:
    """The loss of one batch and its parts, each a mean over tokens and snapshots (docs/method.md, section 2)."""

    total: Tensor
    """(): what is minimised."""
    reconstruction: Tensor
    """(): 1/(BK) sum of squared errors."""
    sparsity: Tensor
    """(): lambda times the penalty."""
    preactivation: Tensor
    """(): lambda_P times the mean of relu(theta - h) n."""


@dataclass(frozen=True)
class LossSettings:
    """What the loss needs beside crosscoder and batch."""

    sparsity_coefficient: float
    """lambda."""
    preactivation_coefficient: float = 0.0
    """lambda_P."""
    generator: torch.Generator | None = None
    """Draws the tokens of threshold_mode "sampled"; None: torch's own."""


@dataclass(frozen=True)
class Penalty:
    """`kind` is "tanh-quad", "tanh" or "l1"; c = `tanh_scale`, s = `frequency_scale`."""

    kind: str
    tanh_scale: float
    frequency_scale: float

    @classmethod
    def of(cls, config: CrosscoderConfig) -> Penalty:
        return cls(config.penalty, config.tanh_scale, config.frequency_scale)

    def activity(self, z: Tensor) -> Tensor:
        """How much one gate counts, from z = f n >= 0: tanh(c z), or z itself for "l1"."""
        return z if self.linear else (self.tanh_scale * z).tanh()

    def activity_slope(self, z: Tensor) -> Tensor:
        """The derivative of `activity`."""
        if self.linear:
            return z.new_ones(()).expand_as(z)
        return self.tanh_scale * (1 - (self.tanh_scale * z).tanh() ** 2)

    @property
    def slope_at_zero(self) -> float:
        """The derivative of `activity` at 0, where every closed gate is."""
        return 1.0 if self.linear else self.tanh_scale

    @property
    def linear(self) -> bool:
        """Is `activity` the identity?"""
        return self.kind == "l1"

    def total(self, p_F: Any) -> Any:
        """sum_f p_f (1 + p_f / s), or sum_f p_f; (). `p_F` is a tensor or a numpy array."""
        return (p_F * (1 + p_F / self.frequency_scale)).sum() if self.kind == "tanh-quad" else p_F.sum()

    def total_slope(self, p_F: Tensor) -> Tensor:
        """The derivative of `total` in each p_f (F,)."""
        return 1 + 2 * p_F / self.frequency_scale if self.kind == "tanh-quad" else p_F.new_ones(p_F.shape)
