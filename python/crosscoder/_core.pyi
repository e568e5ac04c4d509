"""The C++ core. Arrays are taken as they are, never copied or converted; the GIL is released while working.

Letters of shapes: T rows of a shard, n picked rows, K snapshots, D width, S sequences, C context,
V vocabulary, N distinct bigrams.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

IsaLevel = Literal["portable", "avx2", "avx512", "avx512_bf16"]

def isa_level() -> IsaLevel:
    """Instruction-set level in use: the best that this CPU has, or the one that CROSSCODER_ISA names.

    If that environment variable names no level, or one above the CPU, importing this is an `ImportError`.
    """

def isa_levels() -> list[IsaLevel]:
    """Levels that this CPU can run, lowest first."""

def cpu_features() -> dict[str, bool]:
    """CPU features by name; true only where the operating system supports them too."""

def gather_rows(
    source: npt.NDArray[np.float32] | npt.NDArray[np.uint16] | npt.NDArray[np.float16],
    index: npt.NDArray[np.int64],
    scale: float,
    out: npt.NDArray[np.float32],
    snapshot: int,
    dtype: str,
    n_threads: int = 1,
) -> None:
    """`out[i, snapshot, :] = float32(source[index[i], :]) * float32(scale)`.

    `source` (T, D): float32 for `dtype` "fp32", uint16 bits for "bf16", uint16 bits or float16 for "fp16";
    may be read-only or memory-mapped. `index` (n,) int64. `out` (n, K, D) float32. Conversion is exact
    (denormals, infinities, NaN included), the product is rounded once: the same bits on every CPU, for any
    `n_threads`.

    Raises `IndexError` for an index or a snapshot out of range (nothing is written then), `ValueError` for
    another dtype, shape or memory layout, `TypeError` for something that is no array; all name the argument.
    """

def float32_to_bfloat16(src: npt.NDArray[np.float32], out: npt.NDArray[np.uint16], n_threads: int = 1) -> None:
    """`out` = bits of bfloat16(`src`), to nearest, ties to even; a NaN stays one (quiet, sign kept).

    `src` float32, `out` uint16 of one shape. Raises `ValueError` for another dtype, shape or memory layout.
    """

def xxh3_64(data: Buffer | npt.NDArray[Any]) -> int:
    """XXH3 (64 bits, seed 0) of the bytes of a C-contiguous buffer. Raises `ValueError` if it is not one."""

class NgramCounter:
    """Streaming unigram and bigram counts over the token ids 0 to `vocab_size` - 1.

    The id `ignore` (an end-of-text token, a padding of -1, ...) is not counted, and no bigram contains it or
    reaches across it. Memory: 10 to 15 bytes for each distinct bigram, 32 for each id.

    Raises `ValueError` for a `vocab_size` below 1.
    """

    def __init__(self, vocab_size: int, *, ignore: int | None = None) -> None: ...
    def add(self, tokens: npt.NDArray[np.int32], n_threads: int = 1) -> None:
        """Count `tokens` int32: (T,) is one sequence, (S, C) are S of them; no bigram crosses sequences.

        The counts do not depend on `n_threads`. Raises `ValueError` naming the position of an id out of range
        (nothing is counted then), or for another dtype, shape or memory layout.
        """

    def unigrams(self) -> npt.NDArray[np.int64]:
        """(V,): how often each id was counted."""

    def bigrams(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """first (N,), second (N,), count (N,) of the N distinct bigrams, sorted by first, then second."""

    @property
    def total(self) -> int:
        """Number of tokens counted: `unigrams().sum()`."""

    @property
    def n_distinct_bigrams(self) -> int:
        """N, the number of distinct bigrams."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def ignore(self) -> int | None: ...
