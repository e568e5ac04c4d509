"""The sampled product <g_b,k , W_dec[f, k]> on a GPU, by the kernel of `decode` (where the two are also fused)."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.kernels.decode.triton import PAIRS, decode_rows, row_slices


def code_grad(code: SparseCode, g_BKD: Tensor, W_dec_FKD: Tensor) -> Tensor:
    """(N, K) float32: gradient of the reconstruction loss in f_b,f,k for each pair, open gate or not.

    `g_BKD` is the loss's gradient in the reconstruction, 2 (x^ - x) / (B K). N is the length of the code's buffers;
    what follows after the last pair is undefined.
    """
    B, K, D = g_BKD.shape
    block, parts, warps = row_slices(D)
    dots = g_BKD.new_empty(code.n_pairs, parts, K, dtype=torch.float32)
    if B:
        g_BKD = g_BKD.contiguous()
        decode_rows[(B, K, parts)](
            code.row_offsets, code.features, code.values, code.gates, W_dec_FKD, g_BKD, g_BKD, g_BKD, dots, dots, dots,
            K, D, RESIDUAL=False, RECONSTRUCT=False, DOTS=True, CLOSED=True,
            PAIRS=PAIRS, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dots.sum(dim=1)
