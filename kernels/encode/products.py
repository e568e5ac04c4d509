"""The products x W_enc^T in reduced precision, tile by tile, and the margin within which they may err.

bf16 inputs err by at most 2^-9 of each factor, independently: the error of a product of n terms is a sum of n small
independent errors whose variance is at most 2 (2^-9)^2 / 3 sum_i x_i^2 w_i^2 <= 2 (2^-9)^2 / 3 ||x||_4^2 ||w||_4^2
(Cauchy-Schwarz). The margin is `DEVIATIONS` times its root: a pair at the cut is missed once in 10^14 times.

int8 errs by half a step uniformly: variance Delta_b^2 / 12 ||w||^2 + Delta_f^2 / 12 ||x||^2 with the steps of the token
and of the feature. Its margin is narrower, since a missed pair at the very edge costs little: see docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.kernels.arrays import arrays, n_threads
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.kernels.scratch import Scratch

TILE = 1024
"""Features whose products are made at once: B x TILE numbers stay in a cache until they are compared."""
DEVIATIONS = 8.0
INT8_DEVIATIONS = 4.0
BF16_ERROR = 2.0**-9 * math.sqrt(2 / 3)
FP32_ERROR = 2.0**-21
"""Rounding of a float32 product in another order of summation."""


@dataclass(frozen=True)
class Batch:
    """A batch as the products take it."""

    x_BC: Tensor
    """(B, K D) float32."""
    factor_BC: Tensor
    """The same in the products' type."""
    width0_F: Tensor
    width1_F: Tensor | None
    margin0_B: Tensor
    margin1_B: Tensor | None
    token_scale_B: Tensor | None
    relative: float
    """Error of a product relative to itself, from storing it in bf16."""

    def rule(self, cut_F: Tensor | None, rows: EncoderRows) -> tuple[Any, ...]:
        """The core's rule for candidates."""
        of_batch = (self.width0_F, self.width1_F, self.margin0_B, self.margin1_B)
        return arrays(cut_F, *of_batch, rows.int8_scale_F, self.token_scale_B)


def prepare(x_BC: Tensor, rows: EncoderRows, scratch: Scratch) -> Batch:
    """What one batch needs for its products; `x_BC` (B, K D) float32, contiguous."""
    B = len(x_BC)
    fourth_B = torch.empty(B, dtype=torch.float32)
    shape = (B, x_BC.shape[1])
    bf16 = scratch.take("x bf16", shape, torch.bfloat16) if rows.products == "bf16" else None
    int8 = scale_B = norm_B = inverse = None
    if rows.int8_norm_F is not None and rows.int8_scale_F is not None and rows.column_scale is not None:
        int8 = scratch.take("x int8", shape, torch.int8)
        scale_B, norm_B, inverse = (
            torch.empty(B, dtype=torch.float32),
            torch.empty(B, dtype=torch.float32),
            1 / rows.column_scale,
        )
    of_int8 = arrays(int8, scale_B, norm_B, inverse)
    _core.prepare_batch(*arrays(x_BC, fourth_B, bf16), *of_int8, n_threads())
    if int8 is not None and scale_B is not None and norm_B is not None and rows.int8_norm_F is not None:
        deviation = INT8_DEVIATIONS / math.sqrt(12)
        return Batch(
            x_BC=x_BC,
            factor_BC=int8,
            width0_F=rows.int8_norm_F,
            width1_F=rows.int8_scale_F,
            margin0_B=deviation * scale_B,
            margin1_B=deviation * norm_B,
            token_scale_B=scale_B,
            relative=0.0,
        )
    error = BF16_ERROR if bf16 is not None else FP32_ERROR
    return Batch(
        x_BC=x_BC,
        factor_BC=x_BC if bf16 is None else bf16,
        width0_F=rows.fourth_F,
        width1_F=None,
        margin0_B=DEVIATIONS * error * fourth_B,
        margin1_B=None,
        token_scale_B=None,
        relative=0.0 if bf16 is None else 2.0**-8,
    )


def tiles(batch: Batch, W_enc_FKD: Tensor, rows: EncoderRows, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
    """(first feature, products (B, n)) of all features; a tile's memory is used again for the next one."""
    if rows.int8_FKD is not None:
        weights_FC = rows.int8_FKD.flatten(1)
    else:
        weights_FC = (W_enc_FKD if rows.bf16_FKD is None else rows.bf16_FKD).detach().flatten(1)
    multiply = torch._int_mm if rows.int8_FKD is not None else torch.mm
    dtype = torch.int32 if rows.int8_FKD is not None else batch.factor_BC.dtype
    B, F = len(batch.factor_BC), len(weights_FC)
    for first in range(0, F, TILE):
        weights = weights_FC[first : first + TILE]
        out = scratch.take("products", (B, len(weights)), dtype)
        yield first, multiply(batch.factor_BC, weights.to(batch.factor_BC.dtype).T, out=out)
