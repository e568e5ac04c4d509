"""The thresholds' straight-through gradient on a GPU: batched products through cuBLAS, and one kernel for the window.

A tile of features at a time: <residual, W_dec[:, k]> for all snapshots by one batched product, (K, n, tile), then a
kernel that reads each number once with its h, and sums over tokens and snapshots. On a share of the tokens this is the
mode "sampled".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscoder.gate import Gate
from crosscoder.kernels.device import activity_and_slope, penalty_code
from crosscoder.kernels.tensor_cores import split_product
from crosscoder.penalty import Penalty

TILE_BYTES = 256 * 2**20
"""Of one tile of the products. The residual is read once a tile, so tiles are large, though no cache holds them."""
TOKENS, FEATURES = 16, 128


@triton.jit
def window_sums(
    dots_ptr, h_ptr, b_enc_ptr, norms_ptr, theta_ptr, weight_ptr, out_ptr,
    n_tokens, F, K, first, width, h_stride, scale, window, tanh_scale,
    PENALTY: tl.constexpr, SHARED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """out[tile of tokens, f]: its part of dlog_theta, for features `first` to `first + width`.

    `dots` (K, n, width) are <residual, W_dec>, `h` (n, width) lacks its bias.
    """
    column = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    row = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    feature = first + column
    in_tile = column < width
    inside = (row < n_tokens)[:, None] & in_tile[None, :]
    h = tl.load(h_ptr + row.to(tl.int64)[:, None] * h_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    h += tl.load(b_enc_ptr + feature, mask=in_tile, other=0)[None, :]
    theta = tl.load(theta_ptr + feature, mask=in_tile, other=0)
    weight = tl.load(weight_ptr + feature, mask=in_tile, other=0)
    inside = inside & (h > 0)
    total = tl.zeros([TOKENS, FEATURES], tl.float32)
    for k in range(K):
        at = (tl.cast(k, tl.int64) * n_tokens + row)[:, None] * width + column[None, :]
        norm = tl.load(norms_ptr + feature.to(tl.int64) * K + k, mask=in_tile, other=0)
        unit = norm
        if SHARED:
            unit = tl.full([FEATURES], 1.0, tl.float32)
        strength = h * unit[None, :]
        here = inside & (tl.abs(strength - theta[None, :]) < window / 2) & (unit > 0)[None, :]
        dot = tl.load(dots_ptr + at, mask=here, other=0).to(tl.float32)
        f = tl.where(strength > theta[None, :], h, 0.0)
        _, slope = activity_and_slope(tl.maximum(f, 0.0) * norm[None, :], tanh_scale, PENALTY)
        df = dot * scale + (weight * norm)[None, :] * slope
        factor = -theta * theta / (window * tl.where(unit > 0, unit, 1.0))
        total += tl.where(here, df * factor[None, :], 0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * F + feature, tl.sum(total, axis=0), mask=in_tile)


def threshold_gradient(
    x_BKD: Tensor,
    residual_BKD: Tensor,
    W_enc_FKD: Tensor,
    W_dec_FKD: Tensor,
    b_enc_F: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    weight_F: Tensor,
    *,
    penalty: Penalty,
    scale: float,
    window: float,
    gate: Gate,
    tokens: Tensor | None = None,
    products_nF: Tensor | None = None,
) -> Tensor:
    """dlog_theta (F,) float32, summed over all tokens or over `tokens` (n,) int64.

    df = `scale` <residual, W_dec> + `weight_F` n * the penalty's slope. With `products_nF`, the encoder's x W_enc^T in
    bf16 of those tokens, residual and W_dec are multiplied in bf16 as well; without, both products are float32's
    (`split_product`). A pair whose decoder norm is exactly 0 adds nothing.
    """
    F, K, _ = W_enc_FKD.shape
    chosen = residual_BKD if tokens is None else residual_BKD[tokens]
    n_tokens = len(chosen)
    if not n_tokens:
        return theta_F.new_zeros(F)
    in_bf16 = products_nF is not None
    residual_KnD = (chosen.to(torch.bfloat16) if in_bf16 else chosen.float()).transpose(0, 1)
    read_nC = (x_BKD if tokens is None else x_BKD[tokens]).flatten(1)
    width = tile_width(n_tokens, K, F, residual_KnD.element_size())
    parts = theta_F.new_empty(triton.cdiv(n_tokens, TOKENS), F, dtype=torch.float32)
    for first in range(0, F, width):
        tile = slice(first, min(F, first + width))
        W_dec_KDT = W_dec_FKD[tile].permute(1, 2, 0)
        if products_nF is not None:
            dots_KnT, h_nT = torch.bmm(residual_KnD, W_dec_KDT.to(torch.bfloat16)), products_nF[:, tile]
        else:
            dots_KnT = split_product(residual_KnD, W_dec_KDT.float())
            h_nT = split_product(read_nC.float(), W_enc_FKD[tile].flatten(1).float().T)
        window_sums[(triton.cdiv(dots_KnT.shape[2], FEATURES), len(parts))](
            dots_ptr=dots_KnT, h_ptr=h_nT, b_enc_ptr=b_enc_F, norms_ptr=norms_FK, theta_ptr=theta_F,
            weight_ptr=weight_F, out_ptr=parts, n_tokens=n_tokens, F=F, K=K, first=first, width=dots_KnT.shape[2],
            h_stride=h_nT.stride(0), scale=scale, window=window, tanh_scale=penalty.tanh_scale,
            PENALTY=penalty_code(penalty.kind), SHARED=gate.shared, TOKENS=TOKENS, FEATURES=FEATURES, num_warps=4,
        )  # fmt: skip
    return parts.sum(dim=0)


def tile_width(n_tokens: int, K: int, n_features: int, itemsize: int) -> int:
    """Features in one tile: a multiple of 128, near `TILE_BYTES`."""
    return min(n_features, max(128, TILE_BYTES // (n_tokens * K * itemsize) // 128 * 128))
