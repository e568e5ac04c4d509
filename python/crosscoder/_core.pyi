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

def xxh3_64(data: Buffer | npt.NDArray[Any]) -> int:
    """XXH3 (64 bits, seed 0) of the bytes of a C-contiguous buffer. Raises `ValueError` if it is not one."""

HISTOGRAM_BINS: int
"""H: bins of the activations' histogram, quarters of an octave from 2^-12 to 2^12."""

def collect_examples(
    code: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int64], int, int],
    place: npt.NDArray[np.int64],
    counts: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]],
    strongest: tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]],
    sampled: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]],
    before: int,
    seed: int,
    n_threads: int,
) -> None:
    """Add a batch of whole sequences to what is kept of F features (crosscoder.evolution.examples says what).

    `code`: row_offsets, features, values, gates, K, F. `place` (B,): sequence * 2^32 + position, ascending, both below
    2^31. `counts`: fired (F, K), fired_any (F,), sum (F,), histogram (F, H). `strongest`, `sampled`: rank (F, n),
    sequence (F, n), position (F, n), activations (F, n, L); empty entries have ranks 0 and 2^64 - 1, places -1.
    Raises `ValueError` for places that do not ascend, for another dtype, shape or memory layout.
    """

def geometry_available() -> bool:
    """Whether this CPU has bf16 instructions (level "avx512_bf16"); if not, the functions on `decoders` raise
    `ValueError`.

    `decoders` (n, K, D) are bf16 bits, may be read-only or memory-mapped. Sums are float32; denormal numbers count
    as 0. Nothing depends on `n_threads`.
    """

def snapshot_products(decoders: npt.NDArray[np.uint16], products: npt.NDArray[np.float32], n_threads: int) -> None:
    """`products` (n, K, K) = dot products between a feature's decoders."""

def squared_norms(decoders: npt.NDArray[np.uint16], squares: npt.NDArray[np.float32], n_threads: int) -> None:
    """`squares` (n, K)."""

def padded_width(width: int) -> int:
    """P, the width that Gram matrices are padded to."""

def add_grams(decoders: npt.NDArray[np.uint16], grams: npt.NDArray[np.float32], n_threads: int) -> None:
    """`grams` (K, P, P) += W_k^T W_k at and above the diagonal; what is below means nothing."""

def pack_form(gram: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.uint16]:
    """A Gram matrix (P, P), read at and above the diagonal, as `quadratic_forms` takes it: two bf16 an element."""

def quadratic_forms(
    decoders: npt.NDArray[np.uint16], forms: npt.NDArray[np.uint16], values: npt.NDArray[np.float32], n_threads: int
) -> None:
    """`values` (n, K) = w^T G_k w, `forms` (K, ...) one packed G a snapshot."""

def add_cosines(
    cosines: npt.NDArray[np.float32],
    groups: npt.NDArray[np.int32],
    sums: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int64],
    histogram: npt.NDArray[np.int64],
    extremes: npt.NDArray[np.float32],
    n_threads: int,
) -> None:
    """Add `cosines` (n, K, K), NaN where there is none, of the pairs i <= j (row-major, P = K (K + 1) / 2).

    `sums` and `counts` (G, P) by group of features; `histogram` (P, bins) over [-1, 1] and `extremes` (2, P), smallest
    and largest, over all. A feature of a negative group is left out; one beyond G is a `ValueError`.
    """

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

    def bigrams(self, n_threads: int = 1) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """first (N,), second (N,), count (N,) of the N distinct bigrams, sorted by first, then second."""

    @property
    def total(self) -> int:
        """Number of tokens counted: `unigrams().sum()`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def ignore(self) -> int | None: ...

def write_activations(
    path: str,
    temporary: str,
    x: npt.NDArray[np.float32],
    *,
    dtype: str,
    group: int,
    store: int,
    shard: int,
    name: str,
) -> bool:
    """Write `x` (T, D) as a segment: to `temporary`, synced, renamed to `path`. `name` is the snapshot's.

    False, with nothing written, if a value is not finite (also after rounding to `dtype`: fp32, bf16, fp16, int8 or
    int4).
    `group`: channels that share a scale, for int8 and int4; 0 for the others. Raises `OSError`.
    """

def write_tokens(path: str, temporary: str, rows: npt.NDArray[np.int32], *, store: int, shard: int) -> None:
    """Write `rows` (T, 4) as a segment, atomically. Raises `OSError`."""

class SegmentFile:
    """An open segment of a store, its head checked.

    Raises `DataError` naming the file for one that is absent, foreign, damaged or truncated, `OSError`.
    """

    def __init__(self, path: str) -> None: ...
    @property
    def head(self) -> dict[str, Any]:
        """kind, dtype, shard, width, rows, rows_per_block, group, store, norm_sum, name, n_blocks."""

    @property
    def path(self) -> str: ...
    def column_sums(self) -> npt.NDArray[np.float64]:
        """(D,): sum of the stored rows."""

    def damaged_blocks(self) -> list[int]:
        """Numbers of the blocks whose checksum does not hold or that cannot be read."""

    def read_tokens(self) -> npt.NDArray[np.int32]:
        """(T, 4). Raises `DataError` naming a damaged block."""

    def gather(self, index: npt.NDArray[np.int64], scale: float, out: npt.NDArray[np.float32], place: int) -> None:
        """`out[i, place, :] = float32(row index[i]) * float32(scale)`; `index` (n,), `out` (n, K, D).

        Each block is checked when it is first met. Raises `DataError` naming a damaged one, `IndexError`.
        """

class BufferPool:
    """Buffers of `bytes` that are used again and again, on huge pages where the system gives them."""

    def __init__(self, bytes: int) -> None: ...
    def take(self) -> npt.NDArray[np.uint8]:
        """(bytes,) that go back to the pool when their last view is gone."""

class Prefetcher:
    """Threads that read runs of rows of a store and lay them out as batches (B, K, D), float32 or bfloat16.

    `direct`: past the page cache; `stream`: written past the processor's caches.
    """

    def __init__(
        self,
        *,
        store: int,
        width: int,
        dtype: str,
        snapshots: list[str],
        scales: list[float],
        bf16: bool,
        stream: bool,
        direct: bool,
        n_threads: int,
    ) -> None: ...
    def submit(
        self,
        runs: list[tuple[int, int, int, int, list[str]]],
        targets: npt.NDArray[np.int64],
        batches: list[int],
        batch_rows: int,
        n_snapshots: int,
    ) -> int:
        """Begin to read `runs` (shard, its rows, first row, rows, path of each snapshot's file); returns a ticket.

        Row i of them all goes to place `targets[i] % batch_rows` of batch `targets[i] // batch_rows`, whose address
        is in `batches`, or nowhere (-1). The batches must live until `wait` or `drain` is over.
        """

    def is_done(self, ticket: int) -> bool: ...
    def wait(self, ticket: int) -> None:
        """Return when the window is complete. Raises `DataError` naming file and block, `OSError`."""

    def is_of_this_process(self) -> bool:
        """False in a forked child, whose threads are its parent's: another must be made there."""

    def drain(self) -> None:
        """Forget all windows; return when no thread touches a batch any more."""

# The training step (csrc/bind: encoders, decoders, batch, updates). Its Python faces are kernels/*/native.py, which say
# what arrays are.
# bf16 numbers are uint16 bits; every array is C-contiguous. All raise `TypeError` or `ValueError` naming a wrong one.

_Array = npt.NDArray[Any]
_Code = tuple[_Array, _Array, _Array, _Array, int, int]
_Order = tuple[_Array, _Array, _Array]
_Penalty = tuple[float, bool, bool, float]

class Encoder:
    """The pairs of a sparse code from products, feature tile by feature tile."""

    def __init__(self, x: _Array, weights: _Array, bias: _Array) -> None: ...
    def add(
        self,
        products: _Array,
        first: int,
        rule: tuple[_Array | None, ...],
        keep_scale: _Array,
        keep_level: _Array,
        keep_also: _Array | None,
        n_threads: int,
    ) -> int:
        """Finds and scores a tile's candidates. Returns the number of pairs so far."""

    def finish(
        self, norms: _Array, theta: _Array, shared: bool, n_threads: int
    ) -> tuple[_Array, _Array, _Array, _Array]:
        """row_offsets, features, values, gates."""

class RankEncoder:
    """The same for TopK and BatchTopK."""

    def __init__(
        self, x: _Array, weights: _Array, bias: _Array, largest_norm: _Array, top_k: int, whole_batch: bool
    ) -> None: ...
    def add(
        self, products: _Array, first: int, rule: tuple[_Array | None, ...], relative: float, n_threads: int
    ) -> None: ...
    def finish(self, n_threads: int) -> tuple[_Array, _Array, _Array, float]:
        """row_offsets, features, values, the smallest score kept."""

def transpose(code: _Code, n_threads: int) -> _Order: ...
def feature_sums(
    code: _Code, order: _Order, norms: _Array, theta: _Array, penalty: _Penalty, n_threads: int
) -> tuple[_Array, ...]:
    """activity (F,), slope (F, K), fired (F,), open (K,), above (F,), n_above (F,)."""

def decode(
    code: _Code,
    W_dec: _Array,
    b_dec: _Array,
    target: _Array | None,
    out: _Array,
    n_threads: int,
) -> None: ...
def pair_gradients(
    code: _Code,
    W_dec: _Array,
    b_dec: _Array | None,
    target: _Array | None,
    gradient_scale: float,
    weight: _Array,
    norms: _Array,
    theta: _Array,
    penalty: _Penalty,
    residual: _Array,
    error: _Array,
    dh: _Array,
    threshold: _Array | None,
    n_threads: int,
) -> None: ...
def threshold_tile(
    h: _Array,
    inner: _Array,
    first: int,
    bias: _Array,
    unit: _Array,
    theta: _Array,
    closed_slope: _Array,
    window: float,
    gradient_scale: float,
    sums: _Array,
    n_threads: int,
) -> None: ...
def threshold_open_gates(
    code: _Code,
    order: _Order,
    chosen: _Array,
    weight: _Array,
    norms: _Array,
    theta: _Array,
    penalty: _Penalty,
    gradient: _Array,
    n_threads: int,
) -> None: ...
def prefer_huge_pages(array: _Array) -> None:
    """Ask the system to back the array with large pages; nothing but speed depends on it."""

def prepare_batch(
    x: _Array,
    fourth: _Array,
    bf16: _Array | None,
    int8: _Array | None,
    int8_scale: _Array | None,
    int8_norm: _Array | None,
    inverse_column_scale: _Array | None,
    n_threads: int,
) -> None: ...
def column_sums(a: _Array, sums: _Array, n_threads: int) -> None: ...
def mix_snapshots(x: _Array, mix: _Array, out: _Array, n_threads: int) -> None: ...
def squared_distances(x: _Array, mean: _Array, out: _Array, n_threads: int) -> None: ...
def gradient_squares(code: _Code, order: _Order, parts: tuple[Any, ...], W_dec: _Array, n_threads: int) -> _Array: ...
def gradient_rows(
    code: _Code,
    order: _Order,
    parts: tuple[Any, ...],
    W_dec: _Array,
    dW_enc: _Array,
    dW_dec: _Array,
    n_threads: int,
) -> None: ...
def update_rows(
    code: _Code,
    order: _Order,
    parts: tuple[Any, ...],
    db_enc: _Array,
    W_enc: tuple[Any, ...],
    W_dec: tuple[Any, ...],
    b_enc: tuple[Any, ...],
    last_step: _Array,
    derived: tuple[Any, ...],
    options: tuple[Any, ...],
    n_threads: int,
) -> None: ...
def update_dense_rows(
    dW_enc: _Array,
    dW_dec: _Array,
    db_enc: _Array,
    touched: _Array,
    first: int,
    W_enc: tuple[Any, ...],
    W_dec: tuple[Any, ...],
    b_enc: tuple[Any, ...],
    last_step: _Array,
    derived: tuple[Any, ...],
    options: tuple[Any, ...],
    n_threads: int,
) -> None: ...
def derive_rows(W_enc: _Array, W_dec: _Array, derived: tuple[Any, ...], n_threads: int) -> None: ...
