"""From the pairs to the updated weights on a GPU, feature by feature.

`pair_gradients`: one program a feature turns <residual, W_dec> of its pairs into dh and everything that is one number a
feature. `update_rows`: one program a (feature, snapshot, slice of D) sums dW_enc and dW_dec of its rows in registers
and takes the Adam step on them at once; the snapshot is the slowest axis of the grid, so that x[:, k] and g[:, k] stay
in the cache while all features gather from them. No (F, K, D) gradient exists, except where it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.device import (
    Slices,
    activity_and_slope,
    penalty_code,
    power_of_two,
    random_bits,
    random_key,
)
from crosscoder.kernels.encode.triton import SCALE
from crosscoder.kernels.transpose.reference import FeatureOrder
from crosscoder.kernels.update.reference import BETA1, BETA2, EPSILON
from crosscoder.penalty import LossSettings, Penalty

PAIRS = 4
NORMS, GRADIENT, ADAM = 0, 1, 2
"""What `update_rows` does with a row's gradient: its square, writing it, or an Adam step."""


# ------------------------------------------------------------------------------------------------- the pairs


@triton.jit
def pair_gradients(
    offsets_ptr, order_ptr, values_ptr, gates_ptr, dots_ptr, norms_ptr, theta_ptr, score_sums_ptr,
    dh_ptr, p_ptr, pull_ptr, db_enc_ptr, dlog_theta_ptr, fired_ptr, gap_ptr,
    K, n_parts, n_tokens, terms, coefficient, frequency_scale, tanh_scale, preactivation, window,
    PENALTY: tl.constexpr, NARROW: tl.constexpr, SHARED: tl.constexpr, PREACTIVATION: tl.constexpr,
    PAIRS: tl.constexpr, SNAPSHOTS: tl.constexpr,
):  # fmt: skip
    """One feature: p, dl/dn / n ("pull", times W_dec it is the penalty's part of dW_dec), dh of its pairs, db_enc, the
    pairs' part of dlog_theta, tokens on which it fired, and sum_b relu(theta - h).

    dh is written feature by feature.
    """
    feature = tl.program_id(0)
    start = tl.load(offsets_ptr + feature).to(tl.int32)
    end = tl.load(offsets_ptr + feature + 1).to(tl.int32)
    k = tl.arange(0, SNAPSHOTS)
    norms = tl.load(norms_ptr + feature.to(tl.int64) * K + k, mask=k < K, other=0)
    theta = tl.load(theta_ptr + feature)
    activity = tl.zeros([SNAPSHOTS], tl.float32)
    fired = 0
    for i in range(start, end, PAIRS):
        place = i + tl.arange(0, PAIRS)
        pair = tl.load(order_ptr + place, mask=place < end, other=0)
        gates = tl.load(gates_ptr + pair, mask=place < end, other=0)
        value = tl.load(values_ptr + pair, mask=place < end, other=0)
        is_open = ((gates[:, None] >> k[None, :]) & 1) != 0
        z = tl.where(is_open, value[:, None] * norms[None, :], 0.0)
        t, _ = activity_and_slope(z, tanh_scale, PENALTY)
        activity += tl.sum(t, axis=0)
        fired += tl.sum((gates != 0).to(tl.int32), axis=0)
    p = tl.sum(activity, axis=0) / terms
    weight = coefficient / terms
    if PENALTY == 0:
        weight = weight * (1 + 2 * p / frequency_scale)
    slope_at_zero = 1.0
    if PENALTY != 2:
        slope_at_zero = tanh_scale
    norm_sum = tl.sum(norms, axis=0)
    lift = preactivation / terms * norm_sum
    pull = tl.zeros([SNAPSHOTS], tl.float32)
    db_enc = 0.0
    dlog_theta = 0.0
    above_sum = 0.0
    n_above = 0
    for i in range(start, end, PAIRS):
        place = i + tl.arange(0, PAIRS)
        valid = place < end
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        gates = tl.load(gates_ptr + pair, mask=valid, other=0)
        value = tl.load(values_ptr + pair, mask=valid, other=0)
        is_open = ((gates[:, None] >> k[None, :]) & 1) != 0
        here = valid[:, None] & (k < K)[None, :]
        dot = tl.zeros([PAIRS, SNAPSHOTS], tl.float32)
        for part in range(n_parts):
            dot += tl.load(dots_ptr + (pair[:, None] * n_parts + part) * K + k[None, :], mask=here, other=0)
        f = tl.where(is_open, value[:, None], 0.0)
        _, slope = activity_and_slope(f * norms[None, :], tanh_scale, PENALTY)
        df = dot * (2 / terms) + weight * norms[None, :] * slope
        dh = tl.sum(tl.where(is_open, df, 0.0), axis=1)
        pull += tl.sum(f * slope, axis=0)
        if NARROW:
            unit = norms
            if SHARED:
                unit = tl.full([SNAPSHOTS], 1.0, tl.float32)
            distance = tl.abs(value[:, None] * unit[None, :] - theta)
            inside = here & (distance < window / 2) & (value > 0)[:, None] & (unit > 0)[None, :]
            closed = dot * (2 / terms) + weight * norms[None, :] * slope_at_zero
            factor = -theta * theta / (window * tl.where(unit > 0, unit, 1.0))
            share = tl.where(inside, tl.where(is_open, df, closed) * factor[None, :], 0.0)
            dlog_theta += tl.sum(tl.sum(share, axis=1), axis=0)
        if PREACTIVATION:
            above = valid & (value >= theta)
            dh += tl.where(above, lift, 0.0)
            above_sum += tl.sum(tl.where(above, theta - value, 0.0), axis=0)
            n_above += tl.sum(above.to(tl.int32), axis=0)
        tl.store(dh_ptr + place, dh, mask=valid)
        db_enc += tl.sum(tl.where(valid, dh, 0.0), axis=0)
    pull = pull * weight
    if PREACTIVATION:
        gap = n_tokens * theta - tl.load(score_sums_ptr + feature) - above_sum
        gap = tl.maximum(gap, 0.0)
        db_enc -= lift * n_tokens
        dlog_theta += lift * theta * (n_tokens - n_above)
        pull += preactivation / terms * gap
        tl.store(gap_ptr + feature, gap * norm_sum)
    pull = tl.where(norms > 0, pull / tl.where(norms > 0, norms, 1.0), 0.0)
    tl.store(pull_ptr + feature.to(tl.int64) * K + k, pull, mask=k < K)
    tl.store(p_ptr + feature, p)
    tl.store(db_enc_ptr + feature, db_enc)
    tl.store(dlog_theta_ptr + feature, dlog_theta)
    tl.store(fired_ptr + feature, fired)


@dataclass(frozen=True)
class PairGradients:
    """What the pairs give, feature by feature."""

    dh_N: Tensor
    """dl/dh of each pair, in the order of the features."""
    p_F: Tensor
    pull_FK: Tensor
    """dl/dn / n: times W_dec the norms' part of dW_dec."""
    db_enc_F: Tensor
    dlog_threshold_F: Tensor
    """The pairs' part: "narrow", and all of `l_pre`."""
    fired_F: Tensor
    """(F,) int32: tokens with an open gate."""
    gap_F: Tensor | None
    """sum_k n_fk sum_b relu(theta - h), with `l_pre`."""
    lift_F: Tensor | None
    """lambda_P / (B K) sum_k n_fk: all tokens' dh is this much lower, with `l_pre`."""


def gradients_of_pairs(
    code: SparseCode,
    order: FeatureOrder,
    dots_NPK: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    score_sums_F: Tensor | None,
    penalty: Penalty,
    gate: Gate,
    settings: LossSettings,
) -> PairGradients:
    """All that is N numbers or F. `score_sums_F` is sum_b h_b,f over all tokens, with `l_pre`."""
    F, K = norms_FK.shape
    new = norms_FK.new_empty
    # Zeros: places after the last pair are read by no one, but a buffer of unknown numbers is a trap.
    dh_N = torch.zeros_like(code.values)
    p_F, db_enc_F, dlog_F, pull_FK = new(F), new(F), new(F), new(F, K)
    fired_F = code.features.new_empty(F)
    preactivation = settings.preactivation_coefficient
    gap_F = new(F) if preactivation else None
    terms = float(max(1, code.n_tokens * K))
    pair_gradients[(F,)](
        offsets_ptr=order.feature_offsets, order_ptr=order.order, values_ptr=code.values, gates_ptr=code.gates,
        dots_ptr=dots_NPK, norms_ptr=norms_FK, theta_ptr=theta_F,
        score_sums_ptr=p_F if score_sums_F is None else score_sums_F, dh_ptr=dh_N, p_ptr=p_F, pull_ptr=pull_FK,
        db_enc_ptr=db_enc_F, dlog_theta_ptr=dlog_F, fired_ptr=fired_F, gap_ptr=p_F if gap_F is None else gap_F,
        K=K, n_parts=dots_NPK.shape[1], n_tokens=code.n_tokens, terms=terms,
        coefficient=settings.sparsity_coefficient, frequency_scale=penalty.frequency_scale,
        tanh_scale=penalty.tanh_scale, preactivation=preactivation, window=gate.window,
        PENALTY=penalty_code(penalty.kind), NARROW=gate.window > 0, SHARED=gate.shared,
        PREACTIVATION=preactivation > 0, PAIRS=pairs_at_once(K), SNAPSHOTS=power_of_two(K), num_warps=1,
    )  # fmt: skip
    lift_F = norms_FK.sum(dim=1) * (preactivation / terms) if preactivation else None
    return PairGradients(dh_N, p_F, pull_FK, db_enc_F, dlog_F, fired_F, gap_F, lift_F)


def pairs_at_once(K: int) -> int:
    """Pairs that one warp of `pair_gradients` looks at together."""
    return max(4, min(32, 128 // power_of_two(K)))


# -------------------------------------------------------------------------------------------------- the rows


@triton.jit
def decayed(beta_log2, elapsed):
    """beta^elapsed."""
    return tl.exp2(beta_log2 * elapsed)


@triton.jit
def block_scale(magnitude, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The largest of each block of `LANES` neighbours, for each of its elements."""
    top = tl.max(tl.reshape(magnitude, [ROWS, LANES]), axis=1)
    return top, tl.reshape(tl.broadcast_to(top[:, None], [ROWS, LANES]), [ROWS * LANES])


@triton.jit
def spread(scale_ptr, d, inside, LANES: tl.constexpr):
    return tl.load(scale_ptr + d // LANES, mask=inside, other=0)


@triton.jit
def square_code(size, scale, noise, LEVELS: tl.constexpr):
    """Whole q in [0, LEVELS] with scale q^2 / LEVELS^2 next to `size`, above or below, and `size` on average."""
    x = (LEVELS * LEVELS) * tl.where(scale > 0, size / tl.where(scale > 0, scale, 1.0), 0.0)
    q = tl.floor(tl.sqrt(x))
    gap = 2 * q + 1  # from one square to the next
    return tl.minimum(tl.where(x - q * q + noise * gap >= gap, q + 1, q), LEVELS)


@triton.jit
def adam_row(
    w_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, row, D, blocks, d, inside, part, g, elapsed, step_size, v_root,
    log2_beta1, log2_beta2, rest1, rest2, epsilon, key,
    EIGHT_BIT: tl.constexpr, BF16: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """An Adam step on one slice of one row, in place. Returns the new weights as stored, in float32."""
    ROWS: tl.constexpr = BLOCK // LANES
    at = row * D + d
    if EIGHT_BIT:
        q = tl.load(m_ptr + at, mask=inside, other=0).to(tl.float32)
        m = spread(m_scale_ptr + row * blocks, d, inside, LANES) * q * tl.abs(q) * (1.0 / 16129)
        q = tl.load(v_ptr + at, mask=inside, other=0).to(tl.float32)
        v = spread(v_scale_ptr + row * blocks, d, inside, LANES) * (q * q) * (1.0 / 65025)
        v = v * v
    else:
        m = tl.load(m_ptr + at, mask=inside, other=0)
        v = tl.load(v_ptr + at, mask=inside, other=0)
    m = decayed(log2_beta1, elapsed) * m + rest1 * g
    v = decayed(log2_beta2, elapsed) * v + rest2 * (g * g)
    w = tl.load(w_ptr + at, mask=inside, other=0).to(tl.float32)
    root = tl.sqrt(v)
    w = w - step_size * m / (root / v_root + epsilon)
    bits = random_bits(key, d)
    if BF16:
        # Stochastic rounding: 16 random bits below the last place kept, then cut off.
        rounded = (w.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        w = rounded.to(tl.float32, bitcast=True)
        tl.store(w_ptr + at, w.to(tl.bfloat16), mask=inside)
    else:
        tl.store(w_ptr + at, w, mask=inside)
    if EIGHT_BIT:
        noise = (bits >> 16).to(tl.float32) * (1.0 / 65536)
        block = part * ROWS + tl.arange(0, ROWS)
        top, scale = block_scale(tl.abs(m), ROWS, LANES)
        tl.store(m_scale_ptr + row * blocks + block, top, mask=block < blocks)
        size = square_code(tl.abs(m), scale, noise, 127)
        tl.store(m_ptr + at, tl.where(m < 0, -size, size).to(tl.int8), mask=inside)
        noise = (random_bits(key + 1, d) >> 16).to(tl.float32) * (1.0 / 65536)
        top, scale = block_scale(root, ROWS, LANES)
        tl.store(v_scale_ptr + row * blocks + block, top, mask=block < blocks)
        size = square_code(root, scale, noise, 255)
        size = tl.where(root > 0, tl.maximum(size, 1.0), size)  # one that is not 0 never becomes 0
        tl.store(v_ptr + at, size.to(tl.int32).to(tl.uint8), mask=inside)
    else:
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
    return tl.where(inside, w, 0.0)


@triton.jit(do_not_specialize=["seed", "step", "first"])
def update_rows(
    offsets_ptr, tokens_ptr, order_ptr, dh_ptr, values_ptr, gates_ptr, x_ptr, residual_ptr,
    dense_enc_ptr, dense_dec_ptr, first, pull_ptr, lift_ptr, x_sum_ptr, fired_ptr, last_step_ptr, allowed_ptr, clip_ptr,
    W_enc_ptr, enc_m_ptr, enc_v_ptr, enc_m_scale_ptr, enc_v_scale_ptr,
    W_dec_ptr, dec_m_ptr, dec_v_ptr, dec_m_scale_ptr, dec_v_scale_ptr,
    shadow_ptr, fourth_ptr, squares_ptr,
    K, D, n_parts, blocks, scale, step_size, v_root, log2_beta1, log2_beta2, rest1, rest2, epsilon, step, seed,
    WHAT: tl.constexpr, DENSE: tl.constexpr, SKIP: tl.constexpr, LAZY: tl.constexpr, LIFT: tl.constexpr,
    CLIP: tl.constexpr,
    EIGHT_BIT: tl.constexpr, BF16: tl.constexpr, SHADOW: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One slice of the rows W_enc[f, k] and W_dec[f, k].

    dW_enc = sum over the feature's pairs of dh x (with LIFT less lift_f x_sum), dW_dec = scale * sum of f residual over
    the open gates + pull W_dec; with DENSE they are read, for features from `first` on. WHAT 0: squares[f, k, slice] =
    their sum of squares. 1: they are written to the dense arrays. 2: times clip, an Adam step; fourth and squares
    [f, k, slice] = the new rows' sum of W_enc^4 and W_dec^2, and W_enc in bf16 to the shadow. SKIP: features that did
    not fire are left alone. LAZY: the moments decay by the steps since the row's last one, not by one.
    """
    if tl.load(allowed_ptr) == 0:
        return
    feature = tl.program_id(0) + first
    k = tl.program_id(1) // n_parts
    part = tl.program_id(1) % n_parts
    row = feature.to(tl.int64) * K + k
    if SKIP:
        fired = tl.load(fired_ptr + feature)
        if fired == 0:
            if WHAT == 0:
                tl.store(squares_ptr + row * n_parts + part, 0.0)
            return
    d = part * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    enc = tl.zeros([BLOCK], tl.float32)
    dec = tl.zeros([BLOCK], tl.float32)
    if DENSE:
        local = (tl.program_id(0).to(tl.int64) * K + k) * D
        enc = tl.load(dense_enc_ptr + local + d, mask=inside, other=0)
        dec = tl.load(dense_dec_ptr + local + d, mask=inside, other=0)
    else:
        start = tl.load(offsets_ptr + feature).to(tl.int32)
        end = tl.load(offsets_ptr + feature + 1).to(tl.int32)
        for i in range(start, end, PAIRS):
            place = i + tl.arange(0, PAIRS)
            valid = place < end
            token = tl.load(tokens_ptr + place, mask=valid, other=0).to(tl.int64)
            at = (token * K + k)[:, None] * D + d[None, :]
            dh = tl.load(dh_ptr + place, mask=valid, other=0)
            x = tl.load(x_ptr + at, mask=valid[:, None] & inside[None, :], other=0).to(tl.float32)
            enc += tl.sum(dh[:, None] * x, axis=0)
            pair = tl.load(order_ptr + place, mask=valid, other=0)
            gate = ((tl.load(gates_ptr + pair, mask=valid, other=0) >> k) & 1) != 0
            f = tl.where(gate, tl.load(values_ptr + pair, mask=gate, other=0), 0.0)
            g = tl.load(residual_ptr + at, mask=gate[:, None] & inside[None, :], other=0).to(tl.float32)
            dec += tl.sum(f[:, None] * g, axis=0)
        dec = dec * scale
        if LIFT:
            x_sum = tl.load(x_sum_ptr + k * D + d, mask=inside, other=0)
            enc -= tl.load(lift_ptr + feature) * x_sum
    if not DENSE:
        w = tl.load(W_dec_ptr + row * D + d, mask=inside, other=0).to(tl.float32)
        dec += tl.load(pull_ptr + row) * w
    if WHAT == 1:
        tl.store(dense_enc_ptr + row * D + d, enc, mask=inside)
        tl.store(dense_dec_ptr + row * D + d, dec, mask=inside)
    else:
        if WHAT == 0:
            enc = tl.where(inside, enc, 0.0)
            dec = tl.where(inside, dec, 0.0)
            tl.store(squares_ptr + row * n_parts + part, tl.sum(enc * enc + dec * dec, axis=0))
        else:
            if CLIP:
                clip = tl.load(clip_ptr)
                enc = enc * clip
                dec = dec * clip
            elapsed = 1.0
            if LAZY:
                elapsed = (step - tl.load(last_step_ptr + feature)).to(tl.float32)
            w = adam_row(
                W_enc_ptr, enc_m_ptr, enc_v_ptr, enc_m_scale_ptr, enc_v_scale_ptr, row, D, blocks, d, inside, part,
                enc, elapsed, step_size, v_root, log2_beta1, log2_beta2, rest1, rest2, epsilon,
                random_key(seed, row, 0), EIGHT_BIT, BF16, BLOCK, LANES,
            )  # fmt: skip
            if SHADOW:
                tl.store(shadow_ptr + row * D + d, w.to(tl.bfloat16), mask=inside)
            w = w * SCALE
            tl.store(fourth_ptr + row * n_parts + part, tl.sum((w * w) * (w * w), axis=0))
            w = adam_row(
                W_dec_ptr, dec_m_ptr, dec_v_ptr, dec_m_scale_ptr, dec_v_scale_ptr, row, D, blocks, d, inside, part,
                dec, elapsed, step_size, v_root, log2_beta1, log2_beta2, rest1, rest2, epsilon,
                random_key(seed, row, 2), EIGHT_BIT, BF16, BLOCK, LANES,
            )  # fmt: skip
            tl.store(squares_ptr + row * n_parts + part, tl.sum(w * w, axis=0))


@triton.jit
def row_statistics(
    W_enc_ptr, W_dec_ptr, shadow_ptr, fourth_ptr, squares_ptr, K, D, n_parts, SHADOW: tl.constexpr, BLOCK: tl.constexpr
):
    """What `update_rows` derives from the rows it writes, from rows that somebody else wrote."""
    k, part = tl.program_id(1) // n_parts, tl.program_id(1) % n_parts
    row = tl.program_id(0).to(tl.int64) * K + k
    d = part * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(W_enc_ptr + row * D + d, mask=d < D, other=0).to(tl.float32)
    if SHADOW:
        tl.store(shadow_ptr + row * D + d, w.to(tl.bfloat16), mask=d < D)
    w = w * SCALE
    tl.store(fourth_ptr + row * n_parts + part, tl.sum((w * w) * (w * w), axis=0))
    w = tl.load(W_dec_ptr + row * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(squares_ptr + row * n_parts + part, tl.sum(w * w, axis=0))


@triton.jit(do_not_specialize=["seed"])
def limit_rows(
    W_dec_ptr, squares_ptr, allowed_ptr, limit, K, D, n_parts, seed,
    BF16: tl.constexpr, SNAPSHOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scales a feature's decoder rows down together where its largest norm is over `limit`; one program a feature."""
    if tl.load(allowed_ptr) == 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SNAPSHOTS)
    total = tl.zeros([SNAPSHOTS], tl.float32)
    for part in range(n_parts):
        total += tl.load(squares_ptr + (feature * K + k) * n_parts + part, mask=k < K, other=0)
    largest = tl.sqrt(tl.max(total, axis=0))
    if largest > limit:
        factor = limit / largest
        for one in range(K):
            row = feature * K + one
            key = random_key(seed, row, 4)
            for part in range(n_parts):
                d = part * BLOCK + tl.arange(0, BLOCK)
                w = tl.load(W_dec_ptr + row * D + d, mask=d < D, other=0).to(tl.float32) * factor
                if BF16:
                    rounded = w.to(tl.uint32, bitcast=True) + (random_bits(key, d) & 0xFFFF)
                    w = (rounded & 0xFFFF0000).to(tl.float32, bitcast=True)
                    tl.store(W_dec_ptr + row * D + d, w.to(tl.bfloat16), mask=d < D)
                else:
                    tl.store(W_dec_ptr + row * D + d, w, mask=d < D)
                tl.store(squares_ptr + row * n_parts + part, tl.sum(w * w, axis=0))


@triton.jit(do_not_specialize=["step"])
def adam_vector(
    w_ptr, m_ptr, v_ptr, g_ptr, fired_ptr, last_step_ptr, allowed_ptr, clip_ptr, n, step_size, v_root, log2_beta1,
    log2_beta2, rest1, rest2, epsilon, step,
    SKIP: tl.constexpr, LAZY: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An Adam step on a vector in float32; SKIP and LAZY as in `update_rows`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < n) & (tl.load(allowed_ptr) + 0 * i != 0)
    elapsed = tl.full([BLOCK], 1.0, tl.float32)
    if SKIP:
        inside = inside & (tl.load(fired_ptr + i, mask=inside, other=0) > 0)
    if LAZY:
        elapsed = (step - tl.load(last_step_ptr + i, mask=inside, other=0)).to(tl.float32)
    g = tl.load(g_ptr + i, mask=inside, other=0)
    if CLIP:
        g = g * tl.load(clip_ptr)
    m = tl.load(m_ptr + i, mask=inside, other=0) * decayed(log2_beta1, elapsed) + rest1 * g
    v = tl.load(v_ptr + i, mask=inside, other=0) * decayed(log2_beta2, elapsed)
    v += rest2 * (g * g)
    w = tl.load(w_ptr + i, mask=inside, other=0) - step_size * m / (tl.sqrt(v) / v_root + epsilon)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)
    tl.store(w_ptr + i, w, mask=inside)


@dataclass(frozen=True)
class AdamScalars:
    """The scalars of an Adam step: t = `step`, and the learning rate."""

    lr: float
    step: int

    def arguments(self) -> dict[str, float]:
        """By the names that the kernels have for them."""
        correction1 = 1 - BETA1**self.step
        correction2 = 1 - BETA2**self.step
        return {
            "step_size": self.lr / correction1, "v_root": math.sqrt(correction2), "log2_beta1": math.log2(BETA1),
            "log2_beta2": math.log2(BETA2), "rest1": 1 - BETA1, "rest2": 1 - BETA2, "epsilon": EPSILON,
        }  # fmt: skip


def row_layout(n_tokens: int, D: int, x_itemsize: int) -> Slices:
    """How `update_rows` cuts a row: x and the residual (float32) are gathered."""
    return Slices.of(D, n_tokens, x_itemsize + 4)
