"""What the Triton kernels share: bits, random numbers, tanh, and the bit matrix that orders pairs.

Every kernel takes any shape: what lies outside is masked. Sums are taken in an order that depends on shapes and data
alone, and the only atomics are "or"s, whose order does not matter: same input, same bits.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

L2_SHARE = 24 * 2**20
"""Bytes of one slice of the activations that a kernel may count on finding in a GPU's second-level cache (an A100 has
40 MB, an H100 50, and the rows of the weights stream through it at the same time)."""
WORDS_PER_CHUNK = 32
LANES = 256
"""Neighbours along D that share a scale in the 8-bit state: `crosscoder.backends.adam_state.BLOCK`."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Slices:
    """How one row of width D is cut: `count` slices of `width` elements (a power of two)."""

    width: int
    count: int
    warps: int

    @classmethod
    def of(cls, D: int, n_tokens: int, bytes_per_element: int) -> Slices:
        """Slices so narrow that those of all tokens stay in the cache while the features stream past."""
        width = min(power_of_two(D), 4096)
        while width > 512 and n_tokens * min(width, D) * bytes_per_element > L2_SHARE:
            width //= 2
        width = max(width, LANES)
        return cls(width, -(-D // width), max(1, min(8, width // 256)))


@triton.jit
def popcount(word):
    """Number of bits set in each int32."""
    v = word.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def mix(v):
    """A hash of uint32 with good avalanche (lowbias32 by C. Wellons, public domain)."""
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def folded(v, FACTOR: tl.constexpr):
    """A hash of uint32 of two instructions: the two halves of a product of 64 bits, one upon the other."""
    product = v.to(tl.uint64) * FACTOR
    return (product ^ (product >> 32)).to(tl.uint32)


@triton.jit
def random_key(seed, row, stream: tl.constexpr):
    """The key of one row's random numbers: of the step's seed, the row's number (int64) and the purpose."""
    low = row.to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    return folded(folded(seed.to(tl.uint32) + stream * 0x3C6EF372, 0xB5ADB1A5) + low, 0xD6EB9C2F) + high * 0x9E3779B9


@triton.jit
def random_words(key, i):
    """Two words of random bits (int32) for element `i` of a row."""
    v = folded(key + i.to(tl.uint32) * 0x9E3779B1, 0xD168AAAD)
    return folded(v, 0xAF723597).to(tl.int32, bitcast=True), folded(v, 0xC9A5F1E3).to(tl.int32, bitcast=True)


@triton.jit
def tanh_and_slope(z):
    """tanh(z) and 1 - tanh(z)^2 for z >= 0, without cancellation at either end."""
    e = tl.exp(-2.0 * z)
    s = z * z
    series = z * (1 + s * (-0.33333333333 + s * (0.13333333333 + s * (-0.05396825397 + s * 0.02186948854))))
    t = tl.where(z < 0.2, series, (1 - e) / (1 + e))
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def activity_and_slope(z, tanh_scale, PENALTY: tl.constexpr):
    """`Penalty.activity` and its slope at z = f n; `PENALTY` as in `penalty_code`."""
    if PENALTY == 2:
        return z, tl.full(z.shape, 1.0, tl.float32)
    t, slope = tanh_and_slope(tanh_scale * z)
    return t, tanh_scale * slope


def penalty_code(kind: str) -> int:
    """How a kernel knows the penalty: 0 "tanh-quad", 1 "tanh", 2 "l1"."""
    return ("tanh-quad", "tanh", "l1").index(kind)


# --------------------------------------------------------------------------------------------- the bit matrix


@triton.jit
def count_bits(bits_ptr, counts_ptr, n_words, n_columns, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """counts (chunks, columns): bits set in each chunk of `WORDS` words of each column."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    word = chunk * WORDS + tl.arange(0, WORDS)
    inside = (word < n_words)[:, None] & (column < n_columns)[None, :]
    bits = tl.load(bits_ptr + word.to(tl.int64)[:, None] * n_columns + column[None, :], mask=inside, other=0)
    total = tl.sum(popcount(bits), axis=0)
    tl.store(counts_ptr + chunk * n_columns + column, total, mask=column < n_columns)


@triton.jit
def bit_position(bits_ptr, prefix_ptr, offsets_ptr, row, column, valid, n_words, n_columns, WORDS: tl.constexpr):
    """Place of bit (row, column) among all bits, column by column, rows ascending."""
    own = row // 32
    chunk = own // WORDS
    word = chunk[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    before = valid[:, None] & (word <= own[:, None])
    bits = tl.load(bits_ptr + word.to(tl.int64) * n_columns + column[:, None], mask=before, other=0)
    below = (tl.full(row.shape, 1, tl.int32) << (row % 32)) - 1
    bits = tl.where(word == own[:, None], bits & below[:, None], bits)
    start = tl.load(offsets_ptr + column, mask=valid, other=0).to(tl.int32)
    start += tl.load(prefix_ptr + chunk * n_columns + column, mask=valid, other=0)
    return start + tl.sum(popcount(bits), axis=1)


@triton.jit
def list_bits(
    bits_ptr, prefix_ptr, offsets_ptr, rows_ptr, columns_ptr, n_words, n_columns, capacity,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows, columns (capacity,): the bits that are set, column by column, rows ascending; beyond capacity: dropped."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    inside = column < n_columns
    start = tl.load(offsets_ptr + column, mask=inside, other=0)  # int64: more may be set than an int32 counts
    start += tl.load(prefix_ptr + chunk * n_columns + column, mask=inside, other=0)
    bit = tl.arange(0, 32)[:, None]
    for i in range(WORDS):
        word = chunk * WORDS + i
        here = inside & (word + 0 * column < n_words)
        bits = tl.load(bits_ptr + tl.cast(word, tl.int64) * n_columns + column, mask=here, other=0)
        if tl.max((bits != 0).to(tl.int32), axis=0) > 0:
            is_set = ((bits[None, :] >> bit) & 1) != 0
            below = (tl.full([32, 1], 1, tl.int32) << bit) - 1
            place = start[None, :] + popcount(bits[None, :] & below)
            keep = is_set & (place < capacity)
            tl.store(rows_ptr + place, (word * 32 + bit) + tl.zeros([32, BLOCK], tl.int32), mask=keep)
            tl.store(columns_ptr + place, column[None, :] + tl.zeros([32, BLOCK], tl.int32), mask=keep)
            start += popcount(bits)


class BitMatrix:
    """R x C bits, and with them an order of the pairs (row, column) that are set: column by column, rows ascending.

    A counting sort without a sort: set the bits, `count()`, and a bit's place is a sum of popcounts. `bits` is
    (ceil(R / 32), C) int32; bit r % 32 of word (r // 32, c) is (r, c).
    """

    COLUMNS = 128

    def __init__(self, n_rows: int, n_columns: int, device: torch.device) -> None:
        self.n_words, self.n_columns = max(1, -(-n_rows // 32)), n_columns
        self.chunks = -(-self.n_words // WORDS_PER_CHUNK)
        self.bits = torch.zeros(self.n_words, n_columns, dtype=torch.int32, device=device)

    def count(self) -> None:
        """Fixes the order. `offsets` (C + 1,) int64: the places of column c are offsets[c] to offsets[c + 1]."""
        counts = self.bits.new_empty(self.chunks, self.n_columns)
        grid = (triton.cdiv(self.n_columns, self.COLUMNS), self.chunks)
        count_bits[grid](
            bits_ptr=self.bits, counts_ptr=counts, n_words=self.n_words, n_columns=self.n_columns,
            WORDS=WORDS_PER_CHUNK, BLOCK=self.COLUMNS, num_warps=4,
        )  # fmt: skip
        through = counts.cumsum(dim=0, dtype=torch.int32)
        self.prefix = through - counts
        self.offsets = torch.nn.functional.pad(through[-1].cumsum(dim=0, dtype=torch.int64), (1, 0))

    def pairs(self, capacity: int) -> tuple[Tensor, Tensor]:
        """rows, columns (capacity,) int32 of the bits that are set; what follows after the last is 0."""
        rows, columns = self.bits.new_zeros(2, capacity)
        grid = (triton.cdiv(self.n_columns, self.COLUMNS), self.chunks)
        list_bits[grid](
            bits_ptr=self.bits, prefix_ptr=self.prefix, offsets_ptr=self.offsets, rows_ptr=rows, columns_ptr=columns,
            n_words=self.n_words, n_columns=self.n_columns, capacity=capacity, WORDS=WORDS_PER_CHUNK,
            BLOCK=self.COLUMNS, num_warps=4,
        )  # fmt: skip
        return rows, columns
