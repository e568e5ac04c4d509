"""Products on a GPU's tensor cores with sums in float32, of matrices or of batches of them.

Only a GPU gives float32 for two bf16 matrices. Elsewhere, in tests, the same rounded numbers are multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, both rounded to bf16."""
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32) if a.ndim == 2 else torch.bmm(a, b, out_dtype=torch.float32)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 of float32 factors, each the sum of two bf16 numbers: three products, a relative error of 2^-17 in
    each term. An H100 multiplies five times as many bf16 numbers as float32's own units do even so."""
    upper_a, upper_b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    return bf16_product(upper_a, upper_b) + bf16_product(upper_a, b - upper_b) + bf16_product(a - upper_a, upper_b)
