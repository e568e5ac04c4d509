"""A code's pairs sorted by feature on a GPU: a counting sort over bits, without order-dependent atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crosscoder.code import SparseCode
from crosscoder.kernels.device import WORDS_PER_CHUNK, BitMatrix, bit_position
from crosscoder.kernels.transpose.reference import FeatureOrder

PAIRS = 32


@triton.jit
def mark_pairs(row_offsets_ptr, features_ptr, bits_ptr, n_features, PAIRS: tl.constexpr):
    """Sets bit (token, feature) of every pair; one program a token."""
    token = tl.program_id(0)
    start = tl.load(row_offsets_ptr + token).to(tl.int32)
    end = tl.load(row_offsets_ptr + token + 1).to(tl.int32)
    bit = tl.full([PAIRS], 1, tl.int32) << (token % 32)
    row_ptr = bits_ptr + (token // 32).to(tl.int64) * n_features
    for i in range(start, end, PAIRS):
        pair = i + tl.arange(0, PAIRS)
        feature = tl.load(features_ptr + pair, mask=pair < end, other=0)
        tl.atomic_or(row_ptr + feature, bit, mask=pair < end)


@triton.jit
def place_pairs(
    row_offsets_ptr, features_ptr, bits_ptr, prefix_ptr, offsets_ptr, tokens_ptr, order_ptr, n_words, n_features,
    WORDS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes every pair's token and number to its place by feature; one program a token."""
    token = tl.program_id(0)
    start = tl.load(row_offsets_ptr + token).to(tl.int32)
    end = tl.load(row_offsets_ptr + token + 1).to(tl.int32)
    for i in range(start, end, PAIRS):
        pair = i + tl.arange(0, PAIRS)
        valid = pair < end
        feature = tl.load(features_ptr + pair, mask=valid, other=0)
        row = token + tl.zeros([PAIRS], tl.int32)
        place = bit_position(bits_ptr, prefix_ptr, offsets_ptr, row, feature, valid, n_words, n_features, WORDS)
        tl.store(tokens_ptr + place, row, mask=valid)
        tl.store(order_ptr + place, pair.to(tl.int64), mask=valid)


def transpose(code: SparseCode) -> FeatureOrder:
    """The stable order of a code's pairs by feature.

    `tokens` and `order` are as long as the code's buffers; their entries after the last pair are 0.
    """
    matrix = BitMatrix(code.n_tokens, code.n_features, code.features.device)
    tokens, order = torch.zeros_like(code.features), torch.zeros_like(code.features, dtype=torch.int64)
    if code.n_tokens:
        mark_pairs[(code.n_tokens,)](
            row_offsets_ptr=code.row_offsets, features_ptr=code.features, bits_ptr=matrix.bits,
            n_features=code.n_features, PAIRS=PAIRS, num_warps=1,
        )  # fmt: skip
    matrix.count()
    if code.n_tokens:
        place_pairs[(code.n_tokens,)](
            row_offsets_ptr=code.row_offsets, features_ptr=code.features, bits_ptr=matrix.bits,
            prefix_ptr=matrix.prefix, offsets_ptr=matrix.offsets, tokens_ptr=tokens, order_ptr=order,
            n_words=matrix.n_words, n_features=code.n_features, WORDS=WORDS_PER_CHUNK, PAIRS=PAIRS, num_warps=1,
        )  # fmt: skip
    return FeatureOrder(feature_offsets=matrix.offsets, tokens=tokens, order=order)
