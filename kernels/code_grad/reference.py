"""The sampled product <g_b,k , W_dec[f, k]> on the pairs of a code. Source: docs/method.md, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode


def code_grad(code: SparseCode, g_BKD: Tensor, W_dec_FKD: Tensor) -> Tensor:
    """(N, K): gradient of the reconstruction loss in f_b,f,k for each pair, open gate or not.

    `g_BKD` is the loss's gradient in the reconstruction, 2 (x^ - x) / (B K).
    """
    dense_BKF = torch.einsum("bkd,fkd->bkf", g_BKD, W_dec_FKD)
    return dense_BKF[code.rows(), :, code.features.long()]
