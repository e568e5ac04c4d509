"""The thresholds' straight-through gradient on a GPU: both products, h and <g, W_dec>, tile by tile in registers.

One program holds h of a tile of tokens and features, then goes through the snapshots: <residual, W_dec[:, k]> of the
same tile, the window, and the sum over the tokens. Nothing of shape (B, F) is stored. On a share of the tokens this is
the mode "sampled".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscoder.gate import Gate
from crosscoder.kernels.device import activity_and_slope, penalty_code
from crosscoder.penalty import Penalty

TILES = {torch.float32: (128, 32, 16, 8), torch.bfloat16: (64, 64, 32, 8)}
"""(tokens, features, depth, warps) by the weights' dtype: the largest tiles that no GPU spills registers for."""


@triton.jit
def threshold_tiles(
    x_ptr, residual_ptr, tokens_ptr, W_enc_ptr, W_dec_ptr, b_enc_ptr, norms_ptr, theta_ptr, weight_ptr, out_ptr,
    n_tokens, F, K, D, scale, window, tanh_scale,
    PENALTY: tl.constexpr, SHARED: tl.constexpr, SUBSET: tl.constexpr, BF16: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[tile of tokens, f]: the tile's part of dlog_theta. BF16: products of bf16 numbers, else of float32."""
    # Tiles of tokens next to each other: they share the rows of the weights while these are in the cache.
    tiles = tl.cdiv(n_tokens, TOKENS)
    tile = tl.program_id(0) % tiles
    row = tile * TOKENS + tl.arange(0, TOKENS)
    in_batch = row < n_tokens
    token = row
    if SUBSET:
        token = tl.load(tokens_ptr + row, mask=in_batch, other=0)
    feature = tl.program_id(0) // tiles * FEATURES + tl.arange(0, FEATURES)
    in_model = feature < F
    depth = tl.arange(0, DEPTH)
    n = K * D
    x_row = x_ptr + token.to(tl.int64)[:, None] * n
    r_row = residual_ptr + token.to(tl.int64)[:, None] * n
    e_row = W_enc_ptr + feature.to(tl.int64)[None, :] * n
    d_row = W_dec_ptr + feature.to(tl.int64)[None, :] * n
    h = tl.zeros([TOKENS, FEATURES], tl.float32)
    for start in range(0, n, DEPTH):
        i = start + depth
        x = tl.load(x_row + i[None, :], mask=in_batch[:, None] & (i < n)[None, :], other=0)
        w = tl.load(e_row + i[:, None], mask=in_model[None, :] & (i < n)[:, None], other=0)
        if BF16:
            h = tl.dot(x.to(tl.bfloat16), w.to(tl.bfloat16), h)
        else:
            h = tl.dot(x.to(tl.float32), w.to(tl.float32), h, input_precision="tf32x3")
    h += tl.load(b_enc_ptr + feature, mask=in_model, other=0)[None, :]
    theta = tl.load(theta_ptr + feature, mask=in_model, other=0)
    weight = tl.load(weight_ptr + feature, mask=in_model, other=0)
    candidate = (h > 0) & in_batch[:, None] & in_model[None, :]
    total = tl.zeros([FEATURES], tl.float32)
    for k in range(K):
        dot = tl.zeros([TOKENS, FEATURES], tl.float32)
        for start in range(0, D, DEPTH):
            i = start + depth
            at = k * D + i
            r = tl.load(r_row + at[None, :], mask=in_batch[:, None] & (i < D)[None, :], other=0)
            w = tl.load(d_row + at[:, None], mask=in_model[None, :] & (i < D)[:, None], other=0)
            if BF16:
                dot = tl.dot(r.to(tl.bfloat16), w.to(tl.bfloat16), dot)
            else:
                dot = tl.dot(r.to(tl.float32), w.to(tl.float32), dot, input_precision="tf32x3")
        norm = tl.load(norms_ptr + feature.to(tl.int64) * K + k, mask=in_model, other=0)
        unit = norm
        if SHARED:
            unit = tl.full([FEATURES], 1.0, tl.float32)
        strength = h * unit[None, :]
        inside = candidate & (tl.abs(strength - theta[None, :]) < window / 2) & (unit > 0)[None, :]
        f = tl.where(strength > theta[None, :], h, 0.0)
        _, slope = activity_and_slope(tl.maximum(f, 0.0) * norm[None, :], tanh_scale, PENALTY)
        df = dot * scale + (weight * norm)[None, :] * slope
        factor = -theta * theta / (window * tl.where(unit > 0, unit, 1.0))
        total += tl.sum(tl.where(inside, df, 0.0), axis=0) * factor
    tl.store(out_ptr + tile * F + feature, total, mask=in_model)


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
) -> Tensor:
    """dlog_theta (F,) float32, summed over all tokens or over `tokens` (n,) int64.

    df = `scale` <residual, W_dec> + `weight_F` n * the penalty's slope. Weights in float32 are multiplied as such
    (three tf32 products), weights in bf16 as bf16. A pair whose decoder norm is exactly 0 adds nothing.
    """
    n_tokens = len(x_BKD) if tokens is None else len(tokens)
    F, K, D = W_enc_FKD.shape
    if not n_tokens:
        return theta_F.new_zeros(F)
    tile_tokens, tile_features, depth, warps = TILES[W_enc_FKD.dtype]
    tiles = triton.cdiv(n_tokens, tile_tokens)
    parts = theta_F.new_empty(tiles, F, dtype=torch.float32)
    threshold_tiles[(triton.cdiv(F, tile_features) * tiles,)](
        x_ptr=x_BKD, residual_ptr=residual_BKD, tokens_ptr=parts if tokens is None else tokens, W_enc_ptr=W_enc_FKD,
        W_dec_ptr=W_dec_FKD, b_enc_ptr=b_enc_F, norms_ptr=norms_FK, theta_ptr=theta_F, weight_ptr=weight_F,
        out_ptr=parts, n_tokens=n_tokens, F=F, K=K, D=D, scale=scale, window=window, tanh_scale=penalty.tanh_scale,
        PENALTY=penalty_code(penalty.kind), SHARED=gate.shared, SUBSET=tokens is not None,
        BF16=W_enc_FKD.dtype == torch.bfloat16, TOKENS=tile_tokens, FEATURES=tile_features, DEPTH=depth,
        num_warps=warps,
    )  # fmt: skip
    return parts.sum(dim=0)
