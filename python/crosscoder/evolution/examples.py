"""Where features are active: for each feature its strongest contexts, a uniform sample of all its contexts, a histogram
of its activations, and how often it fires at each snapshot.

Letters: F features, K snapshots, B tokens in a batch, n tokens kept of a feature, L tokens in a window, H bins.

All of it is ours. A feature is active on a token where its gate is open at one snapshot or more; its activation there
is the same at all of them. One pass over the tokens, in batches of whole sequences, keeps for each feature

- the `n_examples` strongest contexts: at most one a sequence, its strongest token there, the earlier of equal ones;
  the strongest first, equal ones in order of the text;
- a sample of `n_samples` of the tokens where it is active, each as likely as any other and without replacement: those
  with the smallest keys, a key being a hash (a bijection of 64 bits) of the token's sequence and position, salted by
  seed and feature;
- the number of its activations in each quarter of an octave from 2^-12 to 2^12 (`histogram_edges`).

So nothing that is kept depends on the order of the sequences, on how they are divided into batches or on the number of
threads; only the rounding of `sum_activation` depends on the order of the sequences. Windows are filled from the batch
at hand, so no second pass is needed. Memory does not depend on the number of tokens: a feature takes 8 K + 784 +
(12 + 4 L) n_examples + (16 + 4 L) n_samples bytes (F = 98,304, K = 32, L = 24, n = 8 and 32: 540 MB).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder import _core
from crosscoder.common.arrays import Arrays
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.kernels.arrays import n_threads

if TYPE_CHECKING:
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.code import SparseCode

Ints = NDArray[np.int64]
N_EXAMPLES, N_SAMPLES, BEFORE, AFTER = 10, 32, 16, 7

_LOWEST_EXPONENT, _BINS_PER_OCTAVE = -12, 4
_CONTEXT_ENTRIES = 1 << 22
_WORST_KEY = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class KeptTokens:
    """n tokens of each feature, with the feature's activations around them."""

    sequence: NDArray[np.int32]
    """(F, n) sequence of each token, an index into the TokenSet; -1 where there are fewer."""
    position: NDArray[np.int32]
    """(F, n) its position in the sequence; -1 where there are fewer."""
    activations: NDArray[np.float32]
    """(F, n, L) the feature's activation at each token of the window; 0 outside the sequence."""
    before: int
    """Tokens of a window before its own, which stands at this index."""

    @property
    def value(self) -> NDArray[np.float32]:
        """(F, n) activation of each token; 0 where there are fewer."""
        return self.activations[:, :, self.before]


@dataclass(frozen=True)
class Examples:
    """What one pass over the tokens keeps."""

    n_tokens: int
    """Tokens seen."""
    fired: NDArray[np.int64]
    """(F, K) tokens with the feature's gate open at each snapshot."""
    fired_any: NDArray[np.int64]
    """(F,) tokens with a gate open at one snapshot or more."""
    sum_activation: NDArray[np.float64]
    """(F,) sum of the activations over the `fired_any` tokens."""
    histogram: NDArray[np.int64]
    """(F, H) activations from `histogram_edges()[i]` to below the next; the first and the last bin also count what lies
    outside. Sums to `fired_any`."""
    strongest: KeptTokens
    """The strongest token of each of the n sequences where the feature is strongest, the strongest first."""
    sampled: KeptTokens
    """A uniform sample of the `fired_any` tokens, in random order: the first j of them are a sample of size j."""

    @property
    def firing_rate(self) -> NDArray[np.float32]:
        """(F, K) share of tokens with the gate open."""
        return (self.fired / max(self.n_tokens, 1)).astype(np.float32)

    @property
    def max_activation(self) -> NDArray[np.float32]:
        """(F,) the largest activation, 0 if it never fired."""
        return self.strongest.value[:, 0].copy()

    @property
    def mean_activation(self) -> NDArray[np.float32]:
        """(F,) mean over the tokens where it fires at all, 0 if it never does."""
        return (self.sum_activation / np.maximum(self.fired_any, 1)).astype(np.float32)


@dataclass(frozen=True)
class ContextWindows:
    """Token windows around kept tokens, by feature, within a feature in the order of `KeptTokens`. M windows."""

    feature: NDArray[np.int32]
    """(M,)"""
    tokens: NDArray[np.int32]
    """(M, L) token ids; -1 outside the document of the kept token, or outside its sequence."""
    activations: NDArray[np.float32]
    """(M, L) the feature's activation, 0 where tokens is -1."""
    document: NDArray[np.int32]
    """(M,) index into `TokenSet.names`."""
    position: NDArray[np.int64]
    """(M,) position in its document of the window's first token that is not -1, the end-of-text token before
    the document being its token 0."""


def tokens_in_order(code: SparseCode, sequence_B: ArrayLike, position_B: ArrayLike) -> tuple[Ints, Ints]:
    """Sequences and positions (B,) of a code's tokens as int64. Raises `DataError` unless they are as many, in order of
    the text."""
    sequence, position = np.asarray(sequence_B).astype(np.int64), np.asarray(position_B).astype(np.int64)
    if sequence.shape != (code.n_tokens,) or position.shape != (code.n_tokens,):
        raise DataError(
            f"{code.n_tokens} tokens need as many sequences and positions, got {sequence.shape} and {position.shape}"
        )
    if (np.diff((sequence << 32) + position) <= 0).any():
        raise DataError("tokens must come in order of the text: by sequence, then by position")
    return sequence, position


class ExampleCollector:
    """Keeps the examples of every feature while batches go by. The work is done in csrc/study/examples.cpp."""

    def __init__(
        self,
        n_features: int,
        n_snapshots: int,
        *,
        n_examples: int = N_EXAMPLES,
        n_samples: int = N_SAMPLES,
        before: int = BEFORE,
        after: int = AFTER,
        seed: int = 0,
    ) -> None:
        """A window is `before` tokens, the kept one, and `after` tokens; `seed` draws the sample.

        Raises `ConfigError` for a negative number, or 0 examples or samples.
        """
        if min(n_examples, n_samples) < 1 or min(before, after, seed) < 0:
            raise ConfigError(
                "n_examples and n_samples must be at least 1, before, after and seed at least 0; they are "
                f"{n_examples}, {n_samples}, {before}, {after} and {seed}"
            )
        self._n_features, self._n_snapshots = n_features, n_snapshots
        self._before, self._seed = before, seed
        length = before + 1 + after
        # 0 and -1 are also how csrc/study/examples.hpp knows an empty entry.
        self._state: Arrays = {
            "n_tokens": np.zeros((), dtype=np.int64),
            "last_sequence": np.full((), -1, dtype=np.int64),
            "fired": np.zeros((n_features, n_snapshots), dtype=np.int64),
            "fired_any": np.zeros(n_features, dtype=np.int64),
            "sum": np.zeros(n_features),
            "histogram": np.zeros((n_features, _core.HISTOGRAM_BINS), dtype=np.int64),
        }
        for name, n, rank in (
            ("strongest", n_examples, np.zeros((n_features, n_examples), dtype=np.float32)),
            ("sampled", n_samples, np.full((n_features, n_samples), _WORST_KEY)),
        ):
            self._state[f"{name}.rank"] = rank
            self._state[f"{name}.sequence"] = np.full((n_features, n), -1, dtype=np.int32)
            self._state[f"{name}.position"] = np.full((n_features, n), -1, dtype=np.int32)
            self._state[f"{name}.activations"] = np.zeros((n_features, n, length), dtype=np.float32)

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return int(self._state["n_tokens"])

    def add(self, code: SparseCode, sequence_B: ArrayLike, position_B: ArrayLike) -> None:
        """A batch of whole sequences: its code, and for each of its B tokens the sequence and the position in it.

        Within a batch tokens are in order of the text (by sequence, then position); positions may be left out
        (end-of-text tokens are). A sequence comes whole and once, sequences in any order from batch to batch.
        Raises `DataError` for another crosscoder's code, tokens out of order or a sequence that goes on from the batch
        before, `NonFiniteError` for activations that are not finite.
        """
        sequence, position = tokens_in_order(code, sequence_B, position_B)
        self._check(code, sequence, position)
        if not sequence.size:
            return
        parts = (code.row_offsets, code.features, code.values.detach().float(), code.gates)
        row_offsets, features, values, gates = (np.ascontiguousarray(part.cpu().numpy()) for part in parts)
        state = self._state
        _core.collect_examples(
            (row_offsets, features, values, gates, code.n_snapshots, code.n_features),
            (sequence << 32) + position,
            (state["fired"], state["fired_any"], state["sum"], state["histogram"]),
            self._kept("strongest"),
            self._kept("sampled"),
            self._before,
            self._seed,
            n_threads(),
        )
        state["n_tokens"] += sequence.size
        state["last_sequence"][...] = sequence[-1]

    def _kept(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rank, sequence, position, activations = (
            self._state[f"{name}.{part}"] for part in ("rank", "sequence", "position", "activations")
        )
        return rank, sequence, position, activations

    def _check(self, code: SparseCode, sequence: np.ndarray, position: np.ndarray) -> None:
        if (code.n_features, code.n_snapshots) != (self._n_features, self._n_snapshots):
            raise DataError(
                f"a code of {code.n_features} features and {code.n_snapshots} snapshots does not fit a "
                f"collector of {self._n_features} and {self._n_snapshots}"
            )
        if not sequence.size:
            return
        if min(sequence.min(), position.min()) < 0 or max(sequence.max(), position.max()) >= 1 << 31:
            raise DataError("sequences and positions must be from 0 to 2^31 - 1")
        if sequence[0] == self._state["last_sequence"]:
            raise DataError(f"sequence {sequence[0]} continues an earlier batch; batches hold whole sequences")
        finite = code.values.isfinite()
        if not bool(finite.all()):
            raise NonFiniteError(f"an activation in sequence {sequence[int(code.rows()[~finite][0])]} is not finite")

    def state(self) -> Arrays:
        """Everything kept, to be saved; not copied."""
        return dict(self._state)

    def load_state(self, state: Arrays) -> None:
        """Go on from a `state` of a collector with the same options. Raises `DataError` if it is of others."""
        wanted = {name: (array.shape, array.dtype) for name, array in self._state.items()}
        if {name: (array.shape, array.dtype) for name, array in state.items()} != wanted:
            raise DataError("the state is of a collector with other options")
        self._state = {name: np.require(array, requirements=("C", "W")) for name, array in state.items()}

    def result(self) -> Examples:
        """Everything kept so far; not copied, so it changes with the next `add`."""
        state = self._state
        return Examples(
            n_tokens=self.n_tokens,
            fired=state["fired"],
            fired_any=state["fired_any"],
            sum_activation=state["sum"],
            histogram=state["histogram"],
            strongest=KeptTokens(*self._kept("strongest")[1:], before=self._before),
            sampled=KeptTokens(*self._kept("sampled")[1:], before=self._before),
        )


def collect_examples(
    batches: Iterable[tuple[SparseCode, ArrayLike, ArrayLike]], n_features: int, n_snapshots: int, **options: int
) -> Examples:
    """`ExampleCollector`, with its options, over batches of (code, sequence (B,), position (B,))."""
    collector = ExampleCollector(n_features, n_snapshots, **options)
    for code, sequence_B, position_B in batches:
        collector.add(code, sequence_B, position_B)
    return collector.result()


def histogram_edges() -> NDArray[np.float32]:
    """(H + 1,) edges of the activations' bins: quarters of an octave from 2^-12 to 2^12, rounded to float32."""
    quarters = np.arange(_core.HISTOGRAM_BINS + 1) / _BINS_PER_OCTAVE
    return np.exp2(_LOWEST_EXPONENT + quarters).astype(np.float32)


def contexts(kept: KeptTokens, tokens: TokenSet) -> ContextWindows:
    """The text of kept tokens. Raises `DataError` if they are of another TokenSet.

    A window ends where its token's document does: what stands before belongs to other text.
    """
    n_sequences, context = tokens.ids.shape
    if kept.sequence.size and (kept.sequence.max() >= n_sequences or kept.position.max() >= context):
        raise DataError(
            f"the examples are of another TokenSet than this one of {n_sequences} sequences of {context} tokens"
        )
    feature, rank = np.nonzero(kept.sequence >= 0)
    row = kept.sequence[feature, rank].astype(np.int64)
    column = kept.position[feature, rank].astype(np.int64)
    length = kept.activations.shape[2]
    document = tokens.document[row, column]
    windows = np.empty((row.size, length), dtype=np.int32)
    activations = np.empty((row.size, length), dtype=np.float32)
    first = np.empty(row.size, dtype=np.int64)
    step = max(1, _CONTEXT_ENTRIES // length)  # so that index arrays stay small beside the result
    for start in range(0, row.size, step):
        part = slice(start, start + step)
        columns = column[part, None] + np.arange(length) - kept.before
        inside = (columns >= 0) & (columns < context)
        columns = columns.clip(0, context - 1)
        inside &= tokens.document[row[part, None], columns] == document[part, None]
        windows[part] = np.where(inside, tokens.ids[row[part, None], columns], -1)
        activations[part] = np.where(inside, kept.activations[feature[part], rank[part]], 0)
        first[part] = columns[np.arange(len(columns)), inside.argmax(axis=1)]
    starts = np.searchsorted(tokens.document.ravel(), document)
    return ContextWindows(
        feature=feature.astype(np.int32),
        tokens=windows,
        activations=activations,
        document=document.astype(np.int32, copy=False),
        position=row * context + first - starts,
    )


def density_histogram(
    firing_rate: ArrayLike, *, bins_per_decade: int = 5, lowest: float = 1e-7
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Histogram of firing rates on a logarithmic axis: edges (n + 1,) as rates, counts (n,).

    Rates of 0 are not counted; those under `lowest` fall into the first bin.
    """
    rates = np.asarray(firing_rate, dtype=np.float64).ravel()
    n_bins = round(-np.log10(lowest) * bins_per_decade)
    edges = np.logspace(np.log10(lowest), 0, n_bins + 1)
    counts, _ = np.histogram(np.clip(rates[rates > 0], edges[0], edges[-1]), bins=edges)
    return edges, counts
