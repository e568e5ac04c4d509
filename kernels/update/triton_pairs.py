"""Everything that a pair or a feature has one number of, on a GPU: one program a feature turns <residual, W_dec> of its
pairs into dh, the penalty's and the norms' gradients, and the biases' and thresholds'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.device import activity_and_slope, penalty_code, power_of_two
from crosscoder.kernels.transpose.reference import FeatureOrder
from crosscoder.penalty import LossSettings, Penalty


@triton.jit
def pair_gradients(
    offsets_ptr, order_ptr, values_ptr, gates_ptr, dots_ptr, norms_ptr, theta_ptr, score_sums_ptr,
    dh_ptr, out_values_ptr, out_gates_ptr, p_ptr, pull_ptr, db_enc_ptr, dlog_theta_ptr, fired_ptr, gap_ptr,
    K, n_parts, n_tokens, terms, coefficient, frequency_scale, tanh_scale, preactivation, window,
    PENALTY: tl.constexpr, NARROW: tl.constexpr, SHARED: tl.constexpr, PREACTIVATION: tl.constexpr,
    PAIRS: tl.constexpr, SNAPSHOTS: tl.constexpr,
):  # fmt: skip
    """One feature: p, dl/dn / n ("pull", times W_dec it is the penalty's part of dW_dec), dh of its pairs, db_enc, the
    pairs' part of dlog_theta, tokens on which it fired, and sum_b relu(theta - h).

    dh, and with it values and gates, is written feature by feature.
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
        tl.store(out_values_ptr + place, value, mask=valid)
        tl.store(out_gates_ptr + place, gates, mask=valid)
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
    values_N: Tensor
    gates_N: Tensor
    """The code's values and gates in that order."""
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
    dh_N, values_N, gates_N = torch.zeros_like(code.values), torch.zeros_like(code.values), torch.zeros_like(code.gates)
    p_F, db_enc_F, dlog_F, pull_FK = new(F), new(F), new(F), new(F, K)
    fired_F = code.features.new_empty(F)
    preactivation = settings.preactivation_coefficient
    gap_F = new(F) if preactivation else None
    terms = float(max(1, code.n_tokens * K))
    pair_gradients[(F,)](
        offsets_ptr=order.feature_offsets, order_ptr=order.order, values_ptr=code.values, gates_ptr=code.gates,
        dots_ptr=dots_NPK, norms_ptr=norms_FK, theta_ptr=theta_F,
        score_sums_ptr=p_F if score_sums_F is None else score_sums_F, dh_ptr=dh_N,
        out_values_ptr=values_N, out_gates_ptr=gates_N, p_ptr=p_F, pull_ptr=pull_FK,
        db_enc_ptr=db_enc_F, dlog_theta_ptr=dlog_F, fired_ptr=fired_F, gap_ptr=p_F if gap_F is None else gap_F,
        K=K, n_parts=dots_NPK.shape[1], n_tokens=code.n_tokens, terms=terms,
        coefficient=settings.sparsity_coefficient, frequency_scale=penalty.frequency_scale,
        tanh_scale=penalty.tanh_scale, preactivation=preactivation, window=gate.window,
        PENALTY=penalty_code(penalty.kind), NARROW=gate.window > 0, SHARED=gate.shared,
        PREACTIVATION=preactivation > 0, PAIRS=pairs_at_once(K), SNAPSHOTS=power_of_two(K), num_warps=1,
    )  # fmt: skip
    lift_F = norms_FK.sum(dim=1) * (preactivation / terms) if preactivation else None
    return PairGradients(dh_N, values_N, gates_N, p_F, pull_FK, db_enc_F, dlog_F, fired_F, gap_F, lift_F)


def pairs_at_once(K: int) -> int:
    """Pairs that one warp of `pair_gradients` looks at together."""
    return max(4, min(32, 128 // power_of_two(K)))
