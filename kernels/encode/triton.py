"""Encode on a GPU: one bf16 product, a bit for every pair that may be on, and h in float32 for those alone.

The product goes feature tile by feature tile through cuBLAS; a kernel reads each tile while it is in the cache and
leaves one bit a pair: may h be above the feature's cut? "May" is a statistical bound on the product's rounding,

    margin_bf = 8 sqrt(2/3) 2^-9 ||x_b||_4 ||W_f||_4 + 2^-8 |h|

eight standard deviations of the rounding of x and W to bf16 (independent errors, uniform within half a unit in the last
place; sum_i x_i^2 w_i^2 <= ||x||_4^2 ||W||_4^2), plus that of the result. h of the candidates is then computed in
float32 from the weights themselves, and the gates are decided from that: the code does not depend on the product's
rounding. Bits, not values, wait between the two, so no density overflows anything until pairs are listed.
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
from crosscoder.kernels.device import WORDS_PER_CHUNK, BitMatrix, Slices, bit_position
from crosscoder.precision import full_precision

MARGIN = 8 * math.sqrt(2 / 3) * 2**-9
TILE_BYTES = 16 * 2**20
"""Of one tile of the product, in bf16: it is read back from the second-level cache."""
SCALE = tl.constexpr(65536.0)
"""Keeps fourth powers of small numbers in float32's range."""
TILE_TOKENS, TILE_FEATURES = 128, 64
PAIRS = 8


@triton.jit
def token_norms(x_ptr, norms_ptr, n, BLOCK: tl.constexpr):
    """||x_b||_4 (B,); NaN for a token that is not finite, so that it has no candidates. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * n + i, mask=i < n, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        x = x / SCALE
        total += (x * x) * (x * x)
    norm = tl.sqrt(tl.sqrt(tl.sum(total, axis=0))) * SCALE
    top = tl.max(largest, axis=0)
    # The largest element bounds the norm from below where fourth powers underflow.
    norm = tl.where(top == float("inf"), float("nan"), tl.where(norm < top, top * 2.0, norm))
    tl.store(norms_ptr + token, norm)


@triton.jit
def mark_candidates(
    product_ptr, x_norms_ptr, w_norms_ptr, b_enc_ptr, cuts_ptr, scales_ptr, bits_ptr, B, F, first, width, stride,
    margin,
    BY_TOKEN: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Sets bit (token, feature) where h may be above its cut, for features `first` to `first + width`.

    The cut is the feature's, or with BY_TOKEN the token's, for h times the feature's scale.
    """
    word = tl.program_id(1) * (TOKENS // 32) + tl.arange(0, TOKENS // 32)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_tile, in_batch = column < width, token < B
    feature = first + column
    inside = in_batch[:, None] & in_tile[None, :]
    h = tl.load(product_ptr + token.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0)
    h = h.to(tl.float32)
    x_norm = tl.load(x_norms_ptr + token, mask=in_batch, other=0)
    w_norm = tl.load(w_norms_ptr + feature, mask=in_tile, other=0)
    most = h + tl.abs(h) * 0.00390625 + margin * x_norm[:, None] * w_norm[None, :]
    most += tl.load(b_enc_ptr + feature, mask=in_tile, other=0)[None, :]
    if BY_TOKEN:
        scale = tl.load(scales_ptr + feature, mask=in_tile, other=0)
        cut = tl.load(cuts_ptr + token, mask=in_batch, other=0)
        keep = (most * scale[None, :] >= cut[:, None]) & (most > 0)
    else:
        cut = tl.load(cuts_ptr + feature, mask=in_tile, other=0)
        keep = (most >= cut[None, :]) & (most >= 0)
    bits = (keep & inside).to(tl.int32) << (token % 32)[:, None]
    words = tl.sum(tl.reshape(bits, [TOKENS // 32, 32, FEATURES]), axis=1)
    out = bits_ptr + word.to(tl.int64)[:, None] * F + feature[None, :]
    tl.store(out, words, mask=(word < (B + 31) // 32)[:, None] & in_tile[None, :])


@triton.jit
def group_maxima(
    product_ptr, x_norms_ptr, w_norms_ptr, b_enc_ptr, scales_ptr, maxima_ptr, B, n_groups, first, width, margin,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """maxima (B, groups): the largest lower bound of a score in each group of features, 0 where none is positive."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_tile, in_batch = column < width, token < B
    feature = first + column
    inside = in_batch[:, None] & in_tile[None, :]
    h = tl.load(product_ptr + token.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0)
    h = h.to(tl.float32)
    x_norm = tl.load(x_norms_ptr + token, mask=in_batch, other=0)
    w_norm = tl.load(w_norms_ptr + feature, mask=in_tile, other=0)
    least = h - tl.abs(h) * 0.00390625 - margin * x_norm[:, None] * w_norm[None, :]
    least += tl.load(b_enc_ptr + feature, mask=in_tile, other=0)[None, :]
    least *= tl.load(scales_ptr + feature, mask=in_tile, other=0)[None, :]
    least = tl.where(inside & (least > 0), least, 0.0)
    largest = tl.max(tl.reshape(least, [TOKENS, FEATURES // GROUP, GROUP]), axis=2)
    group = (first + tl.program_id(0) * FEATURES) // GROUP + tl.arange(0, FEATURES // GROUP)
    out = maxima_ptr + token.to(tl.int64)[:, None] * n_groups + group[None, :]
    tl.store(out, largest, mask=in_batch[:, None] & (group < n_groups)[None, :])


@triton.jit
def score_parts(
    x_ptr, W_ptr, tokens_ptr, features_ptr, count_ptr, parts_ptr, n, capacity,
    PAIRS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts (slices, capacity): <x_b, W_enc[f]> over one slice of the K D dimensions, in float32.

    The slice is the slowest axis of the grid: all tokens' slices stay in the cache while the weights stream past.
    """
    part = tl.program_id(1)
    count = tl.minimum(tl.load(count_ptr), capacity).to(tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(count, PAIRS), tl.num_programs(0)):
        pair = block * PAIRS + tl.arange(0, PAIRS)
        valid = pair < count
        token = tl.load(tokens_ptr + pair, mask=valid, other=0).to(tl.int64)
        feature = tl.load(features_ptr + pair, mask=valid, other=0).to(tl.int64)
        total = tl.zeros([PAIRS, BLOCK], tl.float32)
        for start in range(0, SLICE, BLOCK):
            i = part * SLICE + start + tl.arange(0, BLOCK)
            inside = valid[:, None] & (i < n)[None, :]
            x = tl.load(x_ptr + token[:, None] * n + i[None, :], mask=inside, other=0).to(tl.float32)
            w = tl.load(W_ptr + feature[:, None] * n + i[None, :], mask=inside, other=0).to(tl.float32)
            total += x * w
        tl.store(parts_ptr + part.to(tl.int64) * capacity + pair, tl.sum(total, axis=1), mask=valid)


@triton.jit
def sum_scores(parts_ptr, features_ptr, b_enc_ptr, count_ptr, h_ptr, n_parts, capacity, BLOCK: tl.constexpr):
    """h (capacity,) of each candidate, the slices summed in order."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < tl.minimum(tl.load(count_ptr), capacity)
    feature = tl.load(features_ptr + pair, mask=valid, other=0)
    h = tl.zeros([BLOCK], tl.float32)
    for part in range(n_parts):
        h += tl.load(parts_ptr + tl.cast(part, tl.int64) * capacity + pair, mask=valid, other=0)
    h += tl.load(b_enc_ptr + feature, mask=valid, other=0)
    tl.store(h_ptr + pair, h, mask=pair < capacity)


@triton.jit
def gate_pairs(
    h_ptr, tokens_ptr, features_ptr, count_ptr, norms_ptr, largest_ptr, theta_ptr, chosen_ptr, gates_ptr, keep_ptr,
    bits_ptr, half_window, capacity, K, B, all_gates,
    SHARED: tl.constexpr, CHOSEN: tl.constexpr, ABOVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gates of each candidate from its exact h, and bit (feature, token) for those that stay.

    CHOSEN: what stays is given, with all gates open. ABOVE: every pair with h >= theta stays as well, for `l_pre`.
    """
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < tl.minimum(tl.load(count_ptr), capacity)
    token = tl.load(tokens_ptr + pair, mask=valid, other=0)
    feature = tl.load(features_ptr + pair, mask=valid, other=0)
    h = tl.load(h_ptr + pair, mask=valid, other=0)
    gates = tl.zeros([BLOCK], tl.int64) + all_gates
    if CHOSEN:
        keep = valid & (tl.load(chosen_ptr + pair, mask=valid, other=0) != 0)
    else:
        theta = tl.load(theta_ptr + feature, mask=valid, other=0)
        if SHARED:
            gates = tl.where(h > theta, gates, 0)
            strength = h
        else:
            gates = tl.zeros([BLOCK], tl.int64)
            for k in range(K):
                norm = tl.load(norms_ptr + feature.to(tl.int64) * K + k, mask=valid, other=0)
                gates |= (h * norm > theta).to(tl.int64) << k
            strength = h * tl.load(largest_ptr + feature, mask=valid, other=0)
        keep = (h > 0) & (strength > theta - half_window)
        if ABOVE:
            keep = keep | (h >= theta)
        keep = keep & valid
    tl.store(gates_ptr + pair, gates, mask=valid)
    tl.store(keep_ptr + pair, keep.to(tl.int8), mask=pair < capacity)
    bit = tl.full([BLOCK], 1, tl.int32) << (feature % 32)
    tl.atomic_or(bits_ptr + (feature // 32).to(tl.int64) * B + token, bit, mask=keep)


@triton.jit
def write_code(
    h_ptr, gates_ptr, keep_ptr, tokens_ptr, features_ptr, bits_ptr, prefix_ptr, offsets_ptr, out_features_ptr,
    out_values_ptr, out_gates_ptr, n_words, B, capacity, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs that stay, token by token."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(keep_ptr + pair, mask=pair < capacity, other=0) != 0
    token = tl.load(tokens_ptr + pair, mask=keep, other=0)
    feature = tl.load(features_ptr + pair, mask=keep, other=0)
    place = bit_position(bits_ptr, prefix_ptr, offsets_ptr, feature, token, keep, n_words, B, WORDS)
    tl.store(out_features_ptr + place, feature, mask=keep)
    tl.store(out_values_ptr + place, tl.load(h_ptr + pair, mask=keep, other=0), mask=keep)
    tl.store(out_gates_ptr + place, tl.load(gates_ptr + pair, mask=keep, other=0), mask=keep)


@dataclass(frozen=True)
class EncoderWeights:
    """What encoding needs beside the activations."""

    W_enc_FKD: Tensor
    """float32 or bf16: what h is computed from."""
    shadow_FKD: Tensor
    """`W_enc_FKD` in bf16: the product's operand (the same tensor where the weights are bf16)."""
    w_norms_F: Tensor
    """||W_enc[f]||_4."""
    b_enc_F: Tensor
    norms_FK: Tensor
    largest_F: Tensor
    """The largest decoder norm of each feature."""
    theta_F: Tensor


@dataclass(frozen=True)
class Candidates:
    """Pairs that may be on, as bits."""

    matrix: BitMatrix
    """(token, feature), feature by feature."""
    count: Tensor
    """(1,) int64: how many."""
    products_nF: Tensor | None = None
    """x W_enc^T in bf16 of the tokens for which it was to be kept."""


def tile_width(n_tokens: int, n_features: int) -> int:
    """Features in one tile of the product: a multiple of 128, near `TILE_BYTES` in bf16."""
    width = max(128, TILE_BYTES // (2 * max(1, n_tokens)) // 128 * 128)
    return min(width, n_features)


@torch.no_grad()
def find_candidates(
    x_BKD: Tensor, weights: EncoderWeights, gate: Gate, *, keep: bool = False, tokens: Tensor | None = None
) -> Candidates:
    """The pairs whose h may be above their cut, by the bf16 product. `keep` it, of all tokens or of `tokens` (n,)."""
    B, F = len(x_BKD), len(weights.theta_F)
    x_BI, W_FI = x_BKD.flatten(1), weights.shadow_FKD.flatten(1)
    matrix = BitMatrix(B, F, x_BI.device)
    kept = None
    if keep or (gate.ranked and B):
        kept = x_BI.new_empty(B if tokens is None else len(tokens), F, dtype=torch.bfloat16)
    if B:
        x_norms_B = x_BI.new_empty(B, dtype=torch.float32)
        token_norms[(B,)](x_ptr=x_BI, norms_ptr=x_norms_B, n=x_BI.shape[1], BLOCK=1024, num_warps=4)
        x_bf16 = x_BI.to(torch.bfloat16)
        width = tile_width(B, F)
        product = x_bf16.new_empty(B * width)
        ranks = RankCut(B, gate, x_norms_B, weights) if gate.ranked else None
        cuts_F = weights.theta_F if ranks else gate.cut(weights.theta_F, gate.scale(weights.norms_FK))

        def mark(tile_BF: Tensor, first: int, cuts: Tensor) -> None:
            grid = (triton.cdiv(tile_BF.shape[1], TILE_FEATURES), triton.cdiv(B, TILE_TOKENS))
            mark_candidates[grid](
                product_ptr=tile_BF, x_norms_ptr=x_norms_B, w_norms_ptr=weights.w_norms_F, b_enc_ptr=weights.b_enc_F,
                cuts_ptr=cuts, scales_ptr=weights.largest_F, bits_ptr=matrix.bits, B=B, F=F, first=first,
                width=tile_BF.shape[1], stride=tile_BF.stride(0), margin=MARGIN, BY_TOKEN=gate.ranked,
                TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, num_warps=4,
            )  # fmt: skip

        for first in range(0, F, width):
            last = min(F, first + width)
            tile_BF = product[: B * (last - first)].view(B, last - first)
            with full_precision(x_BI.device):  # sums kept in bf16 would be far outside the margin
                torch.mm(x_bf16, W_FI[first:last].T, out=tile_BF)
            if kept is not None:
                kept[:, first:last] = tile_BF if tokens is None else tile_BF[tokens]
            if ranks is None:
                mark(tile_BF, first, cuts_F)
            else:
                ranks.add(tile_BF, first)
        if ranks is not None:
            assert kept is not None
            mark(kept, 0, ranks.cut())
    matrix.count()
    return Candidates(matrix, matrix.offsets[-1:].clone(), kept if keep else None)


class RankCut:
    """For gates by rank: a score that certainly reaches the top.

    The k-th largest of lower bounds of scores is at most the k-th largest score, and so is the k-th largest of the
    maxima of groups of them: a few scores of a token share a group, so the cut is hardly lower, and nothing of B x F
    numbers is sorted.
    """

    def __init__(self, n_tokens: int, gate: Gate, x_norms_B: Tensor, weights: EncoderWeights) -> None:
        self.weights, self.x_norms_B, self.gate = weights, x_norms_B, gate
        self.n_tokens, self.n_features = n_tokens, len(weights.theta_F)
        self.group = group_size(self.n_features, gate.top_k)
        self.n_groups = triton.cdiv(self.n_features, TILE_FEATURES) * (TILE_FEATURES // self.group)
        self.maxima = x_norms_B.new_zeros(n_tokens, self.n_groups)

    def add(self, tile_BF: Tensor, first: int) -> None:
        """Features from `first` on, a multiple of `TILE_FEATURES`."""
        grid = (triton.cdiv(tile_BF.shape[1], TILE_FEATURES), triton.cdiv(self.n_tokens, TILE_TOKENS))
        group_maxima[grid](
            product_ptr=tile_BF, x_norms_ptr=self.x_norms_B, w_norms_ptr=self.weights.w_norms_F,
            b_enc_ptr=self.weights.b_enc_F, scales_ptr=self.weights.largest_F, maxima_ptr=self.maxima,
            B=self.n_tokens, n_groups=self.n_groups, first=first, width=tile_BF.shape[1], margin=MARGIN,
            GROUP=self.group, TOKENS=TILE_TOKENS, FEATURES=TILE_FEATURES, num_warps=4,
        )  # fmt: skip

    def cut(self) -> Tensor:
        """(B,): each token's cut."""
        rows = self.maxima.view(1, -1) if self.gate.whole_batch else self.maxima
        count = self.gate.top_k * (self.n_tokens if self.gate.whole_batch else 1)
        if count > rows.shape[1]:
            return rows.new_zeros(self.n_tokens)
        least = rows.topk(count, dim=1, sorted=False).values.amin(dim=1)
        return (least * (1 - 2**-20)).expand(self.n_tokens).contiguous()  # the scores are rounded once more


def group_size(n_features: int, top_k: int) -> int:
    """Features of a group: a power of two, with so many groups that the top of a token rarely shares one."""
    size = TILE_FEATURES
    while size > 1 and n_features < 16 * top_k * size:
        size //= 2
    return size


@dataclass(frozen=True)
class Encoded:
    """A code in buffers of a fixed capacity: the number of pairs is `code.row_offsets[-1]`, on the device."""

    code: SparseCode
    smallest_score: Tensor | None
    """(): BatchTopK's smallest score kept."""


def score_slices(n_tokens: int, n: int, itemsize: int) -> tuple[int, int]:
    """(elements a slice, slices) of the K D dimensions for `score_parts`."""
    slices = Slices.of(n, n_tokens, itemsize)
    return slices.width, slices.count


@torch.no_grad()
def list_pairs(x_BKD: Tensor, weights: EncoderWeights, gate: Gate, candidates: Candidates, capacity: int) -> Encoded:
    """h and gates of the candidates, in float32, and the code of those that stay.

    With more than `capacity` candidates some are lost: the caller compares `candidates.count`.
    """
    B, K, _ = x_BKD.shape
    F, device = len(weights.theta_F), x_BKD.device
    n = x_BKD[0].numel() if B else 0
    tokens, features = candidates.matrix.pairs(capacity)
    width, n_parts = score_slices(B, max(1, n), x_BKD.element_size())
    parts = torch.empty(n_parts, capacity, device=device, dtype=torch.float32)
    h = torch.empty(capacity, device=device, dtype=torch.float32)
    programs = min(triton.cdiv(capacity, PAIRS), 4096)
    score_parts[(programs, n_parts)](
        x_ptr=x_BKD, W_ptr=weights.W_enc_FKD, tokens_ptr=tokens, features_ptr=features, count_ptr=candidates.count,
        parts_ptr=parts, n=n, capacity=capacity, PAIRS=PAIRS, SLICE=width, BLOCK=256, num_warps=4,
    )  # fmt: skip
    grid = (triton.cdiv(capacity, 128),)
    sum_scores[grid](
        parts_ptr=parts, features_ptr=features, b_enc_ptr=weights.b_enc_F, count_ptr=candidates.count, h_ptr=h,
        n_parts=n_parts, capacity=capacity, BLOCK=128, num_warps=4,
    )  # fmt: skip
    chosen, smallest = (None, None) if not gate.ranked else choose(h, tokens, features, weights, gate, candidates, B)
    by_token = BitMatrix(F, B, device)
    gates = torch.empty(capacity, dtype=torch.int64, device=device)
    keep = torch.empty(capacity, dtype=torch.int8, device=device)
    all_gates = (1 << K) - 1 if K < 64 else -1
    # One threshold for all scores: the gate "shared", of h times the largest norm.
    by_score = gate.unit == "largest norm"
    gate_pairs[grid](
        h_ptr=h * weights.largest_F[features.long()] if by_score and not gate.ranked else h,
        tokens_ptr=tokens, features_ptr=features, count_ptr=candidates.count, norms_ptr=weights.norms_FK,
        largest_ptr=weights.largest_F, theta_ptr=weights.theta_F, chosen_ptr=chosen if chosen is not None else keep,
        gates_ptr=gates, keep_ptr=keep, bits_ptr=by_token.bits, half_window=gate.window / 2, capacity=capacity, K=K,
        B=B, all_gates=all_gates, SHARED=gate.shared or by_score, CHOSEN=gate.ranked, ABOVE=gate.above, BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    by_token.count()
    # The code is never longer than the list of candidates. Unused places are 0, so that readers may gather by them.
    out_features, out_values, out_gates = torch.zeros_like(features), torch.zeros_like(h), torch.zeros_like(gates)
    write_code[grid](
        h_ptr=h, gates_ptr=gates, keep_ptr=keep, tokens_ptr=tokens, features_ptr=features, bits_ptr=by_token.bits,
        prefix_ptr=by_token.prefix, offsets_ptr=by_token.offsets, out_features_ptr=out_features,
        out_values_ptr=out_values, out_gates_ptr=out_gates, n_words=by_token.n_words, B=B, capacity=capacity,
        WORDS=WORDS_PER_CHUNK, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return Encoded(SparseCode(by_token.offsets, out_features, out_values, out_gates, K, F), smallest)


def choose(
    h: Tensor, tokens: Tensor, features: Tensor, weights: EncoderWeights, gate: Gate, candidates: Candidates, B: int
) -> tuple[Tensor, Tensor | None]:
    """Which candidates a gate by rank keeps, (capacity,) int8, and BatchTopK's smallest score; ties: lowest feature."""
    valid = torch.arange(len(h), device=h.device) < candidates.count
    scores = torch.where(valid, h.relu() * weights.largest_F[features.long()], 0.0)
    best, order = scores.sort(descending=True, stable=True)
    chosen = torch.zeros_like(features, dtype=torch.int8)
    if gate.whole_batch:
        kept = (torch.arange(len(h), device=h.device) < gate.top_k * B) & (best > 0)
        smallest = torch.where(kept, best, torch.inf).amin()
        return chosen.scatter_(0, order, kept.to(torch.int8)), torch.where(smallest.isinf(), 0.0, smallest)
    # Token by token, best first; invalid candidates after all tokens.
    owner, by_owner = torch.where(valid, tokens, B)[order].sort(stable=True)
    first = torch.searchsorted(owner, torch.arange(B + 1, dtype=owner.dtype, device=h.device))
    rank = torch.arange(len(h), device=h.device) - first[owner.long()]
    kept = (rank < gate.top_k) & (best[by_owner] > 0)
    return chosen.scatter_(0, order[by_owner], kept.to(torch.int8)), None


def trimmed(code: SparseCode) -> SparseCode:
    """The code exactly as long as it has pairs; the host waits for their number."""
    n = int(code.row_offsets[-1])
    return SparseCode(
        code.row_offsets, code.features[:n], code.values[:n], code.gates[:n], code.n_snapshots, code.n_features
    )


def encode(x_BKD: Tensor, weights: EncoderWeights, gate: Gate) -> SparseCode:
    """The code of a batch. For inference: a training step waits for no number of pairs (`list_pairs`)."""
    x_BKD = x_BKD.contiguous()
    candidates = find_candidates(x_BKD, weights, gate)
    return trimmed(list_pairs(x_BKD, weights, gate, candidates, max(1, int(candidates.count))).code)
