"""What the encoder needs of the weights beside the weights: kept, and written again when they change.

Decoder norms, ||W_enc[f]||_4 for the candidates' margin, and a copy of W_enc in the type that its products are made in
(bf16 or int8). The training step's update refreshes the rows that it changes; other writes are noticed
(`Weights.state`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.hardware import faster_gemm_dtype
from crosscoder.kernels.arrays import array, arrays, n_threads
from crosscoder.parameters import Weights

Products = Literal["fp32", "bf16", "int8"]


class EncoderRows:
    """Derived rows of one pair of weights (F, K, D), float32 or bfloat16, on the CPU."""

    def __init__(self, W_enc_FKD: Tensor, W_dec_FKD: Tensor, products: Products) -> None:
        F, K, D = W_enc_FKD.shape
        self.products = products
        self.shape = tuple(W_enc_FKD.shape)
        self.dtype = W_enc_FKD.dtype
        self.norms_FK = torch.empty(F, K, dtype=torch.float32)
        """Decoder norms."""
        self.fourth_F = torch.empty(F, dtype=torch.float32)
        """||W_enc[f]||_4 over all snapshots."""
        copies = products == "bf16" and W_enc_FKD.dtype != torch.bfloat16
        self.bf16_FKD = torch.empty(F, K, D, dtype=torch.bfloat16) if copies else None
        int8 = products == "int8"
        self.int8_FKD = torch.empty(F, K, D, dtype=torch.int8) if int8 else None
        self.int8_scale_F = torch.empty(F, dtype=torch.float32) if int8 else None
        self.int8_norm_F = torch.empty(F, dtype=torch.float32) if int8 else None
        self.column_scale = torch.ones(K * D, dtype=torch.float32) if int8 else None
        """(K D): what activations are divided by, and W_enc multiplied, before both become int8."""
        self._seen: tuple[int, ...] | None = None
        for copy in (self.bf16_FKD, self.int8_FKD):
            if copy is not None:
                _core.prefer_huge_pages(array(copy))

    def arrays(self) -> tuple[Any, ...]:
        """As the core takes them."""
        int8 = (self.int8_FKD, self.int8_scale_F, self.int8_norm_F, self.column_scale)
        return arrays(self.norms_FK, self.fourth_F, self.bf16_FKD, *int8)

    def fit(self, W_enc_FKD: Tensor) -> bool:
        """Are they of weights of this shape and dtype?"""
        return self.shape == tuple(W_enc_FKD.shape) and self.dtype == W_enc_FKD.dtype

    def refresh(self, weights: Weights) -> None:
        """Bring everything up to date, if the weights changed since the last time."""
        state = weights.state()
        if state is None or state != self._seen:
            _core.derive_rows(*arrays(weights.W_enc, weights.W_dec), self.arrays(), n_threads())
            self._seen = state

    def current(self, weights: Weights) -> None:
        """The core has changed weights and rows together."""
        self._seen = weights.state()

    def unscaled(self) -> bool:
        """Are these int8 rows whose column scale was never set?"""
        return self.column_scale is not None and bool((self.column_scale == 1).all())

    def set_column_scale(self, scale: Tensor) -> None:
        """The scale (K D) of int8 products; if it is another one, rows are made anew at the next `refresh`."""
        assert self.column_scale is not None, "only int8 products have scales"
        if not torch.equal(self.column_scale, scale):
            self.column_scale.copy_(scale)
            self._seen = None


def column_scale(x_BC: Tensor) -> Tensor:
    """(K D): what spreads the range of activations (B, K D) evenly over x / scale and W scale.

    Trained transformers have dimensions tens of times larger than the rest, which would take all of int8's steps. The
    root of a dimension's own size leaves half of the difference to the weights.
    """
    size_C = x_BC.float().square().mean(dim=0).sqrt()
    mean = size_C.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (size_C / mean).clamp(1e-3, 1e3).sqrt()


def default_products() -> Products:
    """The type that this machine multiplies fastest in, of those without a loss: fp32 or bf16."""
    return "bf16" if faster_gemm_dtype() == torch.bfloat16 else "fp32"
