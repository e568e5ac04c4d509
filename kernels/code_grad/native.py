"""The sampled product <g_b,k , W_dec[f, k]> on a CPU. The training step takes it from `decode_with_gradients`."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, code_arrays, n_threads


def code_grad(code: SparseCode, g_BKD: Tensor, W_dec_FKD: Tensor) -> Tensor:
    """(N, K) float32, for each pair, open gate or not."""
    out_NK = torch.empty(code.n_pairs, code.n_snapshots)
    _core.code_grad(code_arrays(code), array(W_dec_FKD), array(g_BKD), array(out_NK), n_threads())
    return out_NK
