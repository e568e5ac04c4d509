"""What the encoder needs of the weights beside the weights: kept, and written again when they change.

Decoder norms, ||W_enc[f]||_4 for the candidates' margin, and a copy of W_enc in the type that its products are made in
(bf16 or int8). The training step's update refreshes the rows that it changes. Other changes of the parameters are
noticed by their version counters, but not those of torch's fused optimisers, which do not count: so rows are also made
anew after every backward pass, and every time while the weights have a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.hardware import faster_gemm_dtype
from crosscoder.kernels.arrays import Array, array, array_or_none, n_threads

Products = Literal["fp32", "bf16", "int8"]


class EncoderRows:
    """Derived rows of one pair of weights (F, K, D), float32 or bfloat16, on the CPU."""

    def __init__(self, W_enc_FKD: Tensor, W_dec_FKD: Tensor, products: Products) -> None:
        F, K, D = W_enc_FKD.shape
        self.products = products
        self.shape = tuple(W_enc_FKD.shape)
        self.dtype = W_enc_FKD.dtype
        self.norms_FK = torch.empty(F, K)
        """Decoder norms."""
        self.fourth_F = torch.empty(F)
        """||W_enc[f]||_4 over all snapshots."""
        copies = products == "bf16" and W_enc_FKD.dtype != torch.bfloat16
        self.bf16_FKD = torch.empty(F, K, D, dtype=torch.bfloat16) if copies else None
        int8 = products == "int8"
        self.int8_FKD = torch.empty(F, K, D, dtype=torch.int8) if int8 else None
        self.int8_scale_F = torch.empty(F) if int8 else None
        self.int8_norm_F = torch.empty(F) if int8 else None
        self.column_scale = torch.ones(K * D) if int8 else None
        """(K D): what activations are divided by, and W_enc multiplied, before both become int8."""
        self._seen: tuple[int, ...] = ()
        for copy in (self.bf16_FKD, self.int8_FKD):
            if copy is not None:
                _core.prefer_huge_pages(array(copy))

    def arrays(self) -> tuple[Array | None, ...]:
        """As the core takes them."""
        return (
            array(self.norms_FK),
            array(self.fourth_F),
            array_or_none(self.bf16_FKD),
            array_or_none(self.int8_FKD),
            array_or_none(self.int8_scale_F),
            array_or_none(self.int8_norm_F),
            array_or_none(self.column_scale),
        )

    def refresh(self, W_enc_FKD: Tensor, W_dec_FKD: Tensor) -> None:
        """Bring everything up to date, if the weights changed since the last time."""
        if self._seen != _state_of(W_enc_FKD, W_dec_FKD):
            _core.derive_rows(array(W_enc_FKD), array(W_dec_FKD), self.arrays(), n_threads())
            trusted = W_enc_FKD.grad is None and W_dec_FKD.grad is None
            self._seen = _state_of(W_enc_FKD, W_dec_FKD) if trusted else ()

    def forget(self) -> None:
        """The weights changed, or are about to: everything is made anew at the next `refresh`."""
        self._seen = ()

    def unscaled(self) -> bool:
        """Are these int8 rows whose column scale was never set?"""
        return self.column_scale is not None and bool((self.column_scale == 1).all())

    def set_column_scale(self, scale: Tensor) -> None:
        """The scale (K D) of int8 products; if it is another one, rows are made anew at the next `refresh`."""
        assert self.column_scale is not None, "only int8 products have scales"
        if not torch.equal(self.column_scale, scale):
            self.column_scale.copy_(scale)
            self.forget()

    @torch.no_grad()
    def written(self, W_enc_FKD: Tensor, W_dec_FKD: Tensor) -> None:
        """The core changed the weights and these rows together: tell everybody else who looks at the versions."""
        for parameter in (W_enc_FKD, W_dec_FKD):
            parameter[:0].zero_()
        self._seen = _state_of(W_enc_FKD, W_dec_FKD)


def _state_of(*parameters: Tensor) -> tuple[int, ...]:
    return tuple(number for parameter in parameters for number in (parameter.data_ptr(), parameter._version))


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
