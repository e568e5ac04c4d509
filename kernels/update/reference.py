"""Weight gradients from the pairs of a code, densely. Source: docs/method.md, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode


def encoder_gradient(code: SparseCode, dh_N: Tensor, x_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """dW_enc[f] = sum_b dh_b,f x_b (F, K, D) and db_enc[f] = sum_b dh_b,f (F,)."""
    dh_BF = dh_N.new_zeros(code.n_tokens, code.n_features)
    dh_BF[code.rows(), code.features.long()] = dh_N
    return torch.einsum("bf,bkd->fkd", dh_BF, x_BKD), dh_BF.sum(dim=0)


def decoder_gradient(code: SparseCode, g_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """sum_b f_b,f,k g_b,k (F, K, D), the reconstruction's part of dW_dec, and db_dec = sum_b g (K, D)."""
    return torch.einsum("bkf,bkd->fkd", code.to_dense(), g_BKD), g_BKD.sum(dim=0)
