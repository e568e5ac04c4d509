"""Decode on a GPU, alone or fused with the residual and the pairs' gradients: one program a (token, snapshot).

x^_b,k needs only W_dec[:, k], and the residual of (b, k) is complete as soon as its own decode is. So one program reads
the rows of its open gates from memory, writes the residual, and reads the same rows again, from a cache, for
<residual, W_dec[f, k]>.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.kernels.device import power_of_two
from crosscoder.sharding import ONE_PROCESS, Sharding

PAIRS = 4


@triton.jit
def decode_rows(
    row_offsets_ptr, features_ptr, values_ptr, gates_ptr, W_dec_ptr, b_dec_ptr, x_ptr, out_ptr, squares_ptr, open_ptr,
    dots_ptr, K, D,
    RESIDUAL: tl.constexpr, RECONSTRUCT: tl.constexpr, DOTS: tl.constexpr, CLOSED: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slice of D of one (token, snapshot).

    RECONSTRUCT: out = x^, or x^ - x with RESIDUAL, and its sum of squares and number of open gates. Otherwise `out`
    is read. DOTS: dots[pair, slice, snapshot] = <out, W_dec[f, k]> for open gates, with CLOSED for all.
    """
    token, k, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_parts = tl.num_programs(2)
    start = tl.load(row_offsets_ptr + token).to(tl.int32)
    end = tl.load(row_offsets_ptr + token + 1).to(tl.int32)
    d = part * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    place = (token.to(tl.int64) * K + k) * D + d
    if RECONSTRUCT:
        total = tl.load(b_dec_ptr + k * D + d, mask=inside, other=0).to(tl.float32)
        n_open = 0
        for i in range(start, end, PAIRS):
            pair = i + tl.arange(0, PAIRS)
            valid = pair < end
            feature = tl.load(features_ptr + pair, mask=valid, other=0).to(tl.int64)
            gate = ((tl.load(gates_ptr + pair, mask=valid, other=0) >> k) & 1) != 0
            value = tl.where(gate, tl.load(values_ptr + pair, mask=valid, other=0), 0.0)
            rows = W_dec_ptr + (feature * K + k)[:, None] * D + d[None, :]
            w = tl.load(rows, mask=gate[:, None] & inside[None, :], other=0).to(tl.float32)
            total += tl.sum(value[:, None] * w, axis=0)
            n_open += tl.sum(gate.to(tl.int32), axis=0)
        if RESIDUAL:
            total -= tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
            total = tl.where(inside, total, 0.0)
            tl.store(squares_ptr + (token * K + k) * n_parts + part, tl.sum(total * total, axis=0))
            if part == 0:
                tl.store(open_ptr + token * K + k, n_open)
        tl.store(out_ptr + place, total, mask=inside)
    else:
        total = tl.load(out_ptr + place, mask=inside, other=0).to(tl.float32)
    if DOTS:
        for i in range(start, end, PAIRS):
            pair = i + tl.arange(0, PAIRS)
            valid = pair < end
            feature = tl.load(features_ptr + pair, mask=valid, other=0).to(tl.int64)
            wanted = valid
            if not CLOSED:
                wanted = valid & (((tl.load(gates_ptr + pair, mask=valid, other=0) >> k) & 1) != 0)
            rows = W_dec_ptr + (feature * K + k)[:, None] * D + d[None, :]
            w = tl.load(rows, mask=wanted[:, None] & inside[None, :], other=0).to(tl.float32)
            dot = tl.sum(w * total[None, :], axis=1)
            tl.store(dots_ptr + (pair.to(tl.int64) * n_parts + part) * K + k, dot, mask=valid)


def row_slices(D: int) -> tuple[int, int, int]:
    """(elements a slice, slices, warps) of one (token, snapshot): a token's rows fit the first-level cache."""
    block = min(max(power_of_two(D), 32), 2048)
    return block, -(-D // block), max(1, min(8, block // 256))


def decode(code: SparseCode, W_dec_FKD: Tensor, b_dec_KD: Tensor) -> Tensor:
    """x^ (B, K, D) float32: the reconstruction of every snapshot."""
    K, D = b_dec_KD.shape
    out_BKD = b_dec_KD.new_empty(code.n_tokens, K, D, dtype=torch.float32)
    _launch(code, W_dec_FKD, b_dec_KD, out_BKD)
    return out_BKD


@dataclass(frozen=True)
class Residual:
    """What the (token, snapshot)s give."""

    residual_BKD: Tensor
    """x^ - x, float32."""
    square_sum: Tensor
    """(): sum of its squares."""
    open_K: Tensor
    """(K,) int64: open gates at each snapshot."""
    dots_NPK: Tensor
    """(N, slices, K) float32: <residual, W_dec[f, k]>, to be summed over the slices of D; where a gate is closed
    0, or with `closed` the product all the same."""


def residual_and_dots(
    code: SparseCode,
    W_dec_FKD: Tensor,
    b_dec_KD: Tensor,
    x_BKD: Tensor,
    *,
    closed: bool = False,
    sharding: Sharding = ONE_PROCESS,
) -> Residual:
    """Decode | sum over processes | the residuals' squares and the pairs' products with them.

    Where all features are here it is one launch: the second half reads W_dec's rows from the cache.
    """
    B, K, D = x_BKD.shape
    _, parts, _ = row_slices(D)
    residual_BKD = torch.empty_like(x_BKD, dtype=torch.float32)
    squares = residual_BKD.new_empty(B, K, parts)
    opened = code.features.new_empty(B, K)
    dots = residual_BKD.new_empty(code.n_pairs, parts, K)
    if sharding.alone:
        _launch(code, W_dec_FKD, b_dec_KD, residual_BKD, x_BKD, squares, opened, dots, closed=closed)
        square_sum = squares.sum()
    else:
        bias_KD, target_BKD = b_dec_KD, x_BKD
        if not sharding.first:
            bias_KD, target_BKD = torch.zeros_like(b_dec_KD), torch.zeros_like(x_BKD)
        _launch(code, W_dec_FKD, bias_KD, residual_BKD, target_BKD, squares, opened)
        residual_BKD = sharding.sum(residual_BKD)
        _launch(code, W_dec_FKD, b_dec_KD, residual_BKD, dots=dots, closed=closed, reconstruct=False)
        square_sum = residual_BKD.square().sum()
    return Residual(residual_BKD, square_sum, opened.sum(dim=0, dtype=torch.int64), dots)


def _launch(
    code: SparseCode,
    W_dec_FKD: Tensor,
    b_dec_KD: Tensor,
    out_BKD: Tensor,
    x_BKD: Tensor | None = None,
    squares: Tensor | None = None,
    opened: Tensor | None = None,
    dots: Tensor | None = None,
    *,
    closed: bool = False,
    reconstruct: bool = True,
) -> None:
    """`decode_rows`, with a residual where `x_BKD` is given, and products where `dots` is."""
    B, K, D = out_BKD.shape
    block, parts, warps = row_slices(D)
    if not B:
        return
    unused = out_BKD
    decode_rows[(B, K, parts)](
        row_offsets_ptr=code.row_offsets, features_ptr=code.features, values_ptr=code.values, gates_ptr=code.gates,
        W_dec_ptr=W_dec_FKD, b_dec_ptr=b_dec_KD, x_ptr=unused if x_BKD is None else x_BKD, out_ptr=out_BKD,
        squares_ptr=unused if squares is None else squares, open_ptr=unused if opened is None else opened,
        dots_ptr=unused if dots is None else dots, K=K, D=D, RESIDUAL=x_BKD is not None, RECONSTRUCT=reconstruct,
        DOTS=dots is not None, CLOSED=closed, PAIRS=PAIRS, BLOCK=block, num_warps=warps,
    )  # fmt: skip
