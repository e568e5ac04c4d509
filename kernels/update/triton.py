"""From the pairs to the updated weights on a GPU, feature by feature: Adam on the rows, and on the vectors.

`update_rows`: one warp a (feature, snapshot, slice of D) sums dW_enc and dW_dec of its rows in registers and takes the
Adam step on them at once; the snapshot is the slowest axis of the grid, so that x[:, k] and g[:, k] stay in the cache
while all features gather from them. No (F, K, D) gradient exists, except where it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from crosscoder.kernels.device import (
    L2_SHARE,
    LANES,
    random_key,
    random_words,
)
from crosscoder.kernels.update.reference import BETA1, BETA2, EPSILON

PAIRS = 2
ROW_REGISTERS = 168
"""A thread of `update_rows` with 8-bit moments: with fewer, pointers are made anew for each block."""
NORMS, GRADIENT, ADAM = 0, 1, 2
"""What `update_rows` does with a row's gradient: its square, writing it, or an Adam step."""


@triton.jit
def decayed(beta_log2, elapsed):
    """beta^elapsed."""
    return tl.exp2(beta_log2 * elapsed)


@triton.jit
def spread(condition, LANES: tl.constexpr):
    """A condition as a mask (LANES,); Triton's interpreter takes no other broadcast of one for a mask."""
    return (tl.zeros([LANES], tl.int32) + condition.to(tl.int32)) != 0


@triton.jit
def largest(magnitude, LANES: tl.constexpr):
    """Of numbers that are not negative: in each thread as floats, then across the warp as whole numbers, whose order is
    the same and for which a GPU has an instruction."""
    own = tl.max(tl.reshape(magnitude, [LANES // 8, 8]), axis=1)
    return tl.max(own.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def inverse(top):
    """1 / `top`, or a large number where it is 0."""
    root = tl.rsqrt(tl.maximum(top, 1e-30))
    return root * root


@triton.jit
def root_code(square, noise, LEAST: tl.constexpr):
    """A number that rounds to q or q + 1, where q^2 <= `square` < (q + 1)^2, so that its square is `square` on average.

    With u = 1/2 + `noise` uniform in [0, 1) it is sqrt(square - u (1 - u)) + noise, which rounds to q + 1 exactly where
    square - q^2 is at least 1 - u of the gap of 2 q + 1 between the squares. Noise and result are in units of 2^-32,
    the square in units of 2^-64. At least `LEAST` (0 or 1) remains after rounding.
    """
    # u (1 - u) = 1/4 - noise^2. A hair above 1: with the lowest noise it must not become 1/2, which rounds to 0.
    square = square + (noise * noise - 4611686018427387904.0)
    return tl.sqrt(tl.maximum(square, LEAST * 18446761666007482368.0)) + noise


@triton.jit
def rounded(code):
    """int32 whose last byte is `code`, in units of 2^-32, rounded to the nearest whole number: the last bits of a float
    between 2^23 and 2^24."""
    return (code * 2.3283064365386963e-10 + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def adam_step(
    w, m, v, m_scale, v_scale, g, keep1, keep2, step_size, root_factor, rest1, rest2, epsilon, bits,
    EIGHT_BIT: tl.constexpr, BF16: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """An Adam step on a block of a row: the new w (float32), m, v, m_scale and v_scale, as they are stored.

    `keep1` and `keep2` take beta^elapsed to m and sqrt(v), of 8-bit moments from the codes' units to those of the
    gradient: these moments are added up as m / (1 - beta1) and sqrt(v / (1 - beta2)). One word of random bits an
    element: its lower 16 round w, all of it m and v, to which they matter least.
    """
    if EIGHT_BIT:
        q = m.to(tl.float32)
        m = (q * tl.abs(q)) * (m_scale * keep1) + g
        q = v.to(tl.float32)
        root = (q * q) * (v_scale * keep2)
        root = tl.sqrt(root * root + g * g)
    else:
        m = m * keep1 + rest1 * g
        v = v * (keep2 * keep2) + (rest2 * g) * g
        root = tl.sqrt(v)
    below = root * root_factor + epsilon
    w = w - (step_size * m) * tl.rsqrt(below * below)
    if BF16:
        # Stochastic rounding: 16 random bits below the last place kept, then cut off.
        w = ((w.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)
    if EIGHT_BIT:
        # Factors of 2^64, less a hair: the largest must not become one more than the largest code.
        noise = bits.to(tl.float32)
        top = largest(tl.abs(m), LANES)
        m_scale = top * rest1
        code = root_code(tl.abs(m * (inverse(top) * 2.9752634541243925e23)), noise, 0)  # 127^2
        sign = m.to(tl.int32, bitcast=True) & -2147483648
        code = ((code.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)
        m = rounded(code).to(tl.int8)
        top = largest(root, LANES)
        v_scale = top * rest2
        code = root_code(root * (inverse(top) * 1.1995046870293566e24), noise, 1)  # 255^2
        v = rounded(code).to(tl.uint8)
    return w, m, v, m_scale, v_scale


@triton.jit(do_not_specialize=["seed", "step", "first"])
def update_rows(
    offsets_ptr, tokens_ptr, dh_ptr, values_ptr, gates_ptr, x_ptr, residual_ptr,
    dense_enc_ptr, dense_dec_ptr, first, pull_ptr, lift_ptr, x_sum_ptr, fired_ptr, last_step_ptr, allowed_ptr, clip_ptr,
    W_enc_ptr, enc_m_ptr, enc_v_ptr, enc_m_scale_ptr, enc_v_scale_ptr,
    W_dec_ptr, dec_m_ptr, dec_v_ptr, dec_m_scale_ptr, dec_v_scale_ptr,
    shadow_ptr, fourth_ptr, squares_ptr,
    K, D, blocks, scale, step_size, root_factor, log2_beta1, log2_beta2, unit1, unit2, rest1, rest2, epsilon, step,
    seed,
    WHAT: tl.constexpr, DENSE: tl.constexpr, SKIP: tl.constexpr, LAZY: tl.constexpr, LIFT: tl.constexpr,
    CLIP: tl.constexpr, EIGHT_BIT: tl.constexpr, BF16: tl.constexpr, SHADOW: tl.constexpr, EVEN: tl.constexpr,
    PAIRS: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`SPAN` blocks of `LANES` neighbours of the rows W_enc[f, k] and W_dec[f, k], one after the other, by one warp.

    dW_enc = sum over the feature's pairs of dh x (with LIFT less lift_f x_sum), dW_dec = scale * sum of f residual over
    the open gates + pull W_dec; with DENSE they are read, for features from `first` on. WHAT 0: squares[f, k, block] =
    their sum of squares. 1: they are written to the dense arrays. 2: times clip, an Adam step; fourth and squares
    [f, k, block] = the new rows' sum of W_enc^4 and W_dec^2, and W_enc in bf16 to the shadow. SKIP: features that did
    not fire are left alone. LAZY: the moments decay by the steps since the row's last one, not by one. EVEN: blocks
    end where rows do. `dh`, `values` and `gates` are in the order of the features.
    """
    if tl.load(allowed_ptr) == 0:
        return
    # The features are the fastest axis of the grid, then the rest of the row, then the snapshots.
    first_block = tl.program_id(1) * SPAN
    local = tl.program_id(0)
    k = tl.program_id(2)
    feature = local + first
    row = feature.to(tl.int64) * K + k
    if SKIP:
        fired = tl.load(fired_ptr + feature)
        if fired == 0:
            if WHAT == 0:
                for block in range(first_block, tl.minimum(first_block + SPAN, blocks)):
                    tl.store(squares_ptr + row * blocks + block, 0.0)
            return
    if not DENSE:
        start = tl.load(offsets_ptr + feature).to(tl.int32)
        end = tl.load(offsets_ptr + feature + 1).to(tl.int32)
        pull = tl.load(pull_ptr + row)
    if WHAT == 2:
        elapsed = 1.0
        if LAZY:
            elapsed = (step - tl.load(last_step_ptr + feature)).to(tl.float32)
        keep1 = decayed(log2_beta1, elapsed) * unit1
        keep2 = decayed(log2_beta2, elapsed) * unit2
        key = random_key(seed, row, 0)
    for block in range(first_block, tl.minimum(first_block + SPAN, blocks)):
        d = block * LANES + tl.arange(0, LANES)
        inside = d < D
        if EVEN:
            inside = tl.full([LANES], True, tl.int1)
        at = row * D + d
        here = row * blocks + block
        # Everything of the row is asked for before the pairs are waited for.
        if WHAT == 2:
            w_enc = tl.load(W_enc_ptr + at, mask=inside, other=0)
            m_enc = tl.load(enc_m_ptr + at, mask=inside, other=0)
            v_enc = tl.load(enc_v_ptr + at, mask=inside, other=0)
            m_dec = tl.load(dec_m_ptr + at, mask=inside, other=0)
            v_dec = tl.load(dec_v_ptr + at, mask=inside, other=0)
            m_scale_enc, v_scale_enc, m_scale_dec, v_scale_dec = 0.0, 0.0, 0.0, 0.0
            if EIGHT_BIT:
                m_scale_enc = tl.load(enc_m_scale_ptr + here)
                v_scale_enc = tl.load(enc_v_scale_ptr + here)
                m_scale_dec = tl.load(dec_m_scale_ptr + here)
                v_scale_dec = tl.load(dec_v_scale_ptr + here)
        if WHAT == 2 or not DENSE:
            w_dec = tl.load(W_dec_ptr + at, mask=inside, other=0)
        if DENSE:
            source = (local.to(tl.int64) * K + k) * D
            enc = tl.load(dense_enc_ptr + source + d, mask=inside, other=0)
            dec = tl.load(dense_dec_ptr + source + d, mask=inside, other=0)
        else:
            enc = tl.zeros([LANES], tl.float32)
            dec = tl.zeros([LANES], tl.float32)
            for some in range(start, end, PAIRS):
                for i in tl.static_range(PAIRS):
                    place = some + i
                    valid = place < end
                    token = tl.load(tokens_ptr + place, mask=valid, other=0).to(tl.int64)
                    source = (token * K + k) * D
                    dh = tl.load(dh_ptr + place, mask=valid, other=0)
                    gate = ((tl.load(gates_ptr + place, mask=valid, other=0) >> k) & 1) != 0
                    f = tl.load(values_ptr + place, mask=gate, other=0)
                    x = tl.load(x_ptr + source + d, mask=inside & spread(valid, LANES), other=0)
                    g = tl.load(residual_ptr + source + d, mask=inside & spread(gate, LANES), other=0)
                    enc += dh * x.to(tl.float32)
                    dec += f * g
            if LIFT:
                x_sum = tl.load(x_sum_ptr + k * D + d, mask=inside, other=0)
                enc -= tl.load(lift_ptr + feature) * x_sum
            dec = dec * scale + pull * w_dec.to(tl.float32)
        if WHAT == 1:
            tl.store(dense_enc_ptr + at, enc, mask=inside)
            tl.store(dense_dec_ptr + at, dec, mask=inside)
        if WHAT == 0:
            tl.store(squares_ptr + here, tl.sum(tl.where(inside, enc * enc + dec * dec, 0.0), axis=0))
        if WHAT == 2:
            if CLIP:
                clip = tl.load(clip_ptr)
                enc = enc * clip
                dec = dec * clip
            bits_enc, bits_dec = random_words(key, d)
            w, m, v, m_scale, v_scale = adam_step(
                w_enc.to(tl.float32), m_enc, v_enc, m_scale_enc, v_scale_enc, enc, keep1, keep2, step_size,
                root_factor, rest1, rest2, epsilon, bits_enc, EIGHT_BIT, BF16, LANES,
            )  # fmt: skip
            tl.store(W_enc_ptr + at, w.to(W_enc_ptr.dtype.element_ty), mask=inside)
            tl.store(enc_m_ptr + at, m, mask=inside)
            tl.store(enc_v_ptr + at, v, mask=inside)
            if EIGHT_BIT:
                tl.store(enc_m_scale_ptr + here, m_scale)
                tl.store(enc_v_scale_ptr + here, v_scale)
            if SHADOW:
                tl.store(shadow_ptr + at, w.to(tl.bfloat16), mask=inside)
            w = tl.where(inside, w, 0.0)
            tl.store(fourth_ptr + here, tl.sum((w * w) * (w * w), axis=0))
            w, m, v, m_scale, v_scale = adam_step(
                w_dec.to(tl.float32), m_dec, v_dec, m_scale_dec, v_scale_dec, dec, keep1, keep2, step_size,
                root_factor, rest1, rest2, epsilon, bits_dec, EIGHT_BIT, BF16, LANES,
            )  # fmt: skip
            tl.store(W_dec_ptr + at, w.to(W_dec_ptr.dtype.element_ty), mask=inside)
            tl.store(dec_m_ptr + at, m, mask=inside)
            tl.store(dec_v_ptr + at, v, mask=inside)
            if EIGHT_BIT:
                tl.store(dec_m_scale_ptr + here, m_scale)
                tl.store(dec_v_scale_ptr + here, v_scale)
            w = tl.where(inside, w, 0.0)
            tl.store(squares_ptr + here, tl.sum(w * w, axis=0))


@triton.jit
def row_statistics(
    W_enc_ptr, W_dec_ptr, shadow_ptr, fourth_ptr, squares_ptr, D, blocks, SHADOW: tl.constexpr, LANES: tl.constexpr
):
    """What `update_rows` derives from the rows it writes, from rows that somebody else wrote; a program a block."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    d = block * LANES + tl.arange(0, LANES)
    w = tl.load(W_enc_ptr + row * D + d, mask=d < D, other=0).to(tl.float32)
    if SHADOW:
        tl.store(shadow_ptr + row * D + d, w.to(tl.bfloat16), mask=d < D)
    tl.store(fourth_ptr + row * blocks + block, tl.sum((w * w) * (w * w), axis=0))
    w = tl.load(W_dec_ptr + row * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(squares_ptr + row * blocks + block, tl.sum(w * w, axis=0))


@triton.jit(do_not_specialize=["seed"])
def limit_rows(
    W_dec_ptr, squares_ptr, allowed_ptr, limit, K, D, blocks, seed,
    BF16: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Scales a feature's decoder rows down together where its largest norm is over `limit`; one program a feature."""
    if tl.load(allowed_ptr) == 0:
        return
    feature = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, BLOCKS)
    most = 0.0
    for k in range(K):
        squares = tl.load(squares_ptr + (feature * K + k) * blocks + one, mask=one < blocks, other=0)
        most = tl.maximum(most, tl.sum(squares, axis=0))
    norm = tl.sqrt(most)
    if norm > limit:
        factor = limit / norm
        for k in range(K):
            row = feature * K + k
            key = random_key(seed, row, 4)
            for block in range(blocks):
                d = block * LANES + tl.arange(0, LANES)
                w = tl.load(W_dec_ptr + row * D + d, mask=d < D, other=0).to(tl.float32) * factor
                if BF16:
                    bits, _ = random_words(key, d)
                    w = ((w.to(tl.int32, bitcast=True) + (bits & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)
                tl.store(W_dec_ptr + row * D + d, w.to(W_dec_ptr.dtype.element_ty), mask=d < D)
                w = tl.where(d < D, w, 0.0)
                tl.store(squares_ptr + row * blocks + block, tl.sum(w * w, axis=0))


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

    def vector(self) -> dict[str, float]:
        """For `adam_vector`, by the names that it has for them."""
        return {
            "step_size": self.lr / (1 - BETA1**self.step), "v_root": math.sqrt(1 - BETA2**self.step),
            "log2_beta1": math.log2(BETA1), "log2_beta2": math.log2(BETA2), "rest1": 1 - BETA1, "rest2": 1 - BETA2,
            "epsilon": EPSILON,
        }  # fmt: skip

    def rows(self, *, eight_bit: bool) -> dict[str, float]:
        """For `update_rows`. 8-bit moments are in units of 1 - beta1 and of the root of 1 - beta2, codes beside."""
        found = self.vector()
        found |= {"root_factor": 1 / found.pop("v_root"), "log2_beta2": math.log2(BETA2) / 2, "unit1": 1, "unit2": 1}
        if eight_bit:
            unit1, unit2 = found["rest1"], math.sqrt(found["rest2"])
            found |= {
                "step_size": found["step_size"] * unit1, "root_factor": found["root_factor"] * unit2, "rest1": unit1,
                "rest2": unit2, "unit1": 1 / (127**2 * unit1), "unit2": 1 / (255**2 * unit2),
            }  # fmt: skip
        return {name: float(value) for name, value in found.items()}


def span(n_tokens: int, D: int, x_itemsize: int) -> int:
    """Blocks of a row that `update_rows` takes together: those of all tokens' x and residual (float32) stay in the
    cache while the features gather from them."""
    blocks = -(-D // LANES)
    return max(1, min(blocks, L2_SHARE // (max(1, n_tokens) * LANES * (x_itemsize + 4))))
