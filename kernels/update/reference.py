"""Weight gradients from the pairs of a code, densely. Source: docs/method.md, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants, torch's defaults."""


def encoder_gradient(code: SparseCode, dh_N: Tensor, x_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """dW_enc[f] = sum_b dh_b,f x_b (F, K, D) and db_enc[f] = sum_b dh_b,f (F,)."""
    dh_BF = dh_N.new_zeros(code.n_tokens, code.n_features)
    dh_BF[code.rows(), code.features.long()] = dh_N
    return torch.einsum("bf,bkd->fkd", dh_BF, x_BKD), dh_BF.sum(dim=0)


def decoder_gradient(code: SparseCode, g_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """sum_b f_b,f,k g_b,k (F, K, D), the reconstruction's part of dW_dec, and db_dec = sum_b g (K, D)."""
    return torch.einsum("bkf,bkd->fkd", code.to_dense(), g_BKD), g_BKD.sum(dim=0)


def adam(w: Tensor, m: Tensor, v: Tensor, gradient: Tensor, *, lr: float, t: int, elapsed: Tensor | int = 1) -> None:
    """One Adam step in place, torch.optim.Adam's with its defaults; `t` counts steps from 1.

    `elapsed` is how many steps ago the moments were last brought up to date (row-lazy Adam: by row).
    """
    m.mul_(BETA1**elapsed).add_(gradient, alpha=1 - BETA1)
    v.mul_(BETA2**elapsed).addcmul_(gradient, gradient, value=1 - BETA2)
    root = v.sqrt().div_((1 - BETA2**t) ** 0.5).add_(EPSILON)
    w.addcdiv_(m, root, value=-lr / (1 - BETA1**t))
